"""Generation for a batch of several tasks: each row gets the tokens that its task's model gives it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import shake, tiny_bert
from tiny import WITHOUT_INTERFACE, tiny_batch, tiny_model
from torch import Tensor
from transformers import GenerationConfig

import unipelt
from unipelt import InjectionError, Tasks

PREFIX: dict[str, Any] = {"length": 3, "hidden": 8}
METHODS: dict[str, Any] = {
    "apl": {"preset": "unipelt-apl", "prefix": PREFIX},
    "own": {"preset": "unipelt-apl", "prefix": {**PREFIX, "length": 5, "softmax": "own"}},
    "lora": {"preset": "lora", "layers": [0, 2]},
    "houlsby": "houlsby",
}
ORDER = ["lora", "apl", "houlsby", "own", "apl"]
OF_ROWS = ("past_key_values", "cache", "encoder_outputs", "assistant_model", "prompt_lookup_num_tokens", "streamer")


def some_tasks(family: str, methods: dict[str, Any] = METHODS) -> Tasks:
    tasks = Tasks(tiny_model(family))
    for seed, (name, method) in enumerate(methods.items()):
        shake(tasks.add(name, method), seed=seed, std=0.3)
    return tasks


def texts(family: str) -> dict[str, Tensor]:
    batch = tiny_batch(family, lengths=(5, 9, 7, 3, 8), left=family in ("llama", "gpt2"))
    batch.pop("decoder_input_ids", None)
    return batch


def assert_as_alone(tasks: Tasks, batch: dict[str, Tensor], **options: Any) -> Tensor:
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1, **options}
    found = tasks.generate(**batch, tasks=ORDER, **options)
    each = options.get("num_return_sequences", 1)
    by_row = found.unflatten(0, (len(ORDER), each))
    for name in METHODS:
        rows = [row for row, task in enumerate(ORDER) if task == name]
        own: Any = tasks[name]
        alone = own.generate(**{key: value[rows] for key, value in batch.items()}, **options)
        alone = alone.unflatten(0, (len(rows), each))
        width = alone.shape[-1]  # the others may go on for longer
        assert torch.equal(by_row[rows][..., :width], alone), name
        assert (by_row[rows][..., width:] == 1).all()
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "bart", "t5"])
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}], ids=("greedy", "beams", "several")
)
def test_rows_are_as_of_their_tasks(options: dict[str, Any], family: str) -> None:
    if family in WITHOUT_INTERFACE:
        pytest.skip("a prefix cannot enter here")
    tasks, batch = some_tasks(family), texts(family)
    found = assert_as_alone(tasks, batch, **options)
    model: Any = tasks.model
    bare = model.generate(**batch, max_new_tokens=6, do_sample=False, pad_token_id=1, **options)
    assert found.shape != bare.shape or not torch.equal(found, bare)


def test_the_cache_is_used_and_the_base_runs_once_a_token() -> None:
    tasks, batch = some_tasks("llama"), texts("llama")
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    tasks.generate(**batch, tasks=ORDER, **options)
    seen: list[tuple[int, ...]] = []
    shared: Any = tasks.shared
    shared.model.layers[1].mlp.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape[:2])))
    tasks.generate(**batch, tasks=ORDER, **options)
    assert seen == [(5, 9), (5, 1), (5, 1), (5, 1)]


def test_one_task_and_the_current_task() -> None:
    tasks, batch = some_tasks("llama"), texts("llama")
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 1}
    own: Any = tasks["own"]
    want = own.generate(**batch, **options)
    assert torch.equal(tasks.generate(tasks="own", **batch, **options), want)
    assert tasks.shared is None
    with tasks.use("own"):
        assert torch.equal(tasks.generate(**batch, **options), want)
    with pytest.raises(ValueError, match="say which tasks"):
        tasks.generate(**batch, **options)


def test_what_is_refused() -> None:
    tasks, batch = some_tasks("llama"), texts("llama")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"return_dict_in_generate": True}, "takes no return_dict_in_generate"),
        ({"cache_implementation": "static"}, "takes no cache_implementation='static'"),
        ({"generation_config": GenerationConfig(return_dict_in_generate=True)}, "takes no return_dict_in_generate"),
        *(({name: tasks.model}, f"takes no {name}; run one task at a time") for name in OF_ROWS),
        ({"tasks": ["apl"]}, "names 1 rows, and the batch has 5"),
    ]
    for options, said in cases:
        given: dict[str, Any] = {"tasks": ORDER, **batch, **options}
        with pytest.raises(ValueError, match=said):
            tasks.generate(**given)
    encoder = Tasks(tiny_bert())
    encoder.add("one", "lora")
    with pytest.raises(InjectionError, match="BertForSequenceClassification cannot generate"):
        encoder.generate(tasks="one", **tiny_batch("bert"))


def test_options_of_the_base_hold_for_all_tasks() -> None:
    tasks, batch = some_tasks("llama"), texts("llama")
    tasks.generate(**batch, tasks=ORDER, max_new_tokens=1, pad_token_id=1)
    base: Any = tasks.model
    base.generation_config.max_new_tokens = 3
    base.generation_config.eos_token_id = None
    assert tasks.generate(**batch, tasks=ORDER, pad_token_id=1).shape == (5, 9 + 3)
    assert unipelt.parameter_counts(tasks["lora"]).trained


def test_a_head_of_its_own_computes_the_rows_of_its_task() -> None:
    tasks, batch = some_tasks("llama"), texts("llama")
    model: Any = tasks["lora"]
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(0))
    before = some_tasks("llama").generate(**batch, tasks=ORDER, max_new_tokens=6, do_sample=False, pad_token_id=1)
    found = assert_as_alone(tasks, batch)
    assert not torch.equal(found[0], before[0])
