"""`examples/benchmark.py`: its counters against modules worked by hand, its turns by a made-up clock; whole runs."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import benchmark
import launches
import measuring
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, BertConfig

import unipelt
from unipelt.config.presets import PRESETS

SMALL = ["--random", "bert", "--layers", "2", "--hidden", "32", "--heads", "2", "--batch_size", "2", "--tokens", "8"]
SMALL += ["--warmup", "1", "--repetitions", "2", "--device", "cpu", "--threads", "1"]
PLAIN = [*SMALL, "--peft", "false"]
ONES = torch.ones(2, 4)


def settings(*words: str) -> argparse.Namespace:
    return benchmark.parse([*PLAIN, *words])


class Toy(nn.Module):
    """A linear layer whose weight may train, and a loss."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        return SimpleNamespace(loss=self.linear(x).sum())


# Operations


def counted(run: Callable[[], Any]) -> dict[str, int]:
    with measuring.OperationCounter() as counter:
        run()
    return dict(counter.counts)


def test_operations_of_a_forward_pass_leave_views_out() -> None:
    net, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.ones(2, 4)
    with torch.no_grad():
        assert counted(lambda: net(x).view(3, 2)) == {"aten.addmm.default": 1, "aten.relu.default": 1}


def test_operations_of_the_backward_pass_are_counted_too() -> None:
    net, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.ones(2, 4)
    assert counted(lambda: net(x).view(3, 2).sum().backward()) == {
        "aten.addmm.default": 1,
        "aten.relu.default": 1,
        "aten.sum.default": 1,
        "aten.ones_like.default": 1,
        "aten.threshold_backward.default": 1,
        "aten.mm.default": 1,  # of the weight; the input wants no gradient
        "aten.sum.dim_IntList": 1,  # of the bias
    }


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(0, 1),
        lambda x: x.expand(3, 2, 4),
        lambda x: x[0],
        lambda x: x[:, 1:3],
        lambda x: x.unbind(0),
        lambda x: x.split(2, dim=1),
        lambda x: x.chunk(2, dim=1),
        lambda x: x.unsqueeze(0).squeeze(0),
        lambda x: x.detach(),
        lambda x: x.diagonal(),
        lambda x: torch.ops.aten._unsafe_view(x, [8]),
    ],
)
def test_views_are_no_operations(view: Callable[[Tensor], Any]) -> None:
    assert counted(lambda: view(ONES)) == {}


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda x: x.add_(1), "aten.add_.Tensor"),
        (lambda x: x.clone(), "aten.clone.default"),
        (lambda x: x.t().contiguous(), "aten.clone.default"),
        (lambda x: x.zero_(), "aten.zero_.default"),
        (lambda x: torch.cat([x, x]), "aten.cat.default"),
    ],
)
def test_what_writes_or_makes_memory_is_an_operation(change: Callable[[Tensor], Any], name: str) -> None:
    x = torch.ones(2, 4)
    assert counted(lambda: change(x)) == {name: 1}


# Kernels


@pytest.mark.parametrize(
    ("run", "kernels"),
    [
        (lambda: nn.functional.linear(ONES, ONES).relu().view(4), 2),
        (lambda: ONES.t().contiguous(), 1),
        (lambda: torch.zeros_like(ONES), 1),
        (lambda: torch.empty_like(ONES).transpose(0, 1)[0], 0),
        (lambda: torch.cat([ONES, ONES]).add_(1), 2),
        (lambda: torch.addmm(ONES[0, :2], ONES, ONES.t()), 1),
    ],
)
def test_kernels_are_the_operations_that_do_work(run: Callable[[], Any], kernels: int) -> None:
    assert launches.count_kernels(run) == kernels


def test_the_largest_sources_beyond_lora() -> None:
    def row(forward: dict[str, int], backward: dict[str, int]) -> dict[str, Any]:
        return {"launches": {"operations": {"forward": forward, "backward": backward}}}

    rows = {
        "lora": row({"aten.mm.default": 4, "aten.cat.default": 1}, {"aten.sum.dim_IntList": 2}),
        "mine": row({"aten.mm.default": 5, "aten.add.Tensor": 3}, {"aten.sum.dim_IntList": 7, "aten.mm.default": 1}),
        "AdapterHub's UniPELT": {},
    }
    assert launches.above_lora(rows, most=2) == [
        "mine, operations of a training step beyond lora (+9): sum.dim_IntList +5 (+0 forward, +5 backward), "
        "add.Tensor +3 (+3 forward, +0 backward)."
    ]
    assert launches.above_lora({"mine": rows["mine"]}) == []


