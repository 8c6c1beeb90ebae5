"""`Room` as PEFT's tuner layer: a room gets this class when PEFT adds a set to its layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from unipelt.bridges.peft_socket.register import require_peft
from unipelt.submodules.room import Room

require_peft()
from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: E402


class PeftRoom(Room, BaseTunerLayer):
    """The named sets of a layer or a stack (PEFT: adapters); at most one of them computes.

    `active` follows PEFT's `active_adapter` and `disable_adapters`.
    """

    adapter_layer_names = ("sets",)

    @property
    def sets(self) -> nn.ModuleDict:
        """The sets in the form in which PEFT accesses adapters; a deletion in this view deletes the set."""
        view = nn.ModuleDict()
        view._modules = self._modules  # type: ignore[assignment]
        return view

    @property
    def weight(self) -> Any:
        """The weight of a projection; a room has none, and raises `AttributeError`."""
        raise AttributeError("a room has no weight")

    @property
    def bias(self) -> Any:
        """The bias of a projection; a room has none, and raises `AttributeError`."""
        raise AttributeError("a room has no bias")

    def _get_available_adapters(self) -> set[str]:
        return set(self)

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one set the active one: it computes, and trains unless `inference_mode`; all others do neither.

        Raises `ValueError` for several sets.
        """
        names = check_single(adapter_names)
        for name in self:
            let_train(self[name], name in names and not inference_mode)
        self._active_adapter = names
        self._awake = [parameter for parameter in self.parameters() if parameter.requires_grad]
        self._choose()

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the active set on or off; when switched on again, the same parameters train as before."""
        if enabled and self._disable_adapters:
            for parameter in self._awake:
                parameter.requires_grad_(True)
        elif not enabled and not self._disable_adapters:
            self._awake = [parameter for parameter in self.parameters() if parameter.requires_grad]
            self.requires_grad_(False)
        self._disable_adapters = not enabled
        self._choose()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Set whether sets train, active or not."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if name in self:
                let_train(self[name], requires_grad)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raise `ValueError`: a merge that can be undone is not supported."""
        raise ValueError(
            "unipelt merges for good (merge_and_unload); to compute without a set for a while, use disable_adapter"
        )

    def unmerge(self) -> None:
        """Do nothing, because no set is merged."""

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Any = None) -> None:
        """Move a loaded set to the device of its host's parameters; the types of its parameters stay."""
        place = device if device is not None else getattr(self, "_device", None)
        added = self.present(adapter_name)
        if place is not None and added is not None and not any(one.is_meta for one in added.parameters()):
            added.to(place)

    def _choose(self) -> None:
        self.active = None if self._disable_adapters or not self._active_adapter else self._active_adapter[0]


def furnish(room: Room, device: Any) -> PeftRoom:
    """Turn a room into a `PeftRoom`, if it is not one yet."""
    if not isinstance(room, PeftRoom):
        room.__class__ = PeftRoom
    made: Any = room
    if "_awake" not in vars(made):
        made._active_adapter, made._disable_adapters, made._awake = [], False, []
        made._device = device
    furnished: PeftRoom = made
    return furnished


def strip(room: PeftRoom) -> None:
    """Turn a `PeftRoom` into a plain `Room` again."""
    for name in ("_active_adapter", "_disable_adapters", "_awake", "_device"):
        vars(room).pop(name, None)
    room.__class__ = Room  # type: ignore[assignment]


def check_single(names: str | Sequence[str]) -> list[str]:
    """Return the names of the active sets, at most one. Raises `ValueError` for more."""
    listed = [names] if isinstance(names, str) else list(names)
    if len(listed) > 1:
        raise ValueError(
            f"one set of unipelt computes at a time, and not {', '.join(listed)} together; adapter_names= gives each "
            "row of a batch its own"
        )
    return listed


def let_train(added: nn.Module, train: bool) -> None:
    """Set whether a set trains; its fixed parameters (the start of low-rank factors) never train."""
    frozen = {
        id(module.get_parameter(part.parameter))
        for module in added.modules()
        for part in getattr(module, "parts", ())
        if part.frozen
    }
    for parameter in added.parameters():
        parameter.requires_grad_(train and id(parameter) not in frozen)
