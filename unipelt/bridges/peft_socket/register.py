"""Register the type `UNIPELT` with PEFT."""

from __future__ import annotations

import inspect
from enum import Enum
from typing import Any

from packaging.version import Version

from unipelt.checkpoint.peft_form import TYPE

PREFIX = "unipelt"
"""A part of the name of every parameter of a set: the attribute of its `Room`."""
OLDEST = "0.21"
"""The first PEFT in which a tuner defines the names of its parameters in a file."""

_USED = {
    "tuners.tuners_utils.BaseTuner": (
        "inject_adapter",
        "set_adapter",
        "delete_adapter",
        "_mark_only_adapters_as_trainable",
        "_unload_and_optionally_merge",
        "_get_adapter_state_dict",
        "_remove_adapter_name_from_key",
        "_remap_adapter_state_dict_for_load",
    ),
    "tuners.tuners_utils.BaseTunerLayer": (
        "set_adapter",
        "enable_adapters",
        "delete_adapter",
        "set_requires_grad",
        "_get_available_adapters",
    ),
    "utils.other.AuxiliaryTrainingWrapper": ("unload_and_optionally_merge_module", "adapter_state_dict_load_map"),
    "utils.other": ("ModulesToSaveWrapper", "set_additional_trainable_modules"),
    "utils.peft_types.PeftType": ("_member_names_", "_member_map_", "_value2member_map_"),
}
"""PEFT's names that this package uses in addition to the public ones."""


def require_peft() -> Any:
    """Import PEFT. Raises `ImportError` if PEFT is not installed, or has an unknown version."""
    try:
        import peft
    except ImportError as error:
        raise ImportError("this needs PEFT, which is not installed: pip install 'unipelt[peft]'") from error
    if problem := find_problem(peft):
        raise ImportError(
            f"unipelt does not know PEFT {peft.__version__}: {problem}; it was tested with PEFT 0.21.2, and nothing in "
            "PEFT was changed"
        )
    return peft


def find_problem(peft: Any) -> str | None:
    """Return the reason why this PEFT cannot register a method of this package, or None."""
    if Version(peft.__version__).release < Version(OLDEST).release:
        return f"it is older than {OLDEST}"
    for path, names in _USED.items():
        holder = peft
        for step in path.split("."):
            holder = getattr(holder, step, None)
        if gone := [name for name in names if not hasattr(holder, name)]:
            return f"its {path} has no {gone[0]}"
    types = peft.utils.peft_types.PeftType
    if not (issubclass(types, str) and issubclass(types, Enum)):
        return "its PeftType is no enumeration of texts"
    wanted = {"name", "config_cls", "model_cls", "prefix"}
    if not wanted <= inspect.signature(peft.utils.register_peft_method).parameters.keys():
        return "its register_peft_method takes other arguments"
    return None


def register(config_cls: type[Any], model_cls: type[Any]) -> None:
    """Register the type `UNIPELT` with PEFT; a second call has no effect.

    Args:
        config_cls: the class of the type's configurations.
        model_cls: the class of the type's tuner.

    Raises:
        ImportError: PEFT is not installed, or has an unknown version. PEFT is unchanged.
    """
    peft = require_peft()
    types = peft.utils.peft_types.PeftType
    known = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get(TYPE)
    if known is config_cls:
        return
    if known is not None or TYPE in types.__members__:
        raise ImportError(f"PEFT {peft.__version__} has a method {TYPE} already, which is not ours")
    _enter(types)
    try:
        peft.utils.register_peft_method(name=TYPE.lower(), config_cls=config_cls, model_cls=model_cls, prefix=PREFIX)
    except BaseException:
        _leave(types)
        raise


def _enter(types: Any) -> None:
    """Add a member to PEFT's enumeration of methods; PEFT has no function for this."""
    member = str.__new__(types, TYPE)
    member._name_ = member._value_ = TYPE
    types._member_names_.append(TYPE)
    types._member_map_[TYPE] = types._value2member_map_[TYPE] = member
    type.__setattr__(types, TYPE, member)


def _leave(types: Any) -> None:
    """Undo `_enter`."""
    types._member_names_.remove(TYPE)
    del types._member_map_[TYPE], types._value2member_map_[TYPE]
    type.__delattr__(types, TYPE)
