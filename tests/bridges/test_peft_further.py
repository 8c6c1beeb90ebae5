"""DoRA, (IA)3 and LayerNorm tuning into PEFT's folders and out of them, with PEFT itself at the other end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bridges.test_peft import edit, gates, in_peft, logits
from helpers import bits, refused, shake, tiny_bert
from helpers import tiny_batch as bert_batch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, tiny_batch, tiny_model
from torch import Tensor

import unipelt
from unipelt.config.parts import PROJECTIONS
from unipelt.injection.state import injection_of

peft = pytest.importorskip("peft", reason="PEFT is not installed")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type .*[nN]orm"),  # PEFT asks a norm for its features
]

METHODS: dict[str, dict[str, Any]] = {
    "ia3": {"preset": "ia3"},
    "dora": {"preset": "lora", "lora": {"decomposed": True, "rank": 3}},
    "ln_tuning": {"preset": "ln_tuning"},
}
QUICK = ("bert", "gpt2", "llama", "t5", "bart", "gpt_neox")
"""Linear and Conv1D, modules for all three and for each, shared heads of keys, two stacks."""


def near(got: Tensor, want: Tensor, within: float = 1e-6) -> float:
    """The largest difference, which must be rounding."""
    difference = (got - want).abs().max().item()
    assert difference <= within * max(1.0, want.abs().max().item())
    return difference


def check(family: str, config: dict[str, Any], folder: Path, within: float = 1e-6) -> None:
    """There, and back from what either wrote."""
    batch = tiny_batch(family)
    model = unipelt.inject(tiny_model(family), config)
    shake(model)
    want = logits(model, batch)
    unipelt.save_peft(model, folder)
    theirs = in_peft(tiny_model(family), folder)
    there = near(logits(theirs, batch), want, within)
    assert (logits(tiny_model(family), batch) - want).abs().max() > 1e-3
    theirs.save_pretrained(folder / "theirs")
    for source in (folder, folder / "theirs"):
        again = unipelt.load_peft(tiny_model(family), source)
        assert injection_of(again).config == injection_of(model).config
        back = near(logits(again, batch), want, within)
        ours, other = bits(model), bits(again)
        assert ours.keys() == other.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-6 if name.endswith("offset") else 0)
    print(f"{family}: a logit of {want.abs().max():.2g} differs by at most {there:.1e} there and {back:.1e} back")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", QUICK)
def test_peft_computes_the_same_and_gives_it_back(family: str, method: str, tmp_path: Path) -> None:
    check(family, METHODS[method], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in QUICK])
def test_peft_computes_the_same_in_every_other_family(family: str, method: str, tmp_path: Path) -> None:
    check(family, METHODS[method], tmp_path, within=2e-6)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("bert", {"preset": "ia3", "layers": [0, 2]}),
        ("bert", {"preset": "ia3", "ia3": {"gate": False, "places": ["query", "attention", "up", "down"]}}),
        ("bert", {"preset": "lora", "layers": [1], "lora": {"decomposed": True, "places": list(PROJECTIONS)}}),
        ("gpt2", {"preset": "lora", "lora": {"decomposed": True, "places": ["query", "key", "up", "down"]}}),
        ("gpt2", {"preset": "ia3", "ia3": {"gate": False, "places": ["query", "activation"]}, "layers": [1]}),
        ("bart", {"preset": "ia3", "decoder": False, "cross": False}),
        (
            "t5",
            {"preset": "ia3", "ia3": {"gate": False, "places": ["key", "value"]}, "encoder": False, "decoder": False},
        ),
    ],
)
def test_some_places_and_some_layers(family: str, config: dict[str, Any], tmp_path: Path) -> None:
    check(family, config, tmp_path)


@pytest.mark.parametrize("dtype", ["base", "float32"])
@pytest.mark.parametrize("method", METHODS)
def test_the_types_of_a_model_stay(method: str, dtype: str, tmp_path: Path) -> None:
    model = unipelt.inject(tiny_bert().bfloat16(), {**METHODS[method], "dtype": dtype})
    shake(model)
    unipelt.save_peft(model, tmp_path)
    for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items():
        assert tensor.dtype == (torch.float32 if dtype == "float32" else torch.bfloat16), name
    back = unipelt.load_peft(tiny_bert().bfloat16(), tmp_path)
    read, kept = (logits(each, bert_batch()).float() for each in (back, model))
    torch.testing.assert_close(read, kept, rtol=0, atol=2e-2)


def test_a_folded_model_keeps_its_dora_and_sends_it(tmp_path: Path) -> None:
    """What is folded here are prefixes, behind closed gates."""
    lora = {"decomposed": True, "gate": False, "alpha": 6.5}  # in B, as PEFT's is a whole number
    config = {"preset": "unipelt-pl", "prefix": {"gating": "mass"}, "lora": lora}
    model = unipelt.inject(tiny_bert(), config)
    shake(model)
    for _, _, weight, bias in gates(model):
        weight.zero_()
        bias.fill_(-20.0)
    want = logits(model, bert_batch())
    unipelt.fold(model, [bert_batch()])
    unipelt.save_peft(model, tmp_path)
    torch.testing.assert_close(logits(in_peft(tiny_bert(), tmp_path), bert_batch()), want, rtol=0, atol=1e-6)


# What PEFT trained


def from_peft(family: str, folder: Path, config: Any) -> Any:
    """A model of PEFT's own, moved from its start and saved; then its logits and ours must agree."""
    base = tiny_bert() if family == "tiny" else tiny_model(family)
    batch = bert_batch() if family == "tiny" else tiny_batch(family)
    theirs = peft.get_peft_model(base, config)
    shake(theirs)
    theirs.save_pretrained(folder)
    want = logits(theirs, batch)
    ours = unipelt.load_peft(tiny_bert() if family == "tiny" else tiny_model(family), folder)
    near(logits(ours, batch), want)
    return ours


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama", "t5", "bart", "gemma", "bloom"])
def test_the_factors_that_peft_places_by_itself(family: str, tmp_path: Path) -> None:
    """In BERT it multiplies what attention's last projection is given too, which are values here."""
    ours = from_peft(family, tmp_path, peft.IA3Config(task_type="SEQ_CLS" if family[-4:] == "bert" else None))
    assert injection_of(ours).config.part("ia3").places == {
        "gpt2": ("query", "key", "value", "activation"),
        "bloom": ("query", "key", "value", "activation"),
        "bart": ("query", "value", "activation"),
        "gemma": ("query", "value", "activation"),
    }.get(family, ("key", "value", "activation"))


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["output.dense"], "feedforward_modules": ["output.dense"]},
        {"target_modules": ["intermediate.dense", "query"], "feedforward_modules": []},
        {"target_modules": r".*layer\.[02]\..*(key|value)", "feedforward_modules": [], "modules_to_save": ["pooler"]},
    ],
)
def test_factors_of_pefts_own(fields: dict[str, Any], tmp_path: Path) -> None:
    from_peft("tiny", tmp_path, peft.IA3Config(task_type="SEQ_CLS", **fields))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"value": 6}, "alpha_pattern": {"query": 1}},
        {"target_modules": r".*encoder.*\.(query|key|value|dense)"},
        {"layers_to_transform": [1], "layers_pattern": "layer"},
    ],
)
def test_doras_of_pefts_own(fields: dict[str, Any], tmp_path: Path) -> None:
    options: dict[str, Any] = {"task_type": "SEQ_CLS", "r": 4, "lora_alpha": 6, "target_modules": ["query", "value"]}
    ours = from_peft("tiny", tmp_path, peft.LoraConfig(**{**options, **fields}, use_dora=True))
    assert injection_of(ours).config.lora.decomposed  # type: ignore[union-attr]


