"""Tells the rank's watch that the main thread gets on."""

from __future__ import annotations

from typing import Any

import lightning as L

from modtrain.training.watch import Watch


class WatchCallback(L.Callback):
    """Ticks before and after each micro-batch."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Say which step begins, or goes on."""
        del pl_module, batch, batch_idx
        self.watch.tick(f"step {trainer.global_step + 1}")

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
