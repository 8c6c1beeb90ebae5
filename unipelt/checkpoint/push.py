"""Put a trained model onto the hub, with a card that says what it is; and the tokenizer of one that is there."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from unipelt.checkpoint.base_model import describe_base, find_base
from unipelt.checkpoint.manifest import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MANIFEST,
    SAMPLE,
    WEIGHTS,
    CheckpointError,
    find_checkpoint,
    nonfinite,
)
from unipelt.checkpoint.model_card import model_card
from unipelt.checkpoint.peft_form import read_folder
from unipelt.checkpoint.save import CARD, save
from unipelt.files.atomic import named_write, write_whole
from unipelt.files.hub import is_repository, may_be_base, upload
from unipelt.files.messages import show, show_path
from unipelt.injection.parameters import kept_names, parameter_counts
from unipelt.injection.state import injection_of
from unipelt.records.record import ResultError, mismatch, read_result

_TOKENIZER = "tokenizer_config.json"
TOKENIZER_FILES = (
    *(_TOKENIZER, "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model"),
    *("source.spm", "target.spm", "bpe.codes"),
)
"""What tokenizers of Transformers are kept in; each holds data and no code."""
_TOLD: dict[str, Any] = {
    "settings": {"seed": int, "batch_size": int},
    "data": {split: {"rows": int} for split in ("train", "dev", "test")},
    "packages": dict.fromkeys(("unipelt", "torch", "transformers"), (str, type(None))),
}
"""What a card reads of a record beside what every record has."""


def push_to_hub(
    model: PreTrainedModel,
    name: str,
    *,
    deploy: bool = True,
    base: str | None = None,
    base_revision: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    result: str | Path | None = None,
    gates: Mapping[str, Tensor] | None = None,
    license: str | None = None,
    message: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
) -> str:
    """Upload what was trained, and a model card, in one commit; `unipelt.from_pretrained(name)` gives the model again.

    Args:
        model: an injected model. Its base is not uploaded, so others must be able to get that by name.
        name: of the repository, `user/name`; it is made if it is not there.
        deploy: fold the prefix's reparameterisation network away, as `save` does. The logits are the same and the file
            is much smaller; say False to let others go on with the very training.
        base: the name on the hub of the base model, where it was loaded from a folder here. The fingerprint of its
            weights goes along, so that another base is refused when it is loaded.
        base_revision: a branch, a tag or a commit of the base; by default the commit that was loaded from `main`. Say
            it if another branch was loaded, or if `base` is given and may change.
        tokenizer: uploaded too; without, `load_tokenizer` takes that of the base.
        result: a `result.json`, or the folder of the run, that trained this model: its scores and gates go into the
            card, and the scores into the hub's metadata.
        gates: values of gates for the card, as `unipelt.record_gates` records them; by default those of `result`.
        license: of these weights, as the hub calls it; nothing is said by default.
        message: of the commit.
        private: as `unipelt.files.hub.upload` takes it.
        revision: likewise.
        create_pr: likewise.
        token: likewise.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        ValueError: nothing was injected, the name cannot be meant, nobody else could get the base, `result` is of
            another model, or a number is not finite. Nothing was uploaded.
        HubError: the hub cannot be reached, or does not let us.
    """
    injection_of(model)
    kept = set(kept_names(model))
    if names := nonfinite({name: tensor for name, tensor in model.named_parameters() if name in kept}):
        raise ValueError(
            f"{names[0]} holds numbers that are not finite, so this is not published: its training diverged"
        )
    if not isinstance(name, str) or not is_repository(name):
        raise ValueError(f"a repository on the hub is called 'user/name', not {show(name)}")
    known = base or model.config._name_or_path
    if not isinstance(known, str) or not may_be_base(known) or (base is None and Path(known).is_dir()):
        where = f"came from {show_path(known)}" if known else "was built in memory"
        raise ValueError(
            f"the base of this model {where}, where nobody else can get it; say base='user/name', what it is called on "
            "the hub"
        )
    with tempfile.TemporaryDirectory(prefix="unipelt-") as temporary:
        folder = save(model, temporary, deploy=deploy, base=base, base_revision=base_revision)
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        record = None if result is None else _record_of(result, model, manifest)
        if tokenizer is not None:
            _save_tokenizer(tokenizer, folder)
        card = model_card(
            injection_of(model).config,
            parameter_counts(model),
            manifest,
            name=name,
            license=license,
            result=record,
            gates=None if gates is None else summarise_gates(gates),
            has_tokenizer=tokenizer is not None,
        )
        write_whole(folder / CARD, card.encode())
        return upload(
            folder,
            name,
            message=message or "Upload what was trained with unipelt",
            private=private,
            revision=revision,
            create_pr=create_pr,
            token=token,
        )


def load_tokenizer(
    source: str | Path,
    *,
    revision: str | None = None,
    base: str | Path | None = None,
    base_revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    **kwargs: Any,
) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a checkpoint: the one beside it, or else that of its base.

    Args:
        source: as `unipelt.from_pretrained` takes it.
        revision: likewise.
        base: likewise; its tokenizer is then taken, whatever is beside the checkpoint.
        base_revision: likewise.
        token: likewise.
        cache_dir: likewise.
        local_files_only: likewise.
        kwargs: passed on to `AutoTokenizer.from_pretrained`. No code that comes with a tokenizer is run.

    Raises:
        As `unipelt.from_pretrained`.
    """
    shared: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    files = (MANIFEST, WEIGHTS, ADAPTER_CONFIG, ADAPTER_WEIGHTS, *TOKENIZER_FILES)
    folder = find_checkpoint(source, files, revision, **shared)
    if (folder / _TOKENIZER).is_file() and base is None:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **kwargs)
    name, commit = find_base(source, read_folder(folder)[0]["base"], base, base_revision)
    return AutoTokenizer.from_pretrained(name, revision=commit or "main", trust_remote_code=False, **shared, **kwargs)


