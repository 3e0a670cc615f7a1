"""A trial in training: reports its losses to Optuna, and stops when Optuna prunes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import optuna

from modtrain.common.atomic_io import write_text
from modtrain.common.errors import TrainingError
from modtrain.experiments.search.config import SearchConfig
from modtrain.experiments.search.study import open_study
from modtrain.experiments.sweep.job_process import PRUNED
from modtrain.training.config import TrainConfig
from modtrain.training.metric_names import CAUSAL_LOSS
from modtrain.training.metrics_log import read_metrics
from modtrain.training.run import train
from modtrain.training.run_directory import RunDirectory


class PrunedError(TrainingError):
    """The trial was pruned by the search."""


class PruningCallback(L.Callback):
    """Reports each held-out causal loss to the study, and stops the run when it is pruned.

    Before a step it reads what the evaluation after the last step has written.
    """

    def __init__(self, run: RunDirectory, trial: optuna.Trial) -> None:
        self.run, self.trial = run, trial
        self._seen = -1

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Report a new loss. Raises PrunedError if the trial is pruned."""
        del pl_module, batch, batch_idx
        if trainer.global_step == self._seen:
            return
        self._seen = trainer.global_step
        records = read_metrics(self.run.metrics)
        if not records or CAUSAL_LOSS not in records[-1] or records[-1]["step"] != self._seen:
            return
        self.trial.report(records[-1][CAUSAL_LOSS], self._seen)
        if self.trial.should_prune():
            raise PrunedError(f"pruned at step {self._seen}")


def train_or_prune(config: TrainConfig, search: SearchConfig, number: int) -> int:
    """Train a trial's run; return its exit code, 0 for one that was pruned.

    With a pruner the study, which this process opens again, receives the losses.
    """
    run = RunDirectory.of(config)
    callbacks = []
    if search.pruner != "none":
        study = open_study(Path(search.runs_dir) / str(search.study), search)
        trial_id = study.get_trials(deepcopy=False)[number]._trial_id
        callbacks = [PruningCallback(run, optuna.Trial(study, trial_id))]
    try:
        outcome = train(config, callbacks)
    except PrunedError as pruned:
        write_text(run.path / PRUNED, f"{pruned}\n")
        return 0
    return outcome.exit_code
