"""Loss spikes, detected on the device, and the optimizer step in progress that one skips.

2 loss and gradient norm, W entries of the window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from modtrain.training.spikes.config import SpikeConfig
from modtrain.training.step_statistics import StepStatistics

# Equal values would have no deviation, and rounding would turn one of them into a spike.
_MIN_RELATIVE_DEVIATION = 1e-4


@dataclass(frozen=True)
class Spike:
    """A step, counted from 1, with the figures that decide whether it is a spike.

    loss: mean over ranks and micro-batches. own_loss: this rank's. A limit is infinite during the
    warm-up. halts: nothing is learnt after it.
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
        """Whether loss or norm exceeds its limit and both are finite; else it is a NaN or inf."""
        exceeds = self.loss > self.loss_limit or self.grad_norm > self.grad_norm_limit
        return exceeds and math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    @property
    def description(self) -> str:
        """The spike as text: step, loss, gradient norm and their limits."""
        loss, norm = f"loss {self.loss:.4g}", f"gradient norm {self.grad_norm:.4g}"
        if math.isfinite(self.loss_limit):
            loss += f" (limit {self.loss_limit:.4g})"
            norm += f" (limit {self.grad_norm_limit:.4g})"
        return f"step {self.step} is a spike: {loss}, {norm}"


@dataclass(frozen=True)
class SpikeReport:
    """What was detected over some steps: the spikes, and the figures of the last step.

    num_skipped: over the whole run.
    """

    spikes: list[Spike]
    num_skipped: int
    last: Spike | None


class SpikeDetector:
    """Detects on the device which steps are spikes; the host does not wait for it.

    Its inputs are the same on all ranks, and so is its state, to the bit. After a spike that halts
    every later step is skipped too, until the host reads the report: nothing is learnt after it.
    """

    def __init__(self, config: SpikeConfig) -> None:
        self.config = config
        # With another action than skip, the first spike halts.
        self._max_in_a_row = config.max_in_a_row if config.action == "skip" else 0
        self._window_2W = torch.zeros(2, config.window)
        counts = torch.zeros(3, dtype=torch.long)
        self._num_regular, self._num_in_a_row, self._num_skipped = counts.unbind()
        self._halted = torch.tensor(False)
        self._unreported: list[tuple[int, Tensor]] = []

    def to(self, device: torch.device) -> None:
        """Move the state to the device that trains."""
        for name in ("_window_2W", "_num_regular", "_num_in_a_row", "_num_skipped", "_halted"):
            setattr(self, name, getattr(self, name).to(device))

    def detect(self, step: int, values: Tensor, own_loss: Tensor) -> Tensor:
        """Return whether the update of a step is to be skipped, a 0-dim bool.

        step: counted from 1. values: loss, gradient norm, and whatever else must be finite, float32
        and the same on every rank. own_loss: this rank's, to name the rank that began.
        """
        values_2 = values[:2]
        limit_2 = self._limit()
        is_spike = ~values.isfinite().all() | (values_2 > limit_2).any()
        is_new_spike = is_spike & ~self._halted
        is_regular = ~is_spike & ~self._halted
        num_in_a_row = torch.where(is_regular, 0, self._num_in_a_row + is_new_spike)
        halts = is_new_spike & (num_in_a_row > self._max_in_a_row)
        entries_W = torch.arange(self.config.window, device=values.device)
        is_next_W = entries_W == self._num_regular % self.config.window
        self._window_2W = torch.where(is_next_W & is_regular, values_2[:, None], self._window_2W)
        self._num_regular = self._num_regular + is_regular
        self._num_in_a_row = num_in_a_row
        self._halted = self._halted | halts
        self._num_skipped = self._num_skipped + (is_new_spike & ~halts)
        flags = torch.stack([is_new_spike, halts, self._num_skipped]).float()
        row = torch.cat([flags, values_2, limit_2, own_loss.float()[None]])
        self._unreported.append((step, row))
        return is_spike | self._halted

    def _limit(self) -> Tensor:
        """Return the limits of loss and gradient norm; infinite during the warm-up."""
        window = self.config.window
        count = self._num_regular.clamp(max=window)
        is_filled_W = torch.arange(window, device=self._window_2W.device) < count
        mean_2 = torch.where(is_filled_W, self._window_2W, 0).sum(1) / count.clamp(min=1)
        difference_2W = torch.where(is_filled_W, self._window_2W - mean_2[:, None], 0)
        deviation_2 = (difference_2W.square().sum(1) / (count - 1).clamp(min=1)).sqrt()
        deviation_2 = torch.maximum(deviation_2, mean_2.abs() * _MIN_RELATIVE_DEVIATION)
        limit_2 = mean_2 + self.config.threshold * deviation_2
        return torch.where(self._num_regular >= self.config.warmup, limit_2, math.inf)

    def take_report(self) -> SpikeReport:
        """Return the report of the steps since the last call. Waits for the device."""
        if not self._unreported:
            return SpikeReport([], int(self._num_skipped), None)
        numbers = [step for step, _ in self._unreported]
        rows = torch.stack([row for _, row in self._unreported]).tolist()
        self._unreported = []
        steps = [
            Spike(number, row[3], row[4], row[5], row[6], row[7], bool(row[1]))
            for number, row in zip(numbers, rows, strict=True)
        ]
        spikes = [step for step, row in zip(steps, rows, strict=True) if row[0]]
        return SpikeReport(spikes, int(rows[-1][2]), steps[-1])

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint stores."""
        counts = torch.stack([self._num_regular, self._num_in_a_row, self._num_skipped])
        return {"seen": self._window_2W.cpu(), "counts": counts.cpu()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned; for another window the newest entries that fit."""
        window_2W, (num_regular, in_a_row, skipped) = state["seen"], state["counts"].tolist()
        stored, window = window_2W.shape[1], self.config.window
        if stored != window:
            oldest = max(0, num_regular - stored)
            order = [entry % stored for entry in range(oldest, num_regular)][-window:]
            num_regular = len(order)
            padding_2W = torch.zeros(2, window - num_regular)
            window_2W = torch.cat([window_2W[:, order], padding_2W], dim=1)
        device = self._window_2W.device
        self._window_2W = window_2W.to(device)
        counts = torch.tensor([num_regular, in_a_row, skipped], device=device)
        self._num_regular, self._num_in_a_row, self._num_skipped = counts.unbind()


