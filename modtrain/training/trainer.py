"""Builds Lightning's trainer for a run."""

from __future__ import annotations

from typing import Literal

import lightning as L

from modtrain.distributed.launch import Launch
from modtrain.parallel.lightning_overrides import (
    SWITCHED_OFF,
    cluster_environment,
    disable_signal_handlers,
    silence_messages,
)
from modtrain.parallel.strategies.base import TrainingStrategy
from modtrain.training.config import TrainConfig
from modtrain.training.hardware import resolve_accelerator
from modtrain.training.plan import TrainingPlan

_LIGHTNING_PRECISION: dict[str, Literal["32-true", "bf16-mixed"]] = {
    "fp32": "32-true",
    "bf16": "bf16-mixed",
}


def make_trainer(
    config: TrainConfig,
    plan: TrainingPlan,
    strategy: TrainingStrategy,
    launch: Launch,
    callbacks: list[L.Callback],
) -> L.Trainer:
    """Build the trainer of a run whose precision is resolved."""
    silence_messages()
    trainer = L.Trainer(
        accelerator=resolve_accelerator(config.strategy.accelerator),
        strategy=strategy,
        devices=launch.local_world_size,
        num_nodes=launch.num_nodes,
        precision=_LIGHTNING_PRECISION[config.precision],
        max_steps=plan.steps,
        accumulate_grad_batches=plan.accumulate,
        callbacks=callbacks,
        plugins=[cluster_environment(launch)],
        deterministic=config.deterministic,
        **SWITCHED_OFF,
    )
    disable_signal_handlers(trainer)
    return trainer
