"""`unipelt rerun`: a record is enough to do a run again, and what differs is found, before it or after."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_task import make_quick, quick, save_model, write_glue, write_sentences

import unipelt
from unipelt.cli import main
from unipelt.glue.pack_runs import run_packed
from unipelt.glue.rerun import rerun, settings_of
from unipelt.glue.run import run
from unipelt.glue.settings import RunSettings
from unipelt.records.record import read_result, write_result
from unipelt.report import collect
from unipelt.runs.compare import compare, format_report, surroundings

pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model, data, and in `out` a run on them."""
    folder = make_quick(tmp_path_factory.mktemp("home"))
    run(RunSettings(**quick(folder, threads=None)), log=quiet)
    return folder


@pytest.fixture
def record(home: Path) -> dict[str, Any]:
    return read_result(home / "out")


def quiet(line: str) -> None:
    pass


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def written(record: dict[str, Any], folder: Path, **settings: Any) -> Path:
    """A folder with that record; with other settings, their digest too."""
    folder.mkdir()
    record = copy.deepcopy(record)
    if settings:
        record["settings"] |= settings
        changed = RunSettings(**record["settings"])
        record |= {"digest": changed.digest(), "settings": changed.to_dict()}
    return write_result(record, folder)


def never(*args: Any, **options: Any) -> None:
    pytest.fail("time was spent")


# The same again


