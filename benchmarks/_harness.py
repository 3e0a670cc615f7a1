"""What the benchmarks share: interleaved timing, a table, and a result that a program can read."""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from modtrain.data.config import PrepareConfig, TokenizerConfig
from modtrain.data.prepare.pipeline import prepare

HEAD_WIDTH = 64
_WORDS = ("river", "stone", "sings", "under", "the", "old", "bridge")


def check_width(parser: argparse.ArgumentParser, d_model: int) -> None:
    """End with ``parser``'s error where ``d_model`` is not made of whole heads."""
    if d_model < HEAD_WIDTH or d_model % HEAD_WIDTH:
        parser.error(f"--d-model must be a multiple of {HEAD_WIDTH}, the width of a head")


def fix_threads(count: int) -> None:
    """Use ``count`` threads for the rest of the process."""
    torch.set_num_threads(count)


def interleave(
    calls: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Return the seconds of each call in each of ``rounds`` rounds.

    A call that returns a float has timed itself, such as a part of what it did.

    In a round every variant is called once, so that a slow moment of the machine meets all of them;
    every second round goes backwards, so that none is always first. ``warmup`` calls of each go
    before and are not counted.
    """
    for call in calls.values():
        for _ in range(warmup):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            for name in list(calls)[:: -1 if number % 2 else 1]:
                start = time.perf_counter()
                own = calls[name]()
                passed = time.perf_counter() - start
                seconds[name].append(own if isinstance(own, float) else passed)
    finally:
        gc.enable()
    return seconds


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median over the rounds of one variant's time over the other's in the same round."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def print_times(title: str, seconds: Mapping[str, Sequence[float]]) -> None:
    """Print median, least and greatest milliseconds of each variant."""
    print(title)
    width = max(len(name) for name in seconds)
    print(f"  {'':<{width}}{'median ms':>12}{'min':>10}{'max':>10}")
    for name, values in seconds.items():
        milliseconds = [1e3 * value for value in values]
        print(
            f"  {name:<{width}}{statistics.median(milliseconds):>12.1f}"
            f"{min(milliseconds):>10.1f}{max(milliseconds):>10.1f}"
        )


def finish(benchmark: str, results: Mapping[str, float], digits: int = 4) -> None:
    """Print the result as one JSON object; nothing may be printed after it."""
    rounded = {name: round(value, digits) for name, value in results.items()}
    print(json.dumps({"benchmark": benchmark} | rounded), flush=True)


def prepare_words(root: Path, seq_len: int) -> None:
    """Prepare ``root/data``: texts of a few words, a vocabulary of 300."""
    (root / "corpus").mkdir()
    for number in range(40):
        text = f"{number} " + " ".join(_WORDS[i * i % len(_WORDS)] for i in range(4 * seq_len))
        (root / "corpus" / f"{number}.txt").write_text(text)
    prepare(
        PrepareConfig(
            sources=[f"{root}/corpus/*.txt"],
            output=f"{root}/data",
            tokenizer=TokenizerConfig(vocab_size=300),
            seq_len=seq_len,
            valid_fraction=0.2,
            num_workers=1,
        ),
        progress=False,
    )