def test_launches_of_a_step_change_no_parameter() -> None:
    toy = Toy(2, 2)
    before = toy.linear.weight.detach().clone()
    contender = measuring.Contender(toy, {"x": torch.ones(1, 2)}, settings())
    found = launches.launches(contender, measuring.OperationCounter)
    assert found["operations"]["forward"] == {"aten.addmm.default": 1, "aten.sum.default": 1}
    assert found["operations"]["backward"]["aten.mm.default"] == 1
    kernels = found["kernels"]
    assert list(kernels) == ["forward", "backward", "adamw_foreach", "adamw_fused"]
    assert (kernels["forward"], kernels["backward"]) == (2, 3), "backward: ones, the weight's and the bias's product"
    assert kernels["adamw_fused"] < kernels["adamw_foreach"]
    assert torch.equal(toy.linear.weight, before)
    assert toy.linear.weight.grad is None


# Memory


def test_live_bytes_follow_what_is_made_and_freed() -> None:
    outside = torch.zeros(10)
    with measuring.LiveBytes() as memory:
        memory.add(outside)
        memory.add(outside.view(2, 5))
        assert memory.live == 40
        first = torch.zeros(100)
        second = first + 1
        assert memory.live == 40 + 800
        del first
        assert memory.live == 40 + 400
        third = second.view(10, 10).relu_()
        del second, third
    assert (memory.live, memory.peak) == (40, 840)


def test_the_peak_of_a_training_step_by_hand() -> None:
    """A layer of 1000 numbers and no bias: weights, gradient and two moments of 4,000 bytes, and AdamW's work."""
    toy = Toy(10, 100)
    toy.linear.bias.requires_grad_(False)
    batch = {"x": torch.ones(1, 10)}
    peak = measuring.Contender(toy, batch, settings()).peak_bytes()
    kept = 4 * 4000 + 400 + 40 + 4  # weights, gradient, moments; bias; batch; AdamW's count of steps
    assert kept <= peak <= kept + 2 * 4000 + 1000
    toy.linear.weight.requires_grad_(False)
    toy.linear.bias.requires_grad_(True)
    frozen = measuring.Contender(toy, batch, settings()).peak_bytes()
    kept = 4000 + 4 * 400 + 40 + 4
    assert kept <= frozen <= kept + 3 * 400 + 100, "a frozen weight has no gradient and no moments"


# Turns


def test_seconds_are_the_clocks() -> None:
    clock = itertools.count(0.0, 0.25).__next__
    contender = measuring.Contender(Toy(2, 2), {"x": torch.ones(1, 2)}, settings(), clock)
    assert [contender.seconds("train"), contender.seconds("inference")] == [0.25, 0.25]


def test_training_trains_and_inference_does_not() -> None:
    toy = Toy(2, 2)
    contender = measuring.Contender(toy, {"x": torch.ones(1, 2)}, settings())
    before = toy.linear.weight.detach().clone()
    contender.seconds("inference")
    assert torch.equal(toy.linear.weight, before)
    assert not toy.training
    contender.seconds("train")
    assert not torch.equal(toy.linear.weight, before)
    assert toy.training
    assert toy.linear.weight.grad is None


def test_what_is_deployed_infers() -> None:
    trained, small = Toy(2, 2), Toy(2, 2)
    calls: list[str] = []
    trained.register_forward_hook(lambda *_: calls.append("trained"))
    small.register_forward_hook(lambda *_: calls.append("deployed"))
    contender = measuring.Contender(trained, {"x": torch.ones(1, 2)}, settings())
    contender.deploy(small)
    contender.seconds("train")
    contender.seconds("inference")
    assert calls == ["trained", "deployed"]
    assert not small.training


def test_the_deployed_form_has_no_network_and_the_same_logits() -> None:
    chosen = settings()
    config = benchmark.make_config(chosen)
    model = unipelt.inject(benchmark.load_model(config, chosen), "unipelt-apl").eval()
    batch = measuring.make_batch(config, chosen)
    small = benchmark.deployed(model)
    assert not any("prefix_network" in name for name, _ in small.named_parameters())
    assert any("prefix_network" in name for name, _ in model.named_parameters())
    with torch.no_grad():
        assert torch.equal(small(**batch).logits, model(**batch).logits)


