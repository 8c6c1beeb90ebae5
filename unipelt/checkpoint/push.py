"""Upload a trained model with its model card to the hub, and load the tokenizer of a checkpoint."""

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
"""The files of Transformers' tokenizers; each holds data and no code."""
_TOLD: dict[str, Any] = {
    "settings": {"seed": int, "batch_size": int},
    "data": {split: {"rows": int} for split in ("train", "dev", "test")},
    "packages": dict.fromkeys(("unipelt", "torch", "transformers"), (str, type(None))),
}
"""The fields of a record that a card needs in addition to those that every record has."""


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
    """Upload the trained parameters and a model card in one commit; `unipelt.from_pretrained(name)` restores the model.

    Args:
        model: an injected model. Its base is not uploaded, so others must be able to get the base by name.
        name: the name of the repository, `user/name`; created if it does not exist.
        deploy: fold the prefix's reparameterisation network away, as `save` does. The logits are the same and the file
            is much smaller. Use False if others are to continue the same training.
        base: the name on the hub of the base model, if it was loaded from a local folder. The fingerprint of the
            base's weights is uploaded too, so that loading with another base raises an error.
        base_revision: a branch, a tag or a commit of the base; by default the commit that was loaded from `main`. Give
            it if another branch was loaded, or if `base` is given and may change.
        tokenizer: a tokenizer to upload too; without one, `load_tokenizer` loads the tokenizer of the base.
        result: a `result.json`, or the folder of the run, that trained this model. Its scores and gates are added to
            the card, and its scores to the hub's metadata.
        gates: values of gates for the card, (examples, layers) by name, as `unipelt.record_gates` records them; by
            default the gates of `result`.
        license: the license of these weights, by the hub's name; by default the card names none.
        message: the message of the commit.
        private: see `unipelt.files.hub.upload`.
        revision: see `unipelt.files.hub.upload`.
        create_pr: see `unipelt.files.hub.upload`.
        token: see `unipelt.files.hub.upload`.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        ValueError: the model carries no submodules, the name is not valid, others could not get the base, `result`
            belongs to another model, or a number is not finite. Nothing was uploaded.
        HubError: the hub cannot be reached, or denies access.
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
    """Load the tokenizer of a checkpoint: the one in the same folder, or else the one of its base.

    Args:
        source: see `unipelt.from_pretrained`.
        revision: see `unipelt.from_pretrained`.
        base: see `unipelt.from_pretrained`. If given, its tokenizer is loaded, even if the checkpoint holds one.
        base_revision: see `unipelt.from_pretrained`.
        token: see `unipelt.from_pretrained`.
        cache_dir: see `unipelt.from_pretrained`.
        local_files_only: see `unipelt.from_pretrained`.
        kwargs: passed to `AutoTokenizer.from_pretrained`. Code that comes with a tokenizer is never run.

    Raises:
        The exceptions of `unipelt.from_pretrained`.
    """
    shared: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    files = (MANIFEST, WEIGHTS, ADAPTER_CONFIG, ADAPTER_WEIGHTS, *TOKENIZER_FILES)
    folder = find_checkpoint(source, files, revision, **shared)
    if (folder / _TOKENIZER).is_file() and base is None:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **kwargs)
    name, commit = find_base(source, read_folder(folder)[0]["base"], base, base_revision)
    return AutoTokenizer.from_pretrained(name, revision=commit or "main", trust_remote_code=False, **shared, **kwargs)


def summarise_gates(gates: Mapping[str, Tensor]) -> dict[str, Any]:
    """Compute mean and standard deviation of gates by layer, in the form of a run's record.

    Args:
        gates: by name, (examples, layers), as `unipelt.record_gates` records them.

    Raises:
        ValueError: there are no gates, there are no examples, or a gate has another shape.
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
    """Return the record of a run, if the run made this model. Raises `ValueError` otherwise."""
    record = read_result(result)
    if problem := mismatch(record, _TOLD, ""):
        raise ResultError(f"{show_path(result)} does not hold what a card tells: {problem}")
    base = manifest["base"]
    if record["model"]["fingerprint"].get("covers", SAMPLE) == SAMPLE:  # a record of an earlier version
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
    """Write a tokenizer's files, without paths of this machine."""
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
