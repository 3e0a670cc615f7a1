"""Tasks that are made from a seed, whose answers are known, and text to train on them.

What is asked is held out: whether a question is for training or for evaluation depends on a hash of
its text, so no seed gives a question to both.

    python -m modtrain.inference.tasks.synthetic examples.jsonl --examples 20000 --seed 1
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from modtrain.common.atomic_io import write_text

_LETTERS = "abcdefghijklmnop"
_NUM_PAIRS = 4
_LARGEST = 20
# One question of so many is held out.
_HELD_OUT = 8
# Questions of a small kind, such as parities, end: no more are looked for after so many others.
_MAX_TRIES = 1000


@dataclass(frozen=True)
class Example:
    """A question, what follows it, and the answers to choose from; without any, it is free."""

    prompt: str
    answer: str
    choices: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The question with its answer, as it is trained on."""
        return f"{self.prompt} {self.answer}"


def _copy(draw: random.Random) -> Example:
    letters = " ".join(draw.choices(_LETTERS, k=draw.randint(3, 5)))
    return Example(f"copy: {letters} ->", letters)


def _lookup(draw: random.Random) -> Example:
    letters = draw.sample(_LETTERS, _NUM_PAIRS)
    digits = [str(digit) for digit in draw.sample(range(10), _NUM_PAIRS)]
    pairs = " ".join(f"{letter} {digit}" for letter, digit in zip(letters, digits, strict=True))
    asked = draw.randrange(_NUM_PAIRS)
    return Example(f"lookup: {pairs} , {letters[asked]} ->", digits[asked], tuple(digits))


def _addition(draw: random.Random) -> Example:
    first, second = draw.randrange(_LARGEST), draw.randrange(_LARGEST)
    total = first + second
    near = [total + step for step in range(-5, 6) if step and total + step >= 0]
    choices = [total, *draw.sample(near, 3)]
    draw.shuffle(choices)
    return Example(f"add: {first} + {second} ->", str(total), tuple(map(str, choices)))


def _parity(draw: random.Random) -> Example:
    bits = draw.choices((0, 1), k=draw.randint(4, 8))
    answer = "odd" if sum(bits) % 2 else "even"
    return Example(f"parity: {' '.join(map(str, bits))} ->", answer, ("even", "odd"))


KINDS: dict[str, Callable[[random.Random], Example]] = {
    "copy": _copy,
    "lookup": _lookup,
    "addition": _addition,
    "parity": _parity,
}


def is_held_out(prompt: str) -> bool:
    """Whether a question is for evaluation, never for training."""
    return hashlib.blake2b(prompt.encode(), digest_size=8).digest()[0] % _HELD_OUT == 0


def examples(kind: str, count: int, seed: int, *, held_out: bool) -> list[Example]:
    """Return up to ``count`` examples of a kind, each question once.

    held_out: those to evaluate with; False: those to train on. Fewer where the kind has no more.
    """
    draw = random.Random(f"{kind} {seed} {held_out}")  # noqa: S311  (no secret)
    by_prompt: dict[str, Example] = {}
    tries = 0
    while len(by_prompt) < count and tries < _MAX_TRIES:
        example = KINDS[kind](draw)
        if is_held_out(example.prompt) == held_out and example.prompt not in by_prompt:
            by_prompt[example.prompt] = example
            tries = 0
        else:
            tries += 1
    return list(by_prompt.values())


def training_texts(kinds: Sequence[str], count: int, seed: int) -> Iterator[str]:
    """Yield ``count`` texts, the kinds in turn; a kind that has no more begins anew."""
    made = [examples(kind, -(-count // len(kinds)), seed, held_out=False) for kind in kinds]
    for number in range(count):
        of_kind = made[number % len(kinds)]
        yield of_kind[number // len(kinds) % len(of_kind)].text


def write_training_texts(arguments: Sequence[str] | None = None) -> None:
    """Write a file of JSON lines with a ``text`` each, which `modtrain prepare` reads."""
    parser = argparse.ArgumentParser(
        prog="python -m modtrain.inference.tasks.synthetic",
        description="Write text to train on the tasks that modtrain makes.",
    )
    parser.add_argument("output", type=Path, help="the .jsonl file to write")
    parser.add_argument("--tasks", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--examples", type=int, default=20_000, help="texts to write")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    if options.examples < 1:
        parser.error(f"--examples {options.examples}: write 1 or more")
    texts = training_texts(options.tasks, options.examples, options.seed)
    write_text(options.output, "".join(json.dumps({"text": text}) + "\n" for text in texts))


if __name__ == "__main__":
    write_training_texts()
