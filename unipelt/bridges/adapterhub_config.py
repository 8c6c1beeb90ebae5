"""Convert the configuration of an AdapterHub checkpoint, and refuse fields that this package does not compute."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from unipelt.checkpoint.manifest import CheckpointError
from unipelt.config.gate import GateConfig
from unipelt.config.methods import UniPELTConfig
from unipelt.config.parts import AdapterConfig, LoRAConfig, PrefixConfig
from unipelt.config.schema import ConfigError
from unipelt.files.messages import show


@dataclass(frozen=True)
class _Kind:
    """The known fields of one kind of submodule's configuration.

    Attributes:
        what: the kind, for a message.
        needed: fields with one supported value each.
        used: fields that are read.
        ignored: fields that change no logit (at least in an encoder), or that follow from the tensors' shapes.
    """

    what: str
    needed: Mapping[str, Any]
    used: Collection[str]
    ignored: Collection[str]


_COMMON = ("architecture", "dropout", "init_weights", "init_weights_seed", "dtype")
_KINDS = {
    "lora": _Kind(
        "LoRA",
        {
            **{"selfattn_lora": True, "intermediate_lora": False, "output_lora": False, "composition_mode": "add"},
            **{"use_dora": False, "vera_d": None, "vera_b": None},
        },
        ("r", "alpha", "use_gating", "leave_out", "attn_matrices"),
        _COMMON,
    ),
    "prefix_tuning": _Kind(
        "prefix",
        {"shared_gating": True},
        ("prefix_length", "non_linearity", "use_gating", "leave_out"),
        (*_COMMON, "flat", "bottleneck_size", "encoder_prefix", "cross_prefix"),
    ),
    "adapter": _Kind(
        "adapter",
        {
            **{"mh_adapter": False, "output_adapter": True, "is_parallel": False, "non_linearity": "relu"},
            **{"original_ln_before": True, "original_ln_after": True, "residual_before_ln": True},
            **{"ln_before": False, "ln_after": False, "phm_layer": False, "inv_adapter": None},
        },
        ("scaling", "use_gating", "leave_out"),
        (
            *(*_COMMON, "reduction_factor", "cross_adapter", "stochastic_depth", "inv_adapter_reduction_factor"),
            *("adapter_residual_before_ln", "phm_dim", "phm_rank", "phm_bias", "phm_c_init", "phm_init_range"),
            *("factorized_phm_W", "factorized_phm_rule", "shared_W_phm", "shared_phm_rule", "learn_phm"),
            "hypercomplex_nonlinearity",
        ),
    ),
}
"""By the field `architecture`; the configuration of a bottleneck adapter has none, and is `adapter` here."""


def read_configuration(
    model: PreTrainedModel, name: str, values: Mapping[str, Any], given: Mapping[str, Tensor]
) -> tuple[UniPELTConfig, bool, float]:
    """Return the method to inject, whether the prefix has the deployed form, and the scale of the adapter's output."""
    parts = _parts(values.get("config"))
    lora = prefix = adapter = None
    deployed, scaling = False, 1.0
    try:
        if (part := parts.get("lora")) is not None:
            matrices = part.get("attn_matrices", ["q", "v"])
            if not isinstance(matrices, list) or sorted(map(str, matrices)) != ["q", "v"]:
                raise CheckpointError(f"its LoRA has attn_matrices {show(matrices)}, and here it goes to q and v")
            rank = _size(given, f".loras.{name}.lora_A", 0)
            if part.get("r") != rank:
                raise CheckpointError(f"its LoRA has r {show(part.get('r'))}, and {rank} ranks in its tensors")
            lora = LoRAConfig(rank=rank, alpha=part.get("alpha"), gate=part["use_gating"])  # type: ignore[arg-type]
        if (part := parts.get("prefix_tuning")) is not None:
            if model.config.model_type == "distilbert":
                raise CheckpointError(
                    "in DistilBERT adapters adds 1 to a prefix's attention logits wherever a batch is padded (with "
                    "sdpa, its default), which is not done here"
                )
            where = f".prefix_tunings.{name}.self_prefix."
            deployed = any(key.endswith(f"{where}control_trans") for key in given)
            if not deployed and part.get("non_linearity") != "tanh":
                raise CheckpointError(
                    f"its prefix has non_linearity {show(part.get('non_linearity'))}, and the network here has tanh; "
                    "call model.eject_prefix_tuning(name) there, and save it again"
                )
            length, hidden = part.get("prefix_length"), 1
            if not deployed:
                length = _size(given, f"{where}wte.weight", 0)
                hidden = _size(given, f"{where}control_trans.0.weight", 0)
            if length != part.get("prefix_length"):
                raise CheckpointError(
                    f"its prefix has prefix_length {show(part.get('prefix_length'))}, and its tensors {length} tokens"
                )
            prefix = PrefixConfig(length=length, hidden=hidden, gate=part["use_gating"])  # type: ignore[arg-type]
            if deployed and prefix.length > _size(given, f"{where}control_trans", 0):
                raise CheckpointError(f"its prefix has prefix_length {length}, for which its tensor is too small")
        if (part := parts.get("adapter")) is not None:
            scaling = part.get("scaling", 1.0)
            if type(scaling) not in (int, float):
                raise CheckpointError(f"its adapter has scaling {show(scaling)}, and not a constant")
            adapter = AdapterConfig(_size(given, f".adapters.{name}.adapter_down.0.weight", 0), gate=part["use_gating"])
        return (
            UniPELTConfig(
                adapter=adapter, prefix=prefix, lora=lora, gate=GateConfig(pooling="mean"), layers=_layers(model, parts)
            ),
            deployed,
            scaling,
        )
    except ConfigError as error:
        raise CheckpointError(f"its configuration cannot be meant: {error}") from error