def test_lengths_that_move_alone_are_a_term(tmp_path: Path) -> None:
    """Of keys, in a module that computes queries and values too; and what stands as it was is none."""
    model = unipelt.inject(tiny_model("gpt2"), METHODS["dora"])
    shake(model)
    unipelt.save_peft(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if "magnitude" in name:
            tensor[32:64] *= 1.5
    save_file(tensors, path)
    want = logits(in_peft(tiny_model("gpt2"), tmp_path), tiny_batch("gpt2"))
    back = unipelt.load_peft(tiny_model("gpt2"), tmp_path)
    assert injection_of(back).config.lora.places == ("query", "value", "key")  # type: ignore[union-attr]
    near(logits(back, tiny_batch("gpt2")), want)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "mt5", "bart", "phi3"])
def test_updates_of_every_linear_projection_travel(family: str, tmp_path: Path) -> None:
    """There and back; what comes back names its places."""
    model = unipelt.inject(tiny_model(family), {"preset": "lora", "lora": {"rank": 3, "places": "all-linear"}})
    shake(model)
    want = logits(model, tiny_batch(family))
    unipelt.save_peft(model, tmp_path)
    near(logits(in_peft(tiny_model(family), tmp_path), tiny_batch(family)), want, 1e-5)
    back = unipelt.load_peft(tiny_model(family), tmp_path)
    near(logits(back, tiny_batch(family)), want, 1e-5)
    gate = ("gate",) if family in ("llama", "mt5") else ()
    places = injection_of(back).config.lora.places  # type: ignore[union-attr]
    assert places == ("query", "value", "key", "attention", "up", "down", *gate)


