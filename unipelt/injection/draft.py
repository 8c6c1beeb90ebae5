"""The submodules of a configuration without memory: their names and shapes, before the model changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from unipelt.config.methods import UniPELTConfig
from unipelt.hosts.locate import find_stacks
from unipelt.injection.attach import build, build_prompt
from unipelt.injection.token_hooks import build_tokens, with_token_ids
from unipelt.submodules.room import DEFAULT, ROOM


@dataclass(frozen=True)
class Draft:
    """A set on the device `meta`, and the place of its room.

    Attributes:
        host: path of the layer, or of the stack's owner, from the model.
        added: the set.
    """

    host: str
    added: nn.Module

    def name(self, inner: str) -> str:
        """Return the name in the model of a part of the set with the name `inner`."""
        return ".".join(part for part in (self.host, ROOM, DEFAULT, inner) if part)


def draft(model: PreTrainedModel, config: UniPELTConfig, deployed: bool) -> list[Draft]:
    """Build every set of a configuration on the device `meta`. Raises `InjectionError` as injection does."""
    paths = {module: path for path, module in model.named_modules()}
    found = []
    stacks = find_stacks(model, config) if config.has_submodules else []
    for stack in stacks:
        built = build(model, stack, config, deployed, device="meta")
        found.append(Draft(paths[stack.owner], built.stack))
        found += [Draft(paths[stack.layers[index].module], added) for index, added in built.layers.items()]
    if config.prompt is not None:
        entry, prompt = build_prompt(model, stacks[0], config, device="meta")
        holder = nn.Module()
        holder.add_module("prompt", prompt)
        found.append(Draft(paths[entry], holder))
    if config.tokens is not None:
        rows = nn.Module()
        rows.add_module("tokens", build_tokens(model, with_token_ids(model, config), device="meta"))
        found.append(Draft(paths[model.base_model], rows))
    return found


def shapes(drafts: Sequence[Draft]) -> dict[str, Tensor]:
    """Return the parameters of drafts, which have shapes alone, by their names in the model."""
    return dict(_named(drafts))


def _named(drafts: Sequence[Draft]) -> Iterator[tuple[str, Tensor]]:
    seen = set()  # layers may share a parameter, which then has the name of the first
    for one in drafts:
        for name, parameter in one.added.named_parameters():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield one.name(name), parameter
