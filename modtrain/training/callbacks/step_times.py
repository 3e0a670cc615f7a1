"""Compares what the processes of a run take for their own part of a step, and names slow ones."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from torch import Tensor

from modtrain.distributed.launch import node_name
from modtrain.distributed.process_group import Ranks
from modtrain.training.callbacks.step import StepCallback, language_module
from modtrain.training.metrics_log import MetricsLog
from modtrain.training.module import LanguageModule
from modtrain.training.run_directory import RunDirectory
from modtrain.training.schedules import is_due
from modtrain.training.step_times import (
    StragglerDetector,
    record_step_times,
    write_slow_nodes,
)

# Rows of the square matrices that are multiplied, in fp32: a millisecond or less.
_SIZE = {"cuda": 2048, "cpu": 192}
# The least of so many: another process may have the processor meanwhile.
_TRIES = 3
# Of more ranks TensorBoard has the slowest of each node alone.
_MAX_RANKS = 64


@dataclass(eq=False)
class StepTimesCallback(StepCallback):
    """Measures the last step before each record; it comes after the callbacks that record and save.

    A step never waits for the device here: events are read after a record, which has waited.
    """

    run: RunDirectory
    metrics_log: MetricsLog
    every: int
    ranks: Ranks
    report: Callable[[str], None]
    _detector: StragglerDetector | None = field(default=None, init=False)
    _spans: list[Callable[[], float]] = field(default_factory=list, init=False)
    _end_span: Callable[[], None] | None = field(default=None, init=False)
    _batch_end: float | None = field(default=None, init=False)
    _data_seconds: float = field(default=0.0, init=False)
    _last: tuple[int, float] = field(default=(0, 0.0), init=False)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Exchange the nodes' names."""
        self._detector = StragglerDetector(self.ranks.all_gather_object(node_name()))
        self._last = (trainer.global_step, time.perf_counter())
        self._batch_end = None
        if self.ranks.is_rank0:
            # Those of an earlier start may have been left out.
            write_slow_nodes(self.run.path, trainer.global_step, [])

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *_args: Any
    ) -> None:
        """Note how long the batch took to come, and when its forward pass begins."""
        if self._batch_end is not None:
            self._data_seconds += time.perf_counter() - self._batch_end
        module = language_module(pl_module)
        if is_due(trainer.global_step + 1, self.every, module.plan.steps):
            self._begin_span(module.device)

    def on_before_backward(self, *_args: Any) -> None:
        """Note when the forward pass ends."""
        if self._end_span is not None:
            self._end_span()
            self._end_span = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Compare the ranks when a record was due; note when the wait for the next batch begins."""
        super().on_train_batch_end(trainer, pl_module, *args)
        self._batch_end = time.perf_counter()

    def on_step_end(self, trainer: L.Trainer, module: LanguageModule, step: int) -> None:
        """Compare the ranks when a record is due; collective."""
        if not is_due(step, self.every, module.plan.steps):
            return
        (last, since), now = self._last, time.perf_counter()
        self._last = (step, now)
        steps = max(1, step - last)
        forward = sum(span() for span in self._spans)
        own = (self._data_seconds / steps, forward, product_seconds(module.device))
        self._spans.clear()
        self._data_seconds = 0.0
        seconds = self._gather(own)
        if self.ranks.is_rank0 and self._detector is not None:
            self._compare(step, (now - since) / steps, seconds, self._detector)

    def _begin_span(self, device: torch.device) -> None:
        if device.type != "cuda":
            began = time.perf_counter()

            def end() -> None:
                seconds = time.perf_counter() - began
                self._spans.append(lambda: seconds)

            self._end_span = end
            return
        first = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        last = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        first.record()

        def end_on_device() -> None:
            last.record()
            self._spans.append(lambda: first.elapsed_time(last) / 1000)

        self._end_span = end_on_device

    def _gather(self, own: tuple[float, float, float]) -> dict[str, list[float]]:
        """Return each kind's seconds of all ranks; collective."""
        table_RK = torch.zeros(self.ranks.world_size, len(own), dtype=torch.float64)
        table_RK[self.ranks.rank] = torch.tensor(own, dtype=torch.float64)
        columns = self.ranks.sum(table_RK).T.tolist()
        return dict(zip(("data", "forward", "product"), columns, strict=True))

    def _compare(
        self,
        step: int,
        step_seconds: float,
        seconds: dict[str, list[float]],
        detector: StragglerDetector,
    ) -> None:
        before = list(detector.slow)
        for slow in detector.update(step, step_seconds, seconds):
            self.report(f"warning: step {step:,}: {slow}, since step {slow.since:,}")
        record_step_times(self.run.path, step, detector.nodes, seconds)
        if before or detector.slow:
            write_slow_nodes(self.run.path, step, detector.slow)
        own = [sum(pair) for pair in zip(seconds["data"], seconds["forward"], strict=True)]
        by_node: dict[str, float] = {}
        for name, value in zip(detector.nodes, own, strict=True):
            by_node[name] = max(value, by_node.get(name, 0.0))
        values = {f"seconds_by_node/{name}": value for name, value in by_node.items()}
        if len(own) <= _MAX_RANKS:
            values |= {f"seconds_by_rank/{rank:03}": value for rank, value in enumerate(own)}
        self.metrics_log.add_scalars(step, values)


def product_seconds(device: torch.device) -> float:
    """Return how long the device takes for a matrix product of fixed size; it waits for it.

    0 where that is not measured: on other devices, and where its memory is full.
    """
    size = _SIZE.get(device.type)
    if size is None:
        return 0.0
    # No random numbers, of which training would notice.
    try:
        matrix = torch.full((size, size), 0.5, device=device)
        return min(_timed_product(matrix) for _ in range(_TRIES))
    except torch.OutOfMemoryError:
        return 0.0


def _timed_product(matrix: Tensor) -> float:
    on_cuda = matrix.device.type == "cuda"
    if on_cuda:
        torch.cuda.synchronize(matrix.device)
    began = time.perf_counter()
    with torch.no_grad():
        torch.mm(matrix, matrix)
    if on_cuda:
        torch.cuda.synchronize(matrix.device)
    return time.perf_counter() - began