@pytest.mark.parametrize("targets", ["all-linear", ["gate_proj"], ["gate_proj", "q_proj", "down_proj"]])
@pytest.mark.parametrize("dora", [False, True])
def test_loras_of_pefts_own_on_every_linear_projection_and_on_gates(targets: Any, dora: bool, tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=targets, use_dora=dora)
    ours = from_peft("llama", tmp_path, config)
    assert "gate" in injection_of(ours).config.lora.places  # type: ignore[union-attr]


@pytest.mark.parametrize(("family", "task"), [("gpt2", "CAUSAL_LM"), ("bloom", "CAUSAL_LM"), ("mt5", "SEQ_2_SEQ_LM")])
def test_loras_of_pefts_own_on_every_linear_projection(family: str, task: str, tmp_path: Path) -> None:
    from_peft(family, tmp_path, peft.LoraConfig(task_type=task, r=4, lora_alpha=6, target_modules="all-linear"))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dropout_travels_both_ways(family: str, tmp_path: Path) -> None:
    """With the same seed both drop the same numbers, where a module has one term."""
    places = ["attention", "down"] if family == "gpt2" else "all-linear"
    model = unipelt.inject(tiny_model(family), {"preset": "lora", "lora": {"dropout": 0.3, "places": places}})
    shake(model)
    unipelt.save_peft(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"] == 0.3
    back = unipelt.load_peft(tiny_model(family), tmp_path)
    assert injection_of(back).config.lora.dropout == 0.3  # type: ignore[union-attr]
    theirs = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path, is_trainable=True)
    outs = []
    for each in (model, back, theirs):
        torch.manual_seed(0)
        with torch.no_grad():
            outs.append(each.train()(**tiny_batch(family)).logits)
    near(outs[1], outs[0])
    near(outs[2], outs[0], 1e-5)
    assert (logits(model, tiny_batch(family)) - outs[0]).abs().max() > 1e-3


@pytest.mark.parametrize("value", [1.0, -0.5, "0.1", True])
def test_a_dropout_that_is_no_probability_is_refused(value: Any, tmp_path: Path) -> None:
    unipelt.save_peft(unipelt.inject(tiny_bert(), "lora"), tmp_path)
    edit(tmp_path, lora_dropout=value)
    refused(unipelt.load_peft, tmp_path, "lora_dropout must be a number of at least 0 and below 1")


