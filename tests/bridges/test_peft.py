"""LoRA into PEFT's folders and out of them, with PEFT itself at the other end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.malformed import spoilt_json, spoilt_weights
from helpers import bits, refused, shake, tiny_bert
from helpers import tiny_batch as bert_batch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, tiny_batch, tiny_model
from torch import Tensor
from transformers import BertForSequenceClassification, BertModel, GPT2Config, GPT2LMHeadModel, PreTrainedModel

import unipelt
from unipelt.cli import main
from unipelt.config.parts import PROJECTIONS
from unipelt.injection.state import injection_of
from unipelt.submodules.entry import Entry
from unipelt.submodules.room import placed_terms

peft = pytest.importorskip("peft", reason="PEFT is not installed")

# PEFT 0.21 asks a model for an attribute that Transformers 5.23 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

QUICK = ("roberta", "distilbert", "albert", "deberta", "modernbert", "bart", "t5", "gpt2", "bloom", "llama", "phi3")
"""Of all that the slow test takes: heads in several modules, shared layers, every way to fuse, two stacks."""


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(**batch).logits


def with_lora(model: PreTrainedModel, **changes: Any) -> PreTrainedModel:
    unipelt.inject(model, {"preset": "lora", **changes})
    shake(model)
    return model.eval()


def in_peft(base: PreTrainedModel, folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(base, folder)


def with_peft(base: PreTrainedModel, folder: Path, **fields: Any) -> Any:
    """A model of PEFT's own, every trainable weight moved from its start, saved in `folder`."""
    options: dict[str, Any] = {"task_type": "SEQ_CLS", "r": 4, "lora_alpha": 6, "target_modules": ["query", "value"]}
    model = peft.get_peft_model(base, peft.LoraConfig(**{**options, **fields}))
    shake(model)
    model.save_pretrained(folder)
    return model.eval()


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


# There and back


def check_family(family: str, folder: Path, **changes: Any) -> None:
    batch = tiny_batch(family)
    model = with_lora(tiny_model(family), **changes)
    expected = logits(model, batch)
    unipelt.save_peft(model, folder)
    theirs = in_peft(tiny_model(family), folder)
    torch.testing.assert_close(logits(theirs, batch), expected, rtol=0, atol=1e-6)
    print(f"{family}: a logit differs by at most {(logits(theirs, batch) - expected).abs().max():.1e}")
    assert (logits(tiny_model(family), batch) - expected).abs().max() > 1e-3  # LoRA is there to be seen
    for source in (folder, folder / "theirs"):
        if source != folder:
            theirs.save_pretrained(source)
        back = unipelt.load_peft(tiny_model(family), source)
        assert injection_of(back).config == injection_of(model).config
        ours, again = bits(model), bits(back)
        assert ours.keys() == again.keys()
        assert all(torch.equal(ours[name], again[name]) for name in ours)


@pytest.mark.parametrize("family", QUICK)
def test_peft_computes_the_same_and_gives_it_back_bit_for_bit(family: str, tmp_path: Path) -> None:
    check_family(family, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in QUICK])
