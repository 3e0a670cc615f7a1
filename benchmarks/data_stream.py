"""Tokens a second from the shuffled shards, against a flat memmap of the same tokens.

    python -m benchmarks.data_stream
    python -m benchmarks.data_stream remote

The stream is what training reads, ``TokenDataModule.train_dataloader()`` without workers. The
memmap is the fastest plain loop: random rows of one uncompressed array (N, S + 1) on disk, as int64
tensors. "unchecked" is the stream without its check of each token against the vocabulary. All give
batches int64 (B, S + 1). They run interleaved; medians are compared.

``remote`` measures the share of time that steps wait for data behind a URL, of a server with the
bandwidth that they read and a tenth, after the first minute; and the memory of an index of 100,000
shards.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from benchmarks._remote_stream import measure_memory, measure_waiting, write_large_index
from modtrain.data.config import DataConfig
from modtrain.data.prepare.pack import PackLayout, TokenFile, plan_shards, write_shard
from modtrain.data.prepare.pipeline import finish
from modtrain.data.prepare.tokenizer import check_tokenizer, train_tokenizer
from modtrain.data.stream.batch import Batch
from modtrain.data.stream.datamodule import TokenDataModule
from modtrain.data.stream.prepared import TOKENIZER_NAME, IndexSummary, Shard, SplitSummary

VOCAB_SIZE = 50_000


def main() -> None:
    """Measure, print a table, and the result as JSON on the last line."""
    options = _options()
    torch.set_num_threads(1)
    if options.where == "remote":
        measure_remote(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        prepared, flat = Path(folder) / "prepared", Path(folder) / "flat.bin"
        make_prepared(prepared, options.tokens, options.seq_len)
        write_flat(flat, options.tokens, options.seq_len)
        rates = measure(options, prepared, flat)
    ours, theirs, unchecked = (
        statistics.median(rates[name]) for name in ("stream", "memmap", "unchecked")
    )
    print(f"{options.tokens:,} tokens, batches of {options.batch_size} x {options.seq_len + 1}")
    for name, values in rates.items():
        spread = f"{min(values) / 1e6:.0f} to {max(values) / 1e6:.0f}"
        print(f"{name:<10}{statistics.median(values) / 1e6:>9.0f} M tokens/s   ({spread})")
    result = {"stream_tokens_per_s": round(ours), "memmap_tokens_per_s": round(theirs)}
    ratios = {
        "over_memmap": round(ours / theirs, 3),
        "over_unchecked": round(ours / unchecked, 3),
    }
    print(json.dumps({"benchmark": "data_stream", **ratios, **result}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("where", nargs="?", default="disk", choices=("disk", "remote"))
    parser.add_argument("--tokens", type=int, default=40_000_000, help="tokens in the data set")
    parser.add_argument("--seq-len", type=int, default=1024, help="tokens a sample is trained on")
    parser.add_argument("--batch-size", type=int, default=16, help="samples in a batch")
    parser.add_argument("--batches", type=int, default=500, help="batches in a round")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of each")
    remote = parser.add_argument_group("remote")
    remote.add_argument("--step-seconds", type=float, default=0.2, help="time of a step")
    remote.add_argument("--warm-up", type=float, default=60, help="seconds that do not count")
    remote.add_argument("--seconds", type=float, default=120, help="seconds that count")
    remote.add_argument("--shards", type=int, default=100_000, help="in the large index")
    return parser.parse_args()


def measure_remote(options: argparse.Namespace) -> None:
    """Measure waiting and memory, print them, and as JSON on the last line."""
    with tempfile.TemporaryDirectory() as folder:
        prepared, large = Path(folder) / "prepared", Path(folder) / "large"
        make_prepared(prepared, options.tokens, options.seq_len)
        large.mkdir()
        write_large_index(prepared, large, options.shards)
        memory = measure_memory(large)
        waiting = measure_waiting(prepared, options)
    print(f"steps of {options.batch_size} x {options.seq_len + 1} tokens, {options.step_seconds} s")
    print(f"waiting for data: {waiting['waiting']:.2%} of the time after {options.warm_up:.0f} s")
    grown = memory["with_index_mib"] - memory["before_mib"]
    print(f"index of {options.shards:,} shards: {grown:.0f} MiB, {memory['index_s']:.1f} s to read")
    values = {name: round(value, 4) for name, value in {**waiting, **memory}.items()}
    print(json.dumps({"benchmark": "data_stream remote", **values}))


def _tokens(num_tokens: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB_SIZE, num_tokens, dtype=np.uint16)


def make_prepared(output: Path, num_tokens: int, seq_len: int) -> None:
    """Write random tokens as a prepared directory, the same for training and validation."""
    work = output / ".work"
    for name in ("shards", "staging"):
        (work / name).mkdir(parents=True)
    tokens = work / "tokens.bin"
    _tokens(num_tokens).tofile(tokens)
    layout = PackLayout(seq_len, sequences_per_sample=64, samples_per_shard=64, dtype="uint16")
    shards: dict[str, list[Shard]] = {}
    for split in ("train", "valid"):
        (output / split).mkdir()
        file = TokenFile(str(tokens), num_tokens, split)
        jobs = plan_shards([file], layout, output / split, work)
        shards[split] = [write_shard(job) for job in jobs]
    content = train_tokenizer(["a text"], 257)
    (output / TOKENIZER_NAME).write_bytes(content)
    _, eos_id = check_tokenizer(content, TOKENIZER_NAME)
    counts = SplitSummary(
        num_sequences=layout.num_sequences(num_tokens),
        num_tokens=num_tokens,
        num_documents=1,
        num_bytes=num_tokens,
        dropped_tokens=layout.dropped_tokens(num_tokens),
    )
    summary = IndexSummary(
        seq_len=seq_len,
        vocab_size=VOCAB_SIZE,
        eos_id=eos_id,
        dtype=layout.dtype,
        tokenizer_sha256=hashlib.sha256(content).hexdigest(),
        fingerprint="",
        num_files=0,
        flaws={},
        splits={"train": counts, "valid": counts},
    )
    finish(output, summary, shards, work / "staging")
    shutil.rmtree(work)


def write_flat(path: Path, num_tokens: int, seq_len: int) -> None:
    """Write the same sequences as one array (N, S + 1)."""
    tokens = _tokens(num_tokens)
    rows_NS = np.lib.stride_tricks.sliding_window_view(tokens, seq_len + 1)[::seq_len]
    np.ascontiguousarray(rows_NS).tofile(path)


def stream_batches(
    prepared: Path, options: argparse.Namespace, *, checks_tokens: bool = True
) -> Iterator[Batch]:
    """Batches as training reads them, enough for all rounds."""
    num_steps = (options.rounds + 1) * options.batches
    module = TokenDataModule(
        # The tokens are random, and of no tokenizer.
        DataConfig(path=str(prepared), verify="none"),
        micro_batch_size=options.batch_size,
        accumulate=1,
        num_steps=num_steps,
        eval_batch_size=1,
    )
    if not checks_tokens:
        # In place of the method.
        vars(module.train_data)["_check_tokens"] = lambda *_: None
    return iter(module.train_dataloader())


def memmap_batches(flat: Path, options: argparse.Namespace) -> Iterator[Batch]:
    """Batches of random rows of a flat memmap."""
    rows_NS = np.memmap(flat, np.uint16, mode="r").reshape(-1, options.seq_len + 1)
    generator = np.random.default_rng(0)
    while True:
        rows = generator.integers(0, len(rows_NS), options.batch_size)
        yield Batch.from_tokens(torch.from_numpy(rows_NS[rows].astype(np.int64)))


def measure(options: argparse.Namespace, prepared: Path, flat: Path) -> dict[str, list[float]]:
    """Tokens a second of each round; a first round of each, which fills the caches, is left out."""
    readers = {
        "stream": stream_batches(prepared, options),
        "unchecked": stream_batches(prepared, options, checks_tokens=False),
        "memmap": memmap_batches(flat, options),
    }
    rates: dict[str, list[float]] = {name: [] for name in readers}
    for round_number in range(options.rounds + 1):
        for name, reader in readers.items():
            rate = _rate(islice(reader, options.batches))
            if round_number:
                rates[name].append(rate)
    return rates


def _rate(batches: Iterable[Batch]) -> float:
    start = time.perf_counter()
    tokens = sum(batch.targets_BS.numel() for batch in batches)
    return tokens / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