# What cannot go


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"preset": "ia3", "ia3": {"gate": True}},
            r"gate of .*key\.ia3_key depends on the text, and PEFT has no gates",
        ),
        ({"preset": "lora", "lora": {"gate": True, "decomposed": True}}, r"gate of .*lora_query depends on the text"),
        (
            {"preset": "lora", "lora": {"gate": True, "places": ["up"]}, "gate": {"shared": True}},
            r"gate of .*intermediate\.dense\.lora_up depends on the text",
        ),
        ({"preset": "ia3", "ia3": {"gate": True}, "gate": {"shared": True}}, r"gate of .*ia3_key depends on the text"),
        (
            {"preset": "ia3", "ia3": {"gate": False, "places": ["activation", "down"]}},
            r"multiplies what bert\.encoder\.layer\.0\.output\.dense is given or what it gives, and this model both",
        ),
        (
            {"preset": "adapter", "ia3": {"gate": False}},
            r"is an adapter, which a PEFT folder of \(IA\)3 cannot hold; .*'ia3'",
        ),
        ({"preset": "ia3", "red": {"gate": False}}, "is red, which a PEFT folder"),
        ({"preset": "ia3", "bitfit": True}, "trains parameters of its base too"),
        ("red", r"no LoRA, no \(IA\)3, no LayerNorm tuning"),
        ({"preset": "ia3", "prompt": {}}, r"bert\.prompt is a prompt, which a PEFT folder of \(IA\)3 cannot hold"),
        ({"preset": "prompt", "adapter": {"gate": False}}, "is an adapter, which a PEFT folder of a prompt cannot"),
        ("prompt", "BertForSequenceClassification read a prompt's states too, and here they read the text's"),
    ],
)
def test_what_a_folder_cannot_hold_is_named(config: Any, message: str, tmp_path: Path) -> None:
    model = unipelt.inject(tiny_bert(), config)
    with pytest.raises(unipelt.CheckpointError, match=message):
        unipelt.save_peft(model, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize(
    ("family", "fields", "part"),
    [
        ("bert", {"target_modules": ["query"], "feedforward_modules": ["query"]}, "last projections of attention and"),
        (
            "bert",
            {"target_modules": ["pooler.dense"], "feedforward_modules": []},
            "the projections of its layers alone",
        ),
        ("bert", {"target_modules": r".*layer\.(0.*key|1.*value)", "feedforward_modules": []}, "stands out"),
        ("llama", {"target_modules": ["o_proj"], "feedforward_modules": ["o_proj"]}, "several heads of queries share"),
    ],
)
def test_factors_that_go_nowhere_here(family: str, fields: dict[str, Any], part: str, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(tiny_model(family), peft.IA3Config(**fields))
    shake(theirs)
    theirs.save_pretrained(tmp_path)
    refused(unipelt.load_peft, tmp_path, part, model=tiny_model(family))


@pytest.mark.parametrize(
    ("method", "change", "part"),
    [
        ("ia3", lambda t: {n: x for n, x in t.items() if "ia3" not in n}, "it holds no ia3_l"),
        ("ia3", lambda t: {n: x.int() if "ia3" in n else x for n, x in t.items()}, "int32"),
        ("ia3", lambda t: {n: x[:3].clone() if "key.ia3" in n else x for n, x in t.items()}, "should be (32, 1)"),
        ("ia3", lambda t: {n.removeprefix("base_model."): x for n, x in t.items()}, "none of PEFT's"),
        ("ia3", lambda t: {n.replace("classifier", "score"): x for n, x in t.items()}, "no parameter 'score."),
        ("ln_tuning", lambda t: {n: x for n, x in t.items() if "ln_tun" not in n}, "it holds no ln_tuning_layers"),
        (
            "ln_tuning",
            lambda t: {n: x for n, x in t.items() if "0.output.LayerNorm.ln_tuning_layers.b" not in n},
            "'bias'",
        ),
        ("ln_tuning", lambda t: {n: x for n, x in t.items() if "0.output.LayerNorm" not in n}, "stands out"),
        ("ln_tuning", lambda t: {n: x[:3].clone() if "ln_tun" in n else x for n, x in t.items()}, "should be (32,)"),
        ("dora", lambda t: {n: x for n, x in t.items() if "0.attention.self.query.lora_m" not in n}, "not the other"),
        ("dora", lambda t: {n: x[:3].clone() if "lora_m" in n else x for n, x in t.items()}, "should be (32,)"),
        ("dora", lambda t: {n: x.int() if "lora_m" in n else x for n, x in t.items()}, "int32"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(method: str, change: Any, part: str, tmp_path: Path) -> None:
    model = unipelt.inject(tiny_bert(), METHODS[method])
    unipelt.save_peft(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
    refused(unipelt.load_peft, tmp_path, part)


def test_a_norm_after_the_last_layer_is_refused_by_name(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(tiny_model("llama"), peft.LNTuningConfig(task_type="CAUSAL_LM"))
    theirs.save_pretrained(tmp_path)
    refused(unipelt.load_peft, tmp_path, "it tunes 'model.norm'", "target_modules", model=tiny_model("llama"))
    names = ["input_layernorm", "post_attention_layernorm"]
    theirs = peft.get_peft_model(tiny_model("llama"), peft.LNTuningConfig(target_modules=names))
    shake(theirs)
    theirs.save_pretrained(tmp_path)
    ours, batch = unipelt.load_peft(tiny_model("llama"), tmp_path), tiny_batch("llama")
    near(logits(ours, batch), logits(theirs, batch))
    edit(tmp_path, something_new=[1])
    refused(unipelt.load_peft, tmp_path, "something_new", "no plain LayerNorm tuning", model=tiny_model("llama"))


# Prompts


@pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning")
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "bloom"])
def test_a_prompt_of_a_causal_model_travels(family: str, tmp_path: Path) -> None:
    batch = tiny_batch(family)
    model: Any = unipelt.inject(tiny_model(family), {"preset": "prompt", "prompt": {"length": 4}})
    shake(model)
    want = logits(model, batch)
    unipelt.save_peft(model, tmp_path / "ours")
    theirs = in_peft(tiny_model(family), tmp_path / "ours")
    near(logits(theirs, batch)[:, 4:], want)
    options = {"attention_mask": batch["attention_mask"][1:2], "max_new_tokens": 4, "do_sample": False}
    ids = batch["input_ids"][1:2]  # without padding
    assert torch.equal(theirs.generate(input_ids=ids, **options), model.generate(ids, **options))
    own = peft.get_peft_model(tiny_model(family), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    shake(own)
    own.save_pretrained(tmp_path / "theirs")
    near(logits(unipelt.load_peft(tiny_model(family), tmp_path / "theirs"), batch), logits(own, batch)[:, 3:])
    back = unipelt.load_peft(tiny_model(family), tmp_path / "ours")
    assert torch.equal(logits(back, batch), want)
    assert injection_of(back).config == injection_of(model).config


def test_prompts_that_mean_something_else_are_refused(tmp_path: Path) -> None:
    base = tiny_model("llama")
    unipelt.save_peft(unipelt.inject(tiny_model("llama"), "prompt"), tmp_path)
    refused(unipelt.load_peft, tmp_path, "causal language models alone")
    for fields, part in (
        ({"num_transformer_submodules": 2}, "num_transformer_submodules"),
        ({"num_virtual_tokens": 7}, "should be (7, 32)"),
        ({"num_virtual_tokens": None}, "num_virtual_tokens cannot be meant"),
    ):
        before = json.loads((tmp_path / "adapter_config.json").read_text())
        edit(tmp_path, **fields)
        refused(unipelt.load_peft, tmp_path, part, model=base)
        edit(tmp_path, **before)
    path = tmp_path / "adapter_model.safetensors"
    save_file({**load_file(path), "other": torch.zeros(1)}, path)
    refused(unipelt.load_peft, tmp_path, "'other' is missing or beside it", model=base)


def test_configurations_that_mean_something_else_are_refused(tmp_path: Path) -> None:
    unipelt.save_peft(unipelt.inject(tiny_bert(), "ia3"), tmp_path / "ia3")
    edit(tmp_path / "ia3", something_new=[1])
    refused(unipelt.load_peft, tmp_path / "ia3", "something_new", "no plain (IA)3")
    unipelt.save_peft(unipelt.inject(tiny_bert(), METHODS["dora"]), tmp_path / "dora")
    edit(tmp_path / "dora", use_dora=False)
    refused(unipelt.load_peft, tmp_path / "dora", "lora_magnitude_vector", "no such LoRA")
    unipelt.save_peft(unipelt.inject(tiny_model("llama"), "ia3"), tmp_path / "llama")
    fields = json.loads((tmp_path / "llama" / "adapter_config.json").read_text())
    assert fields["target_modules"] == ["down_proj", "k_proj", "v_proj"]
    assert fields["feedforward_modules"] == ["down_proj"]
    assert json.loads((tmp_path / "ia3" / "adapter_config.json").read_text())["feedforward_modules"] == [
        f"bert.encoder.layer.{layer}.output.dense" for layer in range(3)
    ]
