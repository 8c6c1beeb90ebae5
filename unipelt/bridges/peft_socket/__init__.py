"""UniPELT as a method of PEFT's: type `UNIPELT`, so that what works with PEFT works with it.

    model = peft.get_peft_model(model, unipelt.PeftConfig("unipelt-apl", task_type="SEQ_CLS"))

What PEFT calls an adapter is a named set here. PEFT is an optional extra: nothing but the functions here imports it.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

__all__ = ["from_peft", "register_with_peft", "to_peft"]


def register_with_peft() -> None:
    """Make type `UNIPELT` known to PEFT; a second call does nothing.

    A process that loads a folder of this type calls this first; to ask for `unipelt.PeftConfig` does it, too.

    Raises:
        ImportError: PEFT is not installed, or this version of it is not known. PEFT is as it was.
    """
    from unipelt.bridges.peft_socket.config import PeftConfig
    from unipelt.bridges.peft_socket.register import register
    from unipelt.bridges.peft_socket.tuner import UniPELTModel

    register(PeftConfig, UniPELTModel)


def to_peft(model: PreTrainedModel, *, task_type: str | None = None, adapter_name: str = "default") -> Any:
    """Return a `PeftModel` around an injected model, in place: the same parameters, bit for bit.

    The parameters stay the same objects, so an optimizer that holds them goes on. A head becomes PEFT's
    `modules_to_save`, beside what it was before.

    Args:
        model: what `unipelt.inject` or `unipelt.load` gave.
        task_type: PEFT's, such as `SEQ_CLS`.
        adapter_name: what the set is called from then on.

    Raises:
        ImportError: as `register_with_peft`.
        ValueError: nothing was injected, or PEFT cannot carry it; the message says why.
    """
    from unipelt.bridges.peft_socket.convert import wrap

    return wrap(model, task_type, adapter_name)


def from_peft(model: Any) -> PreTrainedModel:
    """Return the model inside a `PeftModel` as `unipelt.inject` gives it, in place: the same parameters, bit for bit.

    The `PeftModel` is of no use afterwards.

    Args:
        model: a `PeftModel` of type `UNIPELT`, or a model of Transformers' with one set; with one set only.

    Raises:
        ImportError: as `register_with_peft`.
        ValueError: the model has several sets, or something of PEFT's that `unipelt.inject` does not know.
    """
    from unipelt.bridges.peft_socket.convert import unwrap

    return unwrap(model)
