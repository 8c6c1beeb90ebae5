"""Translation: pairs of lines, the tokenizer and the model that start from nothing, BLEU, and whole runs."""

from __future__ import annotations

import builtins
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import run_translation
import torch
from tiny_task import save_model
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import unipelt
from unipelt.runs.errors import RunError
from unipelt.runs.options import parse
from unipelt.runs.run import run
from unipelt.runs.settings import SettingsError
from unipelt.runs.tables import DataError
from unipelt.tasks.settings import TranslationSettings
from unipelt.tasks.translation import bleu, load_pairs, make_tokenizer, prepare, read_pairs

ENGLISH = ("cat", "dog", "bird", "fish", "sees", "hears", "red", "green", "old", "young")
GERMAN = ("Katze", "Hund", "Vogel", "Fisch", "sieht", "hört", "rote", "grüne", "alte", "junge")


def write_pairs(stem: Path, count: int, seed: int) -> Path:
    """Sentences of four words, of which the first tells the others, and the same in the other language."""
    chance = random.Random(seed)
    starts = [chance.randrange(len(ENGLISH)) for _ in range(count)]
    rows = [[(start + place) % len(ENGLISH) for place in range(4)] for start in starts]
    for ending, words in (("en", ENGLISH), ("de", GERMAN)):
        text = "".join(f"{' '.join(words[index] for index in row)}\n" for row in rows)
        stem.with_name(f"{stem.name}.{ending}").write_text(text, encoding="utf-8")
    return stem


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("translation")
    for name, count in (("train", 60), ("dev", 12), ("test", 14)):
        write_pairs(folder / name, count, seed=count)
    save_model(folder / "bart", "bart")
    save_model(folder / "bert")
    return folder


@pytest.fixture(autouse=True)
def _no_folder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "tasks_dir" not in request.fixturenames:
        monkeypatch.delenv("UNIPELT_TASKS_DIR", raising=False)


def values(home: Path, **changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        **{f"{name}_file": str(home / name) for name in ("train", "dev", "test")},
        "epochs": 2,
        "batch_size": 16,
        "eval_batch_size": 5,
        "learning_rate": 1e-2,
        "max_length": 16,
        "max_target_length": 16,
        "threads": 1,
        "device": "cpu",
        "output_dir": str(home / "out"),
    }
    return {**given, **changes}


def from_nothing(home: Path, **changes: Any) -> TranslationSettings:
    small = {"random": "bart", "method": "fine-tuning", "random_width": 32, "random_layers": 1, "vocabulary": 100}
    return TranslationSettings(**values(home, **{**small, **changes}))


def silent(line: str) -> None:
    pass


# Data


def test_lines_are_pairs(home: Path) -> None:
    pairs = read_pairs(home / "train", "en", "de")
    assert len(pairs) == 60
    for source, target in pairs:
        assert [GERMAN[ENGLISH.index(word)] for word in source.split()] == target.split()
    assert [(one, other) for other, one in read_pairs(home / "train", "de", "en")] == pairs


@pytest.mark.parametrize(
    ("english", "german", "said"),
    [
        ("one\ntwo\n", "eins\n", r"x\.en has 2 lines and .*x\.de has 1; each text needs its translation"),
        ("one\n \ntwo\n", "eins\n\nzwei\n", r"x\.en, line 2 is blank"),
        ("", "", r"x\.en is empty"),
        ("one\n", None, r"x\.de does not exist"),
        ("one\n", "gr\udcfcn\n", r"x\.de, line 1: byte 0xfc at position 3 is not UTF-8"),
    ],
)
def test_files_that_are_no_pairs(english: str, german: str | None, said: str, tmp_path: Path) -> None:
    (tmp_path / "x.en").write_text(english, encoding="utf-8")
    if german is not None:
        (tmp_path / "x.de").write_bytes(german.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=said):
        read_pairs(tmp_path / "x", "en", "de")


