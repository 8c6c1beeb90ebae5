"""The key `peft` of a method: its forms, and what is refused without PEFT."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import pytest

from unipelt import ConfigError, PeftTermConfig, UniPELTConfig, resolve
from unipelt.config import peft_types
from unipelt.config.parts import Place
from unipelt.config.peft_types import check_tuner, peft_config
from unipelt.glue.settings import RunSettings
from unipelt.report import kinds
from unipelt.runs.settings import SettingsError

OFT: dict[str, Any] = {"type": "OFT", "oft_block_size": 4}
OTHERS: dict[str, Any] = {"a": {**OFT, "gate": False}, "b": {"type": "VERA", "places": ["key"], "r": 8}}


@pytest.mark.parametrize("value", [OFT, OTHERS, {"a": OFT}], ids=["one", "several", "one with a name"])
def test_both_forms_come_back_as_they_were(value: dict[str, Any]) -> None:
    config = resolve({"preset": "lora", "peft": value})
    assert config.to_dict()["peft"] == value
    assert resolve(config.to_dict()) == config
    assert hash(resolve(config.to_dict())) == hash(config)


def test_a_name_and_its_type_are_one_form() -> None:
    assert resolve({"preset": "lora", "peft": {"oft": OFT}}) == resolve({"preset": "lora", "peft": OFT})
    assert resolve({"preset": "lora", "peft": {**OFT, "type": "oft"}}).more[0] == PeftTermConfig(
        type="OFT", options={"oft_block_size": 4}
    )


def test_submodules_have_names_and_are_found() -> None:
    config = resolve({"preset": "lora", "ia3": {}, "peft": OTHERS})
    assert config.submodule_names == ["lora", "ia3", "peft_a", "peft_b"]
    assert config.part("peft_b").type == "VERA"
    assert kinds(config.to_dict()) == ["lora", "ia3", "peft_a", "peft_b"]
    assert kinds(resolve({"preset": "lora", "lora": None, "peft": OFT}).to_dict()) == ["peft_oft"]


def test_changes_are_merged_and_null_leaves_it_out() -> None:
    config = resolve({"preset": "lora", "peft": OFT})
    assert config.updated({"peft": {"oft_block_size": 8}}).part("peft_oft").options == {"oft_block_size": 8}
    assert config.updated({"peft": None}) == resolve("lora")
    several = resolve({"preset": "lora", "peft": OTHERS}).updated({"peft": {"a": None}})
    assert several.submodule_names == ["lora", "peft_b"]


def test_methods_without_tuners_are_written_as_before() -> None:
    assert "peft" not in resolve("unipelt-apl").to_dict()
    assert "peft" not in UniPELTConfig().to_dict()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "peft must be a mapping"),
        ({}, "must name the type of its tuner"),
        ({"oft": 4}, "must name the type of its tuner"),
        ({"type": 4}, "peft: type must be PEFT's name of a tuner"),
        ({**OFT, "gate": "yes"}, "peft: gate must be true or false"),
        ({**OFT, "places": ["activation"]}, "places must name one or more projections"),
        ({**OFT, "places": ["query", "query"]}, "none of them twice"),
        ({"a-b": OFT}, "peft.a-b: the name of a tuner has letters"),
        ({"a": {"r": 4}}, "peft.a: type must be PEFT's name"),
        ({**OFT, "options": {}}, "options of OFT cannot name 'options'"),
        ({**OFT, "label": "x"}, "options of OFT cannot name 'label'"),
        ({**OFT, "act": object()}, "act must be a plain value"),
        ({**OFT, "act": {"inner": [1, object()]}}, "act must be a plain value"),
        ({**OFT, "act": {1: "a number as a name"}}, "act must be a plain value"),
        ({**dict[Any, Any](OFT), 3: 4}, "options of OFT cannot name 3"),
    ],
)
def test_a_mistake_is_named(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve({"preset": "lora", "peft": value})


def test_a_tuner_may_be_at_every_projection() -> None:
    places: tuple[Place, ...] = ("query", "value", "key", "attention", "up", "down", "gate")
    assert PeftTermConfig(type="OFT", places=places).places == places


def test_every_plain_value_is_an_option() -> None:
    options: dict[str, Any] = {
        "a": None,
        "b": False,
        "c": 0,
        "d": 0.5,
        "e": "",
        "f": [],
        "g": {},
        "h": {"i": [1, {"j": None}]},
    }
    config = resolve({"preset": "lora", "peft": {"type": "OFT", **options}})
    assert config.to_dict()["peft"] == {"type": "OFT", **options}


PLACED = "places, layers and the parts of a method say where a term is"
OBJECT = "it needs an object of PEFT's, and a method holds plain values"
HEAD = "train_head says whether the head trains"
NOT_SET: dict[str, str] = {
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"), PLACED),
    **dict.fromkeys(("target_parameters", "layer_replication", "ensure_weight_tying"), PLACED),
    **dict.fromkeys(("modules_to_save", "trainable_token_indices"), HEAD),
    **dict.fromkeys(("use_bdlora", "megatron_core", "megatron_config", "loftq_config", "corda_config"), OBJECT),
    "alora_invocation_tokens": "the term would have to read the tokens of the text",
    "fan_in_fan_out": "it is set by the projection",
}
"""Options of PEFT's LoRA that a method cannot set."""


