"""Sends the watchdog a heartbeat whenever the main thread makes progress."""

from __future__ import annotations

from typing import Any

import lightning as L

from modtrain.distributed.watchdog import SLOW_TIMEOUT, Watchdog
from modtrain.training.module import LanguageModule


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
        """Report the step that this micro-batch belongs to."""
        step = trainer.global_step
        timeout = SLOW_TIMEOUT if self._may_compile(pl_module, step) else 0.0
        self.watchdog.heartbeat(f"step {step + 1}", timeout)

    def on_train_batch_end(self, trainer: L.Trainer, *_args: Any) -> None:
        """Report the end of a micro-batch and of what the callbacks before did after it."""
        self.watchdog.heartbeat(f"the end of step {trainer.global_step}")

    def on_save_checkpoint(self, trainer: L.Trainer, *_args: Any) -> None:
        """Allow for the time of a save: it may wait for the save before, and for the disk."""
        self.watchdog.heartbeat(f"the save of step {trainer.global_step}", SLOW_TIMEOUT)

    def _may_compile(self, module: L.LightningModule, step: int) -> bool:
        """Whether step ``step``, counted from 0, may compile."""
        if not isinstance(module, LanguageModule) or not module.config.compile:
            return False
        return step in (self._first_step, *(stage.first for stage in module.plan.stages))
