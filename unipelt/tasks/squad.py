"""Questions about texts in SQuAD's format: reading, windows of tokens, the best answers over windows, and scores.

The format is SQuAD 1.1 (Rajpurkar et al., 2016) or SQuAD 2.0 (2018). In SQuAD 2.0 a question may have no answer.

Shapes: W windows, T tokens of a window.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from unipelt.files.messages import show, show_path
from unipelt.files.strict import PlainError, read_plain
from unipelt.runs.tables import DataError


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        id: the id of the question in the file.
        text: the text of the question.
        context: the paragraph that the question is about.
        answers: the text of each right answer and its start in the context, in characters. There are none if the
            paragraph does not answer the question.
        article: the index of the paragraph's article in the file, counted from 0.
    """

    id: str
    text: str
    context: str
    answers: tuple[tuple[str, int], ...]
    article: int


@dataclass(frozen=True)
class Window:
    """A question with a piece of its context, as T tokens.

    Attributes:
        question: the index of the question.
        ids: the token ids, (T,).
        mask: the attention mask, (T,).
        kinds: the token type ids, (T,), or None if the tokenizer returns none.
        spans: for each token of the context, its start and end in the context in characters, (T,); None for other
            tokens.
        null: the index of the token that stands for "no answer".
        start: the index of the first answer's first token; `null` if the window does not hold the whole answer.
        end: the index of the first answer's last token; `null` if the window does not hold the whole answer.
    """

    question: int
    ids: list[int]
    mask: list[int]
    kinds: list[int] | None
    spans: list[tuple[int, int] | None]
    null: int
    start: int
    end: int


@dataclass(frozen=True)
class Answer:
    """An answer: its text, its logit (start plus end), and its probability among the kept answers."""

    text: str
    logit: float
    probability: float


