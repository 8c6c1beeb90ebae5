"""What runs of one process keep: each job is as by itself, and what changed on disk is read again."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import METHODS
from tiny_task import SMALL_BERT, make_quick, quick, save_model, write_glue, write_sentences
from transformers import BertForSequenceClassification

from unipelt.glue import job as jobs
from unipelt.glue import packed_run as seat
from unipelt.glue.corpus import Tokens
from unipelt.glue.job import Job, prepare
from unipelt.glue.settings import RunSettings
from unipelt.injection.parameters import kept_names
from unipelt.injection.state import injection_of
from unipelt.runs import cache as keep
from unipelt.runs.cache import SharedCache, files_in, same_memory, state_of
from unipelt.runs.errors import RunError

pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with train.tsv, dev.tsv, a model and GLUE."""
    write_glue(tmp_path / "glue")
    return make_quick(tmp_path)


def settings(home: Path, **changes: Any) -> RunSettings:
    if "task" in changes:
        changes |= {"glue_dir": str(home / "glue"), "train_file": None, "dev_file": None}
    return RunSettings(**quick(home, **{"train_samples": 20, "dev_samples": 12, **changes}))


def check_same(ours: Job, theirs: Job) -> None:
    assert ours.digest == theirs.digest
    assert ours.data == theirs.data
    assert ours.majority == theirs.majority
    assert ours.notes == theirs.notes
    assert ours.model_sha256 == theirs.model_sha256
    assert list(ours.splits) == list(theirs.splits)
    for name, split in theirs.splits.items():
        assert ours.splits[name].features == split.features
        assert ours.splits[name][:] == split[:], name
    assert ours.order.keys() == theirs.order.keys()
    for name, order in theirs.order.items():
        assert np.array_equal(ours.order[name], order), name
    check_same_weights(ours, theirs)


def check_same_weights(ours: Job, theirs: Job) -> None:
    mine, other = ours.model.state_dict(), theirs.model.state_dict()
    assert list(mine) == list(other)
    for name, tensor in other.items():
        assert mine[name].dtype == tensor.dtype
        assert torch.equal(mine[name], tensor), name
    flags = [{name: p.requires_grad for name, p in job.model.named_parameters()} for job in (ours, theirs)]
    assert flags[0] == flags[1]
    originals = [injection_of(job.model).originals for job in (ours, theirs)]
    assert originals[0].keys() == originals[1].keys()
    assert all(torch.equal(originals[0][name], tensor) for name, tensor in originals[1].items())


def test_jobs_are_the_same_with_and_without(home: Path) -> None:
    kept = SharedCache()
    for changes in (
        {"seed": 1},
        {"seed": 1, "train_samples": 31},
        {"seed": 2},
        {"seed": 3, "data_seed": 1, "dev_samples": 18, "max_length": 8},
        {"train_samples": None},
        {"train_samples": None, "test_file": str(home / "dev.tsv"), "do_predict": True},
        {"task": "rte", "seed": 4},
        {"task": "sst2", "seed": 4, "do_predict": True},
        {"task": "stsb", "seed": 5},
        {"task": "rte", "seed": 6},
        {"task": "cola", "train_samples": None, "seed": 6},
        {"seed": 2},
    ):
        check_same(prepare(settings(home, **changes), kept), prepare(settings(home, **changes)))


def _without_pooler(home: Path) -> None:
    path = home / "model" / "model.safetensors"
    save_file({name: t for name, t in load_file(path).items() if "pooler" not in name}, path, metadata={"format": "pt"})


def _with_head(home: Path) -> None:
    torch.manual_seed(5)
    BertForSequenceClassification(SMALL_BERT).save_pretrained(home / "model")


def _without_words(home: Path) -> None:
    # they start at random and stay: no part of the head, and no two runs have the same
    path = home / "model" / "model.safetensors"
    content = {name: tensor for name, tensor in load_file(path).items() if "word_embeddings" not in name}
    save_file(content, path, metadata={"format": "pt"})


@pytest.mark.parametrize("method", METHODS)
def test_weights_are_those_of_a_run_by_itself(home: Path, method: str) -> None:
    kept = SharedCache()
    for seed in (1, 2):
        ours = prepare(settings(home, method=method, seed=seed), kept)
        with torch.no_grad():  # as training does, before the next run comes
            expected = prepare(settings(home, method=method, seed=seed))
            check_same_weights(ours, expected)
            for parameter in ours.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(1.0)


