"""The parts of a loaded run that training, the last choices and the record need, whatever its task."""

from __future__ import annotations

from typing import Any, Protocol

from transformers import PreTrainedModel

from unipelt.runs.settings import TrainingSettings


class Training(Protocol):
    """The parts of a loaded run that training needs."""

    @property
    def settings(self) -> TrainingSettings:
        """The settings of the run."""

    @property
    def model(self) -> PreTrainedModel:
        """The model to train."""

    @property
    def primary(self) -> str:
        """The metric that chooses the best checkpoint. Larger is better."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics of the task."""

    @property
    def data(self) -> dict[str, dict[str, Any]]:
        """The number of rows and the fingerprint of each dataset split."""

    @property
    def notes(self) -> list[str]:
        """The notes that a reader of the score must know."""

    @property
    def device(self) -> str:
        """The device, `cpu` or `cuda`."""

    @property
    def digest(self) -> str:
        """The SHA-256 of everything that determines the outcome, including data and weights."""
