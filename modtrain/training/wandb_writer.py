"""Metrics on Weights & Biases, of the extra ``modtrain[wandb]``.

Where they go follows wandb's own environment variables: WANDB_MODE=offline writes below the run's
directory alone, for `wandb sync` later; WANDB_ENTITY, WANDB_BASE_URL and the like hold as usual.
"""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from uuid import uuid4

import wandb
from torch import Tensor

from modtrain.common.atomic_io import write_text
from modtrain.common.errors import TrainingError
from modtrain.common.reading import UnreadableError, read_or_set_aside, read_text
from modtrain.training.config import TrainConfig
from modtrain.training.plan import TrainingPlan
from modtrain.training.run_directory import RunDirectory

_ID = "wandb_id"
_MAX_ID_BYTES = 200
_AXES = ("step", "tokens", "TFLOPs")


class WandbWriter:
    """One run on Weights & Biases, the same over requeues and resumes.

    Its id is in the file ``wandb_id`` of the run. wandb can take no record back: steps between the
    checkpoint that a run resumes from and its end before stand there twice, with the same values.
    """

    def __init__(self, run: RunDirectory, config: TrainConfig, plan: TrainingPlan) -> None:
        """Start, or resume.

        Raises:
            TrainingError: wandb cannot start: no key, or no network.
        """
        self._plan = plan
        try:
            self.run = wandb.init(
                project=config.log.wandb_project,
                id=_run_id(run.path / _ID),
                name=str(config.name),
                resume="allow",
                dir=run.path,
                config=asdict(config),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.Error as error:
            raise TrainingError(
                f"log.wandb: wandb does not start: {error}\n"
                "remedy: wandb login, or WANDB_MODE=offline, or log.wandb=false"
            ) from error
        # Its own step would have to rise, and a resumed run goes back to its checkpoint.
        for axis in _AXES:
            self.run.define_metric(axis, hidden=True)
        self.run.define_metric("*", step_metric="step")

    def write(self, step: int, values: dict[str, float]) -> None:
        """Record ``values`` at a step, with its position on the other axes."""
        self.run.log({**self._positions(step), **values})

    def add_image(self, step: int, name: str, image_HWC: Tensor) -> None:
        """Record a picture of bytes."""
        self.run.log({**self._positions(step), name: wandb.Image(image_HWC.numpy())})

    def add_histogram(self, step: int, name: str, values_N: Tensor) -> None:
        """Record a distribution."""
        self.run.log({**self._positions(step), name: wandb.Histogram(values_N.numpy())})

    def close(self) -> None:
        """Wait until everything is written or sent."""
        self.run.finish()

    def _positions(self, step: int) -> dict[str, float]:
        tokens, flops = step * self._plan.tokens_per_step, self._plan.flops_until(step)
        return dict(zip(_AXES, (step, tokens, flops / 1e12), strict=True))


def _run_id(path: Path) -> str:
    known = read_or_set_aside(path, _read_id)
    if known is None:
        known = uuid4().hex[:16]
        write_text(path, known + "\n")
    return known


def _read_id(path: Path) -> str:
    text = read_text(path, _MAX_ID_BYTES).strip()
    if not re.fullmatch(r"[\w-]+", text):
        raise UnreadableError(f"{path.name} has no id")
    return text
