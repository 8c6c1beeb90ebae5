"""Submodules on a frozen base of quantised weights: what works is shown, what does not is refused by name.

The quantisers are bitsandbytes and torchao, as far as they are installed (the extra `quantised`), and one of ten lines
that is always there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import shake
from tiny import tiny_batch, tiny_model
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
)
from transformers.utils import logging

import unipelt
from unipelt.checkpoint.manifest import CheckpointError
from unipelt.gates.measure import FoldError
from unipelt.hosts.quantised import is_quantised

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64}
APART = ("classifier", "pooler", "score", "lm_head")


class Int8Linear(nn.Linear):
    """A projection whose weight is whole numbers and a scale a row."""

    scale: Tensor

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.to(input) * self.scale.to(input), self.bias)


def own(model: Any, apart: tuple[str, ...] = APART) -> Any:
    """Quantise every projection of a model but those apart."""
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or any(word in name for word in apart):
            continue
        scale = module.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        whole = (module.weight.detach() / scale).round().to(torch.int8)
        module.__class__ = Int8Linear
        module.weight = nn.Parameter(whole, requires_grad=False)
        module.register_buffer("scale", scale)
    return model


def own_way(auto: Any, folder: Path, **options: Any) -> Any:
    return own(auto.from_pretrained(folder, **options))


def bitsandbytes_config(bits: int) -> Any:
    pytest.importorskip("bitsandbytes", reason="the extra 'quantised' is not installed")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**{f"load_in_{bits}bit": True, "llm_int8_skip_modules": list(APART)})


def torchao_config() -> Any:
    pytest.importorskip("torchao", reason="the extra 'quantised' is not installed")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=list(APART))


def eight_bit(auto: Any, folder: Path, **options: Any) -> Any:
    return auto.from_pretrained(folder, quantization_config=bitsandbytes_config(8), device_map="cpu", **options)


def four_bit(auto: Any, folder: Path, **options: Any) -> Any:
    model = auto.from_pretrained(folder, quantization_config=bitsandbytes_config(4), device_map="cpu", **options)
    for module in model.modules():
        # on some CPUs it packs a weight otherwise for good when it is first evaluated, and cannot train it after that
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def torchao_way(auto: Any, folder: Path, **options: Any) -> Any:
    return auto.from_pretrained(folder, quantization_config=torchao_config(), device_map="cpu", **options)


def torchao_afterwards(auto: Any, folder: Path, **options: Any) -> Any:
    """A model that is loaded already, which takes Transformers' marks off its weights."""
    quantization = pytest.importorskip("torchao.quantization", reason="the extra 'quantised' is not installed")
    model = auto.from_pretrained(folder, **options)

    def wanted(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and not any(word in name for word in APART)

    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=wanted)
    return model


