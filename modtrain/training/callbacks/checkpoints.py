"""Saves at intervals, at the end, and after a signal that asks the run to stop."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import lightning as L

from modtrain.checkpoint.checkpointer import Checkpointer
from modtrain.checkpoint.layout import checkpoint_path
from modtrain.distributed.process_group import Ranks
from modtrain.training.callbacks.metrics import StepClock
from modtrain.training.callbacks.step import StepCallback
from modtrain.training.config import CheckpointConfig
from modtrain.training.module import LanguageModule
from modtrain.training.run_directory import RunDirectory
from modtrain.training.schedules import is_due
from modtrain.training.stop_signal import STOP

log = logging.getLogger(__name__)


@dataclass(eq=False)
class CheckpointCallback(StepCallback):
    """Saves checkpoints; old ones are removed only when a newer one is on disk."""

    run: RunDirectory
    config: CheckpointConfig
    clock: StepClock
    checkpointer: Checkpointer
    ranks: Ranks

    def on_train_start(self, *_args: Any) -> None:
        """Install the signal handlers, also for a run that no command line started."""
        STOP.install()

    def on_step_end(self, trainer: L.Trainer, module: LanguageModule, step: int) -> None:
        """Save when it is due; after a stop signal save and end."""
        # All ranks must agree: a save is collective.
        stop, is_last = self.ranks.any_at_last_call(STOP.requested), step == module.plan.steps
        is_kept = step in self.config.keep_steps
        if not stop and not is_kept and not is_due(step, self.config.every, module.plan.steps):
            self.checkpointer.poll()
            return
        trainer.should_stop |= stop
        if stop and not is_last and not self._has_time_to_save(step):
            return
        options = {"blocking": stop or is_last or not self.config.background}
        with self.clock:
            path = checkpoint_path(self.run.checkpoints, step)
            trainer.save_checkpoint(path, storage_options=options)

    def _has_time_to_save(self, step: int) -> bool:
        """Whether a save will finish before the process is killed, as far as is known."""
        left, needed = STOP.seconds_left, self.checkpointer.longest_save
        is_late = left is not None and needed > left
        # A rank that received no signal knows no deadline.
        if not self.ranks.any(is_late):
            return True
        if self.ranks.is_rank0:
            log.warning(
                "step %d is not saved: a save takes %.0f s, and %s s are left. The steps after the"
                " last checkpoint will be repeated; to lose less, set a longer cluster.lead or"
                " cluster.grace, or save more often",
                *(step, needed, "fewer" if left is None else f"{left:.0f}"),
            )
        return False
