"""Trained tokens, against the host itself with the rows written into its vocabulary."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import bits
from tiny import DECODERS, ENCODER_DECODERS, ENCODERS, tiny_batch, tiny_model
from torch import Tensor, nn

import unipelt
from unipelt.pack import Pack
from unipelt.submodules.token_rows import TokenRows

FAMILIES = (*ENCODERS, *DECODERS, *ENCODER_DECODERS)
HEADS = {**dict.fromkeys(ENCODERS, "MaskedLM"), **dict.fromkeys(DECODERS, "CausalLM")}
QUICK = ("bert", "albert", "gpt2", "llama", "gemma", "bart", "t5")
IDS = [3, 11, 12]
TOKENS: dict[str, Any] = {"preset": "lora", "lora": {"gate": False}, "tokens": {"ids": IDS}}


def rows_of(model: Any) -> Any:
    """The trained rows."""
    return next(module for module in model.modules() if type(module).__name__ == "TokenRows").embedding


def batch_of(family: str) -> dict[str, Any]:
    """A batch in which each of the tokens occurs."""
    batch = tiny_batch(family)
    for name in ("input_ids", "decoder_input_ids"):
        if name in batch:
            batch[name][:, 1:4] = torch.tensor(IDS)
    return batch


def check(family: str) -> None:
    host = tiny_model(family, HEADS.get(family, "Seq2SeqLM")).train(False)
    model, batch = unipelt.inject(copy.deepcopy(host), TOKENS), batch_of(family)
    rows = rows_of(model)
    with torch.no_grad():
        rows += torch.randn_like(rows)
    table = host.get_input_embeddings().weight
    table.data[IDS] = rows.detach()
    table.requires_grad_(True)
    got, want = model(**batch).logits, host(**batch).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    way = torch.randn_like(want)
    (got * way).sum().backward()
    (want * way).sum().backward()
    torch.testing.assert_close(rows.grad, table.grad[IDS], rtol=1e-4, atol=1e-4)
    assert model.get_input_embeddings().weight.grad is None
    assert unipelt.parameter_counts(model).submodules["tokens"] == rows.numel()


def test_rows_stand_in_for_those_of_the_table() -> None:
    table, like = torch.randn(9, 4), torch.empty(0, dtype=torch.float64)
    rows = TokenRows(table, [7, 2], like)
    assert rows.ids.tolist() == [2, 7]
    assert torch.equal(rows.embedding, table[[2, 7]].double())
    assert rows.embedding.dtype == torch.float64
    assert list(rows.state_dict()) == ["embedding"], "the configuration names the tokens"
    assert repr(rows) == "TokenRows(2 tokens)"
    before = table.clone()
    rows.embedding.data.add_(1)
    assert torch.equal(table, before)
    whole = before.clone()
    whole[[2, 7]] = rows.embedding.detach().float()
    tokens = torch.tensor([[2, 7], [8, 0], [7, 5]]).t()  # not contiguous
    got = rows.embed(tokens, 3 * before[tokens], 3)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, 3 * whole[tokens])
    states, bias = torch.randn(2, 3, 4), torch.randn(9)
    for shift in (None, bias):
        got = rows.logits(states, nn.functional.linear(states, before, shift), shift)
        torch.testing.assert_close(got, nn.functional.linear(states, whole, shift))
    empty = TokenRows(table, [1, 5, 6], torch.empty(0, device="meta"))
    assert (empty.embedding.shape, empty.embedding.device.type) == ((3, 4), "meta")


@pytest.mark.parametrize("family", QUICK)
def test_a_family(family: str) -> None:
    check(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(QUICK)))
def test_other_families(family: str) -> None:
    check(family)


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], value) for name, value in want.items())


def grown(tmp_path: Path, family: str = "gpt2") -> Any:
    """A language model with three rows more than its base in a folder has."""
    tiny_model(family, "CausalLM").save_pretrained(tmp_path / "base")
    model = type(tiny_model(family, "CausalLM")).from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(model.config.vocab_size + 3, mean_resizing=False)
    return model


@pytest.mark.parametrize("family", ["gpt2", "llama"])  # a tied head, and one with a weight of its own
def test_new_rows(tmp_path: Path, family: str) -> None:
    model = grown(tmp_path, family)
    size = model.config.vocab_size
    unipelt.inject(model, {"preset": "lora", "tokens": {}})
    assert model.unipelt_injection.config.tokens.ids == (size - 3, size - 2, size - 1)
    with torch.no_grad():
        rows_of(model).add_(1)
    unipelt.save(model, tmp_path / "saved")
    again = unipelt.from_pretrained(tmp_path / "saved")
    text = torch.tensor([[1, size - 1, size - 2, 4]])
    with torch.no_grad():
        assert torch.equal(again.eval()(text).logits, model.eval()(text).logits)
        with unipelt.disable(model):
            assert not torch.equal(again(text).logits, model(text).logits)
    groups = {group["name"]: group for group in unipelt.parameter_groups(model, lr=1e-3, tokens=1e-2)}
    assert groups["tokens"]["lr"] == 1e-2


def test_remove_and_merge(tmp_path: Path) -> None:
    model = grown(tmp_path)
    before = bits(model)
    unipelt.inject(model, TOKENS)
    with torch.no_grad():
        rows_of(model).add_(1)
    text = torch.tensor([[1, 3, 11, 4]])
    with torch.no_grad():
        wanted = model.eval()(text).logits
    merged = unipelt.merge(copy.deepcopy(model))
    with torch.no_grad():
        torch.testing.assert_close(merged(text).logits, wanted)
    unipelt.remove(model)
    assert_same(bits(model), before)
    assert not any(hasattr(module, "unipelt_tokens") for module in model.modules())


def test_what_is_refused(tmp_path: Path) -> None:
    model = tiny_model("gpt2", "CausalLM")
    before = bits(model)
    for tokens, sentence in (
        ({"ids": [10_000]}, "names the token 10000, and the vocabulary has"),
        ({"ids": [1, 1]}, "names a token twice"),
        ({"ids": [-1]}, "must be numbers of tokens, from 0"),
        ({}, "name the tokens, for example tokens.ids"),
    ):
        with pytest.raises(ValueError, match=sentence):
            unipelt.inject(model, {"preset": "lora", "tokens": tokens})
    same = grown(tmp_path)
    same.resize_token_embeddings(same.config.vocab_size - 3)
    with pytest.raises(ValueError, match=r"there are none; call model\.resize_token_embeddings first"):
        unipelt.inject(same, {"preset": "lora", "tokens": {}})
    assert_same(bits(model), before)
    unipelt.inject(model, TOKENS)
    with pytest.raises(ValueError, match="trained tokens, which a PEFT folder of LoRA cannot hold"):
        unipelt.save_peft(model, tmp_path / "peft")
    with pytest.raises(ValueError, match="PEFT has trainable_token_indices"):
        unipelt.save(model, tmp_path / "peft", peft=True)


class Table(torch.nn.Module):
    """A vocabulary that is no `nn.Embedding`."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(rows, width))


