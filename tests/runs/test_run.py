"""A run of any task: what it refuses before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from unipelt.runs.run import run
from unipelt.runs.settings import SettingsError
from unipelt.tasks.settings import QASettings


def test_the_options_of_trainer_are_checked_before_anything_is_written(tmp_path: Path) -> None:
    class Refused:
        digest = "0"

        def arguments(self, folder: Path) -> None:
            raise SettingsError(f"trainer: not in {folder.name}")

    def prepare(settings: QASettings) -> Any:
        return Refused()

    with pytest.raises(SettingsError, match="trainer: not in mine"):
        run(QASettings(train_file="/a", output_dir=str(tmp_path / "mine")), prepare)
    assert not (tmp_path / "mine").exists()
