"""Saves at intervals, at the end, and where a signal asks the run to stop."""

from __future__ import annotations

import lightning as L

from modtrain.training import checkpoint
from modtrain.training.callbacks.metrics import StepClock
from modtrain.training.callbacks.step import StepCallback, is_due
from modtrain.training.config import CheckpointConfig
from modtrain.training.module import LanguageModule
from modtrain.training.preemption import STOP
from modtrain.training.run_directory import RunDirectory


class CheckpointCallback(StepCallback):
    """Writes checkpoints, and removes old ones only when a newer one is safe on disk."""

    def __init__(self, run: RunDirectory, config: CheckpointConfig, clock: StepClock) -> None:
        self.run, self.config, self.clock = run, config, clock

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the signals back: Lightning has set handlers that would end the run unsaved."""
        del trainer, pl_module
        STOP.install()

    def on_step_end(self, trainer: L.Trainer, module: LanguageModule, step: int) -> None:
        """Save where it is due; after a stop signal save and end."""
        # Every rank has to come to one answer, or some would save and others train on.
        stop = trainer.strategy.reduce_boolean_decision(STOP.requested, all=False)
        if not stop and not is_due(step, self.config.every, module.plan.steps):
            return
        root = self.run.checkpoints
        with self.clock:
            trainer.save_checkpoint(checkpoint.checkpoint_path(root, step))
            if trainer.is_global_zero:
                checkpoint.prune(root, self.config.keep_last, self.config.keep_every)
        if stop:
            trainer.should_stop = True
