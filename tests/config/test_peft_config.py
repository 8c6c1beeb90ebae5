"""The key `peft` of a method: its forms, and what is refused without PEFT."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from unipelt import ConfigError, PeftTermConfig, UniPELTConfig, resolve
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
    ],
)
def test_a_mistake_is_named(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve({"preset": "lora", "peft": value})


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