def test_peft_computes_the_same_in_every_other_family(family: str, tmp_path: Path) -> None:
    check_family(family, tmp_path)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("bert", {"layers": [0, 2]}),
        ("gpt2", {"layers": [1], "lora": {"rank": 3, "alpha": 6.0}}),
        ("bart", {"decoder": False, "cross": False}),
        ("bart", {"encoder": False, "layers": [1, 2]}),
        ("t5", {"encoder": False, "decoder": False}),
        ("llama", {"lora": {"rank": 5, "alpha": 15.0}}),
    ],
)
def test_some_layers_and_some_stacks(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    check_family(family, tmp_path, **changes)


@pytest.mark.parametrize("head", ["TokenClassification", "QuestionAnswering", "MaskedLM", "Model"])
def test_other_heads(head: str, tmp_path: Path) -> None:
    batch = tiny_batch("bert")
    model = with_lora(tiny_model("bert", head))
    unipelt.save_peft(model, tmp_path)
    theirs = in_peft(tiny_model("bert", head), tmp_path).eval()
    with torch.no_grad():
        for ours, other in zip(model(**batch).values(), theirs(**batch).values(), strict=True):
            torch.testing.assert_close(other, ours, rtol=0, atol=1e-6)
    back = unipelt.load_peft(tiny_model("bert", head), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(bits(model).values(), bits(back).values(), strict=True))


def test_a_part_that_the_base_did_not_hold_travels_with_the_head(tmp_path: Path) -> None:
    tiny_bert().bert.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    kept = {name: p for name, p in tiny_bert().bert.state_dict().items() if not name.startswith("pooler.")}
    save_file(kept, tmp_path / "base" / "model.safetensors", {"format": "pt"})

    def load() -> Any:
        return BertForSequenceClassification.from_pretrained(tmp_path / "base")

    model = with_lora(load())
    unipelt.save_peft(model, tmp_path / "lora", base="name/of-base")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["bert.pooler", "classifier"]
    assert config["base_model_name_or_path"] == "name/of-base"
    expected = logits(model, bert_batch())
    torch.testing.assert_close(logits(in_peft(load(), tmp_path / "lora"), bert_batch()), expected, rtol=0, atol=1e-6)
    back = unipelt.load_peft(load(), tmp_path / "lora")
    assert torch.equal(logits(back, bert_batch()), expected)
    assert back.get_parameter("bert.pooler.dense.weight").requires_grad


def test_what_was_loaded_is_saved_loaded_and_removed_as_anything_else(tmp_path: Path) -> None:
    expected = logits(with_peft(tiny_bert(), tmp_path / "peft"), bert_batch())
    base = tiny_bert(seed=0)
    before = bits(base)
    unipelt.save(unipelt.load_peft(base, tmp_path / "peft"), tmp_path / "ours")
    again = unipelt.load(tiny_bert(), tmp_path / "ours")
    torch.testing.assert_close(logits(again, bert_batch()), expected, rtol=0, atol=1e-6)
    assert all(torch.equal(before[name], p) for name, p in unipelt.remove(base).named_parameters())


def test_loading_lets_the_same_train_as_injecting(tmp_path: Path) -> None:
    model = with_lora(tiny_bert())
    unipelt.save_peft(model, tmp_path)
    back = unipelt.load_peft(tiny_bert(), tmp_path)
    assert {n for n, p in back.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def test_the_folder_is_what_vllm_reads(tmp_path: Path) -> None:
    """Its loader wants whole numbers, no `modules_to_save`, no bias, and modules by the last part of their names."""
    unipelt.save_peft(with_lora(tiny_model("llama"), lora={"rank": 4, "alpha": 6.0}), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 6)
    assert type(config["lora_alpha"]) is int
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert config["modules_to_save"] is None
    assert (config["bias"], config["task_type"], config["peft_type"]) == ("none", "CAUSAL_LM", "LORA")
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert names == {
        f"base_model.model.model.layers.{layer}.self_attn.{projection}_proj.lora_{half}.weight"
        for layer in range(3)
        for projection in "qv"
        for half in "AB"
    }


def test_an_alpha_that_is_no_whole_number_goes_into_b(tmp_path: Path) -> None:
    model = with_lora(tiny_bert(), lora={"rank": 4, "alpha": 6.5})
    unipelt.save_peft(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == 4
    expected = logits(model, bert_batch())
    torch.testing.assert_close(logits(in_peft(tiny_bert(), tmp_path), bert_batch()), expected, rtol=0, atol=1e-6)


def test_a_projection_of_two_beside_one_of_one_keeps_each_its_scale(tmp_path: Path) -> None:
    """GPT-2's cross-attention: one term on `q_attn`, one on `c_attn`, beside two on the self-attention's."""
    sizes: dict[str, Any] = {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}

    def build() -> Any:
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(**sizes, add_cross_attention=True)).eval()

    batch = {**bert_batch(), "encoder_hidden_states": torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(0))}
    model = with_lora(build())
    unipelt.save_peft(model, tmp_path)
    expected = logits(model, batch)
    torch.testing.assert_close(logits(in_peft(build(), tmp_path), batch), expected, rtol=0, atol=1e-6)
    back = unipelt.load_peft(build(), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(bits(model).values(), bits(back).values(), strict=True))


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_a_start_travels_as_twice_the_rank(family: str, tmp_path: Path) -> None:
    batch = tiny_batch(family)
    lora = {"rank": 4, "alpha": 6.0, "start": "pissa"}
    model = with_lora(tiny_model(family), lora=lora)
    expected = logits(model, batch)
    unipelt.save_peft(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == (16 if family == "gpt2" else 8)
    assert config["init_lora_weights"] is True
    torch.testing.assert_close(logits(in_peft(tiny_model(family), tmp_path), batch), expected, rtol=0, atol=1e-5)
    back = unipelt.load_peft(tiny_model(family), tmp_path)
    assert injection_of(back).config.lora == unipelt.LoRAConfig(rank=8, alpha=12.0, gate=False)
    torch.testing.assert_close(logits(back, batch), expected, rtol=0, atol=1e-5)
    unipelt.fold(model)
    unipelt.save_peft(model, tmp_path / "folded")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "folded" / name).read_bytes()


def test_a_start_is_that_of_peft() -> None:
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["query", "value"], init_lora_weights="pissa")
    theirs = peft.get_peft_model(tiny_bert(), config)
    model: Any = unipelt.inject(tiny_bert(), {"preset": "lora", "lora": {"rank": 4, "alpha": 6.0, "start": "pissa"}})
    found = list(placed_terms(model))
    assert len(found) == 6
    for placed in found:
        other = theirs.base_model.model.get_submodule(placed.path)
        first = other.lora_B["default"].weight @ other.lora_A["default"].weight
        torch.testing.assert_close(placed.term.B0 @ placed.term.A0, first, rtol=0, atol=1e-5)
        torch.testing.assert_close(placed.term.A0.norm(dim=1), other.lora_A["default"].weight.norm(dim=1))


