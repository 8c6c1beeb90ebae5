"""The arguments of Trainer, as the settings of a run make them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import tiny_bert
from transformers import TrainingArguments

from unipelt.glue.settings import RunSettings
from unipelt.runs import processes
from unipelt.runs.errors import RunError
from unipelt.runs.settings import SettingsError
from unipelt.runs.trainer_arguments import training_arguments

FOLDER = Path("runs") / "mine"


def make(kind: type[TrainingArguments] = TrainingArguments, device: str = "cpu", **changes: Any) -> Any:
    job: Any = SimpleNamespace(
        settings=RunSettings(task="rte", **changes), device=device, primary="f1", model=tiny_bert()
    )
    return training_arguments(job, FOLDER, kind, per_device_eval_batch_size=1)


def test_settings_become_arguments() -> None:
    values: dict[str, Any] = {
        "epochs": 7,
        "batch_size": 3,
        "learning_rate": 0.5,
        "warmup_ratio": 0.25,
        "weight_decay": 0.1,
    }
    more: dict[str, Any] = {"max_grad_norm": 2.0, "seed": 9, "precision": "bf16", "num_workers": 2}
    made = make(**values, **more)
    wanted: dict[str, Any] = {
        "output_dir": str(FOLDER / "checkpoints"),
        "run_name": "mine",
        "num_train_epochs": 7,
        "per_device_train_batch_size": 3,
        "per_device_eval_batch_size": 1,
        "learning_rate": 0.5,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.1,
        "max_grad_norm": 2.0,
        "optim": "adamw_torch",
        "seed": 9,
        "logging_nan_inf_filter": False,
        "save_total_limit": None,
        "load_best_model_at_end": True,
        "metric_for_best_model": "f1",
        "greater_is_better": True,
        "restore_callback_states_from_checkpoint": True,
        "bf16": True,
        "use_cpu": True,
        "dataloader_num_workers": 2,
        "dataloader_pin_memory": False,
        "report_to": [],
        "disable_tqdm": True,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "logging_strategy": "epoch",
        "gradient_accumulation_steps": 1,
    }
    assert {name: getattr(made, name) for name in wanted} == wanted
    assert made.get_warmup_steps(8) == 2, "a fraction of all steps"
    assert not make().bf16


def test_options_win_over_what_is_usual() -> None:
    made = make(trainer={"optim": "sgd", "lr_scheduler_type": "cosine", "eval_steps": 5, "warmup_steps": 3})
    assert (made.optim, made.lr_scheduler_type, made.get_warmup_steps(8)) == ("sgd", "cosine", 3)
    assert (made.eval_strategy, made.eval_steps, made.save_steps, made.logging_steps) == ("steps", 5, 5, 5)


def test_activations_are_computed_again_without_reentry() -> None:
    made = make(gradient_checkpointing=True)
    name = "activation_checkpointing" if hasattr(made, "activation_checkpointing") else "gradient_checkpointing"
    assert getattr(made, name) is True
    assert getattr(made, f"{name}_kwargs") == {"use_reentrant": False}
    assert not getattr(make(), name)


def test_a_batch_is_for_all_gpus_together() -> None:
    class Four(TrainingArguments):
        def __post_init__(self) -> None:
            super().__post_init__()
            self._n_gpu = 4

    made = make(Four, batch_size=3)
    assert (made.n_gpu, made.train_batch_size) == (1, 3)


def test_what_a_device_cannot_do() -> None:
    with pytest.raises(SettingsError, match=r"trainer\.fp16 needs a GPU, and there is none here"):
        make(trainer={"fp16": True})


@pytest.mark.parametrize(("changes", "name"), [({"average": {"last": 2}}, "average"), ({"select": True}, "select")])
def test_what_several_processes_cannot_do(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], name: str) -> None:
    make(**changes)
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    with pytest.raises(SettingsError, match=f"{name} is for a run of one process, and here are 2; leave it out"):
        make(**changes)


def test_processes_that_transformers_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    with pytest.raises(RunError, match="Transformers sees 1 processes, and WORLD_SIZE is 2; start the run by torchrun"):
        make()
