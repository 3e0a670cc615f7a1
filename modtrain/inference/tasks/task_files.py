"""A user's file of texts or questions as examples of a task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modtrain.common.errors import DataError
from modtrain.common.reading import UnreadableError, read_bytes, read_records

SUFFIXES = (".jsonl", ".txt")
# Answers that so few different ones are given are choices.
_MAX_CHOICES = 10
_MAX_TEXT_BYTES = 1 << 28
_Record = dict[str, Any]
# Of natural-language inference, in the order of the numbers that data sets have for them.
_LABELS = ("entailment", "neutral", "contradiction")
# The words that a language model is asked for in their place (arXiv 2005.14165, appendix G).
_VERDICTS = ("True", "Neither", "False")


@dataclass(frozen=True)
class Examples:
    """What a task asks.

    kind: ``text``: texts to predict, under ``text``; ``choice``: each has a ``prompt``, ``choices``
    and the number of the right one, ``target``; ``answer``: each has a ``prompt`` and ``answers``,
    any of which is right.
    """

    kind: str
    documents: list[_Record]


def is_task_file(name: str) -> bool:
    """Whether the name of a task is that of a file."""
    return name.lower().endswith(SUFFIXES)


def read_examples(path: Path) -> Examples:
    """Return the examples of a text file, or of a file of JSON lines in one of `FORMATS`.

    Raises:
        DataError: the file cannot be read, or has something else in it.
    """
    try:
        if path.suffix.lower() == ".txt":
            text = read_bytes(path, _MAX_TEXT_BYTES).decode()
            if not text.strip():
                raise DataError(f"{path}: has no text")
            return Examples("text", [{"text": text}])
        records, damaged = read_records(path, bool)
    except UnreadableError as error:
        raise DataError(f"{path}: {error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text, at byte {error.start}") from None
    if damaged:
        raise DataError(f"{path}, line {damaged[0]}: is no JSON object")
    if not records:
        raise DataError(f"{path}: has no examples")
    return _examples(path, records)


def _examples(path: Path, records: list[_Record]) -> Examples:
    for form in FORMATS:
        if form.keys <= records[0].keys():
            break
    else:
        known = "; ".join(", ".join(sorted(form.keys)) for form in FORMATS)
        raise DataError(
            f"{path}: its first line has the keys {', '.join(sorted(records[0]))}\n"
            f"remedy: give every line the keys of one kind: {known}"
        )
    documents = []
    for number, record in enumerate(records, start=1):
        try:
            documents.append(form.convert(record))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise DataError(f"{path}, line {number}: {form.needs} ({error!r:.100})") from None
    if form.kind == "answer" and (choices := _few_answers(documents)):
        documents = [
            {
                "prompt": document["prompt"],
                "choices": choices,
                "target": choices.index(document["answers"][0]),
            }
            for document in documents
        ]
        return Examples("choice", documents)
    return Examples(form.kind, documents)


def _few_answers(documents: Sequence[_Record]) -> list[str]:
    """Return the answers of the file if they are few, and each question has one; else none."""
    answers = {answer for document in documents for answer in document["answers"]}
    is_choice = 1 < len(answers) <= _MAX_CHOICES and len(answers) < len(documents)
    has_one = all(len(document["answers"]) == 1 for document in documents)
    return sorted(answers) if is_choice and has_one else []


def _text(record: _Record) -> _Record:
    return {"text": _string(record["text"])}


def _question(record: _Record) -> _Record:
    choices, target = record["choices"], record["answer"]
    if isinstance(target, str):
        target = choices.index(target)
    return _choice(_asked(record), choices, target)


def _lettered_question(record: _Record) -> _Record:
    labels = record["choices"]["label"]
    return _choice(_asked(record), record["choices"]["text"], labels.index(record["answerKey"]))


def _asked(record: _Record) -> str:
    passage = f"{_string(record['passage'])}\n" if record.get("passage") else ""
    return f"{passage}Question: {_string(record['question'])}\nAnswer:"


def _pair(record: _Record) -> _Record:
    return _inference(record["premise"], record["hypothesis"], record["label"])


def _sentences(record: _Record) -> _Record:
    return _inference(record["sentence1"], record["sentence2"], record["gold_label"])


def _inference(premise: object, hypothesis: object, label: object) -> _Record:
    target = _LABELS.index(label) if isinstance(label, str) else label
    asked = f"{_string(hypothesis)} True, False, or Neither?"
    return _choice(f"{_string(premise)}\nQuestion: {asked}\nAnswer:", _VERDICTS, target)


def _choice(prompt: str, choices: Sequence[object], target: object) -> _Record:
    texts = [_string(choice) for choice in choices]
    if type(target) is not int or not 0 <= target < len(texts) or len(texts) < 2:
        raise ValueError(f"{target!r} is none of {len(texts)} choices")
    return {"prompt": prompt, "choices": texts, "target": target}


def _answer(record: _Record) -> _Record:
    return _free(_string(record["prompt"]), record["answer"])


def _messages(record: _Record) -> _Record:
    messages = record["input"]
    is_text = isinstance(messages, str)
    parts = [messages] if is_text else [message["content"] for message in messages]
    prompt = "\n".join(_string(part) for part in parts)
    return _free(f"{prompt}\nAnswer:", record["ideal"])


def _free(prompt: str, answer: object) -> _Record:
    answers = answer if isinstance(answer, list) else [answer]
    if not answers:
        raise ValueError("no answer")
    return {"prompt": prompt, "answers": [_string(text) for text in answers]}


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.50} is no text")
    return value


@dataclass(frozen=True)
class Format:
    """A form of a line: its keys, what examples it makes, and what it needs, for errors."""

    keys: frozenset[str]
    kind: str
    convert: Callable[[_Record], _Record]
    needs: str


FORMATS = (
    Format(
        frozenset({"question", "choices", "answerKey"}),
        "choice",
        _lettered_question,
        "choices needs the lists text and label, and answerKey is one of the labels",
    ),
    Format(
        frozenset({"question", "choices", "answer"}),
        "choice",
        _question,
        "choices is a list of texts, and answer one of them, or its number from 0",
    ),
    Format(
        frozenset({"premise", "hypothesis", "label"}),
        "choice",
        _pair,
        f"label is one of {', '.join(_LABELS)}, or its number from 0",
    ),
    Format(
        frozenset({"sentence1", "sentence2", "gold_label"}),
        "choice",
        _sentences,
        f"gold_label is one of {', '.join(_LABELS)}",
    ),
    Format(
        frozenset({"input", "ideal"}),
        "answer",
        _messages,
        "input is a text or a list of messages with content, and ideal a text or a list of them",
    ),
    Format(
        frozenset({"prompt", "answer"}),
        "answer",
        _answer,
        "prompt is a text, and answer a text or a list of them",
    ),
    Format(frozenset({"text"}), "text", _text, "text is a text"),
)
"""Multiple choice, natural-language inference, questions with answers, and texts to predict."""
