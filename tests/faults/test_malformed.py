"""Malformed files are refused: with the documented error, in one readable line or a few, and with nothing changed."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from faults import malformed
from faults.malformed import BIG, MANIFEST, WEIGHTS
from helpers import SIZES, assert_same, edit, seal, tiny_bert, trained, what_is_there
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from transformers import (
    BertConfig,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import unipelt
from unipelt import CheckpointError, ConfigError, InjectionError
from unipelt.glue.data import DataError, load_files
from unipelt.glue.run import run
from unipelt.glue.settings import RunSettings
from unipelt.records.record import ResultError, read_result
from unipelt.report.read import read_results
from unipelt.runs.errors import RunError
from unipelt.runs.folder import begin
from unipelt.runs.options import parse
from unipelt.runs.settings import SettingsError
from unipelt.sweep import SweepError, read_failure, read_request, read_settings, read_sweep

SECONDS = 20
"""No refusal takes as long, whatever else the machine does; of processor time, so that waiting does not count."""
LONGEST = 800
"""The longest message, in characters."""


class Refusals:
    """Calls that must be refused: how many were, and each that was not, so that one does not hide the next."""

    total = 0
    """Refusals of all tests of this process."""

    def __init__(self, errors: tuple[type[Exception], ...], unchanged: Callable[[], None] = lambda: None) -> None:
        self.errors = errors
        self.unchanged = unchanged
        self.count = 0
        self.wrong: list[str] = []

    def check(self, name: str, call: Callable[[], object], said: str = "") -> None:
        if problem := self._problem(call, said):
            self.wrong.append(f"{name}: {problem}")
        else:
            self.count += 1

    def _problem(self, call: Callable[[], object], said: str) -> str | None:
        started = time.process_time()
        try:
            call()
        except self.errors as error:
            message = str(error)
        except Exception as error:
            return f"{type(error).__name__}: {str(error)[:300]}"
        else:
            return "it was taken"
        finally:
            seconds = time.process_time() - started
        try:
            self.unchanged()
        except AssertionError as error:
            return f"it changed something: {str(error)[:300]}"
        if seconds >= SECONDS:
            return f"{seconds:.0f} s"
        if not message.strip() or len(message) >= LONGEST:
            return f"{len(message)} characters, {message[:300]!r}"
        return None if said in message else f"{said!r} is not in {message[:300]!r}"

    def all_of(self, least: int) -> None:
        """Raise `AssertionError` that names every call that was not refused well; there must be so many refusals."""
        assert not self.wrong, f"{len(self.wrong)} of {self.count + len(self.wrong)}:\n" + "\n".join(self.wrong)
        assert self.count >= least
        Refusals.total += self.count


# --- checkpoints


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint; tests spoil copies of it."""
    return unipelt.save(trained(), tmp_path_factory.mktemp("good") / "checkpoint")


class Base:
    """One model for many refusals, looked at again after every one, and made anew where one was none."""

    def __init__(self) -> None:
        self.model = tiny_bert()
        self.before = what_is_there(self.model)

    def load(self, folder: Path) -> None:
        unipelt.load(self.model, folder)
        self.model = tiny_bert()  # what should not have happened has, and hides no other such case

    def check(self) -> None:
        try:
            assert_same(what_is_there(self.model), dict(self.before))
        except AssertionError:
            self.model = tiny_bert()
            raise


@pytest.fixture(scope="module")
def base() -> Base:
    return Base()


CHECKPOINT_ERRORS = (CheckpointError, FileNotFoundError)


def refuse_each(
    refusals: Refusals,
    good: Path,
    tmp_path: Path,
    cases: Mapping[str, malformed.Spoil],
    read: Callable[[Path], object],
) -> None:
    """Read copies of a good checkpoint that were spoilt; what a pickle in one would make must not be there after."""
    for number, (name, spoil) in enumerate(cases.items()):
        folder = Path(shutil.copytree(good, tmp_path / f"{number}" / "checkpoint"))
        spoil(folder)
        refusals.check(name, partial(read, folder), str(folder))
        if (folder / "planted").exists():
            refusals.wrong.append(f"{name}: code was run")
        shutil.rmtree(folder.parent)