def test_contenders_take_turns_and_the_warm_up_does_not_count() -> None:
    asked: list[tuple[str, str]] = []

    def contender(name: str) -> Callable[[str], float]:
        def seconds(kind: str) -> float:
            asked.append((name, kind))
            return float(len(asked))

        return seconds

    seconds = benchmark.race({name: contender(name) for name in "abc"}, warmup=1, repetitions=2)
    assert len(asked) == 3 * 3 * 2
    turns = [asked[start : start + 3] for start in range(0, len(asked), 3)]
    assert all({name for name, _ in turn} == set("abc") and len({kind for _, kind in turn}) == 1 for turn in turns)
    assert [turn[0][0] for turn in turns] == list("ccaabb"), "another one goes first in each turn"
    assert seconds["a"] == {"train": [7.0, 15.0], "inference": [10.0, 18.0]}


def test_ratios_are_of_times_of_the_same_turn() -> None:
    """The machine is three times as slow in the second turn and ten times in the third."""
    assert benchmark.ratio([0.5, 1.5, 8.0], [1.0, 3.0, 10.0]) == pytest.approx(
        {"low": 0.5, "median": 0.5, "high": 0.65}
    )
    assert benchmark.ratio([3.0], [2.0]) == {"low": 1.5, "median": 1.5, "high": 1.5}


# Batches


@pytest.mark.parametrize("padding", [0.0, 0.25, 0.49])
def test_padding_is_the_fraction_that_was_asked_for(padding: float) -> None:
    config = BertConfig(vocab_size=50, pad_token_id=3)
    batch = measuring.make_batch(config, settings("--batch_size", "9", "--tokens", "100", "--padding", str(padding)))
    mask = batch["attention_mask"]
    assert 1 - mask.float().mean().item() == pytest.approx(padding, abs=0.01)
    assert torch.equal(batch["input_ids"] == 3, mask == 0)
    assert mask.sum(dim=1).max() == 100
    assert batch["labels"].shape == (9,)


# Settings


