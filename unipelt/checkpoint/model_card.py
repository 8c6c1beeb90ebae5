"""Write the model card of saved weights: method, training, scores."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from unipelt.checkpoint.manifest import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MANIFEST
from unipelt.config.methods import UniPELTConfig
from unipelt.config.presets import PRESETS
from unipelt.files.hub import may_be_base
from unipelt.files.messages import printable
from unipelt.injection.parameters import ParameterCounts
from unipelt.records.record import floor

TASKS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForConditionalGeneration": "text2text-generation",
    "MTModel": "text2text-generation",
}
"""The hub's name of a task, by the end of a model class's name."""
_SAYS_NOTHING = re.compile(r"models?|base|checkpoint(-\d+)?|best|final|output|main|snapshot", re.IGNORECASE)
"""Names of folders that do not describe their contents."""
_METRICS = {"pearson": "pearsonr", "spearman": "spearmanr"}  # the hub's names, where they differ


def model_card(
    config: UniPELTConfig,
    counts: ParameterCounts,
    manifest: Mapping[str, Any],
    *,
    name: str | None = None,
    license: str | None = None,
    result: Mapping[str, Any] | None = None,
    gates: Mapping[str, Any] | None = None,
    has_tokenizer: bool = False,
) -> str:
    """Return a README in Markdown with the hub's metadata: method, parameter counts, base, how to load, scores, gates.

    Args:
        config: the method that was injected.
        counts: parameter counts of the model.
        manifest: the content of `unipelt.json`.
        name: the name of the repository, `user/name`.
        license: the license of these weights, by the hub's name (`apache-2.0`). With None, the card names no license.
        result: the record of the run that trained the weights (`unipelt.records.record.read_result`).
        gates: means and standard deviations of gates, in the form of a record: `values` (by gate, `mean` and `std` by
            layer), `layers` (their indices), `examples` (their number). By default the gates of `result`.
        has_tokenizer: whether the repository holds the tokenizer too.

    Returns:
        The text, without any path of this machine.
    """
    base = manifest["base"]
    known = base["name_or_path"] if may_be_base(base["name_or_path"]) else None
    task = task_of(base["class"])
    preset = next((name for name, known in PRESETS.items() if known == config), None)
    title = f"{preset or _parts(config)} on {_base_name(base['name_or_path'])}"
    further: dict[str, Any] = {}
    if known:
        further["base_model_relation"] = "finetune" if config.train_base else "adapter"
    metadata = ModelCardData(
        library_name="unipelt",
        base_model=known,
        license=license,
        pipeline_tag=task,
        tags=["unipelt", "parameter-efficient-tuning"],
        model_name=name or title,
        eval_results=_evaluation(result, task) if result is not None and task else None,
        **further,
    )
    gates = gates or (result or {}).get("gates")
    of_peft = manifest.get("weights", {}).get("file") == ADAPTER_WEIGHTS
    form = "folded" if "folded" in manifest else "deployed form" if manifest["deployed"] else "as trained"
    text = "\n".join(
        [
            f"---\n{metadata.to_yaml()}\n---",
            "",
            f"# {title}",
            "",
            f"Weights trained with [UniPELT](https://aclanthology.org/2022.acl-long.433/) ({form}); the frozen "
            f"base (`{base['class']}`) is not included. Method: {_parts(config)}.",
            "",
            *_loading(name, known, manifest, task, has_tokenizer),
            "```text",
            str(counts),
            "```",
            "",
            f"The whole configuration is in `{ADAPTER_CONFIG if of_peft else MANIFEST}`.",
            "",
            *(_scores(result) if result is not None else []),
            *(_gate_table(gates) if gates is not None else []),
        ]
    )
    return printable(text)


def task_of(class_name: str) -> str | None:
    """Return the hub's name for the task of a model class, or None if the hub has no name for this task."""
    return next((task for end, task in TASKS.items() if class_name.endswith(end)), None)


def _base_name(place: str) -> str:
    """Return a readable name for a base, from its name on the hub or from the folder of its checkpoint."""
    parts = [part for part in re.split(r"[/\\]", place) if part]
    for part in reversed(parts):
        if part.startswith("models--"):  # the hub's cache: models--user--name/snapshots/COMMIT
            return part.rpartition("--")[2]
    for part in reversed(parts):
        if not _SAYS_NOTHING.fullmatch(part):
            return part.removeprefix("package:")
    return parts[-1] if parts else "a model built in memory"


def _parts(config: UniPELTConfig) -> str:
    """Return the names of the injected submodules, or of the parameters that train."""
    if config.train_base:
        return "fine-tuning"
    parts = []
    for label, part in (
        ("adapter", config.adapter),
        ("prefix", config.prefix),
        ("LoRA", config.lora),
        ("prompt", config.prompt),
    ):
        if part is not None:
            parts.append(_named(label, part))
    parts += [_named(part.name, part) for part in config.more]
    if config.bitfit:
        parts.append("BitFit")
    if config.tokens is not None:
        parts.append("trained tokens")
    return " + ".join(parts) or "head only"


