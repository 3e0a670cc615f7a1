"""The files in a run's directory about its loss spikes, and the samples that a roll back skips."""

from __future__ import annotations

import datetime
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from modtrain.common.atomic_io import open_to_append, sync, write_json
from modtrain.common.errors import CheckpointError
from modtrain.common.reading import UnreadableError, read_json
from modtrain.data.stream.samplers import stream_positions
from modtrain.distributed.process_group import Ranks
from modtrain.training.metrics_log import keep_metrics
from modtrain.training.run_directory import RunDirectory
from modtrain.training.spikes.config import SpikeConfig
from modtrain.training.spikes.detector import Spike


class RollBackError(Exception):
    """Ends the fit on all ranks: the run resumes from a checkpoint before ``spike``.

    samples: the numbers of the spike's samples.
    """

    def __init__(self, spike: Spike, samples: list[int]) -> None:
        super().__init__(f"step {spike.step} is a spike")
        self.spike, self.samples = spike, samples


class SpikeJournal:
    """A run's record of its spikes, the same on every rank; rank 0 writes.

    ``events.jsonl``: one line a spike, with the action taken. ``left_out.json``: the samples that
    roll backs removed from the stream for good; it is written before the run resumes.
    """

    def __init__(self, run: RunDirectory, ranks: Ranks, num_samples: int | None = None) -> None:
        """Read the files, or raise CheckpointError for a damaged one; collective.

        num_samples: that the whole run trains on; None: it is not known.
        """
        self.run, self.ranks, self._num_samples = run, ranks, num_samples
        self.events, self._path = run.path / "events.jsonl", run.path / "left_out.json"
        self.skipped_samples, self.rollbacks = ranks.run_on_rank0(self._read)
        # The spike that ended the fit, with its samples: the run has to roll back.
        self.pending: tuple[Spike, list[int]] | None = None

    def resume(self, start_step: int, samples_per_step: int, config: SpikeConfig) -> str:
        """Prepare to resume from ``start_step``, without a pending spike's samples; collective.

        Returns a message for the user: empty unless the run rolls back.
        """
        pending, self.pending = self.pending, None
        message = ""
        if pending is not None:
            message = self._roll_back(*pending, start_step, samples_per_step, config)
        with self.ranks.raise_on_all_ranks():
            if self.ranks.is_rank0:
                # Without the skips after ``start_step``: those steps are made again.
                keep_metrics(
                    self.events, lambda e: e.get("action") != "skip" or e["step"] <= start_step
                )
        return message

    def write(self, action: str, spike: Spike, samples: list[int], **more: Any) -> None:
        """Append a line to ``events.jsonl``; collective."""
        figures = {
            key: value if math.isfinite(value) else str(value)
            for key, value in asdict(spike).items()
            if key not in ("own_loss", "halts")
        }
        time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        event = {"time": time, "action": action, **figures, "samples": samples, **more}
        with self.ranks.raise_on_all_ranks():
            if self.ranks.is_rank0:
                with open_to_append(self.events) as file:
                    file.write(json.dumps(event).encode() + b"\n")
                    file.flush()
                    os.fsync(file.fileno())

    def _roll_back(
        self,
        spike: Spike,
        samples: list[int],
        to_step: int,
        samples_per_step: int,
        config: SpikeConfig,
    ) -> str:
        """Remove samples up to the spike's from the stream, and record it; return a message."""
        last, steps = spike.step, config.rollback_steps
        first = to_step if steps is None else max(to_step, last - steps)
        ends = np.array([first * samples_per_step, last * samples_per_step - 1], dtype=np.int64)
        start, end = stream_positions(ends, self.skipped_samples).tolist()
        interval = (start, end + 1)
        # An older interval that starts inside the new one also ends inside: it is contained.
        others = [other for other in self.skipped_samples if not start <= other[0] <= end]
        skipped_samples, rollbacks = sorted([*others, interval]), self.rollbacks + 1
        with self.ranks.raise_on_all_ranks():
            if self.ranks.is_rank0:
                content = {"left_out": skipped_samples, "rollbacks": rollbacks}
                write_json(self._path, content, self.run.path)
                sync(self.run.path)
        self.skipped_samples, self.rollbacks = skipped_samples, rollbacks
        self.write("roll_back", spike, samples, to_step=to_step, left_out=interval)
        return (
            f"{spike.description}: rolled back to step {to_step} ({rollbacks} of"
            f" {config.max_rollbacks} times); the samples at {start} to {end} of the stream are"
            " left out"
        )

    def _read(self) -> tuple[list[tuple[int, int]], int]:
        if not os.path.lexists(self._path):
            return [], 0
        try:
            content = read_json(self._path)
            intervals, rollbacks = content["left_out"], content["rollbacks"]
            self._check(intervals, rollbacks)
            return [(start, stop) for start, stop in intervals], rollbacks
        except (UnreadableError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self._path} cannot be read: {error}. It lists the samples that the run leaves"
                " out; restore it: progress.left_out of the newest checkpoint has the same list,"
                " and rollbacks is at least its length"
            ) from None

    def _check(self, intervals: Sequence[Sequence[int]], rollbacks: int) -> None:
        """Raise ValueError for what no roll back has written."""
        end, num_left_out = 0, 0
        for start, stop in intervals:
            if type(start) is not int or type(stop) is not int:
                raise ValueError(f"[{start}, {stop}] are no numbers of samples")
            if not end <= start < stop:
                raise ValueError(f"[{start}, {stop}] is empty, or not behind the one before")
            # What is left out makes the run's stream longer.
            if self._num_samples is not None and start >= self._num_samples + num_left_out:
                raise ValueError(f"[{start}, {stop}] begins behind the run's last sample")
            end, num_left_out = stop, num_left_out + stop - start
        # A roll back adds an interval, which may take earlier ones in.
        if type(rollbacks) is not int or rollbacks < len(intervals):
            raise ValueError(f"{rollbacks} roll backs have not left out so many intervals")


def check_left_out(
    current: Sequence[Sequence[int]], saved: Sequence[Sequence[int]], position: int
) -> None:
    """Raise CheckpointError unless both leave out the same samples before ``position``."""
    ours, theirs = ([list(i) for i in given if i[0] < position] for given in (current, saved))
    if ours != theirs:
        raise CheckpointError(
            f"left_out.json in the run's directory leaves out the samples at {ours} of the stream,"
            f" and the checkpoint to resume from left out {theirs}: restore the file as it was"
        )