def summarise_gates(gates: Mapping[str, Tensor]) -> dict[str, Any]:
    """Mean and standard deviation of gates by layer, in the form that a record of a run has.

    Args:
        gates: by name, (examples, layers), as `unipelt.record_gates` records them.

    Raises:
        ValueError: there are no gates, no examples, or one of them has another shape.
    """
    values = {name: torch.as_tensor(value).detach().double().cpu() for name, value in gates.items()}
    if not values or any(value.ndim != 2 or 0 in value.shape for value in values.values()):
        raise ValueError("gates must be (examples, layers) by name, none of them empty, as record_gates records them")
    return {
        "layers": list(range(max(value.shape[1] for value in values.values()))),
        "examples": len(next(iter(values.values()))),
        "values": {
            name: {"mean": value.mean(dim=0).tolist(), "std": value.std(dim=0, correction=0).tolist()}
            for name, value in values.items()
        },
    }


def _record_of(result: str | Path, model: PreTrainedModel, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a run, if it is one that made this model. Raises `ValueError`."""
    record = read_result(result)
    if problem := mismatch(record, _TOLD, ""):
        raise ResultError(f"{show_path(result)} does not hold what a card tells: {problem}")
    base = manifest["base"]
    if record["model"]["fingerprint"].get("covers", SAMPLE) == SAMPLE:  # it is of an earlier version
        base = describe_base(model, dict(model.named_parameters()), covers=SAMPLE)
    here = {"method": manifest["unipelt"], "class": base["class"], "base": base["fingerprint"]}
    there = {
        "method": record["method"]["config"],
        "class": record["model"]["class"],
        "base": record["model"]["fingerprint"],
    }
    if different := [name for name in here if here[name] != there[name]]:
        raise ValueError(f"the result in {show_path(result)} is of another model than this: its {different[0]} differs")
    return record


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer's files, but for what they say of this machine."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(f"tokenizer must be one of Transformers, not {type(tokenizer).__name__}")
    with named_write(folder):
        tokenizer.save_pretrained(folder)
    path = folder / _TOKENIZER
    if path.is_file():
        values = json.loads(path.read_text(encoding="utf-8"))
        kept = {name: value for name, value in values.items() if name != "name_or_path"}
        write_whole(path, f"{json.dumps(kept, indent=2, ensure_ascii=False)}\n".encode())
    if odd := [item.name for item in folder.iterdir() if item.suffix == ".py"]:
        raise CheckpointError(f"this tokenizer comes with Python code ({odd[0]}), which is not published")
