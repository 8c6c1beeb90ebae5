"""Configurations: methods as dataclasses, named presets, and the schema that checks both."""

# importing `further` adds its submodules to SUBMODULES, which the presets list
from unipelt.config.further import LNTuningConfig, ReFTConfig
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
    TokensConfig,
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
    "LNTuningConfig",
    "LoRAConfig",
    "ParallelConfig",
    "PeftTermConfig",
    "Place",
    "PrefixConfig",
    "PromptConfig",
    "REDConfig",
    "ReFTConfig",
    "SubmoduleConfig",
    "TokensConfig",
    "UniPELTConfig",
    "resolve",
]
