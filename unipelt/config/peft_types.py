"""PEFT's tuners: which can be a term, their options, and their configurations. PEFT is imported only when needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from unipelt.config.parts import Place
from unipelt.config.peft import PeftTermConfig
from unipelt.config.schema import ConfigError
from unipelt.files.messages import shorten, show, suggest

_PROMPT = "it adds tokens before the text and no layer around a projection; take the submodule prompt or prefix"
REFUSED: Mapping[str, str] = {
    "PROMPT_TUNING": _PROMPT,
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "P_TUNING": _PROMPT,
    "CPT": _PROMPT,
    "PREFIX_TUNING": "it adds keys and values and no layer around a projection; take the submodule prefix",
    "CARTRIDGE": "it adds keys and values and no layer around a projection; take the submodule prefix",
    "ADAPTION_PROMPT": "it replaces whole attention modules; take the submodule prefix",
    "LN_TUNING": "it trains copies of norms and is no layer around a projection",
    "TRAINABLE_TOKENS": "it trains rows of embeddings and is no layer around a projection",
    "SHADOW": "it runs a second model beside the base, with hooks on whole layers",
    "XLORA": "it mixes LoRA adapters that were trained before, and reads them from files",
    "POLY": "each pass must name the task of every row (task_ids), which a model of Transformers does not take",
    "ADALORA": "its budget of ranks and its loss are steps of PEFT's own training loop; take LORA",
    "UNIPELT": "it is the method of this package; its submodules stand in the method beside the key peft",
}
"""PEFT's types that cannot be a term, with the reason."""

_PLACEMENT = "places, layers and the parts of a method say where a term is"
_OBJECT = "it needs an object of PEFT's, and a method holds plain values"
_RESERVED: Mapping[str, str] = {
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"), _PLACEMENT),
    **dict.fromkeys(("target_parameters", "layer_replication", "ensure_weight_tying"), _PLACEMENT),
    **dict.fromkeys(("modules_to_save", "trainable_token_indices"), "train_head says whether the head trains"),
    **dict.fromkeys(("use_bdlora", "megatron_core"), _OBJECT),
    "alora_invocation_tokens": "the term would have to read the tokens of the text",
    "fan_in_fan_out": "it is set by the projection",
    "use_asa": "its search for subspaces is a step of PEFT's own training loop",
    "runtime_offload_base_weight": "it would move weights of the base",
}
"""Options of PEFT's that a method cannot set, with the reason."""

DEFAULTS: Mapping[str, Mapping[str, Any]] = {"FROD": {"progressbar": False}, "IA3": {"feedforward_modules": []}}
"""Options by type that have another default here than in PEFT."""


MIXES_ROWS: Mapping[str, str] = {"LILY": "averages its router over all tokens of a batch, padding and other texts too"}
"""Types whose output for a text depends on the rest of its batch, with the reason."""


def import_peft() -> Any:
    """Import PEFT. Raise `ImportError` if PEFT is not installed."""
    try:
        import peft
    except ImportError as error:
        raise ImportError("a PEFT tuner needs PEFT, which is not installed: pip install 'unipelt[peft]'") from error
    return peft


def find_tuner(name: str) -> tuple[type[Any], type[Any]]:
    """Return the classes of configuration and tuner of one of PEFT's types.

    Raises:
        ConfigError: PEFT has no such type, or the type cannot be a term; the message gives the reason.
        ImportError: PEFT is not installed.
    """
    peft = import_peft()
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    known = {kind.value: kind for kind in PEFT_TYPE_TO_TUNER_MAPPING if kind.value not in REFUSED}
    if name in REFUSED:
        raise ConfigError(f"PEFT's {name} cannot be a submodule: {REFUSED[name]}")
    if name not in known:
        meant = suggest(name, known, f"the types here are {', '.join(sorted(known))}")
        raise ConfigError(f"PEFT {peft.__version__} has no type {show(name)}; {meant}")
    return PEFT_TYPE_TO_CONFIG_MAPPING[known[name]], PEFT_TYPE_TO_TUNER_MAPPING[known[name]]


def peft_config(part: PeftTermConfig, targets: Mapping[Place, Collection[str]]) -> Any:
    """Return PEFT's configuration of a tuner.

    Args:
        part: the configuration of the submodule.
        targets: ends of the names of the projections, by place.

    Raises:
        ConfigError: the type or an option is wrong, or PEFT refuses the options.
        ImportError: PEFT is not installed.
    """
    cls, _ = find_tuner(part.type)
    options = {**DEFAULTS.get(part.type, {}), **part.options}
    names = {item.name for item in dataclasses.fields(cls)} - _base_fields()
    for name, value in part.options.items():
        if name in names and name in _RESERVED:
            raise ConfigError(f"{part.name}: a method cannot set {name} of PEFT's {part.type}: {_RESERVED[name]}")
        if name in names and name.endswith("_config"):
            raise ConfigError(f"{part.name}: a method cannot set {name} of PEFT's {part.type}: {_OBJECT}")
        if name not in names:
            free = sorted(name for name in names if name not in _RESERVED and not name.endswith("_config"))
            meant = suggest(name, free, f"its options are {', '.join(free)}")
            raise ConfigError(f"{part.name}: PEFT's {part.type} has no option {show(name)}; {meant}")
        if name == "bias" and value != "none":
            raise ConfigError(f"{part.name}: bias must be none; bitfit: true trains the biases of the base")
    if "feedforward_modules" in options:
        options["feedforward_modules"] = _names_at(part, options["feedforward_modules"], targets)
    everywhere = sorted({name for place in part.places for name in targets.get(place, ())})
    try:
        return cls(**options, target_modules=everywhere)
    except Exception as error:  # PEFT's own checks raise errors of every kind
        raise ConfigError(f"{part.name}: PEFT refuses these options of {part.type}: {shorten(error)}") from error


def check_tuner(part: PeftTermConfig) -> None:
    """Check the type and the options of a tuner, without a model. Raises as `peft_config` does."""
    peft_config(part, {place: (place,) for place in part.places})


def _base_fields() -> set[str]:
    """Return the fields that every configuration of PEFT has: the task, the name of the base and others."""
    return {item.name for item in dataclasses.fields(import_peft().PeftConfig)}


def _names_at(part: PeftTermConfig, places: Any, targets: Mapping[Place, Collection[str]]) -> list[str]:
    """Return the names of the projections at some places of a tuner. Raise `ConfigError` for another place."""
    places = [places] if isinstance(places, str) else places
    if wrong := [place for place in places if place not in part.places]:
        raise ConfigError(
            f"{part.name}: feedforward_modules names places here, out of {', '.join(part.places)}, not {show(wrong[0])}"
        )
    return sorted({name for place in places for name in targets.get(place, ())})
