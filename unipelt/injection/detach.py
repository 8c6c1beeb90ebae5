"""Take submodules, and every hook that is theirs, out of a model again."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from unipelt.injection.attention_hooks import Site, enter_attention, insert_prefix, leave_attention
from unipelt.injection.gradient_checkpointing import wake_input
from unipelt.submodules.adapter import Adapter, adapt_norm, adapt_output
from unipelt.submodules.forward_pass import Shared, enter_shared, leave_shared
from unipelt.submodules.gate import Gates
from unipelt.submodules.lora import LoRA, add_low_rank
from unipelt.submodules.prefix import Prefix, PrefixNetwork, enter_stack, leave_stack
from unipelt.submodules.prompt import Prompt, enter_prompt, leave_prompt
from unipelt.submodules.term import Term, add_terms, add_to_input, hand_on


def refuse_training(model: Any, args: tuple[Any, ...]) -> None:
    """Forward pre-hook of a folded model."""
    if model.training and torch.is_grad_enabled():
        raise RuntimeError(
            "a folded model does not train: its gates are constants and its low-rank terms are in the weights; call "
            "model.eval() to use it, or train the model that it was folded from"
        )


def drop_hooks(module: Any, dropped: Collection[Callable[..., Any]]) -> None:
    """Take those hooks off a module's forward."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in dropped]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
            module._forward_hooks_always_called.pop(key, None)


HOOKS = (
    enter_attention,
    add_low_rank,
    insert_prefix,
    leave_attention,
    adapt_norm,
    adapt_output,
    add_terms,
    add_to_input,
    hand_on,
    enter_shared,
    leave_shared,
    enter_stack,
    leave_stack,
    enter_prompt,
    leave_prompt,
    refuse_training,
    wake_input,
)
PLACED = (
    *("unipelt_rows", "unipelt_layer", "unipelt_terms", "unipelt_inputs", "unipelt_readers"),
    *("unipelt_prompt", "unipelt_prompt_length"),
)
"""What hooks find at modules of the host's, sites and chunk sizes apart."""
OURS = (Adapter, Gates, LoRA, Prefix, PrefixNetwork, Prompt, Shared, Term)


def detach(model: nn.Module) -> None:
    """Undo `attach` wherever it got to; the parameters' values and flags are the caller's."""
    module: Any
    for module in list(model.modules()):
        if isinstance(module, OURS):
            continue
        drop_hooks(module, HOOKS)
        for name in [name for name, child in module._modules.items() if isinstance(child, OURS)]:
            delattr(module, name)
        site: Site | None = module.__dict__.pop("unipelt_site", None)
        if site is not None:
            if site.config is not None:
                module.config = site.config
            for name in ("gates", "prefix"):
                if hasattr(module, name):
                    delattr(module, name)
        for name in PLACED:
            module.__dict__.pop(name, None)
        if "unipelt_chunk_size" in module.__dict__:
            module.chunk_size_feed_forward = module.__dict__.pop("unipelt_chunk_size")
