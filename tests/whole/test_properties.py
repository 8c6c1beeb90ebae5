"""What holds for every family, method, size, text and mask: nothing here is true of chosen examples alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from helpers import assert_near
from hosts.test_families import logits
from hypothesis import assume
from hypothesis import strategies as st
from inside import fill, parts
from strategies import AS_DECODERS, Case, Texts, batch, cases, holds, real, texts
from tiny import CACHE, DECODERS, ENCODER_DECODERS, VOCABULARY, WITH_PREFIX
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

CAUSAL = (*DECODERS, *ENCODER_DECODERS)
MASKED: Any = {"pooling": ["masked_mean"]}
"""A mean over all tokens is promised to depend on padding."""


def assert_same_there(got: Tensor, want: Tensor, where: Tensor, tolerance: float = 1e-5) -> None:
    """Equal at some of the outputs, of which there must be one."""
    assume(where.any())
    assert_near(got[where], want[where], tolerance)


def other_tokens(ids: Tensor, places: Tensor, seed: int) -> Tensor:
    """The same ids with others (no padding, no end of text) at `places`."""
    generator = torch.Generator().manual_seed(seed)
    shift = torch.randint(1, VOCABULARY - 5, ids.shape, generator=generator)
    return torch.where(places, (ids - 5 + shift) % (VOCABULARY - 5) + 5, ids)


# Masks and batches


@holds(20, cases(**MASKED), texts(["right"]))
def test_padding_does_not_matter(case: Case, described: Texts) -> None:
    """A text by itself gives what it gives in a padded batch."""
    model = case.build()
    together = batch(model, case, described)
    want = logits(model, together)
    for row, length in enumerate(described.lengths):
        ends = {name: described.targets[row] if name.startswith("decoder") else length for name in together}
        alone = {name: tensor[row : row + 1, : ends[name]] for name, tensor in together.items()}
        got = logits(model, alone)[0]
        assert_near(got, want[row, : len(got)] if want.dim() == 3 else want[row], 2e-5)


@holds(10, cases([*DECODERS, *AS_DECODERS], decoders_too=True, **MASKED), texts(["left"]))
def test_padding_in_front_of_a_decoders_text_does_not_matter(case: Case, described: Texts) -> None:
    assume(case.causal)
    model = case.build()
    together = batch(model, case, described)
    want = logits(model, together)
    for row in range(len(described.lengths)):
        seen = together["attention_mask"][row].bool()
        got = logits(model, {name: tensor[row : row + 1, seen] for name, tensor in together.items()})[0]
        assert_near(got, want[row, seen], 2e-5)


@holds(20, cases(decoders_too=True, **MASKED), texts(["right", "left"], holes=True), st.integers(0, 99))
def test_what_is_masked_is_not_seen(case: Case, described: Texts, seed: int) -> None:
    """Whatever stands where the mask is 0, inside a text too, moves no other token's output."""
    model = case.build()
    inputs = batch(model, case, described)
    masked = (inputs["attention_mask"] == 0) & (inputs["input_ids"] >= 5)  # some models count padding by its id
    changed = {**inputs, "input_ids": other_tokens(inputs["input_ids"], masked, seed)}
    if case.behind_encoder:
        beyond = inputs["decoder_attention_mask"] == 0
        changed["decoder_input_ids"] = other_tokens(inputs["decoder_input_ids"], beyond, seed)
    want, got = logits(model, inputs), logits(model, changed)
    where = real(case, inputs, want)
    if not case.causal and described.padding == "left":
        where = where & inputs["attention_mask"][:, 0].bool()  # the head reads the first token
    assert_same_there(got, want, where)


@holds(20, cases(decoders_too=True), texts(holes=True, rows=(2, 5)), st.data())
def test_rows_of_a_batch_do_not_see_each_other(case: Case, described: Texts, data: st.DataObject) -> None:
    """In another order, or some of them left out, they give the same."""
    model = case.build()
    inputs = batch(model, case, described)
    count = len(described.lengths)
    order = data.draw(st.permutations(range(count)).flatmap(lambda rows: st.integers(1, count).map(lambda n: rows[:n])))
    want = logits(model, inputs)[order]
    part = {name: tensor[order] for name, tensor in inputs.items()}
    where = real(case, part, want)
    assert_same_there(logits(model, part), want, where)


# Decoders


