"""How long steps wait for data behind a URL, and what a large index takes of memory.

The server answers with the bytes that the steps read and a tenth, headers of requests aside. A step
is a pause of a fixed time, so that what else the machine does shows in the waiting alone.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

from modtrain.data.config import DataConfig
from modtrain.data.stream.datamodule import TokenDataModule
from modtrain.data.stream.index import ShardIndex
from modtrain.data.stream.index_json import index_content, read_summary
from modtrain.data.stream.prepared import INDEX_NAME, Shard

_SPARE = 1.1
_MEMBERS = 64


def measure_waiting(prepared: Path, options: argparse.Namespace) -> dict[str, float]:
    """Return the shares of the time in which steps wait, and bytes fetched over bytes read."""
    seq_len = read_summary(prepared).seq_len
    step_bytes = options.batch_size * (seq_len + 1) * 2
    rate = _SPARE * step_bytes / options.step_seconds
    num_steps = int((options.warm_up + options.seconds) / options.step_seconds)
    server = _Server(prepared, rate)
    with server as url:
        module = TokenDataModule(
            # The tokens are random, and of no tokenizer.
            DataConfig(path=url, verify="none"),
            micro_batch_size=options.batch_size,
            accumulate=1,
            num_steps=num_steps,
            eval_batch_size=1,
        )
        began = time.monotonic()
        waits, ends = _steps(module, options.step_seconds)
    steps = zip(ends, waits, strict=True)
    late = [(end, wait) for end, wait in steps if end - began > options.warm_up]
    passed = late[-1][0] - late[0][0] + late[0][1]
    return {
        "waiting": sum(wait for _, wait in late) / passed,
        "longest_wait_s": max(wait for _, wait in late),
        "waiting_before": sum(waits[: len(waits) - len(late)]) / options.warm_up,
        "bytes_over_read": server.sent / (step_bytes * len(waits)),
    }


def _steps(module: TokenDataModule, step_seconds: float) -> tuple[list[float], list[float]]:
    waits: list[float] = []
    ends: list[float] = []
    batches = iter(module.train_dataloader())
    while True:
        began = time.monotonic()
        if next(batches, None) is None:
            return waits, ends
        waits.append(time.monotonic() - began)
        time.sleep(step_seconds)
        ends.append(time.monotonic())


class _Server:
    """A server in a process of its own. sent: bytes, once it has ended."""

    def __init__(self, root: Path, bytes_per_s: float) -> None:
        command = [sys.executable, "-m", "benchmarks._range_server", str(root), str(bytes_per_s)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, **pipes)  # type: ignore[call-overload]
        self.sent = 0

    def __enter__(self) -> str:
        return str(self._process.stdout.readline()).strip()

    def __exit__(self, *_: object) -> None:
        printed, _ = self._process.communicate()
        self.sent = int(printed)


def write_large_index(prepared: Path, output: Path, num_shards: int) -> None:
    """Write an index of so many shards, as of a corpus of terabytes; there are no shards."""
    summary = read_summary(prepared)
    sequence_bytes = (summary.seq_len + 1) * 2
    # Header of tar, header of numpy, 64 sequences, whole blocks.
    stride = 512 + -(-(128 + 64 * sequence_bytes) // 512) * 512
    shards = [
        Shard(f"shard-{number:06d}.tar", _MEMBERS * stride + 10_240, f"{number:064x}", ())
        for number in range(num_shards)
    ]
    content = index_content(summary, {"train": shards, "valid": []})
    content["splits"]["train"]["num_sequences"] = num_shards * _MEMBERS * 64
    content["splits"]["valid"]["num_sequences"] = 0
    # All shards have the same.
    members = json.dumps([[512 + number * stride, 64] for number in range(_MEMBERS)])
    text = json.dumps(content).replace('"members": []', f'"members": {members}')
    (output / INDEX_NAME).write_text(text)


def measure_memory(output: Path) -> dict[str, float]:
    """Return MiB of a process that reads a large index, and of one that does not."""
    with _Server(output, 0) as url:
        command = [sys.executable, "-m", "benchmarks._remote_stream", url]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, float] = json.loads(printed.splitlines()[-1])
    return result


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def _report_memory(url: str) -> None:
    before = _resident()
    began = time.monotonic()
    index = ShardIndex.load(url, "none")
    loaded = time.monotonic() - began
    module = TokenDataModule(
        DataConfig(path=url, verify="none"),
        micro_batch_size=8,
        accumulate=1,
        num_steps=1000,
        eval_batch_size=1,
    )
    vars(module)["indexes"] = {"": index}
    module.train_dataloader()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    values = {"before_mib": before, "with_index_mib": _resident(), "peak_mib": peak}
    print(json.dumps({**values, "index_s": loaded, "samples": len(module.train_data)}))


if __name__ == "__main__":
    _report_memory(sys.argv[1])
