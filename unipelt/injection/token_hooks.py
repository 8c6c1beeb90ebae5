"""Trained embeddings of single tokens: which modules hold the vocabulary, and the hooks that put the rows in.

Shapes: B examples, T tokens, E width of an embedding, V rows of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from unipelt.config.methods import UniPELTConfig
from unipelt.hosts.locate import InjectionError
from unipelt.hosts.quantised import is_quantised, template_for
from unipelt.hosts.vocabulary import base_vocabulary_sizes, vocabulary_sizes
from unipelt.injection.hooks import hook, put
from unipelt.submodules.room import Room
from unipelt.submodules.token_rows import TokenRows


@dataclass
class TokenPort:
    """The link from a module that holds the vocabulary to the trained rows.

    Attributes:
        room: the room with the rows, in a tuple, so that the room is no child of the host.
        scale: the factor by which an embedding multiplies its rows.
    """

    room: tuple[Room]
    scale: Any = 1.0

    def rows(self) -> TokenRows | None:
        """Return the rows of the active set, or None."""
        held = self.room[0].present(self.room[0].active)
        return None if held is None else held._modules.get("tokens")


def with_token_ids(model: PreTrainedModel, config: UniPELTConfig) -> UniPELTConfig:
    """Return a configuration that names the tokens to train; without `tokens.ids` these are the new rows.

    New are the rows beyond those of the base, whose number is read from the base's own `config.json`.

    Raises:
        InjectionError: a number is outside the vocabulary, or there is no new row.
    """
    if config.tokens is None:
        return config
    table: Any = model.get_input_embeddings()
    rows, ids = len(table.weight), config.tokens.ids
    if not ids:
        ids = _new_rows(model, rows)
    elif max(ids) >= rows:
        raise InjectionError(f"tokens.ids names the token {max(ids)}, and the vocabulary has {rows} rows, from 0")
    return replace(config, tokens=replace(config.tokens, ids=ids))


def _new_rows(model: PreTrainedModel, rows: int) -> tuple[int, ...]:
    name = model.config._name_or_path
    revision = getattr(model.config, "_commit_hash", None) or "main"
    base = base_vocabulary_sizes(model.config, name, revision=revision, local_files_only=True) if name else None
    key = next(iter(vocabulary_sizes(model.config)), "")
    if base is None or key not in base:
        raise InjectionError(
            "tokens without ids trains the rows that are new beside the base's, and the base's config.json cannot be "
            f"read; name the tokens, for example tokens.ids: [{rows - 1}]"
        )
    if base[key] >= rows:
        raise InjectionError(
            f"tokens without ids trains the rows that are new beside the base's {base[key]}, and there are none; call "
            "model.resize_token_embeddings first, or name the tokens in tokens.ids"
        )
    return tuple(range(base[key], rows))


def build_tokens(model: PreTrainedModel, config: UniPELTConfig, device: str | None = None) -> TokenRows:
    """Build the trained rows; the model does not change.

    Args:
        model: the model.
        config: the configuration, with `tokens.ids`.
        device: device of the parameters; None for the device of the embedding. On `meta` they take no memory.

    Raises:
        InjectionError: the embedding is quantised or no `torch.nn.Embedding`.
    """
    assert config.tokens is not None
    table: Any = model.get_input_embeddings()
    if not isinstance(table, nn.Embedding):
        raise InjectionError(f"tokens cannot train: the vocabulary is in a {type(table).__name__}, no nn.Embedding")
    if is_quantised(table.weight):
        raise InjectionError("tokens cannot train: the embeddings are quantised, and the rows start from their numbers")
    for one in _holders(model):
        if isinstance(one, nn.Embedding):
            _scale_of(one)
    like = template_for(table.weight, model.dtype, config.dtype)
    like = like if device is None else torch.empty(0, dtype=like.dtype, device=device)
    return TokenRows(table.weight, config.tokens.ids, like)


def _holders(model: PreTrainedModel) -> list[Any]:
    """Return every embedding and every projection that holds the weight of the input embedding."""
    weight: Any = model.get_input_embeddings().weight
    found = [module for module in model.modules() if module._parameters.get("weight") is weight]
    for module in found:
        if not isinstance(module, (nn.Embedding, nn.Linear)):
            raise InjectionError(f"tokens cannot train: a {type(module).__name__} shares the embedding's weight")
    return found


def _scale_of(table: Any) -> Any:
    """Return the factor by which an embedding multiplies its rows. Raises `InjectionError` if it computes otherwise."""
    scale = getattr(table, "embed_scale", 1.0)
    if table.weight.is_meta or type(table).forward is nn.Embedding.forward:
        return scale if type(table).forward is not nn.Embedding.forward else 1.0
    first = torch.zeros(1, 1, dtype=torch.long, device=table.weight.device)
    with torch.no_grad():
        if torch.allclose(table.forward(first)[0, 0], table.weight[0] * scale):
            return scale
    raise InjectionError(f"tokens cannot train: {type(table).__name__} gives other values than the rows of its weight")


def wire_tokens(model: PreTrainedModel, room: Room) -> None:
    """Put the hooks on every module that holds the vocabulary."""
    for host in _holders(model):
        is_table = isinstance(host, nn.Embedding)
        host.unipelt_tokens = TokenPort((room,), _scale_of(host) if is_table else 1.0)
        put(host, embed_tokens if is_table else score_tokens)
    put(model, check_holders)


@hook("input")
def check_holders(model: Any, args: tuple[Any, ...]) -> None:
    """Raise `RuntimeError` if a module that holds the vocabulary was replaced after the rows were added."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is table.weight
    if not hasattr(table, "unipelt_tokens") or (tied and not hasattr(head, "unipelt_tokens")):
        raise RuntimeError(
            "the embedding or the output head was replaced after its tokens were chosen to train; call "
            "model.resize_token_embeddings before unipelt.inject"
        )


@hook("output")
def embed_tokens(host: Any, args: tuple[Any, ...], embedded: Tensor) -> Tensor:
    """Put the trained rows into an embedded text, (B, T, E)."""
    rows = host.unipelt_tokens.rows()
    return embedded if rows is None else rows.embed(args[0], embedded, host.unipelt_tokens.scale)


@hook("output")
def score_tokens(host: Any, args: tuple[Any, ...], logits: Tensor) -> Tensor:
    """Put the logits of the trained rows into the output of a head that shares the embedding's weight, (B, T, V)."""
    rows = host.unipelt_tokens.rows()
    return logits if rows is None else rows.logits(args[0], logits, host.bias)
