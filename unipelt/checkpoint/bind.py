"""Replace `save_pretrained` and `push_to_hub` of an injected model by those of this package."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import EllipsisType
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from unipelt.checkpoint.push import push_to_hub
from unipelt.checkpoint.save import save, save_beside


def bind(model: PreTrainedModel) -> PreTrainedModel:
    """Give an injected model a `save_pretrained` and a `push_to_hub` for its trained parameters; `remove` undoes this.

    Returns the same model.
    """
    bound: Any = model
    bound.save_pretrained = partial(_save_pretrained, model)
    bound.push_to_hub = partial(_push_to_hub, model)
    return model


def _save_pretrained(
    model: PreTrainedModel,
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | EllipsisType | None = ...,
    push_to_hub: bool = False,
    peft: bool = False,
    **_: Any,
) -> None:
    """Write the checkpoint of `unipelt.save`, so that a Trainer's checkpoints have the same form.

    Where PEFT is installed, PEFT's form stands beside it, so that Transformers and sentence-transformers read the
    folder. (Another process calls `unipelt.register_with_peft()` first.) A caller that passes a `state_dict`, or None
    for one, as Trainer does, reads the folder by itself: it gets no second copy of the weights.
    """
    if push_to_hub:
        raise ValueError("push_to_hub is no option of an injected model's save_pretrained; call unipelt.push_to_hub")
    if not is_main_process:
        return
    if isinstance(state_dict, EllipsisType) and not peft and _registered():
        save_beside(model, save_directory)
    else:
        save(model, save_directory, state_dict=None if isinstance(state_dict, EllipsisType) else state_dict, peft=peft)


def _registered() -> bool:
    """Register the type `UNIPELT` with PEFT, so that this process can read its folders. False without a known PEFT."""
    if importlib.util.find_spec("peft") is None:
        return False
    package: Any = sys.modules["unipelt"]  # by its public name, since the bridges stand on this folder
    try:
        package.register_with_peft()
    except ImportError:
        return False
    return True


def _push_to_hub(model: PreTrainedModel, repo_id: str, **options: Any) -> str:
    """Call `unipelt.push_to_hub`."""
    return push_to_hub(model, repo_id, **options)
