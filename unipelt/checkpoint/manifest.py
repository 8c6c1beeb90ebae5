"""Read and check the files of a checkpoint, on disk or on the hub, before a model is changed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load as load_tensors
from torch import Tensor
from transformers.utils import logging

from unipelt.config.methods import UniPELTConfig
from unipelt.config.schema import ConfigError, read_mapping
from unipelt.files.hub import HubError, download, is_repository
from unipelt.files.messages import shorten, show, show_path
from unipelt.files.strict import read_bytes
from unipelt.gates.merge import Constants

WEIGHTS = "model.safetensors"
NEXT = f"{WEIGHTS}.next"
MANIFEST = "unipelt.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""The files of a folder in PEFT's form (`peft_form`)."""
FORMAT = 2
"""The version that is written. Version 1, with other parameter names (`format_1`), is read too."""
logger = logging.get_logger(__name__)
_KEYS = ("format", "unipelt", "deployed", "folded", "head", "unfrozen", "vocabulary", "base", "weights")
_KINDS: dict[type[Any], str] = {dict: "a mapping", list: "a list", str: "a text", bool: "true or false"}


MOST_BYTES = 8 * 2**20
"""The largest manifest that is read, in bytes. The manifest of a large model has some hundred KB."""
SAMPLE, ALL = "a sample", "all numbers"
"""The numbers that a fingerprint of a base covers."""


class CheckpointError(ValueError):
    """A checkpoint is damaged, or belongs to another model; nothing was changed."""


class MissingBaseError(CheckpointError, OSError):
    """The base of a checkpoint cannot be found or read."""


def find_checkpoint(source: str | Path, files: Sequence[str], revision: str | None, **options: Any) -> Path:
    """Return the folder of a checkpoint: the given folder, or the folder of the hub's cache with the downloaded files.

    Args:
        source: a folder, or `user/name` on the hub; an existing folder comes first.
        files: names of the files to download from the hub, if they exist there.
        revision: see `unipelt.files.hub.download`.
        options: `token`, `cache_dir` and `local_files_only`, see `unipelt.files.hub.download`.

    Raises:
        FileNotFoundError: the repository on the hub holds no checkpoint of this package.
        HubError: see `unipelt.files.hub.download`.
        ValueError: a revision was given for a folder.
    """
    if os.path.isdir(source) or not isinstance(source, str) or not is_repository(source):
        if revision is not None:
            raise ValueError(
                f"{show_path(source)} is a folder, which has no revisions; base_revision is that of a base"
            )
        return Path(source)
    try:
        folder = download(source, files, revision=revision, **options)
    except HubError as error:
        raise HubError(f"there is no folder {source!r} here; {error}") from error.__cause__
    if not any((folder / name).is_file() for name in (MANIFEST, ADAPTER_CONFIG)):
        raise FileNotFoundError(f"{source!r} on the hub is not a checkpoint of unipelt: it has no {MANIFEST}")
    return folder