@pytest.mark.parametrize("change", [_without_pooler, _with_head, _without_words])
def test_weights_of_other_checkpoints(home: Path, change: Callable[[Path], None]) -> None:
    change(home)
    kept = SharedCache()
    for seed in (1, 2):
        check_same(prepare(settings(home, seed=seed), kept), prepare(settings(home, seed=seed)))


def test_other_families(home: Path) -> None:
    for family in ("roberta", "gpt2"):
        save_model(home / "model", family)
        kept = SharedCache()
        for seed in (1, 2):
            check_same(prepare(settings(home, seed=seed), kept), prepare(settings(home, seed=seed)))


def test_what_repeats_is_done_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def count(module: Any, name: str) -> None:
        original = getattr(module, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            done.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    for module, name in ((jobs, "load_task"), (jobs, "load_files"), (jobs, "_encode"), (keep, "_sha256")):
        count(module, name)
    kept = SharedCache()
    prepare(settings(home, task="rte", seed=1), kept)
    once = [*["_encode"] * 6, "_sha256", "load_task"]
    assert sorted(done) == once, "train, its dev set, and test; in each, the texts that may be too long once more"
    done.clear()
    prepare(settings(home, task="rte", seed=1), kept)
    assert not done
    prepare(settings(home, task="rte", seed=1, train_samples=15), kept)
    assert not done, "all of its rows have been seen"
    prepare(settings(home), kept)
    assert sorted(done) == [*["_encode"] * 3, "load_files"], "none of its texts may be too long"


def test_the_base_is_in_one_place(home: Path) -> None:
    kept = SharedCache()
    first, second = (prepare(settings(home, seed=seed), kept).model for seed in (1, 2))
    theirs = dict(second.named_parameters())
    own = set(kept_names(first))
    for name, parameter in first.named_parameters():
        assert same_memory(parameter.data, theirs[name].data) == (name not in own), name


@pytest.mark.parametrize("task", [None, "sst2"])
def test_changed_data_are_read_again(home: Path, task: str | None) -> None:
    chosen = {} if task is None else {"task": task}
    kept = SharedCache()
    before = prepare(settings(home, **chosen), kept)
    folder = home if task is None else home / "glue" / "SST-2"
    for name, rows in (("train.tsv", 90), ("dev.tsv", 19)):
        write_sentences(folder / name, rows, seed=8)
        after = prepare(settings(home, **chosen), kept)
        assert after.digest != before.digest
        check_same(after, prepare(settings(home, **chosen)))
        before = after


def test_a_change_that_keeps_the_size(home: Path) -> None:
    kept = SharedCache()
    before = prepare(settings(home), kept)
    path = home / "train.tsv"
    text, found = path.read_text(), path.stat()
    path.write_text(text.replace("cat", "dog"))
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 1))
    assert path.stat().st_size == found.st_size
    after = prepare(settings(home), kept)
    assert after.data["train"] != before.data["train"]


def test_changed_weights_are_hashed_and_loaded_again(home: Path) -> None:
    kept = SharedCache()
    before = prepare(settings(home), kept)
    path = home / "model" / "model.safetensors"
    content = {name: tensor + 1 for name, tensor in load_file(path).items()}
    path.unlink()
    save_file(content, path, metadata={"format": "pt"})
    after = prepare(settings(home), kept)
    assert after.model_sha256 != before.model_sha256
    check_same(after, prepare(settings(home)))
    with pytest.raises(RunError, match="not the file that model_sha256 names"):
        prepare(settings(home, model_sha256=before.model_sha256), kept)


def test_weights_that_change_while_they_are_loaded(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = SharedCache()
    prepare(settings(home), kept)
    path = home / "model" / "model.safetensors"
    content = {name: tensor + 1 for name, tensor in load_file(path).items()}
    load = jobs.load_model

    def late(*args: Any) -> Any:
        path.unlink()
        save_file(content, path, metadata={"format": "pt"})
        return load(*args)

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "load_model", late)
        during = prepare(settings(home), kept)
    check_same_weights(during, prepare(settings(home)))
    check_same(prepare(settings(home), kept), prepare(settings(home)))


