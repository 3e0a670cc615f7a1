"""Skips the optimizer step in progress if it is a spike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.optim import Optimizer

from modtrain.training.spikes.config import SpikeConfig
from modtrain.training.spikes.detector import SpikeDetector, skip_step
from modtrain.training.step_statistics import StepStatistics


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

    def begin_micro_batch(self, statistics: StepStatistics) -> None:
        """Keep the ``statistics`` before a step's first micro-batch."""
        if self._statistics is None:
            self._statistics = replace(statistics, auxiliary=dict(statistics.auxiliary))

    def add(self, loss: Tensor, objective: Tensor) -> None:
        """Add this rank's loss and objective of a micro-batch."""
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
