"""`unipelt.swap`: another checkpoint's numbers in the same parameters, without another compilation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import logits, refusing, small, tiny_batch, tiny_bert, trained

import unipelt
from unipelt import CheckpointError


class Counting:
    """A back-end of `torch.compile` that counts its calls and compiles nothing."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        return graph.forward


def checkpoint(folder: Path, seed: int, preset: str = "unipelt-apl", deploy: bool = False, **changes: Any) -> Any:
    """A saved model, in the form in which it is loaded."""
    model = unipelt.inject(tiny_bert(), small(preset, **changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    unipelt.save(model, folder, deploy=deploy)
    return unipelt.load(tiny_bert(), folder).eval()


@pytest.mark.parametrize("deploy", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_model_computes_as_the_other_and_is_not_compiled_again(tmp_path: Path, deploy: bool) -> None:
    torch._dynamo.reset()
    one, other = (checkpoint(tmp_path / str(seed), seed, deploy=deploy) for seed in (1, 2))
    want = [logits(one), logits(other)]
    assert (want[0] - want[1]).abs().max() > 1e-2
    backend = Counting()
    compiled = torch.compile(one, backend=backend)
    torch.testing.assert_close(logits(compiled), want[0], atol=1e-6, rtol=0)
    before, graphs = dict(one.named_parameters()), backend.graphs
    for seed in (2, 1, 2):
        assert unipelt.swap(one, tmp_path / str(seed)) is one
        torch.testing.assert_close(logits(compiled), want[seed - 1], atol=1e-6, rtol=0)
    assert graphs > 0
    assert backend.graphs == graphs, "it was compiled again"
    assert all(before[name] is parameter for name, parameter in one.named_parameters())
    assert torch.equal(logits(one), want[1])


def test_prefixes_beside_a_cache_are_those_of_the_new_numbers(tmp_path: Path) -> None:
    from tiny import tiny_batch as texts
    from tiny import tiny_model

    models: list[Any] = []
    for seed in (1, 2):
        model = trained(model=tiny_model("llama"))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(seed)
        unipelt.save(model, tmp_path / str(seed))
        models.append(model)
    batch = texts("llama", left=True)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 1}
    want = [model.generate(**batch, **options) for model in models]
    assert not torch.equal(*want)
    unipelt.swap(models[0], tmp_path / "2")
    assert torch.equal(models[0].generate(**batch, **options), want[1])


def test_a_folder_in_pefts_form_is_swapped_too(tmp_path: Path) -> None:
    """It holds no fingerprint of the base, so there is none to compare."""
    one, other = trained("lora"), trained("lora", model=tiny_bert(seed=5))
    unipelt.save(other, tmp_path, peft=True)
    unipelt.swap(one, tmp_path)
    assert torch.equal(one.classifier.weight, other.classifier.weight)


def test_another_method_form_or_base_is_refused(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "one", 1)
    checkpoint(tmp_path / "lora", 1, "lora")
    checkpoint(tmp_path / "deployed", 1, deploy=True)
    checkpoint(tmp_path / "rank", 1, lora={"rank": 4})
    base: Any = trained(model=tiny_bert(seed=5))
    unipelt.save(base, tmp_path / "base")
    unipelt.save(trained(model=tiny_bert(num_labels=3)), tmp_path / "labels")
    folded = trained("unipelt-apl", gate={"pooling": "static"})
    unipelt.fold(folded, [tiny_batch()])
    unipelt.save(folded, tmp_path / "folded")
    for name, said in {
        "lora": "another method",
        "rank": "another method",
        "deployed": "is deployed, and this model is not deployed",
        "base": "its weights differ",
        "labels": "does not fit",
        "folded": "is folded",
    }.items():
        with refusing(model, said):
            unipelt.swap(model, tmp_path / name)
    with refusing(model, "is not a checkpoint", error=FileNotFoundError):
        unipelt.swap(model, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="carries no submodules"):
        unipelt.swap(tiny_bert(), tmp_path / "one")
    (tmp_path / "one" / "model.safetensors").write_bytes(b"x")
    with refusing(model):
        unipelt.swap(model, tmp_path / "one")
    assert issubclass(CheckpointError, ValueError)
    unipelt.swap(model, tmp_path / "base", compare_base=False)
    torch.testing.assert_close(model.classifier.weight, base.classifier.weight)