def test_a_base_is_compared_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = SharedCache()
    host, first, second = (prepare(settings(home, seed=seed), kept).model for seed in (1, 2, 3))
    other = prepare(settings(home, seed=4)).model
    host = copy.deepcopy(host)
    frozen = [name for name, _ in host.named_parameters() if name not in set(kept_names(host))]
    compared: list[int] = []
    compare = torch.equal

    def counted(one: torch.Tensor, other: torch.Tensor) -> bool:
        compared.append(1)
        return compare(one, other)

    monkeypatch.setattr(torch, "equal", counted)
    equal: dict[str, torch.Tensor] = {}
    for model, count in ((first, len(frozen)), (second, 0), (other, len(frozen))):
        seat.share_base(model, host, equal)
        assert len(compared) == count
        compared.clear()
        theirs = dict(model.named_parameters())
        assert all(same_memory(theirs[name].data, host.get_parameter(name).data) for name in frozen)
    wrong = prepare(settings(home, seed=5)).model
    with torch.no_grad():
        wrong.get_parameter(frozen[-1]).data.add_(1.0)
    with pytest.raises(RunError, match="must be the same"):
        seat.share_base(wrong, host, equal)


def test_a_changed_tokenizer_is_loaded_again(home: Path) -> None:
    kept = SharedCache()
    before = prepare(settings(home), kept)
    path = home / "model" / "tokenizer.json"
    path.write_text(path.read_text().replace('"good"', '"swap"').replace('"bad"', '"good"').replace('"swap"', '"bad"'))
    after = prepare(settings(home), kept)
    assert after.splits["train"]["input_ids"][:] != before.splits["train"]["input_ids"][:]
    check_same(after, prepare(settings(home)))


def test_files_that_change_while_they_are_read_are_not_kept(home: Path) -> None:
    kept, path = SharedCache(), home / "train.tsv"
    reads: list[int] = []

    def read() -> Any:
        reads.append(1)
        if len(reads) == 1:
            write_sentences(path, 50, seed=9)
        return jobs.load_files(path)

    corpora = [kept.data("key", [path], read) for _ in range(3)]
    assert len(reads) == 2
    assert corpora[1] is corpora[2]


def test_only_the_last_used_are_kept(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keep, "TASKS", 2)
    kept = SharedCache()
    reads: list[str] = []

    def read(key: str) -> Any:
        reads.append(key)
        return jobs.load_files(home / "train.tsv")

    for key in "abacab":
        kept.data(key, [], lambda key=key: read(key))  # type: ignore[misc]
    assert "".join(reads) == "abcb"
    loads: list[str] = []
    for key in "abacab":
        kept.tokenizer(key, [], lambda key=key: loads.append(key))  # type: ignore[misc, arg-type]
    assert "".join(loads) == "abcb"


def test_no_tensor_is_in_no_memory() -> None:
    one = torch.ones(2, 2)
    assert same_memory(one, one.detach())
    assert not same_memory(one, None)
    assert not same_memory(one, one.clone())
    assert not same_memory(one, one.t()), "other strides"


def test_the_state_of_files_names_those_that_are_absent(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("text")
    (tmp_path / "folder").mkdir()
    there, absent = (str(tmp_path / name) for name in ("there", "absent"))
    found = state_of([there, absent])
    assert found[0] == (absent, -1, -1, -1)
    assert (found[1][0], found[1][2]) == (there, 4)
    assert {found: "a state can be a key"}[state_of([absent, there])]
    assert files_in(tmp_path) == [there], "no folders"


def test_what_is_absent_is_reported_as_ever(home: Path) -> None:
    kept = SharedCache()
    prepare(settings(home), kept)
    (home / "dev.tsv").unlink()
    for given in (kept, None):
        with pytest.raises((ValueError, OSError), match=r"dev\.tsv"):
            prepare(settings(home), given)


def test_tokens_are_made_when_they_are_asked_for(home: Path) -> None:
    _, splits = jobs.load_files(home / "train.tsv")
    asked: list[int] = []

    def encode(rows: Any) -> Any:
        asked.append(len(rows))
        return rows.select_columns("sentence").rename_column("sentence", "input_ids")

    tokens = Tokens(splits["train"], encode)
    texts = splits["train"]["sentence"][:]
    for rows, new in (([5, 2, 9], 3), ([9, 5], 0), ([1, 2, 3], 2), ([], 0)):
        found = tokens.of(np.array(rows, dtype=np.int64))
        assert found["input_ids"][:] == [texts[row] for row in rows]
        assert sum(asked) == new
        asked.clear()
    assert tokens.of()["input_ids"][:] == texts
    assert sum(asked) == len(texts) - 5


def test_a_digest_is_the_same_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.10 has no `hashlib.file_digest`."""
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)) * 5000)  # more than one piece
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    assert keep._sha256(str(path)) == expected
    monkeypatch.delattr(hashlib, "file_digest", raising=False)
    assert keep._sha256(str(path)) == expected
