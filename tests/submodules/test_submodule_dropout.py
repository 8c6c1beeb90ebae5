"""Dropout of whole submodules (`gate.dropout`): while training, in every family, and nowhere else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_near, logits, shake, small, tiny_batch, tiny_bert
from inside import added_to
from tiny import KINDS, WITH_PREFIX, tiny_model
from tiny import tiny_batch as batch_of
from torch import Tensor, nn

import unipelt
from unipelt.config.schema import ConfigError
from unipelt.glue.settings import RunSettings
from unipelt.hosts.locate import InjectionError
from unipelt.injection.attach import room_of
from unipelt.pack import Pack, kept_values
from unipelt.submodules.drop import SubmoduleDropout
from unipelt.submodules.forward_pass import AttentionPass
from unipelt.submodules.room import own_parts

HALF: dict[str, Any] = {"gate": {"dropout": 0.5}}
Rule = Callable[[str, int], float]


@pytest.fixture
def keep(monkeypatch: pytest.MonkeyPatch) -> Callable[[Rule], None]:
    """Replace the draws by a rule: from the submodule's name and the example's index to 1 (kept) or 0."""

    def by(rule: Rule) -> None:
        def draw(self: SubmoduleDropout, now: Any, kind: str, device: Any) -> Tensor:
            assert not self.by_example or now.batch
            rows = range(now.batch if self.by_example else 1)
            return torch.tensor([rule(kind, row) for row in rows], dtype=torch.float32).view(-1, 1, 1)

        monkeypatch.setattr(SubmoduleDropout, "keep", draw)

    return by


def train_logits(model: Any, batch: dict[str, Tensor], **options: Any) -> Tensor:
    """In training mode, without gradients; the model's own dropout is off."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    with torch.no_grad():
        out: Tensor = model(**batch, **options).logits
    model.eval()
    return out


def method(family: str, *, gates: bool = True, by: str = "batch", **changes: Any) -> Any:
    name = ("unipelt-apl" if family in WITH_PREFIX else "unipelt-al") + ("" if gates else "-nogate")
    return small(name, train_head=False, **{"gate": {"dropout": 0.5, "dropout_by": by}, **changes})


# The configuration


def test_a_default_is_not_written_and_mistakes_are_named() -> None:
    assert {"dropout", "dropout_by"}.isdisjoint(unipelt.resolve("unipelt-apl").to_dict()["gate"])
    config = unipelt.resolve({"preset": "unipelt-apl", "gate": {"dropout": 0.1, "dropout_by": "example"}})
    assert unipelt.UniPELTConfig.from_dict(config.to_dict()) == config
    for wrong in (1.0, -0.1, 7):
        with pytest.raises(ConfigError, match=r"gate\.dropout must be at least 0 and below 1, not"):
            unipelt.resolve({"preset": "lora", "gate": {"dropout": wrong}})
    with pytest.raises(ConfigError, match=r"gate\.dropout_by must be batch or example"):
        unipelt.resolve({"preset": "lora", "gate": {"dropout_by": "token"}})
    with pytest.raises(ConfigError, match="this method has none"):
        unipelt.resolve({"preset": "bitfit", **HALF})
    for alone in ("adapter", "prefix", "lora", "ia3", "reft", "ln_tuning", "parallel"):  # each is a submodule of layers
        assert unipelt.resolve({"preset": alone, "gate": {"dropout": 0.2}}).gate.dropout == 0.2


def test_a_run_has_it_in_its_name_and_its_digest() -> None:
    plain = RunSettings(task="rte", method="unipelt-apl")
    dropped = RunSettings(task="rte", method={"preset": "unipelt-apl", "gate": {"dropout": 0.1}})
    assert dropped.method_name == "unipelt-apl, gate.dropout=0.1"
    assert plain.digest() != dropped.digest()
    at_default = {"preset": "unipelt-apl", "gate": {"dropout": 0.0}}
    assert RunSettings(task="rte", method=at_default).digest() == plain.digest()


# What is left out


@pytest.mark.parametrize(
    ("family", "gates", "by"),
    [
        ("bert", True, "batch"),
        ("bert", False, "example"),
        *((family, True, "example") for family in KINDS),
        *((family, False, "batch") for family in KINDS),
    ],
)
def test_all_left_out_is_the_base_and_all_kept_is_evaluation(
    family: str, gates: bool, by: str, keep: Callable[[Rule], None]
) -> None:
    base, batch = tiny_model(family), batch_of(family)
    want = logits(base, batch)
    model = unipelt.inject(base, method(family, gates=gates, by=by))
    shake(model)
    full = logits(model, batch)
    assert (full - want).abs().max() > 1e-3
    keep(lambda kind, row: 0.0)
    assert torch.equal(logits(model, batch), full), "evaluation does not change"
    assert_near(train_logits(model, batch), want)
    keep(lambda kind, row: 1.0)
    assert_near(train_logits(model, batch), full)


