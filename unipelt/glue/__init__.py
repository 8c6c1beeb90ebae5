"""GLUE and similar tasks: the tasks, their data, K-shot samples, metrics and leaderboard files."""

from typing import TYPE_CHECKING

from unipelt.lazy import lazy_names

if TYPE_CHECKING:
    from unipelt.glue.data import fingerprint, load_files, load_task, split_note
    from unipelt.glue.leaderboard import write_predictions
    from unipelt.glue.metric import GlueMetric, compute_metrics_for, glue_metric, majority_score, score
    from unipelt.glue.tasks import TASKS, Task, get_task
    from unipelt.runs.sampling import few_shot
    from unipelt.runs.tables import DataError
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "DataError": "unipelt.runs.tables",
            "GlueMetric": "unipelt.glue.metric",
            "TASKS": "unipelt.glue.tasks",
            "Task": "unipelt.glue.tasks",
            "compute_metrics_for": "unipelt.glue.metric",
            "few_shot": "unipelt.runs.sampling",
            "fingerprint": "unipelt.glue.data",
            "get_task": "unipelt.glue.tasks",
            "glue_metric": "unipelt.glue.metric",
            "load_files": "unipelt.glue.data",
            "load_task": "unipelt.glue.data",
            "majority_score": "unipelt.glue.metric",
            "score": "unipelt.glue.metric",
            "split_note": "unipelt.glue.data",
            "write_predictions": "unipelt.glue.leaderboard",
        },
    )

__all__ = [
    "TASKS",
    "DataError",
    "GlueMetric",
    "Task",
    "compute_metrics_for",
    "few_shot",
    "fingerprint",
    "get_task",
    "glue_metric",
    "load_files",
    "load_task",
    "majority_score",
    "score",
    "split_note",
    "write_predictions",
]
