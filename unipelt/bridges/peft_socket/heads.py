"""The heads of sets: PEFT's copies of whole modules (`modules_to_save`), one for each set."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch import nn

from unipelt.bridges.peft_socket.register import require_peft

require_peft()
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper  # noqa: E402

COPIES, ORIGINAL = "modules_to_save", "original_module"


def plain_name(name: str) -> str:
    """Return a parameter's name in the model without PEFT's wrappers."""
    steps = name.split(".")
    if COPIES in steps:
        place = steps.index(COPIES)
        steps = [*steps[:place], *steps[place + 2 :]]
    return ".".join(step for step in steps if step != ORIGINAL)


def module_paths(names: Collection[str]) -> list[str]:
    """Return the paths of the modules that own parameters of these names."""
    return [path for path in dict.fromkeys(name.rpartition(".")[0] for name in sorted(names)) if path]


def names_to_save(asked: Sequence[str] | None, heads: Sequence[str]) -> list[str] | None:
    """Return the names for PEFT's `modules_to_save`: the given names, and the heads that these do not cover.

    None stands for an empty list.
    """
    wanted = list(dict.fromkeys(asked or ()))

    def is_held(path: str) -> bool:
        steps = path.split(".")
        above = [".".join(steps[:count]) for count in range(1, len(steps) + 1)]
        return any(one.endswith(name) for one in above for name in wanted)

    return [*wanted, *(path for path in heads if not is_held(path))] or None


def present_names(model: nn.Module, plain: Collection[str]) -> frozenset[str]:
    """Return the present names of the parameters with these plain names, both originals and copies."""
    return frozenset(name for name, _ in model.named_parameters() if plain_name(name) in plain)


def wrappers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield every outermost wrapper of PEFT around a module of the model, with its path."""
    found: list[str] = []
    for path, module in list(model.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper) and not path.startswith(tuple(f"{one}." for one in found)):
            found.append(path)
            yield path, module


def copies(model: nn.Module, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the wrappers that hold a copy of a module for this set, each with its path."""
    for path, wrapper in wrappers(model):
        if isinstance(wrapper, ModulesToSaveWrapper) and name in wrapper.modules_to_save:
            yield path, wrapper


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Replace the module at a path of the model."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
