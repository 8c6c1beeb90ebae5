"""Train many replicas of one injected model at once.

All replicas have the same frozen base, so the base computes one batch of all replicas' examples. The trained parameters
are stacked, one row for each replica, and the model's own `forward` is mapped over the rows (`torch.vmap`). So every
method can be packed.

Shapes: R replicas, B examples of each replica, T tokens, C outputs of the head, N numbers that a replica keeps, H
attention heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from unipelt.config.peft import PeftTermConfig
from unipelt.config.peft_types import MIXES_ROWS
from unipelt.hosts.attention_interface import BACK_ENDS
from unipelt.hosts.families import FAMILIES
from unipelt.injection.balance_hooks import balances
from unipelt.injection.parameters import kept_names
from unipelt.injection.state import injection_of

_ALIGNMENT = 64  # in numbers; kernels read vectors, so parameters start at multiples of this in a row
_PROBE = 0.05  # standard deviation of the differences between the probe's replicas
_TOLERANCE = 1e-4  # relative to the probe's largest logit; a wrong mask gives far more, another kernel far less


class PackError(ValueError):
    """A model cannot be packed, or a replica does not belong to the pack; nothing was changed."""


@dataclass(frozen=True)
class _Place:
    """The position of a parameter in a replica's row."""

    start: int
    shape: torch.Size

    def of(self, rows: Tensor) -> Tensor:
        """Return the parameter, (..., *shape), as a view of rows, (..., N)."""
        return rows[..., self.start : self.start + self.shape.numel()].view(*rows.shape[:-1], *self.shape)


