"""UniPELT as a method of PEFT, with the type `UNIPELT`, so that programs for PEFT work with it.

    model = peft.get_peft_model(model, unipelt.PeftConfig("unipelt-apl", task_type="SEQ_CLS"))

PEFT's word for a named set is adapter. PEFT is an optional extra: only the functions of this module import it.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

__all__ = ["from_peft", "register_with_peft", "to_peft"]


def register_with_peft() -> None:
    """Register the type `UNIPELT` with PEFT; a second call has no effect.

    A process that loads a folder of this type calls this function first. Access to `unipelt.PeftConfig` has the same
    effect.

    Raises:
        ImportError: PEFT is not installed, or has an unknown version. PEFT is unchanged.
    """
    from unipelt.bridges.peft_socket.config import PeftConfig
    from unipelt.bridges.peft_socket.register import register
    from unipelt.bridges.peft_socket.tuner import UniPELTModel

    register(PeftConfig, UniPELTModel)


def to_peft(model: PreTrainedModel, *, task_type: str | None = None, adapter_name: str = "default") -> Any:
    """Return a `PeftModel` around an injected model, in place: the same parameters, bit for bit.

    The parameters stay the same objects, so an optimizer that holds them keeps working. The head becomes PEFT's
    `modules_to_save`, with a copy of its values from before training.

    Args:
        model: a model from `unipelt.inject` or `unipelt.load`.
        task_type: PEFT's task type, such as `SEQ_CLS`.
        adapter_name: the name of the set in the `PeftModel`.

    Raises:
        ImportError: see `register_with_peft`.
        ValueError: the model carries no submodules, or PEFT cannot hold it; the message gives the reason.
    """
    from unipelt.bridges.peft_socket.convert import wrap

    return wrap(model, task_type, adapter_name)


def from_peft(model: Any) -> PreTrainedModel:
    """Return the model inside a `PeftModel` as an injected model of `unipelt.inject`, in place.

    The parameters are the same, bit for bit. The `PeftModel` cannot be used afterwards.

    Args:
        model: a `PeftModel` of type `UNIPELT`, or a model of Transformers with sets of this type; with one set only.

    Raises:
        ImportError: see `register_with_peft`.
        ValueError: the model has several sets, or a training wrapper of PEFT that `unipelt.inject` does not have.
    """
    from unipelt.bridges.peft_socket.convert import unwrap

    return unwrap(model)