@pytest.mark.parametrize("option", NOT_SET)
def test_an_option_that_a_method_cannot_set_is_refused_with_the_reason(option: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_tuner(PeftTermConfig(type="LORA", options={option: None}))
    assert str(caught.value) == f"peft_lora: a method cannot set {option} of PEFT's LORA: {NOT_SET[option]}"


def test_the_options_that_are_offered_can_be_set() -> None:
    with pytest.raises(ConfigError, match="has no option 'zzz'; its options are ") as caught:
        check_tuner(PeftTermConfig(type="LORA", options={"zzz": 1}))
    offered = str(caught.value).partition("its options are ")[2].split(", ")
    assert {"r", "lora_alpha"} <= {*offered}
    assert not {*offered} & {*NOT_SET}


def test_every_refused_name_is_one_of_pefts() -> None:
    """A name with a mistake would refuse nothing."""
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    options = {item.name for cls in PEFT_TYPE_TO_CONFIG_MAPPING.values() for item in dataclasses.fields(cls)}
    assert set(NOT_SET) <= options
    assert set(peft_types._RESERVED) <= options
    types = {kind.value for kind in PeftType}
    assert set(peft_types.REFUSED) - {"UNIPELT"} <= types, "this package itself adds UNIPELT"
    for kind, defaults in peft_types.DEFAULTS.items():
        cls = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]
        assert set(defaults) <= {item.name for item in dataclasses.fields(cls)}


@pytest.mark.parametrize("kind", peft_types.REFUSED)
def test_a_type_that_cannot_be_a_term_is_refused_with_the_reason(kind: str) -> None:
    with pytest.raises(ConfigError, match=f"PEFT's {kind} cannot be a submodule: ") as caught:
        check_tuner(PeftTermConfig(type=kind))
    assert peft_types.REFUSED[kind] in str(caught.value)


def test_pefts_configuration_of_a_tuner() -> None:
    ia3 = PeftTermConfig(type="IA3", places=("value", "down", "key"), options={"feedforward_modules": ["down", "key"]})
    made = peft_config(ia3, {"value": ["v_proj", "v"], "down": ["down_proj"], "up": ["up_proj"]})
    assert set(made.target_modules) == {"v_proj", "v", "down_proj"}
    assert set(made.feedforward_modules) == {"down_proj"}
    alone = PeftTermConfig(type="IA3", places=("value", "down"), options={"feedforward_modules": "down"})
    assert set(peft_config(alone, {"down": ["down_proj"]}).feedforward_modules) == {"down_proj"}
    assert set(peft_config(PeftTermConfig(type="IA3"), {}).feedforward_modules) == set()
    assert not peft_config(PeftTermConfig(type="FROD"), {}).progressbar
    assert peft_config(PeftTermConfig(type="LORA", options={"bias": "none"}), {}).bias == "none"
    with pytest.raises(ConfigError, match="peft_lora: bias must be none; bitfit: true trains the biases of the base"):
        check_tuner(PeftTermConfig(type="LORA", options={"bias": "all"}))
    with pytest.raises(ConfigError) as caught:
        check_tuner(PeftTermConfig(type="IA3", options={"feedforward_modules": ["value", "down"]}))
    assert str(caught.value) == ("peft_ia3: feedforward_modules names places here, out of query, value, not 'down'")


def run_settings(**method: Any) -> RunSettings:
    return RunSettings(task="rte", method={"preset": "lora", **method}, glue_dir="glue")


def test_a_run_checks_the_options_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_settings(peft=OFT).config.part("peft_oft").options == {"oft_block_size": 4}
    with pytest.raises(SettingsError, match="has no option 'block'"):
        run_settings(peft={"type": "OFT", "block": 4})
    with pytest.raises(SettingsError, match="has no type 'OTF'"):
        run_settings(peft={"type": "OTF"})
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SettingsError, match=r"pip install 'unipelt\[peft\]'"):
        run_settings(peft=OFT)


def test_a_method_may_be_a_text_in_json() -> None:
    told = RunSettings(task="rte", method='{"preset": "lora", "peft": {"type": "OFT"}}', glue_dir="glue")
    assert told.config == resolve({"preset": "lora", "peft": {"type": "OFT"}})
    with pytest.raises(SettingsError, match="cannot read the mapping"):
        RunSettings(task="rte", method='{"preset": "lora", ', glue_dir="glue")
