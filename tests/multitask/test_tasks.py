"""Several tasks on one base: each row of a mixed batch as its task's separate model gives it; nothing else moves."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from helpers import bits, logits, shake, tiny_batch, tiny_bert
from inside import added_to, is_idle
from torch import Tensor
from transformers import Trainer, TrainingArguments

import unipelt
from unipelt import CheckpointError, InjectionError, Tasks
from unipelt.injection.inject import inject_as
from unipelt.multitask.heads import fit_labels
from unipelt.multitask.mixed_batch import find_unmixable
from unipelt.submodules.forward_pass import SetRows
from unipelt.submodules.room import own_parameters, rooms

SMALL: dict[str, dict[str, Any]] = {
    "adapter": {"bottleneck": 6},
    "prefix": {"length": 3, "hidden": 8},
    "lora": {"rank": 3},
    **tiny.FURTHER,
}


def small(preset: str, **changes: Any) -> dict[str, Any]:
    """A preset with parts as small as the models."""
    parts = [name for name in SMALL if unipelt.PRESETS[preset].part(name) is not None]
    gates = {name: {"gate": unipelt.PRESETS[preset].part(name).gate} for name in parts}
    own = {name: {**SMALL[name], **gates[name], **changes.pop(name, {})} for name in parts}
    return {"preset": preset, **own, **changes}


THREE = {
    "apl": small("unipelt-apl"),
    "prefix": small("prefix", prefix={"length": 5}),
    "lora": small("lora", lora={"rank": 2, "scaling": "rank_stabilised"}, layers=[0, 2]),
}
EVERY: dict[str, dict[str, Any]] = {
    **{name: small(name) for name in unipelt.PRESETS if unipelt.PRESETS[name].has_submodules and name != "prompt"},
    "mass": small("unipelt-ap", prefix={"gating": "mass", "length": 7}),
    "mean": small("unipelt-apl", gate={"pooling": "mean"}),
    "token": small("unipelt-apl", gate={"pooling": "token"}, ia3={"gate": True}),
    "static": small("unipelt-pl", gate={"pooling": "static"}),
    "central": small("unipelt-apl", gate={"shared": True, "activation": "softmax"}, ia3={"gate": True}),
    "recurrent": small("unipelt-ap", gate={"network": "recurrent"}),
    "anywhere": {"preset": "lora", "lora": {"rank": 2, "places": ["query", "value", "up", "down"]}},
    "dora": {"preset": "lora", "lora": {"rank": 2, "decomposed": True}},
    "pissa": {"preset": "lora", "lora": {"rank": 2, "start": "pissa"}},
    "gated-ia3": {"preset": "ia3", "ia3": {"gate": True}},
    "upper": small("unipelt-apl", layers=[2]),
}
ORDER = ["lora", "apl", "prefix", "apl", "lora", "apl"]
LENGTHS = (5, 9, 7, 4, 9, 3)


def some_tasks(model: Any, configs: dict[str, Any], **labels: int) -> Tasks:
    """Tasks away from their start."""
    tasks = Tasks(model)
    for seed, (name, config) in enumerate(configs.items()):
        shake(tasks.add(name, config, num_labels=labels.get(name)), seed=seed)
    return tasks


def separate(base: Any, model: Any, config: Any) -> Any:
    """A model of its own, injected by itself, with a task's numbers."""
    alone = unipelt.inject(base, config)
    alone.load_state_dict(model.state_dict())
    return alone.train(model.training)


def of_rows(batch: dict[str, Tensor], rows: list[int]) -> dict[str, Tensor]:
    """Those rows of a batch."""
    return {name: tensor[rows] for name, tensor in batch.items()}


