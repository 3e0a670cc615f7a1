"""Loss spikes: telling them on the device, leaving out their step, and what is written of them.

2 loss and gradient norm, W places of the window.
"""

from __future__ import annotations

import datetime
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from modtrain.common.atomic_io import sync, write_json, write_text
from modtrain.common.errors import CheckpointError
from modtrain.data.stream.samplers import stream_positions
from modtrain.distributed.process_group import Ranks
from modtrain.training.metrics_log import read_metrics
from modtrain.training.run_directory import RunDirectory
from modtrain.training.spikes.config import SpikeConfig

# Equal values would have no deviation, and rounding would make a spike of one of them.
_LEAST_DEVIATION = 1e-4
# What goes on after a spike, and how often it does.
_GOES_ON = {
    "skip": "makes no update at such a step",
    "roll_back": "leaves out the samples since the checkpoint",
}
_LIMITS = {"skip": "max_in_a_row", "roll_back": "max_rollbacks"}


@dataclass(frozen=True)
class Spike:
    """A step that was judged to be one, counted from 1.

    loss: mean over ranks and micro-batches. own_loss: this rank's. A limit is infinite where it was
    not judged yet. halts: nothing is trained after it.
    """

    step: int
    loss: float
    grad_norm: float
    loss_limit: float
    grad_norm_limit: float
    own_loss: float
    halts: bool

    @property
    def is_finite(self) -> bool:
        """Whether it has leapt; else something of it is NaN or infinite."""
        leaps = self.loss > self.loss_limit or self.grad_norm > self.grad_norm_limit
        return leaps and math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    @property
    def said(self) -> str:
        """The spike in words."""
        loss, norm = f"loss {self.loss:.4g}", f"gradient norm {self.grad_norm:.4g}"
        if math.isfinite(self.loss_limit):
            loss += f" (limit {self.loss_limit:.4g})"
            norm += f" (limit {self.grad_norm_limit:.4g})"
        return f"step {self.step} is a spike: {loss}, {norm}"


def ways_on(config: SpikeConfig, strategy: str, is_finite: bool) -> str:
    """Say how a run that stopped at a step can go on, and what would be another run.

    config: under which it stopped. strategy: its name. is_finite: the step has leapt, and is no NaN
    or infinity.
    """
    ways = []
    for action, does in _GOES_ON.items():
        if action == config.action:
            # It has come to its limit.
            ways.append(f"a larger spike.{_LIMITS[action]}")
            continue
        refused = SpikeConfig(action).strategy_problems("spike", strategy)
        ways.append(f"{'strategy=fsdp ' if refused else ''}spike={action}, which {does}")
    if is_finite:
        ways.append("spike=none or a larger spike.threshold, which let such a step pass")
    return (
        f"start it again with {'; or with '.join(ways)}. As it was it comes to the same step,"
        " unless a device was at fault. With another optimizer.lr or optimizer.grad_clip it is"
        " another run: give another name= too"
    )


class RollBackError(Exception):
    """Ends the fit, on all ranks alike: the run goes on from a checkpoint before ``spike``.

    samples: the numbers of the spike's samples.
    """

    def __init__(self, spike: Spike, samples: list[int]) -> None:
        super().__init__(f"step {spike.step} is a spike")
        self.spike, self.samples = spike, samples


