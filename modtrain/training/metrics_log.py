"""Metrics as one line of JSON a record, and in TensorBoard by step, tokens and TFLOPs."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from modtrain.common.atomic_io import write_text
from modtrain.training.plan import TrainingPlan
from modtrain.training.run_directory import RunDirectory


class MetricsLog:
    """Writes each record with its step, tokens and FLOPs; on several ranks rank 0 does.

    A resumed run first removes the records after its checkpoint, so that every step is there once.
    """

    def __init__(
        self,
        run: RunDirectory,
        plan: TrainingPlan,
        start_step: int,
        tensorboard: bool,
        writes: bool = True,
    ) -> None:
        """Open the files. writes: False on ranks that do not write."""
        self.plan = plan
        self._file: TextIO | None = None
        self._writers: dict[str, SummaryWriter] = {}
        if not writes:
            return
        keep_metrics(run.metrics, lambda record: record["step"] <= start_step)
        self._file = run.metrics.open("a")
        # TensorBoard's step is an integer, and a file has one kind of step: one file for each axis.
        # FLOPs do not fit into 64 bits; TFLOPs do.
        if tensorboard:
            self._writers = {
                axis: SummaryWriter(str(run.tensorboard / f"by_{axis}"), purge_step=start + 1)
                for axis, start in self._positions(start_step).items()
            }

    def write(self, step: int, values: dict[str, float]) -> None:
        """Record ``values`` as of the end of optimizer step ``step``."""
        if self._file is None:
            return
        record: dict[str, Any] = {
            "step": step,
            "tokens": step * self.plan.tokens_per_step,
            "flops": self.plan.flops_until(step),
            **values,
        }
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        positions = self._positions(step)
        for axis, writer in self._writers.items():
            for name, value in values.items():
                if axis == "step":
                    writer.add_scalar(name, value, step)
                elif name.startswith(("loss", "held_out")):
                    writer.add_scalar(f"{name} by {axis}", value, positions[axis])

    def add_image(self, step: int, name: str, image_CHW: Tensor) -> None:
        """Record an image in TensorBoard."""
        if writer := self._writers.get("step"):
            writer.add_image(name, image_CHW, step)

    def close(self) -> None:
        """Flush and close everything."""
        if self._file is not None:
            self._file.close()
        for writer in self._writers.values():
            writer.close()

    def _positions(self, step: int) -> dict[str, int]:
        """Return where ``step`` stands on each of TensorBoard's axes."""
        teraflops = round(self.plan.flops_until(step) / 1e12)
        return {"step": step, "tokens": step * self.plan.tokens_per_step, "TFLOPs": teraflops}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics file, without a line that a kill truncated."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text().splitlines():
        with suppress(ValueError):
            records.append(json.loads(line))
    return records


def keep_metrics(path: Path, is_kept: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite the file, if there is one, with those of its records that ``is_kept`` accepts."""
    if path.is_file():
        kept = filter(is_kept, read_metrics(path))
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
