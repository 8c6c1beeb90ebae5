"""Configuration of gates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unipelt.config.parts import check_dropout
from unipelt.config.schema import ConfigError, check_fields, omitted_if_default
from unipelt.files.messages import show


@dataclass(frozen=True)
class GateConfig:
    """The computation of gates. The defaults are the paper's, except that gates ignore padding.

    Attributes:
        pooling: the pooling over the tokens of a text. `masked_mean` averages over the tokens that are not padding.
            `mean` averages over all tokens, as in the authors' release, so a prediction depends on the padding of its
            batch. `token` gives one gate per token (a prefix then has the gating `mass`). `static` gates have no
            input: one learned number per gate and layer. Causal layers use `static` gates if this is `static`, and else
            `token`, because a mean would include later tokens.
        network: the network from the input to the gates' logits. `linear`; `mlp`, two layers with tanh between them;
            `recurrent`, a minimal gated recurrence over the text; `transformer`, one attention head over the text.
            The last two give one number per example and are not possible in causal layers.
        hidden: inner width of a network that is not linear, in units.
        shared: whether one network at the start of a layer's attention, the central gate of the authors' release,
            computes all gates of the layer. Otherwise each gate is computed from the input of its submodule.
        activation: `sigmoid`; `tanh`, with values between -1 and 1; or `softmax` over the gates of a layer, which needs
            shared gates.
        temperature: the divisor of the logits.
        start: the initial value of the gates; by default 0.5 with `sigmoid` and 0 with `tanh`. With `tanh` the weights
            start at zero, so a start of 0 gives exactly the model without submodules. Exceptions are a prefix (footnote
            3) and a prompt, whose vectors of zeros still take attention.
        dropout: the probability p, in training, that a submodule of a layer (adapter, prefix, LoRA, a further
            submodule), gated or not, is left out of a pass: `y + d g f(x, y)`, with d = 0 with the probability p and
            else d = 1. Nothing is rescaled, and evaluation does not change. A prompt is never left out.
        dropout_by: `batch`: one draw for all examples of a batch. `example`: one draw for each example.
    """

    pooling: Literal["masked_mean", "mean", "token", "static"] = "masked_mean"
    network: Literal["linear", "mlp", "recurrent", "transformer"] = omitted_if_default("linear")
    hidden: int = omitted_if_default(16)
    shared: bool = omitted_if_default(False)
    activation: Literal["sigmoid", "tanh", "softmax"] = omitted_if_default("sigmoid")
    temperature: float = omitted_if_default(1.0)
    start: float | None = omitted_if_default(None)
    dropout: float = omitted_if_default(0.0)
    dropout_by: Literal["batch", "example"] = omitted_if_default("batch")

    def __post_init__(self) -> None:
        check_fields(self, "hidden", "temperature")
        check_dropout(self.dropout)
        if self.activation == "softmax" and not self.shared:
            raise ConfigError("activation softmax is over the gates of a layer, so it needs shared: true")
        self.check_start("start", self.start)
        if self.pooling == "static" and (self.network != "linear" or self.shared):
            raise ConfigError("static gates have no input, so they have no network and are not shared")
        if self.over_text and self.pooling != "masked_mean":
            raise ConfigError(f"a {self.network} network reads all of a text, so its pooling is masked_mean")

    def check_start(self, name: str, start: float | None) -> None:
        """Raise `ConfigError` if a gate cannot start at the value `start`. The message calls the value `name`."""
        least = {"sigmoid": 0, "tanh": -1, "softmax": 1}[self.activation]
        if start is not None and not least < start < 1:
            bounds = "nothing, since gates sum to 1" if least == 1 else f"above {least} and below 1"
            raise ConfigError(f"{name} must be {bounds} under {self.activation}, not {show(start)}")

    @property
    def over_text(self) -> bool:
        """Whether the network itself pools over the text, so that it gives one number per example."""
        return self.network in ("recurrent", "transformer")


def check_prompt_gate(gate: GateConfig) -> None:
    """Raise `ConfigError` for gates that a prompt does not support."""
    if gate.shared:
        raise ConfigError(
            "gate.shared: true is of a layer's gates, and a prompt is in front of all layers; take gate.shared: false, "
            "or prompt.gate: false"
        )
    if gate.pooling == "token":
        raise ConfigError(
            "gate.pooling: token is a gate for every token, and a prompt is in front of all tokens; take gate.pooling: "
            "masked_mean (static in causal models), or prompt.gate: false"
        )
