"""UniPELT (Mao et al., ACL 2022) on Transformers: gated Adapter, Prefix and LoRA in a pretrained model."""

from unipelt.adapterhub import load_adapterhub
from unipelt.bottleneck import Houlsby, Parallel
from unipelt.checkpoint import from_pretrained, load, save
from unipelt.compacter import Compacter
from unipelt.config import (
    AdapterConfig,
    CompacterConfig,
    GateConfig,
    HoulsbyConfig,
    IA3Config,
    LoRAConfig,
    ParallelConfig,
    PrefixConfig,
    PromptConfig,
    REDConfig,
    SubmoduleConfig,
    UniPELTConfig,
)
from unipelt.dora import DoRA
from unipelt.families import Attention, Family, Stack, register_family
from unipelt.fold import FoldedGate, FoldReport, fold
from unipelt.hub import HubError
from unipelt.ia3 import IA3
from unipelt.inject import InjectionError, inject, remove
from unipelt.manifest import CheckpointError
from unipelt.parameters import ParameterCounts, parameter_counts
from unipelt.peft import load_peft, save_peft
from unipelt.presets import PRESETS, resolve
from unipelt.prompt import Prompt
from unipelt.publish import load_tokenizer, push_to_hub
from unipelt.record import GateRecord, gate_penalty, record_gates
from unipelt.red import RED
from unipelt.release import load_release_state_dict, release_state_dict
from unipelt.rows import MixedOutput
from unipelt.several import Tasks
from unipelt.spread import FoldError
from unipelt.term import Spot, register_submodule
from unipelt.typed import ConfigError

__version__ = "0.1.0"

__all__ = [
    "IA3",
    "PRESETS",
    "RED",
    "AdapterConfig",
    "Attention",
    "CheckpointError",
    "Compacter",
    "CompacterConfig",
    "ConfigError",
    "DoRA",
    "Family",
    "FoldError",
    "FoldReport",
    "FoldedGate",
    "GateConfig",
    "GateRecord",
    "Houlsby",
    "HoulsbyConfig",
    "HubError",
    "IA3Config",
    "InjectionError",
    "LoRAConfig",
    "MixedOutput",
    "Parallel",
    "ParallelConfig",
    "ParameterCounts",
    "PrefixConfig",
    "Prompt",
    "PromptConfig",
    "REDConfig",
    "Spot",
    "Stack",
    "SubmoduleConfig",
    "Tasks",
    "UniPELTConfig",
    "fold",
    "from_pretrained",
    "gate_penalty",
    "inject",
    "load",
    "load_adapterhub",
    "load_peft",
    "load_release_state_dict",
    "load_tokenizer",
    "parameter_counts",
    "push_to_hub",
    "record_gates",
    "register_family",
    "register_submodule",
    "release_state_dict",
    "remove",
    "resolve",
    "save",
    "save_peft",
]