def test_positions_that_all_examples_share_have_no_draw_by_example() -> None:
    with pytest.raises(InjectionError, match=r"take gate\.dropout_by: batch"):
        unipelt.inject(tiny_model("deberta-v2"), method("deberta-v2", gates=False, by="example"))


@pytest.mark.parametrize(
    "changes",
    [
        {"prefix": {"gating": "mass"}},
        {"prefix": {"softmax": "own"}},
        {"gate": {"pooling": "static"}},
        {"gate": {"pooling": "token"}},
        {"gate": {"shared": True, "activation": "softmax"}},
        {"gate": {"network": "mlp", "hidden": 3}},
        {"ia3": {}, "houlsby": {"bottleneck": 3}, "lora": {"decomposed": True}},
        {"ia3": {"gate": False}, "prefix": {"gate": False}, "compacter": {"bottleneck": 4, "terms": 2}},
    ],
    ids=str,
)
def test_of_every_kind_of_gate_and_submodule(changes: dict[str, Any], keep: Callable[[Rule], None]) -> None:
    changes = {**changes, "gate": {**changes.get("gate", {}), "dropout": 0.5}}
    base, batch = tiny_bert(), tiny_batch()
    want = logits(base, batch)
    model = unipelt.inject(base, small("unipelt-apl", train_head=False, **changes))
    shake(model)
    full = logits(model, batch)
    keep(lambda kind, row: 0.0)
    assert_near(train_logits(model, batch), want)
    keep(lambda kind, row: 1.0)
    assert_near(train_logits(model, batch), full)


@pytest.mark.parametrize("gone", ["adapter", "prefix", "lora"])
@pytest.mark.parametrize("family", ["bert", "bart"])
def test_one_left_out_is_the_method_without_it(family: str, gone: str, keep: Callable[[Rule], None]) -> None:
    """A prefix that is left out takes no attention, unlike one whose gate is 0 (footnote 3)."""
    base = tiny_model(family)
    model = unipelt.inject(copy.deepcopy(base), method(family))
    shake(model)
    without = unipelt.inject(copy.deepcopy(base), method(family).updated({gone: None}))
    values = {(own.path, own.part.name): own.tensor for own in own_parts(model)}
    for own in own_parts(without):
        own.tensor.copy_(values[own.path, own.part.name])
    keep(lambda kind, row: float(kind != gone))
    assert_near(train_logits(model, batch_of(family)), logits(without, batch_of(family)))


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "mpnet"])
def test_of_some_examples(family: str, keep: Callable[[Rule], None]) -> None:
    base, batch = tiny_model(family), batch_of(family)
    want = logits(base, batch)
    model = unipelt.inject(base, method(family, by="example"))
    shake(model)
    full = logits(model, batch)
    keep(lambda kind, row: float(row != 1))
    got = train_logits(model, batch)
    for row in range(len(got)):
        assert_near(got[row], (want if row == 1 else full)[row])


def test_the_rows_of_several_tasks_in_one_batch(keep: Callable[[Rule], None]) -> None:
    """The index of an example is that among the rows of its own task."""
    tasks = unipelt.Tasks(tiny_bert())
    for name in ("one", "other"):
        shake(tasks.add(name, small("unipelt-apl", gate={"dropout": 0.5, "dropout_by": "example"}), num_labels=2))
    batch, order = tiny_batch(), ["one", "other", "other"]
    full = logits(tasks, batch, tasks=order)
    keep(lambda kind, row: 1.0)
    assert_near(train_logits(tasks, batch, tasks=order), full)
    keep(lambda kind, row: float(row == 0))
    got = train_logits(tasks, batch, tasks=order)
    assert_near(got[:2], full[:2])
    assert (got[2] - full[2]).abs().max() > 1e-3


# How it is drawn


def test_the_draws_of_submodules_layers_and_passes_are_independent_and_have_the_probability() -> None:
    model: Any = unipelt.inject(tiny_bert(), small("unipelt-apl", gate={"dropout": 0.25, "dropout_by": "example"}))
    shake(model)
    seen: dict[tuple[int, str], list[Tensor]] = {}
    layers = list(model.bert.encoder.layer)

    def note(layer: Any, args: Any, output: Any) -> None:
        passes = room_of(layer, None).passes.current()
        assert passes is not None
        for kind, kept in passes.attention(added_to(layer).key).kept.items():
            seen.setdefault((layers.index(layer), kind), []).append(kept)

    for layer in layers:
        layer.output.register_forward_hook(lambda output, args, out, layer=layer: note(layer, args, out))
    torch.manual_seed(0)
    for _ in range(12):
        train_logits(model, tiny_batch(lengths=(2,) * 100, tokens=2))
    assert {kind for _, kind in seen} == {"prefix", "lora", "adapter"}
    assert len(seen) == 9
    draws = torch.stack([torch.cat(values).flatten() for values in seen.values()])
    assert draws.shape == (9, 12 * 100)
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    assert ((draws.mean(dim=1) - 0.75).abs() < 0.05).all()
    between = torch.corrcoef(draws) - torch.eye(9)
    assert between.abs().max() < 0.12