class SpikeJudge:
    """Tells on the device which steps are spikes; the host does not wait for it.

    What it goes by is the same on all ranks, and so is its state, to the bit. After a spike that
    halts every later step is left out too, until somebody looks: nothing is learnt after it.
    """

    def __init__(self, config: SpikeConfig) -> None:
        self.config = config
        # A spike is skipped, or it halts.
        self._skips = config.max_in_a_row if config.action == "skip" else 0
        self._seen_2W = torch.zeros(2, config.window)
        self._taken, self._in_a_row, self._skipped = torch.zeros(3, dtype=torch.long).unbind()
        self._halted = torch.tensor(False)
        self._pending: list[tuple[int, Tensor]] = []

    def to(self, device: torch.device) -> None:
        """Move what it keeps to the device that trains."""
        for name in ("_seen_2W", "_taken", "_in_a_row", "_skipped", "_halted"):
            setattr(self, name, getattr(self, name).to(device))

    def judge(self, step: int, seen: Tensor, own_loss: Tensor) -> Tensor:
        """Judge a step; return whether its update is to be left out, a 0-dim bool.

        step: counted from 1. seen: loss, gradient norm, and what else has to be finite, float32 and
        the same on every rank. own_loss: this rank's, to say who began.
        """
        seen_2 = seen[:2]
        limit_2 = self._limit()
        is_spike = ~seen.isfinite().all() | (seen_2 > limit_2).any()
        counts = is_spike & ~self._halted
        takes_in = ~is_spike & ~self._halted
        in_a_row = torch.where(takes_in, 0, self._in_a_row + counts)
        halts = counts & (in_a_row > self._skips)
        places_W = torch.arange(self.config.window, device=seen.device)
        is_place_W = places_W == self._taken % self.config.window
        self._seen_2W = torch.where(is_place_W & takes_in, seen_2[:, None], self._seen_2W)
        self._taken = self._taken + takes_in
        self._in_a_row = in_a_row
        self._halted = self._halted | halts
        self._skipped = self._skipped + (counts & ~halts)
        told = torch.stack([counts, halts, self._skipped]).float()
        self._pending.append((step, torch.cat([told, seen_2, limit_2, own_loss.float()[None]])))
        return is_spike | self._halted

    def _limit(self) -> Tensor:
        """Return what loss and gradient norm may be at most; infinite in the warm-up."""
        window = self.config.window
        num_held = self._taken.clamp(max=window)
        held_W = torch.arange(window, device=self._seen_2W.device) < num_held
        mean_2 = torch.where(held_W, self._seen_2W, 0).sum(1) / num_held.clamp(min=1)
        apart_2W = torch.where(held_W, self._seen_2W - mean_2[:, None], 0)
        deviation_2 = (apart_2W.square().sum(1) / (num_held - 1).clamp(min=1)).sqrt()
        deviation_2 = torch.maximum(deviation_2, mean_2.abs() * _LEAST_DEVIATION)
        limit_2 = mean_2 + self.config.threshold * deviation_2
        return torch.where(self._taken >= self.config.warmup, limit_2, math.inf)

    def take(self) -> Judged:
        """Return what has been judged since the last call. Waits for the device."""
        if not self._pending:
            return Judged([], int(self._skipped), None)
        steps = [step for step, _ in self._pending]
        rows = torch.stack([row for _, row in self._pending]).tolist()
        self._pending = []
        judged = [
            Spike(step, row[3], row[4], row[5], row[6], row[7], bool(row[1]))
            for step, row in zip(steps, rows, strict=True)
        ]
        spikes = [spike for spike, row in zip(judged, rows, strict=True) if row[0]]
        return Judged(spikes, int(rows[-1][2]), judged[-1])

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint keeps."""
        counts = torch.stack([self._taken, self._in_a_row, self._skipped])
        return {"seen": self._seen_2W.cpu(), "counts": counts.cpu()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take up what `state` returned, also with another window: then the newest that fit."""
        seen_2W, (taken, in_a_row, skipped) = state["seen"], state["counts"].tolist()
        held, window = seen_2W.shape[1], self.config.window
        if held != window:
            order = [place % held for place in range(max(0, taken - held), taken)][-window:]
            taken = len(order)
            seen_2W = torch.cat([seen_2W[:, order], torch.zeros(2, window - taken)], dim=1)
        device = self._seen_2W.device
        self._seen_2W = seen_2W.to(device)
        counts = torch.tensor([taken, in_a_row, skipped], device=device)
        self._taken, self._in_a_row, self._skipped = counts.unbind()


@dataclass(frozen=True)
class Judged:
    """What was judged over some steps: the spikes, and the figures of the last one.

    skipped: over the whole run.
    """

    spikes: list[Spike]
    skipped: int
    last: Spike | None


def leave_out(optimizer: Optimizer, is_left_out: Tensor) -> None:
    """Let the optimizer's next step change nothing if ``is_left_out``, a 0-dim bool on the device.

    Between the backward pass and the step. Weights, moments and counts of steps keep their bits,
    whatever the gradients are. A fused optimizer decides on the device, as it does for
    `torch.amp.GradScaler`; for another one the host has to wait.
    """
    # DeepSpeed's stands around the one that steps.
    steps: Any = getattr(optimizer, "optimizer", optimizer)
    if all(group.get("fused") for group in steps.param_groups):
        steps.found_inf = is_left_out.float()
    elif bool(is_left_out):
        steps.zero_grad(set_to_none=True)


@contextmanager
def unless(is_left_out: Tensor | None, buffers: Iterable[Tensor]) -> Iterator[None]:
    """Undo to the bit what the block does to the buffers if ``is_left_out``; None: never."""
    kept = [] if is_left_out is None else [(buffer, buffer.clone()) for buffer in buffers]
    yield
    for buffer, before in kept:
        buffer.copy_(torch.where(is_left_out, before, buffer))  # type: ignore[arg-type]


