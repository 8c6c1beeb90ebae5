"""Checkpoints of AdapterHub's `adapters`: made by that package where an environment has it, and made by hand."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.malformed import spoilt_json, spoilt_weights
from helpers import bits, refused, shake, tiny_batch, tiny_bert
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from torch import Tensor
from transformers import AutoModelForSequenceClassification, BertForTokenClassification, BertModel, PreTrainedModel

import unipelt
from unipelt.injection.state import injection_of
from unipelt.submodules.room import layer_sets, own_parts, placed_terms

SCRIPT = Path(__file__).parents[1] / "scripts" / "adapterhub.py"
METHODS = ("unipelt-apl", "unipelt-al", "unipelt-pl-nogate", "adapter", "prefix", "lora")


def logits(model: Any, **batch: Tensor) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(**batch).logits


# Made by that package


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each case of tests/scripts/adapterhub.py."""
    python = os.environ.get("UNIPELT_ADAPTERHUB_PYTHON")
    if not python:
        pytest.skip(
            "set UNIPELT_ADAPTERHUB_PYTHON to a Python that has AdapterHub's adapters (.ci/adapterhub makes one)"
        )
    folder = tmp_path_factory.mktemp("adapterhub")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([python, SCRIPT, folder], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return folder


def base_of(folder: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder / "base").eval()


@pytest.mark.parametrize(
    "case",
    [
        *("bert", "roberta", "xlm-roberta", "electra", "distilbert", "default", "ejected", "ejected-roberta", "odd"),
        *("odd-ejected", "lora", "lora-gated", "adapter", "prefix", "flat"),
        *("flex-bert", "flex-roberta", "flex-distilbert", "flex-electra", "flex-pooler"),
    ],
)
def test_logits_are_those_of_adapterhub(case: str, made: Path) -> None:
    folder = made / case
    expected = load_file(folder / "expected.safetensors")
    ids, mask = expected["input_ids"], expected["attention_mask"]
    assert (logits(base_of(folder), input_ids=ids, attention_mask=mask) - expected["logits"]).abs().max() > 1e-2
    model = unipelt.load_adapterhub(base_of(folder), folder)
    for name, inputs in (
        ("logits", {"input_ids": ids, "attention_mask": mask}),
        ("other.logits", {"input_ids": expected["other.input_ids"]}),
    ):
        torch.testing.assert_close(logits(model, **inputs), expected[name], rtol=0, atol=1e-6)


def test_the_whole_of_what_was_loaded_is_saved(made: Path, tmp_path: Path) -> None:
    folder = made / "flex-bert"
    expected = load_file(folder / "expected.safetensors")
    unipelt.save(unipelt.load_adapterhub(base_of(folder), folder), tmp_path)
    again = unipelt.from_pretrained(tmp_path)
    torch.testing.assert_close(
        logits(again, input_ids=expected["other.input_ids"]), expected["other.logits"], rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(
    ("case", "parts"),
    [
        ("distilbert-prefix", ("DistilBERT", "adds 1")),
        ("no-tanh", ("non_linearity", "relu", "eject_prefix_tuning")),
        ("two-gates", ("shared_gating", "False")),
        ("keys", ("attn_matrices", "'k'")),
        ("dora", ("use_dora",)),
        ("ia3", ("composition_mode", "scale")),
        ("feed-forward", ("intermediate_lora",)),
        ("houlsby", ("mh_adapter",)),
        ("parallel", ("is_parallel",)),
        ("learned-scale", ("scaling", "learned")),
        ("gelu", ("non_linearity", "gelu")),
        ("widths", ("adapter.up.weight", "(32, 4)", "(32, 8)")),
        ("compacter", ("non_linearity",)),
        ("prompt", ("prompt_tuning",)),
        ("layers-differ", ("leave_out", "[0]")),
        ("flex-three", ("(3, 'tanh', False)", "head=False")),
        ("gpt2", ("gpt2", "roberta")),
    ],
)
def test_what_is_not_computed_here_is_refused_by_name(case: str, parts: tuple[str, ...], made: Path) -> None:
    refused(unipelt.load_adapterhub, made / case, *parts, model=base_of(made / case))


def test_a_head_can_be_left_where_it_is(made: Path) -> None:
    model = base_of(made / "flex-three")
    before = model.classifier.weight.clone()
    unipelt.load_adapterhub(model, made / "flex-three", head=False)
    assert torch.equal(model.classifier.weight, before)


# Made by hand


def written(model: PreTrainedModel, folder: Path) -> Path:
    """An injected BERT for sequence classification as `adapters` 1.3 saves it."""
    config = injection_of(model).config
    tensors: dict[str, Tensor] = {}
    flat = []
    for placed in placed_terms(model):
        owner = f"{placed.layer}.output.adapters.it." if placed.term.name == "adapter" else f"{placed.path}.loras.it."
        names = {"down": "adapter_down.0", "up": "adapter_up", "A": "lora_A", "B": "lora_B"}
        for name, tensor in placed.factors().items():
            first, _, rest = name.partition(".")
            tensors[f"{owner}{names[first]}{'.' if rest else ''}{rest}"] = tensor
    for row in own_parts(model):
        if row.part.kind == "gate":
            where = row.room.removesuffix(".unipelt")
            owner = {
                "adapter": f"{where}.output.adapters.it.gate",
                "prefix": f"{where}.attention.self.prefix_tuning.prefix_gates.it",
                "lora_query": f"{where}.attention.self.query.loras.it.gate",
                "lora_value": f"{where}.attention.self.value.loras.it.gate",
            }[row.part.gate]
            tensors[f"{owner}.{row.part.parameter}"] = row.tensor
    for _, _, part in layer_sets(model):
        if part.prefix is not None:
            flat.append(part.prefix().detach())
    prefix = "prefix_tuning.prefix_tunings.it.self_prefix."
    if flat and injection_of(model).deployed:
        tensors[f"bert.{prefix}control_trans"] = torch.stack(flat).permute(2, 0, 1, 3).flatten()
    elif flat:
        network: Any = model.get_submodule("bert.encoder.unipelt.default.prefix_network")
        tensors[f"bert.{prefix}wte.weight"] = network.embedding
        for theirs, linear in (("control_trans.0", network.w1), ("control_trans.2", network.w2)):
            tensors[f"bert.{prefix}{theirs}.weight"] = linear.weight
            tensors[f"bert.{prefix}{theirs}.bias"] = linear.bias
    for name in [name for name in tensors if prefix in name]:
        for layer in range(3):
            copy = name.replace("bert.prefix_tuning.", f"bert.encoder.layer.{layer}.attention.self.prefix_tuning.pool.")
            tensors[copy] = tensors[name]
    left_out = [] if config.layers is None else [layer for layer in range(3) if layer not in config.layers]
    parts: list[dict[str, Any]] = []
    if config.lora is not None:
        own: dict[str, Any] = {
            "architecture": "lora",
            "r": config.lora.rank,
            "alpha": config.lora.alpha,
            "attn_matrices": ["q", "v"],
        }
        parts.append({**own, **LORA, "use_gating": config.lora.gate, "leave_out": left_out})
    if config.prefix is not None:
        own = {"architecture": "prefix_tuning", "prefix_length": config.prefix.length, "non_linearity": "tanh"}
        parts.append({**own, "shared_gating": True, "use_gating": config.prefix.gate, "leave_out": left_out})
    if config.adapter is not None:
        parts.append({**ADAPTER, "use_gating": config.adapter.gate, "leave_out": left_out})
    common = {"model_type": "bert", "version": "adapters.1.3.0", "model_class": "BertForSequenceClassification"}
    whole = parts[0] if len(parts) == 1 else {"architecture": "union", "configs": parts}
    write(folder, "adapter_config.json", {**common, "name": "it", "config": whole})
    write(folder, "head_config.json", {**common, "name": None, "config": None})
    save(tensors, folder / "adapter.safetensors")
    head = {name: tensor for name, tensor in model.named_parameters() if name.startswith("classifier.")}
    save(head, folder / "model_head.safetensors")
    return folder


LORA = {
    **{"selfattn_lora": True, "intermediate_lora": False, "output_lora": False, "composition_mode": "add"},
    **{"use_dora": False, "vera_d": None, "vera_b": None},
}
ADAPTER = {
    **{"mh_adapter": False, "output_adapter": True, "is_parallel": False, "non_linearity": "relu"},
    **{"original_ln_before": True, "original_ln_after": True, "residual_before_ln": True, "scaling": 1.0},
    **{"ln_before": False, "ln_after": False, "phm_layer": False, "inv_adapter": None},
}


FLEX = {"head_type": "classification", "layers": 2, "activation_function": "tanh", "use_pooler": False, "bias": True}


def write(folder: Path, name: str, values: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(values))


def save(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, path)


def injected(method: Any = "unipelt-apl") -> PreTrainedModel:
    model = unipelt.inject(tiny_bert(), {**(method if isinstance(method, dict) else {"preset": method}), **MEAN})
    shake(model)
    return model.eval()


MEAN = {"gate": {"pooling": "mean"}}


@pytest.mark.parametrize("method", [*METHODS, {"preset": "unipelt-apl", "layers": [0, 2]}])
def test_every_tensor_finds_its_place(method: Any, tmp_path: Path) -> None:
    model = injected(method)
    back = unipelt.load_adapterhub(tiny_bert(), written(model, tmp_path / "it"))
    before, after = bits(model), bits(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    ours = injection_of(back).config
    assert ours.gate.pooling == "mean"
    assert ours.layers == injection_of(model).config.layers
    assert torch.equal(logits(back, **tiny_batch()), logits(model, **tiny_batch()))


def test_an_ejected_prefix_is_deployed(tmp_path: Path) -> None:
    model = injected("unipelt-apl")
    unipelt.save(model, tmp_path / "ours", deploy=True)
    deployed = unipelt.load(tiny_bert(), tmp_path / "ours")
    back = unipelt.load_adapterhub(tiny_bert(), written(deployed, tmp_path / "it"))
    assert injection_of(back).deployed
    before, after = bits(deployed), bits(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_scaled_adapter_is_scaled_for_good(tmp_path: Path) -> None:
    model = injected("adapter")
    folder = written(model, tmp_path / "it")
    edit(folder, scaling=0.5)
    with torch.no_grad():
        for placed in placed_terms(model):
            placed.term.up.weight.mul_(0.5)
            placed.term.up.bias.mul_(0.5)
    back = unipelt.load_adapterhub(tiny_bert(), folder)
    assert torch.equal(logits(back, **tiny_batch()), logits(model, **tiny_batch()))


def test_a_model_without_a_head_takes_what_was_saved_from_one_with(tmp_path: Path) -> None:
    folder = written(injected(), tmp_path / "it")
    (folder / "head_config.json").unlink()
    torch.manual_seed(0)
    back = unipelt.load_adapterhub(BertModel(tiny_bert().config), folder)
    whole: Any = unipelt.load_adapterhub(tiny_bert(), folder)
    ours = dict(whole.bert.named_parameters())
    assert all(torch.equal(ours[n], p) for n, p in back.named_parameters() if ".unipelt." in n)


def test_a_head_of_adapterhubs_own_replaces_bert_s_pooler(tmp_path: Path) -> None:
    folder = written(injected(), tmp_path / "it")
    generator = torch.Generator().manual_seed(0)
    head = {
        "heads.it.1.weight": torch.randn(32, 32, generator=generator),
        "heads.it.1.bias": torch.randn(32, generator=generator),
        "heads.it.4.weight": torch.randn(2, 32, generator=generator),
        "heads.it.4.bias": torch.randn(2, generator=generator),
    }
    save(head, folder / "model_head.safetensors")
    write(folder, "head_config.json", {"model_class": "BertAdapterModel", "config": FLEX})
    base = tiny_bert()
    before = bits(base)
    model = unipelt.load_adapterhub(base, folder)
    assert torch.equal(model.get_parameter("bert.pooler.dense.weight"), head["heads.it.1.weight"])
    assert torch.equal(model.get_parameter("classifier.bias"), head["heads.it.4.bias"])
    assert model.get_parameter("bert.pooler.dense.weight").requires_grad
    unipelt.save(model, tmp_path / "ours")
    assert torch.equal(
        logits(unipelt.load(tiny_bert(), tmp_path / "ours"), **tiny_batch()), logits(model, **tiny_batch())
    )
    assert all(torch.equal(before[name], p) for name, p in unipelt.remove(model).named_parameters())


def edit(folder: Path, **fields: Any) -> None:
    """Change fields of the file, or of the configuration (of its first part) in it."""
    values = json.loads((folder / "adapter_config.json").read_text())
    config = values["config"] or {}
    part = config["configs"][0] if config.get("architecture") == "union" else config
    for key, value in fields.items():
        (values if key in values else part)[key] = value
    write(folder, "adapter_config.json", values)


@pytest.mark.parametrize(
    ("method", "fields", "parts"),
    [
        ("lora", {"model_type": "roberta"}, ("roberta", "bert")),
        ("lora", {"version": "adapters.1.0.1"}, ("1.0.1", "1.1")),
        ("lora", {"version": "adapters.2.0.0"}, ("2.0.0",)),
        ("lora", {"version": None}, ("None",)),
        ("lora", {"name": "a.b"}, ("name",)),
        ("lora", {"name": "other"}, ("loras.other.lora_A",)),
        ("lora", {"config": []}, ("config must be a mapping",)),
        ("lora", {"config": {"architecture": "union", "configs": 3}}, ("configs",)),
        ("lora", {"architecture": "mtl_lora"}, ("mtl_lora",)),
        ("lora", {"r": 4}, ("r 4", "8 ranks")),
        ("lora", {"alpha": None}, ("alpha",)),
        ("lora", {"use_gating": 1}, ("gate must be",)),
        ("lora", {"attn_matrices": "qv"}, ("attn_matrices",)),
        ("lora", {"leave_out": [1, "2"]}, ("leave_out",)),
        ("lora", {"leave_out": [0]}, ("layer.0", "no place")),
        ("lora", {"something_new": 3}, ("something_new",)),
        ("prefix", {"prefix_length": 9}, ("prefix_length 9", "10")),
        ("adapter", {"residual_before_ln": "post_add"}, ("residual_before_ln", "post_add")),
        ("adapter", {"scaling": "channel"}, ("scaling", "channel")),
        ("unipelt-al", {"leave_out": [0]}, ("leave_out", "[0]", "[]")),
        ("unipelt-al", {"use_gating": False}, ("gate", "no place")),
    ],
)
def test_a_configuration_of_something_else_is_refused(
    method: str, fields: dict[str, Any], parts: tuple[str, ...], tmp_path: Path
) -> None:
    folder = written(injected(method), tmp_path / "it")
    edit(folder, **fields)
    refused(unipelt.load_adapterhub, folder, *parts)


def test_a_field_that_is_not_said_is_refused(tmp_path: Path) -> None:
    folder = written(injected("lora"), tmp_path / "it")
    values = json.loads((folder / "adapter_config.json").read_text())
    del values["config"]["composition_mode"]
    write(folder, "adapter_config.json", values)
    refused(unipelt.load_adapterhub, folder, "does not say composition_mode")


def test_two_submodules_of_a_kind_are_refused(tmp_path: Path) -> None:
    folder = written(injected("unipelt-al"), tmp_path / "it")
    values = json.loads((folder / "adapter_config.json").read_text())
    values["config"]["configs"].append(values["config"]["configs"][0])
    write(folder, "adapter_config.json", values)
    refused(unipelt.load_adapterhub, folder, "LoRA twice")


Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@pytest.mark.parametrize(
    ("method", "change", "parts"),
    [
        ("unipelt-apl", lambda t: {n: x for n, x in t.items() if "layer.1.output" not in n}, ("it lacks", "layer.1")),
        ("lora", lambda t: {**t, "bert.more": torch.zeros(1)}, ("bert.more", "no place")),
        (
            "lora",
            lambda t: {n: x[:, :5] if "1.attention" in n else x for n, x in t.items()},
            ("lora_query.A", "(8, 5)"),
        ),
        ("lora", lambda t: {n: x.int() for n, x in t.items()}, ("int32",)),
        ("lora", lambda t: {**t, **{n.removeprefix("bert."): x for n, x in t.items()}}, ("twice",)),
        ("unipelt-ap", lambda t: {n: x + 1 if ".pool." in n else x for n, x in t.items()}, ("copy",)),
        (
            "unipelt-ap",
            lambda t: {n: x.repeat(2, 1) if "gates" in n and x.dim() == 2 else x for n, x in t.items()},
            ("row",),
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    method: str, change: Change, parts: tuple[str, ...], tmp_path: Path
) -> None:
    folder = written(injected(method), tmp_path / "it")
    save(change(load_file(folder / "adapter.safetensors")), folder / "adapter.safetensors")
    refused(unipelt.load_adapterhub, folder, *parts)


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"model_class": "BertForTokenClassification"}, ("BertForTokenClassification", "head=False")),
        ({"config": {"head_type": "tagging"}}, ("tagging", "head=False")),
        ({"config": {**FLEX, "bias": False}}, ("(2, 'tanh', False)", "head=False")),
        ({"config": {**FLEX, "layers": 3}}, ("(3, 'tanh', False)", "head=False")),
        ({"config": FLEX}, ("classifier", "no place", "head=False")),
    ],
)
def test_another_head_is_refused(fields: dict[str, Any], parts: tuple[str, ...], tmp_path: Path) -> None:
    folder = written(injected("lora"), tmp_path / "it")
    write(folder, "head_config.json", {**json.loads((folder / "head_config.json").read_text()), **fields})
    refused(unipelt.load_adapterhub, folder, *parts)


def test_half_a_head_is_refused(tmp_path: Path) -> None:
    folder = written(injected("lora"), tmp_path / "it")
    save({"classifier.weight": torch.zeros(2, 32)}, folder / "model_head.safetensors")
    refused(unipelt.load_adapterhub, folder, "lacks 'classifier.bias'", "head=False")


def test_a_head_of_other_labels_is_refused(tmp_path: Path) -> None:
    refused(
        unipelt.load_adapterhub,
        written(injected("lora"), tmp_path / "it"),
        "classifier",
        "(2",
        "(3",
        model=tiny_bert(num_labels=3),
    )


def test_the_head_of_another_class_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = BertForTokenClassification(tiny_bert().config)
    refused(
        unipelt.load_adapterhub,
        written(injected("lora"), tmp_path / "it"),
        "BertForTokenClassification",
        "head=False",
        model=model,
    )


def test_causal_models_are_refused(tmp_path: Path) -> None:
    folder = written(injected("lora"), tmp_path / "it")
    refused(unipelt.load_adapterhub, folder, "causal", model=tiny_bert(is_decoder=True))


def test_models_that_it_does_not_read_are_refused(tmp_path: Path) -> None:
    folder = written(injected("lora"), tmp_path / "it")
    edit(folder, model_type="albert")
    refused(unipelt.load_adapterhub, folder, "albert", "electra", model=tiny_model("albert"))


def test_pickles_are_not_read(tmp_path: Path) -> None:
    folder = written(injected("lora"), tmp_path / "it")
    (folder / "model_head.safetensors").rename(folder / "pytorch_model_head.bin")
    refused(unipelt.load_adapterhub, folder, "pytorch_model_head.bin", "pickle", "docs/bridges.md")
    (folder / "adapter.safetensors").rename(folder / "pytorch_adapter.bin")
    refused(unipelt.load_adapterhub, folder, "pytorch_adapter.bin", "pickle", "docs/bridges.md")


def test_files_that_are_no_folder_of_adapterhubs(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        unipelt.load_adapterhub(tiny_bert(), tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(FileNotFoundError, match=r"adapter\.safetensors"):
        unipelt.load_adapterhub(tiny_bert(), tmp_path)
    (tmp_path / "adapter.safetensors").write_bytes(b"\xff" * 20)
    refused(unipelt.load_adapterhub, tmp_path, "adapter_config.json", "JSON")
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(unipelt.load_adapterhub, tmp_path, "safetensors")


def test_only_a_bare_model_takes_a_folder(tmp_path: Path) -> None:
    folder = written(injected("lora"), tmp_path / "it")
    with pytest.raises(unipelt.InjectionError, match=r"unipelt\.remove"):
        unipelt.load_adapterhub(injected(), folder)
    with pytest.raises(unipelt.InjectionError, match="PreTrainedModel"):
        unipelt.load_adapterhub(torch.nn.Linear(2, 2), folder)  # type: ignore[arg-type]


def test_malformed_files_are_refused(tmp_path: Path) -> None:
    folder = written(injected(), tmp_path / "it")
    for name in ("adapter_config.json", "adapter.safetensors", "head_config.json", "model_head.safetensors"):
        good = (folder / name).read_bytes()
        for what, content in (spoilt_json if name.endswith("json") else spoilt_weights)(good).items():
            if what == "a header in Latin-1" and b"bert" not in good:
                continue  # it is the name of a tensor of BERT's that this spoils
            (folder / name).write_bytes(content)
            refused(unipelt.load_adapterhub, folder)
        (folder / name).write_bytes(good)
    unipelt.load_adapterhub(tiny_bert(), folder)