# Folded


def gates(model: PreTrainedModel) -> list[tuple[str, int, Tensor, Tensor]]:
    """Every gate: its name, the place of its entry in the model, weight and bias as views into the entry."""
    found = []
    for place, entry in enumerate(module for module in model.modules() if isinstance(module, Entry)):
        rows = {part.name: part.of(getattr(entry, part.parameter).detach()) for part in entry.parts if part.gate}
        found += [(n, place, rows[f"gate.{n}.weight"], rows[f"gate.{n}.bias"]) for n in entry.gates.names]
    return found


def constant_gates(model: PreTrainedModel) -> None:
    """Every gate the same for all texts, each another: 0.3, 0.35, ..."""
    rows: dict[int, int] = {}
    for _, place, weight, bias in gates(model):
        row = rows[place] = rows.get(place, -1) + 1
        weight.zero_()
        bias.fill_(torch.logit(torch.tensor(0.3 + 0.05 * place + 0.02 * row)))


@pytest.mark.parametrize("gating", ["replace", "multiply"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "bart", "llama"])
def test_a_folded_model_of_gated_lora_travels(family: str, gating: str, tmp_path: Path) -> None:
    batch = tiny_batch(family)
    model = with_lora(tiny_model(family), lora={"gate": True, "gating": gating})
    constant_gates(model)
    expected = logits(model, batch)
    unipelt.fold(model, [batch])
    unipelt.save_peft(model, tmp_path)
    torch.testing.assert_close(logits(in_peft(tiny_model(family), tmp_path), batch), expected, rtol=0, atol=1e-5)
    back = unipelt.load_peft(tiny_model(family), tmp_path)
    torch.testing.assert_close(logits(back, batch), expected, rtol=0, atol=1e-5)


def test_a_folded_model_loaded_again_travels_too(tmp_path: Path) -> None:
    model = with_lora(tiny_bert(), lora={"gate": True})
    constant_gates(model)
    unipelt.fold(model, [bert_batch()])
    unipelt.save(model, tmp_path / "ours")
    unipelt.save_peft(unipelt.load(tiny_bert(), tmp_path / "ours"), tmp_path / "peft")
    theirs = in_peft(tiny_bert(), tmp_path / "peft")
    torch.testing.assert_close(logits(theirs, bert_batch()), logits(model, bert_batch()), rtol=0, atol=1e-6)