@pytest.mark.parametrize(
    ("family", "head", "attention"),
    [
        ("bert", "SequenceClassification", "eager"),
        ("roberta", "SequenceClassification", "sdpa"),
        ("distilbert", "TokenClassification", "sdpa"),
        ("modernbert", "SequenceClassification", "sdpa"),
        ("bart", "SequenceClassification", "sdpa"),
        ("bart", "Seq2SeqLM", "eager"),
        ("t5", "Seq2SeqLM", "sdpa"),
        ("gpt2", "SequenceClassification", "sdpa"),
        ("llama", "CausalLM", "eager"),
        ("gpt_neox", "CausalLM", "sdpa"),
    ],
)
def test_rows_are_as_of_separate_models(family: str, head: str, attention: str) -> None:
    """Of every kind of layer: methods, prefix lengths, ranks and layers differ from row to row."""
    if family in tiny.WITHOUT_INTERFACE:
        pytest.skip("a prefix cannot enter here")
    tasks = some_tasks(tiny.tiny_model(family, head, attention), THREE)
    batch = tiny.tiny_batch(family, lengths=LENGTHS, left=family == "llama")
    if head == "SequenceClassification":
        batch.pop("decoder_input_ids", None)
    found = logits(tasks, batch, tasks=ORDER)
    real = batch["attention_mask"].bool() if found.shape[:2] == batch["attention_mask"].shape else ...
    for name, config in THREE.items():
        rows = [row for row, task in enumerate(ORDER) if task == name]
        expected = logits(separate(tiny.tiny_model(family, head, attention), tasks[name], config), of_rows(batch, rows))
        seen = real if real is ... else real[rows]
        torch.testing.assert_close(found[rows][seen], expected[seen], rtol=0, atol=1e-5)
        assert (expected - logits(tasks.model, of_rows(batch, rows)))[seen].abs().max() > 1e-3


def test_every_method_in_one_batch() -> None:
    """A row of each, in an order that is not that of the tasks, with padding."""
    tasks = some_tasks(tiny_bert(), EVERY)
    names = [*reversed(EVERY), "dora"]
    batch = tiny_batch(lengths=tuple(3 + 5 * row % 7 for row in range(len(names))))
    output = tasks(**batch, tasks=names)
    assert sum(len(rows) for rows in output.rows.values()) == len(names)
    for name, rows in output.rows.items():
        expected = logits(separate(tiny_bert(), tasks[name], EVERY[name]), of_rows(batch, rows))
        torch.testing.assert_close(output.logits[rows], expected, rtol=0, atol=1e-5, msg=name)
        torch.testing.assert_close(output.outputs[name].logits, output.logits[rows])
        assert (expected - logits(tasks.model, of_rows(batch, rows))).abs().max() > 1e-4, name


@pytest.mark.parametrize("names", [("lora", "anywhere"), ("apl", "prefix", "lora")])
def test_a_hook_that_gives_the_stack_other_arguments_leaves_the_rows(names: tuple[str, ...]) -> None:
    """Such a hook of the user's ends the pass of the stack, and each layer begins its own."""
    configs = {name: {**EVERY, **THREE}[name] for name in names}
    tasks, other = some_tasks(tiny_bert(), configs), some_tasks(tiny_bert(), configs)
    batch, order = tiny_batch(lengths=(6, 4, 5, 3)), [*names, *reversed(names)][:4]
    model: Any = other.model
    model.bert.encoder.register_forward_pre_hook(
        lambda module, args, kwargs: (tuple(args), dict(kwargs)), with_kwargs=True
    )
    expected = logits(tasks, batch, tasks=order)
    torch.testing.assert_close(logits(other, batch, tasks=order), expected, rtol=0, atol=1e-6)
    assert (logits(tasks, batch, tasks=[names[0]] * 4) - expected).abs().max() > 1e-4


def test_a_row_does_not_see_the_others() -> None:
    """A row without a prefix is bit for bit as beside rows that have none; padding of others' prefixes is not there."""
    tasks = some_tasks(tiny_bert(), {**THREE, "adapter": small("adapter")})
    batch = tiny_batch(lengths=(9, 9, 6))
    beside = tasks(**batch, tasks=["adapter", "prefix", "adapter"])
    torch.testing.assert_close(
        beside.outputs["adapter"].logits, logits(tasks["adapter"], of_rows(batch, [0, 2])), rtol=0, atol=1e-6
    )
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][1] = 7
    again = tasks(**changed, tasks=["adapter", "prefix", "adapter"])
    assert torch.equal(again.logits[[0, 2]], beside.logits[[0, 2]])
    assert not torch.equal(again.logits[1], beside.logits[1])


