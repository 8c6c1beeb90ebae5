"""The pretrained model and the tokenizer of a run, from a folder or the hub, and the SHA-256 of each."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.utils import cached_file, logging

from unipelt.api import inject
from unipelt.checkpoint.manifest import WEIGHTS
from unipelt.runs.cache import SharedCache, State, files_in, state_of
from unipelt.runs.errors import RunError
from unipelt.runs.settings import TrainingSettings


def load_tokenizer(
    settings: TrainingSettings, place: str, kept: SharedCache, **options: Any
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load the configuration and the tokenizer of a model.

    Args:
        settings: the settings of the run.
        place: the folder of the model, or its name on the hub.
        kept: the cache of this process.
        options: further fields of the configuration.

    Returns:
        The configuration and the tokenizer, which have the same padding token.

    Raises:
        RunError: the model cannot be loaded, needs Python code of its own, takes fewer than `max_length` tokens, or has
            no token for padding.
    """
    try:
        if PreTrainedConfig.get_config_dict(place)[0].get("auto_map"):
            raise RunError(
                f"the model {settings.model!r} comes with Python code of its own (auto_map in its config.json), which "
                "is never run here; choose another, or take auto_map out of a copy if Transformers' class is meant"
            )
        config = AutoConfig.from_pretrained(place, trust_remote_code=False, **options)
        folder = place if os.path.isdir(place) else os.path.dirname(str(cached_file(place, "config.json")))
        tokenizer = kept.tokenizer(
            place, files_in(folder), lambda: AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        )
    except RunError:
        raise
    except (OSError, ValueError) as error:
        kind = "" if os.path.isdir(place) else ", which is no folder here"
        raise RunError(f"cannot load the model {settings.model!r}{kind}: {_first_line(error)}") from error
    limits = (getattr(config, "max_position_embeddings", None), tokenizer.model_max_length)
    limit = min(limit for limit in limits if limit)
    if settings.max_length > limit:
        raise RunError(f"max_length is {settings.max_length}, and {settings.model} takes {limit} tokens; lower it")
    _agree_on_padding(config, tokenizer, settings.model)
    return config, tokenizer


def _agree_on_padding(config: Any, tokenizer: PreTrainedTokenizerBase, model: str) -> None:
    """Give configuration and tokenizer the same padding token.

    The token of the configuration is used if the tokenizer has this token, and otherwise the token of the tokenizer.
    The head of a decoder finds the last token of a text by this id, and some models count positions by this id. GPT-2
    and others were pretrained without a padding token. Padding is masked, so the end token can be used. Raise
    `RunError` if the tokenizer has no end token either.
    """
    named = config.pad_token_id
    if named is not None and 0 <= named < len(tokenizer):
        if named != tokenizer.pad_token_id:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(named)
        return
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise RunError(f"the tokenizer of {model} has neither a padding token nor an end token to pad with")
        tokenizer.pad_token = tokenizer.eos_token
    config.pad_token_id = tokenizer.pad_token_id


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the SHA-256 of a fast tokenizer without its truncation and padding. Return None for a slow tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    state = {key: part for key, part in json.loads(backend.to_str()).items() if key not in ("truncation", "padding")}
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def weights_sha256(settings: TrainingSettings, place: str, kept: SharedCache) -> tuple[str | None, State]:
    """Return the SHA-256 of the model's `model.safetensors`, checked against the settings, and the state of that file.

    Return None and an empty state if the model has no such file. Raise `RunError` if the settings give a SHA-256 that
    the model does not have.
    """
    try:
        path = cached_file(place, WEIGHTS)
    except (OSError, ValueError):
        path = None
    if path is None:
        if settings.model_sha256 is not None:
            raise RunError(f"model_sha256 is given, and {settings.model} has no {WEIGHTS} to check it against")
        return None, ()
    state = state_of([path])
    sha256 = kept.sha256(path)
    if settings.model_sha256 not in (None, sha256):
        raise RunError(
            f"{path} is not the file that model_sha256 names: its SHA-256 is {sha256}, not {settings.model_sha256}; "
            "get the right model, or correct model_sha256 if you trust this one"
        )
    return sha256, state


def load_model(settings: TrainingSettings, place: str, config: Any, kind: Any) -> PreTrainedModel:
    """Load the pretrained model and inject the method.

    Args:
        settings: the settings of the run.
        place: the folder of the model, or its name on the hub.
        config: the configuration of the model.
        kind: the class that loads the model, an `AutoModelFor...`.

    Raises:
        RunError: the model cannot be loaded.
    """
    set_seed(settings.seed)
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # no warning about the head, which is new in every run
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = kind.from_pretrained(
            place, config=config, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise RunError(f"cannot load the model {settings.model!r}: {_first_line(error)}") from error
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
    return inject(model, settings.config)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
