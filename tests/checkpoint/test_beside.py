"""`save_pretrained` of an injected model writes PEFT's form beside the library's own, where PEFT is installed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import MANIFEST, logits, shake, small, tiny_bert
from peft_in_transformers import skip_where_adapters_are_lost
from tiny import tiny_batch, tiny_model
from transformers import Trainer, TrainingArguments

import unipelt
from unipelt.checkpoint import bind, save
from unipelt.checkpoint.manifest import ADAPTER_CONFIG, ADAPTER_WEIGHTS, WEIGHTS

pytestmark = pytest.mark.filterwarnings("ignore")  # of PEFT, about names in Transformers
OWN = {MANIFEST, WEIGHTS, "README.md"}
PEFTS = {ADAPTER_CONFIG, ADAPTER_WEIGHTS}


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def made(folder: Path, method: Any = "unipelt-apl", seed: int = 1) -> Any:
    """An injected classifier on a base in that folder, whose trained parameters were moved."""
    if not folder.exists():
        tiny_bert().save_pretrained(folder)
    model = type(tiny_bert()).from_pretrained(folder)
    unipelt.inject(model, small(method) if isinstance(method, str) else method)
    shake(model, seed=seed)
    return model.eval()


def assert_near(got: Any, want: Any) -> None:
    """Check that outputs of two models with the same bits are the same; sums may be rounded otherwise."""
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


@pytest.fixture
def peft() -> Any:
    return pytest.importorskip("peft", minversion="0.21", reason="PEFT is not installed")


@pytest.mark.parametrize("method", ["unipelt-apl", "unipelt", "lora", "unipelt-mam"])
def test_every_reader_gives_the_same_model(method: str, peft: Any, tmp_path: Path) -> None:
    model = made(tmp_path / "base", method)
    want = logits(model)
    model.save_pretrained(tmp_path / "a")
    assert files(tmp_path / "a") == OWN | PEFTS
    assert torch.equal(logits(unipelt.from_pretrained(tmp_path / "a")), want)
    base = type(tiny_bert()).from_pretrained(tmp_path / "base")
    assert_near(logits(peft.PeftModel.from_pretrained(base, tmp_path / "a").eval()), want)


@pytest.mark.parametrize("family", ["bert", "bart", "llama"])
def test_transformers_opens_the_folder(family: str, peft: Any, tmp_path: Path) -> None:
    skip_where_adapters_are_lost(family)
    tiny_model(family).save_pretrained(tmp_path / "base")
    cls = type(tiny_model(family))
    model = cls.from_pretrained(tmp_path / "base")
    unipelt.inject(model, small("unipelt-apl"))
    shake(model)
    model.eval().save_pretrained(tmp_path / "a")
    again = cls.from_pretrained(tmp_path / "a").eval()
    batch = tiny_batch(family)
    with torch.no_grad():
        assert_near(again(**batch).logits, model(**batch).logits)


def test_both_forms_are_of_the_last_model(peft: Any, tmp_path: Path) -> None:
    made(tmp_path / "base", seed=1).save_pretrained(tmp_path / "a")
    other = made(tmp_path / "base", "unipelt-al", seed=2)
    other.save_pretrained(tmp_path / "a")
    base = type(tiny_bert()).from_pretrained(tmp_path / "base")
    assert_near(logits(peft.PeftModel.from_pretrained(base, tmp_path / "a").eval()), logits(other))
    assert torch.equal(logits(unipelt.from_pretrained(tmp_path / "a")), logits(other))


def test_save_leaves_no_form_of_an_older_model(peft: Any, tmp_path: Path) -> None:
    made(tmp_path / "base").save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "notes.txt").write_text("mine")
    unipelt.save(made(tmp_path / "base", seed=2), tmp_path / "a")
    assert files(tmp_path / "a") == OWN | {"notes.txt"}


def test_a_write_that_stops_leaves_no_form_of_another_model(
    peft: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = made(tmp_path / "base", seed=1), made(tmp_path / "base", seed=2)
    first.save_pretrained(tmp_path / "a")

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(save, "write_folder", full)
        with pytest.raises(OSError, match="no space"):
            second.save_pretrained(tmp_path / "a")
    assert files(tmp_path / "a") == OWN
    assert torch.equal(logits(unipelt.from_pretrained(tmp_path / "a")), logits(second))
    first.save_pretrained(tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr(save, "write_whole", full)
        with pytest.raises(OSError, match="no space"):
            second.save_pretrained(tmp_path / "a")
    assert files(tmp_path / "a") == OWN
    assert torch.equal(logits(unipelt.from_pretrained(tmp_path / "a")), logits(first))


@pytest.mark.parametrize("content", ['{"peft_type": "LORA"}', "no mapping", ""])
def test_an_adapter_of_another_type_is_not_overwritten(content: str, peft: Any, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / ADAPTER_CONFIG).write_text(content)
    with pytest.raises(FileExistsError, match="another adapter of PEFT's"):
        made(tmp_path / "base").save_pretrained(folder)
    assert files(folder) == {ADAPTER_CONFIG}
    assert (folder / ADAPTER_CONFIG).read_text() == content
    unipelt.save(made(tmp_path / "base"), folder)  # by name, and not in PEFT's form
    assert files(folder) == OWN | {ADAPTER_CONFIG}


def test_a_folder_of_pefts_alone_is_left_as_it_is(peft: Any, tmp_path: Path) -> None:
    unipelt.save(made(tmp_path / "base"), tmp_path / "a", peft=True)
    before = {name: (tmp_path / "a" / name).read_bytes() for name in PEFTS}
    unipelt.save(made(tmp_path / "base", seed=2), tmp_path / "a")
    assert {name: (tmp_path / "a" / name).read_bytes() for name in PEFTS} == before


@pytest.mark.parametrize("method", ["bitfit", "fine-tuning", {"preset": "unipelt-apl", "bitfit": True}], ids=str)
def test_what_peft_cannot_hold_has_one_form(method: Any, peft: Any, tmp_path: Path) -> None:
    model = made(tmp_path / "base", method)
    model.save_pretrained(tmp_path / "a")
    assert files(tmp_path / "a") == OWN
    assert torch.equal(logits(unipelt.from_pretrained(tmp_path / "a")), logits(model))


@pytest.mark.parametrize("missing", [True, False])
def test_without_a_known_peft_there_is_one_form(missing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing:
        monkeypatch.setattr(bind.importlib.util, "find_spec", lambda name: None)
    else:

        def unknown() -> None:
            raise ImportError("unipelt does not know this PEFT")

        pytest.importorskip("peft", reason="PEFT is not installed")
        monkeypatch.setattr(unipelt, "register_with_peft", unknown)
    made(tmp_path / "base").save_pretrained(tmp_path / "a")
    assert files(tmp_path / "a") == OWN


def test_checkpoints_of_a_trainer_have_one_form(peft: Any, tmp_path: Path) -> None:
    model = made(tmp_path / "base")
    rows = [{"input_ids": [1, 2, 3], "labels": 0}, {"input_ids": [3, 2, 1], "labels": 1}] * 2
    options: dict[str, Any] = {"report_to": "none", "use_cpu": True, "disable_tqdm": True}
    arguments = TrainingArguments(str(tmp_path / "out"), max_steps=1, save_strategy="steps", save_steps=1, **options)
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    found = files(tmp_path / "out" / "checkpoint-1")
    assert found >= {MANIFEST, WEIGHTS}
    assert not found & PEFTS
    trainer.save_model(str(tmp_path / "final"))
    assert not files(tmp_path / "final") & PEFTS


def test_the_deployed_form_is_kept(peft: Any, tmp_path: Path) -> None:
    model = made(tmp_path / "base")
    unipelt.save(model, tmp_path / "small", deploy=True)
    again = unipelt.from_pretrained(tmp_path / "small")
    again.save_pretrained(tmp_path / "a")
    assert json.loads((tmp_path / "a" / ADAPTER_CONFIG).read_text())["deployed"] is True
    base = type(tiny_bert()).from_pretrained(tmp_path / "base")
    assert_near(logits(peft.PeftModel.from_pretrained(base, tmp_path / "a").eval()), logits(again))


def test_the_form_of_pefts_needs_nothing_of_the_other(peft: Any, tmp_path: Path) -> None:
    """A copy of two files is a whole folder of PEFT's."""
    model = made(tmp_path / "base")
    model.save_pretrained(tmp_path / "a")
    (tmp_path / "b").mkdir()
    for name in PEFTS:
        shutil.copy(tmp_path / "a" / name, tmp_path / "b" / name)
    assert torch.equal(logits(unipelt.from_pretrained(tmp_path / "b")), logits(model))