def test_the_base_runs_once() -> None:
    """Every frozen projection is called once, with the rows of all tasks."""
    tasks = some_tasks(tiny_bert(), THREE)
    tasks(**tiny_batch(lengths=LENGTHS), tasks=ORDER)
    calls: list[int] = []
    for model in (tasks.shared, tasks.model, *(tasks[name] for name in tasks)):
        for layer in model.bert.encoder.layer:
            layer.intermediate.dense.register_forward_hook(lambda module, args, out: calls.append(len(out)))
    tasks(**tiny_batch(lengths=LENGTHS), tasks=ORDER)
    assert calls == [len(ORDER)] * 3


def test_prefixes_are_computed_once_a_pass() -> None:
    """A task's at the entry of its stack, as in a model of its own; behind a pass, failed or not, none is left."""
    tasks = some_tasks(tiny_bert(), THREE)
    batch = tiny_batch(lengths=LENGTHS)
    calls: list[str] = []
    networks: dict[str, Any] = {
        name: added_to(tasks[name].get_submodule("bert.encoder")).prefix_network for name in ("apl", "prefix")
    }
    for name, network in networks.items():
        network.register_forward_hook(lambda *_, name=name: calls.append(name))
    expected = logits(tasks, batch, tasks=ORDER)
    assert sorted(calls) == ["apl", "prefix"]
    logits(tasks, batch, tasks=["apl" if task == "prefix" else task for task in ORDER])
    assert sorted(calls) == ["apl", "apl", "prefix"]
    tasks.shared.bert.encoder.layer[1].output.register_forward_hook(lambda *_: calls[9])
    with pytest.raises(IndexError):
        logits(tasks, batch, tasks=ORDER)
    for model in (tasks.shared, *(tasks[name] for name in networks)):
        assert model is not None
        assert all(is_idle(room.passes) for _, room in rooms(model))
    tasks.shared = None
    assert torch.equal(expected, logits(tasks, batch, tasks=ORDER))


def test_feed_forward_in_pieces() -> None:
    """A gate averages over all of a text, whatever pieces the base cuts it into."""
    tasks = some_tasks(tiny_bert(chunk_size_feed_forward=3), {**THREE, "houlsby": {"preset": "houlsby"}})
    batch, order = tiny_batch(), ["apl", "houlsby", "apl"]
    found = logits(tasks, batch, tasks=order)
    torch.testing.assert_close(found[[0, 2]], logits(tasks["apl"], of_rows(batch, [0, 2])), rtol=0, atol=1e-5)
    base: Any = tasks.model
    assert base.bert.encoder.layer[0].chunk_size_feed_forward == 3


def test_rows_of_nobody() -> None:
    """Rows that no task can own are no rows, and parameters between a module's parts have no rows."""
    sets = SetRows(("one", "two"), (1, 2))
    assert [len(part) for part in sets.split(torch.zeros(6, 2))] == [2, 4]
    for rows in (1, 4):
        with pytest.raises(RuntimeError, match=f"given {rows} rows in a batch of 3"):
            sets.split(torch.zeros(rows, 2))
    base, other = tiny.tiny_model("deberta", "Model"), tiny.tiny_model("deberta", "Model")
    reason = find_unmixable(base, other)
    assert reason is not None
    assert "parameters of the task's own beside its parts" in reason
    assert find_unmixable(base, base) is None