def test_samples_are_drawn_as_in_glue(home: Path, tmp_path: Path) -> None:
    """The first K of the shuffled data train, the next are the dev set, and those skipped are in neither."""
    for ending in ("en", "de"):
        text = "".join(f"{ending} {number}\n" for number in range(60))
        (tmp_path / f"x.{ending}").write_text(text, encoding="utf-8")
    base = values(home, train_file=str(tmp_path / "x"), dev_file=None, dev_samples=8)
    found, _ = load_pairs(TranslationSettings(**base, train_samples=20))
    more, _ = load_pairs(TranslationSettings(**base, train_samples=28))
    later, notes = load_pairs(TranslationSettings(**base, train_samples=20, skip_samples=28))
    other, _ = load_pairs(TranslationSettings(**base, train_samples=20, seed=2))
    assert (len(found["train"]), len(found["dev"]), len(found["test"])) == (20, 8, 14)
    assert more["train"] == found["train"] + found["dev"]
    assert later["train"][:8] == more["dev"]
    assert not set(later["train"]) & set(more["train"])
    assert "first 28 pairs" in notes[-1]
    assert other["train"] != found["train"]
    assert other["test"] == found["test"] == read_pairs(home / "test", "en", "de")
    with pytest.raises(DataError, match=r"skip_samples 40 .* train_samples 20 .* dev_samples 8 are more than the 60"):
        load_pairs(TranslationSettings(**base, train_samples=20, skip_samples=40))


def test_all_data(home: Path) -> None:
    found, notes = load_pairs(TranslationSettings(**values(home, dev_samples=5, test_samples=6, skip_samples=10)))
    assert (len(found["train"]), len(found["dev"]), len(found["test"])) == (50, 5, 6)
    assert notes[0].startswith("tested on 6 of 14 pairs")
    whole, notes = load_pairs(TranslationSettings(**values(home, test_samples=99)))
    assert (len(whole["dev"]), len(whole["test"]), notes) == (12, 14, []), "there are no more"
    same, notes = load_pairs(TranslationSettings(**values(home, test_file=None)))
    assert same["dev"] is same["test"]
    assert "dev = test" in notes[0]
    with pytest.raises(RunError, match="leave one out"):
        load_pairs(TranslationSettings(**values(home, train_samples=5)))


def test_the_known_task_is_english_to_german_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "multi30k").mkdir()
    for name, count in (("train", 20), ("val", 7), ("test_2016_flickr", 5)):
        write_pairs(tmp_path / "multi30k" / name, count, seed=count)
    known = TranslationSettings(task="multi30k", tasks_dir=str(tmp_path))
    found, notes = load_pairs(known)
    assert ({name: len(part) for name, part in found.items()}, notes) == ({"train": 20, "dev": 7, "test": 5}, [])
    assert found["test"] == read_pairs(tmp_path / "multi30k" / "test_2016_flickr", "en", "de")
    few, _ = load_pairs(replace(known, train_samples=12, dev_samples=3))
    assert {name: len(part) for name, part in few.items()} == {"train": 12, "dev": 3, "test": 5}


# From nothing


def test_the_same_texts_give_the_same_tokenizer() -> None:
    texts = [f"{one} {other}" for one in ENGLISH for other in GERMAN]
    first, second = make_tokenizer(texts, 90), make_tokenizer(texts, 90)
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    assert len(first) <= 90
    ids = first("grüne cat")["input_ids"]
    assert ids[-1] == first.eos_token_id
    assert first.decode(ids, skip_special_tokens=True) == "grüne cat"
    assert first.unk_token_id in first("ß")["input_ids"]
    special = (first.pad_token, first.bos_token, first.eos_token, first.unk_token)
    assert special == ("<pad>", "<s>", "</s>", "<unk>")
    assert first.convert_tokens_to_ids(list(special)) == [0, 1, 2, 3]
    assert len(first(" ".join(texts * 9), truncation=True)["input_ids"]) > 1000, "it has no length of its own"


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_a_model_that_starts_at_random_trains_as_a_whole_and_is_the_same_for_the_same_seed(
    kind: str, home: Path
) -> None:
    job, again = (prepare(from_nothing(home, random=kind)) for _ in range(2))
    other = prepare(from_nothing(home, random=kind, seed=2))
    assert job.model.config.model_type == kind
    assert all(parameter.requires_grad for parameter in job.model.parameters())
    first, second, third = (dict(found.model.named_parameters()) for found in (job, again, other))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], third[name]) for name in first)
    assert job.digest == again.digest != other.digest


# BLEU


def test_bleu_worked_by_hand() -> None:
    """Of 5 words 4 are right, of 4 pairs 3, of 3 triples 2, of 2 fours 1; as long as the reference."""
    found, signature = bleu(["a b c d e"], ["a b c d f"])
    assert found == pytest.approx(math.exp(sum(map(math.log, (4 / 5, 3 / 4, 2 / 3, 1 / 2))) / 4))
    assert signature.startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    short = bleu(["a b c d"], ["a b c d e f"])[0]
    assert short == pytest.approx(math.exp(1 - 6 / 4)), "all is right, and too short"
    assert bleu(["a b c d", "e f g h"], ["a b c d", "e f g h"])[0] == pytest.approx(1)


