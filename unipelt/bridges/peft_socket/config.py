"""The configuration of a set in PEFT's form, as stored in `adapter_config.json`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unipelt.bridges.peft_socket.register import TYPE, register, require_peft
from unipelt.bridges.peft_socket.tuner import UniPELTModel
from unipelt.config.methods import UniPELTConfig
from unipelt.config.presets import resolve

peft = require_peft()


@dataclass(init=False)
class PeftConfig(peft.PeftConfig):  # type: ignore[name-defined]
    """A method of this package as a configuration of PEFT.

        model = peft.get_peft_model(model, unipelt.PeftConfig("unipelt-apl", task_type="SEQ_CLS"))

    Attributes:
        method: a preset's name (`unipelt.PRESETS`), a dict, a path to JSON or YAML, or a `UniPELTConfig`; stored as a
            dict.
        modules_to_save: names of further modules that train as a whole; each set has a copy of them. If the method
            trains the head, the head and the modules that the base's checkpoint did not hold are added.
        trainable_token_indices: rows of the embeddings that train, as in PEFT's LoRA.
        deployed: whether prefixes have the deployed form.
        head: paths of the head's modules; with None, they are found when the set is added.
    """

    method: Any
    modules_to_save: list[str] | None
    trainable_token_indices: Any
    deployed: bool
    head: list[str] | None

    def __init__(
        self,
        method: str | Path | Mapping[str, Any] | UniPELTConfig = "unipelt-apl",
        *,
        modules_to_save: list[str] | None = None,
        trainable_token_indices: Any = None,
        deployed: bool = False,
        head: list[str] | None = None,
        **options: Any,
    ) -> None:
        self.method = resolve(method).to_dict()
        self.modules_to_save = None if modules_to_save is None else list(modules_to_save)
        self.trainable_token_indices = trainable_token_indices
        self.deployed = deployed
        self.head = None if head is None else list(head)
        super().__init__(**options)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft.PeftType(TYPE)

    @property
    def unipelt(self) -> UniPELTConfig:
        """The method. Raises `ConfigError` if the dict was changed to an invalid method."""
        return UniPELTConfig.from_dict(self.method)


def _signature() -> inspect.Signature:
    """Return the arguments of `PeftConfig`, including those of PEFT: PEFT drops unknown arguments of a newer file."""
    kind = inspect.Parameter
    given = [
        kind("self", kind.POSITIONAL_OR_KEYWORD),
        kind("method", kind.POSITIONAL_OR_KEYWORD, default="unipelt-apl"),
    ]
    names = [item.name for item in dataclasses.fields(PeftConfig) if item.name != "method"]
    return inspect.Signature([*given, *(kind(name, kind.KEYWORD_ONLY, default=None) for name in names)])


PeftConfig.__init__.__signature__ = _signature()  # type: ignore[attr-defined]
register(PeftConfig, UniPELTModel)  # here, so that unpickling a configuration registers its type
