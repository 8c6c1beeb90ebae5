"""Flat prefixes, prefixes that start at zero, and prefixes that start from a text."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_near, assert_same, bits, logits, shake, tiny_batch, tiny_bert, what_is_there
from inside import parts
from tiny import WITHOUT_INTERFACE, tiny_model
from tiny import tiny_batch as batch_of
from torch import Tensor

import unipelt
from unipelt.config.schema import ConfigError
from unipelt.injection.prefix_start import _flat_prefixes, _start
from unipelt.pack import Pack, kept_values
from unipelt.submodules.prefix import PrefixNetwork
from unipelt.submodules.room import layer_sets

TEXT = "hello"
L = 4


def method(**prefix: Any) -> dict[str, Any]:
    flat = {"length": L, "reparameterize": False, **prefix}
    return {"preset": "prefix", "prefix": flat, "train_head": False}


class Letters:
    """A tokenizer with one token for each letter."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [5 + ord(letter) % 50 for letter in text]}


IDS = torch.tensor([Letters()(TEXT, add_special_tokens=False)["input_ids"][:L]])


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("family", ["bert", "llama", "bart"])
def test_a_flat_prefix_is_keys_and_values_and_no_network(family: str, gate: bool, tmp_path: Path) -> None:
    base, batch = tiny_model(family), batch_of(family)
    before = what_is_there(base)
    model = unipelt.inject(base, method(gate=gate))
    assert not any(isinstance(module, PrefixNetwork) for module in model.modules())
    width, attentions = {"bert": (32, 3), "llama": (16, 3), "bart": (32, 9)}[family]
    counts = unipelt.parameter_counts(model)
    assert counts.submodules == counts.deployed_submodules == {"prefix": attentions * 2 * L * width}
    found = parts(model, "prefix")
    assert {tensor.shape for tensor in found.values()} == {(2, L, width)}
    assert 0.015 < torch.cat([tensor.flatten() for tensor in found.values()]).std() < 0.025, "the start of a network"
    shake(model, std=0.3)
    with torch.no_grad():
        want = model(**batch)[0]
        for deploy in (False, True):
            unipelt.save(model, tmp_path / str(deploy), deploy=deploy)
            loaded = unipelt.load(tiny_model(family), tmp_path / str(deploy))
            assert torch.equal(loaded(**batch)[0], want)
    unipelt.remove(model)
    assert_same(what_is_there(model), before)


def test_a_flat_prefix_computes_what_a_deployed_one_computes(tmp_path: Path) -> None:
    network: Any = unipelt.inject(tiny_bert(), {"preset": "prefix", "prefix": {"length": L, "hidden": 6}})
    shake(network, std=0.3)
    unipelt.save(network, tmp_path, deploy=True)
    flat: Any = unipelt.inject(tiny_bert(), method())
    deployed = parts(unipelt.load(tiny_bert(), tmp_path), "prefix")
    for name, tensor in parts(flat, "prefix").items():
        tensor.copy_(deployed[name])
    assert_near(flat.bert(**tiny_batch())[0].detach(), network.bert(**tiny_batch())[0].detach())


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "bart"])
def test_a_prefix_that_starts_at_zero_adds_nothing_and_learns(family: str, flat: bool) -> None:
    base, batch = tiny_model(family), batch_of(family)
    model = copy.deepcopy(base)
    unipelt.inject(model, method(reparameterize=not flat, start="zero", softmax="own", gate=family == "bert"))
    with torch.no_grad():
        assert torch.equal(model(**batch)[0], base(**batch)[0])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(**batch)[0].square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        assert not torch.equal(model(**batch)[0], base(**batch)[0])


def test_a_start_at_zero_in_the_texts_softmax_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"prefix\.start: zero needs softmax: own"):
        unipelt.resolve(method(start="zero"))
    old = unipelt.resolve("prefix").to_dict()["prefix"]
    assert not {"reparameterize", "start"} & old.keys(), "older settings keep their digest"


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_a_decoder_then_computes_as_if_it_had_read_the_text(family: str) -> None:
    base = tiny_model(family)
    model = unipelt.inject(copy.deepcopy(base), method())
    assert unipelt.start_prefix_from(model, Letters(), TEXT) is model
    ids = torch.randint(5, 60, (2, 5))
    with torch.no_grad():
        want = base(input_ids=torch.cat([IDS.expand(2, -1), ids], dim=1)).logits[:, L:]
        got = model(input_ids=ids, position_ids=torch.arange(L, L + 5)[None]).logits
        assert_near(got, want)
        assert (base(input_ids=ids).logits - want).abs().max() > 0.05


class Recorder:
    """Forward hooks that keep the outputs of projections."""

    def __init__(self) -> None:
        self.seen: dict[str, Tensor] = {}

    def at(self, module: Any, name: str) -> None:
        module.register_forward_hook(lambda module, args, out: self.seen.update({name: out.detach()}))