def test_without_sacrebleu(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    load = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name.startswith("sacrebleu"):
            raise ImportError(name)
        return load(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SettingsError, match="install the extra 'translation'"):
        prepare(from_nothing(home))


# Settings


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train_file": None, "dev_file": None, "test_file": None}, "name a task .--task multi30k"),
        ({"target": "en"}, "source and target are both 'en'"),
        ({"source": ""}, "source is empty"),
        ({"dev_file": None}, "give a dev_file"),
        ({"dev_file": None, "test_file": None, "train_samples": 3}, "give a test_file"),
        ({"random": "gpt2"}, "random must be no or bart or t5, not 'gpt2'"),
        ({"random": "bart"}, "must train as a whole: add --method fine-tuning"),
        ({"random": "bart", "method": "fine-tuning", "model": "x"}, "model and random exclude each other"),
        ({"random": "bart", "method": "fine-tuning", "model_sha256": "0" * 64}, "model_sha256 and random exclude"),
        ({"random": "t5", "method": "fine-tuning", "random_width": 40}, "must be a multiple of 32"),
        ({"max_target_length": 2}, "max_target_length must be 3 or more"),
        ({"beams": 0}, "beams must be 1 or more"),
        ({"skip_samples": -1}, "skip_samples must be 0 or more"),
    ],
)
def test_settings_that_cannot_be_meant(changes: dict[str, Any], said: str, home: Path) -> None:
    with pytest.raises(SettingsError, match=said):
        TranslationSettings(**values(home, **changes))


def test_models_that_do_not_fit(home: Path) -> None:
    with pytest.raises(RunError, match="is a bert without encoder and decoder"):
        prepare(TranslationSettings(**values(home, model=str(home / "bert"))))
    with pytest.raises(RunError, match=r"max_target_length is 65, and .* takes 64 tokens"):
        prepare(TranslationSettings(**values(home, model=str(home / "bart"), max_target_length=65)))


# Runs


def test_first_from_nothing_then_submodules_on_what_that_left(home: Path, tmp_path: Path) -> None:
    said: list[str] = []
    first = from_nothing(home, epochs=9, batch_size=6, output_dir=str(tmp_path / "first"))
    record = run(first, prepare, said.append)
    assert any("the model starts at random" in line for line in said)
    assert record["model"]["name"] == "random bart"
    assert any("at random" in note for note in record["task"]["notes"])
    assert record["model"]["config"]["d_model"] == 32
    assert "return_dict" not in record["model"]["config"], "the defaults of every configuration are left out"
    assert record["test"]["metrics"]["bleu"] > 0.5 > 0.05 > record["majority"]
    assert record["dev"]["metrics"]["bleu"] == max(item["metrics"]["bleu"] for item in record["evaluations"])
    assert record["sacrebleu"]["score"] == pytest.approx(100 * record["test"]["metrics"]["bleu"])
    assert record["sacrebleu"]["signature"].startswith("nrefs:1")
    assert record["parameters"]["trained"] == record["parameters"]["base"] > 0

    # what was left is an ordinary model, and it is the one that was tested
    folder = tmp_path / "first" / "model"
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    lines = (tmp_path / "first" / "predictions" / "test.de").read_text(encoding="utf-8").splitlines()
    pairs = read_pairs(home / "test", "en", "de")
    assert bleu(lines, [target for _, target in pairs])[0] == pytest.approx(record["test"]["metrics"]["bleu"])
    batch = tokenizer([source for source, _ in pairs], return_tensors="pt", padding=True, return_token_type_ids=False)
    texts = tokenizer.batch_decode(model.generate(**batch, max_length=16, num_beams=1), skip_special_tokens=True)
    assert [text.strip() for text in texts] == lines

    second = TranslationSettings(
        **values(home, model=str(folder), method="unipelt-apl", output_dir=str(tmp_path / "second"), beams=2)
    )
    record = run(second, prepare, silent)
    before = sum(parameter.numel() for parameter in model.parameters())
    assert record["parameters"]["base"] == before
    assert 0 < record["parameters"]["deployed"] < record["parameters"]["trained"]
    again = unipelt.from_pretrained(tmp_path / "second" / "model")
    job = prepare(second)
    job = replace(job, model=again)
    outcome = job.test(job.make_trainer(tmp_path / "again", []))
    assert outcome.metrics == record["test"]["metrics"]
    assert outcome.files["test.de"] == (tmp_path / "second" / "predictions" / "test.de").read_bytes()
    assert run(second, lambda _: pytest.fail("it was run again"), silent) == record