def test_a_draw_is_for_all_tokens_of_its_example() -> None:
    """Also where a layer has put the tokens of all texts in one dimension."""
    x, now = torch.randn(3, 4, 5), AttentionPass(batch=3)
    torch.manual_seed(1)
    by_example, by_batch = SubmoduleDropout(0.5, True), SubmoduleDropout(0.5, False)
    drawn = by_example.keep(now, "lora", x.device)
    assert drawn.shape == (3, 1, 1)
    assert len(drawn.unique()) == 2
    assert by_example.keep(now, "lora", x.device) is drawn, "one draw a pass"
    assert torch.equal(by_example.keep_for(now, "lora", x), drawn)
    flat = by_example.keep_for(now, "lora", x.flatten(0, 1))
    assert torch.equal(flat, drawn.expand(3, 4, 1).flatten(0, 1))
    whole = by_batch.keep_for(now, "prefix", x)
    assert whole.shape == (1, 1, 1)
    assert torch.equal(by_batch.keep_for(now, "prefix", x.flatten(0, 1)), whole[0])


def test_without_it_nothing_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> Any:
        raise AssertionError("a number was drawn")

    plain = unipelt.inject(tiny_bert(), small())
    dropped = unipelt.inject(tiny_bert(), small(**HALF))
    monkeypatch.setattr(torch, "rand", refuse)
    train_logits(plain, tiny_batch())
    logits(dropped, tiny_batch())
    with pytest.raises(AssertionError, match="a number was drawn"):
        train_logits(dropped, tiny_batch())


@pytest.mark.parametrize(
    ("family", "by", "gates", "reentrant"),
    [
        ("bert", "example", True, False),
        ("bert", "batch", False, True),
        ("llama", "batch", True, True),
        ("llama", "example", False, False),
        ("t5", "example", True, False),
    ],
)
def test_a_checkpointed_pass_drops_the_same_again(family: str, by: str, gates: bool, reentrant: bool) -> None:
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model: Any = unipelt.inject(tiny_model(family), method(family, gates=gates, by=by)).train()
        shake(model)
        if checkpointed:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": reentrant})
        torch.manual_seed(7)
        model(**batch_of(family)).logits.square().mean().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1].get(name, torch.zeros_like(grad)), grad)


def test_a_submodule_that_is_left_out_gets_no_gradient(keep: Callable[[Rule], None]) -> None:
    for gating in ({}, {"gating": "mass"}):
        model = unipelt.inject(tiny_bert(), small(gate={"dropout": 0.5}, prefix=gating)).train()
        shake(model)
        keep(lambda kind, row: float(kind == "lora"))
        model(**tiny_batch()).logits.square().mean().backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "unipelt" in name:
                assert parameter.grad is not None
                assert parameter.grad.isfinite().all(), name
                if ".adapter." in name or "prefix_network" in name:
                    assert not parameter.grad.any(), name
                elif name.endswith("lora_query.B"):
                    assert parameter.grad.any(), name


def test_the_replicas_of_a_pack_draw_for_themselves() -> None:
    model = unipelt.inject(tiny_bert(), small(**HALF))
    shake(model)
    pack = Pack(model, tokens=9)
    for _ in range(4):
        pack.add(kept_values(model))
    batch = {name: torch.stack([tensor] * 4) for name, tensor in tiny_batch().items()}
    with torch.no_grad():
        for row in pack(batch):
            assert_near(row, logits(model))
        pack.model.train()
        torch.manual_seed(0)
        drawn = pack(batch)
    assert len({tuple(row.flatten().tolist()) for row in drawn}) == 4


@pytest.mark.slow
def test_is_traced_as_one_graph() -> None:
    """Without a compiler, so that the draws of PyTorch's own generator stay the same."""
    model = unipelt.inject(tiny_bert(), small(gate={"dropout": 0.5, "dropout_by": "example"})).train()
    shake(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    batch = tiny_batch()
    for seed in (1, 2):
        torch.manual_seed(seed)
        want = model(**batch).logits
        torch.manual_seed(seed)
        assert_near(compiled(**batch).logits, want)
    torch._dynamo.reset()


def test_a_saved_model_keeps_it(tmp_path: Any) -> None:
    model = unipelt.inject(tiny_bert(), small(**HALF))
    shake(model)
    unipelt.save(model, tmp_path)
    back = unipelt.load(tiny_bert(), tmp_path)
    assert torch.equal(logits(back), logits(model))
    for one in (model, back):
        torch.manual_seed(3)
        assert not torch.equal(train_logits(one, tiny_batch()), logits(one))
    torch.manual_seed(3)
    first = train_logits(model, tiny_batch())
    torch.manual_seed(3)
    assert torch.equal(train_logits(back, tiny_batch()), first)