@pytest.mark.parametrize("family", ["bert", "bart", "t5"])
def test_each_attention_gets_its_own_keys_and_values(family: str) -> None:
    if family in WITHOUT_INTERFACE:
        with pytest.raises(unipelt.InjectionError):
            unipelt.inject(tiny_model(family), method())
        return
    base, recorder = tiny_model(family), Recorder()
    model = unipelt.inject(copy.deepcopy(base), method(gate=True))
    model.train()
    shake(model)
    kept = {name: value for name, value in bits(model).items() if "keys_values" not in name}
    unipelt.start_prefix_from(model, Letters(), TEXT)
    assert model.training
    assert all(torch.equal(bits(model)[name], value) for name, value in kept.items())
    names = {"bert": ("key", "value"), "bart": ("k_proj", "v_proj"), "t5": ("k", "v")}[family]
    found = []
    for path, _, part in layer_sets(model):
        attention = base.get_submodule(f"{path}.{part.wiring.attention}")
        where = f"{path}.{part.wiring.attention}"
        for name in names:
            recorder.at(attention.get_submodule(name), f"{where}.{name}")
        found.append((where, part.prefix.keys_values))
    assert len(found) == (3 if family == "bert" else 9)
    with torch.no_grad():
        base(input_ids=IDS) if family == "bert" else base(input_ids=IDS, decoder_input_ids=IDS)
    for where, both in found:
        for row, name in zip(both.detach(), names, strict=True):
            torch.testing.assert_close(row, recorder.seen[f"{where}.{name}"][0])


def test_the_frozen_model_is_read_without_what_was_added() -> None:
    """A prefix that is there already, LoRA and trained biases change nothing of what the text's keys are."""
    plain = unipelt.inject(tiny_bert(), method())
    other = unipelt.inject(tiny_bert(), {**method(), "lora": {"rank": 2}, "bitfit": True})
    shake(other, std=0.3)
    for model in (plain, other):
        unipelt.start_prefix_from(model, Letters(), TEXT)
    want = parts(plain, "prefix")
    assert all(torch.equal(tensor, want[name]) for name, tensor in parts(other, "prefix").items())
    logits(other)


def test_what_cannot_start_from_a_text_is_refused_and_stays() -> None:
    cases: list[tuple[Any, dict[str, Any], str, str]] = [
        ("bert", {"preset": "lora"}, TEXT, "has no prefix; inject one with"),
        ("bert", {"preset": "prefix"}, TEXT, "a network computes the prefixes .* prefix.reparameterize: false"),
        ("bert", method(), "abc", "the text has 3 tokens, and the prefix 4; .* prefix.length: 3"),
        ("bert", method(), 3, "text must be a text, not 3"),  # type: ignore[list-item]
        ("albert", method(), TEXT, "was called 3 times for the text"),
        ("mpnet", method(), TEXT, "outside Transformers' attention interface"),
    ]
    for family, asked, text, message in cases:
        model = unipelt.inject(tiny_model(family), asked)
        before = what_is_there(model)
        with pytest.raises(ValueError, match=message):
            unipelt.start_prefix_from(model, Letters(), text)
        assert_same(what_is_there(model), before)
        assert all(
            getattr(module.unipelt_port, "seen", None) is None
            for module in model.modules()
            if "unipelt_port" in vars(module)
        )
    with pytest.raises(ValueError, match="carries no submodules"):
        unipelt.start_prefix_from(tiny_bert(), Letters(), TEXT)


def test_a_prefix_of_cross_attention_alone_starts_from_the_states_of_the_text() -> None:
    model: Any = unipelt.inject(tiny_model("bart"), {**method(), "encoder": False, "decoder": False, "cross": True})
    unipelt.start_prefix_from(model, Letters(), TEXT)
    found = parts(model, "prefix")
    assert {name.rpartition("layer")[0] for name in found} == {"model.decoder."}
    assert len(found) == 3
    assert all("cross" in name and tensor.any() for name, tensor in found.items())


def test_keys_of_another_shape_than_the_prefix_are_refused() -> None:
    model: Any = unipelt.inject(tiny_bert(), method())
    port, prefix, path = _flat_prefixes(model)[0]
    port.seen = [(torch.ones(1, 4, 3, 8), torch.ones(1, 4, 3, 8))]
    with pytest.raises(
        ValueError, match=r"the keys of .*layer\.0 are \(3, 32\) for the text, and the prefix is \(4, 32\)"
    ):
        _start(port, prefix, path)


def test_a_flat_prefix_folds_packs_and_stays_out_of_the_release() -> None:
    model = unipelt.inject(tiny_bert(), method(gate=True))
    pack = Pack(model, tokens=9)
    shake(model, std=0.3)
    pack.add(kept_values(model))
    batch = tiny_batch()
    assert_near(pack({name: tensor[None] for name, tensor in batch.items()})[0].detach(), logits(model, batch))
    with pytest.raises(unipelt.CheckpointError, match="which a flat prefix"):
        unipelt.release_state_dict(model)
    want = logits(model, batch)
    report = unipelt.fold(model, [batch], tolerance=1.0)
    assert report.outcomes["constant"] == 3
    assert report.before.deployed_submodules == report.after.deployed_submodules
    assert (logits(model, batch) - want).abs().max() < 0.1