WAYS = [own_way, eight_bit, four_bit, torchao_way, torchao_afterwards]
FAMILIES = {"bert": AutoModelForSequenceClassification, "llama": AutoModelForCausalLM, "gpt2": AutoModelForCausalLM}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A plain model of each family."""
    made = {}
    for family in FAMILIES:
        made[family] = tmp_path_factory.mktemp(family)
        tiny_model(family, **SIZES).save_pretrained(made[family])
    return made


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Callable[..., Any]:
    found: Callable[..., Any] = request.param
    return found


def outputs(model: Any, family: str = "bert") -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(**tiny_batch(family)).logits
    return found


def added(model: Any, method: Any = "unipelt-apl") -> Any:
    unipelt.inject(model, method)
    shake(model)
    return model


def numbers(parameter: Tensor) -> list[Tensor]:
    """What a parameter is kept in."""
    if type(parameter) is not nn.Parameter and hasattr(parameter, "__tensor_flatten__"):
        return [getattr(parameter, name).clone() for name in parameter.__tensor_flatten__()[0]]
    return [parameter.detach().clone().as_subclass(Tensor)]


@pytest.mark.parametrize("family", FAMILIES)
def test_it_trains_and_the_base_does_not(way: Callable[..., Any], folders: dict[str, Path], family: str) -> None:
    model = way(FAMILIES[family], folders[family])
    before = outputs(model, family)
    unipelt.inject(model, "lora")
    assert torch.equal(outputs(model, family), before), "a low-rank term starts at zero"
    unipelt.remove(model)
    added(model)
    frozen = {name: numbers(p) for name, p in model.named_parameters() if not p.requires_grad}
    if family != "gpt2" or way in (eight_bit, four_bit):  # the others leave a Conv1D as it is
        assert any(is_quantised(model.get_parameter(name)) for name in frozen)
    assert all(p.is_floating_point() for p in model.parameters() if p.requires_grad)
    trains = {name: p for name, p in model.named_parameters() if p.requires_grad}
    start = outputs(model, family)
    optimizer = torch.optim.AdamW(trains.values(), lr=1e-2)
    model.train()
    model(**tiny_batch(family)).logits.float().pow(2).mean().backward()
    assert [name for name, p in trains.items() if p.grad is None or not p.grad.abs().sum()] == []
    assert [name for name in frozen if model.get_parameter(name).grad is not None] == []
    optimizer.step()
    assert not torch.allclose(outputs(model, family), start)
    for name, old in frozen.items():
        assert all(map(torch.equal, numbers(model.get_parameter(name)), old)), name
    unipelt.remove(model)
    assert torch.equal(outputs(model, family), before)


@pytest.mark.parametrize("shared", [False, True])
def test_further_submodules(way: Callable[..., Any], folders: dict[str, Path], tmp_path: Path, shared: bool) -> None:
    parts: dict[str, Any] = {"ia3": {}, "houlsby": {"bottleneck": 4}, "parallel": {"bottleneck": 4}}
    method = {"preset": "unipelt-apl", **parts, "compacter": {"bottleneck": 8}, "gate": {"shared": shared}}
    model = added(way(FAMILIES["bert"], folders["bert"]), method)
    trains = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trains} == {torch.float32}
    model(**tiny_batch("bert")).logits.pow(2).mean().backward()
    assert all(p.grad is not None for p in trains)
    unipelt.save(model, tmp_path)
    assert torch.equal(outputs(unipelt.load(way(FAMILIES["bert"], folders["bert"]), tmp_path)), outputs(model))


@pytest.mark.parametrize("deploy", [False, True])
def test_there_and_back(way: Callable[..., Any], folders: dict[str, Path], tmp_path: Path, deploy: bool) -> None:
    auto, folder = FAMILIES["bert"], folders["bert"]
    model = added(way(auto, folder))
    expected = outputs(model)
    unipelt.save(model, tmp_path, deploy=deploy)
    assert torch.equal(outputs(unipelt.load(way(auto, folder), tmp_path)), expected)
    other = way(auto, folder)
    with torch.no_grad():
        other.bert.embeddings.word_embeddings.weight.mul_(1.5)
    with pytest.raises(CheckpointError, match="its weights differ"):
        unipelt.load(other, tmp_path)


def test_onto_a_plain_base(
    way: Callable[..., Any], folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a base in another dtype: the numbers are near, and it is said that nothing could be checked."""
    model = added(way(FAMILIES["bert"], folders["bert"]))
    unipelt.save(model, tmp_path)
    said: list[str] = []
    monkeypatch.setattr(logging.get_logger("unipelt.checkpoint.base_model"), "warning", said.append)
    plain = unipelt.from_pretrained(tmp_path)
    assert not any(map(is_quantised, plain.parameters()))
    assert ["cannot be checked that it is the same base" in line for line in said] == [True]
    assert not hasattr(plain.config, "quantization_config"), "how it was quantised is for the caller to say"
    torch.testing.assert_close(outputs(plain), outputs(model), atol=0.1, rtol=0)


@pytest.mark.parametrize("make", [lambda: bitsandbytes_config(8), lambda: bitsandbytes_config(4), torchao_config])
def test_the_same_quantisation_again(make: Callable[[], Any], folders: dict[str, Path], tmp_path: Path) -> None:
    options = {"quantization_config": make(), "device_map": "cpu"}
    model = added(FAMILIES["bert"].from_pretrained(folders["bert"], **options))
    unipelt.save(model, tmp_path)
    again: Any = unipelt.from_pretrained(tmp_path, **options)
    assert any(map(is_quantised, again.parameters()))
    assert torch.equal(outputs(again), outputs(model))


def test_folding(way: Callable[..., Any], folders: dict[str, Path]) -> None:
    model = added(way(FAMILIES["bert"], folders["bert"]))
    before = outputs(model)
    batches = [tiny_batch("bert")]
    with pytest.raises(FoldError, match=r"query.weight: it is .*quantised.*; fold a model of plain weights"):
        unipelt.fold(model, batches, tolerance=1.0)
    assert torch.equal(outputs(model), before)
    unipelt.remove(model)
    added(model, "unipelt-ap")  # nothing is merged into a weight
    report = unipelt.fold(model, batches, tolerance=1.0)
    assert report.outcomes["constant"] == len(report.gates)


