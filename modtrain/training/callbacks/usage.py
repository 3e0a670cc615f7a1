"""Keeps the record of what a run uses up to date."""

from __future__ import annotations

import lightning as L

from modtrain.training.callbacks.metrics import MetricsCallback
from modtrain.training.callbacks.step import StepCallback
from modtrain.training.module import LanguageModule
from modtrain.training.schedules import is_due
from modtrain.training.usage import UsageRecord


class UsageCallback(StepCallback):
    """Takes over what a record has of the time; it comes after `MetricsCallback`."""

    def __init__(self, usage: UsageRecord, metrics: MetricsCallback) -> None:
        self.usage, self.metrics = usage, metrics
        self._last_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the first step."""
        self._last_step = trainer.global_step

    def on_step_end(self, trainer: L.Trainer, module: LanguageModule, step: int) -> None:
        """Note the steps since the last record."""
        if is_due(step, self.metrics.every, module.plan.steps):
            steps, self._last_step = step - self._last_step, step
            pace = self.metrics.latest.get("throughput/step_seconds", 0.0)
            self.usage.update(step, module.plan.flops_until(step), steps * pace)
