"""The rows of a batch of several tasks: brought together, split, merged and put back."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

from unipelt.multitask.batch_rows import MixedOutput, count_rows, gather, merge, sort_rows, split_batch, split_output


def test_rows_of_a_batch_are_those_of_its_texts() -> None:
    texts, labels = torch.zeros(3, 5), torch.zeros(7)
    assert count_rows({"labels": labels, "other": torch.zeros(2, 2), "input_ids": texts}) == 3
    assert count_rows({"input_ids": None, "labels": labels, "inputs_embeds": torch.zeros(4, 5, 2)}) == 4
    assert count_rows({"labels": labels, "pixels": torch.zeros(2, 2)}) == 2
    with pytest.raises(ValueError, match="no tensor of texts; give input_ids or inputs_embeds by keyword"):
        count_rows({"labels": labels, "input_ids": None})


def test_rows_are_brought_together_and_put_back() -> None:
    ids = torch.arange(8).view(4, 2)
    batch = {
        "input_ids": ids,
        "labels": torch.arange(4),
        "bias": torch.arange(3),
        "scalar": torch.tensor(4.0),
        "no": None,
    }
    rows, found, back = sort_rows(["b", "a", "b", "c"], ["a", "c", "b", "unused"], batch)
    assert rows == {"a": [1], "c": [3], "b": [0, 2]}
    assert found.keys() == {"input_ids", "labels", "bias", "scalar"}
    assert found["labels"].tolist() == [1, 3, 0, 2]
    assert found["input_ids"].tolist() == ids[[1, 3, 0, 2]].tolist()
    assert found["bias"].tolist() == [0, 1, 2]
    assert back is not None
    assert found["labels"][back].tolist() == [0, 1, 2, 3]

    parts = split_batch(found, 4, {name: len(own) for name, own in rows.items()})
    assert {name: part["labels"].tolist() for name, part in parts.items()} == {"a": [1], "c": [3], "b": [0, 2]}
    assert all(part["bias"] is found["bias"] for part in parts.values())
    merged = merge([*parts.values()], [1, 1, 2])
    assert torch.equal(merged["input_ids"], found["input_ids"])
    assert merged["bias"] is found["bias"]

    rows, same, back = sort_rows(["a", "a", "b", "b"], ["a", "b"], batch)
    assert (rows, back) == ({"a": [0, 1], "b": [2, 3]}, None)
    assert same["input_ids"] is ids, "rows in the order of the tasks stay where they are"


def test_an_argument_that_one_task_lacks_is_that_of_the_first() -> None:
    given = torch.zeros(1, 2)
    assert merge([{"mask": given}, {}], [1, 2]) == {"mask": given}
    assert merge([{"mask": None, "flag": True}, {"mask": None, "flag": True}], [1, 2]) == {"mask": None, "flag": True}


def test_an_output_is_split_with_all_that_it_holds() -> None:
    states = torch.arange(6.0).view(3, 2)
    loss, empty = torch.tensor(2.0), torch.zeros(5, 2)
    whole = BaseModelOutput(last_hidden_state=states, hidden_states=(states, states + 1), attentions=(empty,))
    one, two = split_output(whole, [1, 2])
    assert isinstance(one, BaseModelOutput)
    assert one.last_hidden_state is not None
    assert one.hidden_states is not None
    assert one.attentions is not None
    assert one.last_hidden_state.tolist() == [[0.0, 1.0]]
    assert two.last_hidden_state.tolist() == [[2.0, 3.0], [4.0, 5.0]]
    assert one.hidden_states[1].tolist() == [[1.0, 2.0]]
    assert two.hidden_states[1].tolist() == [[3.0, 4.0], [5.0, 6.0]]
    assert one.attentions[0] is empty, "what has no row for each text is each task's"
    assert split_output(loss, [1, 2]) == [loss, loss]
    assert split_output((), [1, 2]) == [(), ()]


def test_labels_that_a_task_does_not_have_are_infinitely_unlikely() -> None:
    loss = torch.tensor(1.5)
    outputs = {
        "two": SimpleNamespace(logits=torch.tensor([[1.0, 2.0], [3.0, 4.0]]), loss=loss),
        "three": SimpleNamespace(logits=torch.tensor([[5.0, 6.0, 7.0]]), loss=None),
    }
    found = gather(outputs, {"two": [0, 2], "three": [1]}, torch.tensor([0, 2, 1]))
    assert found.logits is not None
    assert found.logits.tolist() == [[1.0, 2.0, -torch.inf], [5.0, 6.0, 7.0], [3.0, 4.0, -torch.inf]]
    assert (found.loss, found.losses) == (loss, {"two": loss})
    assert (found.outputs, found.rows) == (outputs, {"two": [0, 2], "three": [1]})
    copied = MixedOutput(**found)  # as a wrapper that gathers outputs makes one
    assert (copied.outputs, copied.rows, copied.losses) == ({}, {}, {})
    outputs["scalar"] = SimpleNamespace(logits=torch.zeros(2), loss=torch.tensor(2.0))
    found = gather(outputs, {}, None)
    assert found.logits is None
    assert found.loss == 3.5
