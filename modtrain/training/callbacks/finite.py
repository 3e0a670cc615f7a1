"""Stops a run whose loss is no longer a number."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from modtrain.data.datamodule import TokenDataModule
from modtrain.errors import TrainingError
from modtrain.training import checkpoint
from modtrain.training.callbacks.step import StepCallback, is_due
from modtrain.training.module import LanguageModule
from modtrain.training.ranks import Ranks
from modtrain.training.run_directory import RunDirectory


class FiniteLossGuard(StepCallback):
    """Notes the first step with a NaN or infinite loss or gradient, on the device.

    It is read, which waits for the device, only when something is due that must not happen after
    such a step: a record, an evaluation, a checkpoint. So no checkpoint holds weights from after.
    """

    def __init__(
        self, run: RunDirectory, data: TokenDataModule, intervals: list[int], ranks: Ranks
    ) -> None:
        self.run, self.data, self.intervals, self.ranks = run, data, intervals, ranks
        self._first_bad: Tensor | None = None

    def on_step_end(self, trainer: L.Trainer, module: LanguageModule, step: int) -> None:
        """Note a bad step, and raise where one has been and something is due."""
        statistics = module.statistics
        healthy = torch.isfinite(statistics.total)
        if statistics.grad_norm is not None:
            healthy = healthy & torch.isfinite(statistics.grad_norm)
        if self._first_bad is None:
            self._first_bad = torch.full((), -1, dtype=torch.long, device=healthy.device)
        self._first_bad = torch.where(
            healthy | (self._first_bad >= 0),
            self._first_bad,
            torch.full_like(self._first_bad, step),
        )
        if any(is_due(step, every, module.plan.steps) for every in self.intervals):
            self.check()

    def on_save_checkpoint(self, *_args: Any) -> None:
        """Never let a bad state be saved, whoever asks."""
        self.check()

    def check(self) -> None:
        """Raise if a step was bad.

        Raises:
            TrainingError: names the step, its samples, and the checkpoint to go back to.
        """
        own = -1 if self._first_bad is None else int(self._first_bad.item())
        # Where one rank's loss is bad, its gradient spoils all the others' as well; they stop
        # together, and say where it began.
        bad = {rank: step for rank, step in enumerate(self.ranks.each(own)) if step >= 0}
        if not bad:
            return
        first = min(bad.values())
        where = ", ".join(str(rank) for rank, step in bad.items() if step == first)
        on_ranks = f" on rank {where}" if self.ranks.world_size > 1 else ""
        samples = self.data.sample_numbers(first - 1)
        shown = ", ".join(map(str, samples[:64])) + (", …" if len(samples) > 64 else "")
        good = checkpoint.latest(self.run.checkpoints)
        raise TrainingError(
            f"the loss or its gradient is NaN or infinite at step {first}{on_ranks};"
            f" its samples are {shown}; the last good checkpoint is"
            f" {good[1] if good else 'none: the run had not saved yet'}.\n"
            "remedy: lower optimizer.lr, set optimizer.grad_clip, or look at these samples"
        )
