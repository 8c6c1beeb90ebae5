"""The configuration in a folder of `save_peft` is the one that PEFT itself writes for the same method."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import refusing, shake, tiny_batch, tiny_bert
from peft_tuners import injected, method_of
from safetensors.torch import load_file
from tiny import tiny_batch as batch_of
from tiny import tiny_model
from transformers import FNetConfig, FNetForSequenceClassification

import unipelt
from unipelt.injection.state import injection_of

peft = pytest.importorskip("peft", reason="PEFT is not installed")

# PEFT asks a model for an attribute that Transformers 5.23 deprecates, and a norm for its features
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type .*[nN]orm"),
]


@pytest.mark.parametrize(
    ("method", "theirs", "fields"),
    [
        (
            "ia3",
            "IA3Config",
            {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        ),
        ("ln_tuning", "LNTuningConfig", {"target_modules": ["input_layernorm", "post_attention_layernorm"]}),
        ({"preset": "prompt", "prompt": {"length": 5}}, "PromptTuningConfig", {"num_virtual_tokens": 5}),
        (
            {"preset": "lora", "lora": {"rank": 4, "alpha": 12.0, "dropout": 0.1, "decomposed": True}},
            "LoraConfig",
            {
                **{"r": 4, "lora_alpha": 12, "lora_dropout": 0.1, "use_dora": True},
                "target_modules": ["q_proj", "v_proj"],
            },
        ),
    ],
    ids=["ia3", "ln_tuning", "prompt", "dora"],
)
def test_a_configuration_is_pefts_own(method: Any, theirs: str, fields: dict[str, Any], tmp_path: Path) -> None:
    unipelt.save_peft(unipelt.inject(tiny_model("llama"), method), tmp_path / "ours")
    config = getattr(peft, theirs)(task_type="CAUSAL_LM", **fields)
    model = peft.get_peft_model(tiny_model("llama"), config)
    model.save_pretrained(tmp_path / "theirs")
    ours, other = (read(tmp_path / name / "adapter_config.json") for name in ("ours", "theirs"))
    assert ours == {name: other[name] for name in ours}


def read(path: Path) -> dict[str, Any]:
    """A configuration, its lists of modules sorted: PEFT writes a set in any order."""
    values = json.loads(path.read_text())
    return {name: sorted(value) if isinstance(value, list) else value for name, value in values.items()}


@pytest.mark.parametrize("method", ["lora", "ia3", "ln_tuning"])
def test_a_model_without_attention_is_refused(method: str, tmp_path: Path) -> None:
    unipelt.save_peft(unipelt.inject(tiny_bert(), method), tmp_path)
    sizes: dict[str, Any] = {"vocab_size": 30, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 20}
    model = FNetForSequenceClassification(FNetConfig(**sizes, max_position_embeddings=20, tpu_short_seq_length=8))
    with refusing(model, "FNet", error=unipelt.InjectionError):
        unipelt.load_peft(model, tmp_path)


def test_layers_come_back_in_their_order(tmp_path: Path) -> None:
    model = unipelt.inject(tiny_bert(num_hidden_layers=9), {"preset": "lora", "layers": [1, 8]})
    shake(model)
    unipelt.save_peft(model, tmp_path)
    back = unipelt.load_peft(tiny_bert(num_hidden_layers=9), tmp_path)
    assert injection_of(back).config.layers == (1, 8)


def test_the_revision_is_that_of_the_loaded_base(tmp_path: Path) -> None:
    model: Any = unipelt.inject(tiny_bert(), "lora")
    model.config._name_or_path, model.config._commit_hash = "owner/base", "abc123"
    unipelt.save_peft(model, tmp_path / "loaded")
    unipelt.save_peft(model, tmp_path / "other", base="owner/other")
    found = [read(tmp_path / name / "adapter_config.json") for name in ("loaded", "other")]
    where = [(config["base_model_name_or_path"], config["revision"]) for config in found]
    assert where == [("owner/base", "abc123"), ("owner/other", None)]


def test_the_first_part_that_cannot_travel_is_named(tmp_path: Path) -> None:
    model = unipelt.inject(tiny_bert(), "unipelt-apl-nogate")
    said = "bert.encoder.layer.0.attention.self.prefix is a prefix, which a PEFT folder of LoRA cannot hold"
    with refusing(model, said):
        unipelt.save_peft(model, tmp_path)


def test_a_wrapped_model_has_one_set_with_pefts_own_name() -> None:
    model = unipelt.inject(tiny_bert(), "lora")
    wrapped = unipelt.to_peft(model, task_type="SEQ_CLS")
    assert isinstance(wrapped, peft.PeftModelForSequenceClassification)
    assert list(wrapped.peft_config) == ["default"]
    assert wrapped.active_adapter == "default"
    assert unipelt.from_peft(wrapped) is model


def test_what_is_no_model_of_pefts_is_refused() -> None:
    for model in (tiny_bert(), unipelt.inject(tiny_bert(), "lora")):
        with pytest.raises(ValueError, match="this BertForSequenceClassification carries no set of unipelt"):
            unipelt.from_peft(model)


def test_a_configuration_checks_and_copies_what_it_is_given() -> None:
    given = ["classifier"]
    config = unipelt.PeftConfig("lora", head=given, modules_to_save=given)
    given.append("pooler")
    assert (config.head, config.modules_to_save) == (["classifier"], ["classifier"])
    assert config.peft_type == "UNIPELT"
    assert inspect.signature(unipelt.PeftConfig).parameters["method"].default == "unipelt-apl"
    with pytest.raises(ValueError, match="task type"):
        unipelt.PeftConfig("lora", task_type="SENTIMENT")


@pytest.mark.parametrize(
    ("asked", "heads", "names"),
    [
        (None, [], None),
        (None, ["bert.pooler.dense", "classifier"], ["bert.pooler.dense", "classifier"]),
        (["classifier"], ["classifier"], ["classifier"]),
        (["pooler", "pooler"], ["bert.pooler.dense", "classifier"], ["pooler", "classifier"]),  # inside a named module
        (["dense"], ["bert.pooler.dense"], ["dense"]),
        (["bert"], ["bert.pooler.dense"], ["bert"]),
        (["pool"], ["bert.pooler.dense"], ["pool", "bert.pooler.dense"]),
    ],
)
def test_heads_are_saved_once(asked: list[str] | None, heads: list[str], names: list[str] | None) -> None:
    from unipelt.bridges.peft_socket.heads import names_to_save

    assert names_to_save(asked, heads) == names


def test_a_set_without_a_head_has_no_copy_of_it() -> None:
    from unipelt.bridges.peft_socket.heads import copies

    model = peft.get_peft_model(tiny_bert(), unipelt.PeftConfig("lora"))
    model.add_adapter("headless", unipelt.PeftConfig({"preset": "lora", "train_head": False}))
    inner = model.get_base_model()
    assert [path for path, _ in copies(inner, "default")] == ["classifier"]
    assert not list(copies(inner, "headless"))


def test_a_wrapper_inside_another_is_not_told_apart() -> None:
    from unipelt.bridges.peft_socket.heads import wrappers

    model = peft.get_peft_model(tiny_bert(), unipelt.PeftConfig("lora", modules_to_save=["pooler", "dense"]))
    paths = [path for path, _ in wrappers(model.get_base_model())]
    assert "bert.pooler" in paths
    assert "bert.encoder.layer.0.output.dense" in paths
    assert not [path for path in paths if path.startswith("bert.pooler.")]


def test_copies_deep_in_a_model_take_the_place_of_their_wrappers() -> None:
    model = peft.get_peft_model(tiny_bert(), unipelt.PeftConfig("lora", modules_to_save=["pooler"]))
    copy = model.get_parameter("base_model.model.bert.pooler.modules_to_save.default.dense.weight")
    bare = model.unload()
    assert [name for name, _ in bare.named_parameters()] == [name for name, _ in tiny_bert().named_parameters()]
    assert bare.bert.pooler.dense.weight is copy


def test_another_set_leaves_the_active_one_frozen() -> None:
    model = peft.get_peft_model(tiny_bert(), unipelt.PeftConfig("lora"))
    model.set_requires_grad("default", requires_grad=False)
    model.add_adapter("other", unipelt.PeftConfig("lora"))
    assert not [name for name, p in model.named_parameters() if p.requires_grad and ".unipelt." in name]


def test_the_type_is_a_member_of_pefts_enumeration() -> None:
    unipelt.register_with_peft()
    member = peft.PeftType("UNIPELT")
    assert (member.name, member.value, str.__str__(member)) == ("UNIPELT",) * 3
    assert peft.PeftType.UNIPELT is peft.PeftType["UNIPELT"] is member
    assert list(peft.PeftType).count(member) == 1


@pytest.mark.parametrize(("there", "known"), [(True, True), (True, False), (False, True)])
def test_reading_folders_enters_the_type_where_peft_is_there_and_known(
    there: bool, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unipelt.bridges import peft as bridge
    from unipelt.bridges import peft_socket

    entered: list[int] = []
    find = importlib.util.find_spec

    def enter() -> None:
        entered.append(1)
        if not known:
            raise ImportError("unipelt does not know PEFT 9")

    monkeypatch.setattr(peft_socket, "register_with_peft", enter)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find(name) if there or name != "peft" else None)
    again = importlib.reload(bridge)
    monkeypatch.undo()
    assert len(entered) == there
    assert again.load_peft is unipelt.load_peft
    importlib.reload(bridge)


def test_pefts_switch_of_training_takes_one_name_or_several() -> None:
    model = peft.get_peft_model(tiny_bert(), unipelt.PeftConfig("lora", task_type="SEQ_CLS"))
    model.add_adapter("other", unipelt.PeftConfig("lora", task_type="SEQ_CLS"))

    def training() -> set[str]:
        found = (name.partition(".unipelt.")[2] for name, p in model.named_parameters() if p.requires_grad)
        return {name.partition(".")[0] for name in found if name}

    assert training() == {"default"}
    model.set_requires_grad("default", requires_grad=False)
    assert training() == set()
    model.set_requires_grad(["default", "other"], requires_grad=True)
    assert training() == {"default", "other"}


def test_fixed_starts_of_factors_never_train() -> None:
    model = peft.get_peft_model(tiny_bert(), unipelt.PeftConfig({"preset": "lora", "lora": {"start": "pissa"}}))
    model.set_requires_grad("default", requires_grad=True)
    flags = {name.rpartition(".")[2]: p.requires_grad for name, p in model.named_parameters() if ".unipelt." in name}
    assert flags == {"A": True, "B": True, "A0": False, "B0": False}


def test_a_model_is_wrapped_again_without_what_the_first_wrapper_left() -> None:
    model = unipelt.inject(tiny_bert(), "lora").eval()
    shake(model, std=0.5)
    want = model(**tiny_batch()).logits
    wrapped = unipelt.to_peft(model)
    wrapped.base_model.disable_adapter_layers()
    assert not torch.equal(wrapped(**tiny_batch()).logits, want)
    back = unipelt.from_peft(wrapped)
    assert torch.equal(back(**tiny_batch()).logits, want)
    assert torch.equal(unipelt.to_peft(back)(**tiny_batch()).logits, want)


def test_a_set_follows_its_host_to_another_device() -> None:
    """PEFT calls this after it has loaded a set. The device meta stands for another one."""
    from unipelt.submodules.room import rooms

    model = peft.get_peft_model(tiny_bert(), unipelt.PeftConfig("lora")).get_base_model()
    found: list[Any] = [room for _, room in rooms(model)]
    first, second = found[:2]
    for room in (first, second):
        room._move_adapter_to_device_of_base_layer("default")
        room._move_adapter_to_device_of_base_layer("no such set", "meta")
        assert {parameter.device.type for parameter in room.parameters()} == {"cpu"}
    first._move_adapter_to_device_of_base_layer("default", "meta")
    second._device = torch.device("meta")
    second._move_adapter_to_device_of_base_layer("default")
    for room in (first, second):
        assert {parameter.device.type for parameter in room.parameters()} == {"meta"}
        room._move_adapter_to_device_of_base_layer("default", "cpu")  # what has no numbers yet stays
        assert {parameter.device.type for parameter in room.parameters()} == {"meta"}


def test_rows_of_one_set_stand_together() -> None:
    from unipelt.bridges.peft_socket.rows import row_by_row

    model = peft.get_peft_model(tiny_bert(), unipelt.PeftConfig("lora")).eval()
    model.add_adapter("other", unipelt.PeftConfig("lora"))
    inner = model.get_base_model()
    for names, order in (
        (["other", "default", "other"], [0, 2, 1]),
        (["__base__", "other", "default", "__base__", "default", "other"], [0, 3, 1, 5, 2, 4]),
        (["other", "other", "default"], None),
    ):
        with row_by_row(inner, names, {}) as found:
            assert (None if found is None else found.tolist()) == order


def test_rows_that_cannot_be_in_one_batch_are_refused() -> None:
    model = peft.get_peft_model(tiny_bert(), unipelt.PeftConfig("prompt")).eval()
    model.add_adapter("lora", unipelt.PeftConfig("lora"))
    for names, said in (
        (["lora", "default", "lora"], "the prompt of 'default' makes its texts longer, and a batch has texts of one"),
        (["lora", "lora", "zzz"], "there is no set 'zzz'; there are default, lora$"),
        (["lora", "lora", "loar"], "there is no set 'loar'; did you mean 'lora'"),
    ):
        with pytest.raises(ValueError, match=said):
            model(**tiny_batch(), adapter_names=names)


def test_rows_are_sorted_and_put_back_inside_containers() -> None:
    from transformers.modeling_outputs import BaseModelOutput

    from unipelt.bridges.peft_socket.rows import put_back, sort_given

    order, rows, one = torch.tensor([0, 2, 1]), torch.arange(3), torch.tensor(7)
    given = ([rows, (rows, None)], BaseModelOutput(rows, (rows,)), rows[:2], one, "word")
    for change in (sort_given, put_back):
        found = change(given, 3, order)
        assert [type(value) for value in found] == [type(value) for value in given]
        (first, (second, nothing)), output, two, single, word = found
        inside = (first, second, output.last_hidden_state, output.hidden_states[0])
        assert [value.tolist() for value in inside] == [[0, 2, 1]] * 4
        assert (nothing, two.tolist(), single.item(), word) == (None, [0, 1], 7, "word")
        assert type(output.hidden_states) is tuple


def test_names_of_one_batch_say_nothing_of_the_next() -> None:
    model = peft.get_peft_model(tiny_model("llama"), unipelt.PeftConfig("lora", task_type="CAUSAL_LM")).eval()
    model.add_adapter("other", unipelt.PeftConfig("lora", task_type="CAUSAL_LM"))
    batch = batch_of("llama", lengths=(7, 7, 7), tokens=7)
    twice = {name: torch.cat([value, value.flip(0)]) for name, value in batch.items()}
    options: dict[str, Any] = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 1}
    want = model.generate(**twice, **options)
    model(**batch, adapter_names=["other", "default", "other"])
    assert torch.equal(model.generate(**twice, **options), want)


# A tuner of PEFT's


def test_a_folder_of_a_tuner_has_pefts_names(tmp_path: Path) -> None:
    model = injected("OFT", "bert")
    unipelt.save_peft(model, tmp_path / "ours")
    written = read(tmp_path / "ours" / "adapter_config.json")
    same = {name: written[name] for name in ("task_type", "target_modules", "r", "oft_block_size")}
    theirs = peft.get_peft_model(tiny_bert(), peft.OFTConfig(**same))
    theirs.save_pretrained(tmp_path / "theirs")
    ours, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: t.shape for name, t in other.items()}
    there = peft.PeftModel.from_pretrained(tiny_bert(), tmp_path / "ours").eval()
    torch.testing.assert_close(there(**tiny_batch()).logits, model(**tiny_batch()).logits, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("gpt2", {}, "is at a part of a projection, or at a Conv1D, where PEFT's OFT computes other numbers"),
        ("bart", {}, "has numbers of its own for each stack (model.decoder.layers, model.encoder.layers), and PEFT"),
        ("bert", {"layers": [0, 2]}, "PEFT would add its layer to bert.encoder.layer.1."),
    ],
)
def test_a_tuner_that_peft_would_compute_otherwise_is_refused(
    family: str, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    model = unipelt.inject(tiny_model(family), {**method_of("OFT"), **changes})
    with refusing(model, said):
        unipelt.save_peft(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_inputs_without_names_are_put_in_order_too() -> None:
    model = peft.get_peft_model(tiny_bert(), unipelt.PeftConfig("lora")).eval()
    model.add_adapter("other", unipelt.PeftConfig("lora"))
    model.set_adapter("other")
    shake(model, std=0.5)
    batch, names = tiny_batch(), ["other", "default", "other"]
    want = model(**batch, adapter_names=names).logits
    assert torch.equal(model(batch["input_ids"], batch["attention_mask"], adapter_names=names).logits, want)
    model.set_adapter("other")
    torch.testing.assert_close(want[::2], model(**batch).logits[::2], atol=1e-5, rtol=1e-5)
