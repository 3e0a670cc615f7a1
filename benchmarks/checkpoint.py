"""What does a checkpoint cost? Of the steps beside it, and against the disk's own speed.

    python -m benchmarks.checkpoint

A dense model of some 100 M parameters with AdamW's state, one process, training with one thread.
``stall_ratio``: what an asynchronous save, copied while the next gradients are computed, adds to
the time of the steps beside it, over the time of a synchronous save. ``noise_ratio``: by how much
the same steps without a save differ from themselves, over that: what ``stall_ratio`` cannot tell
from nothing. ``save_over_disk``: a synchronous save, checksums included, over a plain write and
fsync of as many bytes.
``verify_over_disk`` and ``load_over_disk``: comparing all checksums, and reading all tensors into
place, over a plain read of the files. What is read is first dropped from the page cache.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import torch

from benchmarks._harness import (
    HEAD_WIDTH,
    check_width,
    finish,
    fix_threads,
    interleave,
    print_times,
    ratio,
)
from modtrain.checkpoint.checkpointer import Checkpointer
from modtrain.checkpoint.layout import checkpoint_path, verify
from modtrain.checkpoint.state import named_state, restore
from modtrain.distributed.process_group import Ranks
from modtrain.models.config import ModelConfig
from modtrain.models.transformer import Transformer

_CHUNK = 8 * 2**20


def main() -> None:
    """Measure, print the times, and the result as JSON on the last line."""
    options = _options()
    fix_threads(1)
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        bench = _Bench(options, Path(folder))
        print(
            f"{bench.num_parameters / 1e6:.1f} M parameters, {bench.num_bytes / 2**20:.0f} MiB a"
            f" checkpoint, {options.steps} steps beside a save, one thread"
        )
        seconds = interleave(bench.calls(), options.rounds, warmup=1)
    print_times("seconds are those of all the steps, or of one save or load", seconds)
    lost, noise = (
        [a - b for a, b in zip(seconds[name], seconds["steps"], strict=True)]
        for name in ("steps, saving", "steps again")
    )
    for what, differences in (("an asynchronous save", lost), ("nothing", noise)):
        print(f"lost to {what}: {1e3 * statistics.median(differences):.0f} ms")
    finish(
        "checkpoint",
        {
            # Below what can be measured it may come out under 0.
            "stall_ratio": max(1e-4, ratio(lost, seconds["save"])),
            "noise_ratio": abs(ratio(noise, seconds["save"])),
            "save_over_disk": ratio(seconds["save"], seconds["write"]),
            "verify_over_disk": ratio(seconds["verify"], seconds["read"]),
            "load_over_disk": ratio(seconds["load"], seconds["read"]),
        },
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocab", type=int, default=16384)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8, help="beside a save; it must end in them")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", help="on the disk to measure; left out: the temporary one")
    options = parser.parse_args()
    check_width(parser, options.d_model)
    sizes = (options.layers, options.vocab, options.seq_len, options.steps, options.rounds)
    if min(sizes) < 1:
        parser.error("every number must be at least 1")
    return options


class _Bench:
    def __init__(self, options: argparse.Namespace, root: Path) -> None:
        self.options, self.root = options, root
        config = ModelConfig(
            d_model=options.d_model,
            num_layers=options.layers,
            num_heads=options.d_model // HEAD_WIDTH,
            vocab_size=options.vocab,
            tie_embeddings=True,
            pattern="dense",
        )
        self.model = Transformer(config)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.tokens_BS = torch.randint(options.vocab, (1, options.seq_len))
        self.num_parameters = sum(p.numel() for p in self.model.parameters())
        self.numbers = count(1)
        self.checkpointer = Checkpointer(Ranks.create())
        self._steps(1)
        self.kept = self._save(blocking=True)
        self.files = [file for file in self.kept.iterdir() if file.is_file()]
        self.num_bytes = sum(file.stat().st_size for file in self.files)

    def calls(self) -> dict[str, Callable[[], float]]:
        return {
            "steps": lambda: self._steps(self.options.steps),
            "steps, saving": self._steps_saving,
            "steps again": lambda: self._steps(self.options.steps),
            "save": self._save_alone,
            "write": self._write,
            "read": lambda: self._cold(self._read),
            "verify": lambda: self._cold(lambda: verify(self.kept)),
            "load": lambda: self._cold(self._load),
        }

    def _steps(self, number: int) -> float:
        start = time.perf_counter()
        for _ in range(number):
            loss = self.model(self.tokens_BS, self.tokens_BS).loss
            loss.backward()
            self.checkpointer.wait_for_copy()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return time.perf_counter() - start

    def _save(self, blocking: bool) -> Path:
        step = next(self.numbers)
        path = checkpoint_path(self.root, step)
        tensors, extra_state = named_state(self.model, self.optimizer)
        self.checkpointer.save(
            path, tensors, extra_state, step, blocking=blocking, async_copy=not blocking
        )
        return path

    def _steps_saving(self) -> float:
        start = time.perf_counter()
        path = self._save(blocking=False)
        self._steps(self.options.steps)
        passed = time.perf_counter() - start
        if self.checkpointer.poll():
            print("a save outlasted the steps beside it: give more --steps")
        self.checkpointer.wait()
        shutil.rmtree(path)
        return passed

    def _save_alone(self) -> float:
        start = time.perf_counter()
        path = self._save(blocking=True)
        passed = time.perf_counter() - start
        shutil.rmtree(path)
        return passed

    def _write(self) -> float:
        """Write as many bytes as a checkpoint has, which cost nothing to make, as one file."""
        chunk, left, file = memoryview(os.urandom(_CHUNK)), self.num_bytes, self.root / "plain"
        start = time.perf_counter()
        with file.open("wb", buffering=0) as stream:
            while left > 0:
                left -= stream.write(chunk[: min(left, _CHUNK)])
            os.fsync(stream.fileno())
        passed = time.perf_counter() - start
        file.unlink()
        return passed

    def _read(self) -> None:
        buffer = bytearray(_CHUNK)
        for file in self.files:
            with file.open("rb", buffering=0) as stream:
                while stream.readinto(buffer):
                    pass

    def _load(self) -> None:
        restore(self.kept, self.model, self.optimizer)

    def _cold(self, call: Callable[[], object]) -> float:
        for file in self.files:
            with file.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


if __name__ == "__main__":
    main()
