"""The base of the callbacks that stop or redirect a run after a bad step."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import suppress
from typing import Any

import lightning as L

from modtrain.checkpoint.checkpointer import Checkpointer
from modtrain.checkpoint.recovery import latest
from modtrain.common.errors import CheckpointError, TrainingError
from modtrain.data.stream.datamodule import TokenDataModule
from modtrain.distributed.process_group import Ranks
from modtrain.training.callbacks.step import StepCallback, is_due, language_module
from modtrain.training.config import TrainConfig
from modtrain.training.module import LanguageModule
from modtrain.training.run_directory import RunDirectory
from modtrain.training.spikes.config import resume_remedy


class Guard(StepCallback):
    """Prevents records, evaluations and checkpoints after a bad step.

    It checks only when one of them is due, because a check waits for the device.
    """

    def __init__(
        self,
        run: RunDirectory,
        data: TokenDataModule,
        intervals: list[int],
        checkpointer: Checkpointer,
        ranks: Ranks,
    ) -> None:
        """intervals: steps between two records, checkpoints and so on, the records' first."""
        self.run, self.data, self.intervals = run, data, intervals
        self.checkpointer, self.ranks = checkpointer, ranks

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
        self, config: TrainConfig, reason: str, samples: list[int], is_finite: bool
    ) -> TrainingError:
        """Return the error that ends the run at a step; collective.

        reason: the step and what is wrong. samples: its samples' numbers. is_finite: the step is a
        spike, and no NaN or infinity.
        """
        with suppress(CheckpointError):
            self.checkpointer.wait()
        good = latest(self.run.checkpoints, self.ranks)
        shown = ", ".join(map(str, samples[:64])) + (", …" if len(samples) > 64 else "")
        return TrainingError(
            f"{reason}; its samples are {shown}; the last good checkpoint is"
            f" {good[1] if good else 'none: the run had not saved yet'}.\n"
            f"remedy: {resume_remedy(config.spike, config.strategy.name, is_finite)}"
        )


def overflowed(trainer: L.Trainer) -> bool:
    """Whether the strategy skipped the last step: DeepSpeed does after a NaN in a gradient."""
    return bool(getattr(trainer.strategy, "overflowed", False))
