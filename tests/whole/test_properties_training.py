"""What holds for every family, method, size and text of a model that is trained, saved, folded and taken apart."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gates.test_fold import hold
from helpers import assert_near, assert_same, shake, what_is_there
from hosts.test_families import first, logits
from hypothesis import assume
from hypothesis import strategies as st
from inside import gradients_of_parts
from pack.test_pack import alone
from scripts.properties_parallel import ROWS, write
from strategies import Case, Texts, batch, cases, gradients, holds, loss_of, texts
from tiny import ENCODERS
from torch import Tensor
from transformers.utils import logging

import unipelt
from unipelt.injection.parameters import kept_names
from unipelt.injection.state import injection_of
from unipelt.pack import Pack, PackError, kept_values
from unipelt.submodules.gate import Gates
from unipelt.submodules.lora import LoRA
from unipelt.submodules.prefix import PrefixNetwork
from unipelt.submodules.room import own_parameters

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
READ = ("right", "none")
"""Where padding is not in the place that a head reads."""
FILES = ("model.safetensors", "unipelt.json", "README.md")
PACKED = [name for name in ENCODERS if name not in ("deberta", "deberta-v2", "modernbert")]


def own_names(case: Case, model: Any) -> tuple[set[str], set[str], set[str]]:
    """Names of parameters: of the method; of the head; of the rest. Found by what models without them have."""
    pretrained = {name for name, _ in case.bare().named_parameters()}
    base = {name for name, _ in replace(case, head="Model", as_decoder=False).bare().named_parameters()}
    prefix = f"{model.base_model_prefix}."
    is_task = bool(case.head) or not case.causal
    head = {name for name in pretrained if is_task and not {name, name.removeprefix(prefix)} & base}
    return {name for name, _ in model.named_parameters()} - pretrained, head, pretrained - head


def declared(case: Case, model: Any) -> set[str]:
    """Names of the parameters that the configuration says train."""
    ours, head, base = own_names(case, model)
    method = case.method
    biases = {name for name in head | base if name.endswith("bias")} if method.bitfit else set()
    ours = {name for name in ours if not name.endswith((".A0", ".B0"))}  # what LoRA started at
    return ours | biases | (head if method.train_head else set()) | (base if method.train_base else set())


def steps(case: Case, model: Any, inputs: dict[str, Tensor], count: int = 2) -> None:
    """Train, with dropout and weight decay, by an optimizer that is given every parameter there is."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(count):
        optimizer.zero_grad()
        loss_of(model, case, inputs).backward()
        optimizer.step()
    model.eval()


def assert_gradients_near(got: dict[str, Tensor | None], want: dict[str, Tensor | None]) -> None:
    """Equal, up to a little of each and less of the largest: that of a key's bias is nothing but rounding."""
    assert {name for name, one in got.items() if one is not None} == {n for n, one in want.items() if one is not None}
    largest = max(one.abs().max().item() for one in want.values() if one is not None)
    for name, one in want.items():
        other = got.get(name)
        if one is not None and other is not None:
            near = 1e-5 * one.abs().max().item() + 1e-6 * max(1.0, largest)
            assert torch.allclose(other, one, atol=near, rtol=1e-4), name


# Training


@holds(20, cases(heads=True, decoders_too=True, least=0), texts(READ))
def test_gradients_reach_just_what_is_declared(case: Case, described: Texts) -> None:
    bare = case.bare()
    inputs = batch(bare, case, described)
    used = {name for name, gradient in gradients(bare, case, inputs).items() if gradient is not None}
    model = case.build()
    want, (ours, head, _) = declared(case, model), own_names(case, model)
    assert bool(ours) == case.method.has_submodules
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == want
    counts = unipelt.parameter_counts(model)
    assert counts.trained + counts.head == sum(model.get_parameter(name).numel() for name in want)
    found = gradients(model, case, inputs)
    reached = {name for name, gradient in found.items() if gradient is not None}
    assert reached == want & (ours | used)
    reft: Any = case.method.part("reft")
    # after the last layer, no head need read the first tokens: a decoder's reads the last one, and a prompt is cut off
    unseen = reft is not None and reft.positions == "ends"
    may_be_zero = (".adapter.", *(["reft_layer"] if unseen else []))
    for name in want & (ours | head):
        gradient = found[name]
        assert gradient is not None
        assert gradient.isfinite().all(), name
        # all units of a narrow bottleneck may be dead
        assert gradient.any() or any(part in name for part in may_be_zero), name
    for name, gradient in gradients_of_parts(model).items():
        started_at = name.endswith((".A0", ".B0"))
        assert (gradient is None) == started_at, name
        assert gradient is None or gradient.any() or any(part in name for part in may_be_zero), name


