"""GLUE and tasks like it: what the tasks are, their data, K-shot samples, metrics and leaderboard files."""

from unipelt.glue.data import DataError, fingerprint, load_files, load_task, split_note
from unipelt.glue.leaderboard import write_predictions
from unipelt.glue.metric import GlueMetric, compute_metrics_for, glue_metric, majority_score, score
from unipelt.glue.tasks import TASKS, Task, get_task
from unipelt.runs.sampling import few_shot

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
