"""The room of a layer: one child module that holds everything that was added to the layer, as named sets.

A stack also has a room. This room holds the modules that the layers share (prefix networks, shared parameters), the
prompt, and the trained tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from unipelt.submodules.drop import SubmoduleDropout
from unipelt.submodules.entry import Entry, Part
from unipelt.submodules.forward_pass import Passes, new_key
from unipelt.submodules.term import Term

ROOM = "unipelt"
"""The name of the room among the children of its layer or stack."""
DEFAULT = "default"
"""The name of the set that `unipelt.inject` adds."""


@dataclass(frozen=True)
class ForwardArgument:
    """One argument of a forward method.

    Attributes:
        name: the argument's name.
        position: the argument's position in the signature; None if the signature does not name the argument.
    """

    name: str
    position: int | None

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the argument's value in a call, or None. Raise `RuntimeError` if there is no such argument."""
        if self.position is None and self.name not in kwargs:
            raise RuntimeError(f"attention was called without {self.name!r}; its description names another argument")
        if self.position is not None and len(args) > self.position:
            return args[self.position]
        return kwargs.get(self.name)

    def write(self, args: list[Any], kwargs: dict[str, Any], value: Any) -> None:
        """Set the argument's value in a call, in place."""
        if self.position is not None and len(args) > self.position:
            args[self.position] = value
        else:
            kwargs[self.name] = value


