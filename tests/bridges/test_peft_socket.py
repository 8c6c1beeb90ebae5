"""Type UNIPELT in PEFT: its verbs over families and methods, in the manner of PEFT's own tests."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from helpers import shake
from hub_server import only_hub
from peft_in_transformers import skip_where_adapters_are_lost, skip_where_peft_is_refused
from tiny import ENCODER_DECODERS, WITHOUT_INTERFACE, tiny_batch, tiny_model
from torch import Tensor

import unipelt
from unipelt import from_peft, to_peft
from unipelt.bridges.peft_socket.register import TYPE, find_problem
from unipelt.injection.state import injection_of
from unipelt.pack import Pack

peft = pytest.importorskip("peft", minversion="0.21")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # asked by PEFT
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
]
SIZES: dict[str, dict[str, Any]] = {
    "adapter": {"bottleneck": 6},
    "prefix": {"length": 4, "hidden": 10},
    "lora": {"rank": 3, "alpha": 5.0},
}
METHODS: dict[str, dict[str, Any]] = {
    "unipelt-apl": {"preset": "unipelt-apl", **SIZES},
    "unipelt-ap": {"preset": "unipelt-ap", "adapter": SIZES["adapter"], "prefix": SIZES["prefix"]},
    "adapter": {"preset": "adapter", "adapter": SIZES["adapter"]},
    "prefix": {"preset": "prefix", "prefix": SIZES["prefix"]},
    "lora": {"preset": "lora", "lora": SIZES["lora"]},
    "dora": {"preset": "lora", "lora": {**SIZES["lora"], "decomposed": True}},
    "pissa": {"preset": "lora", "lora": {**SIZES["lora"], "start": "pissa"}},
    "every projection": {"preset": "lora", "lora": {**SIZES["lora"], "places": "all-linear"}},
    "ia3": {"preset": "ia3"},
    "gated lora and ia3": {"preset": "unipelt-al", "ia3": {}, "adapter": SIZES["adapter"], "lora": SIZES["lora"]},
    "compacter": {"preset": "compacter", "compacter": {"bottleneck": 4, "terms": 2}},
    "shared gates": {"preset": "unipelt-apl", **SIZES, "gate": {"shared": True}},
    "prompt": {"preset": "prompt", "prompt": {"length": 3}},
}
FAMILIES = {"bert": "SEQ_CLS", "bart": "SEQ_2_SEQ_LM", "gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}
CASES = [
    pytest.param(
        family,
        method,
        marks=[]
        if method in ("unipelt-apl", "lora") or (family, method) == ("llama", "every projection")
        else [pytest.mark.slow],
    )
    for family in FAMILIES
    for method in METHODS
    if not (method == "prompt" and family in ENCODER_DECODERS)
    and not (family in WITHOUT_INTERFACE and "prefix" in METHODS[method])
    and not (family == "t5" and method == "unipelt-ap")  # as apl
]
every = pytest.mark.parametrize(("family", "method"), CASES)
WHOLE = [family for family in FAMILIES if family not in WITHOUT_INTERFACE]
"""Families that take every submodule."""


def base_model(family: str, **options: Any) -> Any:
    return tiny_model(family, **options)


def config(family: str, method: str = "unipelt-apl", **options: Any) -> Any:
    return unipelt.PeftConfig(METHODS[method], task_type=FAMILIES[family], **options)


def peft_model(family: str, method: str = "unipelt-apl", seed: int = 1, **options: Any) -> Any:
    torch.manual_seed(0)
    model = peft.get_peft_model(base_model(family), config(family, method, **options))
    shake(model, seed=seed)
    return model.eval()


def logits(model: Any, family: str, rows: slice = slice(None), **options: Any) -> Tensor:
    batch = {name: value[rows] for name, value in tiny_batch(family).items()}
    with torch.no_grad():
        found: Tensor = model(**batch, **options).logits
    return found


def named(model: Any, text: str = "") -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if text in name}


def assert_came_back(loaded: Any, model: Any, family: str) -> None:
    """Every tensor bit for bit; the logits but for rounding.

    Tensors that are read without a copy lie otherwise in a line of memory, and some processors split sums by that.
    """
    got, want = (
        {
            name.removeprefix("base_model.model.").replace(".named.", ".default."): tensor
            for name, tensor in named(one).items()
            if ".default." in name or ".named." in name
        }
        for one in (loaded, model)
    )
    assert got.keys() == want.keys()
    assert all(torch.equal(tensor, want[name]) for name, tensor in got.items())
    torch.testing.assert_close(logits(loaded, family), logits(model, family), atol=1e-5, rtol=1e-5)


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[str], Any]:
    """Loads a base from a folder of its own."""

    def load(family: str, **options: Any) -> Any:
        if not (tmp_path / family).exists():
            base_model(family).save_pretrained(tmp_path / family)
        model = base_model(family)
        return type(model).from_pretrained(tmp_path / family, **options).eval()

    return load


# The type


def test_the_type_is_entered_once() -> None:
    unipelt.register_with_peft()
    unipelt.register_with_peft()
    types = [kind.value for kind in peft.PeftType]
    assert types.count(TYPE) == 1
    assert peft.PeftType(TYPE) is peft.PeftType.UNIPELT is peft.PeftType["UNIPELT"]
    assert unipelt.PeftConfig("lora").peft_type == "UNIPELT"


@pytest.mark.parametrize("version", ["0.20.0", "0.7.1"])
def test_an_older_peft_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft, "__version__", version)
    with pytest.raises(ImportError, match=rf"does not know PEFT {version}: it is older than 0.21"):
        unipelt.register_with_peft()


@pytest.mark.parametrize(
    "path", ["tuners.tuners_utils.BaseTuner._remove_adapter_name_from_key", "utils.other.ModulesToSaveWrapper"]
)
def test_a_peft_that_is_built_otherwise_is_refused(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    holder = peft
    *steps, last = path.split(".")
    for step in steps:
        holder = getattr(holder, step)
    monkeypatch.delattr(holder, last)
    assert last in str(find_problem(peft))
    with pytest.raises(ImportError, match="does not know PEFT"):
        unipelt.register_with_peft()


def test_registering_that_fails_leaves_peft_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    from unipelt.bridges.peft_socket import register

    monkeypatch.setattr(register, "TYPE", "UNIPELT_TRIAL")

    def refuse(**_: Any) -> None:
        raise KeyError("no")

    monkeypatch.setattr(peft.utils, "register_peft_method", lambda name, config_cls, model_cls, prefix: refuse())
    before = list(peft.PeftType)
    with pytest.raises(KeyError):
        register.register(object, object)
    assert list(peft.PeftType) == before
    assert not hasattr(peft.PeftType, "UNIPELT_TRIAL")
    with pytest.raises(ValueError, match="UNIPELT_TRIAL"):
        peft.PeftType("UNIPELT_TRIAL")


def test_the_core_does_not_import_peft() -> None:
    names = "unipelt.inject, unipelt.Tasks, unipelt.register_with_peft"
    code = f"import sys, unipelt; {names}; assert 'peft' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_peft_the_message_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['peft'] = None\nimport unipelt\n"
        "try: unipelt.PeftConfig\nexcept ImportError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "this needs PEFT, which is not installed: pip install 'unipelt[peft]'"


def test_a_configuration_pickles_into_a_process_that_knows_nothing() -> None:
    packed = pickle.dumps(unipelt.PeftConfig("lora", task_type="SEQ_CLS"))
    code = f"import pickle; print(pickle.loads({packed!r}).peft_type.value)"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == TYPE


@pytest.mark.parametrize("method", METHODS)
def test_a_configuration_comes_back_from_its_file(method: str, tmp_path: Path) -> None:
    wrote = unipelt.PeftConfig(METHODS[method], task_type="SEQ_CLS", modules_to_save=["classifier"])
    wrote.save_pretrained(tmp_path)
    read = peft.PeftConfig.from_pretrained(tmp_path)
    assert type(read) is unipelt.PeftConfig
    assert read == wrote
    assert read.unipelt == unipelt.resolve(METHODS[method])


def test_an_unknown_key_of_a_newer_file_is_left_out_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="invented"):
        read = peft.PeftConfig.from_peft_type(
            peft_type=TYPE, method={"preset": "lora"}, invented=1, task_type="SEQ_CLS"
        )
    assert (read.unipelt, read.task_type) == (unipelt.resolve("lora"), "SEQ_CLS")


# A set in a model


@every
def test_a_set_computes_what_inject_computes(family: str, method: str) -> None:
    model = peft_model(family, method)
    torch.manual_seed(0)
    injected = unipelt.inject(base_model(family), METHODS[method])
    shake(injected)
    assert torch.equal(logits(model, family), logits(injected, family))
    assert not torch.equal(logits(model, family), logits(base_model(family), family))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    count = sum(parameter.numel() for parameter in injected.parameters() if parameter.requires_grad)
    assert model.get_nb_trainable_parameters()[0] == count
    assert all(".unipelt.default." in name or "modules_to_save" in name for name in trained)


@every
def test_a_saved_set_comes_back(family: str, method: str, tmp_path: Path) -> None:
    model = peft_model(family, method)
    want = logits(model, family)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    loaded = peft.PeftModel.from_pretrained(base_model(family), tmp_path)
    assert torch.equal(logits(loaded, family), want)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert named(loaded).keys() == named(model).keys()
    lean = peft.PeftModel.from_pretrained(base_model(family), tmp_path, low_cpu_mem_usage=True)
    assert_came_back(lean, model, family)
    again = peft.PeftModel.from_pretrained(base_model(family), tmp_path, is_trainable=True)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert [name for name, parameter in again.named_parameters() if parameter.requires_grad] == trained


@every
def test_saved_names_do_not_say_which_set(family: str, method: str, tmp_path: Path) -> None:
    from safetensors import safe_open

    peft_model(family, method).save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert file.keys()
        assert not [name for name in file.keys() if "default" in name.split(".")]  # noqa: SIM118


@every
def test_a_set_is_loaded_under_another_name(family: str, method: str, tmp_path: Path) -> None:
    model = peft_model(family, method)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base_model(family), tmp_path, adapter_name="other")
    assert torch.equal(logits(loaded, family), logits(model, family))
    loaded.load_adapter(tmp_path, "third")
    loaded.set_adapter("third")
    assert torch.equal(logits(loaded, family), logits(model, family))


@every
def test_disabled_it_is_the_base(family: str, method: str) -> None:
    model = peft_model(family, method)
    want, base = logits(model, family), logits(base_model(family), family)
    trained = [parameter.requires_grad for parameter in model.parameters()]
    with model.disable_adapter():
        assert torch.equal(logits(model, family), base)
        assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "unipelt" in name)
    assert torch.equal(logits(model, family), want)
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert torch.equal(logits(model, family), want)


@every
def test_a_second_set_is_apart(family: str, method: str) -> None:
    model = peft_model(family, method)
    want = logits(model, family)
    model.add_adapter("rte", config(family, "lora"))
    assert torch.equal(logits(model, family), want)
    model.set_adapter("rte")
    shake(model, seed=5)
    assert all("default" not in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    assert not torch.equal(logits(model, family), want)
    model.set_adapter("default")
    assert torch.equal(logits(model, family), want)
    model.delete_adapter("rte")
    assert torch.equal(logits(model, family), want)
    assert not named(model, ".rte.")
    assert model.active_adapters == ["default"]


@every
def test_deleting_the_active_set_activates_another(family: str, method: str) -> None:
    model = peft_model(family, method)
    model.add_adapter("rte", config(family, "lora"))
    want = logits(model, family)
    model.set_adapter("rte")
    model.delete_adapter("rte")
    assert torch.equal(logits(model, family), want)
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("rte")


@every
def test_rows_compute_with_their_own_sets(family: str, method: str) -> None:
    model = peft_model(family, method)
    model.add_adapter("rte", config(family, "lora"))
    model.set_adapter("rte")
    shake(model, seed=5)
    names = ["rte", "default", "__base__"]
    singles = []
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                singles.append(logits(model, family)[row])
        else:
            model.set_adapter(name)
            singles.append(logits(model, family)[row])
    if method == "prompt":
        with pytest.raises(ValueError, match="the prompt of 'default' makes its texts longer"):
            logits(model, family, adapter_names=names)
        return
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        batch = {name: value[order] for name, value in tiny_batch(family).items()}
        with torch.no_grad():
            got = model(**batch, adapter_names=[names[row] for row in order]).logits
        torch.testing.assert_close(got, torch.stack([singles[row] for row in order]), atol=1e-5, rtol=1e-5)
    again = model(**tiny_batch(family), adapter_names=["rte", "default", "rte"]).logits[::2]
    model.set_adapter("rte")
    torch.testing.assert_close(again, logits(model, family)[::2], atol=1e-5, rtol=1e-5)


@every
def test_a_step_changes_what_trains_and_nothing_else(family: str, method: str) -> None:
    model = peft_model(family, method).train()
    injected = to_peft(unipelt.inject(base_model(family), METHODS[method]), task_type=FAMILIES[family])
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert [name for name, parameter in injected.named_parameters() if parameter.requires_grad] == trained
    before = named(model)
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)
    model(**tiny_batch(family)).logits.square().mean().backward()
    optimizer.step()
    changed = {name for name, value in named(model).items() if not torch.equal(value, before[name])}
    assert changed <= set(trained)
    assert len(changed) > 0.5 * len(trained)


@every
def test_a_model_becomes_a_peft_model_and_back(family: str, method: str, tmp_path: Path) -> None:
    model = unipelt.inject(base_model(family), METHODS[method])
    shake(model)
    want, base = logits(model, family), logits(base_model(family), family)
    counts = unipelt.parameter_counts(model)
    parameters = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    wrapped = to_peft(model, task_type=FAMILIES[family])
    assert torch.equal(logits(wrapped, family), want)
    assert {id(parameter) for parameter in wrapped.parameters() if parameter.requires_grad} == parameters
    assert unipelt.parameter_counts(wrapped) == counts
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped, family), base)
    with unipelt.disable(wrapped):
        assert torch.equal(logits(wrapped, family), base)
    wrapped.save_pretrained(tmp_path / "peft")
    loaded = peft.PeftModel.from_pretrained(base_model(family), tmp_path / "peft")
    assert torch.equal(logits(loaded, family), want)
    back = from_peft(wrapped)
    assert back is model
    assert torch.equal(logits(back, family), want)
    assert {id(parameter) for parameter in back.parameters() if parameter.requires_grad} == parameters
    unipelt.save(back, tmp_path / "ours")
    assert torch.equal(logits(unipelt.load(base_model(family), tmp_path / "ours"), family), want)
    assert unipelt.parameter_counts(back) == counts
    assert torch.equal(logits(unipelt.remove(back), family), base)
    assert named(back).keys() == named(base_model(family)).keys()


@every
def test_a_folder_of_pefts_becomes_one_of_ours(family: str, method: str, tmp_path: Path) -> None:
    model = peft_model(family, method)
    model.save_pretrained(tmp_path / "peft")
    loaded = from_peft(peft.PeftModel.from_pretrained(base_model(family), tmp_path / "peft"))
    unipelt.save(loaded, tmp_path / "ours")
    ours = unipelt.load(base_model(family), tmp_path / "ours")
    assert torch.equal(logits(ours, family), logits(model, family))
    assert torch.equal(logits(to_peft(ours), family), logits(model, family))


@every
def test_unloading_leaves_the_base(family: str, method: str) -> None:
    model = peft_model(family, method)
    before = {name: value for name, value in named(base_model(family)).items() if "classifier" not in name}
    unloaded = model.unload()
    after = named(unloaded)
    assert after.keys() >= before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not [name for name, _ in unloaded.named_modules() if "unipelt" in name]
    unloaded.train()(**tiny_batch(family))


@every
def test_merging(family: str, method: str) -> None:
    model = peft_model(family, method)
    want = logits(model, family)
    if method not in ("lora", "pissa", "every projection"):
        with pytest.raises(ValueError, match="these cannot be merged into weights: "):
            model.merge_and_unload()
        assert torch.equal(logits(model, family), want)
        return
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged) is type(base_model(family))
    assert named(merged).keys() == named(base_model(family)).keys()
    torch.testing.assert_close(logits(merged, family), want, atol=1e-5, rtol=1e-4)


@every
def test_a_copy_is_another_model(family: str, method: str) -> None:
    model = peft_model(family, method)
    want = logits(model, family)
    other = copy.deepcopy(model)
    shake(other, seed=9)
    assert not torch.equal(logits(other, family), want)
    assert torch.equal(logits(model, family), want)


@every
def test_gates_are_recorded(family: str, method: str) -> None:
    model = peft_model(family, method)
    injected = unipelt.inject(base_model(family), METHODS[method])
    injected.load_state_dict(from_peft(copy.deepcopy(model)).state_dict())
    try:
        with unipelt.record_gates(injected) as want:
            logits(injected, family)
    except ValueError:
        with pytest.raises(ValueError, match="no gates"), unipelt.record_gates(model):
            pass
        return
    with unipelt.record_gates(model) as got:
        logits(model, family)
    assert list(got) == list(want)
    assert all(torch.equal(got[name], want[name]) for name in want)


# Folders of ours and of PEFT's

AUTO = {
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
}


def in_folder(family: str, folder: Path) -> Any:
    """The class of a base, which lies in a folder."""
    base_model(family).save_pretrained(folder / "base")
    return type(base_model(family))


@every
def test_our_loader_opens_a_folder_of_pefts(family: str, method: str, tmp_path: Path) -> None:
    cls = in_folder(family, tmp_path)
    model = peft.get_peft_model(cls.from_pretrained(tmp_path / "base"), config(family, method)).eval()
    shake(model)
    model.save_pretrained(tmp_path / "out")
    want = unipelt.save(from_peft(copy.deepcopy(model)), tmp_path / "same")
    loaded = unipelt.load(base_model(family), tmp_path / "out")
    whole = unipelt.from_pretrained(tmp_path / "out")
    assert type(whole) is cls
    elsewhere = unipelt.from_pretrained(tmp_path / "out", base=tmp_path / "base")
    kept = unipelt.load(base_model(family), want)
    for one in (loaded, whole, elsewhere):
        assert named(one).keys() == named(kept).keys()
        assert all(torch.equal(value, named(kept)[name]) for name, value in named(one).items())
        assert injection_of(one).head == injection_of(kept).head
        assert unipelt.parameter_counts(one) == unipelt.parameter_counts(kept)
    torch.testing.assert_close(logits(whole, family), logits(model, family), atol=1e-5, rtol=1e-5)
    base = type(whole).from_pretrained(tmp_path / "base")
    assert named(unipelt.remove(whole)).keys() == named(base).keys()


@pytest.mark.parametrize("deploy", [False, True])
@every
def test_peft_opens_a_folder_of_ours(family: str, method: str, deploy: bool, tmp_path: Path) -> None:
    cls = in_folder(family, tmp_path)
    model = unipelt.inject(cls.from_pretrained(tmp_path / "base"), METHODS[method]).eval()
    shake(model)
    unipelt.save(model, tmp_path / "out", peft=True, deploy=deploy)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    unipelt.register_with_peft()
    assert "whole configuration is in `adapter_config.json`" in (tmp_path / "out" / "README.md").read_text()
    loaded = peft.PeftModel.from_pretrained(cls.from_pretrained(tmp_path / "base"), tmp_path / "out").eval()
    torch.testing.assert_close(logits(loaded, family), logits(model, family), atol=1e-5, rtol=1e-5)
    auto = getattr(peft, AUTO[FAMILIES[family]]).from_pretrained(tmp_path / "out")
    ours = unipelt.from_pretrained(tmp_path / "out")
    unipelt.save(model, tmp_path / "same", deploy=deploy)
    kept = named(unipelt.load(base_model(family), tmp_path / "same"))
    for one in (from_peft(loaded), from_peft(auto), ours):
        assert named(one).keys() == kept.keys()
        assert all(torch.equal(value, kept[name]) for name, value in named(one).items())


@every
def test_both_write_the_same_folder(family: str, method: str, tmp_path: Path) -> None:
    model = peft_model(family, method)
    model.save_pretrained(tmp_path / "pefts")
    back: Any = from_peft(model)
    back.save_pretrained(tmp_path / "ours", peft=True)
    pefts, ours = (
        (
            json.loads((tmp_path / name / "adapter_config.json").read_text()),
            safetensors.torch.load_file(tmp_path / name / "adapter_model.safetensors"),
        )
        for name in ("pefts", "ours")
    )
    assert pefts[1].keys() == ours[1].keys()
    assert all(torch.equal(value, ours[1][name]) for name, value in pefts[1].items())
    assert isinstance(ours[0]["modules_to_save"] or [], list)
    for fields in (pefts[0], ours[0]):
        fields["modules_to_save"] = sorted(set(fields["modules_to_save"] or ()) - {"score", "classifier"})  # PEFT's own
        fields.pop("peft_version", None)
    assert pefts[0] == ours[0]


@pytest.mark.parametrize("trains", [True, False])
def test_a_folder_says_its_base_without_a_task(trains: bool, tmp_path: Path) -> None:
    cls = in_folder("bert", tmp_path)
    method = {**METHODS["lora"], "train_head": trains}
    model = peft.get_peft_model(cls.from_pretrained(tmp_path / "base"), unipelt.PeftConfig(method)).eval()
    shake(model)
    model.save_pretrained(tmp_path / "pefts")
    ours = unipelt.from_pretrained(tmp_path / "pefts")
    torch.testing.assert_close(logits(ours, "bert"), logits(model, "bert"), atol=1e-5, rtol=1e-5)
    assert injection_of(ours).head == {"classifier.weight", "classifier.bias"}
    unipelt.save(ours, tmp_path / "ours", peft=True)
    auto = peft.AutoPeftModel if not trains else peft.AutoPeftModelForSequenceClassification
    again = auto.from_pretrained(tmp_path / "ours").eval()
    torch.testing.assert_close(logits(again, "bert"), logits(model, "bert"), atol=1e-5, rtol=1e-5)


def test_a_set_of_another_name_is_opened_in_its_own_folder(tmp_path: Path) -> None:
    model = peft_model("bert")
    model.add_adapter("rte", config("bert", "lora"))
    model.set_adapter("rte")
    shake(model, seed=5)
    model.save_pretrained(tmp_path)
    loaded = unipelt.load(base_model("bert"), tmp_path / "rte")
    assert torch.equal(logits(loaded, "bert"), logits(model, "bert"))


def test_a_module_that_trains_beside_the_head_comes_along(tmp_path: Path) -> None:
    model = peft_model("bert", modules_to_save=["pooler"])
    model.save_pretrained(tmp_path)
    loaded = unipelt.load(base_model("bert"), tmp_path)
    assert torch.equal(logits(loaded, "bert"), logits(model, "bert"))
    assert injection_of(loaded).unfrozen == {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    with pytest.raises(ValueError, match=r"pooler.dense.bias is kept beside the head, and PEFT cannot carry it"):
        unipelt.save(loaded, tmp_path / "out", peft=True)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"pooler.dense.bias trains beside the head, and PEFT cannot carry it; freeze"):
        to_peft(loaded)


def test_our_loader_refuses_other_folders_of_pefts(tmp_path: Path) -> None:
    method = peft.LoraConfig(task_type="SEQ_CLS")
    peft.get_peft_model(base_model("bert"), method).save_pretrained(tmp_path / "lora")
    rows = peft_model("bert", trainable_token_indices={"word_embeddings": [5]})
    rows.save_pretrained(tmp_path / "rows")
    peft_model("bert").save_pretrained(tmp_path / "pickle", safe_serialization=False)
    peft_model("bert").save_pretrained(tmp_path / "whole")
    for name, text in (
        ("lora", r"peft_type is 'LORA', not UNIPELT; unipelt\.load_peft reads"),
        ("rows", r"trainable_token_indices"),
        ("pickle", r"adapter_model\.bin, a pickle, which is not read"),
    ):
        model = base_model("bert")
        with pytest.raises(unipelt.CheckpointError, match=text):
            unipelt.load(model, tmp_path / name)
        assert named(model).keys() == named(base_model("bert")).keys()
    fields = json.loads((tmp_path / "whole" / "adapter_config.json").read_text())
    for changed, text in (
        ({"method": {"invented": 1}}, "adapter_config.json cannot be read: .*invented"),
        ({"method": 3}, "method must be a mapping, not 3"),
        ({"head": "classifier"}, "head must be a list"),
        ({"deployed": None}, "deployed must be true or false, not None"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path must be a text, not 3"),
        ({"revision": 3}, "revision must be a text, not 3"),
        ({"task_type": 3}, "task_type must be a text, not 3"),
        ({"auto_mapping": "BertModel"}, "auto_mapping must be a mapping, not 'BertModel'"),
        ({"method": unipelt.resolve("lora").to_dict()}, "does not fit"),
    ):
        (tmp_path / "whole" / "adapter_config.json").write_text(json.dumps({**fields, **changed}))
        with pytest.raises(unipelt.CheckpointError, match=text):
            unipelt.load(base_model("bert"), tmp_path / "whole")
    (tmp_path / "whole" / "adapter_model.safetensors").write_bytes(b"x" * 30)
    (tmp_path / "whole" / "adapter_config.json").write_text(json.dumps(fields))
    with pytest.raises(unipelt.CheckpointError, match="not a valid safetensors file"):
        unipelt.load(base_model("bert"), tmp_path / "whole")


def test_a_base_of_a_folder_that_cannot_be_had(tmp_path: Path) -> None:
    peft_model("bert").save_pretrained(tmp_path)
    with pytest.raises(unipelt.CheckpointError, match="built in memory"):
        unipelt.from_pretrained(tmp_path)
    with pytest.raises(unipelt.CheckpointError, match=r"cannot be had: .*; say base="):
        unipelt.from_pretrained(tmp_path, base=tmp_path / "nothing")
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    for mapping in (
        None,
        {"base_model_class": "Popen", "parent_library": "subprocess"},
        {"base_model_class": "AutoTokenizer", "parent_library": "transformers"},
    ):
        changed = {**fields, "task_type": None, "auto_mapping": mapping}
        (tmp_path / "adapter_config.json").write_text(json.dumps(changed))
        with pytest.raises(unipelt.CheckpointError, match="does not say which class of transformers"):
            unipelt.from_pretrained(tmp_path, base=tmp_path)


def test_what_pefts_form_cannot_hold_is_refused(tmp_path: Path) -> None:
    for method, text in ((METHODS["lora"], "was folded"), ("bitfit", "no place for a second value")):
        model = unipelt.inject(base_model("bert"), method)
        if method != "bitfit":
            unipelt.fold(model, [])
        with pytest.raises(ValueError, match=text):
            unipelt.save(model, tmp_path / "out", peft=True)
        assert not (tmp_path / "out").exists()
    model = unipelt.inject(base_model("bert"), METHODS["lora"])
    unipelt.save(model, tmp_path / "ours")
    with pytest.raises(ValueError, match="holds a checkpoint of unipelt's own form"):
        unipelt.save(model, tmp_path / "ours", peft=True)
    assert not (tmp_path / "ours" / "adapter_config.json").exists()


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_peft_model_goes_to_the_hub_and_comes_back(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with only_hub(monkeypatch, tmp_path) as hub:
        cls = in_folder(family, tmp_path)
        files = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
        commit = hub.publish("owner/tiny", files)
        model = peft.get_peft_model(cls.from_pretrained("owner/tiny"), config(family)).eval()
        shake(model)
        model.push_to_hub("somebody/adapter")
        repository = hub.repositories["somebody/adapter"]
        assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(
            repository.commits[repository.branches["main"]]
        )
        loaded = peft.PeftModel.from_pretrained(cls.from_pretrained("owner/tiny"), "somebody/adapter")
        assert_came_back(loaded, model, family)
        assert_came_back(getattr(peft, AUTO[FAMILIES[family]]).from_pretrained("somebody/adapter"), model, family)
        ours = unipelt.from_pretrained("somebody/adapter")
        kept = named(from_peft(copy.deepcopy(model)))
        assert all(torch.equal(value, kept[name]) for name, value in named(ours).items())
        # a folder of ours in PEFT's form says where its base is, at which commit
        unipelt.save(ours, tmp_path / "out", peft=True)
        fields = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert (fields["base_model_name_or_path"], fields["revision"]) == ("owner/tiny", commit)
        named_files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        hub.publish("somebody/ours", named_files)
        assert_came_back(getattr(peft, AUTO[FAMILIES[family]]).from_pretrained("somebody/ours"), model, family)
        model.push_to_hub("somebody/adapter", revision="try", create_pr=True)
        assert "refs/pr/1" in repository.branches


# Our verbs on a PeftModel


def refusals(folder: Path) -> dict[str, Callable[[Any], Any]]:
    return {
        "save": lambda model: unipelt.save(model, folder),
        "push_to_hub": lambda model: unipelt.push_to_hub(model, "user/name"),
        "remove": unipelt.remove,
        "merge": unipelt.merge,
        "save_peft": lambda model: unipelt.save_peft(model, folder),
        "release_state_dict": unipelt.release_state_dict,
        "Pack": lambda model: Pack(model, 7),
        "to_peft": to_peft,
    }


@pytest.mark.parametrize("holder", ["PeftModel", "Transformers"])
@pytest.mark.parametrize("verb", refusals(Path()))
def test_verbs_that_need_an_injected_model_say_what_to_call(verb: str, holder: str, tmp_path: Path) -> None:
    model = peft_model("bert", "lora") if holder == "PeftModel" else base_model("bert").eval()
    if holder == "Transformers":
        skip_where_peft_is_refused()
        model.add_adapter(config("bert", "lora"))
        shake(model)
    before, want = named(model), logits(model, "bert")
    with pytest.raises(ValueError, match=r"call model = unipelt\.from_peft\(model\) first"):
        refusals(tmp_path / "out")[verb](model)
    assert named(model).keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in named(model).items())
    assert not (tmp_path / "out").exists()
    back = from_peft(model)
    assert torch.equal(logits(back, "bert"), want)
    unipelt.save(back, tmp_path / "out")


def test_tasks_take_what_from_peft_gives_as_a_task(tmp_path: Path) -> None:
    model = peft_model("bert")
    with pytest.raises(unipelt.InjectionError, match=r"unipelt\.from_peft\(model\) gives, and load it as a task"):
        unipelt.Tasks(model)
    model.save_pretrained(tmp_path / "pefts")
    tasks = unipelt.Tasks(base_model("bert").eval())
    with pytest.raises(FileNotFoundError, match=r"PEFT's: save \(unipelt\.save\) what unipelt\.load makes of it"):
        tasks.load("rte", tmp_path / "pefts")
    want = logits(model, "bert")
    unipelt.save(from_peft(model), tmp_path / "ours")
    tasks.load("rte", tmp_path / "ours")
    assert torch.equal(logits(tasks["rte"], "bert"), want)


@pytest.mark.parametrize("name", ["default", "rte"])
def test_parameters_are_counted_and_grouped(name: str) -> None:
    model = peft.get_peft_model(base_model("bert"), config("bert"), adapter_name=name)
    injected = unipelt.inject(base_model("bert"), METHODS["unipelt-apl"])
    assert unipelt.parameter_counts(model) == unipelt.parameter_counts(injected)
    got, want = (unipelt.parameter_groups(one, lr=1e-3, gate=1e-2, head=1e-4) for one in (model, injected))

    def shape(groups: list[dict[str, Any]]) -> list[Any]:
        return [
            (one["name"], one["lr"], one["weight_decay"], sum(each.numel() for each in one["params"])) for one in groups
        ]

    assert sorted(shape(got)) == sorted(shape(want))


# Transformers


@pytest.fixture
def _reads_adapters(family: str) -> None:
    skip_where_adapters_are_lost(family)


@pytest.mark.usefixtures("_reads_adapters")
@every
def test_transformers_finds_and_loads_a_folder(family: str, method: str, tmp_path: Path) -> None:
    base_model(family).save_pretrained(tmp_path / "base")
    cls = type(base_model(family))
    torch.manual_seed(0)
    model = peft.get_peft_model(cls.from_pretrained(tmp_path / "base"), config(family, method)).eval()
    shake(model)
    model.save_pretrained(tmp_path / "out")
    assert_came_back(cls.from_pretrained(tmp_path / "out").eval(), model, family)
    auto = getattr(peft, AUTO[FAMILIES[family]])
    assert_came_back(auto.from_pretrained(tmp_path / "out").eval(), model, family)
    plain = cls.from_pretrained(tmp_path / "base").eval()
    plain.load_adapter(str(tmp_path / "out"), adapter_name="named")
    assert_came_back(plain, model, family)


@pytest.mark.usefixtures("_reads_adapters")
@every
def test_transformers_own_verbs(family: str, method: str, tmp_path: Path, folder: Any) -> None:
    model = folder(family)
    base = logits(model, family)
    model.add_adapter(unipelt.PeftConfig(METHODS[method]))
    shake(model)
    want = logits(model, family)
    assert not torch.equal(want, base)
    model.add_adapter(unipelt.PeftConfig(METHODS["lora"]), "second")
    shake(model, seed=4)
    assert not torch.equal(logits(model, family), want)
    model.set_adapter("default")
    assert torch.equal(logits(model, family), want)
    model.delete_adapter("second")
    assert torch.equal(logits(model, family), want)
    assert model.active_adapters() == ["default"]
    model.save_pretrained(tmp_path / "out")
    assert_came_back(type(model).from_pretrained(tmp_path / "out").eval(), model, family)
    model.disable_adapters()
    assert torch.equal(logits(model, family), base)


# Heads, types, text


def test_a_pooler_that_started_at_random_trains_with_the_head(tmp_path: Path) -> None:
    base = tiny_model("bert", "MaskedLM")  # without a pooler
    base.save_pretrained(tmp_path)
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    wrapped = peft.get_peft_model(model, config("bert"))
    assert {name.rpartition("modules_to_save")[0] for name in named(wrapped, "modules_to_save")} == {
        "base_model.model.bert.pooler.dense.",
        "base_model.model.classifier.",
    }


@pytest.mark.parametrize("family", ["bart", "t5", "llama"])
def test_the_head_of_a_classifier_trains_and_travels(family: str, tmp_path: Path) -> None:
    base = tiny_model(family, "SequenceClassification")
    method = unipelt.PeftConfig(METHODS["lora"], task_type="SEQ_CLS")
    batch = {name: value for name, value in tiny_batch(family).items() if "decoder" not in name}
    model = peft.get_peft_model(base, method).eval()
    shake(model)
    assert named(model, "modules_to_save")
    with torch.no_grad():
        want = model(**batch).logits
        model.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(tiny_model(family, "SequenceClassification"), tmp_path)
        assert torch.equal(loaded(**batch).logits, want)


def test_further_modules_are_saved(tmp_path: Path) -> None:
    model = peft_model("bert", modules_to_save=["pooler"])
    assert named(model, "pooler.modules_to_save.default")
    model.save_pretrained(tmp_path)
    assert torch.equal(
        logits(peft.PeftModel.from_pretrained(base_model("bert"), tmp_path), "bert"), logits(model, "bert")
    )


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_rows_of_the_embeddings_train(family: str, tmp_path: Path) -> None:
    name = {"bert": "word_embeddings", "llama": "embed_tokens"}[family]
    model = peft_model(family, trainable_token_indices={name: [5, 7]})
    want = logits(model, family)
    assert named(model, "token_adapter.trainable_tokens_delta")
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(base_model(family), tmp_path), family), want)


@pytest.mark.parametrize("family", WHOLE)
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_what_trains_is_float32_over_half_precision(family: str, kind: torch.dtype, tmp_path: Path) -> None:
    model = peft.get_peft_model(base_model(family).to(kind), config(family))
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    shake(model)
    want = logits(model.eval(), family)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base_model(family).to(kind), tmp_path)
    assert torch.equal(logits(loaded, family), want)
    base = peft.get_peft_model(
        base_model(family).to(kind),
        unipelt.PeftConfig({**METHODS["lora"], "dtype": "base"}, task_type=FAMILIES[family]),
    )
    assert {parameter.dtype for parameter in base.parameters() if parameter.requires_grad} == {kind}


def test_a_merged_head_has_the_type_of_its_base() -> None:
    model = peft.get_peft_model(base_model("bert").to(torch.bfloat16), config("bert", "lora")).eval()
    shake(model)
    merged = model.merge_and_unload()
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    logits(merged, "bert")


@pytest.mark.parametrize("family", [family for family in WHOLE if family != "bert"])
@pytest.mark.parametrize("beams", [1, 2])
def test_rows_of_several_sets_generate(family: str, beams: int) -> None:
    model = peft_model(family)
    model.add_adapter("rte", config(family, "lora"))
    model.set_adapter("rte")
    shake(model, seed=5, std=0.5)
    batch = {
        name: value for name, value in tiny_batch(family, lengths=(7, 7, 7), tokens=7).items() if "decoder" not in name
    }
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": beams, "pad_token_id": 1}
    names = ["rte", "default", "rte"]
    rows = []
    for row, name in enumerate(names):
        model.set_adapter(name)
        rows.append(model.generate(**batch, **options)[row])
    got = model.generate(**batch, **options, adapter_names=names)
    assert torch.equal(got, torch.stack(rows))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", WHOLE)
def test_gradient_checkpointing_gives_the_same_gradients(family: str, reentrant: bool) -> None:
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        base = base_model(family)
        if checkpointed:
            enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
            enable({"use_reentrant": reentrant})
        model = peft.get_peft_model(base, config(family)).train()
        shake(model)
        options = {} if family == "bert" else {"use_cache": False}
        model(**tiny_batch(family), **options).logits.square().mean().backward()
        gradients.append({name: one.grad for name, one in model.named_parameters() if one.requires_grad})
    for name, want in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], want, msg=name)


def test_embeddings_may_be_given() -> None:
    model = peft_model("llama")
    batch = tiny_batch("llama")
    embeds = model.get_input_embeddings()(batch["input_ids"])
    with torch.no_grad():
        got = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
    assert torch.equal(got, logits(model, "llama"))


# Folding


def test_folding_a_peft_model_and_unloading_it(tmp_path: Path) -> None:
    method = {"preset": "unipelt-al", "adapter": None, "lora": SIZES["lora"]}
    model = peft.get_peft_model(base_model("bert"), unipelt.PeftConfig(method, task_type="SEQ_CLS")).eval()
    shake(model, std=0.02)
    report = unipelt.fold(model, [tiny_batch("bert")], tolerance=0.5)
    assert report.merged == 6
    folded = logits(model, "bert")
    unfolded: dict[str, Callable[[], Any]] = {
        "save_pretrained": lambda: model.save_pretrained(tmp_path),
        "add_adapter": lambda: model.add_adapter("rte", config("bert", "lora")),
        "delete_adapter": lambda: model.delete_adapter("default"),
        "unload": model.unload,
        "adapter_names=": lambda: logits(model, "bert", adapter_names=["__base__"] * 3),
        "disable_adapter": lambda: model.disable_adapter().__enter__(),
    }
    for name, verb in unfolded.items():
        with pytest.raises(ValueError, match=f"this set was folded, and {name} needs the base's own weights"):
            verb()
    with pytest.raises(ValueError, match="this set was folded"), unipelt.disable(model):
        pass
    assert torch.equal(logits(model, "bert"), folded)
    other = from_peft(copy.deepcopy(model))
    unipelt.save(other, tmp_path / "ours")
    assert torch.equal(logits(unipelt.load(base_model("bert"), tmp_path / "ours"), "bert"), folded)
    assert torch.equal(logits(unipelt.remove(other), "bert"), logits(base_model("bert"), "bert"))
    merged = model.merge_and_unload()
    assert torch.equal(logits(merged, "bert"), folded)
    assert named(merged).keys() == named(base_model("bert")).keys()


@pytest.mark.parametrize("names", [["rte"], ["default", "rte"]])
def test_folding_takes_one_set(names: list[str]) -> None:
    model = peft.get_peft_model(base_model("bert"), config("bert"), adapter_name=names[0]).eval()
    for name in names[1:]:
        model.add_adapter(name, config("bert", "lora"))
    shake(model, std=0.02)
    before = named(model)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(unipelt.FoldError, match=r"one set, called 'default', and this has rte; delete .*from_peft"):
        unipelt.fold(model, [tiny_batch("bert")], tolerance=0.5)
    assert all(torch.equal(value, before[name]) for name, value in named(model).items())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    for name in names[:-1]:
        model.delete_adapter(name)
    assert unipelt.fold(from_peft(model), [tiny_batch("bert")], tolerance=0.5).merged == 6


# Refusals


@pytest.mark.parametrize("preset", ["bitfit", "fine-tuning"])
def test_methods_that_train_the_base_are_refused(preset: str) -> None:
    model = base_model("bert")
    before = named(model)
    with pytest.raises(ValueError, match="PEFT has no place for a second value"):
        peft.get_peft_model(model, unipelt.PeftConfig(preset, task_type="SEQ_CLS"))
    assert named(model).keys() == before.keys()
    assert not hasattr(model, "unipelt_injection")


@pytest.mark.parametrize("name", ["adapter", "encoder", "entry", "a.b", "modules_to_save", "layer", "0"])
def test_names_that_peft_would_take_for_others_are_refused(name: str) -> None:
    model = base_model("bert")
    with pytest.raises(ValueError, match="a set cannot be called"):
        peft.get_peft_model(model, config("bert"), adapter_name=name)
    assert torch.equal(logits(model, "bert"), logits(base_model("bert"), "bert"))


def test_two_sets_at_a_time_are_refused() -> None:
    model = peft_model("bert")
    model.add_adapter("rte", config("bert"))
    with pytest.raises(ValueError, match="one set of unipelt computes at a time"):
        model.base_model.set_adapter(["default", "rte"])


def test_rows_of_unknown_sets_and_in_training_are_refused() -> None:
    model = peft_model("bert")
    with pytest.raises(ValueError, match="there is no set 'rte'"):
        logits(model, "bert", adapter_names=["rte", "default", "default"])
    with pytest.raises(ValueError, match="evaluation mode"):
        logits(model.train(), "bert", adapter_names=["default"] * 3)


def test_another_method_on_an_injected_model_is_refused() -> None:
    model = unipelt.inject(base_model("bert"), METHODS["lora"])
    want = logits(model, "bert")
    with pytest.raises(ValueError, match="carries another method already"):
        peft.get_peft_model(model, config("bert"))
    assert torch.equal(logits(model, "bert"), want)


def test_a_model_of_two_sets_does_not_become_an_injected_one() -> None:
    model = peft_model("bert")
    model.add_adapter("rte", config("bert", "lora"))
    with pytest.raises(ValueError, match="with one set, and this has default, rte"):
        from_peft(model)


def test_merging_in_a_way_that_can_be_undone_is_refused() -> None:
    with pytest.raises(ValueError, match="merges for good"):
        peft_model("bert", "lora").merge_adapter()
