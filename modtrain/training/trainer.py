"""Lightning's trainer, with everything off that is done here in another way."""

from __future__ import annotations

import logging
import warnings
from typing import Literal

import lightning as L
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from modtrain.distributed.launch import Launch
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
    """Build the trainer of a run, whose precision is resolved."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message="You passed in a `val_dataloader`")
    # Nothing here writes into what a layer returned.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    # What starts the processes is the user's choice.
    warnings.filterwarnings("ignore", message="The `srun` command is available on your system")
    warnings.filterwarnings("ignore", message=".isinstance.treespec, LeafSpec.. is deprecated")
    # What it runs under is ours to find out: in a Slurm job Lightning would put its own requeueing
    # in place, which saves inside the signal handler.
    several = launch.world_size > 1
    environment = TorchElasticEnvironment() if several else LightningEnvironment()
    trainer = L.Trainer(
        accelerator=resolve_accelerator(config.strategy.accelerator),
        strategy=strategy,
        devices=launch.local_world_size,
        num_nodes=launch.num_nodes,
        precision=_LIGHTNING_PRECISION[config.precision],
        max_steps=plan.steps,
        max_epochs=-1,
        accumulate_grad_batches=plan.accumulate,
        callbacks=callbacks,
        plugins=[environment],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        deterministic=config.deterministic,
    )
    # A rank whose Lightning sees a SIGTERM while it sets up ends alone, and the others wait for it.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return trainer