def test_closed_gates_leave_nothing_behind(tmp_path: Path) -> None:
    """Adapters and values' terms behind closed gates are dropped by folding, and what is left travels."""
    model = unipelt.inject(tiny_bert(), "unipelt-al")
    shake(model)
    constant_gates(model)
    for name, _, _, bias in gates(model):
        if name in ("adapter", "lora_value"):
            bias.fill_(-20.0)
    unipelt.fold(model, [bert_batch()])
    unipelt.save_peft(model, tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert any(".query.lora_A" in name for name in names)
    assert not any(".value." in name for name in names)
    theirs = in_peft(tiny_bert(), tmp_path)
    torch.testing.assert_close(logits(theirs, bert_batch()), logits(model, bert_batch()), rtol=0, atol=1e-6)


def test_folding_an_ungated_model_changes_nothing_of_what_travels(tmp_path: Path) -> None:
    model = with_lora(tiny_bert())
    unipelt.save_peft(model, tmp_path / "before")
    unipelt.fold(model)
    unipelt.save_peft(model, tmp_path / "after")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()


# What cannot go


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ("unipelt-al-nogate", ("adapter", "preset 'lora'", "unipelt.save")),
        ("unipelt-pl-nogate", ("prefix", "preset 'lora'")),
        ({"preset": "lora", "ia3": {"gate": False}}, ("key.ia3_key is ia3,", "preset 'lora'")),
        ({"preset": "lora", "lora": {"gate": True}}, ("query.lora_query", "unipelt.fold")),
        ("adapter", ("no LoRA",)),
        ("fine-tuning", ("no LoRA",)),
        ({"preset": "lora", "bitfit": True}, ("parameters of its base", ".bias")),
        ({"preset": "lora", "train_base": True}, ("parameters of its base",)),
    ],
)
def test_what_a_folder_cannot_hold_is_named(config: Any, parts: tuple[str, ...], tmp_path: Path) -> None:
    model = unipelt.inject(tiny_bert(), config)
    with pytest.raises(unipelt.CheckpointError) as caught:
        unipelt.save_peft(model, tmp_path / "peft")
    assert all(part in str(caught.value) for part in parts), caught.value
    assert not (tmp_path / "peft").exists()


def test_a_gate_that_varies_is_named_after_folding(tmp_path: Path) -> None:
    model = with_lora(tiny_bert(), lora={"gate": True})
    unipelt.fold(model, [bert_batch()], tolerance=0)
    with pytest.raises(unipelt.CheckpointError, match="tolerance"):
        unipelt.save_peft(model, tmp_path / "peft")


def test_a_model_of_closed_gates_has_nothing_to_send(tmp_path: Path) -> None:
    model = with_lora(tiny_bert(), lora={"gate": True})
    for _, _, _, bias in gates(model):
        bias.fill_(-20.0)
    unipelt.fold(model, [bert_batch()], tolerance=1.0)
    with pytest.raises(unipelt.CheckpointError, match="none is left"):
        unipelt.save_peft(model, tmp_path / "peft")


def test_saving_wants_an_injected_model_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="carries no submodules"):
        unipelt.save_peft(tiny_bert(), tmp_path / "peft")
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="is a file"):
        unipelt.save_peft(with_lora(tiny_bert()), tmp_path / "file")