def read_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read and check manifest and tensors of a checkpoint. Raises `FileNotFoundError` or `CheckpointError`."""
    if not os.path.isfile(folder / MANIFEST):  # Path.is_file raises for a name that is too long
        remedy = (
            "; it is a folder of PEFT's: save (unipelt.save) what unipelt.load makes of it"
            if os.path.isfile(folder / ADAPTER_CONFIG)
            else ""
        )
        raise FileNotFoundError(f"{show_path(folder)} is not a checkpoint of unipelt: it has no {MANIFEST}{remedy}")
    if not any((folder / name).is_file() for name in (WEIGHTS, NEXT)):
        raise FileNotFoundError(f"{folder} is not a checkpoint of unipelt: it has no {WEIGHTS}")
    try:
        raw = read_mapping(folder / MANIFEST, MOST_BYTES)
        if type(raw.get("format")) is not int or raw["format"] not in (1, FORMAT):
            raise ConfigError(
                f"format must be 1 or {FORMAT}, not {show(raw.get('format'))}; a newer unipelt may read it"
            )
        base = _typed(raw, "base", dict)
        found = _typed(base, "fingerprint", dict)
        _only(raw, _KEYS, "")
        _only(base, ("class", "name_or_path", "revision", "config", "computation", "fingerprint"), "base.")
        head, unfrozen = _names(raw, "head"), _names(raw, "unfrozen")
        vocabulary = _names(raw, "vocabulary") if "vocabulary" in raw else []
        if base.get("revision") is not None:
            _typed(base, "revision", str)
        weights = _typed(raw, "weights", dict)
        if weights.get("file") != WEIGHTS:
            raise ConfigError(f"weights.file must be {WEIGHTS!r}, not {show(weights.get('file'))}")
        manifest = {
            "format": raw["format"],
            "unipelt": UniPELTConfig.from_dict(_typed(raw, "unipelt", dict)),
            "deployed": _typed(raw, "deployed", bool),
            "folded": _constants(raw) if "folded" in raw else None,
            "head": head,
            "unfrozen": unfrozen,
            "vocabulary": vocabulary,
            "base": {
                "class": _typed(base, "class", str),
                "name_or_path": _typed(base, "name_or_path", str),
                "revision": base.get("revision"),
                "config": _typed(base, "config", dict),
                # older checkpoints have no such field, and are compared by their weights alone
                "computation": _typed(base, "computation", dict) if "computation" in base else {},
                "fingerprint": {key: _typed(found, key, str) for key in ("sha256", "dtype")} | _covers(found),
                "apart": {*head, *unfrozen, *vocabulary},
                "vocabulary": vocabulary,
            },
        }
        digest = _typed(weights, "sha256", str)
    except ConfigError as error:
        raise CheckpointError(f"{folder / MANIFEST} cannot be read: {error}") from error
    contents = [read_bytes(path) for path in (folder / WEIGHTS, folder / NEXT) if path.is_file()]
    content = next((content for content in contents if hashlib.sha256(content).hexdigest() == digest), None)
    if content is None:
        raise CheckpointError(
            f"{folder / WEIGHTS} is not the file that {MANIFEST} describes (its SHA-256 differs): it is damaged, or "
            "from another checkpoint"
        )
    try:
        return manifest, load_tensors(content)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder / WEIGHTS} is not a valid safetensors file: {shorten(error)}") from error


def nonfinite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the sorted names of the tensors that hold NaN or an infinite number."""
    return sorted(name for name, tensor in tensors.items() if not bool(tensor.isfinite().all()))


def warn_of_nonfinite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Log a warning if a tensor holds NaN or an infinite number.

    Args:
        tensors: by name.
        what: the owner of the tensors, for the message.
    """
    if names := nonfinite(tensors):
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        logger.warning(f"{what} holds numbers that are not finite, in {names[0]}{more}: its training diverged")


def _typed(values: Mapping[str, Any], key: str, kind: type[Any]) -> Any:
    if key not in values or not isinstance(values[key], kind):
        seen = show(values[key]) if key in values else "left out"
        raise ConfigError(f"{key} must be {_KINDS[kind]}, not {seen}")
    return values[key]


def _covers(fingerprint: Mapping[str, Any]) -> dict[str, str]:
    """Return the numbers that a fingerprint covers; in earlier checkpoints without this field, a sample."""
    covers = fingerprint.get("covers", SAMPLE)
    if covers not in (SAMPLE, ALL):
        raise ConfigError(f"fingerprint.covers must be {ALL!r} or {SAMPLE!r}, not {show(covers)}")
    return {"covers": covers}


def _names(values: Mapping[str, Any], key: str) -> list[str]:
    names = _typed(values, key, list)
    if not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{key} must be a list of names, not {show(names)}")
    return names


def _constants(values: Mapping[str, Any]) -> Constants:
    """Return the constants of folded gates. Whether these gates exist is checked on the model."""
    folded: dict[str, Any] = _typed(values, "folded", dict)
    for path in folded:
        for name, constant in _typed(folded, path, dict).items():
            if constant is not None and not (type(constant) in (int, float) and 0 < constant <= 1):
                raise ConfigError(
                    f"folded: {show(name)} at {show(path)} must be above 0 and at most 1, or null, not {show(constant)}"
                )
    return folded


def _only(values: Mapping[str, Any], keys: tuple[str, ...], where: str) -> None:
    for key in values:
        if key not in keys:
            raise ConfigError(f"unknown key {show(where + key)}; the keys here are {', '.join(keys)}")


def finish_interrupted_save(folder: Path) -> None:
    """Finish a save that was interrupted after its manifest was written, so that its weights are not overwritten."""
    try:
        weights = (folder / NEXT).read_bytes()
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        digest = manifest["weights"]["sha256"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return  # there are no such weights, or no manifest that names them
    if hashlib.sha256(weights).hexdigest() == digest:
        os.replace(folder / NEXT, folder / WEIGHTS)