def read_squad(path: str | Path) -> list[Question]:
    """Read a file in SQuAD's format.

    Raises:
        DataError: the file cannot be read or has another format, or an answer is not at its place in the context.
    """
    path = Path(path)
    try:
        values = read_plain(path)
    except (PlainError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{show_path(path)} cannot be read: {reason}") from error
    questions: list[Question] = []
    seen: set[str] = set()
    for number, article in enumerate(_part(values, "data", list, show_path(path))):
        where = f"{show_path(path)}: data[{number}]"
        for place, paragraph in enumerate(_part(article, "paragraphs", list, where)):
            at = f"{where}.paragraphs[{place}]"
            context = _part(paragraph, "context", str, at)
            for item in _part(paragraph, "qas", list, at):
                question = _read_question(item, context, number, at)
                if question.id in seen:
                    raise DataError(f"{show_path(path)}: two questions have the id {show(question.id)}")
                seen.add(question.id)
                questions.append(question)
    if not questions:
        raise DataError(f"{show_path(path)} holds no question")
    return questions


def _read_question(item: Any, context: str, article: int, at: str) -> Question:
    name = _part(item, "id", str, f"{at}.qas")
    where = f"{at}, question {show(name)}"
    impossible = item.get("is_impossible", False)
    answers = []
    for answer in [] if impossible else _part(item, "answers", list, where):
        text, start = _part(answer, "text", str, where), _part(answer, "answer_start", int, where)
        if not text or start < 0 or context[start : start + len(text)] != text:
            raise DataError(
                f"{where}: the answer {show(text)} is not at character {show(start)} of its context, where there is "
                f"{show(context[max(start, 0) : max(start, 0) + len(text)])}"
            )
        answers.append((text, start))
    if not impossible and not answers:
        raise DataError(f"{where} has no answer; if there is none, it must say is_impossible: true")
    return Question(name, _part(item, "question", str, where).strip(), context, tuple(answers), article)


def _part(values: Any, key: str, kind: type[Any], where: str) -> Any:
    value = values.get(key) if isinstance(values, Mapping) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DataError(f"{where} is not in SQuAD's format: it lacks {key!r}, or that is no {kind.__name__}")
    return value


def split_articles(questions: Sequence[Question], seed: int, *fractions: float) -> list[list[Question]]:
    """Cut questions by article, so that no paragraph is in two parts.

    Args:
        questions: the questions of one file.
        seed: the seed of the random order of the articles.
        fractions: the fraction of the articles for each part after the first. Each of these parts has at least one
            article, and the first part gets the rest.

    Returns:
        The questions of each part.

    Raises:
        DataError: there are fewer articles than parts.
    """
    articles = sorted({question.article for question in questions})
    counts = [max(1, round(fraction * len(articles))) for fraction in fractions]
    if sum(counts) >= len(articles):
        raise DataError(
            f"there are {len(articles)} articles, too few to be cut into {len(fractions) + 1} parts; give files for all"
        )
    drawn = np.random.default_rng(seed).permutation(articles).tolist()
    parts, start = [], 0
    for count in counts:
        parts.append(set(drawn[start : start + count]))
        start += count
    parts.insert(0, set(drawn[start:]))
    return [[question for question in questions if question.article in part] for part in parts]


def describe_questions(questions: Sequence[Question]) -> dict[str, Any]:
    """Return the numbers of rows, of articles and of questions without an answer, and a SHA-256 of all questions."""
    digest = hashlib.sha256()
    for question in questions:
        digest.update(json.dumps(asdict(question)).encode() + b"\n")
    return {
        "rows": len(questions),
        "articles": len({question.article for question in questions}),
        "unanswerable": sum(not question.answers for question in questions),
        "sha256": digest.hexdigest(),
    }


def make_windows(
    questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, max_length: int, stride: int
) -> list[Window]:
    """Cut each context into windows that overlap.

    Args:
        questions: the questions of a dataset split.
        tokenizer: a fast tokenizer.
        max_length: the largest number of tokens of a window, including the question and special tokens.
        stride: the number of tokens of the context that a window shares with the previous window.

    Returns:
        The windows, in the order of the questions.

    Raises:
        DataError: a question leaves no room for its context.
        ValueError: the tokenizer is slow, so it does not return the places of its tokens in the text.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} does not say where its tokens are in the text; use a fast one")
    room = max_length - tokenizer.num_special_tokens_to_add(pair=True) - stride
    lengths = [len(ids) for ids in tokenizer([q.text for q in questions], add_special_tokens=False)["input_ids"]]
    for question, length in zip(questions, lengths, strict=True):
        if length >= room:
            raise DataError(
                f"question {show(question.id)} is {length} tokens long, which leaves no room for its context; raise "
                f"max_length ({max_length}) or lower stride ({stride})"
            )
    tokenizer.padding_side = "right"
    found = tokenizer(
        [question.text for question in questions],
        [question.context for question in questions],
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_attention_mask=True,
    )
    windows = []
    for row, index in enumerate(found["overflow_to_sample_mapping"]):
        parts = zip(found["offset_mapping"][row], found.sequence_ids(row), strict=True)
        spans = [tuple(span) if part == 1 else None for span, part in parts]
        ids = found["input_ids"][row]
        null = ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0
        start, end = _tokens_of(questions[index], spans) or (null, null)
        kinds = found["token_type_ids"][row] if "token_type_ids" in found else None
        windows.append(Window(index, ids, found["attention_mask"][row], kinds, spans, null, start, end))
    return windows


def _tokens_of(question: Question, spans: Sequence[tuple[int, int] | None]) -> tuple[int, int] | None:
    """Return the first and the last token of the first answer, or None if this window does not hold all of it."""
    if not question.answers:
        return None
    text, first = question.answers[0]
    last = first + len(text)
    starts = [place for place, span in enumerate(spans) if span is not None and span[0] <= first < span[1]]
    ends = [place for place, span in enumerate(spans) if span is not None and span[0] < last <= span[1]]
    return (starts[0], ends[-1]) if starts and ends else None


def best_answers(
    questions: Sequence[Question],
    windows: Sequence[Window],
    starts: Sequence[np.ndarray],
    ends: Sequence[np.ndarray],
    *,
    n_best: int = 20,
    max_answer_length: int = 30,
    null_threshold: float | None = None,
) -> dict[str, list[Answer]]:
    """Return the best answers to every question over all of its windows, the best answer first.

    The logit of an answer is the start logit of its first token plus the end logit of its last token. "No answer" is
    the empty text. In each window, its logit is the start logit plus the end logit of the token `null`. The least of
    these counts, because a window without an answer says nothing about the other windows.

    Args:
        questions: the questions of a dataset split.
        windows: the windows of these questions.
        starts: the start logits of each window's tokens, (W, T) or wider.
        ends: the end logits of each window's tokens, (W, T) or wider.
        n_best: the number of starts and ends to consider in a window, and of answers to keep for a question.
        max_answer_length: the largest number of tokens of an answer.
        null_threshold: "no answer" is the best answer if its logit exceeds the logit of the best text by more than
            this. None means that every question has an answer, so "no answer" is kept only if there is no text.

    Returns:
        The answers of each question, by its id.
    """
    found: list[dict[str, float]] = [{} for _ in questions]
    nulls = [math.inf] * len(questions)
    for window, start, end in zip(windows, starts, ends, strict=True):
        context, texts = questions[window.question].context, found[window.question]
        nulls[window.question] = min(nulls[window.question], float(start[window.null] + end[window.null]))
        places = np.array([place for place, span in enumerate(window.spans) if span is not None])
        if not len(places):
            continue
        firsts, lasts = (places[np.argsort(-logits[places], kind="stable")[:n_best]] for logits in (start, end))
        for first in firsts.tolist():
            for last in lasts.tolist():
                one, other = window.spans[first], window.spans[last]
                if one is None or other is None or not first <= last < first + max_answer_length:
                    continue
                text, logit = context[one[0] : other[1]], float(start[first] + end[last])
                texts[text] = max(logit, texts.get(text, -math.inf))
    ranked = {}
    for question, texts, null in zip(questions, found, nulls, strict=True):
        kept = sorted(texts.items(), key=lambda item: -item[1])[:n_best]
        if null_threshold is not None or not kept:
            wins = not kept or (null_threshold is not None and null - kept[0][1] > null_threshold)
            kept.insert(0 if wins else len(kept), ("", null))
        ranked[question.id] = _with_probabilities(kept)
    return ranked


def _with_probabilities(kept: Sequence[tuple[str, float]]) -> list[Answer]:
    top = max(logit for _, logit in kept)
    shares = [math.exp(logit - top) for _, logit in kept]
    return [Answer(text, logit, share / sum(shares)) for (text, logit), share in zip(kept, shares, strict=True)]


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """Return SQuAD's normal form of a text: lower case, no ASCII punctuation, no English articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Iterable[str]) -> float:
    """Return 1 if the prediction equals one of the answers in normal form, else 0. "No answer" is the empty text."""
    return float(any(normalize(prediction) == normalize(answer) for answer in _answers(answers)))


def f1(prediction: str, answers: Iterable[str]) -> float:
    """Compute the largest F1 between the words of the prediction and of an answer, in normal form.

    "No answer" is the empty text.
    """
    return max(_f1(normalize(prediction).split(), normalize(answer).split()) for answer in _answers(answers))


def _answers(answers: Iterable[str]) -> list[str]:
    return list(answers) or [""]


def _f1(prediction: Sequence[str], answer: Sequence[str]) -> float:
    if not prediction or not answer:
        return float(prediction == answer)
    common = sum((Counter(prediction) & Counter(answer)).values())
    return 2 * common / (len(prediction) + len(answer))


def squad_score(questions: Sequence[Question], predictions: Mapping[str, str]) -> dict[str, float]:
    """Compute the mean exact match and the mean F1 over questions, as fractions.

    Args:
        questions: the questions, at least one.
        predictions: the predicted text for each question id; "" for "no answer".
    """
    pairs = [(predictions[question.id], [text for text, _ in question.answers]) for question in questions]
    return {
        "f1": float(np.mean([f1(*pair) for pair in pairs])),
        "exact_match": float(np.mean([exact_match(*pair) for pair in pairs])),
    }