@dataclass(frozen=True)
class Wiring:
    """The places of a set's host modules, as plain data. All paths start at the layer.

    Attributes:
        attention: path of the attention.
        hidden, mask, bias: the attention's arguments for the states, the mask and the position bias; None for an
            argument that is not read.
        truth_values: whether the attention reads a floating-point mask as truth values.
        added: whether the attention adds a mask with 2 dimensions to the logits.
        averages: whether a gate or a router averages over real tokens, or a term chooses some, so that the attention's
            mask is read.
        readers: paths of the projections that read the attention's input. The entry is computed at the first of them
            that is called.
        outputs: names of the terms that are added to a module's output, in their order, by the module's path.
        inputs: names of the terms that are added to a projection's input, by the projection's path.
        handed: names of the terms that read the input of another projection, by that projection's path.
        norm: path of the norm whose output an adapter reads (post-LN); empty without such an adapter.
        keys, values: paths of the projections into whose output a prefix is inserted; empty without an insertion.
        tokens_first: paths of the projections that read and return tensors with the tokens in front of the examples.
    """

    attention: str = ""
    hidden: ForwardArgument | None = None
    mask: ForwardArgument | None = None
    bias: ForwardArgument | None = None
    truth_values: bool = False
    added: bool = False
    averages: bool = False
    readers: tuple[str, ...] = ()
    outputs: dict[str, tuple[str, ...]] = field(default_factory=dict)
    inputs: dict[str, tuple[str, ...]] = field(default_factory=dict)
    handed: dict[str, tuple[str, ...]] = field(default_factory=dict)
    norm: str = ""
    keys: str = ""
    values: str = ""
    tokens_first: tuple[str, ...] = ()

    @property
    def lengthens(self) -> bool:
        """Whether a prefix lengthens the attention's text, in an attention outside Transformers' interface."""
        return bool(self.keys)

    def without(self, names: set[str], *, averages: bool, has_entry: bool, lengthens: bool) -> Wiring:
        """Return this wiring without some terms.

        Args:
            names: names of the terms to leave out.
            averages: whether a gate still averages over real tokens.
            has_entry: whether the set still has an entry.
            lengthens: whether a prefix still lengthens the attention's text.
        """

        def left(places: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
            kept = {path: tuple(name for name in terms if name not in names) for path, terms in places.items()}
            return {path: terms for path, terms in kept.items() if terms}

        return replace(
            self,
            averages=averages,
            readers=self.readers if has_entry else (),
            outputs=left(self.outputs),
            inputs=left(self.inputs),
            handed=left(self.handed),
            norm="" if "adapter" in names else self.norm,
            keys=self.keys if lengthens else "",
            values=self.values if lengthens else "",
        )


class SubmoduleSet(nn.Module):
    """Everything that one method adds to one attention of a layer, and to the rest of the layer.

    The children are `entry` (the gates and projections that read the attention's input), `prefix`, the terms by their
    names, and `cross` (the set of the layer's cross-attention).

    Attributes:
        wiring: the places of the host modules.
        key: the number that identifies the set within a pass.
        drop: the dropout of whole submodules, or None.
    """

    def __init__(self, wiring: Wiring) -> None:
        super().__init__()
        self.key = new_key()
        self.wiring = wiring
        self.drop: SubmoduleDropout | None = None
        self.entry: Entry | None = None
        self.prefix: Any = None
        self.cross: SubmoduleSet | None = None

    @property
    def terms(self) -> dict[str, Term]:
        """The terms by name, without those of the cross-attention."""
        return {name: child for name, child in self._modules.items() if isinstance(child, Term)}

    @property
    def averages(self) -> bool:
        """Whether the attention's mask is needed: a gate or a router averages over real tokens, or a term chooses."""
        terms = self.terms.values()
        entries = [self.entry, *(term.entry for term in terms)]
        return (
            self.chooses_tokens
            or any(entry is not None and entry.gates.averages for entry in entries)
            or any(term.averages for term in terms)
        )

    @property
    def chooses_tokens(self) -> bool:
        """Whether a term of this set is added to chosen tokens only."""
        return any(term.tokens is not None for term in self.terms.values())

    @property
    def needs_pass(self) -> bool:
        """Whether the set's modules exchange values in a pass."""
        return (
            self.entry is not None
            or self.prefix is not None
            or bool(self.wiring.handed)
            or self.drop is not None
            or self.chooses_tokens
            or any(term.depends_on_text for term in self.terms.values())
        )

    def attentions(self) -> Iterator[SubmoduleSet]:
        """Yield this set and, if there is one, the set of the cross-attention."""
        yield self
        if self.cross is not None:
            yield self.cross


class StackSet(nn.Module):
    """Everything that one method adds to a stack as a whole.

    The children are `prefix_network`, `cross_prefix_network`, `NAME_shared` (the shared parameters of the submodule
    NAME), `prompt` and `tokens`. A child exists only if the method uses it.

    Attributes:
        chooses_tokens: whether a term in a layer is added to chosen tokens only.
    """

    chooses_tokens = False


class Room(nn.Module):
    """The named sets of one layer, or of one stack: `room["default"]`.

    Attributes:
        passes: the passes of the stack that the room belongs to.
        active: the name of the active set; None if the base model runs without a set.
    """

    def __init__(self, passes: Passes) -> None:
        super().__init__()
        self.passes = passes
        self.active: str | None = DEFAULT

    def __getitem__(self, name: str) -> Any:
        return self._modules[name]

    def __setitem__(self, name: str, added: nn.Module) -> None:
        self._modules[name] = added  # add_module would refuse a name that a module's attribute has

    def __contains__(self, name: object) -> bool:
        return name in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def present(self, name: str | None) -> Any:
        """Return the set of this name, or None if the room has no such set."""
        return None if name is None else self._modules.get(name)


@dataclass
class Port:
    """The link from a host module of a layer to its room.

    Attributes:
        room: the room, in a tuple, so that the room is no child of the host.
        path: the host's path from the layer.
        cross: whether the host belongs to the layer's cross-attention.
        config: the host's original configuration, if a prefix replaced it; else None.
        begins: whether the host's hook may begin the pass of the attention, because the attention has no such hook.
        seen: a list that collects the keys and values of an attention, each (B, H, S, d), while a text is read for
            prefixes; else None.
        tokens_first: whether the host reads and returns tensors with the tokens in front of the examples.
    """

    room: tuple[Room]
    path: str
    cross: bool = False
    config: Any = None
    begins: bool = False
    seen: list[tuple[Tensor, Tensor]] | None = None
    tokens_first: bool = False

    def part(self, name: str | None) -> SubmoduleSet | None:
        """Return the set of this name that belongs to the host's attention, or None."""
        found: Any = self.room[0]._modules.get(name) if name is not None else None
        return found._modules.get("cross") if self.cross and found is not None else found


def rooms(model: nn.Module) -> Iterator[tuple[str, Room]]:
    """Yield the path and the room of every room in a model."""
    for path, module in model.named_modules():
        if isinstance(module, Room):
            yield path, module


@dataclass(frozen=True)
class OwnPart:
    """A named part of a parameter that was added to a model.

    Attributes:
        path: path of the module that owns the parameter, from the model.
        part: the part's name, kind and rows.
        parameter: the whole parameter.
        room: path of the room, from the model.
        set_name: the name of the set in the room.
        cross: whether the part belongs to the layer's cross-attention.
    """

    path: str
    part: Part
    parameter: nn.Parameter
    room: str
    set_name: str
    cross: bool

    @property
    def full_name(self) -> str:
        """The name of the whole parameter in the model."""
        return f"{self.path}.{self.part.parameter}"

    @property
    def tensor(self) -> Tensor:
        """The part's values, as a view without gradient."""
        return self.part.of(self.parameter.detach())

    @property
    def size(self) -> int:
        """The number of the part's elements. The parameter is not sliced, because a slice gathers all its shards."""
        numbers = self.parameter.numel()
        return numbers if self.part.count is None else numbers // self.parameter.shape[0] * self.part.count


def own_parts(model: nn.Module) -> Iterator[OwnPart]:
    """Yield every named part of the parameters that were added to a model, in the order of the model's modules.

    A part of a parameter that several modules share is yielded once.
    """
    seen = set()
    for room_path, room in rooms(model):
        for set_name in room:
            for path, module in room[set_name].named_modules():
                for part in getattr(module, "parts", ()):
                    parameter = module.get_parameter(part.parameter)
                    if (id(parameter), part.start, part.count) in seen:
                        continue
                    seen.add((id(parameter), part.start, part.count))
                    where = ".".join(name for name in (room_path, set_name, path) if name)
                    cross = path.split(".")[0] == "cross"
                    yield OwnPart(where, part, parameter, room_path, set_name, cross)


def own_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return every parameter that was added to a model, by its name in the model."""
    found = {}
    for path, room in rooms(model):
        found.update({f"{path}.{name}" if path else name: one for name, one in room.named_parameters()})
    return found


def own_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of submodules that a checkpoint holds, by name in the model. Shared buffers come once."""
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        for name, buffer in getattr(module, "saved_buffers", {}).items():
            if not any(buffer is other for other in found.values()):
                found[f"{path}.{name}"] = buffer
    return found


@dataclass(frozen=True)
class PlacedTerm:
    """A term and its host module.

    Attributes:
        layer: path of the layer, from the model.
        path: path of the host, from the model.
        host: the host module.
        owner: the set that holds the term.
        term: the term.
        cross: whether the term belongs to the layer's cross-attention.
    """

    layer: str
    path: str
    host: Any
    owner: SubmoduleSet
    term: Any
    cross: bool

    def factors(self) -> dict[str, Tensor]:
        """Return the values of all parts of the term, by name, such as `A`."""
        prefix = f"{self.term.name}."
        return {
            part.name.removeprefix(prefix): part.of(module.get_parameter(part.parameter).detach())
            for module in (self.term, self.term.entry, self.owner.entry)
            if module is not None
            for part in module.parts
            if part.name.startswith(prefix)
        }


def layer_sets(model: nn.Module, name: str = DEFAULT) -> Iterator[tuple[str, Any, SubmoduleSet]]:
    """Yield (layer's path, layer, set) for each attention of each layer that has a set of this name."""
    for path, room in rooms(model):
        found = room.present(name)
        if isinstance(found, SubmoduleSet):
            layer_path = path.rpartition(".")[0]
            layer = model.get_submodule(layer_path)
            for part in found.attentions():
                yield layer_path, layer, part


def placed_terms(model: nn.Module, name: str = DEFAULT) -> Iterator[PlacedTerm]:
    """Yield every term of the sets of this name, with its host module."""
    for layer_path, layer, part in layer_sets(model, name):
        wiring = part.wiring
        places = [(path, terms) for places in (wiring.outputs, wiring.inputs) for path, terms in places.items()]
        for path, terms in (*places, *([(wiring.norm, ("adapter",))] if wiring.norm else [])):
            for term in terms:
                host, cross = layer.get_submodule(path), part is not layer._modules[ROOM][name]
                where = f"{layer_path}.{path}" if path else layer_path
                yield PlacedTerm(layer_path, where, host, part, part._modules[term], cross)