class Replica:
    """One replica: its row of the pack, to be read, filled, and trained with an optimizer.

    Attributes:
        row: (N,), all numbers that the replica keeps, in the pack's order; a view of the pack's rows.
        decayed, plain: the trained parameters with and without weight decay, as two flat leaf tensors. Each shares its
            storage and its gradient's storage with the pack. `torch.optim` and `clip_grad_norm_` work on them as usual.
    """

    def __init__(self, places: Mapping[str, _Place], device: torch.device) -> None:
        self.row = torch.empty(0, device=device)
        self.decayed = nn.Parameter(torch.empty(0, device=device))
        self.plain = nn.Parameter(torch.empty(0, device=device))
        self._places = places

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The list `[decayed, plain]`, for an optimizer without groups, and for clipping."""
        return [self.decayed, self.plain]

    def tensors(self, row: Tensor | None = None) -> dict[str, Tensor]:
        """Return the kept values by the model's names and in its shapes, as views of a row.

        Args:
            row: (N,), a row of the same pack; by default the replica's own row.
        """
        return {name: place.of(self.row if row is None else row) for name, place in self._places.items()}


class Pack:
    """Replicas of one injected model.

        pack = Pack(model, tokens=128)
        replicas = [pack.add(values) for values in starts]  # each by name, as `kept_values(model)` gives them
        optimizers = [torch.optim.AdamW(replica.parameters, lr=lr) for replica, lr in zip(replicas, rates)]
        model.train()
        logits = pack({"input_ids": ids, "attention_mask": mask})  # (R, B, T) -> (R, B, C)
        pack.backward(losses(logits, labels, real))
        for replica, optimizer in zip(replicas, optimizers):
            torch.nn.utils.clip_grad_norm_(replica.parameters, 1.0)
            optimizer.step()

    A replica's gradient is that of its own loss alone, so a replica trains as a separate model would.

    Args:
        model: an injected model with one input sequence and `logits`, on the device of the training. The model and its
            own parameter values are not changed.
        tokens: the largest number of tokens of a text.
        decayed: names of the parameters with weight decay; the other trained parameters are in `plain`.

    Raises:
        PackError: this model cannot be packed; the message gives the reason.
        ValueError: the model carries no submodules.
    """

    def __init__(self, model: PreTrainedModel, tokens: int, decayed: Collection[str] = ()) -> None:
        _check(model)
        kept = kept_values(model)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.model = model
        self.replicas: list[Replica] = []
        self.places: dict[str, _Place] = {}
        segments = (
            [name for name in kept if name in trained and name in decayed],
            [name for name in kept if name in trained and name not in decayed],
            [name for name in kept if name not in trained],
        )
        ends, end = [], 0
        for names in segments:
            for name in names:
                self.places[name] = _Place(end, kept[name].shape)
                end += -(-kept[name].numel() // _ALIGNMENT) * _ALIGNMENT
            ends.append(end)
        self._trained = trained & kept.keys()
        self._ends = ends
        self.device = model.device
        self._rows = torch.zeros(0, end, device=self.device)
        self._stack: dict[str, Tensor] = {}
        self._leaves: dict[Tensor, Tensor] = {}  # each leaf of the stack, and the place of its gradient
        linear = (path for path, module in model.named_modules() if isinstance(module, nn.Linear))
        self._biases = {f"{path}.bias" for path in linear} & self.places.keys()
        _probe(self, model, min(tokens, _longest(model)))

    def add(self, values: Mapping[str, Tensor]) -> Replica:
        """Add a replica that starts from these values, with the names and shapes of `kept_values`.

        Raises:
            PackError: a value is missing, has another shape, or has a name that a replica does not keep.
        """
        if wrong := values.keys() ^ self.places.keys():
            problem = "missing" if sorted(wrong)[0] in self.places else "none of them"
            raise PackError(f"a replica of this pack keeps {len(self.places)} tensors; {sorted(wrong)[0]} is {problem}")
        row = self._rows.new_zeros(1, self._rows.shape[1])
        for name, place in self.places.items():
            if values[name].shape != place.shape:
                raise PackError(f"{name} is {tuple(values[name].shape)}, and in this pack {tuple(place.shape)}")
            place.of(row[0]).copy_(values[name].detach())
        self._rows = torch.cat([self._rows, row])
        self.replicas.append(Replica(self.places, self.device))
        self._bind()
        return self.replicas[-1]

    def remove(self, replica: Replica) -> None:
        """Remove a replica from the pack; its values stay readable. The other replicas do not change."""
        gone = next(index for index, other in enumerate(self.replicas) if other is replica)
        replica.row = replica.row.clone()  # a view would keep all rows in memory
        for leaf in replica.parameters:
            leaf.data, leaf.grad = leaf.data.clone(), None
        self._rows = torch.cat([self._rows[:gone], self._rows[gone + 1 :]])
        del self.replicas[gone]
        self._bind()

    def backward(self, losses: Tensor) -> None:
        """Write the gradient of each replica's own loss into its leaves; earlier gradients are replaced.

        Args:
            losses: (R,), the losses of all replicas.
        """
        found = torch.autograd.grad(losses.sum(), list(self._leaves), materialize_grads=True)
        torch._foreach_copy_(list(self._leaves.values()), list(found))

    def __call__(self, batch: Mapping[str, Tensor], replicas: Sequence[Replica] | None = None) -> Tensor:
        """Compute the logits of each replica on its own examples.

        Args:
            batch: the model's arguments: `input_ids` and others, (R, B, T), and `attention_mask`, (R, B, T), 1 on real
                tokens. If texts have different lengths, all are padded to the longest; a replica with fewer examples
                repeats one (and leaves it out of its loss).
            replicas: the replicas to compute; by default all. Gradients flow only if all are computed, in their order.

        Returns:
            (R, B, C), in the order of `replicas`.

        Raises:
            ValueError: the batch has another number of replicas.
        """
        stack = self._stack
        if replicas is not None and list(map(id, replicas)) != list(map(id, self.replicas)):
            index = {id(replica): row for row, replica in enumerate(self.replicas)}
            rows = self._rows[[index[id(replica)] for replica in replicas]]
            stack = {name: place.of(rows) for name, place in self.places.items()}
        count = len(self.replicas if replicas is None else replicas)
        if wrong := [name for name, tensor in batch.items() if len(tensor) != count]:
            raise ValueError(f"{wrong[0]} is for {len(batch[wrong[0]])} replicas, and there are {count}")
        kind = self.device.type
        if torch.is_autocast_enabled(kind):
            # vmap adds a stacked bias outside of autocast, and the sum would be in full precision
            half = torch.get_autocast_dtype(kind)
            stack = {name: tensor.to(half) if name in self._biases else tensor for name, tensor in stack.items()}
        return _forward(self.model, stack, batch)

    def _bind(self) -> None:
        """Make the stacked leaves, and those of each replica, views of the present rows."""
        decayed, trained = self._ends[:2]
        grads = self._rows.new_zeros(len(self.replicas), trained)
        self._stack, self._leaves = {}, {}
        for name, place in self.places.items():
            stacked = place.of(self._rows).detach()
            if name in self._trained:
                self._leaves[stacked.requires_grad_()] = place.of(grads)
            self._stack[name] = stacked
        for row, grad, replica in zip(self._rows, grads, self.replicas, strict=True):
            replica.row = row
            replica.decayed.data, replica.plain.data = row[:decayed], row[decayed:trained]
            replica.decayed.grad, replica.plain.grad = grad[:decayed], grad[decayed:]


def kept_values(model: nn.Module) -> dict[str, Tensor]:
    """Return the values that a replica keeps, by name: submodules, gates, head, and trained parameters of the base."""
    kept = set(kept_names(model))
    return {name: parameter.detach() for name, parameter in model.named_parameters() if name in kept}


def losses(logits: Tensor, labels: Tensor, real: Tensor) -> Tensor:
    """Compute the loss of each replica: cross-entropy, or the squared error for labels that are scores.

    Args:
        logits: (R, B, C); for scores C = 1.
        labels: (R, B), class ids or floating-point scores.
        real: (R, B), whether the example counts; at least one example of each replica must count.

    Returns:
        (R,) float32: the mean over each replica's own real examples.
    """
    logits = logits.float()
    if labels.is_floating_point():
        each = (logits.squeeze(-1) - labels).square()
    else:
        each = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    return torch.where(real, each, 0.0).sum(dim=1) / real.sum(dim=1)


class _FoldAttention(torch.autograd.Function):
    """Fused attention of all replicas in one call, with the replicas folded into the batch.

    Not every fused kernel has a batching rule: on a CPU, `vmap` would call the kernel once for each replica, and warn.
    """

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]) -> Tensor:
        """Raise `RuntimeError`: only the call inside `vmap` is used."""
        raise RuntimeError("attention of replicas was called outside of their map")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Save nothing, because autograd records the call inside `vmap`."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        """Compute attention with (R, B, H, T, d), R at any position, folded into (R B, H, T, d).

        Returns (R, B, H, T, d), and 0, the position of R.
        """
        *tensors, options = args
        folded = []
        for tensor, place in zip(tensors, in_dims, strict=False):
            if tensor is not None:
                tensor = tensor.expand(info.batch_size, *tensor.shape) if place is None else tensor.movedim(place, 0)
                tensor = tensor.flatten(0, 1)
            folded.append(tensor)
        query, key, value, mask = folded
        out = nn.functional.scaled_dot_product_attention(query, key, value, mask, **options)
        return out.unflatten(0, (info.batch_size, -1)), 0


class _Folding(TorchFunctionMode):
    """Send fused attention inside `vmap` through `_FoldAttention`."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, or `_fold` in place of fused attention; see `TorchFunctionMode`."""
        if func is nn.functional.scaled_dot_product_attention:
            return _fold(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _fold(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
    if attn_mask is not None:  # a mask for all texts, or for all heads, gets a row for each text
        attn_mask = attn_mask[(None,) * (query.dim() - attn_mask.dim())]
        attn_mask = attn_mask.expand(query.shape[0], *attn_mask.shape[1:])
    return _FoldAttention.apply(query, key, value, attn_mask, options)


def _forward(model: PreTrainedModel, stack: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
    """Return the logits, (R, B, C), of the replicas in `stack`, each parameter (R, ...), on a batch of (R, B, T)."""
    batch = {**batch, "attention_mask": _ready_mask(batch["attention_mask"], model)}
    with _Folding():
        return torch.vmap(partial(_logits, model), randomness="different")(dict(stack), batch)


def _logits(model: PreTrainedModel, values: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    return functional_call(model, values, (), batch).logits


def _ready_mask(mask: Tensor, model: PreTrainedModel) -> Tensor:
    """Return a mask (R, B, T) in the form of attention, (R, B, 1, 1, T), so that no model builds one from the data."""
    real = mask.bool()[:, :, None, None, :]
    if model.config._attn_implementation == "sdpa":
        return real
    dtype = model.dtype
    return torch.zeros(real.shape, dtype=dtype, device=real.device).masked_fill(~real, torch.finfo(dtype).min)


def _check(model: PreTrainedModel) -> None:
    """Raise `PackError` for a model that cannot be packed, whatever the data."""
    name, config = type(model).__name__, injection_of(model).config
    if model.config._attn_implementation not in BACK_ENDS:
        raise PackError(
            f"a pack works with the attention back-ends {' and '.join(BACK_ENDS)}, not "
            f"{model.config._attn_implementation!r}; call model.set_attn_implementation('sdpa')"
        )
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise PackError("gradient checkpointing and a pack exclude each other; pack fewer replicas instead")
    family = FAMILIES.get(model.config.model_type)
    if getattr(model.config, "is_decoder", False) or (family and any(stack.causal for stack in family.stacks)):
        raise PackError(f"only encoders can be packed, and this {name} is none; train its runs one by one")
    if balances(config):
        raise PackError(
            "a pack computes losses by itself, without the load-balancing loss of a mixture (balance); take balance 0, "
            "or train the runs one by one"
        )
    if config.gate.pooling == "mean" and any(config.part(part).gate for part in config.submodule_names):
        raise PackError(
            "gates with pooling 'mean' average over padding too, of which a pack has more than its replicas by "
            "themselves; take pooling 'masked_mean', or train the runs one by one"
        )
    for part in config.more:
        if isinstance(part, PeftTermConfig) and part.type in MIXES_ROWS:
            raise PackError(
                f"PEFT's {part.type} {MIXES_ROWS[part.type]}, and a pack has other batches; train its runs one by one"
            )
    if hooked := [name for name, parameter in model.named_parameters() if parameter._backward_hooks]:
        raise PackError(
            f"the gradient of {hooked[0]} has a hook, which a pack does not call; train its runs one by one"
        )
    if other := [name for name, values in kept_values(model).items() if values.dtype != torch.float32]:
        raise PackError(f"replicas are kept in float32, and {other[0]} is not; use autocast for half precision")


def _longest(model: PreTrainedModel) -> int:
    """Return the largest number of tokens that the model takes; up to two positions may be reserved (RoBERTa)."""
    limit = getattr(model.config, "max_position_embeddings", None)
    return 1 << 30 if limit is None else limit - 2


@torch.no_grad()
def _probe(pack: Pack, model: PreTrainedModel, tokens: int) -> None:
    """Raise `PackError` if two packed replicas give other logits than each replica alone, on padded texts."""
    vocabulary, padding = model.config.vocab_size, getattr(model.config, "pad_token_id", None) or 0
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (2, 2, tokens), generator=generator)
    ids[ids == padding] = (padding + 1) % vocabulary
    lengths = torch.tensor([[tokens, max(1, tokens // 2)], [max(1, tokens - 1), min(3, tokens)]])
    mask = (torch.arange(tokens) < lengths[..., None]).long()
    batch = {"input_ids": torch.where(mask.bool(), ids, padding), "attention_mask": mask}
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    # the second replica differs from the first, and has no term that is zero
    moves = {name: _PROBE * torch.randn(place.shape, generator=generator) for name, place in pack.places.items()}
    values = {name: torch.stack([value, value + moves[name].to(value)]) for name, value in kept_values(model).items()}
    training = model.training
    model.eval()
    name = type(model).__name__
    try:
        alone = []
        for index in range(2):
            single = {key: tensor[index] for key, tensor in values.items()}
            alone.append(_logits(model, single, {key: tensor[index] for key, tensor in batch.items()}))
        try:
            packed = _forward(model, values, batch)
        except Exception as error:  # a model's code may raise any error for a tensor inside vmap
            why = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise PackError(f"this {name} cannot be packed, its runs must be trained one by one: {why}") from error
    finally:
        model.train(training)
    expected = torch.stack(alone).float()
    gap = (packed.float() - expected).abs().max() / expected.abs().max().clamp_min(1e-6)
    if not gap < _TOLERANCE:
        raise PackError(
            f"this {name} cannot be packed: on texts of {tokens} tokens it gives other numbers for a mask that is "
            f"ready-made (by {gap:.1g} of the largest); train its runs one by one"
        )