def _parts(config: Any) -> dict[str, dict[str, Any]]:
    """Return the configuration of each submodule by its kind.

    Raises `CheckpointError` for a field that is not supported.
    """
    if not isinstance(config, dict):
        raise CheckpointError(f"config must be a mapping, not {show(config)}")
    listed = config.get("configs") if config.get("architecture") == "union" else [config]
    if not isinstance(listed, list) or not listed or not all(isinstance(part, dict) for part in listed):
        raise CheckpointError(f"config.configs must be a list of mappings, not {show(listed)}")
    parts: dict[str, dict[str, Any]] = {}
    for part in listed:
        name = part.get("architecture") or "adapter"
        if not isinstance(name, str) or name not in _KINDS:
            raise CheckpointError(f"it holds {show(name)}, which is not read; {', '.join(_KINDS)} are")
        if name in parts:
            raise CheckpointError(f"it holds {_KINDS[name].what} twice")
        kind = _KINDS[name]
        gated = part.get("use_gating", False)
        for field, value in part.items():
            if field in kind.needed:
                wanted = kind.needed[field]
                if (type(value) is not type(wanted) or value != wanted) and not (
                    field == "shared_gating" and not gated
                ):
                    raise CheckpointError(
                        f"its {kind.what} has {field} {show(value)}, and only {wanted!r} is computed here"
                    )
            elif field not in (*kind.used, *kind.ignored) and value:
                raise CheckpointError(f"its {kind.what} has {show(field)} {show(value)}, which is not known here")
        if missing := [field for field in kind.needed if field not in part]:
            raise CheckpointError(f"its {kind.what} does not say {missing[0]}")
        parts[name] = {**part, "use_gating": gated}
    return parts


def _layers(model: PreTrainedModel, parts: Mapping[str, Mapping[str, Any]]) -> tuple[int, ...] | None:
    """Return the layers that carry submodules, or None for all.

    Raises `CheckpointError` if the submodules leave out different layers.
    """
    left_out = [part.get("leave_out") or [] for part in parts.values()]
    for layers in left_out:
        if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
            raise CheckpointError(f"leave_out must be a list of layers, not {show(layers)}")
        if sorted(layers) != sorted(left_out[0]):
            raise CheckpointError(
                f"leave_out is {show(left_out[0])} for one submodule and {show(layers)} for another; here all go to "
                "the same layers"
            )
    if not left_out[0]:
        return None
    return tuple(layer for layer in range(model.config.num_hidden_layers) if layer not in left_out[0])


def _size(given: Mapping[str, Tensor], end: str, dimension: int) -> int:
    """Return one size of the first tensor with a name that ends in `end`."""
    for key, tensor in given.items():
        if key.endswith(end) and tensor.dim() > dimension:
            return tensor.shape[dimension]
    raise CheckpointError(f"it has no tensor {show(f'*{end}')}, which its configuration speaks of")
