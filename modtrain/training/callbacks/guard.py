"""Callbacks that stop or redirect a run after a bad step: their base, and that for NaN."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor

from modtrain.checkpoint.checkpointer import Checkpointer
from modtrain.checkpoint.recovery import latest
from modtrain.common.errors import CheckpointError, DivergedError
from modtrain.data.stream.datamodule import TokenDataModule
from modtrain.distributed.process_group import Ranks
from modtrain.training.callbacks.step import StepCallback, language_module
from modtrain.training.config import TrainConfig
from modtrain.training.module import LanguageModule
from modtrain.training.run_directory import RunDirectory
from modtrain.training.schedules import is_due
from modtrain.training.spikes.config import resume_remedy


@dataclass(eq=False)
class Guard(StepCallback):
    """Prevents records, evaluations and checkpoints after a bad step.

    It checks only when one of them is due, because a check waits for the device.

    intervals: steps between two records, checkpoints and so on, the records' first.
    """

    run: RunDirectory
    data: TokenDataModule
    intervals: list[int]
    checkpointer: Checkpointer
    ranks: Ranks

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *_args: Any
    ) -> None:
        """Check before every save, for whatever reason: no checkpoint follows a bad step."""
        self.check(language_module(pl_module))

    @abstractmethod
    def check(self, module: LanguageModule) -> Any:
        """Act on the steps since the last check; collective."""

    def is_check_due(self, trainer: L.Trainer, module: LanguageModule, step: int) -> bool:
        """Whether to check after ``step``: something is due, or the host knows of a bad step."""
        last = module.plan.steps
        return overflowed(trainer) or any(is_due(step, every, last) for every in self.intervals)

    def stop_error(
        self,
        config: TrainConfig,
        reason: str,
        samples: list[int],
        *,
        first_bad: int,
        is_finite: bool,
    ) -> DivergedError:
        """Return the error that ends the run at a step; collective.

        reason: the step and what is wrong. samples: its samples' numbers. first_bad: the first of
        the bad steps without a good one between them: the model may be ruined since. is_finite: the
        step is a spike, and no NaN or infinity.
        """
        with suppress(CheckpointError):
            self.checkpointer.wait()
        newest = latest(self.run.checkpoints, self.ranks)
        good, later = newest, ""
        if newest is not None and newest[0] >= first_bad:
            good = latest(self.run.checkpoints, self.ranks, before=first_bad)
            later = (
                f"Later ones, up to {newest[1].name}, were saved after steps that were skipped, and"
                " the model may have been bad by then: move them away to resume from before.\n"
            )
        shown = ", ".join(map(str, samples[:64])) + (", …" if len(samples) > 64 else "")
        return DivergedError(
            f"{reason}; its samples are {shown}; the last good checkpoint is"
            f" {good[1] if good else 'none: the run had not saved yet'}.\n"
            f"{later}remedy: {resume_remedy(config.spike, config.strategy.name, is_finite)}"
        )


class FiniteLossGuard(Guard):
    """Records the first step with a NaN or infinite loss or gradient, on the device.

    It raises before anything that is due after such a step, so no checkpoint follows it.
    """

    # The first step with a bad loss on this rank, and with a bad loss or gradient.
    _first_bad_2: Tensor | None = None

    def on_step_end(self, trainer: L.Trainer, module: LanguageModule, step: int) -> None:
        """Record a bad step; raise if there was one and something is due."""
        statistics = module.statistics
        bad = ~torch.isfinite(statistics.total)
        bad_gradient = bad | overflowed(trainer)
        if statistics.grad_norm is not None:
            bad_gradient = bad_gradient | ~torch.isfinite(statistics.grad_norm)
        bad_2 = torch.stack([bad, bad_gradient])
        if self._first_bad_2 is None:
            self._first_bad_2 = torch.full((2,), -1, dtype=torch.long, device=bad_2.device)
        is_new_2 = bad_2 & (self._first_bad_2 < 0)
        self._first_bad_2 = torch.where(is_new_2, step, self._first_bad_2)
        if self.is_check_due(trainer, module, step):
            self.check(module)

    def check(self, module: LanguageModule) -> None:
        """Raise DivergedError if a step was bad: its samples, the checkpoint to go back to."""
        own = [-1, -1] if self._first_bad_2 is None else self._first_bad_2.tolist()
        # One rank's bad loss makes all gradients bad: they stop together, and name that rank.
        ranks = self.ranks
        if not ranks.any(own[1] >= 0):
            return
        firsts = ranks.all_gather_object(own)
        first = min(step for _, step in firsts if step >= 0)
        bad_ranks = [str(rank) for rank, (step, _) in enumerate(firsts) if step == first]
        where = f" on rank {', '.join(bad_ranks)}" if bad_ranks and ranks.world_size > 1 else ""
        reason = f"the loss or its gradient is NaN or infinite at step {first}{where}"
        samples = self.data.sample_numbers(first - 1)
        raise self.stop_error(module.config, reason, samples, first_bad=first, is_finite=False)


def overflowed(trainer: L.Trainer) -> bool:
    """Whether the strategy skipped the last step: DeepSpeed does after a NaN in a gradient."""
    return bool(getattr(trainer.strategy, "overflowed", False))
