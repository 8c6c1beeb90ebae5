"""Records to publish: nothing of the machine is left in them, and a report of them says the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report_records import make_record, save

from unipelt.cli import main
from unipelt.records.record import read_result
from unipelt.report import ReportError, collect, read_results, write_report
from unipelt.sweep import SweepError, read_sweep, run_folder, write_request

SWEEP = """
train_samples: 16
glue_dir: {home}/private/glue
model: {home}/private/model
grid:
  - task: rte
    method: [lora, adapter]
    seed: [1, 2]
"""


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A sweep of four runs: two finished, one failed, one not there."""
    (tmp_path / "sweep.yaml").write_text(SWEEP.format(home=tmp_path))
    sweep = read_sweep(tmp_path / "sweep.yaml")
    out = tmp_path / "private" / "runs"
    write_request(sweep, out)
    for settings in sweep.runs[:2]:
        folder = run_folder(out, settings)
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "weights").write_bytes(b"large")
        record = make_record("rte", "lora", int(settings.seed), 0.5 + settings.seed / 10, k=16)
        record |= {"settings": settings.to_dict() | {"output_dir": str(folder)}, "digest": settings.digest()}
        record["model"]["name"] = settings.model
        (folder / "result.json").write_text(json.dumps(record))
    failed = run_folder(out, sweep.runs[2])
    failed.mkdir()
    (failed / "failure.json").write_text(json.dumps({"error": f"there is no {tmp_path}/private/glue/RTE here"}))
    return out


def test_what_is_left_and_what_is_not(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "records"
    written, left_out = collect(runs, out)
    assert left_out == ()
    assert set(written) == {path for path in out.rglob("*") if path.is_file()}
    assert sorted(path.name for path in written) == ["failure.json", "result.json", "result.json", "sweep.json"]
    text = "".join(path.read_text() for path in written)
    assert str(tmp_path) not in text
    assert "private" not in text
    before, after = read_results(runs), read_results(out)
    assert [run.name for run in after.runs] == [run.name for run in before.runs]
    assert after.failures == ((before.failures[0][0], "there is no RTE here"),)
    assert len(after.absent) == 1
    assert after.absent == before.absent
    assert after.seeds == before.seeds
    for old, new in zip(before.runs, after.runs, strict=True):
        assert new.record["settings"]["glue_dir"] == "glue"
        assert new.record["settings"]["output_dir"] == new.name
        assert new.record["model"]["name"] == "model"
        changed = [key for key in old.record if old.record[key] != new.record[key]]
        assert changed == ["settings", "model"]
    assert [(cell.mean, cell.missing) for cell in before.cells] == [(cell.mean, cell.missing) for cell in after.cells]


def test_again_and_with_others(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "records"
    first, _ = collect(runs, out)
    texts = [path.read_bytes() for path in first]
    again, _ = collect(runs, out)
    assert [path.read_bytes() for path in again] == texts
    (tmp_path / "sweep.yaml").write_text(SWEEP.format(home=tmp_path).replace("rte", "cola"))
    write_request(read_sweep(tmp_path / "sweep.yaml"), tmp_path / "more")
    save(tmp_path / "more", make_record("cola", "adapter", 7))
    collect(tmp_path / "more", out)
    assert len(read_results(out).runs) == 3
    assert {key[0] for key in read_results(out).seeds} == {"rte", "cola"}


def test_a_single_run(tmp_path: Path) -> None:
    (path,) = save(tmp_path / "runs", make_record(output_dir="/somewhere/else"))
    written, _ = collect(path.parent, tmp_path / "records")
    assert [read_result(item)["settings"]["output_dir"] for item in written] == ["else"]


def test_a_name_with_a_slash_is_no_path_of_the_machine(tmp_path: Path) -> None:
    record = make_record(model="google/bert_uncased")
    record["packages"]["torch"] = "/opt/wheels/torch-2.6.0.whl"
    (path,) = save(tmp_path / "runs", record)
    [copy], _ = collect(path.parent, tmp_path / "records")
    assert copy.parent.name == "run", "a folder of one run has no name of its own"
    again = read_result(copy)
    assert (again["model"]["name"], again["settings"]["model"]) == ("google/bert_uncased",) * 2
    assert again["packages"] == {"torch": "torch-2.6.0.whl"}


def test_what_is_refused(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        collect(tmp_path / "none", tmp_path / "records")
    with pytest.raises(ReportError, match="holds no finished run"):
        collect(tmp_path, tmp_path / "records")
    for out in (runs, runs / "records", runs.parent):
        with pytest.raises(ReportError, match="one lies in the other"):
            collect(runs, out)
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "sweep.json").write_text("{")
    with pytest.raises(SweepError):
        collect(runs, tmp_path / "records")
    assert [path.name for path in (tmp_path / "records").iterdir()] == ["sweep.json"]


def test_the_command(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = runs / "broken"
    broken.mkdir()
    (broken / "result.json").write_text("{")
    assert main(["collect", str(runs), "--out", str(tmp_path / "records")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("4 files in ")
    assert "left out: broken/result.json, as it is not valid JSON" in printed
    assert not (tmp_path / "records" / "broken").exists()
    write_report(tmp_path / "records", tmp_path / "report")
    assert str(tmp_path) not in (tmp_path / "report" / "index.html").read_text()
