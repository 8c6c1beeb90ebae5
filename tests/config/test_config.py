"""Configurations: presets, every form that `resolve` takes, and what is refused, by name."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_bert
from hypothesis import given, settings
from hypothesis import strategies as st

import unipelt
from unipelt import (
    PRESETS,
    AdapterConfig,
    ConfigError,
    GateConfig,
    HoulsbyConfig,
    LoRAConfig,
    PrefixConfig,
    UniPELTConfig,
    resolve,
)
from unipelt.config.schema import LARGEST, convert, flatten

PARTS: dict[str, dict[str, Any]] = {
    "adapter": {"bottleneck": 48},
    "prefix": {"length": 10, "hidden": 512, "gating": "scale"},
    "lora": {"rank": 8, "alpha": 16.0},
}
REST = {
    "bitfit": False,
    "gate": {"pooling": "masked_mean"},
    "train_head": True,
    "train_base": False,
    "layers": None,
    "encoder": True,
    "decoder": True,
    "cross": True,
}
# preset -> (its submodules, whether they are gated, what else differs)
EXPECTED: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "fine-tuning": ("", False, {"train_base": True}),
    "bitfit": ("", False, {"bitfit": True}),
    "adapter": ("adapter", False, {}),
    "prefix": ("prefix", False, {}),
    "lora": ("lora", False, {}),
    "unipelt-ap": ("adapter prefix", True, {}),
    "unipelt-apl": ("adapter prefix lora", True, {}),
    "unipelt-al": ("adapter lora", True, {}),
    "unipelt-pl": ("prefix lora", True, {}),
    "unipelt-ap-nogate": ("adapter prefix", False, {}),
    "unipelt-apl-nogate": ("adapter prefix lora", False, {}),
    "unipelt-al-nogate": ("adapter lora", False, {}),
    "unipelt-pl-nogate": ("prefix lora", False, {}),
}


FURTHER: dict[str, dict[str, Any]] = {
    "ia3": {"gate": True, "places": ("key", "value", "activation")},
    "red": {"gate": True, "places": ("down",)},
    "houlsby": {"gate": True, "places": ("attention", "down"), "bottleneck": 48, "activation": "relu"},
    "parallel": {"gate": True, "places": ("feed_forward",), "bottleneck": 512, "scale": 4.0, "activation": "relu"},
    "compacter": {
        "gate": True,
        "places": ("attention", "down"),
        "bottleneck": 24,
        "terms": 4,
        "rank": 1,
        "activation": "gelu",
    },
    "ln_tuning": {"gate": True, "places": ("norm",)},
    "reft": {
        "gate": True,
        "places": ("layer",),
        "rank": 4,
        "variant": "loreft",
        "positions": "ends",
        "first": 7,
        "last": 0,
    },
}
EXPECTED["unipelt"] = (
    "",
    True,
    {
        "adapter": {**PARTS["adapter"], "gate": True, "start": "zero"},
        "prefix": {**PARTS["prefix"], "gate": True, "softmax": "own"},
        "lora": {**PARTS["lora"], "gate": True},
    },
)
EXPECTED["prompt"] = ("", False, {"prompt": {"length": 20}})
EXPECTED |= {name: ("", False, {name: {**part, "gate": False}}) for name, part in FURTHER.items()}
for _name, _gate in (("mam", False), ("unipelt-mam", True)):
    _long = {**PARTS["prefix"], "length": 30, "gate": _gate}
    EXPECTED[_name] = ("", _gate, {"prefix": _long, "parallel": {**FURTHER["parallel"], "gate": _gate}})


def contents(preset: str) -> dict[str, Any]:
    there, gate, changes = EXPECTED[preset]
    parts = {name: {**part, "gate": gate} if name in there.split() else None for name, part in PARTS.items()}
    return copy.deepcopy({**parts, **REST, **changes})


def test_there_are_these_presets_and_no_more() -> None:
    assert set(PRESETS) == set(EXPECTED)


@pytest.mark.parametrize("preset", EXPECTED)
def test_a_preset_holds_exactly(preset: str) -> None:
    config = resolve(preset)
    assert config.to_dict() == contents(preset)
    assert config is PRESETS[preset]
    assert config.has_submodules is (preset not in ("fine-tuning", "bitfit"))


def test_presets_and_configurations_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        PRESETS["lora"] = PRESETS["bitfit"]  # type: ignore[index]
    config = UniPELTConfig()
    for part in (config, config.adapter, config.prefix, config.lora, config.gate):
        for field in dataclasses.fields(part):  # type: ignore[arg-type]
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(part, field.name, None)
    assert len({config, UniPELTConfig(), resolve("unipelt-ap")}) == 2, "equal configurations hash alike"


def test_the_defaults_are_the_papers_full_method() -> None:
    assert UniPELTConfig() == resolve("unipelt-apl") == resolve({}) == UniPELTConfig.from_dict({})


def test_every_form_resolves(tmp_path: Path) -> None:
    config = UniPELTConfig(adapter=AdapterConfig(7, gate=False), lora=None, layers=(1, 2))
    values = config.to_dict()
    assert resolve(config) is config
    assert resolve(values) == config
    (tmp_path / "a.json").write_text(json.dumps(values))
    assert resolve(tmp_path / "a.json") == config
    assert resolve(str(tmp_path / "a.json")) == config
    text = "adapter: {bottleneck: 7, gate: false}\nlora: null\nlayers: [2, 1]\n"
    for name in ("a.yaml", "a.yml"):
        (tmp_path / name).write_text(text)
        assert resolve(tmp_path / name) == config
        assert resolve(str(tmp_path / name)) == config


def test_a_file_may_hold_differences_from_a_preset(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("preset: unipelt-ap\nprefix:\n  length: 50\ngate: {pooling: mean}\n")
    expected = contents("unipelt-ap")
    expected["prefix"]["length"] = 50
    expected["gate"]["pooling"] = "mean"
    assert resolve(tmp_path / "a.yaml").to_dict() == expected
    assert resolve("unipelt-ap").to_dict() == contents("unipelt-ap"), "the preset itself stays as it was"


def test_differences_keep_what_they_do_not_name() -> None:
    config = resolve({"preset": "unipelt-apl-nogate", "lora": {"rank": 4}, "train_head": False, "adapter": None})
    expected = contents("unipelt-apl-nogate")
    expected["lora"]["rank"] = 4
    assert config.to_dict() == {**expected, "train_head": False, "adapter": None}
    # a part that the preset has not got starts from its own defaults
    assert resolve({"preset": "lora", "adapter": {"bottleneck": 3}}).adapter == AdapterConfig(3)
    assert resolve({"preset": "bitfit", "prefix": {}}).prefix == PrefixConfig()
    assert resolve({"preset": "bitfit"}) == PRESETS["bitfit"]
    assert resolve({"preset": None, "lora": None}) == UniPELTConfig(lora=None)


def test_resolve_and_updated_leave_their_arguments_alone() -> None:
    values: dict[str, Any] = {"preset": "unipelt-ap", "adapter": {"bottleneck": 3}}
    before = json.dumps(values)
    resolve(values)
    assert json.dumps(values) == before
    config = UniPELTConfig()
    assert config.updated({"lora": LoRAConfig(2), "prefix": None}) == UniPELTConfig(lora=LoRAConfig(2), prefix=None)
    assert config.updated({}) == config == UniPELTConfig()


def test_plain_types_become_the_fields_types() -> None:
    config = UniPELTConfig.from_dict({"lora": {"alpha": 5}, "layers": [3, 0]})
    assert isinstance(config.lora, LoRAConfig)
    assert type(config.lora.alpha) is float
    assert config.layers == (0, 3), "layers are a set: sorted, so that equal choices are equal"
    assert UniPELTConfig(layers=[3, 0]).layers == (0, 3)  # type: ignore[arg-type]
    for layers, meant in ((range(1, 4), (1, 2, 3)), ("1-3", (1, 2, 3)), ("2-2", (2,)), ("all", None), (None, None)):
        assert UniPELTConfig.from_dict({"layers": layers}).layers == meant
        assert UniPELTConfig(layers=layers).layers == meant  # type: ignore[arg-type]
    assert type(LoRAConfig(alpha=5).alpha) is float
    assert UniPELTConfig(adapter={"bottleneck": 3}).adapter == AdapterConfig(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("part", "values"),
    [
        *(("gate", {"pooling": pooling}) for pooling in ("mean", "token", "static")),
        ("gate", {"shared": True, "activation": "softmax"}),
        ("gate", {"pooling": "token", "network": "mlp"}),
        ("gate", {"network": "transformer"}),
        ("gate", {"start": 0.01, "dropout": 0.99}),
        ("gate", {"start": 0.99}),
        ("gate", {"activation": "tanh", "start": -0.99}),
        ("gate", {"activation": "tanh", "start": 0.99}),
        ("lora", {"places": ("query", "value", "key", "attention", "up", "down", "gate"), "dropout": 0.99}),
        *(("lora", {"mixture": {"experts": experts}}) for experts in (2, 64)),
        *(("lora", {"mixture": {"top_k": top_k}}) for top_k in (1, 4)),
        ("lora", {"mixture": {"router": "example", "top_k": 3, "balance": 1000.0}}),
        ("tokens", {"ids": (0, 7)}),
    ],
    ids=str,
)
def test_values_at_their_limits_are_allowed(part: str, values: dict[str, Any]) -> None:
    written = resolve({"preset": "lora", part: values}).to_dict()[part]
    assert flatten(values).items() <= flatten(written).items()


def test_fields_by_position_are_those_of_the_class() -> None:
    """`mixture` came later, and takes no position."""
    config = HoulsbyConfig(False, ("down",), 5, "tanh")
    assert config == HoulsbyConfig(gate=False, places=("down",), bottleneck=5, activation="tanh")
    assert config.mixture is None
    assert config.bottleneck == 5


def test_one_text_stands_for_a_tuple_of_texts() -> None:
    assert convert(tuple[str, ...], "text", "columns") == ("text",)
    assert convert(tuple[str, ...], ["text"], "columns") == ("text",)
    assert convert(tuple[str, ...] | None, "all", "columns") == ("all",), "it means None among indices only"
    with pytest.raises(ConfigError, match="columns must be a list, not 3"):
        convert(tuple[str, ...], 3, "columns")


def test_the_largest_size_is_allowed_and_the_next_is_not() -> None:
    assert AdapterConfig(LARGEST).bottleneck == LARGEST
    assert LoRAConfig(alpha=LARGEST).alpha == LARGEST
    with pytest.raises(ConfigError, match="bottleneck must be at most 1,000,000"):
        AdapterConfig(LARGEST + 1)


def test_nested_mappings_as_one() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": []}, "e": None}) == {"a.b.c": 1, "a.d": [], "e": None}


sizes = st.integers(1, 4096)
configurations = st.builds(
    UniPELTConfig,
    adapter=st.none() | st.builds(AdapterConfig, sizes, st.booleans()),
    prefix=st.none() | st.builds(PrefixConfig, sizes, sizes, st.booleans(), st.sampled_from(["scale", "mass"])),
    lora=st.none() | st.builds(LoRAConfig, sizes, st.floats(1e-6, 1e4), st.booleans()),
    bitfit=st.booleans(),
    gate=st.builds(GateConfig, st.sampled_from(["masked_mean", "mean"])),
    train_head=st.booleans(),
    train_base=st.booleans(),
    layers=st.none() | st.sets(st.integers(0, 30), min_size=1).map(tuple),
)


@given(configurations)
@settings(max_examples=60, deadline=None)
def test_a_configuration_survives_json(config: UniPELTConfig) -> None:
    again = UniPELTConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)


# what is given -> what the message must say
REFUSED: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"adaptor": {}}, ("'adaptor'", "did you mean 'adapter'?")),
    ({"adapter": {"bottelneck": 3}}, ("'adapter.bottelneck'", "did you mean 'bottleneck'?")),
    ({"gate": {"pool": "mean"}}, ("'gate.pool'", "pooling")),
    ({"lora": {"size": 3}}, ("'lora.size'", "rank, alpha, gate")),
    ({1: 2}, ("'1'",)),  # type: ignore[dict-item]
    ({"adapter": 48}, ("adapter", "mapping", "48")),
    ({"adapter": True}, ("adapter", "mapping", "True")),
    ({"adapter": [1]}, ("adapter", "mapping", "[1]")),
    ({"gate": None}, ("gate", "mapping", "None")),
    ({"adapter": {"bottleneck": "48"}}, ("adapter.bottleneck", "whole number", "'48'")),
    ({"adapter": {"bottleneck": 48.0}}, ("adapter.bottleneck", "whole number", "48.0")),
    ({"adapter": {"bottleneck": True}}, ("adapter.bottleneck", "whole number", "True")),
    ({"adapter": {"bottleneck": None}}, ("adapter.bottleneck", "whole number", "None")),
    ({"adapter": {"bottleneck": 0}}, ("adapter.bottleneck", "above 0")),
    ({"adapter": {"gate": 1}}, ("adapter.gate", "true or false", "1")),
    ({"adapter": {"gate": "no"}}, ("adapter.gate", "true or false", "'no'")),
    ({"prefix": {"length": -1}}, ("prefix.length", "above 0", "-1")),
    ({"prefix": {"hidden": 0}}, ("prefix.hidden", "above 0")),
    ({"prefix": {"gating": "mas"}}, ("prefix.gating", "scale or mass", "'mas'")),
    ({"prefix": {"gating": None}}, ("prefix.gating", "None")),
    ({"prefix": {"gating": ["scale"]}}, ("prefix.gating", "['scale']")),
    ({"prefix": {"softmax": "none"}}, ("prefix.softmax", "shared or own", "'none'")),
    ({"prefix": {"softmax": "own", "gating": "mass"}}, ("softmax of its own", "no mass", "leave gating out")),
    ({"lora": {"rank": 0}}, ("lora.rank", "above 0")),
    ({"lora": {"rank": 8.5}}, ("lora.rank", "whole number", "8.5")),
    ({"lora": {"alpha": 0}}, ("lora.alpha", "above 0")),
    ({"lora": {"alpha": -1.0}}, ("lora.alpha", "above 0")),
    ({"lora": {"alpha": "16"}}, ("lora.alpha", "finite number", "'16'")),
    ({"lora": {"alpha": False}}, ("lora.alpha", "finite number", "False")),
    ({"lora": {"alpha": float("nan")}}, ("lora.alpha", "finite number", "nan")),
    ({"lora": {"alpha": float("inf")}}, ("lora.alpha", "finite number", "inf")),
    ({"lora": {"alpha": 10**400}}, ("lora.alpha",)),
    ({"lora": {"alpha": -(10**400)}}, ("lora.alpha", "finite number")),
    ({"adapter": {"bottleneck": 10**12}}, ("adapter.bottleneck",)),
    ({"prefix": {"length": 10**30}}, ("prefix.length",)),
    ({"lora": {"rank": 2**63}}, ("lora.rank",)),
    ({"gate": {"pooling": "max"}}, ("gate.pooling", "masked_mean or mean", "'max'")),
    ({"bitfit": 1}, ("bitfit", "true or false")),
    ({"train_head": "yes"}, ("train_head", "true or false", "'yes'")),
    ({"train_base": None}, ("train_base", "true or false", "None")),
    ({"layers": 3}, ("layers", "list", "3")),
    ({"layers": "01"}, ("layers", "list", "'01'")),
    ({"layers": []}, ("layers", "non-empty")),
    ({"layers": [-1]}, ("layers", "from 0", "-1")),
    ({"layers": [0, 1, 0]}, ("layers", "twice")),
    ({"layers": [0, True]}, ("layers", "whole number", "True")),
    ({"layers": [0, "1"]}, ("layers", "whole number", "'1'")),
]


@pytest.mark.parametrize(("values", "said"), REFUSED, ids=[json.dumps(values)[:40] for values, _ in REFUSED])
def test_bad_values_are_refused_by_name(values: dict[str, Any], said: tuple[str, ...]) -> None:
    for given_values in (values, {"preset": "unipelt-apl", **values}):
        with pytest.raises(ConfigError) as caught:
            resolve(given_values)
        for word in said:
            assert word in str(caught.value), f"{word!r} is not in {str(caught.value)!r}"
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("build", "field"),
    [
        (lambda: AdapterConfig(bottleneck=0), "bottleneck"),
        (lambda: AdapterConfig(bottleneck=4.0), "bottleneck"),  # type: ignore[arg-type]
        (lambda: AdapterConfig(bottleneck=10**12), "bottleneck"),
        (lambda: AdapterConfig(gate=None), "gate"),  # type: ignore[arg-type]
        (lambda: PrefixConfig(length=True), "length"),
        (lambda: PrefixConfig(hidden="512"), "hidden"),  # type: ignore[arg-type]
        (lambda: PrefixConfig(gating="none"), "gating"),  # type: ignore[arg-type]
        (lambda: LoRAConfig(rank=-8), "rank"),
        (lambda: LoRAConfig(alpha=float("nan")), "alpha"),
        (lambda: LoRAConfig(alpha=10**400), "alpha"),
        (lambda: GateConfig(pooling="masked"), "pooling"),  # type: ignore[arg-type]
        (lambda: UniPELTConfig(adapter=PrefixConfig()), "adapter"),  # type: ignore[arg-type]
        (lambda: UniPELTConfig(gate=None), "gate"),  # type: ignore[arg-type]
        (lambda: UniPELTConfig(bitfit="no"), "bitfit"),  # type: ignore[arg-type]
        (lambda: UniPELTConfig(layers=()), "layers"),
        (lambda: UniPELTConfig(layers=(1, 1)), "layers"),
        (lambda: dataclasses.replace(UniPELTConfig(), train_head=3), "train_head"),  # type: ignore[arg-type]
    ],
)
def test_constructors_check_too(build: Any, field: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}\b"):
        build()


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("unipelt-alp", "unipelt-apl"),
        ("UniPELT-APL", "unipelt-apl"),
        ("unipelt_apl", "unipelt-apl"),
        ("lorra", "lora"),
        ("adaptor", "adapter"),
        ("finetuning", "fine-tuning"),
    ],
)
def test_a_misspelt_preset_is_told_the_one_that_was_meant(name: str, meant: str) -> None:
    model = tiny_bert()
    for make in (
        resolve,
        lambda name: resolve({"preset": name}),
        lambda name: unipelt.inject(model, name),
        lambda name: unipelt.PeftConfig(name),
    ):
        with pytest.raises(ConfigError) as caught:
            make(name)
        assert str(caught.value) == f"there is no preset {name!r}; did you mean {meant!r}?"


@pytest.mark.parametrize("preset", ["", "configs"])
def test_an_unknown_preset_is_told_the_presets(preset: str) -> None:
    for config in (preset, {"preset": preset}):
        with pytest.raises(ConfigError, match=re.escape(repr(preset))) as caught:
            resolve(config)
        assert all(name in str(caught.value) for name in EXPECTED)


@pytest.mark.parametrize("config", [None, 3, ["unipelt-apl"], AdapterConfig()])
def test_other_types_are_refused(config: Any) -> None:
    with pytest.raises(ConfigError, match=type(config).__name__):
        resolve(config)
    with pytest.raises(ConfigError, match="preset"):
        resolve({"preset": [config]})


BROKEN_FILES = {
    "half.json": b'{"adapter": {"bottleneck": 4',
    "empty.json": b"",
    "list.json": b'["unipelt-apl"]',
    "latin.json": '{"préset": "lora"}'.encode("latin-1"),
    "deep.json": b"[" * 100_000,
    "digits.json": b'{"layers": [' + b"1" * 5_000 + b"]}",
    "tab.yaml": b"adapter:\n\t- x\n",
    "empty.yaml": b"",
    "string.yaml": b"unipelt-apl\n",
    "numbers.yaml": b"1: 2\n",
    "two.yaml": b"preset: lora\n---\npreset: lora\n",
    "bytes.yaml": b"\xff\xfe\x00\x00",
    "python.yaml": b"adapter: !!python/object/apply:os.getcwd []\n",
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_a_broken_file_is_refused_by_its_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(BROKEN_FILES[name])
    with pytest.raises(ConfigError, match=re.escape(name)):
        resolve(tmp_path / name)


def test_numbers_of_a_file_are_checked_as_any(tmp_path: Path) -> None:
    for name, text in (("a.json", '{"lora": {"alpha": NaN}}'), ("b.json", '{"lora": {"alpha": 1e999}}')):
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match=r"lora\.alpha"):
            resolve(tmp_path / name)
    (tmp_path / "c.yaml").write_text("lora: {alpha: .inf}\n")
    with pytest.raises(ConfigError, match=r"lora\.alpha"):
        resolve(tmp_path / "c.yaml")


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", str(tmp_path / "none.yml"), tmp_path / "none", tmp_path, "lora.yaml"):
        with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
            resolve(path)


def test_a_file_that_cannot_be_opened_is_refused_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / f"{'a' * 300}.json"
    with pytest.raises(ConfigError, match=r"cannot be read: File name too long$"):
        resolve(path)


def test_a_bad_configuration_stops_injection_before_it_starts() -> None:
    with pytest.raises(ConfigError, match="adaptor"):
        unipelt.inject(None, {"adaptor": {}})  # type: ignore[arg-type]
