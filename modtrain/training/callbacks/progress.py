"""Shows a run's progress: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import lightning as L
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from modtrain.common.terminal import plain_console
from modtrain.training.callbacks.metrics import MetricsCallback
from modtrain.training.callbacks.step import StepCallback, language_module
from modtrain.training.metric_names import PROGRESS_MARK
from modtrain.training.module import LanguageModule

_SECONDS_BETWEEN_LINES = 10.0
_SHORTEST_BAR, _LONGEST_LABEL = 8, 16
# Of the bar: its shortest, "step /", two times, "left", and a space between all of them.
_BESIDE_FIGURES = _SHORTEST_BAR + 6 + 7 + 7 + 4 + 5


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
            self._bar = _bar(self.console)
            self._task = self._bar.add_task(
                self.label, total=steps, completed=trainer.global_step, figures=""
            )
            self._bar.start()

    def on_step_end(self, trainer: L.Trainer, module: LanguageModule, step: int) -> None:
        """Update the bar, or print a line every few seconds."""
        if self._bar is not None:
            width = self.console.width - _BESIDE_FIGURES - min(cell_len(self.label), _LONGEST_LABEL)
            width -= 2 * len(str(module.plan.steps))
            figures = "".join(self._fitting(module, step, width))
            self._bar.update(self._task, completed=step, figures=figures)
            return
        now = time.monotonic()
        if now - self._last_line >= _SECONDS_BETWEEN_LINES or step == module.plan.steps:
            self._last_line = now
            left = (now - self._started) / (step - self._start_step) * (module.plan.steps - step)
            figures = "".join(f"  {text}" for text in self._figures(module, step))
            text = (
                f"{self.label}{PROGRESS_MARK}{step}/{module.plan.steps}{figures}  {left:.0f} s left"
            )
            self.console.print(text, soft_wrap=True)

    def on_train_end(self, *_args: Any) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_exception(self, *_args: Any) -> None:
        """Close the bar, so that the message has a line of its own."""
        self.on_train_end()

    def _fitting(self, module: LanguageModule, step: int, width: int) -> Iterator[str]:
        """Yield the figures that fit into ``width`` characters."""
        for text in self._figures(module, step):
            width -= len(text) + 2
            if width < 0:
                return
            yield f"  {text}"

    def _figures(self, module: LanguageModule, step: int) -> Iterator[str]:
        """Yield the figures, what matters most first."""
        plan, latest = module.plan, self.metrics.latest
        if "loss" in latest:
            yield f"loss {latest['loss']:.3f}"
        if "throughput/tokens_per_second" in latest:
            yield f"{latest['throughput/tokens_per_second']:,.0f} tokens/s"
        yield f"{plan.flops_until(step):.3g} of {plan.flops:.3g} FLOPs"


def _bar(console: Console) -> Progress:
    """Return the bar, which takes the width that is left by the rest."""
    label = Column(no_wrap=True, overflow="ellipsis", max_width=_LONGEST_LABEL)
    whole = partial(Column, no_wrap=True)
    shown = "step {task.completed:.0f}/{task.total:.0f}{task.fields[figures]}"
    return Progress(
        TextColumn("{task.description}", markup=False, table_column=label),
        BarColumn(bar_width=None, table_column=Column(min_width=_SHORTEST_BAR, ratio=1)),
        TextColumn(shown, markup=False, table_column=whole()),
        TimeElapsedColumn(table_column=whole()),
        TextColumn("left", table_column=whole()),
        TimeRemainingColumn(table_column=whole()),
        console=console,
        expand=True,
    )
