"""The cache of a task's data: each row is encoded once, and comes back in the order that was asked for."""

from __future__ import annotations

import numpy as np
from datasets import Dataset, DatasetDict

from unipelt.glue.corpus import Corpus, Tokens
from unipelt.glue.data import fingerprint
from unipelt.glue.tasks import TASKS

TEXTS = Dataset.from_dict({"sentence": list("abcdefg"), "label": [0, 1, 0, 1, 0, 1, 0]})


def test_a_row_is_encoded_once_and_found_again() -> None:
    encoded: list[str] = []

    def encode(rows: Dataset) -> Dataset:
        encoded.extend(rows["sentence"])
        return Dataset.from_dict({"input_ids": [[ord(text)] for text in rows["sentence"]]})

    tokens = Tokens(TEXTS, encode)

    def found(*rows: int) -> str:
        return "".join(chr(ids[0]) for ids in tokens.of(np.array(rows, dtype=np.int64))["input_ids"])

    assert found() == ""
    assert found(4, 1) == "eb"
    assert found(1, 6, 4, 2) == "bgec", "two of them are new"
    assert found(2, 4) == "ce", "none of them is new"
    assert "".join(encoded) == "ebgc"
    assert [chr(ids[0]) for ids in tokens.of()["input_ids"]] == list("abcdefg")
    assert sorted(encoded) == list("abcdefg")


def test_what_was_made_is_made_once_for_each_key() -> None:
    corpus = Corpus(TASKS["cola"], DatasetDict({"train": TEXTS, "dev": TEXTS.select([1, 0])}))
    made: list[str] = []

    def make() -> str:
        made.append("again")
        return f"number {len(made)}"

    assert [corpus.cached(key, make) for key in ("one", "one", ("one", 2), "one")] == ["number 1"] * 2 + [
        *("number 2", "number 1")
    ]
    assert corpus.texts("dev", labelled=False).column_names == ["sentence"]
    for split, rows in corpus.splits.items():
        for _ in range(2):
            assert corpus.fingerprint(split) == fingerprint(rows)
            assert corpus.fingerprint(split, labelled=False) == fingerprint(rows.select_columns("sentence"))
    assert len({corpus.fingerprint(*part) for part in (("train",), ("dev",), ("train", False), ("dev", False))}) == 4
