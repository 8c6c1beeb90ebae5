"""Presets, and configurations from user input: a preset, changes to a preset, or a JSON or YAML file."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from unipelt.config.further import ParallelConfig
from unipelt.config.methods import UniPELTConfig
from unipelt.config.parts import AdapterConfig, LoRAConfig, PrefixConfig, PromptConfig
from unipelt.config.schema import ConfigError, read_mapping
from unipelt.config.submodule import SUBMODULES
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
"""The methods by name: the paper's methods and further submodules.

`unipelt-ap`, `-apl`, `-al` and `-pl` combine adapter (a), prefix (p) and LoRA (l), with gates. The same names with
`-nogate` have no gates. `unipelt` has the submodules of `unipelt-apl` and starts near the base model: the prefix has a
separate softmax, so the prefix takes no attention from the text, and the adapter starts at zero. Single methods have no
gates. `mam` is the mix-and-match adapter of He et al. (2022), and `unipelt-mam` is `mam` with gates.
"""


def resolve(config: str | Path | Mapping[str, Any] | UniPELTConfig) -> UniPELTConfig:
    """Return a checked `UniPELTConfig` for any form of configuration that a user may pass.

    Args:
        config: a preset's name, a `UniPELTConfig`, a path to a JSON or YAML file, or a dict. A dict (or file) may
            name a `preset`. Then the other keys are changes to that preset.

    Raises:
        ConfigError: a name, a key, a type or a value is wrong; the message lists the possible ones.
        FileNotFoundError: there is no file at the path. A text is a path if it ends in .json, .yaml or .yml.
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