def skip_step(optimizer: Optimizer, is_skipped: Tensor) -> None:
    """Make the optimizer's next step change nothing if ``is_skipped``, a 0-dim bool on the device.

    Call it between the backward pass and the step. Weights, moments and step counts keep their
    bits, whatever the gradients are. A fused optimizer decides on the device, as it does for
    `torch.amp.GradScaler`; for another one the host waits.
    """
    # DeepSpeed's optimizer wraps the one that steps.
    inner: Any = getattr(optimizer, "optimizer", optimizer)
    if all(group.get("fused") for group in inner.param_groups):
        inner.found_inf = is_skipped.float()
    elif bool(is_skipped):
        inner.zero_grad(set_to_none=True)


class SpikeSkipper:
    """Follows a step from its first micro-batch to its update, and decides whether to skip it.

    detector: knows the steps before. is_skipped: whether the last step was skipped, a 0-dim bool on
    the device; None before the first.
    """

    def __init__(self, config: SpikeConfig) -> None:
        self.detector = SpikeDetector(config)
        self.is_skipped: Tensor | None = None
        # Of the step in progress: the statistics before it, its own loss and objective.
        self._statistics: StepStatistics | None = None
        self._sums_2: Tensor | None = None

    def add(self, loss: Tensor, objective: Tensor, statistics: StepStatistics) -> None:
        """Add this rank's loss and objective of a micro-batch, which ``statistics`` lack yet."""
        if self._statistics is None:
            self._statistics = replace(statistics, auxiliary=dict(statistics.auxiliary))
        values_2 = torch.stack([loss.detach(), objective.detach()]).float()
        self._sums_2 = values_2 if self._sums_2 is None else self._sums_2 + values_2

    def decide(
        self,
        step: int,
        grad_norms: Sequence[Tensor],
        accumulate: int,
        optimizer: Optimizer,
        statistics: StepStatistics,
        mean_over_ranks: Callable[[Tensor], Tensor],
    ) -> None:
        """Skip the update of ``step``, counted from 1, if it is a spike; collective.

        grad_norms: before clipping. accumulate: micro-batches of the step. statistics: lose what
        the step added if it is skipped.
        """
        if self._sums_2 is None or self._statistics is None:
            raise RuntimeError("a step without a micro-batch cannot be a spike")
        loss, objective = (self._sums_2 / accumulate).unbind()
        values = torch.stack([loss, *(norm.to(loss) for norm in grad_norms), objective])
        # Norms are already the same on all ranks; the mean makes them equal to the bit anywhere.
        values = mean_over_ranks(values)
        self.is_skipped = self.detector.detect(step, values, loss)
        skip_step(optimizer, self.is_skipped)
        statistics.restore_if(self.is_skipped, self._statistics)
        self._sums_2 = self._statistics = None
