"""The model card that lies beside saved weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unipelt.config import UniPELTConfig
from unipelt.parameters import ParameterCounts


def model_card(config: UniPELTConfig, counts: ParameterCounts, manifest: Mapping[str, Any]) -> str:
    """A README in Markdown with the hub's metadata: method, parameter counts, base, how to load."""
    base = manifest["base"]
    name = base["name_or_path"]
    on_hub = bool(name) and not name.startswith((".", "/")) and "\\" not in name
    metadata = ["---", "library_name: unipelt", "tags:", "- unipelt", "- parameter-efficient-tuning"]
    if on_hub:
        metadata.insert(2, f"base_model: {name}")
    deployed = "folded" if "folded" in manifest else "deployed form" if manifest["deployed"] else "as trained"
    return "\n".join(
        [
            *metadata,
            "---",
            "",
            f"# {_method(config)} on {name.rpartition('/')[2] or 'a model built in memory'}",
            "",
            f"Weights trained with [UniPELT](https://aclanthology.org/2022.acl-long.433/) ({deployed}); the frozen "
            f"base (`{base['class']}`) is not included.",
            "",
            "```python",
            "import unipelt",
            "",
            'model = unipelt.from_pretrained("path/to/this/folder")',
            "```",
            "",
            "```text",
            str(counts),
            "```",
            "",
            "The whole configuration is in `unipelt.json`.",
            "",
        ]
    )


def _method(config: UniPELTConfig) -> str:
    if config.train_base:
        return "Fine-tuning"
    parts = []
    for label, part in (("adapter", config.adapter), ("prefix", config.prefix), ("LoRA", config.lora)):
        if part is not None:
            parts.append(f"gated {label}" if part.gate else label)
    parts += [f"gated {part.name}" if part.gate else part.name for part in config.more]
    if config.bitfit:
        parts.append("BitFit")
    return " + ".join(parts) or "Head only"
