"""UniPELT (Mao et al., ACL 2022) on Transformers: gated Adapter, Prefix and LoRA in a pretrained model."""

from typing import TYPE_CHECKING

from unipelt.lazy import lazy_names
from unipelt.version import __version__ as __version__

if TYPE_CHECKING:
    from unipelt.api import inject
    from unipelt.bridges.adapterhub import load_adapterhub
    from unipelt.bridges.merge_experts import merge_experts
    from unipelt.bridges.peft import load_peft, save_peft
    from unipelt.bridges.peft_socket import from_peft, register_with_peft, to_peft
    from unipelt.bridges.peft_socket.config import PeftConfig
    from unipelt.bridges.plain_model import MergeError, merge
    from unipelt.bridges.release import load_release_state_dict, release_state_dict
    from unipelt.checkpoint.load import from_pretrained, load
    from unipelt.checkpoint.manifest import CheckpointError
    from unipelt.checkpoint.push import load_tokenizer, push_to_hub
    from unipelt.checkpoint.save import save
    from unipelt.checkpoint.swap import swap
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
    from unipelt.config.mixture import MixtureConfig
    from unipelt.config.parts import AdapterConfig, LoRAConfig, PrefixConfig, PromptConfig, TokensConfig
    from unipelt.config.peft import PeftTermConfig
    from unipelt.config.presets import PRESETS, resolve
    from unipelt.config.schema import ConfigError
    from unipelt.config.submodule import SubmoduleConfig
    from unipelt.files.hub import HubError
    from unipelt.gates.fold import FoldedGate, FoldReport, fold
    from unipelt.gates.measure import FoldError
    from unipelt.gates.record import GateRecord, gate_penalty, record_gates
    from unipelt.gates.select import SelectError, SelectReport, select
    from unipelt.hosts.describe import DescribeError, describe
    from unipelt.hosts.description import Attention, Family, Stack
    from unipelt.hosts.families import register_family
    from unipelt.hosts.locate import InjectionError
    from unipelt.injection.disable import disable
    from unipelt.injection.inject import remove
    from unipelt.injection.parameter_groups import parameter_groups, print_trainable_parameters
    from unipelt.injection.parameters import ParameterCounts, parameter_counts
    from unipelt.injection.prefix_start import start_prefix_from
    from unipelt.multitask.batch_rows import MixedOutput
    from unipelt.multitask.combine import combine_tasks
    from unipelt.multitask.fuse import fuse_tasks
    from unipelt.multitask.tasks import Tasks
    from unipelt.submodules.bottleneck import Houlsby, Parallel
    from unipelt.submodules.compacter import Compacter
    from unipelt.submodules.dora import DoRA
    from unipelt.submodules.ia3 import IA3
    from unipelt.submodules.ln_tuning import LNTuning
    from unipelt.submodules.prompt import Prompt
    from unipelt.submodules.red import RED
    from unipelt.submodules.reft import DiReFT, LoReFT
    from unipelt.submodules.register import Spot as Spot
    from unipelt.submodules.register import TargetInfo, register_submodule
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "AdapterConfig": "unipelt.config.parts",
            "Attention": "unipelt.hosts.description",
            "CheckpointError": "unipelt.checkpoint.manifest",
            "Compacter": "unipelt.submodules.compacter",
            "CompacterConfig": "unipelt.config.further",
            "ConfigError": "unipelt.config.schema",
            "DescribeError": "unipelt.hosts.describe",
            "DiReFT": "unipelt.submodules.reft",
            "DoRA": "unipelt.submodules.dora",
            "Family": "unipelt.hosts.description",
            "FoldError": "unipelt.gates.measure",
            "FoldReport": "unipelt.gates.fold",
            "FoldedGate": "unipelt.gates.fold",
            "GateConfig": "unipelt.config.gate",
            "GateRecord": "unipelt.gates.record",
            "Houlsby": "unipelt.submodules.bottleneck",
            "HoulsbyConfig": "unipelt.config.further",
            "HubError": "unipelt.files.hub",
            "IA3": "unipelt.submodules.ia3",
            "IA3Config": "unipelt.config.further",
            "InjectionError": "unipelt.hosts.locate",
            "LNTuning": "unipelt.submodules.ln_tuning",
            "LNTuningConfig": "unipelt.config.further",
            "LoRAConfig": "unipelt.config.parts",
            "LoReFT": "unipelt.submodules.reft",
            "MergeError": "unipelt.bridges.plain_model",
            "MixedOutput": "unipelt.multitask.batch_rows",
            "MixtureConfig": "unipelt.config.mixture",
            "PRESETS": "unipelt.config.presets",
            "Parallel": "unipelt.submodules.bottleneck",
            "ParallelConfig": "unipelt.config.further",
            "ParameterCounts": "unipelt.injection.parameters",
            "PeftConfig": "unipelt.bridges.peft_socket.config",
            "PeftTermConfig": "unipelt.config.peft",
            "PrefixConfig": "unipelt.config.parts",
            "Prompt": "unipelt.submodules.prompt",
            "PromptConfig": "unipelt.config.parts",
            "RED": "unipelt.submodules.red",
            "REDConfig": "unipelt.config.further",
            "ReFTConfig": "unipelt.config.further",
            "Spot": "unipelt.submodules.register",
            "SelectError": "unipelt.gates.select",
            "SelectReport": "unipelt.gates.select",
            "Stack": "unipelt.hosts.description",
            "SubmoduleConfig": "unipelt.config.submodule",
            "TokensConfig": "unipelt.config.parts",
            "TargetInfo": "unipelt.submodules.register",
            "Tasks": "unipelt.multitask.tasks",
            "UniPELTConfig": "unipelt.config.methods",
            "combine_tasks": "unipelt.multitask.combine",
            "describe": "unipelt.hosts.describe",
            "disable": "unipelt.injection.disable",
            "fold": "unipelt.gates.fold",
            "from_peft": "unipelt.bridges.peft_socket",
            "from_pretrained": "unipelt.checkpoint.load",
            "fuse_tasks": "unipelt.multitask.fuse",
            "gate_penalty": "unipelt.gates.record",
            "inject": "unipelt.api",
            "load": "unipelt.checkpoint.load",
            "load_adapterhub": "unipelt.bridges.adapterhub",
            "load_peft": "unipelt.bridges.peft",
            "load_release_state_dict": "unipelt.bridges.release",
            "load_tokenizer": "unipelt.checkpoint.push",
            "merge": "unipelt.bridges.plain_model",
            "merge_experts": "unipelt.bridges.merge_experts",
            "parameter_counts": "unipelt.injection.parameters",
            "parameter_groups": "unipelt.injection.parameter_groups",
            "print_trainable_parameters": "unipelt.injection.parameter_groups",
            "push_to_hub": "unipelt.checkpoint.push",
            "record_gates": "unipelt.gates.record",
            "register_family": "unipelt.hosts.families",
            "register_submodule": "unipelt.submodules.register",
            "register_with_peft": "unipelt.bridges.peft_socket",
            "release_state_dict": "unipelt.bridges.release",
            "remove": "unipelt.injection.inject",
            "resolve": "unipelt.config.presets",
            "save": "unipelt.checkpoint.save",
            "save_peft": "unipelt.bridges.peft",
            "select": "unipelt.gates.select",
            "start_prefix_from": "unipelt.injection.prefix_start",
            "swap": "unipelt.checkpoint.swap",
            "to_peft": "unipelt.bridges.peft_socket",
        },
    )

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
    "DiReFT",
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
    "LNTuning",
    "LNTuningConfig",
    "LoRAConfig",
    "LoReFT",
    "MergeError",
    "MixedOutput",
    "MixtureConfig",
    "Parallel",
    "ParallelConfig",
    "ParameterCounts",
    "PeftConfig",
    "PeftTermConfig",
    "PrefixConfig",
    "Prompt",
    "PromptConfig",
    "REDConfig",
    "ReFTConfig",
    "SelectError",
    "SelectReport",
    "Stack",
    "SubmoduleConfig",
    "TargetInfo",
    "Tasks",
    "TokensConfig",
    "UniPELTConfig",
    "combine_tasks",
    "describe",
    "disable",
    "fold",
    "from_peft",
    "from_pretrained",
    "fuse_tasks",
    "gate_penalty",
    "inject",
    "load",
    "load_adapterhub",
    "load_peft",
    "load_release_state_dict",
    "load_tokenizer",
    "merge",
    "merge_experts",
    "parameter_counts",
    "parameter_groups",
    "print_trainable_parameters",
    "push_to_hub",
    "record_gates",
    "register_family",
    "register_submodule",
    "register_with_peft",
    "release_state_dict",
    "remove",
    "resolve",
    "save",
    "save_peft",
    "select",
    "start_prefix_from",
    "swap",
    "to_peft",
]