def test_heads_of_other_sizes() -> None:
    """Three labels, two and a score: infinitely unlikely where there is none, losses as each class computes them."""
    configs = {"mnli": THREE["apl"], "rte": THREE["lora"], "stsb": THREE["prefix"]}
    tasks = some_tasks(tiny_bert(), configs, mnli=3, stsb=1)
    three: Any = tasks["mnli"]
    assert three.classifier.out_features == 3
    assert tasks["rte"].config.num_labels == 2
    batch, order = tiny_batch(lengths=LENGTHS), ["stsb", "mnli", "rte", "stsb", "mnli", "rte"]
    labels = torch.tensor([2.5, 2.0, 1.0, 0.5, 0.0, 0.0])
    output = tasks(**batch, labels=labels, tasks=order)
    assert output.logits.shape == (6, 3)
    assert (output.logits.isinf().sum(1) == torch.tensor([2, 0, 1, 2, 0, 1])).all()
    assert (output.logits[[2, 5]].argmax(1) == output.outputs["rte"].logits.argmax(1)).all()
    for name, rows in output.rows.items():
        own = labels[rows] if name == "stsb" else labels[rows].long()
        base = tiny_bert(num_labels={"mnli": 3, "stsb": 1}.get(name, 2))
        alone = separate(base, tasks[name], configs[name])(**of_rows(batch, rows), labels=own)
        torch.testing.assert_close(output.outputs[name].logits, alone.logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(output.losses[name], alone.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.loss, sum(output.losses.values()))
    assert tasks.model.config.num_labels == 2
    assert tasks.model.config.problem_type is None
    scores = torch.tensor([2, 2, 1, 1, 0, 0])  # a regression's, whole
    assert tasks(**batch, labels=scores, tasks=order).loss.isfinite()


def test_several_labels_of_one_text_keep_their_type() -> None:
    """Without a problem type, a model's loss for floating-point labels of every class is that of several labels."""
    tasks = some_tasks(tiny_bert(), {"one": THREE["lora"], "two": THREE["apl"]})
    batch = tiny_batch()
    labels = torch.tensor([[1.0, 0.0], [0.25, 1.0], [1.0, 1.0]])
    output = tasks(**batch, labels=labels, tasks=["one", "two", "one"])
    for name, rows in output.rows.items():
        want = torch.nn.functional.binary_cross_entropy_with_logits(output.logits[rows], labels[rows])
        torch.testing.assert_close(output.losses[name], want)


def test_labels_of_another_kind_pass_unchanged() -> None:
    boxes = [{"class_labels": torch.tensor([1])}]
    assert fit_labels(tiny_bert(), boxes) is boxes


@pytest.mark.parametrize("training", [False, True])
def test_a_new_task_is_in_the_mode_of_the_tasks(training: bool) -> None:
    tasks = Tasks(tiny_bert()).train(training)
    tasks.model.train(not training)
    assert all(module.training == training for module in tasks.add("one", THREE["apl"]).modules())


@pytest.mark.parametrize("family", ["bert", "bart"])
def test_gradients_are_those_of_separate_models(family: str) -> None:
    """Each task's from its own rows; a task that is not in the batch, and the base, get none and do not move."""
    head = "SequenceClassification"
    configs = {**THREE, "compacter": small("compacter"), "away": small("unipelt-ap")}
    tasks = some_tasks(tiny.tiny_model(family, head), configs).train()
    batch = tiny.tiny_batch(family, lengths=LENGTHS)
    batch.pop("decoder_input_ids", None)
    labels, order = torch.tensor([0, 1, 1, 0, 1, 1]), ["compacter", *ORDER[1:]]
    base, before = bits(tasks.model), {name: bits(tasks[name]) for name in tasks}
    optimizer = torch.optim.AdamW([p for p in tasks.parameters() if p.requires_grad], lr=1e-2)
    tasks(**batch, labels=labels, tasks=order).loss.backward()
    for name in dict.fromkeys(order):
        rows = [row for row, task in enumerate(order) if task == name]
        alone = separate(tiny.tiny_model(family, head), tasks[name], configs[name])
        alone(**of_rows(batch, rows), labels=labels[rows]).loss.backward()
        gradients = {path: parameter.grad for path, parameter in alone.named_parameters()}
        for path, parameter in tasks[name].named_parameters():
            expected = gradients[path]
            assert (parameter.grad is None) == (expected is None), path
            if expected is not None:
                torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-5, msg=f"{name} {path}")
    assert all(parameter.grad is None for parameter in tasks["away"].parameters())
    optimizer.step()
    after = bits(tasks.model)
    assert all(torch.equal(base[path], after[path]) for path in base)
    for name in tasks:
        moved = {path for path, value in bits(tasks[name]).items() if not torch.equal(before[name][path], value)}
        trained = {path for path, parameter in tasks[name].named_parameters() if parameter.grad is not None}
        assert moved == trained
        assert bool(moved) == (name != "away")


