"""Configurations: methods as dataclasses, named presets, and the schema that checks both."""

# importing `further` adds its submodules to SUBMODULES, which the presets list
from unipelt.config.further import (
    CompacterConfig,
    HoulsbyConfig,
    IA3Config,
    LNTuningConfig,
    ParallelConfig,
    REDConfig,
    ReFTConfig,
)
from unipelt.config.gate import GateConfig
from unipelt.config.methods import UniPELTConfig
from unipelt.config.parts import AdapterConfig, LoRAConfig, Place, PrefixConfig, PromptConfig, TokensConfig
from unipelt.config.peft import PeftTermConfig
from unipelt.config.presets import PRESETS, resolve
from unipelt.config.schema import ConfigError
from unipelt.config.submodule import SUBMODULES, SubmoduleConfig

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
