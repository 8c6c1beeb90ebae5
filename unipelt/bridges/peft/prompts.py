"""Read and write a prompt in PEFT's folders, for causal language models: PEFT returns logits of the prompt too.

In PEFT's other models, the head reads the prompt's states in place of the text's (a pooler reads the first state of the
prompt, for example), so the result differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from unipelt.bridges.peft.files import task_of
from unipelt.bridges.peft.plan import IGNORED, Plan, check_tensor
from unipelt.checkpoint.manifest import CheckpointError
from unipelt.config.methods import UniPELTConfig
from unipelt.config.parts import PromptConfig
from unipelt.config.schema import ConfigError
from unipelt.files.messages import show
from unipelt.hosts.locate import find_stacks
from unipelt.injection.attach import find_entry
from unipelt.submodules.room import own_parts

_NAME = "prompt_embeddings"
_IGNORED = IGNORED | {
    # initial values for training, and sizes of the model
    *("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"),
    *("token_dim", "num_attention_heads", "num_layers"),
}


def write_prompt(model: PreTrainedModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return PEFT's fields and tensors for a model's prompt.

    Raises `CheckpointError` if PEFT would compute another result.
    """
    _check_model(model)
    embedding = next(own.tensor for own in own_parts(model) if own.part.kind == "prompt")
    length, width = embedding.shape
    fields = {
        "num_virtual_tokens": length,
        "token_dim": width,
        "num_transformer_submodules": 1,
        "num_attention_heads": model.config.num_attention_heads,
        "num_layers": model.config.num_hidden_layers,
        "prompt_tuning_init": "RANDOM",
    }
    return fields, {_NAME: embedding}


def plan_prompt(model: PreTrainedModel, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Plan:
    """Return the plan for a folder with a prompt.

    Raises `CheckpointError`, or `InjectionError` if the model takes no prompt.
    """
    _check_model(model)
    for name, value in values.items():
        known = name in _IGNORED or name in ("peft_type", "num_virtual_tokens")
        if not known and value and (name, value) != ("num_transformer_submodules", 1):
            raise CheckpointError(f"{show(name)} is {show(value)}, which is no plain prompt of one model")
    if tensors.keys() != {_NAME}:
        odd = sorted(tensors.keys() ^ {_NAME})[0]
        raise CheckpointError(f"a prompt is one tensor, {_NAME}, and {show(odd)} is missing or beside it")
    try:
        config = UniPELTConfig(None, None, None, prompt=PromptConfig(values.get("num_virtual_tokens")))  # type: ignore[arg-type]
    except ConfigError as error:
        raise CheckpointError(f"num_virtual_tokens cannot be meant: {error}") from error
    entry = find_entry(model, find_stacks(model, config)[0])
    path = next(path for path, module in model.named_modules() if module is entry)
    assert config.prompt is not None
    check_tensor(_NAME, tensors[_NAME], (config.prompt.length, entry.get_input_embeddings().weight.shape[1]))
    return Plan(config, {f"{path}.prompt.embedding": tensors[_NAME]}, {})


def _check_model(model: PreTrainedModel) -> None:
    if task_of(model) != "CAUSAL_LM":
        raise CheckpointError(
            f"PEFT lets the heads of {type(model).__name__} read a prompt's states too, and here they read the text's; "
            "a prompt travels for causal language models alone, keep others whole with unipelt.save"
        )
