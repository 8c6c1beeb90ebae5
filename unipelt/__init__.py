"""UniPELT (Mao et al., ACL 2022) on Transformers: gated Adapter, Prefix and LoRA in a pretrained model."""

from unipelt.checkpoint import CheckpointError, from_pretrained, load, save
from unipelt.config import (
    PRESETS,
    AdapterConfig,
    ConfigError,
    GateConfig,
    LoRAConfig,
    PrefixConfig,
    UniPELTConfig,
    resolve,
)
from unipelt.families import Attention, Family, Stack, register_family
from unipelt.fold import FoldedGate, FoldReport, fold
from unipelt.inject import InjectionError, inject, remove
from unipelt.parameters import ParameterCounts, parameter_counts
from unipelt.record import GateRecord, record_gates
from unipelt.release import load_release_state_dict, release_state_dict
from unipelt.spread import FoldError

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "AdapterConfig",
    "Attention",
    "CheckpointError",
    "ConfigError",
    "Family",
    "FoldError",
    "FoldReport",
    "FoldedGate",
    "GateConfig",
    "GateRecord",
    "InjectionError",
    "LoRAConfig",
    "ParameterCounts",
    "PrefixConfig",
    "Stack",
    "UniPELTConfig",
    "fold",
    "from_pretrained",
    "inject",
    "load",
    "load_release_state_dict",
    "parameter_counts",
    "record_gates",
    "register_family",
    "release_state_dict",
    "remove",
    "resolve",
    "save",
]
