"""One run from its configuration to its end, resumed where it was left."""

from __future__ import annotations

import logging
import warnings
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console

from modtrain.data.datamodule import TokenDataModule
from modtrain.training import checkpoint
from modtrain.training.callbacks.checkpoints import CheckpointCallback
from modtrain.training.callbacks.finite import FiniteLossGuard
from modtrain.training.callbacks.held_out import HeldOutCallback
from modtrain.training.callbacks.metrics import MetricsCallback, StepClock
from modtrain.training.callbacks.progress import ProgressCallback
from modtrain.training.checkpoint_io import ShardedCheckpointIO
from modtrain.training.config import TrainConfig
from modtrain.training.hardware import resolve_accelerator, resolve_precision
from modtrain.training.metrics_log import MetricsLog, read_metrics
from modtrain.training.module import LanguageModule
from modtrain.training.plan import TrainingPlan, resolve
from modtrain.training.preemption import STOP
from modtrain.training.run_directory import RunDirectory

_LIGHTNING_PRECISION: dict[str, Literal["32-true", "bf16-mixed"]] = {
    "fp32": "32-true",
    "bf16": "bf16-mixed",
}


@dataclass(frozen=True)
class Outcome:
    """How a run ended. status: ``complete``, ``already complete`` or ``stopped``."""

    status: str
    run: RunDirectory
    exit_code: int = 0


def train(config: TrainConfig) -> Outcome:
    """Train the run that ``config`` describes, from its newest whole checkpoint if it has one.

    Raises:
        ModtrainError: what a user can mend, with the remedy.
    """
    config, plan = resolve(config)
    # Frozen as it is here: on another device ``auto`` might mean another precision midway.
    accelerator = resolve_accelerator(config.strategy.accelerator)
    config = replace(config, precision=resolve_precision(config.precision, accelerator))
    run = RunDirectory.of(config)
    console = Console(soft_wrap=True)
    if run.is_complete:
        run.check_same(config)
        console.print(f"{run.path} is complete: nothing to train")
        return Outcome("already complete", run)
    with run.locked():
        return _train_locked(config, plan, run, console)


def _train_locked(
    config: TrainConfig, plan: TrainingPlan, run: RunDirectory, console: Console
) -> Outcome:
    if config.strategy.num_threads is not None:
        torch.set_num_threads(config.strategy.num_threads)
    data = TokenDataModule(
        config.data,
        micro_batch_size=config.batch.micro_batch_size,
        accumulate=plan.accumulate,
        num_steps=plan.steps,
        eval_batch_size=config.eval.batch_size,
        eval_sequences=config.eval.sequences,
    )
    device = resolve_accelerator(config.strategy.accelerator)
    run.start(config, data.index.summary.fingerprint, device)
    found = checkpoint.recover(run.checkpoints)
    start_step, path = found if found is not None else (0, None)
    if start_step:
        console.print(f"{run.path} goes on from step {start_step} of {plan.steps}")
    log = MetricsLog(run, plan, start_step, config.log.tensorboard)
    try:
        if start_step < plan.steps:
            reached = _fit(config, plan, run, data, log, start_step, path)
            if reached < plan.steps:
                return _stopped(run, console)
    finally:
        log.close()
    run.complete(_result(plan, run))
    console.print(f"{run.path} is complete: {plan.steps} steps, {plan.flops:.3g} FLOPs")
    return Outcome("complete", run)


def _fit(
    config: TrainConfig,
    plan: TrainingPlan,
    run: RunDirectory,
    data: TokenDataModule,
    log: MetricsLog,
    start_step: int,
    path: Path | None,
) -> int:
    """Train from ``start_step`` and return the step reached: the last one, or where it stopped."""
    L.seed_everything(config.seed, verbose=False)
    module = LanguageModule(config, plan)
    data.start_step = start_step
    accelerator = resolve_accelerator(config.strategy.accelerator)
    precision = config.precision
    clock = StepClock()
    metrics = MetricsCallback(log, clock, config.log.every, precision)
    held_out = HeldOutCallback(log, clock, config.eval.every)
    due = [config.log.every, config.checkpoint.every, config.eval.every or config.log.every]
    # In order: nothing may be recorded, judged or saved after a step that went wrong.
    callbacks: list[L.Callback] = [FiniteLossGuard(run, data, due), metrics, held_out]
    if config.log.progress:
        callbacks.append(ProgressCallback(metrics, str(config.name)))
    callbacks.append(CheckpointCallback(run, config.checkpoint, clock))
    trainer = make_trainer(config, plan, accelerator, precision, callbacks)
    # A SIGTERM after Lightning's handlers are set and before ours are again would end the process
    # with exit code 0. No step is lost by it, for none was made; but the run is unfinished.
    with suppress(SIGTERMException):
        trainer.fit(module, datamodule=data, ckpt_path=path)
    return trainer.global_step


def make_trainer(
    config: TrainConfig,
    plan: TrainingPlan,
    accelerator: str,
    precision: str,
    callbacks: list[L.Callback],
) -> L.Trainer:
    """Build Lightning's trainer with everything off that is done here in another way."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message="You passed in a `val_dataloader`")
    warnings.filterwarnings("ignore", message=".isinstance.treespec, LeafSpec.. is deprecated")
    return L.Trainer(
        accelerator=accelerator,
        devices=1,
        precision=_LIGHTNING_PRECISION[precision],
        max_steps=plan.steps,
        max_epochs=-1,
        accumulate_grad_batches=plan.accumulate,
        callbacks=callbacks,
        # One process, whatever it runs under: in a Slurm job Lightning would put its own requeueing
        # in place, which saves inside the signal handler.
        plugins=[ShardedCheckpointIO(), LightningEnvironment()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        deterministic=config.deterministic,
    )


def _stopped(run: RunDirectory, console: Console) -> Outcome:
    newest = checkpoint.latest(run.checkpoints)
    at = f"step {newest[0]} is saved" if newest else "nothing is saved yet"
    console.print(f"stopped by {STOP.name}: {at}; the same command goes on from there")
    return Outcome("stopped", run, STOP.exit_code)


def _result(plan: TrainingPlan, run: RunDirectory) -> dict[str, Any]:
    """Return what the run came to: its size, and the last value of each metric."""
    merged: dict[str, Any] = {}
    for record in read_metrics(run.metrics):
        merged.update(record)
    size = {"steps": plan.steps, "tokens": plan.tokens, "flops": plan.flops}
    return {**merged, **size}
