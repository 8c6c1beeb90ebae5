"""Tune a language model on instructions with TRL: `python examples/run_sft.py examples/sft/smollm2.yaml`.

The method is one of this package in PEFT's form. The data are lines of JSON with `prompt` and `completion`. The folder
that the program writes is read by `AutoPeftModelForCausalLM` and, after `unipelt.register_with_peft()`, by
`AutoModelForCausalLM`. The program prints the loss on held-out rows before and after, the tokens per second, the peak
memory and an answer, and writes them to `sft.json` in that folder.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from unipelt.config.presets import resolve
from unipelt.config.schema import ConfigError, read_mapping
from unipelt.files.arguments import OneLineParser
from unipelt.files.atomic import write_whole
from unipelt.files.messages import complain, show, show_path, suggest
from unipelt.runs.options import lay_over, read_option, split_dotted
from unipelt.runs.settings import SettingsError, TrainingSettings

HOME = Path(__file__).resolve().parent
DEFAULTS: dict[str, Any] = {
    "learning_rate": 1e-3,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "max_length": 256,
    "logging_steps": 10,
    "save_strategy": "no",
    "report_to": "none",
    "bf16": False,
}
"""Options of TRL's SFTConfig that differ from its defaults; a configuration and `--trainer.NAME` win over them."""


class Parser(OneLineParser):
    """A parser whose errors are those of settings."""

    problem = SettingsError


@dataclass(frozen=True)
class Settings:
    """The settings of a training; each has an option of its name."""

    model: str = field(default="", metadata={"help": "A folder, or a name on the hub."})
    method: Any = field(default="unipelt", metadata={"help": "A preset or the file of a method."})
    data: str = field(
        default=str(HOME / "sft" / "instructions.jsonl"),
        metadata={"help": "Lines of JSON with prompt and completion."},
    )
    held_out: int = field(default=8, metadata={"help": "Rows at the end of the data that do not train."})
    output_dir: str = field(default="runs/sft", metadata={"help": "The folder of the adapter."})
    seed: int = field(default=0, metadata={"help": "The seed of the training."})
    trainer: dict[str, Any] = field(default_factory=dict, metadata={"help": "Options of TRL's SFTConfig."})


def parse(argv: Sequence[str]) -> Settings:
    """Return the settings from a command line: a configuration first, then options, which win over it."""
    known = [item.name for item in fields(Settings)]
    parser = Parser(
        prog="run_sft.py", usage="%(prog)s [CONFIG] [--FIELD VALUE ...] [--trainer.NAME VALUE ...]", description=__doc__
    )
    parser.add_argument("config", nargs="?", help="A YAML or JSON file with some of these fields.")
    for item in fields(Settings):
        if item.name != "trainer":
            parser.add_argument(f"--{item.name}", type=type(item.default), help=item.metadata["help"])
    words, dotted = split_dotted(argv, ("method.", "trainer."))
    given = {name: value for name, value in vars(parser.parse_args(words)).items() if value is not None}
    values = {}
    if (config := given.pop("config", None)) is not None:
        values = read_mapping(Path(config))
        for name in values:
            if name not in known:
                raise ConfigError(f"{show_path(config)}: unknown field {show(name)}; {suggest(str(name), known)}")
    values = lay_over(
        values | given, {name: read_option(name, text, TrainingSettings) for name, text in dotted.items()}
    )
    settings = Settings(**values)
    check(settings)
    return settings


def check(settings: Settings) -> None:
    """Raise `ConfigError` for settings that cannot be meant."""
    if not settings.model:
        raise ConfigError("say which model to tune, --model FOLDER or a name on the hub")
    if not isinstance(settings.trainer, dict):
        raise ConfigError(f"trainer must be a mapping of options to values, not {show(settings.trainer)}")
    if type(settings.held_out) is not int or settings.held_out < 1:
        raise ConfigError(f"held_out must be a whole number above 0, not {show(settings.held_out)}")
    if Path(settings.output_dir).is_dir() and any(Path(settings.output_dir).iterdir()):
        raise ConfigError(f"the folder {show_path(settings.output_dir)} is not empty; name another output_dir")
    resolve(settings.method)


