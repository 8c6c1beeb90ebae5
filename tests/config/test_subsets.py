"""Subsets of the submodules of a configuration."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from unipelt import UniPELTConfig, resolve
from unipelt.config.subsets import narrowed, refusal_of_select

NAMES = ("adapter", "prefix", "lora", "prompt", "ia3", "red")
GATE = {"pooling": "mean", "dropout": 0.2, "dropout_by": "example"}
WHOLE = resolve({"prompt": {"length": 3}, "ia3": {}, "red": {}, "gate": GATE, "bitfit": True, "layers": [1]})
SUBSETS = [names for count in range(len(NAMES) + 1) for names in itertools.combinations(NAMES, count)]


@pytest.mark.parametrize("names", SUBSETS, ids=str)
def test_a_subset_has_its_submodules_and_the_rest_of_the_method(names: tuple[str, ...]) -> None:
    found = narrowed(WHOLE, names)
    assert found.submodule_names == [*names]
    assert [found.part(name) for name in NAMES] == [WHOLE.part(name) if name in names else None for name in NAMES]
    # without a submodule of layers there is nothing that dropout could leave out
    layered = bool({*names} - {"prompt"})
    assert found.gate == (WHOLE.gate if layered else resolve({"gate": {"pooling": "mean"}}).gate)
    alone = {"adapter": None, "prefix": None, "lora": None, "prompt": None, "more": (), "gate": UniPELTConfig().gate}
    assert replace(found, **alone) == replace(WHOLE, **alone)  # type: ignore[arg-type]


def test_select_needs_two_submodules_whose_gates_do_not_depend_on_each_other() -> None:
    assert refusal_of_select(WHOLE) is None
    assert refusal_of_select(resolve("lora")) == (
        "select chooses between two submodules or more, and this method has lora"
    )
    assert refusal_of_select(resolve("bitfit")) == (
        "select chooses between two submodules or more, and this method has none"
    )
    softmax = resolve({"gate": {"activation": "softmax", "shared": True}})
    assert refusal_of_select(softmax) == (
        "select removes submodules, and with gate.activation: softmax that changes the gates of the others; take "
        "sigmoid or tanh"
    )
