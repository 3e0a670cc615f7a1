"""Tells the rank's watch that the main thread gets on."""

from __future__ import annotations

from typing import Any

import lightning as L

from modtrain.distributed.watchdog import PATIENCE, Watch
from modtrain.training.module import LanguageModule


class WatchCallback(L.Callback):
    """Ticks before and after each micro-batch, and before what waits for disks or the compiler."""

    def __init__(self, watch: Watch) -> None:
        self.watch, self._first_step = watch, 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give a checkpoint its time to be read."""
        del trainer, pl_module, stage
        self.watch.tick("the setting up", PATIENCE)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note which step is the first."""
        del pl_module
        self._first_step = trainer.global_step
        self.watch.tick("the start of training")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Say which step begins, or goes on."""
        del batch, batch_idx
        step = trainer.global_step
        patience = PATIENCE if self._compiles(pl_module, step) else 0.0
        self.watch.tick(f"step {step + 1}", patience)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Say that it is over, and what comes between steps with it."""
        del pl_module, outputs, batch, batch_idx
        self.watch.tick(f"the end of step {trainer.global_step}")

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Give a save its time: it may wait for the one before, and for the disk."""
        del pl_module, checkpoint
        self.watch.tick(f"the save of step {trainer.global_step}", PATIENCE)

    def _compiles(self, module: L.LightningModule, step: int) -> bool:
        """Whether the compiler may have to work in step ``step``, counted from 0."""
        if not isinstance(module, LanguageModule) or not module.config.compile:
            return False
        return step in (self._first_step, *(stage.first for stage in module.plan.stages))