def test_spoilt_checkpoints(good: Path, base: Base, tmp_path: Path) -> None:
    refusals = Refusals(CHECKPOINT_ERRORS, base.check)
    refuse_each(refusals, good, tmp_path, malformed.checkpoints(good), base.load)
    refusals.all_of(200)
    unipelt.load(base.model, good)
    unipelt.remove(base.model)
    base.check()


def test_spoilt_checkpoints_have_no_base_either(good: Path, tmp_path: Path) -> None:
    """What builds the base itself refuses as much, before it looks for the base."""
    cases = malformed.checkpoints(good)
    chosen = [name for name in cases if name.startswith(("weights: a ", MANIFEST, WEIGHTS, "weights: the offsets"))]
    refusals = Refusals(CHECKPOINT_ERRORS)
    refuse_each(refusals, good, tmp_path, {name: cases[name] for name in chosen}, unipelt.from_pretrained)
    refusals.all_of(30)


def test_manifests_of_wrong_values(good: Path, base: Base, tmp_path: Path) -> None:
    refusals = Refusals(CHECKPOINT_ERRORS, base.check)
    folder = Path(shutil.copytree(good, tmp_path / "checkpoint"))
    manifest = (folder / MANIFEST).read_bytes()
    for name, (where, value) in malformed.manifests().items():
        (folder / MANIFEST).write_bytes(manifest)
        edit(folder, where, value)
        refusals.check(name, lambda: base.load(folder))
    for where in malformed.MISSING:
        values = json.loads(manifest)
        *path, last = where.split(".")
        part = values
        for key in path:
            part = part[key]
        del part[last]
        (folder / MANIFEST).write_text(json.dumps(values))
        refusals.check(f"no {where}", lambda: base.load(folder), last)
    refusals.all_of(200)


def test_manifests_that_are_no_json(good: Path, base: Base, tmp_path: Path) -> None:
    refusals = Refusals((CheckpointError,), base.check)
    folder = Path(shutil.copytree(good, tmp_path / "checkpoint"))
    for name, content in malformed.spoilt_json((good / MANIFEST).read_bytes()).items():
        (folder / MANIFEST).write_bytes(content)
        refusals.check(name, lambda: base.load(folder), str(folder / MANIFEST))
    with open(folder / MANIFEST, "r+b") as file:
        file.truncate(9 * 2**20)
    refusals.check("9 MB", lambda: base.load(folder), "larger than 8 MB")
    refusals.all_of(31)


def test_models_that_the_checkpoint_is_not_of(good: Path) -> None:
    sizes: dict[str, Any] = dict(SIZES)
    distil: dict[str, Any] = {
        "dim": 32,
        "hidden_dim": 48,
        "n_layers": 3,
        "n_heads": 4,
        "vocab_size": 60,
        "max_position_embeddings": 40,
    }
    other: dict[str, Any] = {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "intermediate_size": 40,
        "vocab_size": 61,
        "max_position_embeddings": 41,
        "hidden_act": "relu",
        "layer_norm_eps": 1e-5,
        "type_vocab_size": 3,
    }
    models: dict[str, Any] = {
        "roberta": RobertaForSequenceClassification(RobertaConfig(**sizes)),
        "distilbert": DistilBertForSequenceClassification(DistilBertConfig(**distil)),
        "tokens": BertForTokenClassification(BertConfig(**sizes)),
        "five labels": tiny_bert(num_labels=5),
        **{f"{name}={value}": tiny_bert(**{name: value}) for name, value in other.items()},
        "four layers": tiny_bert(num_hidden_layers=4),
        "other weights": tiny_bert(seed=1),
    }
    refusals = Refusals((CheckpointError,))
    for name, model in models.items():
        before = what_is_there(model)
        refusals.unchanged = lambda model=model, before=before: assert_same(what_is_there(model), before)  # type: ignore[misc]
        refusals.check(name, partial(unipelt.load, model, good))
    refusals.all_of(len(models))


