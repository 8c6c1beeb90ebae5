"""`examples/encoder.py` as far as it goes without sentence-transformers, and `inject` on a model that holds a model.

`tests/bridges/test_peft_packages.py` trains an encoder.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import encoder
import pytest
import torch
from helpers import assert_same, tiny_bert, what_is_there
from tiny_task import write_glue
from torch import nn

import unipelt
from unipelt.hosts.locate import InjectionError


class Pooling(nn.Module):
    """A stand-in for a `SentenceTransformer`: a sequence of modules, the first of which holds a model."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"auto_model": tiny_bert().bert})


class WithAdapters(Pooling):
    def add_adapter(self, config: Any) -> None:
        raise AssertionError("it is only named")


def test_inject_says_which_model_is_inside() -> None:
    model = Pooling()
    inner: Any = model.get_submodule("encoder.auto_model")
    before = what_is_there(inner)
    message = "not Pooling; inject the BertModel in it, model.get_submodule('encoder.auto_model')"
    with pytest.raises(InjectionError) as caught:
        unipelt.inject(model)  # type: ignore[arg-type]
    assert str(caught.value).endswith(message)
    assert_same(what_is_there(inner), before)
    with pytest.raises(InjectionError, match=r"or call its method add_adapter\(unipelt.PeftConfig\(...\)\), which"):
        unipelt.inject(WithAdapters())  # type: ignore[arg-type]
    unipelt.inject(inner)  # as it was told
    with pytest.raises(InjectionError, match=r"not Linear$"):
        unipelt.inject(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(InjectionError, match=r"not str$"):
        unipelt.inject("bert-base-uncased")  # type: ignore[arg-type]


def test_the_socket_says_which_model_is_inside() -> None:
    peft = pytest.importorskip("peft", minversion="0.21")
    with pytest.raises(
        InjectionError, match=r"inject the BertModel in it, model.get_submodule\('encoder.auto_model'\)"
    ):
        peft.inject_adapter_in_model(unipelt.PeftConfig("unipelt-apl"), Pooling())


def test_a_package_that_is_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    monkeypatch.setitem(sys.modules, "peft", sys.modules.get("peft", sys))
    assert encoder.main(["--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.strip() == (
        "encoder.py: a sentence encoder needs the package sentence_transformers; install the extra 'encoder' (pip "
        "install -e '.[encoder]')"
    )
    assert list(tmp_path.iterdir()) == []


def test_pairs_of_glue_and_of_a_file(tmp_path: Path) -> None:
    glue = write_glue(tmp_path / "glue", rows=12)
    train, dev = encoder.load_pairs(str(glue), None, None)
    assert (len(train), len(dev)) == (12, 20)
    assert tuple(train.column_names) == encoder.COLUMNS
    assert set(train["score"]) == {0.5, 4.25}
    for first, second, label in (("sentence1", "sentence2", "score"), ("query", "found", "label")):
        file = tmp_path / f"{label}.csv"
        file.write_text(f'{first},{second},{label}\n"one, two",three,1\nfour,five,0.25\n')
        train, dev = encoder.load_pairs(None, str(file), str(file), (first, second), label)
        assert train[0] == {"sentence1": "one, two", "sentence2": "three", "score": 1.0}
        assert dev["score"][1] == 0.25


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ((None, None, None), "give --data, a folder with GLUE's data, or --train_file and --dev_file"),
        (("glue", "a.csv", "a.csv"), "but not both"),
        ((None, "a.csv", None), "or --train_file and --dev_file"),
        (
            (None, "one.csv", "one.csv"),
            "a pair has two texts, and the data have only sentence; give --text_columns A B",
        ),
        ((None, "absent.csv", "absent.csv"), "absent.csv"),
    ],
)
def test_data_that_are_no_pairs(
    named: tuple[str | None, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("one.csv").write_text("sentence,score\none,0.5\ntwo,1.5\n")
    with pytest.raises((ValueError, OSError), match=message):
        encoder.load_pairs(named[0], named[1], named[2])


def test_spearman_of_cosines() -> None:
    vectors = {"a": [1.0, 0.0], "b": [0.8, 0.6], "c": [0.0, 1.0], "d": [0.6, 0.8]}

    class Model:
        def encode(self, texts: list[str], **options: Any) -> Any:
            assert options["normalize_embeddings"]
            return torch.tensor([vectors[text] for text in texts]).numpy()

    pairs = {"sentence1": ["a", "a", "a", "a"], "sentence2": ["a", "b", "d", "c"], "score": [5.0, 4.0, 3.0, 0.0]}
    assert encoder.spearman(Model(), pairs, 2) == pytest.approx(1.0)
    assert encoder.spearman(Model(), {**pairs, "score": [0.0, 3.0, 4.0, 5.0]}, 2) == pytest.approx(-1.0)


def test_an_encoder_that_is_there_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(encoder, "need_packages", lambda: None)
    assert encoder.main(["--data", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "is there already; choose another --out, or remove it" in capsys.readouterr().err