def test_equal_bit_for_bit(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(home)
    assert main(["rerun", str(home / "out" / "result.json"), "--out", str(tmp_path / "again")]) == 0
    assert tree(home) == before, "what was there is left alone"
    printed = capsys.readouterr().out
    assert "\nequal, bit for bit: " in printed
    result = json.loads((tmp_path / "again" / "rerun.json").read_text())
    first, second = read_result(home / "out"), read_result(tmp_path / "again")
    assert (result["status"], result["equal"], result["differences"]) == ("finished", True, [])
    assert result["weights"] is True
    threads = first["hardware"]["threads"]
    assert result["notes"] == [f"threads {threads}, as PyTorch chose then; sums are split by thread"]
    assert all(f"\n        {note}\n" in printed for note in result["notes"])
    assert result["of"]["digest"] == result["digest"] == first["digest"] == second["digest"]
    assert result["numbers"] > 40, "losses, metrics, gates, counts"
    assert second["evaluations"] == first["evaluations"]
    assert second["settings"]["output_dir"] == str(tmp_path / "again")
    assert second["settings"]["threads"] == threads
    assert not list((tmp_path / "again").glob(".*.tmp"))


def test_by_default_in_runs(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert rerun(home / "out", log=quiet)["equal"]
    assert {path.name for path in tmp_path.rglob("*.json")} >= {"rerun.json", "result.json"}
    assert (tmp_path / "runs" / "out-rerun" / "rerun.json").is_file()


def test_data_and_model_may_have_moved(record: dict[str, Any], home: Path, tmp_path: Path) -> None:
    path = written(
        record,
        tmp_path / "old",
        model="/gone/model",
        train_file="/gone/train.tsv",
        dev_file="/gone/dev.tsv",
    )
    shutil.copytree(home / "model", tmp_path / "model")
    where = {"train_file": home / "train.tsv", "dev_file": home / "dev.tsv", "model": tmp_path / "model"}
    for name in where:
        with pytest.raises(ValueError, match=f"{name} is /gone/.* if it has moved, say where to with --{name}"):
            rerun(
                path,
                tmp_path / "new",
                changes={other: str(place) for other, place in where.items() if other != name},
                log=never,
            )
    assert not (tmp_path / "new").exists()
    options = [word for name, place in where.items() for word in (f"--{name.replace('_', '-')}", str(place))]
    assert main(["rerun", str(path), "--out", str(tmp_path / "new"), "--num-workers", "1", *options]) == 0
    result = json.loads((tmp_path / "new" / "rerun.json").read_text())
    assert result["weights"] is None, "the record came alone"
    assert result["digest"] != result["of"]["digest"]


def test_a_run_of_a_pack_is_done_by_itself(tmp_path: Path) -> None:
    """Of a pack: not to the bit, and that is said."""
    home = make_quick(tmp_path, dropout=False)
    glue = {"task": "rte", "glue_dir": str(write_glue(tmp_path / "glue")), "train_file": None, "dev_file": None}
    folders = [str(tmp_path / "pack" / name) for name in ("1", "2")]
    values = quick(home, train_samples=30) | glue
    run_packed(
        [RunSettings(**{**values, "seed": seed, "output_dir": out}) for seed, out in enumerate(folders)], 2, quiet
    )
    lines: list[str] = []
    result = rerun(tmp_path / "pack" / "2", tmp_path / "again", tolerance=1e-4, log=lines.append)
    assert any("one of a pack ({'places': 2}) and is done by itself now" in line for line in lines)
    assert result["equal"]
    assert result["surroundings"][0] == {"what": "packed", "then": {"places": 2}, "now": None}
    assert 0 < result["largest"] < 1e-4
    assert compare(read_result(tmp_path / "pack" / "2"), read_result(tmp_path / "again"))["differences"]


def test_goes_on_after_a_kill(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    for place in ("unipelt.glue.run.finish", "unipelt.glue.rerun.compare"):
        with monkeypatch.context() as patch:
            patch.setattr(place, kill)
            with pytest.raises(KeyboardInterrupt):
                rerun(home / "out", tmp_path / "again", log=quiet)
        assert json.loads((tmp_path / "again" / "rerun.json").read_text())["status"] == "running"
    lines: list[str] = []
    assert rerun(home / "out", tmp_path / "again", log=lines.append)["equal"]
    assert read_result(tmp_path / "again")["attempts"] == 2
    with pytest.raises(ValueError, match="again is there already; remove it, or choose another --out"):
        rerun(home / "out", tmp_path / "again", log=never)


# What differs afterwards


def test_a_difference_is_found_and_told(
    home: Path, tmp_path: Path, record: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    old = copy.deepcopy(record)
    old["evaluations"][1]["train_loss"] += 1e-9
    old["packages"]["torch"] = "2.0"
    old["hardware"]["cpu"] = "another"
    path = written(old, tmp_path / "old")
    command = ["rerun", str(path), "--out"]
    assert main([*command, str(tmp_path / "new")]) == 1
    printed = capsys.readouterr().out
    assert "different: 1 of " in printed
    assert "evaluations[1].train_loss: " in printed
    assert "(1e-09)" in printed
    assert "the likely reason:\n        cpu: 'another' then, " in printed
    assert f"torch: '2.0' then, {record['packages']['torch']!r} now" in printed
    result = json.loads((tmp_path / "new" / "rerun.json").read_text())
    (item,) = result["differences"]
    assert item["then"] == old["evaluations"][1]["train_loss"]
    assert item["now"] == record["evaluations"][1]["train_loss"]
    assert result["largest"] == item["by"] == pytest.approx(1e-9)


def test_what_lies_beside_the_weights_is_named(home: Path, tmp_path: Path) -> None:
    """Dropout and lower case are in no fingerprint of weights."""
    model = shutil.copytree(home / "model", tmp_path / "model")
    for file, before, after in (
        ("config.json", '"hidden_dropout_prob": 0.1', '"hidden_dropout_prob": 0.5'),
        ("tokenizer.json", '"lowercase": true', '"lowercase": false'),
    ):
        text = (model / file).read_text()
        assert before in text
        (model / file).write_text(text.replace(before, after))
    lines: list[str] = []
    result = rerun(home / "out", tmp_path / "new", changes={"model": str(model)}, log=lines.append)
    assert "        model.config.hidden_dropout_prob was 0.1, and is 0.5" in lines[:4]
    assert any(line.startswith("        model.tokenizer was '") for line in lines[:4])
    assert not result["equal"]
    named = {item["what"] for item in result["surroundings"]}
    assert {"model.config.hidden_dropout_prob", "model.tokenizer"} <= named
    assert not [what for what in named if what.startswith("model.") and "dropout" not in what and "token" not in what]
    assert len(result["notes"]) == 3


def change(record: dict[str, Any], where: str, value: Any) -> dict[str, Any]:
    record = copy.deepcopy(record)
    place: Any = record
    *parents, last = [int(part) if part.isdigit() else part for part in where.split(".")]
    for parent in parents:
        place = place[parent]
    place[last] = value(place[last])
    return record


@pytest.mark.parametrize(
    ("where", "value", "forgiven"),
    [
        ("evaluations.0.loss", lambda x: x + 1e-6, True),
        ("evaluations.1.metrics.accuracy", lambda x: x - 1e-6, True),
        ("evaluations.1.step", lambda x: x + 1, False),
        ("best.step", lambda x: x - 1, False),
        ("best.epoch", lambda x: x + 1, False),
        ("dev.loss", lambda x: x * (1 + 1e-15), True),
        ("test.metrics.accuracy", lambda x: x + 1e-6, True),
        ("test.loss", lambda x: x + 1e-2, False),
        ("majority", lambda x: x + 1e-6, True),
        ("parameters.trained", lambda x: x + 1, False),
        ("parameters.gates.adapter", lambda x: x + 1, False),
        ("gates.values.prefix.mean.1", lambda x: x + 1e-6, True),
        ("gates.values.prefix.std.0", lambda x: x + 1, False),
        ("gates.values", lambda x: {name: x[name] for name in x if name != "prefix"}, False),
        ("gates", lambda x: None, False),
        ("evaluations", lambda x: x[:1], False),
    ],
)
def test_every_number_counts(record: dict[str, Any], where: str, value: Callable[[Any], Any], forgiven: bool) -> None:
    other = change(record, where, value)
    assert not compare(record, other)["equal"]
    assert not compare(other, record)["equal"]
    assert compare(record, other, tolerance=1e-5)["equal"] == forgiven
    assert compare(record, copy.deepcopy(record))["equal"]


def test_the_majority_of_an_older_record_is_not_compared(record: dict[str, Any]) -> None:
    """It was the score of another answer: that of the train set's most frequent class."""
    older = change(record, "majority", lambda x: x / 2)
    del older["majority_of"]
    assert compare(older, record)["equal"]
    assert not compare(change(older, "test.loss", lambda x: x + 1), record)["equal"]


def test_no_tolerance_is_for_steps_and_counts(record: dict[str, Any]) -> None:
    for where in ("best.step", "evaluations.0.step", "parameters.head"):
        assert not compare(record, change(record, where, lambda x: x + 1), tolerance=9.0)["equal"]


def test_weights_count_where_nothing_is_tolerated(record: dict[str, Any], tmp_path: Path) -> None:
    files = tmp_path / "one", tmp_path / "two"
    assert compare(record, record, weights=files)["weights"] is None
    for file in files:
        file.write_bytes(file.name.encode())
    found = compare(record, record, weights=files)
    assert (found["equal"], found["weights"]) == (False, False)
    assert [item["what"] for item in found["differences"]] == ["model/model.safetensors"]
    found = compare(record, record, 1e-5, weights=files)
    assert (found["equal"], found["weights"]) == (True, False)


@pytest.mark.parametrize(
    ("where", "value", "what"),
    [
        ("packages.numpy", "1.0", "numpy"),
        ("hardware.threads", 7, "threads"),
        ("hardware.device", "cuda", "device"),
        ("settings.eval_tokens", 7, "eval_tokens"),
        ("code.commit", "0", "commit"),
        ("code.dirty", "yes", "changes that are in no commit"),
    ],
)
def test_surroundings_are_named(record: dict[str, Any], where: str, value: Any, what: str) -> None:
    record = change(record, "code.dirty", lambda _: False)
    assert surroundings(record, copy.deepcopy(record)) == []
    other = change(record, where, lambda _: value)
    assert [item["what"] for item in surroundings(other, record)] == [what]


# What differs before


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        ("data.train.sha256", "0" * 64, "the train data are not those of the record"),
        ("data.test.rows", 1, "the test data are not those of the record"),
        ("model.sha256", "0" * 64, "the SHA-256 of its model.safetensors was 000"),
        ("model.fingerprint", {"sha256": "0", "dtype": "float32"}, "their fingerprint was"),
        (
            "model.class",
            "BertModel",
            r"the model was a BertModel, and this is a BertForSequenceClassification; give the model of the run "
            r"\(--model\)$",
        ),
        ("settings.epochs", 3, "the settings of the record are not those that were run"),
        ("settings.epoch", 3, r"hold 'epoch', which unipelt .* does not know: it is of a newer version \(unipelt "),
        ("settings.epochs", "many", "epochs must be a whole number"),
        ("method.config.lora.alfa", 1, "unknown key 'lora.alfa'; .* if it is of a newer version"),
        ("method.config.lora.rank", 2, "the settings of the record are not those that were run"),
    ],
)
def test_another_run_is_refused_before_time_is_spent(
    record: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    value: Any,
    words: str,
) -> None:
    monkeypatch.setattr("unipelt.glue.run._execute", never)
    *parents, last = where.split(".")
    place = record
    for parent in parents:
        place = place[parent]
    place[last] = value
    path = written(record, tmp_path / "old")
    with pytest.raises(ValueError, match=words):
        rerun(path, tmp_path / "new", log=quiet)
    assert not (tmp_path / "new").exists()


def test_data_that_changed_since_are_refused(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_sentences(tmp_path / "train.tsv", 120, seed=5)
    options = ["rerun", str(home / "out"), "--out", str(tmp_path / "new")]
    assert main([*options, "--train_file", str(other)]) == 2
    error = capsys.readouterr().err
    assert "the train data are not those of the record" in error
    assert error.count("\n") == 1
    model = save_model(tmp_path / "model", "roberta")
    assert main([*options, "--model", str(model)]) == 2
    assert "the model was a BertForSequenceClassification, and this is a Roberta" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tolerance", "-1"], "tolerance must be a number, 0 or above, not -1.0"),
        (["--tolerance", "nan"], "tolerance must be a number, 0 or above, not nan"),
        (["--epochs", "3"], "unknown option '--epochs'; see unipelt rerun --help"),
        (["--threads", "0"], "threads must be 1 or more, not 0"),
        (["--glue_dir", "x"], "glue_dir goes with a task"),
    ],
)
def test_bad_options_are_one_line(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    assert main(["rerun", str(home / "out"), "--out", str(tmp_path / "new"), *options]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_folders_that_hold_something_are_left_alone(home: Path, tmp_path: Path) -> None:
    before = tree(home)
    with pytest.raises(ValueError, match="is the folder of the record itself"):
        rerun(home / "out", home / "out", log=never)
    shutil.copytree(home / "out", tmp_path / "copy")
    with pytest.raises(ValueError, match="copy is there already; remove it"):
        rerun(home / "out", tmp_path / "copy", log=never)
    for content in ("{", "[]", '{"status": "running", "of": {"sha256": "of another"}}', '{"status": "running"}'):
        (tmp_path / "copy" / "rerun.json").write_text(content)
        with pytest.raises(ValueError, match="copy is there already; remove it"):
            rerun(home / "out", tmp_path / "copy", log=never)
    for file in (home / "out" / "result.json", home / "train.tsv"):
        with pytest.raises(ValueError, match=f"{file.name} is not a folder"):
            rerun(home / "out", file, log=never)
    with pytest.raises(FileNotFoundError, match="there is no result at"):
        rerun(tmp_path / "nowhere", log=never)
    assert tree(home) == before


def test_a_failure_of_the_run_is_no_difference(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("unipelt.glue.run._execute", full)
    assert main(["rerun", str(home / "out"), "--out", str(tmp_path / "new")]) == 2
    assert "the run failed after it had begun: [Errno 28] No space left" in capsys.readouterr().err


# Records of other versions


def test_what_an_older_record_lacks_takes_its_default(record: dict[str, Any]) -> None:
    """As if `regression`, and a field of LoRA, had been added since the run."""
    del record["settings"]["regression"]
    assert_digest_of_its_time(record, "regression")
    settings, notes = settings_of(record)
    assert settings.regression is None
    assert "the record lacks settings that were added since, which take their defaults: regression None" in notes
    del record["method"]["config"]["lora"]["alpha"]
    assert_digest_of_its_time(record, "regression")
    settings, notes = settings_of(record)
    assert settings.config.lora is not None
    assert any(f"which takes its default: lora.alpha {settings.config.lora.alpha!r}" in note for note in notes)
    assert settings.method == "unipelt-apl"


def assert_digest_of_its_time(record: dict[str, Any], *absent: str) -> None:
    """Give the record the digest that it would have had."""
    import hashlib

    identity = {key: value for key, value in RunSettings(**record["settings"]).identity().items() if key not in absent}
    identity["method"] = record["method"]["config"]
    record["digest"] = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def test_what_a_preset_meant_counts(record: dict[str, Any]) -> None:
    """As if the preset's rank had been 2."""
    config = UniPELT_of(record).updated({"lora": {"rank": 2}})
    record["method"]["config"] = config.to_dict()
    assert_digest_of_its_time(record)
    settings, _ = settings_of(record)
    assert settings.config == config
    assert settings.method_name == "unipelt-apl, lora.rank=2"


def UniPELT_of(record: dict[str, Any]) -> unipelt.UniPELTConfig:
    return unipelt.UniPELTConfig.from_dict(record["method"]["config"])


def test_older_records_say_less_of_the_model(record: dict[str, Any]) -> None:
    older = change(
        record, "model", lambda model: {key: model[key] for key in ("name", "class", "sha256", "fingerprint")}
    )
    older["code"]["dirty"] = record["code"]["dirty"] = False
    assert surroundings(older, record) == []


def test_digests_of_whole_paths_cannot_always_be_checked(record: dict[str, Any]) -> None:
    relative = change(record, "settings.train_file", lambda path: "data/train.tsv")
    collected = change(record, "settings", lambda values: values | {"model": "model", "output_dir": "out"})
    for other in (relative, collected):
        _, notes = settings_of(other)
        assert any("digest of the settings cannot be checked" in note for note in notes)
    with pytest.raises(ValueError, match="are not those that were run"):
        settings_of(change(record, "settings.model", lambda path: "model"))


def test_collected_records_say_where_to_look(home: Path, tmp_path: Path) -> None:
    collect(home / "out", tmp_path / "records")
    options = {"train_file": str(home / "train.tsv"), "dev_file": str(home / "dev.tsv"), "model": str(home / "model")}
    with pytest.raises(ValueError, match=r"train_file is train.tsv, and nothing is there; .* --train_file"):
        rerun(tmp_path / "records" / "run", tmp_path / "new", log=quiet)
    assert rerun(tmp_path / "records" / "run", tmp_path / "new", changes=options, log=quiet)["equal"]


def test_threads_and_device_are_those_of_the_record(record: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    record["hardware"]["threads"] = 5
    assert settings_of(record)[0].threads == 5
    assert settings_of(record, {"threads": 2})[0].threads == 2
    record["settings"]["threads"] = 3
    assert settings_of(record)[0].threads == 3
    record["settings"]["device"] = "auto"
    assert settings_of(record)[0].device == "cpu"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    record["hardware"] |= {"device": "cuda", "gpu": "a GPU"}
    settings, notes = settings_of(record)
    assert settings.device == "auto"
    assert "it ran on a GPU ('a GPU'), and there is none here" in notes
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert settings_of(record)[0].device == "cuda"
    assert settings_of(record, {"device": "cpu"})[0].device == "cpu"
    with pytest.raises(ValueError, match="a rerun cannot have another seed; it may have another model"):
        settings_of(record, {"seed": 2})


def test_only_the_first_differences_are_told(record: dict[str, Any]) -> None:
    other = change(record, "gates.values.prefix.mean", lambda values: [value + 1 for value in values] * 8)
    result = compare(record, other) | {"surroundings": []}
    lines = format_report(result)
    assert lines[0].startswith("different: 16 of ")
    assert lines[-2].strip() == "and 6 more; the largest difference is 1"
    assert "nothing that the record knows of" in lines[-1]
