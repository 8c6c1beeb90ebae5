"""A room as PEFT's tuner layer: the class that a room takes when PEFT adds a set to its layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from unipelt.bridges.peft_socket.register import require_peft
from unipelt.submodules.room import Room

require_peft()
from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: E402


class PeftRoom(Room, BaseTunerLayer):
    """The named sets of a layer or a stack, which PEFT calls adapters; one of them computes, or none.

    `active` follows what PEFT says of `active_adapter` and `disable_adapters`.
    """

    adapter_layer_names = ("sets",)

    @property
    def sets(self) -> nn.ModuleDict:
        """The sets in the form in which PEFT looks at adapters; what is deleted there is deleted here."""
        view = nn.ModuleDict()
        view._modules = self._modules  # type: ignore[assignment]
        return view

    @property
    def weight(self) -> Any:
        """A room stands for no projection of the host's, and has no weight."""
        raise AttributeError("a room has no weight")

    @property
    def bias(self) -> Any:
        """A room has no bias either."""
        raise AttributeError("a room has no bias")

    def _get_available_adapters(self) -> set[str]:
        return set(self)

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Let one set compute, and train unless `inference_mode`; all others do neither.

        Raises `ValueError` for several at a time.
        """
        names = check_single(adapter_names)
        for name in self:
            let_train(self[name], name in names and not inference_mode)
        self._active_adapter = names
        self._awake = [parameter for parameter in self.parameters() if parameter.requires_grad]
        self._choose()

    def enable_adapters(self, enabled: bool) -> None:
        """Let the active set compute again, or none; what trained before trains again."""
        if enabled and self._disable_adapters:
            for parameter in self._awake:
                parameter.requires_grad_(True)
        elif not enabled and not self._disable_adapters:
            self._awake = [parameter for parameter in self.parameters() if parameter.requires_grad]
            self.requires_grad_(False)
        self._disable_adapters = not enabled
        self._choose()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let sets train or not, whichever computes."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if name in self:
                let_train(self[name], requires_grad)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse to merge in a way that can be undone."""
        raise ValueError(
            "unipelt merges for good (merge_and_unload); to compute without a set for a while, use disable_adapter"
        )

    def unmerge(self) -> None:
        """Do nothing: nothing is merged."""

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Any = None) -> None:
        """Move a set that was loaded to where its host's parameters are; their type is their own."""
        place = device if device is not None else getattr(self, "_device", None)
        added = self.present(adapter_name)
        if place is not None and added is not None and not any(one.is_meta for one in added.parameters()):
            added.to(place)

    def _choose(self) -> None:
        self.active = None if self._disable_adapters or not self._active_adapter else self._active_adapter[0]


def furnish(room: Room, device: Any) -> PeftRoom:
    """Give a room its class for PEFT, once."""
    if not isinstance(room, PeftRoom):
        room.__class__ = PeftRoom
    made: Any = room
    if "_awake" not in vars(made):
        made._active_adapter, made._disable_adapters, made._awake = [], False, []
        made._device = device
    furnished: PeftRoom = made
    return furnished


def strip(room: PeftRoom) -> None:
    """Make a room a plain one again."""
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
    """Let a set train or not; what never trains (the start of low-rank factors) does not."""
    frozen = {
        id(module.get_parameter(part.parameter))
        for module in added.modules()
        for part in getattr(module, "parts", ())
        if part.frozen
    }
    for parameter in added.parameters():
        parameter.requires_grad_(train and id(parameter) not in frozen)
