"""How many parameters there are, which train, and that the others never move."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SIZES, tiny_batch, tiny_bert
from tiny import tiny_config
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    PreTrainedConfig,
    PreTrainedModel,
    T5EncoderModel,
)

import unipelt
from unipelt.injection.parameters import head_names, kept_names, unfrozen_names
from unipelt.submodules.room import own_parameters, own_parts

BASE = 109_482_240  # BERT-base with its pooler
ADAPTER = 894_528
PREFIX = 184_320
NETWORK = 9_857_024
LORA = 294_912
GATE = 12 * 769
PARALLEL = 12 * (2 * 768 * 512 + 512 + 768)
BIASES = 102_914  # of BERT-base with 2 labels, the classifier's 2 included
HEAD = 2 * 769
LABELS = torch.tensor([0, 1, 1])


@pytest.fixture(scope="module")
def bert_base() -> BertForSequenceClassification:
    return BertForSequenceClassification(BertConfig())


@pytest.fixture
def model(bert_base: BertForSequenceClassification) -> Iterator[BertForSequenceClassification]:
    yield bert_base
    if hasattr(bert_base, "unipelt_injection"):
        unipelt.remove(bert_base)


# preset -> submodules as trained, and gates
COUNTS: dict[str, tuple[dict[str, int], tuple[str, ...]]] = {
    "fine-tuning": ({"base": BASE}, ()),
    "bitfit": ({"bitfit": BIASES - 2}, ()),
    "adapter": ({"adapter": ADAPTER}, ()),
    "prefix": ({"prefix": NETWORK}, ()),
    "lora": ({"lora": LORA}, ()),
    "unipelt-ap": ({"adapter": ADAPTER, "prefix": NETWORK}, ("adapter", "prefix")),
    "unipelt-apl": (
        {"adapter": ADAPTER, "prefix": NETWORK, "lora": LORA},
        ("adapter", "prefix", "lora_query", "lora_value"),
    ),
    "unipelt": (
        {"adapter": ADAPTER, "prefix": NETWORK, "lora": LORA},
        ("adapter", "prefix", "lora_query", "lora_value"),
    ),
    "unipelt-al": ({"adapter": ADAPTER, "lora": LORA}, ("adapter", "lora_query", "lora_value")),
    "unipelt-pl": ({"prefix": NETWORK, "lora": LORA}, ("prefix", "lora_query", "lora_value")),
    "unipelt-ap-nogate": ({"adapter": ADAPTER, "prefix": NETWORK}, ()),
    "unipelt-apl-nogate": ({"adapter": ADAPTER, "prefix": NETWORK, "lora": LORA}, ()),
    "unipelt-al-nogate": ({"adapter": ADAPTER, "lora": LORA}, ()),
    "unipelt-pl-nogate": ({"prefix": NETWORK, "lora": LORA}, ()),
    "ia3": ({"ia3": 12 * (768 + 768 + 3072)}, ()),
    "prompt": ({"prompt": 20 * 768}, ()),
    "red": ({"red": 12 * 2 * 768}, ()),
    "ln_tuning": ({"ln_tuning": 12 * 2 * 2 * 768}, ()),  # two norms a layer, each a weight and a bias
    "reft": ({"reft": 12 * (2 * 4 * 768 + 4)}, ()),  # R, W and b
    "houlsby": ({"houlsby": 2 * ADAPTER}, ()),
    "parallel": ({"parallel": PARALLEL}, ()),
    # shared left factors; of each of two adapters a layer, right factors of both projections, and both biases
    "compacter": ({"compacter": 4**3 + 12 * 2 * (2 * (768 + 24) + 24 + 768)}, ()),
    "mam": ({"prefix": NETWORK + 20 * 768, "parallel": PARALLEL}, ()),
    "unipelt-mam": ({"prefix": NETWORK + 20 * 768, "parallel": PARALLEL}, ("prefix", "parallel_feed_forward")),
}


def trainable(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("preset", unipelt.PRESETS)
def test_counts_on_bert_base(model: BertForSequenceClassification, preset: str) -> None:
    submodules, gates = COUNTS[preset]
    unipelt.inject(model, preset)
    counts = unipelt.parameter_counts(model)
    assert counts.submodules == submodules
    assert counts.gates == dict.fromkeys(gates, GATE)
    prefix = unipelt.PRESETS[preset].prefix
    deployed = {**submodules, **({"prefix": PREFIX * prefix.length // 10} if prefix is not None else {})}
    assert counts.deployed_submodules == deployed
    assert counts.trained == sum(submodules.values()) + GATE * len(gates)
    assert counts.deployed == sum(deployed.values()) + GATE * len(gates)
    assert counts.head == HEAD
    assert counts.base == BASE
    assert trainable(model) == counts.trained + counts.head


def test_the_papers_two_methods_are_as_large_as_it_says(model: BertForSequenceClassification) -> None:
    for preset, millions, percent in (("unipelt-ap", 1.1, 0.99), ("unipelt-apl", 1.4, 1.26)):
        unipelt.inject(model, preset)
        counts = unipelt.parameter_counts(model)
        assert round(counts.deployed / 1e6, 1) == millions
        # the paper divides by 110 million
        assert 100 * counts.deployed / counts.base == pytest.approx(percent, abs=0.04)
        unipelt.remove(model)


def test_bitfit_with_a_frozen_head_trains_every_bias_and_no_weight(model: BertForSequenceClassification) -> None:
    unipelt.inject(model, {"preset": "bitfit", "train_head": False})
    counts = unipelt.parameter_counts(model)
    assert (counts.trained, counts.deployed, counts.head) == (BIASES, BIASES, 0)
    assert trainable(model) == BIASES
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == name.endswith("bias"), name


def test_layers_that_carry_nothing_count_nothing(model: BertForSequenceClassification) -> None:
    unipelt.inject(model, {"layers": [0, 11]})
    counts = unipelt.parameter_counts(model)
    assert counts.submodules["adapter"] == ADAPTER // 6
    assert counts.submodules["lora"] == LORA // 6
    assert counts.deployed_submodules["prefix"] == PREFIX // 6
    assert set(counts.gates.values()) == {2 * 769}
    assert trainable(model) == counts.trained + counts.head


def test_a_deployed_model_counts_what_is_there(tmp_path: Path) -> None:
    model = unipelt.inject(tiny_bert(), "unipelt-apl")
    before = unipelt.parameter_counts(model)
    unipelt.save(model, tmp_path, deploy=True)
    deployed = unipelt.load(tiny_bert(), tmp_path)
    after = unipelt.parameter_counts(deployed)
    assert after.deployed == before.deployed == after.trained < before.trained
    assert after.deployed_submodules["prefix"] == after.submodules["prefix"] == 3 * 2 * 10 * 32
    assert trainable(deployed) == after.trained + after.head


def test_counts_read_well_and_need_an_injection() -> None:
    model = unipelt.inject(tiny_bert(), "unipelt-ap")
    counts = unipelt.parameter_counts(model)
    text = str(counts)
    for number in (counts.trained, counts.deployed, counts.head, counts.base, *counts.submodules.values()):
        assert f"{number:,}" in text
    assert f"({100 * counts.trained / counts.base:.2f} % of the base's {counts.base:,})" in text
    assert "(0.00 % of the base's 0)" in str(dataclasses.replace(counts, base=0))
    gates = " ".join(text[text.index("gates: ") :].split())
    assert gates.startswith("gates: prefix 99, adapter 99 deployed"), "a row of at most four"
    unipelt.remove(model)
    with pytest.raises(ValueError, match="inject"):
        unipelt.parameter_counts(model)


@pytest.mark.parametrize("train_head", [True, False])
@pytest.mark.parametrize("preset", unipelt.PRESETS)
def test_only_what_the_configuration_says_trains(preset: str, train_head: bool) -> None:
    model = tiny_bert()
    base = [name for name, _ in model.named_parameters()]
    config = unipelt.resolve({"preset": preset, "train_head": train_head})
    unipelt.inject(model, config)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    added = {name for name, _ in model.named_parameters() if name not in base}
    assert added <= trained, "what is added exists to be trained"
    expected = set(added)
    if config.train_base:
        expected |= {name for name in base if name.startswith("bert.")}
    if config.bitfit:
        expected |= {name for name in base if name.endswith("bias")}
    if train_head:
        expected |= {"classifier.weight", "classifier.bias"}
    assert trained == expected
    assert added == own_parameters(model).keys() == {own.full_name for own in own_parts(model)}
    kinds = {own.part.kind for own in own_parts(model)}
    named = {name for name in ("adapter", "prefix", "lora", "prompt") if getattr(config, name) is not None}
    assert kinds - {"gate"} == named | {part.name for part in config.more}
    assert ("gate" in kinds) == (preset.startswith("unipelt") and "nogate" not in preset)
    of_lora = {own.part.name for own in own_parts(model) if own.part.kind == "lora"}
    assert of_lora == (
        {f"lora_{place}.{side}" for place in ("query", "value") for side in "AB"} if config.lora else set()
    )


@pytest.mark.parametrize("preset", unipelt.PRESETS)
def test_the_size_of_a_part_is_known_without_looking_at_its_numbers(preset: str) -> None:
    for own in own_parts(unipelt.inject(tiny_bert(), preset)):
        assert own.size == own.tensor.numel() > 0, own.part.name


@pytest.mark.parametrize("preset", ["unipelt-apl", "unipelt-apl-nogate", "lora", "prompt", "unipelt-mam"])
def test_counts_follow_what_trains(preset: str) -> None:
    """Whatever a caller freezes or lets train after injecting."""
    model = unipelt.inject(tiny_bert(), preset)
    whole = unipelt.parameter_counts(model)
    assert trainable(model) == whole.trained + whole.head
    for own in own_parts(model):
        own.parameter.requires_grad_(False)
        now = unipelt.parameter_counts(model)
        assert trainable(model) == now.trained + now.head
        assert now.deployed == whole.deployed, "what is frozen is deployed all the same"
        assert now.deployed_submodules == whole.deployed_submodules
        assert now.gates == whole.gates
        assert (now.head, now.base) == (whole.head, whole.base)
    assert now.trained == sum(now.submodules.values()) == 0
    model.get_parameter("bert.pooler.dense.bias").requires_grad_(True)
    model.get_parameter("classifier.bias").requires_grad_(False)
    now = unipelt.parameter_counts(model)
    assert (now.trained, now.head, now.submodules["base"]) == (32, 64, 32)
    assert trainable(model) == now.trained + now.head


def without_gradient(model: torch.nn.Module, batch: dict[str, Tensor]) -> list[str]:
    """Backpropagate once; names of parameters that wait for a gradient which never comes, or get one though frozen."""
    model.train()
    model(**batch).loss.backward()
    return [name for name, p in model.named_parameters() if p.requires_grad != (p.grad is not None)]


@pytest.mark.parametrize(
    "changes", [{}, {"train_head": False}, {"gate": {"pooling": "mean"}}, {"layers": [1]}], ids=str
)
@pytest.mark.parametrize("preset", unipelt.PRESETS)
def test_every_trained_parameter_gets_a_gradient(preset: str, changes: dict[str, Any]) -> None:
    # DistributedDataParallel waits for ever for a gradient that does not come
    model = unipelt.inject(tiny_bert(), {"preset": preset, **changes})
    assert without_gradient(model, {**tiny_batch(), "labels": LABELS}) == []


@pytest.mark.parametrize("config", [{"prefix": {"gating": "mass"}}, {"bitfit": True}, {"train_base": True}], ids=str)
def test_every_trained_parameter_gets_a_gradient_in_mixtures(config: dict[str, Any]) -> None:
    model = unipelt.inject(tiny_bert(), config)
    assert without_gradient(model, {**tiny_batch(), "labels": LABELS}) == []


@pytest.mark.parametrize("cls", [BertForTokenClassification, BertForMaskedLM])
@pytest.mark.parametrize("preset", ["unipelt-apl", "bitfit", "fine-tuning"])
def test_every_trained_parameter_gets_a_gradient_under_other_heads(cls: Any, preset: str) -> None:
    model = unipelt.inject(cls(BertConfig(**SIZES)), preset)  # type: ignore[arg-type]
    batch = tiny_batch()
    assert without_gradient(model, {**batch, "labels": torch.ones_like(batch["input_ids"])}) == []


def test_every_parameter_of_a_deployed_model_gets_a_gradient(tmp_path: Path) -> None:
    unipelt.save(unipelt.inject(tiny_bert(), "unipelt-apl"), tmp_path, deploy=True)
    model = unipelt.load(tiny_bert(), tmp_path)
    assert without_gradient(model, {**tiny_batch(), "labels": LABELS}) == []


@pytest.fixture
def without_pooler(tmp_path: Path) -> BertForSequenceClassification:
    """A classifier on a checkpoint that held neither a pooler nor a classifier."""
    BertModel(BertConfig(**SIZES), add_pooling_layer=False).save_pretrained(tmp_path)  # type: ignore[arg-type]
    return BertForSequenceClassification.from_pretrained(tmp_path)


POOLER = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
CLASSIFIER = {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("preset", unipelt.PRESETS)
def test_a_pooler_that_the_checkpoint_did_not_hold_trains_with_the_head(
    without_pooler: BertForSequenceClassification, preset: str
) -> None:
    unipelt.inject(without_pooler, preset)
    trained = {name for name, p in without_pooler.named_parameters() if p.requires_grad}
    assert trained >= POOLER | CLASSIFIER
    counts = unipelt.parameter_counts(without_pooler)
    assert counts.head == 32 * 32 + 32 + 2 * 32 + 2
    assert trainable(without_pooler) == counts.trained + counts.head


def test_a_random_pooler_stays_frozen_where_the_head_does(without_pooler: BertForSequenceClassification) -> None:
    unipelt.inject(without_pooler, {"train_head": False})
    trained = {name for name, p in without_pooler.named_parameters() if p.requires_grad}
    assert not trained & (POOLER | CLASSIFIER)
    assert unipelt.parameter_counts(without_pooler).head == 0


def test_a_pooler_that_the_checkpoint_held_is_base(tmp_path: Path) -> None:
    BertModel(BertConfig(**SIZES)).save_pretrained(tmp_path)  # type: ignore[arg-type]
    model = BertForSequenceClassification.from_pretrained(tmp_path)
    unipelt.inject(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not trained & POOLER
    assert trained >= CLASSIFIER
    assert unipelt.parameter_counts(model).head == 2 * 32 + 2


@pytest.mark.parametrize("preset", unipelt.PRESETS)
def test_training_moves_what_trains_and_nothing_else(preset: str) -> None:
    model = unipelt.inject(tiny_bert(dropout=0.1), preset).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    # all parameters, with weight decay: frozen ones stay because they are frozen, not because they are left out
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(3):
        optimizer.zero_grad()
        model(**tiny_batch(seed=step), labels=LABELS).loss.backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


@pytest.mark.parametrize("preset", ["unipelt-apl", "lora", "bitfit", "fine-tuning"])
def test_what_a_caller_unfreezes_is_kept_too(preset: str) -> None:
    model: Any = unipelt.inject(tiny_bert(), preset)
    assert unfrozen_names(model) == set()
    before = kept_names(model)
    weight = "bert.embeddings.word_embeddings.weight"
    model.get_parameter(weight).requires_grad_(True)
    assert unfrozen_names(model) == (set() if preset == "fine-tuning" else {weight})
    assert set(kept_names(model)) == {weight, *before}


def test_what_was_added_is_kept_even_if_it_is_frozen() -> None:
    model = unipelt.inject(tiny_bert(), "unipelt-apl")
    model.requires_grad_(False)
    head = {"classifier.weight", "classifier.bias"}
    assert set(kept_names(model)) == own_parameters(model).keys() | head
    assert not unfrozen_names(model)


def test_an_encoder_of_an_encoder_decoder_has_no_head() -> None:
    """It holds one of the two parts of its base, and nothing beside."""
    assert head_names(T5EncoderModel(tiny_config("t5"))) == frozenset()  # type: ignore[arg-type]


def test_a_model_that_is_its_own_base_and_of_no_described_kind_has_no_head() -> None:
    class OwnConfig(PreTrainedConfig):
        model_type = "own-kind"

    class Own(PreTrainedModel):
        config_class = OwnConfig

        def __init__(self, config: OwnConfig) -> None:
            super().__init__(config)
            self.embeddings, self.classifier = nn.Embedding(5, 4), nn.Linear(4, 2)
            self.post_init()

        def get_input_embeddings(self) -> nn.Module:
            return self.embeddings

    assert head_names(Own(OwnConfig())) == frozenset()


def test_the_documentation_has_these_numbers() -> None:
    text = (Path(__file__).parents[2] / "docs" / "submodules.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w-]+)` \|.*\| ([\d,]+)[^|]*\|$", text, re.M))
    assert len(rows) == 13
    for preset, number in rows.items():
        assert int(number.replace(",", "")) == sum(COUNTS[preset][0].values()), preset
    assert text.count(f"deployed {PREFIX:,}; flat {PREFIX:,})") == 1
    assert text.count(f"deployed {3 * PREFIX + PARALLEL:,})") == 1
