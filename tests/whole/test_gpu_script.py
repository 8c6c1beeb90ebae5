"""The script for a GPU, in its small mode on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scripts import gpu

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_part_ends_well_and_is_not_repeated(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    line = [str(ROOT / ".ci" / "gpu"), "--small", "--out", str(tmp_path)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    names = [part.name for part in gpu.parts(tmp_path, small=True)]
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert list(report["parts"]) == names
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for words in ("unipelt-apl", "PEFT", "runs at once", "ms a token", "passed"):
        assert words in text
    again = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=100)
    assert again.returncode == 0
    assert again.stdout == "", "nothing was left to do"


def test_a_part_that_fails_is_shown_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = gpu.Part("bad", "What fails", ("-c", "import sys; print('its last words'); sys.exit(3)"), 30)
    slow = gpu.Part("slow", "What takes long", ("-c", "import time; time.sleep(60)"), 0.5)
    monkeypatch.setattr(gpu, "parts", lambda out, small: [bad, slow])
    for _ in range(2):
        assert gpu.main(["--small", "--out", str(tmp_path)]) == 1
        found = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["parts"]
        assert found["bad"]["status"] == "failed with exit code 3: its last words"
        assert found["slow"]["status"].startswith("ended after")
    assert "its last words" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_what_the_time_does_not_reach_is_said(tmp_path: Path) -> None:
    assert gpu.main(["--small", "--out", str(tmp_path), "--seconds", "0"]) == 1
    assert (tmp_path / "report.md").read_text(encoding="utf-8").count("Not run: the time was over.") == 6


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--out", str(tmp_path / "none")]) == 2
    assert "finds no GPU; --small" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