class SpikeTrace:
    """What a run's directory keeps of its spikes, the same on every rank; rank 0 writes.

    ``events.jsonl``: a line a spike, and what was done. ``left_out.json``: the samples that a roll
    back took from the stream, for good; it is written before the run goes on.
    """

    def __init__(self, run: RunDirectory, ranks: Ranks) -> None:
        """Read what is there; collective.

        Raises:
            CheckpointError: ``left_out.json`` is damaged.
        """
        self.run, self.ranks = run, ranks
        self.events, self._path = run.path / "events.jsonl", run.path / "left_out.json"
        found: dict[str, Any] = {}
        with ranks.raise_on_all_ranks():
            if ranks.is_rank0:
                found = self._read()
        found = ranks.broadcast_from_rank0(found)
        self.left_out: list[tuple[int, int]] = [(first, stop) for first, stop in found["left_out"]]
        self.rollbacks: int = found["rollbacks"]
        # A spike that ended the fit, with its samples: the run is to go back.
        self.pending: tuple[Spike, list[int]] | None = None

    def go_on(self, start_step: int, samples_per_step: int, config: SpikeConfig) -> list[str]:
        """Make ready to go on from ``start_step``, without a pending spike's samples; collective.

        Returns what is to be told: nothing, unless the run rolls back.
        """
        pending, self.pending = self.pending, None
        said = []
        if pending is not None:
            spike, samples = pending
            first, stop = self._roll_back(
                spike, samples, start_step, config.rollback_steps, samples_per_step
            )
            said = [
                f"{spike.said}: rolled back to step {start_step} ({self.rollbacks} of"
                f" {config.max_rollbacks} times); the samples at {first} to {stop - 1} of the"
                " stream are left out"
            ]
        self._drop_skips(start_step)
        return said

    def _drop_skips(self, start_step: int) -> None:
        """Drop the skips after ``start_step``: they come again, or they do not."""
        with self.ranks.raise_on_all_ranks():
            if self.ranks.is_rank0 and self.events.is_file():
                kept = [
                    event
                    for event in read_metrics(self.events)
                    if event["action"] != "skip" or event["step"] <= start_step
                ]
                write_text(self.events, "".join(json.dumps(event) + "\n" for event in kept))

    def write(self, action: str, spike: Spike, samples: list[int], **more: Any) -> None:
        """Add a line; collective."""
        figures = {
            key: value if math.isfinite(value) else str(value)
            for key, value in asdict(spike).items()
            if key not in ("own_loss", "halts")
        }
        time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        event = {"time": time, "action": action, **figures, "samples": samples, **more}
        with self.ranks.raise_on_all_ranks():
            if self.ranks.is_rank0:
                with self.events.open("a") as file:
                    file.write(json.dumps(event) + "\n")
                    file.flush()
                    os.fsync(file.fileno())

    def _roll_back(
        self,
        spike: Spike,
        samples: list[int],
        to_step: int,
        steps: int | None,
        samples_per_step: int,
    ) -> tuple[int, int]:
        """Take samples out of the stream, and write it down.

        to_step: of the checkpoint. steps: how many steps' samples are left out, the spike's the
        last; None: all since ``to_step``. Returns the positions, (first, one behind the last).
        """
        last = spike.step
        first = to_step if steps is None else max(to_step, last - steps)
        ends = np.array([first * samples_per_step, last * samples_per_step - 1], dtype=np.int64)
        start, end = stream_positions(ends, self.left_out).tolist()
        stretch = (start, end + 1)
        # One within the new one is a part of it: none begins or ends inside.
        apart = [other for other in self.left_out if not start <= other[0] <= end]
        left_out, rollbacks = sorted([*apart, stretch]), self.rollbacks + 1
        with self.ranks.raise_on_all_ranks():
            if self.ranks.is_rank0:
                content = {"left_out": left_out, "rollbacks": rollbacks}
                write_json(self._path, content, self.run.path)
                sync(self.run.path)
        self.left_out, self.rollbacks = left_out, rollbacks
        self.write("roll_back", spike, samples, to_step=to_step, left_out=stretch)
        return stretch

    def _read(self) -> dict[str, Any]:
        if not self._path.is_file():
            return {"left_out": [], "rollbacks": 0}
        try:
            found = json.loads(self._path.read_text())
            stretches = [(int(first), int(stop)) for first, stop in found["left_out"]]
            return {"left_out": stretches, "rollbacks": int(found["rollbacks"])}
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self._path} cannot be read: {error}. It says which samples the run leaves out;"
                " bring it back: progress.left_out of the newest checkpoint has the same stretches"
            ) from None


def check_left_out(
    here: Sequence[Sequence[int]], saved: Sequence[Sequence[int]], position: int
) -> None:
    """Raise unless the samples before ``position`` were left out alike when it was saved.

    Raises:
        CheckpointError: they were not.
    """
    ours, theirs = ([list(s) for s in given if s[0] < position] for given in (here, saved))
    if ours != theirs:
        raise CheckpointError(
            f"the run leaves out the samples at {ours} of the stream, as left_out.json in its"
            f" directory says, and the checkpoint that it goes on from left out {theirs}:"
            " bring the file back as it was"
        )
