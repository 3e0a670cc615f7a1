"""A user's files become examples, or errors that name the line."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from modtrain.common.errors import DataError
from modtrain.inference.tasks.task_files import FORMATS, read_examples


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


CHOICE = {"prompt": "Question: Which?\nAnswer:", "choices": ["a", "b"], "target": 1}


@pytest.mark.parametrize(
    ("record", "kind", "document"),
    [
        ({"question": "Which?", "choices": ["a", "b"], "answer": "b"}, "choice", CHOICE),
        ({"question": "Which?", "choices": ["a", "b"], "answer": 1}, "choice", CHOICE),
        (
            {
                "question": "Which?",
                "choices": {"text": ["a", "b"], "label": ["A", "B"]},
                "answerKey": "B",
            },
            "choice",
            CHOICE,
        ),
        (
            {"passage": "Once.", "question": "Which?", "choices": ["a", "b"], "answer": 1},
            "choice",
            CHOICE | {"prompt": "Once.\nQuestion: Which?\nAnswer:"},
        ),
        (
            {"sentence1": "It rains.", "sentence2": "It is dry.", "gold_label": "contradiction"},
            "choice",
            {
                "prompt": "It rains.\nQuestion: It is dry. True, False, or Neither?\nAnswer:",
                "choices": ["True", "Neither", "False"],
                "target": 2,
            },
        ),
        (
            {"input": [{"role": "user", "content": "Add"}, {"content": "1 1"}], "ideal": "2"},
            "answer",
            {"prompt": "Add\n1 1\nAnswer:", "answers": ["2"]},
        ),
        (
            {"prompt": "1 1", "answer": ["2", "two"]},
            "answer",
            {"prompt": "1 1", "answers": ["2", "two"]},
        ),
        ({"text": "Once."}, "text", {"text": "Once."}),
    ],
)
def test_every_kind_of_line(record, kind, document, tmp_path):
    examples = read_examples(write(tmp_path / "a.jsonl", record))
    assert (examples.kind, examples.documents) == (kind, [document])


def test_labels_have_the_numbers_of_data_sets(tmp_path):
    records = [
        {"premise": "A", "hypothesis": "B", "label": label}
        for label in ("entailment", 0, "neutral", 1, "contradiction", 2)
    ]
    documents = read_examples(write(tmp_path / "a.jsonl", *records)).documents
    verdicts = [document["choices"][document["target"]] for document in documents]
    assert verdicts == ["True", "True", "Neither", "Neither", "False", "False"]


def test_few_different_answers_are_choices(tmp_path):
    records = [
        {"input": f"Is {number} even?", "ideal": "no yes"[3 * (number % 2 == 0) :][:3].strip()}
        for number in range(5)
    ]
    examples = read_examples(write(tmp_path / "a.jsonl", *records))
    assert examples.kind == "choice"
    assert [document["target"] for document in examples.documents] == [1, 0, 1, 0, 1]
    assert examples.documents[0]["choices"] == ["no", "yes"]


@pytest.mark.parametrize(
    ("record", "needs"),
    [
        ({"question": "Which?", "choices": ["a", "b"], "answer": 2}, "is none of 2 choices"),
        ({"question": "Which?", "choices": ["a", "b"], "answer": -1}, "is none of 2 choices"),
        ({"question": "Which?", "choices": ["a", "b"], "answer": "c"}, "one of them"),
        ({"question": "Which?", "choices": ["a"], "answer": 0}, "is none of 1 choices"),
        ({"question": 7, "choices": ["a", "b"], "answer": 0}, "7 is no text"),
        ({"question": "Which?", "choices": ["a", "b"], "answerKey": "A"}, "text and label"),
        ({"premise": "A", "hypothesis": "B", "label": "maybe"}, "entailment, neutral"),
        ({"input": "1 1", "ideal": []}, "ideal a text"),
        ({"text": None}, "text is a text"),
    ],
)
def test_a_wrong_line_is_named(record, needs, tmp_path):
    first = next(form for form in FORMATS if form.keys <= record.keys())
    path = write(tmp_path / "a.jsonl", record)
    with pytest.raises(DataError, match=rf"a\.jsonl, line 1: .*{needs}") as raised:
        read_examples(path)
    assert first.needs in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", "", "has no examples"),
        ("a.jsonl", '{"text": "x"}\n{"te\n', "line 2: is no JSON object"),
        ("a.jsonl", '{"textt": "x"}\n', "its first line has the keys textt"),
        ("a.txt", " \n", "has no text"),
    ],
)
def test_what_is_no_task_file_is_refused(name, content, reason, tmp_path):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=reason):
        read_examples(path)


def test_a_missing_file_and_one_that_is_no_text_are_named(tmp_path):
    with pytest.raises(DataError, match=r"a\.txt is missing"):
        read_examples(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"a\.txt: is not UTF-8"):
        read_examples(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("name", "kind", "choices"),
    [
        ("theory_of_mind/socialiqa/test", "choice", ["A", "B", "C"]),
        ("test_comp_sci/questions", "choice", ["a", "b", "c", "d"]),
        ("corr2cause/corr2cause", "choice", None),
        ("coqa/samples", "answer", None),
    ],
)
def test_public_samples_are_read(name, kind, choices):
    """Question answering and natural-language inference of the package ``evals``."""
    spec = find_spec("evals")
    if spec is None:
        pytest.skip("needs the samples of the package evals: pip install --no-deps evals")
    path = Path(spec.submodule_search_locations[0], "registry/data", f"{name}.jsonl")
    examples = read_examples(path)
    assert examples.kind == kind
    assert len(examples.documents) == len(path.read_text().splitlines())
    if choices is not None:
        assert examples.documents[0]["choices"] == choices