def read_rows(path: str, held_out: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return the rows that train and the rows that are held out, each with `prompt` and `completion`."""
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{show_path(path)}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{where} is not JSON: {error}") from error
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("prompt", "completion")):
            raise ConfigError(f"{where} needs the texts prompt and completion")
        rows.append({key: row[key] for key in ("prompt", "completion")})
    if len(rows) <= held_out:
        raise ConfigError(f"{show_path(path)} has {len(rows)} rows, of which {held_out} are held out; give more rows")
    return rows[:-held_out], rows[-held_out:]


def as_examples(rows: Sequence[dict[str, str]], chat: bool) -> Any:
    """Return a data set for TRL: conversations if the tokenizer has a template for them, else plain texts."""
    from datasets import Dataset

    if not chat:
        return Dataset.from_list([{**row, "prompt": f"{row['prompt']}\n"} for row in rows])
    roles = {"prompt": "user", "completion": "assistant"}
    return Dataset.from_list(
        [{key: [{"role": role, "content": row[key]}] for key, role in roles.items()} for row in rows]
    )


def answer(model: Any, tokenizer: Any, prompt: str, tokens: int = 40) -> str:
    """Return what the model writes for a prompt, without sampling."""
    import torch

    text = f"{prompt}\n"
    if tokenizer.chat_template:
        asked = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    batch = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template).to(model.device)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    options = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    with torch.no_grad():
        found = model.generate(input_ids=ids, attention_mask=mask, **options)
    return str(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def build(settings: Settings, train: Any, held_out: Any, tokenizer: Any) -> Any:
    """Return TRL's trainer."""
    import torch
    import trl
    from transformers import AutoModelForCausalLM

    import unipelt

    known = [item.name for item in fields(trl.SFTConfig)]
    for name in settings.trainer:
        if name not in known:
            raise ConfigError(f"unknown option {show(f'trainer.{name}')}; {suggest(str(name), known)}")
    options = {**DEFAULTS, "use_cpu": not torch.cuda.is_available(), **settings.trainer}
    arguments = trl.SFTConfig(output_dir=settings.output_dir, seed=settings.seed, **options)
    model = AutoModelForCausalLM.from_pretrained(
        settings.model, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    )
    torch.manual_seed(settings.seed)
    return trl.SFTTrainer(
        model,
        args=arguments,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=unipelt.PeftConfig(settings.method, task_type="CAUSAL_LM"),
    )


def train(settings: Settings) -> dict[str, Any]:
    """Train, write the folder, and return the record."""
    from transformers import AutoTokenizer

    from unipelt.runs.machine import describe_code, describe_hardware, describe_packages, peak_memory

    rows, kept = read_rows(settings.data, settings.held_out)
    tokenizer = AutoTokenizer.from_pretrained(settings.model, trust_remote_code=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    chat = bool(tokenizer.chat_template)
    trainer = build(settings, as_examples(rows, chat), as_examples(kept, chat), tokenizer)
    model, device = trainer.model, trainer.args.device.type
    before = trainer.evaluate()["eval_loss"]
    said = answer(model.eval(), tokenizer, kept[0]["prompt"])
    done = trainer.train().metrics
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model(settings.output_dir)
    tokens = max(entry.get("num_tokens", 0) for entry in trainer.state.log_history)
    record = {
        "settings": dataclasses.asdict(settings),
        "method": resolve(settings.method).to_dict(),
        "trained_parameters": sum(one.numel() for one in model.parameters() if one.requires_grad),
        "loss": {"before": before, "after": after},
        "steps": trainer.state.global_step,
        "tokens": int(tokens),
        "tokens_per_second": tokens / done["train_runtime"],
        "memory": peak_memory(device),
        "answer": {
            "prompt": kept[0]["prompt"],
            "before": said,
            "after": answer(model.eval(), tokenizer, kept[0]["prompt"]),
        },
        "code": describe_code(),
        "packages": describe_packages(),
        "hardware": describe_hardware(device),
    }
    write_whole(Path(settings.output_dir) / "sft.json", (json.dumps(record, indent=1) + "\n").encode())
    return record


def report(record: dict[str, Any]) -> str:
    """Return the figures of a record in a few lines."""
    memory = record["memory"]["cuda_bytes"] or record["memory"]["rss_bytes"] or 0
    return "\n".join(
        [
            f"trained parameters: {record['trained_parameters']:,}",
            f"loss on held-out rows: {record['loss']['before']:.3f} before, {record['loss']['after']:.3f} after",
            f"tokens per second: {record['tokens_per_second']:.1f}; peak memory: {memory / 2**20:.0f} MiB",
            f"{record['answer']['prompt']}",
            f"  before: {record['answer']['before']}",
            f"  after:  {record['answer']['after']}",
            f"the folder is {record['settings']['output_dir']}",
        ]
    )


def main(argv: Sequence[str]) -> int:
    """Run, and return the exit code: 0 done, 2 bad input."""
    try:
        settings = parse(argv)
        try:
            import peft  # noqa: F401
            import trl  # noqa: F401
        except ImportError as error:
            raise ConfigError(f"TRL or PEFT is not installed ({error}); pip install 'unipelt[trl]'") from error
        print(report(train(settings)))
    except (ConfigError, SettingsError, OSError) as error:
        complain("run_sft.py", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
