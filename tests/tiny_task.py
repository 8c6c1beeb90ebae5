"""A tiny pretrained model in a folder and a tiny task in files: what whole runs need, made by hand in a second."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_config
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from transformers import AutoModel, BertConfig, BertModel, PreTrainedTokenizerFast

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
GOOD = ("good", "fine", "lovely", "bright")
BAD = ("bad", "dull", "awful", "grey")
PLAIN = ("the", "a", "cat", "dog", "sat", "ran", "on", "mat", "and", "then", "was", "is")
WORDS = (*SPECIAL, *GOOD, *BAD, *PLAIN)


SMALL_BERT = BertConfig(
    vocab_size=len(WORDS),
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=32,
    initializer_range=0.3,  # at this width the usual one lets nothing through
)


def save_model(folder: Path, family: str = "bert") -> Path:
    """A random model without a head, and a tokenizer of whole words (of GPT-2, one without a padding token)."""
    torch.manual_seed(0)
    if family == "bert":
        BertModel(SMALL_BERT).save_pretrained(folder)
    else:
        ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 3}
        if family == "gpt2":
            del ids["pad_token_id"]
        AutoModel.from_config(tiny_config(family, vocab_size=len(WORDS), **ids)).save_pretrained(folder)
    tokenizer = Tokenizer(WordPiece({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    marks = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    marks["eos_token"] = "[SEP]"
    if family == "gpt2":
        del marks["pad_token"]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **marks).save_pretrained(folder)
    return folder


def sentences(count: int, seed: int) -> list[tuple[str, int]]:
    """Sentences of different lengths, of plain words and of good ones or bad ones."""
    chance = random.Random(seed)
    rows = []
    for index in range(count):
        label = index % 2
        words = chance.choices(GOOD if label else BAD, k=chance.randint(1, 6))
        words += chance.choices(PLAIN, k=chance.randint(0, 4))
        chance.shuffle(words)
        rows.append((" ".join(words), label))
    chance.shuffle(rows)
    return rows


def write_sentences(path: Path, count: int, seed: int) -> Path:
    """A TSV file in the layout of SST-2."""
    text = "".join(f"{sentence}\t{label}\n" for sentence, label in sentences(count, seed))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"sentence\tlabel\n{text}", encoding="utf-8")
    return path


def write_glue(folder: Path, rows: int = 60) -> Path:
    """RTE, SST-2, MRPC, STS-B and CoLA in the tidy layout, with test splits."""
    pair = ("sentence1", "sentence2")
    tasks: dict[str, tuple[tuple[str, ...], tuple[str, str]]] = {
        "RTE": (pair, ("entailment", "not_entailment")),
        "MRPC": (pair, ("0", "1")),
        "STS-B": (pair, ("0.5", "4.25")),
        "SST-2": (("sentence",), ("0", "1")),
        "CoLA": (("sentence",), ("0", "1")),
    }
    for name, (columns, labels) in tasks.items():
        for split, count, seed in (("train", rows, 1), ("dev", 20, 2), ("test", 15, 3)):
            first, second = sentences(count, seed), sentences(count, seed + 10)
            header = [*columns, *(["label"] if split != "test" else [])]
            lines = ["\t".join(header)]
            for (text, label), (other, _) in zip(first, second, strict=True):
                cells = [text, other][: len(columns)]
                lines.append("\t".join([*cells, *([labels[label]] if split != "test" else [])]))
            path = folder / name / f"{split}.tsv"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def quick(folder: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a run of seconds on `folder/model`, `folder/train.tsv` and `folder/dev.tsv`."""
    return {
        "model": str(folder / "model"),
        "train_file": str(folder / "train.tsv"),
        "dev_file": str(folder / "dev.tsv"),
        "train_samples": 48,
        "dev_samples": 24,
        "epochs": 2,
        "batch_size": 12,
        "learning_rate": 1e-2,
        "max_length": 16,
        "threads": 1,
        "device": "cpu",
        "output_dir": str(folder / "out"),
        **changes,
    }


def make_quick(folder: Path, *, dropout: bool = True) -> Path:
    """The model and the files that `quick` names. Without dropout a pack draws the numbers of single runs."""
    save_model(folder / "model")
    if not dropout:
        path = folder / "model" / "config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}))
    write_sentences(folder / "train.tsv", 120, seed=1)
    write_sentences(folder / "dev.tsv", 20, seed=2)
    return folder
