"""Checkpoints of AdapterHub, made by hand: whole configurations, heads of the other models, refusals by field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bridges.test_adapterhub import FLEX, edit, injected, save, write, written
from helpers import refused, shake, tiny_bert
from safetensors.torch import load_file
from tiny import tiny_model
from torch import Tensor

import unipelt
from unipelt.injection.state import injection_of

# the further fields that adapters 1.3 writes, with their defaults there
ALSO: dict[str, dict[str, Any]] = {
    "prefix_tuning": {
        **{"bottleneck_size": 16, "cross_prefix": True, "dropout": 0.0, "encoder_prefix": True, "flat": False},
        "init_weights_seed": None,
    },
    "lora": {"dropout": 0.1, "dtype": None, "init_weights": "lora", "init_weights_seed": 3},
    "adapter": {
        **{"adapter_residual_before_ln": False, "cross_adapter": False, "dropout": 0.0, "factorized_phm_W": True},
        **{"factorized_phm_rule": False, "hypercomplex_nonlinearity": "glorot-uniform", "init_weights": "bert"},
        **{"init_weights_seed": None, "inv_adapter_reduction_factor": 2, "learn_phm": True, "phm_bias": True},
        **{"phm_c_init": "normal", "phm_dim": 4, "phm_init_range": 0.0001, "phm_rank": 1, "reduction_factor": 4},
        **{"shared_W_phm": True, "shared_phm_rule": True, "stochastic_depth": 0.1},
    },
}


def test_a_configuration_with_all_fields_is_read(tmp_path: Path) -> None:
    model = injected("unipelt-apl")
    folder = written(model, tmp_path / "it")
    values = json.loads((folder / "adapter_config.json").read_text())
    for part in values["config"]["configs"]:
        part.update(ALSO[part.get("architecture", "adapter")])
    write(folder, "adapter_config.json", values)
    back = unipelt.load_adapterhub(tiny_bert(), folder)
    assert injection_of(back).config == injection_of(model).config


def test_lora_that_names_no_matrices_is_of_queries_and_values(tmp_path: Path) -> None:
    folder = written(injected("lora"), tmp_path / "it")
    values = json.loads((folder / "adapter_config.json").read_text())
    del values["config"]["attn_matrices"]
    write(folder, "adapter_config.json", values)
    assert injection_of(unipelt.load_adapterhub(tiny_bert(), folder)).config.lora is not None


@pytest.mark.parametrize(
    ("kind", "activation", "inner", "outer"),
    [
        ("roberta", "tanh", "classifier.dense", "classifier.out_proj"),
        ("xlm-roberta", "tanh", "classifier.dense", "classifier.out_proj"),
        ("electra", "gelu", "classifier.dense", "classifier.out_proj"),
        ("distilbert", "relu", "pre_classifier", "classifier"),
    ],
)
def test_a_head_of_adapterhubs_own_in_each_model(
    kind: str, activation: str, inner: str, outer: str, tmp_path: Path
) -> None:
    model = unipelt.inject(tiny_model(kind), {"preset": "lora", "gate": {"pooling": "mean"}})
    shake(model)
    folder = written(model, tmp_path / "it")
    edit(folder, model_type=kind)
    generator = torch.Generator().manual_seed(0)
    shapes = {"1.weight": (32, 32), "1.bias": (32,), "4.weight": (2, 32), "4.bias": (2,)}
    head = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save({f"heads.it.{name}": tensor for name, tensor in head.items()}, folder / "model_head.safetensors")
    write(folder, "head_config.json", {"config": {**FLEX, "activation_function": activation}})
    back = unipelt.load_adapterhub(tiny_model(kind, seed=1), folder)
    for index, module in (("1", inner), ("4", outer)):
        for end in ("weight", "bias"):
            assert torch.equal(back.get_parameter(f"{module}.{end}"), head[f"{index}.{end}"])
    other = {"tanh": "relu"}.get(activation, "tanh")
    write(folder, "head_config.json", {"config": {**FLEX, "activation_function": other}})
    refused(unipelt.load_adapterhub, folder, f"(2, '{other}', False)", activation, model=tiny_model(kind))


def test_a_head_of_bert_on_its_own_pooler(tmp_path: Path) -> None:
    folder = written(injected("lora"), tmp_path / "it")
    head = {"heads.it.1.weight": torch.full((2, 32), 0.5), "heads.it.1.bias": torch.ones(2)}
    save(head, folder / "model_head.safetensors")
    write(folder, "head_config.json", {"config": {**FLEX, "layers": 1, "use_pooler": True}})
    base = tiny_bert()
    pooler = base.get_parameter("bert.pooler.dense.weight").clone()
    model = unipelt.load_adapterhub(base, folder)
    assert torch.equal(model.get_parameter("classifier.weight"), head["heads.it.1.weight"])
    assert torch.equal(model.get_parameter("bert.pooler.dense.weight"), pooler)


@pytest.mark.parametrize(
    ("method", "fields", "parts"),
    [
        ("lora", {"name": 3}, ("name must be the adapter's", "3")),
        ("lora", {"name": ""}, ("name must be the adapter's",)),
        ("lora", {"architecture": ["lora"]}, ("it holds ['lora'], which is not read; lora, prefix_tuning, adapter",)),
        ("lora", {"attn_matrices": ["q", "k"]}, ("attn_matrices ['q', 'k']",)),
        ("lora", {"selfattn_lora": False}, ("LoRA has selfattn_lora False, and only True",)),
        ("lora", {"intermediate_lora": True}, ("intermediate_lora True",)),
        ("lora", {"output_lora": True}, ("output_lora True",)),
        ("lora", {"composition_mode": "scale"}, ("composition_mode 'scale'",)),
        ("lora", {"use_dora": True}, ("use_dora True",)),
        ("lora", {"use_dora": 0}, ("use_dora 0, and only False",)),
        ("lora", {"vera_d": 0.1}, ("vera_d 0.1",)),
        ("prefix", {"non_linearity": "relu"}, ("non_linearity 'relu'", "eject_prefix_tuning")),
        ("unipelt-ap", {"shared_gating": False}, ("prefix has shared_gating False",)),
        ("adapter", {"mh_adapter": True}, ("adapter has mh_adapter True",)),
        ("adapter", {"output_adapter": False}, ("output_adapter False",)),
        ("adapter", {"is_parallel": True}, ("is_parallel True",)),
        ("adapter", {"non_linearity": "gelu"}, ("non_linearity 'gelu'",)),
        ("adapter", {"original_ln_after": False}, ("original_ln_after False",)),
        ("adapter", {"ln_before": True}, ("ln_before True",)),
        ("adapter", {"phm_layer": True}, ("phm_layer True",)),
        ("adapter", {"inv_adapter": "nice"}, ("inv_adapter 'nice'",)),
    ],
)
def test_a_field_with_another_value_is_refused_by_name(
    method: str, fields: dict[str, Any], parts: tuple[str, ...], tmp_path: Path
) -> None:
    folder = written(injected(method), tmp_path / "it")
    edit(folder, **fields)
    refused(unipelt.load_adapterhub, folder, *parts)


def test_an_ungated_prefix_may_have_any_form_of_gates(tmp_path: Path) -> None:
    folder = written(injected("prefix"), tmp_path / "it")
    edit(folder, shared_gating=False)
    unipelt.load_adapterhub(tiny_bert(), folder)


def test_a_prefix_in_distilbert_is_refused(tmp_path: Path) -> None:
    folder = written(injected("prefix"), tmp_path / "it")
    edit(folder, model_type="distilbert")
    tensors: dict[str, Tensor] = {
        f"distil{name}": tensor for name, tensor in load_file(folder / "adapter.safetensors").items()
    }
    save(tensors, folder / "adapter.safetensors")
    refused(unipelt.load_adapterhub, folder, "in DistilBERT", "adds 1", model=tiny_model("distilbert"))


def test_an_ejected_prefix_that_is_too_short_is_refused(tmp_path: Path) -> None:
    model = injected("prefix")
    unipelt.save(model, tmp_path / "ours", deploy=True)
    folder = written(unipelt.load(tiny_bert(), tmp_path / "ours"), tmp_path / "it")
    edit(folder, prefix_length=100_000)
    refused(unipelt.load_adapterhub, folder, "prefix_length 100000, for which its tensor is too small")
    edit(folder, prefix_length=9)
    refused(unipelt.load_adapterhub, folder, "control_trans", "should be")
