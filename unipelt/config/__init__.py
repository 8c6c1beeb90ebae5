"""Configurations: methods as dataclasses, named presets, and the schema that checks both."""

from unipelt.config.methods import (
    SUBMODULES,
    AdapterConfig,
    CompacterConfig,
    GateConfig,
    HoulsbyConfig,
    IA3Config,
    LoRAConfig,
    ParallelConfig,
    Place,
    PrefixConfig,
    PromptConfig,
    REDConfig,
    SubmoduleConfig,
    UniPELTConfig,
)
from unipelt.config.peft import PeftTermConfig
from unipelt.config.presets import PRESETS, resolve
from unipelt.config.schema import ConfigError

__all__ = [
    "PRESETS",
    "SUBMODULES",
    "AdapterConfig",
    "CompacterConfig",
    "ConfigError",
    "GateConfig",
    "HoulsbyConfig",
    "IA3Config",
    "LoRAConfig",
    "ParallelConfig",
    "PeftTermConfig",
    "Place",
    "PrefixConfig",
    "PromptConfig",
    "REDConfig",
    "SubmoduleConfig",
    "UniPELTConfig",
    "resolve",
]