def test_a_save_that_breaks_off_leaves_no_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New weights beside an old configuration would load, and be scaled otherwise."""
    unipelt.save_peft(with_lora(tiny_bert()), tmp_path)
    import unipelt.bridges.peft.write as module

    def broken(path: Path, content: bytes) -> None:
        if path.suffix == ".json":
            raise OSError(28, "No space left on device", str(path))
        path.write_bytes(content)

    monkeypatch.setattr(module, "write_whole", broken)
    with pytest.raises(OSError, match="No space"):
        unipelt.save_peft(with_lora(tiny_bert(), lora={"alpha": 3.0}), tmp_path)
    with pytest.raises(FileNotFoundError):
        unipelt.load_peft(tiny_bert(), tmp_path)


def test_the_command_exports_a_checkpoint_and_the_model_of_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_bert().save_pretrained(tmp_path / "base")
    model = with_lora(BertForSequenceClassification.from_pretrained(tmp_path / "base"))
    unipelt.save(model, tmp_path / "run" / "model")
    for source in ("run", "run/model"):
        out = tmp_path / "out" / source
        assert main(["export", str(tmp_path / source), "--out", str(out), "--base", "somebody/bert"]) == 0
        assert str(out) in capsys.readouterr().out
        theirs = in_peft(tiny_bert(), out)
        assert theirs.peft_config["default"].base_model_name_or_path == "somebody/bert"
        assert torch.equal(logits(theirs, bert_batch()), logits(model, bert_batch()))
    unipelt.save(unipelt.inject(unipelt.remove(model), "unipelt-ap"), tmp_path / "gated")
    assert main(["export", str(tmp_path / "gated"), "--out", str(tmp_path / "no")]) == 2
    assert "no LoRA" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "nothing"), "--out", str(tmp_path / "no")]) == 2
    assert "not a checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("place", "part", "message"),
    [
        ("bert", torch.nn.Linear(2, 2), "bert.other_classifier"),  # frozen, and PEFT would train it
        ("", torch.nn.Linear(2, 2), None),
        ("", torch.nn.Parameter(torch.ones(2)), "'other_classifier' is in no module"),
    ],
)
def test_heads_that_peft_would_mistake(place: str, part: Any, message: str | None, tmp_path: Path) -> None:
    def build() -> Any:
        model = tiny_bert()
        model.get_submodule(place).other_classifier = part
        return model

    model = with_lora(build())
    if message is None:
        unipelt.save_peft(model, tmp_path)
        assert torch.equal(logits(in_peft(build(), tmp_path), bert_batch()), logits(model, bert_batch()))
        return
    with pytest.raises(unipelt.CheckpointError, match=message):
        unipelt.save_peft(model, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["base", "float32"])
@pytest.mark.parametrize("gate", [False, True])
def test_the_types_of_a_model_stay(gate: bool, dtype: str, tmp_path: Path) -> None:
    model = with_lora(tiny_bert().bfloat16(), lora={"gate": gate}, dtype=dtype)
    constant_gates(model)
    unipelt.fold(model, [bert_batch()])
    unipelt.save_peft(model, tmp_path)
    for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items():
        assert tensor.dtype == (torch.float32 if dtype == "float32" else torch.bfloat16), name
    back = unipelt.load_peft(tiny_bert().bfloat16(), tmp_path)
    read, kept = (logits(each, bert_batch()).float() for each in (back, model))
    torch.testing.assert_close(read, kept, rtol=0, atol=2e-2)


# What PEFT trained


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_rslora": True},
        {"lora_dropout": 0.1},
        {"init_lora_weights": "gaussian"},
        {"layers_to_transform": [1], "layers_pattern": "layer"},
        {"rank_pattern": {"query": 2}},
        {"alpha_pattern": {"layer.1.attention.self.value": 9}},
        {"rank_pattern": {"^bert.encoder.layer.0.attention.self.query": 7}, "alpha_pattern": {"query": 1}},
        {"rank_pattern": {"value": 6}, "use_rslora": True},
        {"modules_to_save": ["pooler"]},
        {"target_modules": r".*layer\.[02]\.attention\.self\.(query|value)"},
        {"target_modules": ["query"]},
        {"target_modules": ["query", "key", "value"]},
        {"target_modules": r".*encoder.*\.(query|key|value|dense)"},
        {"target_modules": r".*layer\.1\.(intermediate|output)\.dense", "use_rslora": True},
    ],
)
def test_loras_of_pefts_own(fields: dict[str, Any], tmp_path: Path) -> None:
    expected = logits(with_peft(tiny_bert(), tmp_path, **fields), bert_batch())
    model = unipelt.load_peft(tiny_bert(), tmp_path)
    torch.testing.assert_close(logits(model, bert_batch()), expected, rtol=0, atol=1e-6)


def test_ranks_that_fill_up_can_train(tmp_path: Path) -> None:
    with_peft(tiny_bert(), tmp_path, rank_pattern={"query": 2})
    model = unipelt.load_peft(tiny_bert(), tmp_path)
    model(**bert_batch(), labels=torch.tensor([0, 1, 0])).loss.backward()
    term: Any = model.get_submodule("bert.encoder.layer.0.unipelt.default.lora_query")
    assert term.A.shape[0] == 4
    assert term.B.grad[:, 2:].abs().min() > 0


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"bias": "lora_only"}, ("bias", "lora_only")),
        ({"init_lora_weights": "pissa"}, ("init_lora_weights", "pissa")),
        ({"init_lora_weights": "olora"}, ("init_lora_weights", "olora")),
        ({"target_modules": "all-linear"}, ("pooler.dense", "projections of its layers alone")),
        ({"target_modules": r".*(layer\.0.*query|layer\.1.*value)"}, ("stands out",)),
        ({"target_modules": ["query", "value", "word_embeddings"]}, ("embedding",)),
        ({"rank_pattern": {".*query": 2}}, ("rank_pattern", ".*query")),
    ],
)
def test_what_is_not_computed_here_is_refused_by_name(
    fields: dict[str, Any], parts: tuple[str, ...], tmp_path: Path
) -> None:
    with_peft(tiny_bert(), tmp_path, **fields)
    refused(unipelt.load_peft, tmp_path, *parts)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
@pytest.mark.parametrize("targets", [["c_attn"], ["c_attn", "c_fc"], r".*h\.1\.(attn|mlp)\.c_proj"])
def test_a_lora_on_all_of_a_fused_projection_and_beside_it(targets: Any, tmp_path: Path) -> None:
    theirs = with_peft(tiny_model("gpt2"), tmp_path, task_type="CAUSAL_LM", target_modules=targets)
    batch = tiny_batch("gpt2")
    model = unipelt.load_peft(tiny_model("gpt2"), tmp_path)
    torch.testing.assert_close(logits(model, batch), logits(theirs, batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "bart"])
def test_updates_of_every_projection_travel(family: str, tmp_path: Path) -> None:
    every = {"rank": 3, "places": list(PROJECTIONS), "gate": False}
    model = unipelt.inject(tiny_model(family), {"preset": "lora", "lora": every})
    shake(model)
    unipelt.save_peft(model, tmp_path)
    batch = tiny_batch(family)
    theirs = in_peft(tiny_model(family), tmp_path)
    torch.testing.assert_close(logits(theirs, batch), logits(model, batch), rtol=0, atol=1e-5)
    back = unipelt.load_peft(tiny_model(family), tmp_path)
    torch.testing.assert_close(logits(back, batch), logits(model, batch), rtol=0, atol=1e-5)


def test_a_fused_lora_of_all_ranks_is_split(tmp_path: Path) -> None:
    """As another program may write it: every rank serves queries and values, none the keys."""
    unipelt.save_peft(with_lora(tiny_model("gpt2")), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: 0.1 * torch.randn(tensor.shape, generator=generator) if ".lora_A" in name else tensor
        for name, tensor in load_file(path).items()
    }
    for name, tensor in tensors.items():
        if ".lora_B" in name:
            tensor.normal_(generator=generator)[32:64] = 0.0
    save_file(tensors, path)
    expected = logits(in_peft(tiny_model("gpt2"), tmp_path), tiny_batch("gpt2"))
    model = unipelt.load_peft(tiny_model("gpt2"), tmp_path)
    torch.testing.assert_close(logits(model, tiny_batch("gpt2")), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"peft_type": "ADALORA"}, ("peft_type", "ADALORA", "IA3, LN_TUNING, LORA, PROMPT_TUNING")),
        ({"peft_type": "IA3"}, ("which is no plain (IA)3",)),
        ({"peft_type": ["LORA"]}, ("peft_type",)),
        ({"r": 0}, ("r must be",)),
        ({"r": "8"}, ("r must be",)),
        ({"r": 5}, ("lora_A", "(4, 32)", "(5, 32)")),
        ({"lora_alpha": -1}, ("lora_alpha must be",)),
        ({"lora_alpha": True}, ("lora_alpha must be",)),
        ({"lora_alpha": 1e300}, ("lora_alpha must be",)),
        ({"lora_alpha": 10**400}, ("lora_alpha must be",)),
        ({"use_rslora": "yes"}, ("use_rslora",)),
        ({"use_dora": "yes"}, ("use_dora",)),
        ({"use_dora": True}, ("lora_magnitude_vector, and not the other",)),
        ({"alpha_pattern": [1]}, ("alpha_pattern",)),
        ({"alpha_pattern": {"query": "a"}}, ("alpha_pattern", "query")),
        ({"init_lora_weights": ["pissa"]}, ("init_lora_weights",)),
        ({"lora_bias": True}, ("lora_bias",)),
        ({"something_new": {"a": 1}}, ("something_new",)),
    ],
)
def test_a_broken_configuration_is_refused(fields: dict[str, Any], parts: tuple[str, ...], tmp_path: Path) -> None:
    with_peft(tiny_bert(), tmp_path)
    edit(tmp_path, **fields)
    refused(unipelt.load_peft, tmp_path, *parts)


def _renamed(tensors: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {name.replace(old, new): tensor for name, tensor in tensors.items()}


def _less(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if part not in name}


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda t: _renamed(t, "base_model.model.", ""), ("base_model.model.",)),
        (lambda t: _renamed(t, "layer.2.", "layer.7."), ("layer.7",)),
        (lambda t: _less(t, "layer.0.attention.self.query.lora_A"), ("lora_A", "not the other")),
        (lambda t: _less(t, "lora_"), ("no lora_A",)),
        (lambda t: _renamed(t, "classifier.", "score."), ("score",)),
        (lambda t: {n: x.int() if "lora_B" in n else x for n, x in t.items()}, ("int32",)),
        (lambda t: {n: x[:, :3].clone() if "lora_A" in n else x for n, x in t.items()}, ("lora_A",)),
        (lambda t: {n: x[:1].clone() if "classifier.weight" in n else x for n, x in t.items()}, ("classifier",)),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: Any, parts: tuple[str, ...], tmp_path: Path) -> None:
    with_peft(tiny_bert(), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
    refused(unipelt.load_peft, tmp_path, *parts)


def test_pickles_are_not_read(tmp_path: Path) -> None:
    with_peft(tiny_bert(), tmp_path).save_pretrained(tmp_path / "bin", safe_serialization=False)
    refused(unipelt.load_peft, tmp_path / "bin", "adapter_model.bin", "pickle", "safe_serialization")


def test_files_that_are_no_folder_of_pefts(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        unipelt.load_peft(tiny_bert(), tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors"):
        unipelt.load_peft(tiny_bert(), tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\xff" * 20)
    refused(unipelt.load_peft, tmp_path, "adapter_config.json", "JSON")
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(unipelt.load_peft, tmp_path, "safetensors")


def test_only_a_bare_model_takes_a_folder(tmp_path: Path) -> None:
    with_peft(tiny_bert(), tmp_path)
    with pytest.raises(unipelt.InjectionError, match=r"unipelt\.remove"):
        unipelt.load_peft(unipelt.inject(tiny_bert(), "lora"), tmp_path)
    with pytest.raises(unipelt.InjectionError, match="PreTrainedModel"):
        unipelt.load_peft(torch.nn.Linear(2, 2), tmp_path)  # type: ignore[arg-type]


def test_a_head_that_is_not_there_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    base = BertModel(tiny_bert().config).eval()
    with_peft(base, tmp_path, task_type="FEATURE_EXTRACTION")
    path = tmp_path / "adapter_model.safetensors"
    save_file(_renamed(load_file(path), "base_model.model.", "base_model.model.bert."), path)
    from transformers.utils import logging

    logging.enable_propagation()
    try:
        model = unipelt.load_peft(tiny_bert(), tmp_path)
    finally:
        logging.disable_propagation()
    assert "holds no head (classifier.bias, classifier.weight)" in caplog.text
    assert torch.equal(model.get_parameter("classifier.weight"), tiny_bert().get_parameter("classifier.weight"))


def test_malformed_files_are_refused(tmp_path: Path) -> None:
    unipelt.save_peft(with_lora(tiny_bert()), tmp_path)
    for name, spoil in (("adapter_config.json", spoilt_json), ("adapter_model.safetensors", spoilt_weights)):
        good = (tmp_path / name).read_bytes()
        for content in spoil(good).values():
            (tmp_path / name).write_bytes(content)
            refused(unipelt.load_peft, tmp_path)
        (tmp_path / name).write_bytes(good)
    unipelt.load_peft(tiny_bert(), tmp_path)