def test_a_prefix_stands_before_every_text(home: Path) -> None:
    chosen = TranslationSettings(**values(home, model=str(home / "bart"), method="lora"))
    plain, prefixed = prepare(chosen), prepare(replace(chosen, source_prefix="the cat "))
    tokens = plain.tokenizer("the cat", add_special_tokens=False)["input_ids"]
    for one, other in zip(plain.rows["test"], prefixed.rows["test"], strict=True):
        assert other["input_ids"] == [one["input_ids"][0], *tokens, *one["input_ids"][1:]]
        assert other["labels"] == one["labels"]


def test_options_of_trainer_and_rates_of_parts(home: Path, tmp_path: Path) -> None:
    """The train loss of two accumulated batches of 8 is of the size of that of one of 16, not twice it."""
    found = {}
    for batch, times in ((16, 1), (8, 2)):
        trainer = {"gradient_accumulation_steps": times, "warmup_steps": 2, "eval_steps": 3}
        changes: dict[str, Any] = {"batch_size": batch, "trainer": trainer, "output_dir": str(tmp_path / str(batch))}
        changes |= {"method": "unipelt-apl", "rates": {"lora": 1e-3, "head": 1e-3}, "model": str(home / "bart")}
        found[batch] = run(TranslationSettings(**values(home, **changes)), prepare, silent)
        assert [item["step"] for item in found[batch]["evaluations"]] in ([3, 6, 8], [3, 6])
        assert found[batch]["settings"]["trainer"] == trainer
    one, other = (found[batch]["evaluations"][0]["train_loss"] for batch in (16, 8))
    assert one == pytest.approx(other, rel=0.1), "dropout and the lengths of batches differ"


def test_after_a_test_the_trainer_scores_dev_again(home: Path, tmp_path: Path) -> None:
    job = prepare(from_nothing(home, output_dir=str(tmp_path / "run")))
    trainer = job.make_trainer(tmp_path / "run", [])
    before, dev = trainer.compute_metrics, trainer.evaluate()
    job.test(trainer)
    assert trainer.compute_metrics is before
    assert trainer.evaluate()["eval_bleu"] == dev["eval_bleu"]


def test_a_run_that_was_killed_goes_on(home: Path, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def die(line: str) -> None:
        if line.startswith("epoch   2"):
            raise Killed

    whole = run(from_nothing(home, output_dir=str(tmp_path / "whole"), epochs=3), prepare, silent)
    chosen = from_nothing(home, output_dir=str(tmp_path / "out"), epochs=3)
    with pytest.raises(Killed):
        run(chosen, prepare, die)
    record = run(chosen, prepare, silent)
    assert record["attempts"] == 2
    for part in ("evaluations", "best", "dev", "test"):
        assert record[part] == whole[part]


def test_the_script(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text("random: t5\nmethod: fine-tuning\nrandom_width: 32\n", encoding="utf-8")
    options = [f"--{name}={value}" for name, value in values(home, epochs=1, output_dir=tmp_path / "out").items()]
    assert parse([str(tmp_path / "a.yaml"), *options], TranslationSettings).random == "t5"
    assert run_translation.main([str(tmp_path / "a.yaml"), *options, "--random_layers", "1"]) == 0
    assert "(source as it is 0." in capsys.readouterr().out
    assert run_translation.main([str(tmp_path / "a.yaml"), *options, "--train_file", "no/such"]) == 2
    assert capsys.readouterr().err.startswith("run_translation.py: ")


def test_multi30k(tasks_dir: Path) -> None:
    settings = TranslationSettings(task="multi30k", tasks_dir=str(tasks_dir))
    found, _ = load_pairs(settings)
    assert {name: len(part) for name, part in found.items()} == {"train": 6000, "dev": 1000, "test": 1000}
    few, _ = load_pairs(replace(settings, train_samples=100, dev_samples=50))
    assert {name: len(part) for name, part in few.items()} == {"train": 100, "dev": 50, "test": 1000}
    assert bleu(*map(list, zip(*found["test"], strict=True)))[0] < 0.01, "German is not English"
