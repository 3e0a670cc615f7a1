"""Writes a run's records to TensorBoard: one event directory, and so one entry, for each run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from modtrain.common.atomic_io import name_file
from modtrain.training.config import TrainConfig
from modtrain.training.plan import TrainingPlan
from modtrain.training.run_directory import RunDirectory
from modtrain.training.tensorboard.hyperparameters import session_end, session_start
from modtrain.training.tensorboard.layout import tensorboard_layout
from modtrain.training.tensorboard.tags import flops_unit, tags_by_axis, tags_by_step

# What every record has beside its metrics.
_POSITION = ("step", "tokens", "flops")


class TensorBoardWriter:
    """Scalars by step; losses by tokens and FLOPs as well; pictures and histograms."""

    def __init__(
        self,
        run: RunDirectory,
        config: TrainConfig,
        plan: TrainingPlan,
        start_step: int,
        records: Iterable[dict[str, Any]],
    ) -> None:
        """Open the run's events.

        start_step: the checkpoint's; later events of an earlier start are dropped. records: those
        until then.
        """
        self._plan, self._last_step, self._folder = plan, start_step, run.tensorboard
        self._unit, self._unit_size = flops_unit(config.budget.flops or plan.flops)
        # Its thread's errors come without the file.
        with name_file(self._folder):
            self._open(run, config, records)

    def _open(
        self, run: RunDirectory, config: TrainConfig, records: Iterable[dict[str, Any]]
    ) -> None:
        has_events = any(run.tensorboard.glob("events.out.*"))
        # One file for everything: TensorBoard follows the newest file of a folder alone.
        self._writer = SummaryWriter(str(run.tensorboard), purge_step=self._last_step + 1)
        self._writer.add_custom_scalars(tensorboard_layout(config.model, self._unit))
        # `SummaryWriter.add_hparams` opens a writer, and so an entry, of its own.
        for summary in session_start(run, config, self._plan):
            self._file.add_summary(summary, 0)
        # Dropping by step also drops what has another axis. A run of an earlier version, or one
        # that lost its events, has none here.
        for record in records:
            values = {
                name: value
                for name, value in record.items()
                if name not in _POSITION and value is not None
            }
            self._write_by_axes(record["step"], values)
            if not has_events:
                self._write_by_step(record["step"], values)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Record ``values``."""
        self._last_step = step
        with name_file(self._folder):
            self._write_by_step(step, values)
            self._write_by_axes(step, values)

    def add_image(self, step: int, name: str, image_HWC: Tensor) -> None:
        """Record a picture."""
        with name_file(self._folder):
            self._writer.add_image(name, image_HWC, step, dataformats="HWC")

    def add_histogram(self, step: int, name: str, values_N: Tensor) -> None:
        """Record a distribution."""
        with name_file(self._folder):
            self._writer.add_histogram(name, values_N, step)

    def close(self) -> None:
        """Flush and close the files; a run at its end is marked as complete."""
        with name_file(self._folder):
            if self._last_step == self._plan.steps:
                self._file.add_summary(session_end(), 0)
            self._writer.close()

    @property
    def _file(self) -> Any:
        """The file of the events, which is there once something was written."""
        return self._writer.file_writer

    def _write_by_step(self, step: int, values: dict[str, float]) -> None:
        share = self._plan.flops_until(step) / self._plan.flops
        for tag, value in tags_by_step(values, share).items():
            self._writer.add_scalar(tag, value, step)

    def _write_by_axes(self, step: int, values: dict[str, float]) -> None:
        flops = round(self._plan.flops_until(step) / self._unit_size)
        axes = {"tokens": step * self._plan.tokens_per_step, self._unit: flops}
        for axis, position in axes.items():
            for tag, value in tags_by_axis(values, axis).items():
                self._writer.add_scalar(tag, value, position)