def test_the_command_line_wins_over_the_file_and_the_file_over_its_base(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("precision: bf16\nthreads: 2\nbatch_size: 3\n")
    (tmp_path / "mine.yaml").write_text(
        "base: base.yaml\nbatch_size: 4\ntokens: 32\npadding: 0.1\npeft: false\ndropout: null\n"
        "methods: [lora, {preset: adapter, adapter: {bottleneck: 16}}]\n"
    )
    read = benchmark.parse([str(tmp_path / "mine.yaml"), "--tokens", "64", "--compile"])
    assert (read.precision, read.threads, read.batch_size, read.tokens) == ("bf16", 2, 4, 64)
    assert (read.padding, read.peft, read.compile, read.dropout) == (0.1, False, True, None)
    assert list(benchmark.resolve_methods(read.methods)) == ["fine-tuning", "lora", "adapter, adapter.bottleneck=16"]
    assert read.output == "runs/mine.json"
    assert benchmark.parse([str(tmp_path / "mine.yaml"), "--methods", "frozen,bitfit"]).methods == ["frozen", "bitfit"]


def test_the_papers_numbers_stand_beside_its_methods_only() -> None:
    assert benchmark.paper_row(PRESETS["unipelt-apl"]) == {
        "parameters": "1.4M",
        "train_time_percent": "67",
        "inference_time_percent": "127",
    }
    released = PRESETS["lora"].updated({"train_head": False, "gate": {"pooling": "mean"}})
    assert benchmark.paper_row(released)["parameters"] == "295K"
    assert benchmark.paper_row(PRESETS["lora"].updated({"lora": {"rank": 4}})) == {}
    assert benchmark.paper_row(benchmark.resolve_methods(["frozen"])["frozen"]) == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "lorra"], "there is no preset 'lorra'; did you mean 'lora'?"),
        (["--tokens", "0"], "argument --tokens: it must be a whole number, 1 or more, not '0'"),
        (["--padding", "0.5"], "argument --padding: it must be a number, at least 0 and below 0.5, not '0.5'"),
        (["--compile", "maybe"], "argument --compile: it must be true or false, not 'maybe'"),
        (["--precision", "fp16"], "argument --precision: 'fp16' is not one of fp32, bf16"),
        (["--tokenz", "4"], "unknown option '--tokenz'; did you mean '--tokens'?"),
        (["--random", "brt"], "unknown model type 'brt'; did you mean 'bart' or 'bert'?"),
        (["--random", "clip"], "Transformers has no sequence classifier of the model type 'clip'"),
        (["--hidden", "33"], "hidden is 33, which 2 heads do not divide"),
        (["--tokens", "600"], "tokens is 600, and the model takes 512 at most"),
        (["--random", "null"], "layers goes with random"),
        (["--random", "fnet"], "fnet"),
        (["--random", "funnel"], "Transformers cannot make a 'funnel' of this size: "),
        (["--random", "squeezebert"], "Transformers cannot make a 'squeezebert' of this size: "),
        (["--random", "deberta", "--methods", "prefix"], "prefix: 'deberta' models cannot take a prefix"),
        (["--adapters_python", "/nowhere/python"], "adapters_python: /nowhere/python cannot be started"),
        (["there-is-none.yaml"], "there is no configuration file at there-is-none.yaml"),
    ],
)
def test_bad_input_is_one_clear_sentence(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*PLAIN, "--output", str(tmp_path / "out.json"), *words]
    config = [options.pop()] if words[0].endswith(".yaml") else []
    assert benchmark.main([*config, *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("benchmark.py: ")
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_a_field_that_no_benchmark_has_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    for text, message in (("task: rte\n", "has no 'task'"), ("tokenz: 4\n", "did you mean 'tokens'")):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"mine\.yaml") as caught:
            benchmark.parse([str(path)])
        assert message in str(caught.value)


# Whole runs


def test_a_run_leaves_a_record_and_prints_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "out.json"
    words = [*PLAIN, "--methods", "frozen,unipelt-apl", "--padding", "0.25", "--output", str(out)]
    assert benchmark.main(words) == 0
    record = json.loads(out.read_text())
    assert list(out.parent.iterdir()) == [out]
    rows = record["methods"]
    assert list(rows) == ["fine-tuning", "frozen", "unipelt-apl"]
    for row in rows.values():
        assert [len(row["seconds"][kind]) for kind in ("train", "inference")] == [2, 2]
        assert all(second > 0 for kind in row["seconds"].values() for second in kind)
        assert row["operations"]["frozen_forward"] == rows["frozen"]["operations"]["forward"]
        assert row["synchronisations"] is None
        counts = row["launches"]["operations"]
        assert sum(sum(part.values()) for part in counts.values()) == row["operations"]["train_step"]
        assert all(count > 0 for count in row["launches"]["kernels"].values())
    assert rows["fine-tuning"]["ratio"]["train"] == {"low": 1.0, "median": 1.0, "high": 1.0}
    assert rows["fine-tuning"]["operations"]["added_per_layer"] == 0
    added = rows["unipelt-apl"]["operations"]
    assert added["added_per_layer"] == (added["forward"] - added["frozen_forward"]) / 2 > 0
    assert rows["frozen"]["operations"]["train_step"] < rows["fine-tuning"]["operations"]["train_step"]
    assert rows["frozen"]["peak_bytes"] < rows["unipelt-apl"]["peak_bytes"] < rows["fine-tuning"]["peak_bytes"]
    assert record["settings"]["padding"] == 0.25
    assert {"hardware", "packages", "code", "model"} <= record.keys()

    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = AutoModelForSequenceClassification.from_config(BertConfig(intermediate_size=128, **sizes))
    counts = unipelt.parameter_counts(unipelt.inject(model, "unipelt-apl"))
    assert rows["unipelt-apl"]["parameters"] == {
        part: getattr(counts, part) for part in ("trained", "deployed", "head", "base")
    }

    lines = capsys.readouterr().out.splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    assert {len(row) for row in cells} == {17}
    assert [row[0] for row in cells[2:]] == list(rows)
    assert cells[4][1:3] == [f"{counts.trained:,}", f"{counts.deployed:,} [1.4M]"]
    assert cells[4][6].endswith("[67]")
    assert cells[4][8].endswith("[127]")
    assert "[" not in "".join(cells[3])

    before = out.read_bytes()
    assert benchmark.main(words) == 2
    assert "is there already" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert benchmark.main([*words, "--overwrite"]) == 0
    assert out.read_bytes() != before


@pytest.mark.parametrize(("family", "layers"), [("roberta", 2), ("gpt2", 2), ("bart", 4)])
def test_other_architectures(family: str, layers: int, tmp_path: Path) -> None:
    options = ["--random", family, "--padding", "0.3", "--methods", "unipelt-apl", "--dropout", "0"]
    record = benchmark.benchmark(settings(*options, "--output", str(tmp_path / "out.json")))
    assert record["model"]["layers"] == layers
    assert record["methods"]["unipelt-apl"]["operations"]["added_per_layer"] > 0


def test_a_model_from_a_folder_and_bfloat16(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 50}
    AutoModelForSequenceClassification.from_config(BertConfig(**sizes)).save_pretrained(tmp_path / "model")
    options = ["--model", str(tmp_path / "model"), "--precision", "bf16", "--repetitions", "1", "--peft", "false"]
    options += ["--tokens", "8", "--device", "cpu", "--output", str(tmp_path / "out.json"), "--methods", "lora"]
    record = benchmark.benchmark(benchmark.parse(options))
    assert record["model"] == {"class": "bert", "layers": 3, "hidden": 32}


def test_without_peft_its_row_is_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert benchmark.main([*SMALL, "--methods", "frozen", "--output", str(tmp_path / "out.json")]) == 0
    assert "PEFT's LoRA is left out: peft is not installed" in capsys.readouterr().out


FAKE = """#!{python}
import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if "config" in message:
        assert message["config"]["model_type"] == "bert" and message["settings"]["tokens"] == 8
        answer = {answer}
    else:
        answer = {{"seconds": {{"train": 0.5, "inference": 0.25}}[message["seconds"]]}}
    print(json.dumps(answer), flush=True)
"""
DESCRIPTION: dict[str, Any] = {
    "operations": {"forward": 30, "train_step": 90, "frozen_forward": 10},
    "peak_bytes": 1000,
    "synchronisations": None,
    "parameters": {"trained": 7, "deployed": None, "head": 3, "base": 100},
    "packages": {"adapters": "0"},
}


def fake_python(folder: Path, answer: dict[str, Any]) -> str:
    path = folder / "python"
    path.write_text(FAKE.format(python=sys.executable, answer=answer))
    path.chmod(0o755)
    return str(path)


def test_a_model_in_another_interpreter_takes_turns_with_the_rest(tmp_path: Path) -> None:
    options = ["--methods", "frozen", "--adapters_python", fake_python(tmp_path, DESCRIPTION)]
    record = benchmark.benchmark(settings(*options, "--output", str(tmp_path / "out.json")))
    row = record["methods"]["AdapterHub's UniPELT"]
    assert row["seconds"] == {"train": [0.5, 0.5], "inference": [0.25, 0.25]}
    assert row["operations"]["added_per_layer"] == 10
    assert "| AdapterHub's UniPELT | 7 | ? | ? | 3 | 500.0 |" in benchmark.table(record)


@pytest.mark.parametrize(
    ("answer", "message"),
    [({"error": "ImportError: no such thing"}, "ImportError: no such thing"), (None, "it ended without an answer")],
)
def test_what_goes_wrong_in_the_other_interpreter_is_said_here(
    answer: dict[str, Any] | None, message: str, tmp_path: Path
) -> None:
    python = fake_python(tmp_path, answer or {}) if answer else "/bin/true"
    with pytest.raises(ValueError, match=f"AdapterHub's UniPELT, in {python}: {message}"):
        benchmark.benchmark(
            settings("--methods", "frozen", "--adapters_python", python, "--output", str(tmp_path / "o"))
        )
    assert not (tmp_path / "o").exists()


def test_an_interpreter_without_adapters_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real worker, which needs nothing of this package until it is asked to build."""
    asked = settings("--adapters_python", sys.executable)
    with pytest.raises(ValueError, match="No module named 'adapters'"):
        benchmark.Remote(sys.executable, BertConfig(), asked)


@pytest.mark.slow
def test_a_compiled_run(tmp_path: Path) -> None:
    options = ["--compile", "--methods", "frozen,unipelt-apl", "--output", str(tmp_path / "out.json")]
    record = benchmark.benchmark(settings(*options))
    assert record["settings"]["compile"]