def split(case: Case, model: Any, inputs: dict[str, Tensor], cuts: list[int]) -> Tensor:
    """Logits of the decoder's text, read in pieces between the cuts, with a cache."""
    cache: Any = DynamicCache(config=model.config.get_text_config(decoder=True))
    name, mask = "input_ids", "attention_mask"
    if case.behind_encoder:
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        name, mask = "decoder_input_ids", "decoder_attention_mask"
    rest = {key: tensor for key, tensor in inputs.items() if key not in (name, mask, "position_ids")}
    parts = []
    for start, end in zip([0, *cuts], [*cuts, inputs[name].shape[1]], strict=True):
        piece = {key: inputs[key][:, start:end] for key in (name, "position_ids") if key in inputs}
        if mask in inputs:
            piece[mask] = inputs[mask][:, :end]
        with torch.no_grad():
            parts.append(model(**rest, **piece, **{CACHE: cache}, use_cache=True).logits)
    return torch.cat(parts, dim=1)


@holds(30, cases([*CAUSAL, *AS_DECODERS], decoders_too=True), texts(["none", "left", "none", "right"]), st.data())
def test_no_token_sees_a_later_one(case: Case, described: Texts, data: st.DataObject) -> None:
    assume(case.causal)
    model = case.build()
    inputs = batch(model, case, described)
    name = "decoder_input_ids" if case.behind_encoder else "input_ids"
    tokens = inputs[name].shape[1]
    first = data.draw(st.integers(1, tokens - 1), label="first changed")
    later = torch.arange(tokens).expand_as(inputs[name]) >= first
    changed = {**inputs, name: other_tokens(inputs[name], later & (inputs[name] >= 5), described.seed + 1)}
    want = logits(model, inputs)
    assert_same_there(logits(model, changed), want, real(case, inputs, want) & ~later, 2e-6)


@holds(20, cases([*CAUSAL, *AS_DECODERS], decoders_too=True), texts(), st.data())
def test_a_text_in_pieces_is_the_whole_text(case: Case, described: Texts, data: st.DataObject) -> None:
    """With a cache, wherever it is cut: token by token, or in uneven parts."""
    assume(case.causal)
    bare, model = case.bare(), case.build()
    inputs = batch(model, case, described)
    tokens = inputs["decoder_input_ids" if case.behind_encoder else "input_ids"].shape[1]
    cuts = sorted(data.draw(st.sets(st.integers(1, tokens - 1)), label="cuts"))
    try:
        split(case, bare, inputs, cuts)
    except RuntimeError:  # an older StableLM itself mistakes the size of its mask, for pieces of a text
        assume(False)
    whole = logits(model, inputs)
    assert_same_there(split(case, model, inputs, cuts), whole, real(case, inputs, whole))


# What does nothing


@holds(20, cases(parts=["adapter", "lora"], further=False, decoders_too=True), texts(holes=True))
def test_up_and_B_of_zero_change_nothing(case: Case, described: Texts) -> None:
    """Bitwise, wherever everything else of the method is."""
    model = case.build()
    bare = case.bare()
    bare.load_state_dict({name: model.state_dict()[name] for name in bare.state_dict()})
    ends = ("adapter.up.weight", "adapter.up.bias", "lora_query.B", "lora_value.B")
    assert sum(fill(model, end, 0.0) for end in ends)
    inputs = batch(model, case, described)
    assert torch.equal(logits(model, inputs), logits(bare, inputs))


@holds(20, cases(WITH_PREFIX, gated=[True], gating=["mass"], other_gates=False, decoders_too=True), texts(holes=True))
def test_closed_gates_change_nothing(case: Case, described: Texts) -> None:
    """With a prefix that acts through its mass, the closed method is the model that it went into."""
    model = case.build()
    bare = case.bare()
    bare.load_state_dict({name: model.state_dict()[name] for name in bare.state_dict()})
    inputs = batch(model, case, described)
    for name, part in parts(model, "gate").items():
        part.fill_(0.0 if name.endswith(".weight") else -1e4)
    want = logits(bare, inputs)
    where = real(case, inputs, want)
    assert_same_there(logits(model, inputs), want, with_text(where, case, described, inputs), 4e-6)


# Back-ends


def with_text(where: Tensor, case: Case, described: Texts, inputs: dict[str, Tensor]) -> Tensor:
    """Return those of the outputs `where`, (B,), whose head reads a real token.

    A head reads the first token. Where that is padding whose window is all masked, an attention of the base spreads its
    weight over masked tokens, each back-end in its own way, and a prefix that is present takes that weight.
    """
    if described.padding == "left" and not case.causal:
        return where & inputs["attention_mask"][:, 0].bool()
    return where


@holds(20, cases(attention=["sdpa"], decoders_too=True), texts(holes=True))
def test_sdpa_equals_eager(case: Case, described: Texts) -> None:
    model, other = case.build(), replace(case, attention="eager").build()
    assume(model.config._attn_implementation == "sdpa")
    inputs = batch(model, case, described)
    want = logits(model, inputs)
    where = real(case, inputs, want)
    assert_same_there(logits(other, inputs), want, with_text(where, case, described, inputs))