def test_switch_list_delete() -> None:
    """Names in their order; a switch touches nothing, a deleted task is freed, and the base is whole again."""
    model = tiny_bert()
    model.bert.embeddings.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    before, places = bits(model), [parameter.data_ptr() for parameter in model.parameters()]
    tasks = some_tasks(model, THREE)
    batch = tiny_batch()
    assert not any(parameter.requires_grad for parameter in Tasks(tiny_bert()).model.parameters())
    bare = logits(model, batch)
    assert torch.equal(bare, logits(tiny_bert(), batch))
    assert list(tasks) == list(THREE)
    assert len(tasks) == 3
    assert "apl" in tasks
    assert "rte" not in tasks
    assert 3 not in tasks
    assert str(unipelt.parameter_counts(tasks["apl"])) == str(
        unipelt.parameter_counts(unipelt.inject(tiny_bert(), THREE["apl"]))
    )
    heads = {"classifier.weight", "classifier.bias"}
    for name in tasks:
        for path, parameter in tasks[name].named_parameters():
            if path in before:
                assert (parameter is model.get_parameter(path)) == (path not in heads), path
    tasks.use("apl")
    with tasks.use("lora"):
        assert tasks.current == "lora"
        assert torch.equal(logits(tasks, batch), logits(tasks["lora"], batch))
    assert tasks.current == "apl"
    assert torch.equal(logits(tasks, batch), logits(tasks["apl"], batch))
    assert torch.equal(logits(tasks, batch, tasks="apl"), logits(tasks["apl"], batch))
    tasks(**batch, tasks=["apl", "lora", "prefix"])
    freed = [weakref.ref(parameter) for parameter in own_parameters(tasks["apl"]).values()]
    with tasks.use("lora"):
        tasks.delete("apl")
    assert tasks.current is None
    assert list(tasks) == ["prefix", "lora"]
    gc.collect()
    assert freed
    assert not any(reference() is not None for reference in freed)
    rows = tasks(**batch, tasks=torch.tensor([1, 0, 1])).rows
    assert rows == {"prefix": [1], "lora": [0, 2]}
    assert tasks.remove() is model
    assert not len(tasks)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert [parameter.data_ptr() for parameter in model.parameters()] == places
    after = bits(model)
    assert all(torch.equal(before[path], after[path]) for path in before)
    assert torch.equal(bare, logits(model, batch))
    tasks.add("later", "lora")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    unipelt.inject(tasks.remove(), "lora")


@pytest.mark.parametrize("deploy", [False, True])
def test_save_and_load(tmp_path: Path, deploy: bool) -> None:
    """A task's folder is an ordinary checkpoint, and an ordinary checkpoint becomes a task, its labels with it."""
    base = tiny_bert()
    base.bert.save_pretrained(tmp_path / "base")
    model = type(base).from_pretrained(tmp_path / "base").eval()
    tasks = some_tasks(model, {"mnli": THREE["apl"], "rte": THREE["prefix"]}, mnli=3)
    tasks["mnli"].config.id2label = {0: "yes", 1: "maybe", 2: "no"}
    tasks["mnli"].config.problem_type = "single_label_classification"
    batch = tiny_batch()
    expected = logits(tasks["mnli"], batch)
    folder = tasks.save("mnli", tmp_path / "mnli", deploy=deploy)
    again = unipelt.from_pretrained(folder)
    torch.testing.assert_close(logits(again, batch), expected, rtol=0, atol=1e-6)
    unipelt.save(again, tmp_path / "again")
    loaded = tasks.load("again", tmp_path / "again")
    assert loaded.config.id2label == {0: "yes", 1: "maybe", 2: "no"}
    assert loaded.config.problem_type == "single_label_classification"
    mixed = tasks(**batch, tasks=["again", "rte", "again"])
    torch.testing.assert_close(mixed.logits[[0, 2]], expected[[0, 2]], rtol=0, atol=1e-5)
    for name, parameter in model.bert.named_parameters():
        assert torch.equal(parameter, base.bert.get_parameter(name))