def test_a_head_that_is_quantised(folders: dict[str, Path]) -> None:
    model = own(BertForSequenceClassification.from_pretrained(folders["bert"]), apart=())
    before = outputs(model)
    for method in ("unipelt-apl", {"preset": "lora", "train_head": False}):
        with pytest.raises(unipelt.InjectionError, match=r"classifier.weight is quantised \(int8\), and it is .* head"):
            unipelt.inject(model, method)
    assert torch.equal(outputs(model), before)
    assert not hasattr(model, "unipelt_injection")


def test_methods_that_train_the_base(way: Callable[..., Any], folders: dict[str, Path]) -> None:
    model = way(FAMILIES["bert"], folders["bert"])
    with pytest.raises(unipelt.InjectionError, match=r"this method trains the base, and .* is quantised"):
        unipelt.inject(model, "fine-tuning")
    unipelt.inject(model, "bitfit")  # biases are not quantised
    assert unipelt.parameter_counts(model).submodules["bitfit"]


def test_a_pooler_that_started_at_random(tmp_path: Path) -> None:
    """Quantised after it was loaded, a model's weights have lost the marks of what came from its checkpoint."""
    tiny_model("bert", "MaskedLM", **SIZES).save_pretrained(tmp_path)  # which has no pooler
    model = own(BertForSequenceClassification.from_pretrained(tmp_path), apart=("classifier",))
    with pytest.raises(unipelt.InjectionError, match=r"pooler.dense.weight is quantised"):
        unipelt.inject(model, "lora")
    model = own(BertForSequenceClassification.from_pretrained(tmp_path))
    unipelt.inject(model, "lora")
    assert sorted(model.unipelt_injection.head) == [
        "bert.pooler.dense.bias",
        "bert.pooler.dense.weight",
        "classifier.bias",
        "classifier.weight",
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_submodules_are_in_what_the_model_computes_in(folders: dict[str, Path], dtype: torch.dtype) -> None:
    """Where the configuration asks for it; also where a layer has no weight left that says so."""
    method = {"preset": "unipelt-apl", "dtype": "base"}
    model = added(own_way(AutoModelForCausalLM, folders["llama"], dtype=dtype), method)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {dtype}
    assert outputs(model, "llama").dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_submodules_are_in_float32_otherwise(folders: dict[str, Path], dtype: torch.dtype) -> None:
    model = added(own_way(AutoModelForCausalLM, folders["llama"], dtype=dtype))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert outputs(model, "llama").dtype == dtype


def test_a_projection_that_is_no_linear(folders: dict[str, Path]) -> None:
    class Packed(nn.Module):
        """What quantisers that bring classes of their own put in the place of a Linear."""

    model: Any = BertForSequenceClassification.from_pretrained(folders["bert"])
    model.bert.encoder.layer[1].attention.self.query = Packed()
    with pytest.raises(unipelt.InjectionError, match="query is a Packed; submodules attach to a Linear or Conv1D"):
        unipelt.inject(model, "unipelt-apl")


def test_a_plain_model_keeps_its_fingerprint(folders: dict[str, Path]) -> None:
    assert not any(map(is_quantised, AutoModel.from_pretrained(folders["bert"]).parameters()))
    assert is_quantised(torch.zeros(2, dtype=torch.float8_e4m3fn))


@pytest.mark.parametrize("bits", [8, 4])
def test_trainer(folders: dict[str, Path], tmp_path: Path, bits: int) -> None:
    """Trainer refuses a model that is quantised throughout, and takes one with submodules."""
    model = (eight_bit if bits == 8 else four_bit)(FAMILIES["bert"], folders["bert"])
    batch = tiny_batch("bert")
    rows = [{name: value[row] for name, value in batch.items()} | {"labels": row % 2} for row in range(3)]
    options: dict[str, Any] = {"max_steps": 2, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    arguments = TrainingArguments(output_dir=str(tmp_path), save_strategy="no", **options)
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model=model, args=arguments, train_dataset=rows)
    added(model)
    before = outputs(model)
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert not torch.allclose(outputs(model), before)
    unipelt.remove(model)
    assert "_hf_peft_config_loaded" not in vars(model)
