"""Configurations by name, and of what a user may pass: a preset, differences to one, a JSON or YAML file."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from unipelt.config.methods import (
    SUBMODULES,
    AdapterConfig,
    LoRAConfig,
    ParallelConfig,
    PrefixConfig,
    PromptConfig,
    UniPELTConfig,
)
from unipelt.config.schema import ConfigError, read_mapping
from unipelt.files.messages import show, suggest


def _presets() -> dict[str, UniPELTConfig]:
    nothing = UniPELTConfig(adapter=None, prefix=None, lora=None)
    parts: dict[str, Any] = {"adapter": AdapterConfig(), "prefix": PrefixConfig(), "lora": LoRAConfig()}
    bare: dict[str, Any] = {name: replace(part, gate=False) for name, part in parts.items()}
    presets = {
        "fine-tuning": replace(nothing, train_base=True),
        "bitfit": replace(nothing, bitfit=True),
        **{name: replace(nothing, **{name: part}) for name, part in bare.items()},
        "prompt": replace(nothing, prompt=PromptConfig()),
    }
    own = replace(parts["prefix"], softmax="own")
    presets["unipelt"] = replace(nothing, adapter=AdapterConfig(start="zero"), prefix=own, lora=parts["lora"])
    for letters in ("ap", "apl", "al", "pl"):
        chosen = [name for name in parts if name[0] in letters]
        presets[f"unipelt-{letters}"] = replace(nothing, **{name: parts[name] for name in chosen})
        presets[f"unipelt-{letters}-nogate"] = replace(nothing, **{name: bare[name] for name in chosen})
    long = replace(parts["prefix"], length=30)
    presets |= {name: replace(nothing, more=(cls(gate=False),)) for name, cls in SUBMODULES.items()}
    presets["mam"] = replace(nothing, prefix=replace(long, gate=False), more=(ParallelConfig(gate=False),))
    presets["unipelt-mam"] = replace(nothing, prefix=long, more=(ParallelConfig(),))
    return presets


PRESETS: Mapping[str, UniPELTConfig] = types.MappingProxyType(_presets())
"""Methods by name: those of the paper, of which every `unipelt-*` has a `-nogate` twin, and further submodules.

`unipelt` has the parts of `unipelt-apl` and starts near the base: its prefix has a softmax of its own, and takes no
attention from the text; its adapter starts at zero.
Single methods are ungated. `mam` is the mix-and-match adapter of He et al. (2022), `unipelt-mam` the same with gates.
"""


def resolve(config: str | Path | Mapping[str, Any] | UniPELTConfig) -> UniPELTConfig:
    """Make a checked `UniPELTConfig` of anything a user may pass.

    Args:
        config: a preset's name, a `UniPELTConfig`, a path to a JSON or YAML file, or a dict. A dict (or file) may
            name a `preset` to start from; its other keys are the differences.

    Raises:
        ConfigError: the name, a key, a type or a value is not known; the message says what is.
        FileNotFoundError: a path (something with a suffix of JSON or YAML) that is not there.
    """
    if isinstance(config, UniPELTConfig):
        return config
    if isinstance(config, Mapping):
        values = dict(config)
        preset = values.pop("preset", None)
        if preset is None:
            return UniPELTConfig.from_dict(values)
        if not isinstance(preset, str):
            raise ConfigError(f"preset must be a name, not {show(preset)}; the presets are {', '.join(PRESETS)}")
        return _preset(preset).updated(values)
    if isinstance(config, (str, Path)):
        if isinstance(config, Path) or config.endswith((".json", ".yaml", ".yml")):
            return resolve(read_mapping(config))
        return _preset(config)
    raise ConfigError(
        f"a configuration is a preset's name, a UniPELTConfig, a dict or a path, not {type(config).__name__}"
    )


def _preset(name: str) -> UniPELTConfig:
    if name not in PRESETS:
        raise ConfigError(
            f"there is no preset {show(name)}; "
            + suggest(name, PRESETS, f"the presets are {', '.join(PRESETS)} (a path ends in .json, .yaml or .yml)")
        )
    return PRESETS[name]
