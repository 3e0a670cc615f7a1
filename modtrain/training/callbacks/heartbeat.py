"""Sends the watchdog a heartbeat whenever the main thread makes progress."""

from __future__ import annotations

from typing import Any

import lightning as L

from modtrain.distributed.watchdog import SLOW_TIMEOUT, Watchdog
from modtrain.training.callbacks.step import language_module


class HeartbeatCallback(L.Callback):
    """Heartbeats around each micro-batch, and before slow work of disks or the compiler."""

    def __init__(self, watchdog: Watchdog) -> None:
        self.watchdog, self._first_step = watchdog, 0

    def setup(self, *_args: Any, **_kwargs: Any) -> None:
        """Allow for the time that loading a checkpoint takes."""
        self.watchdog.heartbeat("the setup", SLOW_TIMEOUT)

    def on_train_start(self, trainer: L.Trainer, *_args: Any) -> None:
        """Note the first step."""
        self._first_step = trainer.global_step
        self.watchdog.heartbeat("the start of training")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *_args: Any
    ) -> None:
        """Report the step of this micro-batch, which may compile another graph."""
        module, step = language_module(pl_module), trainer.global_step
        with_new_graph = (self._first_step, *(stage.first for stage in module.plan.stages))
        may_compile = module.config.compile and step in with_new_graph
        self.watchdog.heartbeat(f"step {step + 1}", SLOW_TIMEOUT if may_compile else 0.0)

    def on_train_batch_end(self, trainer: L.Trainer, *_args: Any) -> None:
        """Report the end of a micro-batch and of what the callbacks before did after it."""
        self.watchdog.heartbeat(f"the end of step {trainer.global_step}")

    def on_save_checkpoint(self, trainer: L.Trainer, *_args: Any) -> None:
        """Allow for the time of a save: it may wait for the save before, and for the disk."""
        self.watchdog.heartbeat(f"the save of step {trainer.global_step}", SLOW_TIMEOUT)