def test_what_a_checkpoint_calls_its_head_is_its_own(tmp_path: Path) -> None:
    """A pooler that started at random where it was trained, and is the base's own here, stays the base's."""
    tasks = some_tasks(tiny_bert(), THREE)
    head = {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}
    other = inject_as(tiny_bert(), unipelt.resolve(THREE["lora"]), deployed=False, head=frozenset(head))
    shake(other)
    unipelt.save(other, tmp_path / "other")
    before = bits(tasks.model)
    tasks.load("other", tmp_path / "other")
    after = bits(tasks.model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    batch = tiny_batch()
    mixed = tasks(**batch, tasks=["other", "apl", "other"])
    torch.testing.assert_close(mixed.logits[[0, 2]], logits(other, of_rows(batch, [0, 2])), rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed.logits[[1]], logits(tasks["apl"], of_rows(batch, [1])), rtol=0, atol=1e-5)


def test_checkpoints_that_are_refused(tmp_path: Path) -> None:
    """Another base, a changed base, a folded one, another number of labels than there are numbers for."""
    tasks = some_tasks(tiny_bert(), {"one": THREE["lora"]})
    batch = tiny_batch()
    before = logits(tasks, batch, tasks="one")
    unipelt.save(unipelt.inject(tiny_bert(seed=5), "lora"), tmp_path / "base")
    unipelt.save(unipelt.inject(tiny_bert(), "bitfit"), tmp_path / "bitfit")
    unfrozen: Any = unipelt.inject(tiny_bert(), "lora")
    unfrozen.bert.embeddings.requires_grad_(True)
    unipelt.save(unfrozen, tmp_path / "unfrozen")
    folded = unipelt.inject(tiny_bert(), "lora")
    unipelt.fold(folded)
    unipelt.save(folded, tmp_path / "folded")
    unipelt.save(unipelt.inject(tiny_bert(), "lora"), tmp_path / "labels")
    manifest = json.loads((tmp_path / "labels" / "unipelt.json").read_text())
    manifest["base"]["config"]["id2label"] = {str(label): "x" for label in range(999)}
    (tmp_path / "labels" / "unipelt.json").write_text(json.dumps(manifest))
    for name, part in {
        "base": "its weights differ",
        "bitfit": "bitfit changes parameters of the base",
        "unfrozen": "which trained",
        "folded": "load what it was folded from$",
        "labels": "num_labels is 999",
    }.items():
        with pytest.raises(CheckpointError, match=part):
            tasks.load("two", tmp_path / name)
        assert list(tasks) == ["one"]
    with pytest.raises(FileNotFoundError):
        tasks.load("two", tmp_path / "nowhere")
    assert torch.equal(before, logits(tasks, batch, tasks="one"))
    assert not any(parameter.requires_grad for parameter in tasks.model.parameters())


def test_what_is_refused() -> None:
    """By a clear word, before anything changes."""
    with pytest.raises(InjectionError, match="PreTrainedModel"):
        Tasks(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(InjectionError, match="carries submodules already"):
        Tasks(unipelt.inject(tiny_bert(), "lora"))
    tasks = some_tasks(tiny_bert(), {"one": THREE["lora"], "two": THREE["apl"]})
    batch = tiny_batch()
    for config, part in (
        ("bitfit", "bitfit"),
        ("fine-tuning", "train_base"),
        ({"preset": "bitfit", "lora": {}}, "bit"),
    ):
        with pytest.raises(InjectionError, match=f"{part}.*into a model of its own"):
            tasks.add("three", config)
    with pytest.raises(InjectionError, match=r": it adds no submodules; name some, or call the base model itself$"):
        tasks.add("three", {"preset": "lora", "lora": None})
    with pytest.raises(unipelt.ConfigError, match="no preset"):
        tasks.add("three", "lara")
    with pytest.raises(ValueError, match="there is a task 'one' already"):
        tasks.add("one", "lora")
    with pytest.raises(ValueError, match="there is a task 'one' already"):
        tasks.load("one", "nowhere")
    for name in ("", "a.b", "a/b", 3):
        with pytest.raises(ValueError, match="letters, digits"):
            tasks.add(name, "lora")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_labels must be"):
        tasks.add("three", "lora", num_labels=0)
    with pytest.raises(ValueError, match="problem_type must be one of"):
        tasks.add("three", "lora", problem_type="hard")
    for ask in (tasks.delete, tasks.use, tasks.__getitem__, lambda name: tasks.save(name, "nowhere")):
        with pytest.raises(KeyError, match=r"no task 'three'.*one, two"):
            ask("three")
    with pytest.raises(KeyError, match="no task 'three'"):
        tasks(**batch, tasks=["one", "three", "one"])
    with pytest.raises(KeyError, match="no task number 2; there are 2"):
        tasks(**batch, tasks=[0, 2, 1])
    with pytest.raises(KeyError, match="no task number -1"):
        tasks(**batch, tasks=torch.tensor([0, -1, 1]))
    with pytest.raises(ValueError, match="names 2 rows, and the batch has 3"):
        tasks(**batch, tasks=["one", "two"])
    with pytest.raises(ValueError, match="whole numbers"):
        tasks(**batch, tasks=torch.tensor([0.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match="say which tasks"):
        tasks(**batch)
    with pytest.raises(ValueError, match="no tensor of texts"):
        tasks(tasks=["one"])
    for option in ("output_attentions", "use_cache", "past_key_values", "encoder_outputs", "cache_position"):
        with pytest.raises(ValueError, match=f"takes no {option}; run one task at a time"):
            tasks(**batch, tasks=["one", "two", "one"], **{option: True})
    with pytest.raises(ValueError, match="leave return_dict=False out"):
        tasks(**batch, tasks=["one", "two", "one"], return_dict=False)
    with pytest.raises(unipelt.FoldError, match="shares its base"):
        unipelt.fold(tasks["one"])
    with pytest.raises(ValueError, match="several tasks on one base"):
        unipelt.remove(tasks["one"])
    one: Any = tasks["one"]
    one.bert.encoder.layer[0].gradient_checkpointing = True
    assert tasks(**batch, tasks=["one", "two", "one"], use_cache=False, return_dict=True).logits.shape == (3, 2)
    with pytest.raises(ValueError, match="gradient checkpointing"):
        tasks.train()(**batch, tasks=["one", "two", "one"])
    unipelt.inject(tasks.model, "lora")
    with pytest.raises(InjectionError, match="carries submodules already"):
        tasks.add("three", "lora")


def test_classes_and_families_that_do_not_mix() -> None:
    """They carry tasks, one a batch, and say why no batch mixes them; tasks beside them do mix."""
    for family, odd, word in (
        ("mpnet", "prefix", "takes a prefix as a longer text"),
        ("deberta-v2", "lora", "relative positions"),
        ("bert", "prompt", "its prompt makes its texts longer"),
    ):
        configs = {"adapter": small("adapter"), "other": small("adapter"), "odd": small(odd)}
        tasks = some_tasks(tiny.tiny_model(family), configs)
        batch = tiny.tiny_batch(family)
        assert logits(tasks, batch, tasks="odd").shape == (3, 2)
        mixed = logits(tasks, batch, tasks=["adapter", "other", "adapter"])
        torch.testing.assert_close(mixed[[1]], logits(tasks["other"], of_rows(batch, [1])), rtol=0, atol=1e-5)
        with pytest.raises(InjectionError, match=f"task 'odd' cannot share a batch.*{word}"):
            tasks(**batch, tasks=["adapter", "odd", "other"])
    tasks = some_tasks(tiny.tiny_model("t5", "Seq2SeqLM"), {"one": small("lora"), "two": small("adapter")})
    batch = tiny.tiny_batch("t5")
    with pytest.raises(InjectionError, match="holds the parts of its base itself"):
        tasks(**batch, labels=batch["decoder_input_ids"], tasks=["one", "two", "one"])
    tasks = some_tasks(tiny.tiny_model("bart", "CausalLM"), {"one": small("lora"), "two": small("lora")})
    batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(InjectionError, match="calls a part of its base"):
        tasks(**batch, tasks=["one", "two", "one"])


def test_copies_and_passes_of_another_kind() -> None:
    """A copy is complete; texts of several choices; embeddings; a model without a head; a failure leaves no traces."""
    tasks = some_tasks(tiny_bert(), THREE)
    batch = tiny_batch(lengths=LENGTHS)
    expected = logits(tasks, batch, tasks=ORDER)
    twin = copy.deepcopy(tasks)
    shake(tasks["apl"])
    assert torch.equal(expected, logits(twin, batch, tasks=ORDER))
    embedded = {"inputs_embeds": twin.model.get_input_embeddings()(batch["input_ids"]).detach()}
    torch.testing.assert_close(
        expected, logits(twin, {**embedded, "attention_mask": batch["attention_mask"]}, tasks=ORDER)
    )
    with pytest.raises(IndexError):
        twin(**{**batch, "input_ids": batch["input_ids"] + 1000}, tasks=ORDER)
    assert torch.equal(expected, logits(twin, batch, tasks=ORDER))
    choices = some_tasks(tiny.tiny_model("bert", "MultipleChoice"), THREE)
    texts = {name: tensor.unflatten(0, (3, 2)) for name, tensor in batch.items()}
    mixed = logits(choices, texts, tasks=["lora", "apl", "lora"])
    torch.testing.assert_close(mixed[[0, 2]], logits(choices["lora"], of_rows(texts, [0, 2])), rtol=0, atol=1e-5)
    bare = some_tasks(tiny.tiny_model("bert", "Model"), THREE)
    output = bare(**batch, tasks=ORDER)
    assert output.logits is None
    assert output.loss is None
    with torch.no_grad():
        for name, rows in output.rows.items():
            alone = bare[name](**of_rows(batch, rows))
            torch.testing.assert_close(output.outputs[name].pooler_output, alone.pooler_output, rtol=0, atol=1e-5)


def test_threads() -> None:
    """Each has its own rows, at the same time."""
    tasks = some_tasks(tiny_bert(), THREE)
    batch = tiny_batch(lengths=LENGTHS)
    orders = [ORDER, ORDER[::-1], ["apl", "prefix"] * 3]
    expected = [logits(tasks, batch, tasks=order) for order in orders]
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(lambda turn: logits(tasks, batch, tasks=orders[turn % 3]), range(18)))
    assert all(torch.equal(own, expected[turn % 3]) for turn, own in enumerate(found))


def test_trainer(tmp_path: Path) -> None:
    """A column of task numbers passes through; checkpoints hold what the tasks have of their own, and load again."""
    tasks = some_tasks(tiny_bert(), {"one": THREE["lora"], "two": THREE["apl"]}, two=3)
    batch = tiny_batch(lengths=(5, 9, 7, 4))
    rows = [{**of_rows(batch, [row]), "labels": row % 2, "tasks": row % 2} for row in range(4)]
    data = [{name: value[0] if isinstance(value, Tensor) else value for name, value in row.items()} for row in rows]
    arguments = TrainingArguments(
        str(tmp_path),
        remove_unused_columns=False,
        label_names=["labels"],
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        num_train_epochs=2,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    before, base = bits(tasks), bits(tasks.model)
    trainer: Any = Trainer(tasks, arguments, train_dataset=data, eval_dataset=data)
    assert not trainer.model_accepts_loss_kwargs
    trainer.train()
    assert trainer.predict(data).predictions.shape == (4, 3)
    after = bits(tasks.model)
    assert all(torch.equal(base[name], after[name]) for name in base)
    assert {name.partition(".")[0] for name in tasks.state_dict()} == {"task_one", "task_two"}
    now = bits(tasks)
    moved = {name for name, value in before.items() if not torch.equal(now[name], value)}
    assert {name.partition(".")[0] for name in moved} == {"task_one", "task_two"}