def _named(label: str, part: Any) -> str:
    """Return a submodule's name with its gate and its mixture."""
    mixture = getattr(part, "mixture", None)
    label = label if mixture is None else f"mixture of {mixture.experts} {label} (router {mixture.router})"
    return f"gated {label}" if part.gate else label


def _loading(
    name: str | None, known: str | None, manifest: Mapping[str, Any], task: str | None, has_tokenizer: bool
) -> list[str]:
    where = name or "path/to/this/folder"
    lines = ["```python", "import unipelt", "", f'model = unipelt.from_pretrained("{where}")']
    if has_tokenizer or known:
        lines.append(f'tokenizer = unipelt.load_tokenizer("{where}")')
        if task in ("text-classification", "token-classification", "fill-mask", "text-generation"):
            lines[1:2] = ["import unipelt", "from transformers import pipeline"]
            lines.append(f'pipe = pipeline("{task}", model=model, tokenizer=tokenizer)')
    lines += ["```", ""]
    if known:
        revision = manifest["base"]["revision"]
        exactly = f" (revision `{revision}`)" if revision else ""
        lines += [f"That fetches the base, `{known}`{exactly}, and checks that it is the one that was trained on.", ""]
    return lines


def _dataset(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hub's metadata on the dataset split of a run's test, as arguments of `EvalResult`."""
    task, settings = result["task"]["name"], result["settings"]
    if settings.get("task") is None:
        return {"dataset_name": task, "dataset_type": "custom", "dataset_split": "test"}
    split = "validation_matched" if task == "mnli" else "validation"
    names = {"dataset_name": f"GLUE {task.upper()}", "dataset_type": "nyu-mll/glue"}
    return {**names, "dataset_config": task, "dataset_split": split}


def _evaluation(result: Mapping[str, Any], task: str) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=task,
            metric_type=_METRICS.get(name, name),
            metric_value=round(value, 4),
            metric_name=name,
            **_dataset(result),
        )
        for name, value in result["test"]["metrics"].items()
    ]


def _scores(result: Mapping[str, Any]) -> list[str]:
    settings, data = result["settings"], result["data"]
    rows = {split: data[split]["rows"] for split in ("train", "dev", "test")}
    tested = _dataset(result)
    what = f"`{tested['dataset_split']}` split of {tested['dataset_name']}" if settings.get("task") else "test set"
    test, dev = result["test"]["metrics"], result["dev"]["metrics"]
    packages, code = result["packages"], result["code"]["commit"]
    versions = ", ".join(f"{package} {packages[package]}" for package in ("unipelt", "torch", "transformers"))
    return [
        "## Scores",
        "",
        f"One run with seed {settings['seed']}: {rows['train']:,} examples to train, {rows['dev']:,} (dev) to choose "
        f"the epoch, and one test on {rows['test']:,}, the {what}.",
        "",
        "| | " + " | ".join(test) + " |",
        "| --- |" + " ---: |" * len(test),
        *(
            f"| {split} | " + " | ".join(f"{values[name]:.3f}" for name in test) + " |"
            for split, values in (("test", test), ("dev", dev))
        ),
        "",
        f"({_floor(result)}`{result['method']['name']}`, "
        f"learning rate {result['method']['learning_rate']:g}, batch {settings['batch_size']}, best epoch "
        f"{result['best']['epoch']:g} of {result['evaluations'][-1]['epoch']:g}; {versions}"
        f"{f', commit `{code[:7]}`' if code else ''}.)",
        "",
    ]


def _floor(result: Mapping[str, Any]) -> str:
    """Return a sentence with the score of predictions without a model; empty if there is no such score."""
    found = floor(result)
    if found.score is None:
        return ""
    name = "the test set's most frequent class" if found.of_test else found.name
    return f"For comparison, {name}: {result['task']['primary']} {found.score:.3f}. "


def _gate_table(gates: Mapping[str, Any]) -> list[str]:
    values: Mapping[str, Mapping[str, Sequence[float]]] = gates["values"]
    depth = max(len(value["mean"]) for value in values.values())
    layers = list(gates["layers"]) if len(gates["layers"]) == depth else list(range(depth))

    def cell(value: Mapping[str, Sequence[float]], row: int) -> str:
        return f"{value['mean'][row]:.2f} ± {value['std'][row]:.2f}" if row < len(value["mean"]) else ""

    return [
        "## Gates",
        "",
        "A gate is between 0 (its submodule is shut) and 1 (open). Mean and standard deviation over "
        f"{gates['examples']:,} examples:",
        "",
        "| layer | " + " | ".join(values) + " |",
        "| ---: |" + " ---: |" * len(values),
        *(
            f"| {layer} | " + " | ".join(cell(value, row) for value in values.values()) + " |"
            for row, layer in enumerate(layers)
        ),
        "",
    ]