class Doubled(torch.nn.Embedding):
    """An embedding that gives twice its rows, and does not say so."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (Table, "the vocabulary is in a Table, no nn.Embedding"),
        (Doubled, "Doubled gives other values than the rows of its weight"),
    ],
)
def test_vocabularies_that_are_no_plain_tables_are_refused(table: Any, message: str) -> None:
    model = tiny_model("gpt2", "CausalLM")
    model.set_input_embeddings(table(60, 32))
    before = bits(model)
    with pytest.raises(unipelt.InjectionError, match=f"tokens cannot train: {message}"):
        unipelt.inject(model, TOKENS)
    assert_same(bits(model), before)
    assert not hasattr(model, "unipelt_injection")


def test_a_vocabulary_without_memory_gets_rows_without_memory() -> None:
    model: Any
    with torch.device("meta"):
        model = unipelt.inject(tiny_model("gemma", "CausalLM"), TOKENS)
    assert rows_of(model).is_meta
    assert rows_of(model).shape == (3, 32)
    embeddings = model.get_input_embeddings()
    scale, wanted = embeddings.unipelt_tokens.scale, getattr(embeddings, "embed_scale", 1.0)  # 5.0 scales elsewhere
    assert scale is wanted or scale == wanted


def test_a_vocabulary_resized_afterwards() -> None:
    model = unipelt.inject(tiny_model("gpt2", "CausalLM"), TOKENS)
    text = torch.tensor([[1, 3, 11, 4]])
    with torch.no_grad():
        rows_of(model).add_(1)
        wanted = model(text).logits
        model.resize_token_embeddings(model.config.vocab_size + 2, mean_resizing=False)
        torch.testing.assert_close(model(text).logits[..., : wanted.shape[-1]], wanted)
    model.set_input_embeddings(torch.nn.Embedding(70, model.config.hidden_size))
    with pytest.raises(RuntimeError, match=r"resize_token_embeddings before unipelt\.inject"):
        model(text)


def test_generation_and_packs() -> None:
    model = unipelt.inject(tiny_model("gpt2", "CausalLM"), TOKENS).eval()
    with torch.no_grad():
        rows_of(model).add_(1)
    text = torch.tensor([[1, 3, 11, 4]])
    cached = model.generate(text, max_new_tokens=6, do_sample=False)
    assert torch.equal(cached, model.generate(text, max_new_tokens=6, do_sample=False, use_cache=False))
    assert Pack(unipelt.inject(tiny_model("bert"), TOKENS), tokens=9).model is not None  # its probe compares
