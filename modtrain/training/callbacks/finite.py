"""Stops a run whose loss is no longer a number."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import lightning as L
import torch
from torch import Tensor

from modtrain.data.datamodule import TokenDataModule
from modtrain.errors import CheckpointError, TrainingError
from modtrain.training import checkpoint
from modtrain.training.callbacks.step import StepCallback, is_due
from modtrain.training.checkpoint import Saver
from modtrain.training.module import LanguageModule
from modtrain.training.run_directory import RunDirectory


class FiniteLossGuard(StepCallback):
    """Notes the first step with a NaN or infinite loss or gradient, on the device.

    It is read, which waits for the device, only when something is due that must not happen after
    such a step: a record, an evaluation, a checkpoint. So no checkpoint holds weights from after.
    """

    def __init__(
        self, run: RunDirectory, data: TokenDataModule, intervals: list[int], saver: Saver
    ) -> None:
        self.run, self.data, self.intervals, self.saver = run, data, intervals, saver
        # The first step whose loss here is bad, and the first with a bad loss or gradient.
        self._first_bad_2: Tensor | None = None

    def on_step_end(self, trainer: L.Trainer, module: LanguageModule, step: int) -> None:
        """Note a bad step, and raise where one has been and something is due."""
        statistics = module.statistics
        bad = ~torch.isfinite(statistics.total)
        bad_gradient = bad
        if statistics.grad_norm is not None:
            bad_gradient = bad | ~torch.isfinite(statistics.grad_norm)
        bad_2 = torch.stack([bad, bad_gradient])
        if self._first_bad_2 is None:
            self._first_bad_2 = torch.full((2,), -1, dtype=torch.long, device=bad_2.device)
        is_new_2 = bad_2 & (self._first_bad_2 < 0)
        self._first_bad_2 = torch.where(is_new_2, step, self._first_bad_2)
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
        own = [-1, -1] if self._first_bad_2 is None else self._first_bad_2.tolist()
        # Where one rank's loss is bad, its gradient spoils all the others' as well: they stop
        # together, and say where it began.
        ranks = self.saver.ranks
        if not ranks.any(own[1] >= 0):
            return
        found = ranks.each(own)
        first = min(step for _, step in found if step >= 0)
        here = [str(rank) for rank, (step, _) in enumerate(found) if step == first]
        on_ranks = f" on rank {', '.join(here)}" if here and ranks.world_size > 1 else ""
        with suppress(CheckpointError):
            self.saver.wait()
        samples = self.data.sample_numbers(first - 1)
        shown = ", ".join(map(str, samples[:64])) + (", …" if len(samples) > 64 else "")
        good = checkpoint.latest(self.run.checkpoints, ranks)
        raise TrainingError(
            f"the loss or its gradient is NaN or infinite at step {first}{on_ranks};"
            f" its samples are {shown}; the last good checkpoint is"
            f" {good[1] if good else 'none: the run had not saved yet'}.\n"
            "remedy: lower optimizer.lr, set optimizer.grad_clip, or look at these samples"
        )