def test_names_that_the_model_does_not_have(good: Path, base: Base, tmp_path: Path) -> None:
    refusals = Refusals((CheckpointError,), base.check)
    names = ("../x", "", "bert", "classifier", "bert.encoder.layer.9.output.dense.bias", "classifier.weight\u202e", BIG)
    for key in ("head", "unfrozen"):
        folder = Path(shutil.copytree(good, tmp_path / key))
        there = json.loads((folder / MANIFEST).read_text())[key]
        for name in names:
            edit(folder, key, [*there, name])
            refusals.check(f"{key}: {name[:20]!r}", partial(base.load, folder), f"{key} names")
    refusals.all_of(14)


def test_sizes_of_nothing(good: Path, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor that says a million and holds nothing, or a number for each, is no excuse to take memory for more."""
    refusals = Refusals((CheckpointError,), base.check)
    monkeypatch.setattr("unipelt.checkpoint.load.inject_as", lambda *args, **options: pytest.fail("memory was taken"))
    for number, shape in enumerate(((0, 1_000_000), (1_000_000, 1))):
        folder = Path(shutil.copytree(good, tmp_path / f"{number}"))
        tensors = load_tensors((folder / WEIGHTS).read_bytes())
        (folder / WEIGHTS).write_bytes(dump_tensors(tensors | {"surprise": torch.zeros(shape)}))
        seal(folder)
        manifest = (folder / MANIFEST).read_bytes()
        for size in ("adapter.bottleneck", "prefix.length", "prefix.hidden", "lora.rank"):
            (folder / MANIFEST).write_bytes(manifest)
            edit(folder, f"unipelt.{size}", 1_000_000)
            refusals.check(f"{size}, {shape}", partial(base.load, folder), "does not fit its own configuration: ")
    refusals.all_of(8)


def test_bases_that_cannot_be_built(tmp_path: Path) -> None:
    """A manifest may ask for any base; one that would take hours or all memory is not begun, others fail at once."""
    tiny_bert().save_pretrained(tmp_path / "base")
    model = trained(model=type(tiny_bert()).from_pretrained(tmp_path / "base"))
    folder = unipelt.save(model, tmp_path / "checkpoint")
    unipelt.from_pretrained(folder)
    manifest = (folder / MANIFEST).read_bytes()
    refusals = Refusals(CHECKPOINT_ERRORS)
    for field, value, said in (
        ("num_labels", 10**9, "num_labels"),
        ("num_hidden_layers", 10**7, "num_hidden_layers"),
        ("num_hidden_layers", 10**30, "num_hidden_layers"),
        ("text_config", {"n_layer": 10**7}, "n_layer"),
        ("num_labels", "many", "cannot be built"),
        ("num_labels", -1, "num_labels"),
        ("num_hidden_layers", -1, ""),
        ("num_attention_heads", 0, ""),
        ("vocab_size", 10**9, "cannot be built"),
        ("hidden_size", 10**6, "cannot be built"),
        ("hidden_act", "os.system", ""),
        ("id2label", {"a": "b"}, ""),
    ):
        (folder / MANIFEST).write_bytes(manifest)
        edit(folder, f"base.config.{field}", value)
        refusals.check(f"{field} {value}", partial(unipelt.from_pretrained, folder), said)
    refusals.all_of(12)


# --- text that is read


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


METHOD: dict[str, Any] = {"preset": "lora", "lora": {"rank": 4}}
RUN: dict[str, Any] = {"task": "rte", "method": "lora", "seed": 1, "output_dir": "runs/a"}
SWEEP: dict[str, Any] = {"task": "rte", "grid": [{"method": ["lora", "adapter"], "seed": [1, 2]}]}
READERS: dict[str, tuple[dict[str, Any], Callable[[Path], object], tuple[type[Exception], ...]]] = {
    "method": (METHOD, unipelt.resolve, (ConfigError, FileNotFoundError)),
    "run": (RUN, lambda path: parse([str(path)], RunSettings), (SettingsError, ConfigError, FileNotFoundError)),
    "sweep": (SWEEP, read_sweep, (SweepError,)),
}


@pytest.mark.parametrize("reader", READERS)
def test_configurations_that_are_no_plain_text(tmp_path: Path, reader: str) -> None:
    values, read, errors = READERS[reader]
    refusals = Refusals(errors)
    texts = {
        "json": malformed.spoilt_json(json.dumps(values).encode()),
        "yaml": malformed.spoilt_yaml(yaml.safe_dump(values).encode()),
    }
    for suffix, cases in texts.items():
        path = write(tmp_path / f"good.{suffix}", json.dumps(values).encode())
        read(path)
        for name, content in cases.items():
            path = write(tmp_path / f"bad.{suffix}", content)
            refusals.check(f"{reader}.{suffix}: {name}", partial(read, path), path.name)
    refusals.all_of(60)


def test_no_tag_of_yaml_runs_code(tmp_path: Path) -> None:
    content = malformed.planted_yaml(tmp_path / "planted")
    for _, read, errors in READERS.values():
        path = write(tmp_path / "a.yaml", content)
        refusals = Refusals(errors)
        refusals.check("planted", partial(read, path), "tag")
        refusals.all_of(1)
    with pytest.raises(SettingsError):
        parse(["--task", "rte", "--seed", f"!!python/object/apply:os.mkdir ['{tmp_path / 'planted'}']"], RunSettings)
    assert not (tmp_path / "planted").exists()


@pytest.mark.parametrize("reader", READERS)
def test_configurations_of_wrong_values(tmp_path: Path, reader: str) -> None:
    values, read, errors = READERS[reader]
    refusals = Refusals(errors)
    cases = {"method": malformed.METHODS, "run": malformed.RUNS, "sweep": malformed.SWEEPS}[reader]
    for number, changes in enumerate(cases):
        path = write(tmp_path / f"{number}.json", json.dumps(values | changes).encode())
        refusals.check(
            f"{reader} {str(changes)[:80] if len(json.dumps(changes)) < 1000 else number}", partial(read, path)
        )
    refusals.all_of(len(cases))


def test_configurations_in_odd_places(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    (tmp_path / "device.yaml").symlink_to("/dev/zero")
    names = [
        str(tmp_path / f"{name}.yaml") for name in ("pipe", "folder", "loop", "device", "gone", "x" * 5_000, "a\0")
    ]
    for _, read, errors in READERS.values():
        refusals = Refusals(errors)
        for name in names:
            refusals.check(name[-20:], partial(read, Path(name)))
        refusals.all_of(len(names))


def test_bases_of_bases_of_bases(tmp_path: Path) -> None:
    """Ten files that each name the next ten times over are eleven files to read, and not ten thousand million."""
    for number in range(10):
        write(tmp_path / f"{number}.json", json.dumps({"base": [f"{number + 1}.json"] * 10}).encode())
    write(tmp_path / "10.json", json.dumps(RUN).encode())
    started = time.process_time()
    assert parse([str(tmp_path / "0.json")], RunSettings).task == "rte"
    assert time.process_time() - started < SECONDS
    for number in range(10, 90):
        write(tmp_path / f"{number}.json", json.dumps({"base": f"{number + 1}.json"}).encode())
    with pytest.raises(SettingsError, match="the base of the base of more than 50 files"):
        parse([str(tmp_path / "0.json")], RunSettings)


def test_names_that_no_file_has(tmp_path: Path) -> None:
    """Every reader says that there is no such file, and not all of its name."""
    model = tiny_bert()
    readers: dict[str, tuple[Callable[[Path], object], type[Exception]]] = {
        "load": (lambda path: unipelt.load(model, path), FileNotFoundError),
        "from_pretrained": (unipelt.from_pretrained, FileNotFoundError),
        "resolve": (unipelt.resolve, FileNotFoundError),
        "parse": (lambda path: parse([str(path)], RunSettings), FileNotFoundError),
        "read_settings": (read_settings, FileNotFoundError),
        "read_sweep": (read_sweep, SweepError),
        "read_result": (read_result, FileNotFoundError),
        "read_results": (read_results, FileNotFoundError),
        "load_files": (load_files, DataError),
    }
    refusals = Refusals((Exception,))
    for name, (read, error) in readers.items():
        refusals.errors = (error, ConfigError) if name != "load_files" else (error,)
        for number, stem in enumerate(("x" * 300, "x" * 5_000, "x/" * 5_000, "a\0b")):
            refusals.check(f"{name} {number}", partial(read, tmp_path / f"{stem}.json"), str(tmp_path)[:100])
    refusals.all_of(4 * len(readers))


def test_a_method_with_no_preset() -> None:
    assert (
        RunSettings(task="rte", method={"preset": None, "lora": {"rank": 4}}).method_name == "unipelt-apl, lora.rank=4"
    )


# --- what runs and sweeps leave


def test_an_output_folder_that_is_a_result(tmp_path: Path) -> None:
    """Even that of this very run: what is given is the file, and a folder is wanted."""
    from records.test_record import make_record

    settings = RunSettings(task="rte", output_dir=str(tmp_path / "result.json"))
    record = make_record() | {"digest": settings.digest()}
    write(tmp_path / "result.json", json.dumps(record).encode())
    assert read_result(tmp_path)["digest"] == settings.digest()
    with pytest.raises(RunError, match=r"result\.json is a file; output_dir is a folder"):
        run(settings)


def test_results(tmp_path: Path) -> None:
    from records.test_record import make_record

    refusals = Refusals((ResultError,))
    for name, content in malformed.spoilt_json(json.dumps(make_record()).encode()).items():
        path = write(tmp_path / "run" / "result.json", content)
        refusals.check(name, partial(read_result, path), str(path))
        left_out = read_results(tmp_path).left_out
        assert [where for where, _ in left_out] == ["run/result.json"], name
    for key, value in make_record().items():
        wrongs: tuple[object, ...] = (None, "words", [], {}, 10**400, BIG, {"a": {"b": 3}})
        for wrong in wrongs:
            if key in ("digest", "status") and isinstance(wrong, str):
                continue
            if (type(wrong) is type(value) and key in ("settings", "data", "hardware", "packages", "files")) or (
                key == "gates" and (wrong is None or isinstance(wrong, dict))
            ):
                continue
            path = write(tmp_path / "run" / "result.json", json.dumps(make_record() | {key: wrong}).encode())
            refusals.check(f"{key} {type(wrong)!s}", partial(read_result, path), str(path))
    refusals.all_of(150)


def test_requests_and_failures(tmp_path: Path) -> None:
    from faults.spoilt import request

    refusals = Refusals((SweepError,))
    for name, content in malformed.spoilt_json(request()).items():
        path = write(tmp_path / "sweep.json", content)
        refusals.check(name, lambda: read_request(tmp_path), str(path))
    for name, content in malformed.spoilt_json(b'{"error": "no luck", "time": 1}').items():
        path = write(tmp_path / "failure.json", content)
        failure = read_failure(tmp_path)
        assert failure is not None, name
        assert f"{path} does not say why it failed" in failure["error"], name
        assert len(failure["error"]) < LONGEST, name
    for name in ("sweep.json", "failure.json"):
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)
        read: Callable[[Path], object] = read_request if name == "sweep.json" else read_failure
        refusals.check(name, partial(read, tmp_path), "a pipe or a device")
    refusals.all_of(30)


def test_settings_left_for_a_process(tmp_path: Path) -> None:
    refusals = Refusals((ConfigError, SettingsError))
    settings = json.dumps(RunSettings(task="rte").to_dict()).encode()
    assert read_settings(write(tmp_path / "settings.json", settings)).task == "rte"
    for name, content in malformed.spoilt_json(settings).items():
        path = write(tmp_path / "settings.json", content)
        refusals.check(name, partial(read_settings, path))
    refusals.all_of(30)


def test_what_an_unfinished_run_leaves(tmp_path: Path) -> None:
    """Progress that is damaged is no run's, and a damaged marker is no whole checkpoint's."""
    from unipelt.runs import folder as place

    settings = RunSettings(task="rte", output_dir=str(tmp_path))
    refusals = Refusals((RunError,))
    begin(settings, tmp_path)
    progress = tmp_path / "checkpoints" / "progress.json"
    good = progress.read_bytes()
    cases = malformed.spoilt_json(good)
    for name, content in cases.items():
        write(progress, content)
        refusals.check(name, lambda: begin(settings, tmp_path), str(tmp_path))
    for key in ("settings", "attempts", "seconds"):
        write(progress, json.dumps(json.loads(good) | {key: None}).encode())
        refusals.check(key, lambda: begin(settings, tmp_path), key)
    refusals.all_of(31)
    write(progress, b"")
    assert begin(RunSettings(task="rte", output_dir=str(tmp_path), overwrite=True), tmp_path).attempts == 1
    (tmp_path / "checkpoints" / "checkpoint-x").mkdir()
    marker = tmp_path / "checkpoints" / "checkpoint-3" / "complete.json"
    whole = b'{"digest": "d", "finished": true}'
    write(marker, whole)
    assert place.newest_checkpoint(tmp_path, "d") == marker.parent
    for name, content in malformed.spoilt_json(whole).items():
        write(marker, content)
        assert place.newest_checkpoint(tmp_path, "d") is None, name


# --- data


def test_data(tmp_path: Path) -> None:
    refusals = Refusals((DataError,))
    for name, content in malformed.DATA.items():
        path = write(tmp_path / name, content)
        refusals.check(name, partial(load_files, path), name)
    refusals.all_of(len(malformed.DATA))


def test_parquet_that_lies(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {"text": ["a", "b"], "label": [0, 1]}

    def described(info: object) -> dict[bytes, bytes]:
        return {b"huggingface": info if isinstance(info, bytes) else json.dumps(info).encode()}

    def features(label: object) -> object:
        return {"info": {"features": {"text": {"dtype": "string", "_type": "Value"}, "label": label}}}

    broken_text = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.array([0, 1, 2], pa.int32()).buffers()[1], pa.py_buffer(b"\xff\xfe")]
    )
    tables = {
        "no JSON": pa.table(columns).replace_schema_metadata(described(b"{")),
        "no features": pa.table(columns).replace_schema_metadata(described({"info": {"features": 3}})),
        "an unknown feature": pa.table(columns).replace_schema_metadata(described(features({"_type": "os.system"}))),
        "names that are none": pa.table(columns).replace_schema_metadata(
            described(features({"_type": "ClassLabel", "names": 3}))
        ),
        "too few names": pa.table(columns).replace_schema_metadata(
            described(features({"_type": "ClassLabel", "names": ["one"]}))
        ),
        "no UTF-8": pa.table({"text": broken_text, "label": pa.array([0, 1])}),
        "times that Python has not": pa.table(columns | {"label": pa.array([2**62, 2**62 - 1], pa.timestamp("us"))}),
    }
    refusals = Refusals((DataError,))
    for name, table in tables.items():
        path = tmp_path / "a.parquet"
        pq.write_table(table, path)
        refusals.check(name, partial(load_files, path), path.name)
    content = path.read_bytes()
    for place in range(0, len(content), len(content) // 20):
        write(path, content[:place])
        refusals.check(f"{place} bytes", partial(load_files, path), path.name)
    refusals.all_of(len(tables) + 20)


# --- values that come from Python


@pytest.mark.parametrize(
    "value", [10**400, 10**5_000, -(10**5_000), "x" * 10**7, [[[[]]]] * 10_000, float("nan")], ids=list("abcdef")
)
def test_values_that_cannot_be_printed_whole(value: object) -> None:
    refusals = Refusals((ConfigError, SettingsError, InjectionError))
    for part, field in (("lora", "rank"), ("adapter", "bottleneck"), ("prefix", "gating"), ("lora", "alpha")):
        refusals.check(field, partial(unipelt.resolve, {part: {field: value}}))
    for field in ("seed", "epochs", "learning_rate", "task"):
        settings: dict[str, Any] = {"task": "rte", field: value}
        refusals.check(field, partial(RunSettings, **settings))
    refusals.all_of(8)


def test_how_many_were_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """The tests above, together; by itself this one has nothing to count."""
    if not Refusals.total:
        pytest.skip("counts what the other tests of this file refused")
    with capsys.disabled():
        print(f"\n{Refusals.total} malformed inputs refused")
    assert Refusals.total >= 200
