"""Replace `save_pretrained` and `push_to_hub` of an injected model by those of this package."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from unipelt.checkpoint.push import push_to_hub
from unipelt.checkpoint.save import save


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
    state_dict: Mapping[str, Tensor] | None = None,
    push_to_hub: bool = False,
    peft: bool = False,
    **_: Any,
) -> None:
    """Write the checkpoint of `unipelt.save`, so that a Trainer's checkpoints have the same form."""
    if push_to_hub:
        raise ValueError("push_to_hub is no option of an injected model's save_pretrained; call unipelt.push_to_hub")
    if is_main_process:
        save(model, save_directory, state_dict=state_dict, peft=peft)


def _push_to_hub(model: PreTrainedModel, repo_id: str, **options: Any) -> str:
    """Call `unipelt.push_to_hub`."""
    return push_to_hub(model, repo_id, **options)
