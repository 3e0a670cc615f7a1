"""What the guards against steps that went wrong have in common."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import suppress
from typing import Any

import lightning as L

from modtrain.checkpoint.checkpointer import Checkpointer
from modtrain.common.errors import CheckpointError, TrainingError
from modtrain.data.stream.datamodule import TokenDataModule
from modtrain.distributed.process_group import Ranks
from modtrain.training.callbacks.step import StepCallback, is_due
from modtrain.training.module import LanguageModule
from modtrain.training.run_directory import RunDirectory
from modtrain.training.spikes.detector import ways_on


class Guard(StepCallback):
    """Stands before what must not happen after a bad step: a record, an evaluation, a checkpoint.

    Only when one of them is due does it look, which waits for the device.
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
        self._module: LanguageModule | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Know whose steps they are."""
        del trainer
        if isinstance(pl_module, LanguageModule):
            self._module = pl_module

    def on_save_checkpoint(self, *_args: Any) -> None:
        """Never let a state be saved that nobody has seen to be sound, whoever asks."""
        self.check()

    @abstractmethod
    def check(self) -> Any:
        """Act upon the steps since the last look; collective."""

    @property
    def module(self) -> LanguageModule:
        """The module that trains."""
        if self._module is None:
            raise RuntimeError("there is no training to guard")
        return self._module

    def looks(self, trainer: L.Trainer, step: int) -> bool:
        """Whether it is time to look: something is due, or the host knows of a bad step already."""
        last = self.module.plan.steps
        return overflowed(trainer) or any(is_due(step, every, last) for every in self.intervals)

    def stopped(self, said: str, samples: list[int], is_finite: bool) -> TrainingError:
        """Return what ends the run at a step; collective.

        said: the step and what is wrong. samples: its samples' numbers. is_finite: it has leapt,
        and is no NaN or infinity.
        """
        with suppress(CheckpointError):
            self.checkpointer.wait()
        good = self.checkpointer.latest(self.run.checkpoints)
        shown = ", ".join(map(str, samples[:64])) + (", …" if len(samples) > 64 else "")
        config = self.module.config
        return TrainingError(
            f"{said}; its samples are {shown}; the last good checkpoint is"
            f" {good[1] if good else 'none: the run had not saved yet'}.\n"
            f"remedy: {ways_on(config.spike, config.strategy.name, is_finite)}"
        )


def overflowed(trainer: L.Trainer) -> bool:
    """Whether the strategy left out the last step: DeepSpeed does it where a gradient is NaN."""
    return bool(getattr(trainer.strategy, "overflowed", False))
