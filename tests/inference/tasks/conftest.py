"""Runs, and files with questions, that the tests of tasks share."""

import json

import pytest

QUESTIONS = [
    {"question": "Which is an animal?", "choices": ["the tree", "the river", "a cat"], "answer": 2},
    {"question": "Which one flows?", "choices": ["tree", "river"], "answer": "river"},
    # Longer than the models read: its beginning is cut off.
    {
        "passage": "the tree and the river " * 30,
        "question": "Which?",
        "choices": ["a", "b"],
        "answer": 1,
    },
]
PAIRS = [
    {"premise": "A man sleeps.", "hypothesis": "A man is awake.", "label": "contradiction"},
    {"premise": "A dog runs.", "hypothesis": "An animal moves.", "label": 0},
]
FREE = [
    {"prompt": f"the tree {number} ->", "answer": [f"river {number}", "a much longer answer"]}
    for number in range(4)
]


@pytest.fixture(scope="session")
def task_files(tmp_path_factory):
    """Files of every kind of task, by its name."""
    folder = tmp_path_factory.mktemp("files")
    kinds = {"questions": QUESTIONS, "pairs": PAIRS, "free": FREE}
    for name, records in kinds.items():
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines)
    (folder / "held.txt").write_text("The tree stands by the river. " * 40)
    return {path.stem: str(path) for path in folder.iterdir()}