@holds(10, cases(heads=True, decoders_too=True, least=0), texts(READ))
def test_what_is_frozen_stays_bit_for_bit(case: Case, described: Texts) -> None:
    model = case.build(dropout=0.1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    want, (ours, head, _) = declared(case, model), own_names(case, model)
    steps(case, model, batch(model, case, described))
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved <= want
    assert want & (ours | head) <= moved
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


@holds(20, cases(heads=True, decoders_too=True), texts(), st.booleans())
def test_gradient_checkpointing_changes_no_gradient(case: Case, described: Texts, reentrant: bool) -> None:
    model = case.build(dropout=0.1).train()
    assume(model.supports_gradient_checkpointing)
    # a bare base of this one cannot be trained so either: every layer is given the same relative embeddings
    trains = case.method.train_base or case.method.bitfit
    assume(not (case.family == "deberta-v2" and reentrant and trains))
    inputs = batch(model, case, described)
    want = gradients(model, case, inputs)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    assert_gradients_near(gradients(model, case, inputs), want)


# There and back


@holds(
    20,
    cases(heads=True, decoders_too=True, least=0),
    texts(rows=(2, 3)),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.sampled_from(("", "trained", "saved", "folded")),
    st.integers(0, 99),
)
def test_remove_gives_the_base_again(
    case: Case, described: Texts, dtype: torch.dtype, training: bool, what: str, seed: int
) -> None:
    """Bitwise: values, modules, hooks, configuration, modes, and what trained."""
    base = case.bare().to(dtype)
    generator = torch.Generator().manual_seed(seed)
    for parameter in base.parameters():
        parameter.requires_grad_(bool(torch.rand((), generator=generator) < 0.5))
    inputs = batch(base, case, described)
    want = logits(base, inputs)  # a first pass may leave something behind in the model
    base.train(training)
    before, modules = what_is_there(base), list(base.modules())
    parameters = dict(base.named_parameters())
    hooks = [{**module._forward_hooks, **module._forward_pre_hooks} for module in modules]
    model = unipelt.inject(base, case.method)
    assert model is base
    assert before["tensors"].keys() <= model.state_dict().keys()
    shake(model)
    if what == "trained":
        steps(case, model, inputs)
        model.train(training)
    elif what == "saved":
        with tempfile.TemporaryDirectory() as folder:
            unipelt.save(model, folder, deploy=seed % 2 == 0)
    elif what == "folded" and can_fold(model):
        unipelt.fold(model, [inputs], tolerance=1.0, closed=0.5)
        model.train(training)
    unipelt.remove(model)
    assert list(base.modules()) == modules
    assert all(parameter is parameters[name] for name, parameter in base.named_parameters())
    assert [{**module._forward_hooks, **module._forward_pre_hooks} for module in modules] == hooks
    assert_same(what_is_there(base), before)
    assert torch.equal(logits(base.eval(), inputs).nan_to_num(), want.nan_to_num())


def can_fold(model: Any) -> bool:
    gate = injection_of(model).config.gate
    if (gate.shared or gate.activation != "sigmoid") and any(isinstance(module, Gates) for module in model.modules()):
        return False
    return any(isinstance(module, (Gates, LoRA, PrefixNetwork)) for module in model.modules())


@holds(
    30,
    cases(heads=True, decoders_too=True, least=0),
    texts(rows=(2, 3)),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.sampled_from((None, 0.0, 0.02, 0.1, 1.0)),
    st.sampled_from((0.0, 0.45, 0.5)),
)
def test_what_is_saved_comes_back(
    case: Case, described: Texts, dtype: torch.dtype, deploy: bool, tolerance: float | None, closed: float
) -> None:
    """Bitwise, in every precision, deployed or not, folded or not; and the loaded model saves the same bytes."""
    model = unipelt.inject(case.bare().to(dtype), case.method)
    shake(model, case.seed + 1)
    inputs = batch(model, case, described)
    before = logits(model, inputs)
    finite = bool(before.isfinite().all())  # some bases are not in float64, where a padded query sees nothing
    if tolerance is not None and can_fold(model) and finite:
        unipelt.fold(model, [inputs], tolerance=tolerance, closed=closed)
    with tempfile.TemporaryDirectory() as name:
        one, two = Path(name) / "one", Path(name) / "two"
        unipelt.save(model, one, deploy=deploy)
        base = case.bare().to(dtype)
        pretrained = what_is_there(base)
        loaded = unipelt.load(base, one)
        unipelt.save(loaded, two, deploy=deploy)
        for file in FILES[:2] if deploy else FILES:  # a card counts what trains, which is another prefix from now on
            assert (one / file).read_bytes() == (two / file).read_bytes(), file
    want = logits(model, inputs)
    if injection_of(model).folded is None:
        assert torch.equal(want.nan_to_num(), before.nan_to_num())
    assert torch.equal(logits(loaded, inputs).nan_to_num(), want.nan_to_num())
    if not deploy:
        assert_same({"tensors": loaded.state_dict()}, {"tensors": model.state_dict()})
        assert unipelt.parameter_counts(loaded) == unipelt.parameter_counts(model)
        trains = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
        assert trains == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    else:
        assert unipelt.parameter_counts(loaded).deployed == unipelt.parameter_counts(model).deployed
    unipelt.remove(loaded)
    loaded.train(pretrained["training"][0])
    assert_same(what_is_there(loaded), pretrained)


@holds(10, cases(heads=True), st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.booleans())
def test_a_checkpoint_in_another_precision_is_rounded_once(
    case: Case, dtype: torch.dtype, other: torch.dtype, deploy: bool
) -> None:
    model = unipelt.inject(case.bare().to(dtype), case.method)
    shake(model)
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # that the base cannot be checked is said in a test of its own
    try:
        with tempfile.TemporaryDirectory() as name:
            unipelt.save(model, name, deploy=deploy)
            exact = unipelt.load(case.bare().to(dtype), name)
            rounded = unipelt.load(case.bare().to(other), name)
    finally:
        logging.set_verbosity(level)
    wide = torch.promote_types(other, torch.float32) if case.method.dtype == "float32" else other
    ours, head = own_parameters(rounded), own_names(case, model)[1]
    trains = {name.rpartition(".")[0] for name in head if rounded.get_parameter(name).requires_grad}
    for name in kept_names(exact):
        parameter = rounded.get_parameter(name)
        widened = name in ours or (name in head and name.rpartition(".")[0] in trains)
        assert parameter.dtype == (wide if widened else other), name
        assert torch.equal(parameter, exact.get_parameter(name).to(parameter.dtype)), name


@holds(20, cases(gated=[True, True, False], heads=True, decoders_too=True), texts(rows=(2, 3)), st.data())
def test_folding_constant_gates_changes_nothing(case: Case, described: Texts, data: st.DataObject) -> None:
    model = case.build()
    assume(can_fold(model))
    inputs = batch(model, case, described)
    names = sorted({name for module in model.modules() if isinstance(module, Gates) for name in module.names})
    values = {name: data.draw(st.sampled_from((0.2, 0.5, 0.9)), label=name) for name in names}
    hold(model, lambda name: values[name])
    want = logits(model, inputs)
    report = unipelt.fold(model, [inputs], tolerance=1e-5, closed=0.0)
    assert_near(logits(model, inputs), want, 4e-5)
    # a term that serves relative positions too keeps its gate
    kept = {gate.name for gate in report.gates if gate.outcome == "kept"}
    terms = {f"{part.name}_{place}" for part in case.method.more for place in part.places}
    if case.method.lora is not None and case.method.lora.decomposed:
        terms |= {f"lora_{place}" for place in case.method.lora.projections}
    kept = {name for name in kept if name.rpartition(".")[2] not in terms}  # those are never folded
    assert kept <= ({"lora_query", "lora_key"} if case.family == "deberta-v2" else set())


# Several at once


def gradient_in(pack: Pack, index: int, name: str) -> Tensor:
    grads = [parameter.grad for parameter in pack.replicas[index].parameters if parameter.grad is not None]
    return pack.places[name].of(torch.cat(grads))


@holds(10, cases(PACKED, pooling=["masked_mean"]), texts(["right"], rows=(1, 3)), st.integers(1, 3))
def test_packed_models_are_what_each_is_by_itself(case: Case, described: Texts, count: int) -> None:
    model = case.build(moved=False)
    inputs = [batch(model, case, replace(described, seed=described.seed + index)) for index in range(count)]
    try:
        pack = Pack(model, tokens=inputs[0]["input_ids"].shape[1])
    except PackError:  # the oldest Transformers' MPNet takes no mask that is ready-made
        assume(case.family != "mpnet" and case.method.prompt is None)
        raise
    begun = []
    for index in range(count):
        other = copy.deepcopy(model)
        shake(other, index + 1)
        begun.append(kept_values(other))
        pack.add(begun[-1])
    packed = pack({name: torch.stack([one[name] for one in inputs]) for name in inputs[0]})
    weights = torch.randn(packed.shape, generator=torch.Generator().manual_seed(0))
    pack.backward((packed * weights).flatten(1).sum(dim=1))
    for index, values in enumerate(begun):
        single = alone(model, values)
        out = first(single, inputs[index])
        assert_near(packed[index], out)
        (out * weights[index]).sum().backward()
        trained = {name: p.grad for name, p in single.named_parameters() if p.requires_grad}
        assert_gradients_near(
            {name: gradient_in(pack, index, name) for name in trained if trained[name] is not None}, trained
        )


@pytest.mark.slow
@holds(
    4,
    st.lists(
        st.tuples(
            cases(heads=True, decoders_too=True, base_trains=False),
            st.lists(texts(rows=(ROWS, ROWS)), min_size=2, max_size=2),
        ),
        min_size=8,
        max_size=8,
    ),
    shrink=False,
)
def test_two_processes_make_the_step_of_one(jobs: list[tuple[Case, list[Texts]]]) -> None:
    """By DistributedDataParallel, each with half of the joint batch."""
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([str(tests), str(tests.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "jobs.json").write_text(json.dumps([write(*job) for job in jobs]), encoding="utf-8")
        process = subprocess.run(
            [sys.executable, str(tests / "scripts" / "properties_parallel.py"), name],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
            check=False,
        )
        files = sorted(folder.glob("results-*.json"))
        assert len(files) == 2, process.stdout
        for results in (json.loads(file.read_text(encoding="utf-8")) for file in files):
            for job, found in zip(jobs, results, strict=True):
                assert found == {"other": [], "other in the second process": []}, (job, found)
