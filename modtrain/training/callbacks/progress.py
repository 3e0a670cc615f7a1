"""Shows a run's progress: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from modtrain.common.console import plain_console
from modtrain.training.callbacks.metrics import MetricsCallback
from modtrain.training.callbacks.step import StepCallback, language_module
from modtrain.training.module import LanguageModule

_SECONDS_BETWEEN_LINES = 10.0


class ProgressCallback(StepCallback):
    """Step, loss, tokens a second, FLOPs of the budget, time left. Never waits for the device."""

    def __init__(self, metrics: MetricsCallback, label: str) -> None:
        self.metrics, self.label = metrics, label
        self.console = plain_console()
        self._bar: Progress | None = None
        self._task: Any = None
        self._started = self._last_line = 0.0
        self._start_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the bar."""
        steps = language_module(pl_module).plan.steps
        self._started = self._last_line = time.monotonic()
        self._start_step = trainer.global_step
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("step {task.completed:.0f}/{task.total:.0f}  {task.fields[figures]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._bar.add_task(
                self.label, total=steps, completed=trainer.global_step, figures=""
            )
            self._bar.start()

    def on_step_end(self, trainer: L.Trainer, module: LanguageModule, step: int) -> None:
        """Update the bar, or print a line every few seconds."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=self._figures(module, step))
            return
        now = time.monotonic()
        if now - self._last_line >= _SECONDS_BETWEEN_LINES or step == module.plan.steps:
            self._last_line = now
            left = (now - self._started) / (step - self._start_step) * (module.plan.steps - step)
            figures = self._figures(module, step)
            text = f"{self.label}: step {step}/{module.plan.steps}  {figures}  {left:.0f} s left"
            self.console.print(text, soft_wrap=True)

    def on_train_end(self, *_args: Any) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_exception(self, *_args: Any) -> None:
        """Close the bar, so that the message has a line of its own."""
        self.on_train_end()

    def _figures(self, module: LanguageModule, step: int) -> str:
        plan, latest = module.plan, self.metrics.latest
        parts = [f"{plan.flops_until(step):.3g} of {plan.flops:.3g} FLOPs"]
        if "throughput/tokens_per_second" in latest:
            parts.insert(0, f"{latest['throughput/tokens_per_second']:,.0f} tokens/s")
        if "loss" in latest:
            parts.insert(0, f"loss {latest['loss']:.3f}")
        return "  ".join(parts)
