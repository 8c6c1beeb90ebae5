"""UniPELT (Mao et al., ACL 2022) on Transformers: gated Adapter, Prefix and LoRA in a pretrained model."""

from unipelt.api import InjectionError, inject, remove
from unipelt.bridges.adapterhub import load_adapterhub
from unipelt.bridges.peft import load_peft, save_peft
from unipelt.bridges.release import load_release_state_dict, release_state_dict
from unipelt.checkpoint.checkpoint import from_pretrained, load, save
from unipelt.checkpoint.manifest import CheckpointError
from unipelt.checkpoint.push import load_tokenizer, push_to_hub
from unipelt.config.methods import (
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
from unipelt.config.presets import PRESETS, resolve
from unipelt.config.schema import ConfigError
from unipelt.files.hub import HubError
from unipelt.gates.fold import FoldedGate, FoldReport, fold
from unipelt.gates.measure import FoldError
from unipelt.gates.record import GateRecord, gate_penalty, record_gates
from unipelt.hosts.describe import DescribeError, describe
from unipelt.hosts.description import Attention, Family, Stack
from unipelt.hosts.families import register_family
from unipelt.injection.parameters import ParameterCounts, parameter_counts
from unipelt.multitask.batch_rows import MixedOutput
from unipelt.multitask.tasks import Tasks
from unipelt.submodules.bottleneck import Houlsby, Parallel
from unipelt.submodules.compacter import Compacter
from unipelt.submodules.dora import DoRA
from unipelt.submodules.ia3 import IA3
from unipelt.submodules.prompt import Prompt
from unipelt.submodules.red import RED
from unipelt.submodules.term import Spot, register_submodule

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
    "DescribeError",
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
    "describe",
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
