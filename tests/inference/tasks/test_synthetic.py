"""Tasks that modtrain makes: their answers are right, and no question is in both splits."""

import json

import pytest

from modtrain.inference.tasks.synthetic import (
    KINDS,
    examples,
    is_held_out,
    training_texts,
    write_training_texts,
)


def solve(kind, prompt):
    """The answer, worked out in another way than the task makes it."""
    asked = prompt.partition(": ")[2].removesuffix(" ->")
    if kind == "copy":
        return asked
    if kind == "addition":
        return str(sum(map(int, asked.split(" + "))))
    if kind == "parity":
        return "odd" if asked.count("1") % 2 else "even"
    pairs, _, letter = asked.partition(" , ")
    words = pairs.split()
    return words[words.index(letter) + 1]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_right(kind):
    for held_out in (True, False):
        made = examples(kind, 60, 3, held_out=held_out)
        assert len({example.prompt for example in made}) == len(made) >= 30
        for example in made:
            assert example.answer == solve(kind, example.prompt)
            assert is_held_out(example.prompt) == held_out
            if example.choices:
                assert example.choices.count(example.answer) == 1
                assert len(set(example.choices)) == len(example.choices)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_the_same_examples(kind):
    assert examples(kind, 20, 1, held_out=True) == examples(kind, 20, 1, held_out=True)
    assert examples(kind, 20, 1, held_out=True) != examples(kind, 20, 2, held_out=True)


def test_a_small_kind_ends():
    assert len(examples("parity", 10_000, 0, held_out=True)) < 100


def test_texts_to_train_on_have_no_held_out_question(tmp_path):
    path = tmp_path / "texts.jsonl"
    write_training_texts([str(path), "--examples", "200", "--tasks", "lookup", "parity"])
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    assert texts == list(training_texts(["lookup", "parity"], 200, 1))
    kinds = {text.partition(":")[0] for text in texts}
    assert (len(texts), kinds) == (200, {"lookup", "parity"})
    assert not any(is_held_out(f"{text.partition(' ->')[0]} ->") for text in texts)
    with pytest.raises(SystemExit):
        write_training_texts([str(path), "--examples", "0"])
