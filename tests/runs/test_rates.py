"""Learning rates of parts in a run's settings (`rates`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_task import make_quick, quick
from transformers import Trainer

from unipelt.glue.pack_runs import run_packed
from unipelt.glue.rerun import rerun
from unipelt.glue.run import run
from unipelt.glue.settings import RunSettings
from unipelt.runs.options import parse
from unipelt.runs.settings import SettingsError
from unipelt.sweep import read_sweep

pytestmark = pytest.mark.usefixtures("alone")

RATES = {"lora": 1e-3, "adapter": 2e-3, "gate": 5e-2, "head": 1e-4}
"""Beside a learning_rate of 1e-2, which the prefix has."""


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_quick(tmp_path_factory.mktemp("home"))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Trainer]:
    """The trainers that train."""
    found: list[Trainer] = []
    train: Callable[..., Any] = Trainer.train

    def note(self: Trainer, *args: Any, **options: Any) -> Any:
        found.append(self)
        return train(self, *args, **options)

    monkeypatch.setattr(Trainer, "train", note)
    return found


def quiet(line: str) -> None:
    pass


def settings(home: Path, out: Path, **changes: Any) -> RunSettings:
    return RunSettings(**quick(home, output_dir=str(out), **{"rates": RATES, **changes}))


@pytest.mark.parametrize(
    ("method", "rates", "sentence"),
    [
        ("lora", [1], "rates must be a mapping of parts to learning rates, not [1]"),
        ("lora", {"adapter": 1e-3}, "rates.adapter: lora trains no such part; its parts are lora, head, lora_b"),
        ("lora", {"gate": 1e-3}, "rates.gate: lora trains no such part"),
        ("adapter", {"lora_b": 1e-3}, "rates.lora_b: adapter trains no such part"),
        ({"preset": "lora", "train_head": False}, {"head": 1e-3}, "rates.head: "),
        ("fine-tuning", {"lora": 1e-3}, "rates.lora: fine-tuning trains no such part; its parts are head"),
        ("lora", {"lora": 0}, "rates.lora must be a learning rate above 0, not 0"),
        ("lora", {"lora": True}, "rates.lora must be a learning rate above 0, not True"),
        ("lora", {"lora": float("nan")}, "rates.lora must be a learning rate above 0, not nan"),
        ("lora", {"lora": "fast"}, "rates.lora must be a learning rate above 0, not 'fast'"),
    ],
)
def test_what_cannot_be_meant(method: Any, rates: Any, sentence: str) -> None:
    with pytest.raises(SettingsError) as caught:
        RunSettings(task="rte", method=method, rates=rates)
    assert sentence in str(caught.value)


def test_files_options_and_digests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("task: rte\nrates: {lora: 1e-3, gate: 0.01}\n")
    taken = parse(["mine.yaml", "--rates.prefix", "2e-3", "--rates.gate=null"], RunSettings)
    assert taken.rates == {"lora": 1e-3, "prefix": 2e-3}
    assert RunSettings(**taken.to_dict()) == taken
    plain = RunSettings(task="rte")
    assert "rates" not in plain.identity()
    assert plain.digest() == RunSettings(task="rte", rates={}).digest()
    assert len({plain.digest(), taken.digest(), parse(["mine.yaml"], RunSettings).digest()}) == 3


def test_each_part_has_its_rate(
    home: Path, tmp_path: Path, made: list[Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    choose: Callable[..., Any] = Trainer.get_optimizer_cls_and_kwargs

    def choose_for(args: Any, model: Any = None) -> Any:
        assert model is not None, "some optimizers look at the model's layers"
        return choose(args, model)

    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", staticmethod(choose_for))
    record = run(settings(home, tmp_path / "run", weight_decay=0.1), log=lines.append)
    assert record["settings"]["rates"] == RATES
    groups = made[0].optimizer.param_groups  # type: ignore[union-attr]
    found = {group["name"]: group["initial_lr"] for group in groups}
    assert found == {**RATES, "prefix": 1e-2}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}
    model: Any = made[0].model
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(trained)
    assert any("learning rate 0.01, lora 0.001, adapter 0.002, gate 0.05, head 0.0001, batch" in line for line in lines)
    plain = run(settings(home, tmp_path / "plain", rates=None, weight_decay=0.1), log=quiet)
    assert plain["evaluations"] != record["evaluations"]


def test_equal_rates_are_the_learning_rate(home: Path, tmp_path: Path) -> None:
    """Without weight decay, the same training."""
    plain = run(settings(home, tmp_path / "plain", rates=None), log=quiet)
    equal = run(settings(home, tmp_path / "equal", rates=dict.fromkeys(RATES, 1e-2)), log=quiet)
    for one, other in zip(plain["evaluations"], equal["evaluations"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_a_run_with_rates_goes_on_after_a_kill_and_can_be_done_again(home: Path, tmp_path: Path) -> None:
    def die(line: str) -> None:
        if line.startswith("epoch   2"):
            raise Killed

    chosen = settings(home, tmp_path / "out", epochs=3)
    with pytest.raises(Killed):
        run(chosen, log=die)
    record = run(chosen, log=quiet)
    assert record["attempts"] == 2
    assert rerun(tmp_path / "out", tmp_path / "again", log=quiet)["equal"], "of a run without a kill, all numbers"


def test_a_grid_over_rates_and_a_pack(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text("task: rte\nmethod: lora\nchoose: {rates.lora_b: [1e-3, 1e-2]}\ngrid:\n  - seed: [1, 2]\n")
    sweep = read_sweep(file)
    assert [item.rates for item in sweep.runs] == [{"lora_b": 1e-3}, {"lora_b": 1e-2}] * 2
    assert len({sweep.cell(item) for item in sweep.runs}) == 1
    few = read_sweep(file, override={"rates.lora_b": "1e-2", "rates.head": "1e-4"})
    assert [item.rates for item in few.runs] == [{"head": 1e-4, "lora_b": 1e-2}] * 2
    outcome = run_packed([settings(home, tmp_path / "run")], places=1, log=quiet)[str(tmp_path / "run")]
    assert "rates and a pack exclude each other" in str(outcome)
