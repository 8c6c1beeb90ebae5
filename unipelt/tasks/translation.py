"""A run on texts and their translations, or on other pairs of texts: `examples/run_translation.py`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.utils import logging

from unipelt.api import inject
from unipelt.files.atomic import named_write
from unipelt.runs.cache import SharedCache
from unipelt.runs.device import find_device
from unipelt.runs.errors import RunError
from unipelt.runs.folder import check_folder
from unipelt.runs.joint_trainer import JointTrainer
from unipelt.runs.pretrained import load_model, load_tokenizer, weights_sha256
from unipelt.runs.run import Outcome, TaskJob, scored_by
from unipelt.runs.sampling import few_shot_rows, fixed_rows
from unipelt.runs.settings import SettingsError, locate_model
from unipelt.runs.tables import DataError, read_lines
from unipelt.runs.trainer_arguments import training_arguments
from unipelt.tasks.settings import TranslationSettings

_MULTI30K = {"train": "multi30k/train", "dev": "multi30k/val", "test": "multi30k/test_2016_flickr"}
_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
_HEAD = 32
"""Width of an attention head in a model that starts at random."""

Pair = tuple[str, str]


class TranslationTrainer(JointTrainer, Seq2SeqTrainer):  # type: ignore[misc]
    """Trainer whose processes train and translate together."""

    repeats_losses = True


@dataclass
class TranslationJob(TaskJob):
    """A loaded run on translations.

    Attributes:
        pairs: the pairs of each split, `train`, `dev` and `test`.
        rows: the token ids of these pairs, by split.
    """

    settings: TranslationSettings
    pairs: dict[str, list[Pair]]
    rows: dict[str, Dataset]

    metrics: ClassVar[tuple[str, ...]] = ("bleu",)

    def arguments(self, folder: Path) -> Seq2SeqTrainingArguments:
        """Return Trainer's arguments for a run in that folder."""
        settings = self.settings
        return training_arguments(
            self,
            folder,
            Seq2SeqTrainingArguments,
            per_device_eval_batch_size=settings.eval_batch_size,
            predict_with_generate=True,
            generation_max_length=settings.max_target_length,
            generation_num_beams=settings.beams,
        )

    def make_trainer(self, folder: Path, callbacks: list[TrainerCallback]) -> Trainer:
        """Return the trainer, which evaluates by translating the dev set."""
        return TranslationTrainer(
            model=self.model,
            args=self.arguments(folder),
            # a bound method, because Trainer saves the tokenizer of a collator with every checkpoint
            data_collator=DataCollatorForSeq2Seq(self.tokenizer, self.model).__call__,
            train_dataset=self.rows["train"],
            eval_dataset=self.rows["dev"],
            compute_metrics=self._scorer("dev"),
            callbacks=callbacks,
        )

    def test(self, trainer: Trainer) -> Outcome:
        """Test the model with its present weights. The file has one translation per line, in the order of the data."""
        with scored_by(trainer, self._scorer("test")):
            output = trainer.predict(self.rows["test"])
        translations = self.decode(output.predictions)
        score, signature = bleu(translations, [target for _, target in self.pairs["test"]])
        lines = "".join(f"{' '.join(translation.split())}\n" for translation in translations)
        shown = [
            f"    {pair[0]}\n -> {text}" for pair, text in zip(self.pairs["test"][:3], translations[:3], strict=True)
        ]
        return Outcome(
            loss=(output.metrics or {})["test_loss"],
            metrics={"bleu": score},
            files={f"test.{self.settings.target}": lines.encode()},
            notes={"sacrebleu": {"score": 100 * score, "signature": signature}},
            lines=(f"BLEU {100 * score:.2f} ({signature})", *shown),
        )

    def decode(self, ids: Any) -> list[str]:
        """Return the texts of generated token ids (N, T). Ids below 0 are padding."""
        ids = np.where(np.asarray(ids) < 0, self.tokenizer.pad_token_id, ids)
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [text.strip() for text in texts]

    @property
    def base(self) -> str:
        """The name of the base model, or `random` and the kind of the model."""
        return self.settings.model if self.settings.random == "no" else f"random {self.settings.random}"

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the trained weights, and return the description of the base for the record.

        A model that started at random is written as a whole, as an ordinary model with its tokenizer.
        """
        if self.settings.random == "no":
            return super().save(folder)
        whole = AutoModelForSeq2SeqLM.from_config(self.model.config)
        whole.load_state_dict(self.model.state_dict())
        bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            with named_write(folder):
                whole.save_pretrained(folder)
                self.tokenizer.save_pretrained(folder)
        finally:
            if bars:
                logging.enable_progress_bar()
        return {"fingerprint": {}, "config": json.loads(self.model.config.to_json_string(use_diff=True))}

    def _scorer(self, split: str) -> Callable[[EvalPrediction], dict[str, float]]:
        references = [target for _, target in self.pairs[split]]

        def score(output: EvalPrediction) -> dict[str, float]:
            return {"bleu": bleu(self.decode(output.predictions), references)[0]}

        return score


def prepare(settings: TranslationSettings) -> TranslationJob:
    """Load and check everything that a run needs.

    Raises:
        ValueError, OSError: the run cannot start. One sentence gives the reason.
    """
    device = find_device(settings.device)
    check_folder(Path(str(settings.output_dir)))
    bleu([""], [""])  # raises before training if sacrebleu is absent
    pairs, notes = load_pairs(settings)
    sha256 = None
    if settings.random != "no":
        tokenizer = make_tokenizer([text for pair in pairs["train"] for text in pair], settings.vocabulary)
        notes.append(f"the model starts at random, and its tokenizer ({len(tokenizer):,} pieces) is of the train data")
        set_seed(settings.seed)
        model = inject(make_model(settings, tokenizer), settings.config)
    else:
        kept, place = SharedCache(), locate_model(settings.model)
        config, tokenizer = load_tokenizer(settings, place, kept)
        if not config.is_encoder_decoder:
            raise RunError(
                f"{settings.model} is a {config.model_type} without encoder and decoder; translation needs both (BART, "
                "Marian, Pegasus, T5), or --random bart"
            )
        limit = getattr(config, "max_position_embeddings", None)
        if limit is not None and settings.max_target_length > limit:
            raise RunError(
                f"max_target_length is {settings.max_target_length}, and {settings.model} takes {limit} tokens; lower "
                "it"
            )
        sha256, _ = weights_sha256(settings, place, kept)
        model = load_model(settings, place, config, AutoModelForSeq2SeqLM)
    rows = {name: encode(part, tokenizer, settings) for name, part in pairs.items()}
    data = {name: describe_pairs(part) for name, part in pairs.items()}
    floor = bleu(*map(list, zip(*pairs["test"], strict=True)))[0], "source as it is"
    return TranslationJob(settings, model, tokenizer, data, notes, floor, device, sha256, pairs, rows)


def bleu(translations: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    """Compute corpus BLEU with one reference for each text, as a fraction, and its signature from sacrebleu.

    Raises:
        SettingsError: sacrebleu is not installed.
    """
    try:
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise SettingsError(
            "BLEU needs the package sacrebleu; install the extra 'translation' (pip install -e '.[translation]')"
        ) from error
    metric = BLEU()
    score = metric.corpus_score(list(translations), [list(references)]).score
    return score / 100, str(metric.get_signature())


def read_pairs(stem: str | Path, source: str, target: str) -> list[Pair]:
    """Read the lines of two files, `stem.source` and `stem.target`.

    Raises:
        DataError: a file is missing, empty or not UTF-8, the numbers of lines differ, or a line is blank.
    """
    paths = [Path(f"{stem}.{ending}") for ending in (source, target)]
    texts = [[(number, line.strip()) for number, line in read_lines(path)] for path in paths]
    for path, lines in zip(paths, texts, strict=True):
        if blank := [number for number, line in lines if not line]:
            raise DataError(f"{path}, line {blank[0]} is blank; a text needs its translation on the same line")
    if len(texts[0]) != len(texts[1]):
        raise DataError(
            f"{paths[0]} has {len(texts[0]):,} lines and {paths[1]} has {len(texts[1]):,}; each text needs its "
            "translation on the same line"
        )
    if not texts[0]:
        raise DataError(f"{paths[0]} is empty; get the file again")
    return [(one, other) for (_, one), (_, other) in zip(*texts, strict=True)]


def load_pairs(settings: TranslationSettings) -> tuple[dict[str, list[Pair]], list[str]]:
    """Read the pairs of `train`, `dev` and `test`. Return them with notes for a reader of the score.

    Raises:
        DataError: the files cannot be read, or have too few pairs.
        RunError: the settings of the data contradict each other.
    """
    files: dict[str, str | Path | None]
    if settings.task is not None:
        files = {name: settings.file_of(stem) for name, stem in _MULTI30K.items()}
        if settings.train_samples is not None:
            files["dev"] = None
    else:
        files = {"train": settings.train_file, "dev": settings.dev_file, "test": settings.test_file}
        if settings.train_samples is not None and settings.dev_file is not None and settings.test_file is not None:
            raise RunError(
                "with train_samples the dev set is cut from the train file, so dev_file and test_file would both be "
                "the test set; leave one out"
            )
    found = {
        name: read_pairs(file, settings.source, settings.target) for name, file in files.items() if file is not None
    }
    train, notes, skipped = found["train"], [], settings.skip_samples
    if settings.train_samples is not None:
        if skipped + settings.train_samples + settings.dev_samples > len(train):
            raise DataError(
                f"skip_samples {skipped:,} + train_samples {settings.train_samples:,} + dev_samples "
                f"{settings.dev_samples:,} are more than the {len(train):,} pairs of the train data; lower one"
            )
        test = found.get("test") or found["dev"]
        taken = skipped + settings.train_samples
        rows, dev_rows = few_shot_rows(len(train), taken, settings.dev_samples, int(settings.data_seed or 0))
        dev = [train[row] for row in dev_rows]
        train = [train[row] for row in rows[skipped:]]
    else:
        if skipped >= len(train):
            raise DataError(f"skip_samples is {skipped:,}, and the train data have {len(train):,} pairs; lower it")
        order = np.random.default_rng(settings.data_seed).permutation(len(train))
        train = [train[row] for row in order[skipped:]]
        dev = found["dev"]
        if "test" in found:
            test, dev = found["test"], _some(dev, settings.dev_samples)
        else:
            test = dev
            notes.append("dev = test: the checkpoint was chosen on the data that it is tested on")
    if settings.test_samples is not None and test is dev:
        raise RunError("test_samples is given, and the test set is the dev set here; leave it out")
    if settings.test_samples is not None and settings.test_samples < len(test):
        notes.append(f"tested on {settings.test_samples:,} of {len(test):,} pairs, the same in every run")
        test = _some(test, settings.test_samples)
    if skipped:
        notes.append(f"the first {skipped:,} pairs of the shuffled train data are left out")
    return {"train": train, "dev": dev, "test": test}, notes


def _some(pairs: list[Pair], count: int) -> list[Pair]:
    return [pairs[row] for row in fixed_rows(len(pairs), count)]


def describe_pairs(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Return the number of rows and a SHA-256 of all pairs."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(json.dumps(pair).encode() + b"\n")
    return {"rows": len(pairs), "sha256": digest.hexdigest()}


def encode(pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, settings: TranslationSettings) -> Dataset:
    """Return the token ids of texts and translations, cut at the lengths of the settings, without padding."""
    before = settings.source_prefix or ""
    texts = tokenizer(
        [before + source for source, _ in pairs],
        truncation=True,
        max_length=settings.max_length,
        return_token_type_ids=False,
    )
    labels = tokenizer(
        text_target=[target for _, target in pairs], truncation=True, max_length=settings.max_target_length
    )
    columns = {"input_ids": texts["input_ids"], "attention_mask": texts["attention_mask"]}
    return Dataset.from_dict({**columns, "labels": labels["input_ids"]})


def make_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerBase:
    """Train a tokenizer (BPE) on these texts. The same texts give the same tokenizer.

    Args:
        texts: texts in all languages of the tokenizer.
        vocabulary: the largest number of pieces, including special tokens and single characters.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=list(_SPECIAL), show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), _SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=10**9, **names)


def make_model(settings: TranslationSettings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Make a small model with random weights from the present state of PyTorch's generator."""
    width, layers, heads = settings.random_width, settings.random_layers, settings.random_width // _HEAD
    common: dict[str, Any] = {
        "d_model": width,
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    own: dict[str, dict[str, Any]] = {
        "bart": {
            "encoder_layers": layers,
            "decoder_layers": layers,
            "encoder_attention_heads": heads,
            "decoder_attention_heads": heads,
            "encoder_ffn_dim": 4 * width,
            "decoder_ffn_dim": 4 * width,
            "max_position_embeddings": max(settings.max_length, settings.max_target_length),
            "decoder_start_token_id": tokenizer.eos_token_id,
            "forced_eos_token_id": tokenizer.eos_token_id,
            # BART's 0.02 is for width 1024; with 0.02, a narrow model gave the same sentence for every source
            "init_std": width**-0.5,
        },
        "t5": {
            "num_layers": layers,
            "num_heads": heads,
            "d_kv": _HEAD,
            "d_ff": 4 * width,
            "decoder_start_token_id": tokenizer.pad_token_id,
        },
    }
    config = AutoConfig.for_model(settings.random, **common, **own[settings.random])
    return AutoModelForSeq2SeqLM.from_config(config)
