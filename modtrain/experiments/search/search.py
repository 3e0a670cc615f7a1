"""A search by Optuna whose trials are runs, each in a directory of its own.

The worker of a trial holds a lock that ends with its process. An unfinished trial without a lock is
resumed with the same parameters from its checkpoint, so a search may be killed and may have several
workers: no trial is lost or made twice. The study is in `modtrain.experiments.search.study`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from modtrain.common.atomic_io import acquire_lock, write_text
from modtrain.common.errors import ConfigError, Problem, raise_if_any
from modtrain.common.renamed_keys import new_name, translate_flat
from modtrain.common.terminal import last_output, print_line
from modtrain.distributed.launch import Launch
from modtrain.experiments.search.config import Dimension, Search, SearchConfig, parse_space
from modtrain.experiments.search.finite import draw_untried, num_points
from modtrain.experiments.search.study import open_study
from modtrain.experiments.sweep.job_process import PRUNED, failure_text, run_in_process, state_of
from modtrain.experiments.sweep.jobs import SweepJob, write_jobs
from modtrain.training.config import TrainConfig
from modtrain.training.metric_names import CAUSAL_LOSS
from modtrain.training.plan import forward_flops_per_token, resolve
from modtrain.training.run_directory import RunDirectory
from modtrain.training.stop_signal import STOP
from modtrain.training.tensorboard.hyperparameters import declare

# Seconds between two checks for a free trial.
_POLL_SECONDS = 5.0
_DONE = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
_UNFINISHED = (TrialState.RUNNING, TrialState.WAITING)


def search(search: Search) -> int:
    """Run the trials that the study lacks, one after the other, and report the best.

    Returns:
        0 where the study has all its trials; 130 or 75 where a signal stopped it, or other workers
        are still running; 1 where no trial completed.

    Raises:
        ModtrainError: the study has other settings, this process is one of several, or the file
            system has no locks.
    """
    if (processes := Launch.from_environment().world_size) > 1:
        reason = f"trains in one process, but {processes} were started"
        remedy = "run it without torchrun or srun; for several workers start it several times"
        raise ConfigError([Problem("search", "", reason, remedy)])
    return _Searcher(search).run()


class _Searcher:
    """One worker of a search."""

    def __init__(self, search: Search) -> None:
        self.search, self.config, self.directory = search, search.config, search.directory
        self.dimensions, _ = parse_space(self.config.space)
        # Check the ends of the space before the study is created.
        shared = self._check_ends()
        self.directory.mkdir(parents=True, exist_ok=True)
        with self._locked():
            self.study = open_study(self.directory, self.config, shared)
            declare(self.directory, list(self.config.space))
        space = self.study.user_attrs["space"]
        # Names under which the study knows keys that were renamed since it began.
        self.names = {new: key for key in space if (new := new_name(key)) is not None}

    def run(self) -> int:
        """Work until the study has its trials."""
        while not STOP.requested:
            with ExitStack() as locks:
                trial = self._claim(locks)
                if trial is not None:
                    self._run_trial(trial)
                    continue
            if not self.study.get_trials(deepcopy=False, states=_UNFINISHED):
                break
            # A worker may die, which frees its trial.
            STOP.pause(_POLL_SECONDS)
        return self._report()

    def _check_ends(self) -> TrainConfig:
        """Return the trial at the first of all ends, resolved; raise all that is wrong at any."""
        problems: dict[Problem, None] = {}
        resolved: list[TrainConfig] = []
        for overrides in self._end_points():
            try:
                trial = self.search.compose(overrides, self._name(0))
                resolved.append(resolve(trial, launch=Launch())[0])
            except ConfigError as error:
                problems |= dict.fromkeys(error.problems)
        raise_if_any(list(problems))
        return resolved[0]

    def _end_points(self) -> list[list[str]]:
        """Each dimension at each of its ends, the others at their first."""
        first = {d.key: d.ends[0] for d in self.dimensions}
        tried = [first] + [first | {d.key: end} for d in self.dimensions for end in d.ends[1:]]
        return [[f"{key}={value}" for key, value in at.items()] for at in tried]

    def _claim(self, locks: ExitStack) -> optuna.Trial | None:
        """Acquire an unfinished trial without a worker, or a new one; None if there is neither."""
        with self._locked():
            trials = self.study.get_trials(deepcopy=False)
            for frozen in trials:
                if frozen.state not in _DONE and self._acquire(frozen.number, locks):
                    return optuna.Trial(self.study, frozen._trial_id)
            if len(trials) >= self.config.trials:
                return None
            trial = self._new_trial(len(trials))
            if trial is not None:
                self._acquire(trial.number, locks)
            return trial

    def _new_trial(self, number: int) -> optuna.Trial | None:
        """Add a trial with its values to the study; None where it has each point of the space."""
        # Each start draws other values.
        seed = self.config.search_seed + number
        self.study.sampler = optuna.samplers.TPESampler(seed=seed)
        named = {self.names.get(d.key, d.key): d for d in self.dimensions}
        if num_points(self.dimensions) is not None:
            values = draw_untried(self.study, named, seed)
            if values is None:
                return None
            self.study.enqueue_trial(values)
        trial = self.study.ask()
        for name, dimension in named.items():
            # Now, so that other workers see which point this is.
            dimension.suggest(trial, name)
        return trial

    def _acquire(self, number: int, locks: ExitStack) -> bool:
        path = self._run(number).path
        path.mkdir(parents=True, exist_ok=True)
        try:
            locks.enter_context(acquire_lock(path / ".claim"))
        except BlockingIOError:
            return False
        return True

    def _run_trial(self, trial: optuna.Trial) -> None:
        """Train a trial's run to its end and report the result to the study."""
        overrides = {d.key: suggest(trial, d, self.names.get(d.key)) for d in self.dimensions}
        name, run = self._name(trial.number), self._run(trial.number)
        parameters = ",".join(f"{key}={value}" for key, value in overrides.items())
        with self._locked():
            write_jobs(self.directory, [SweepJob(run.path.name, overrides, [])])
        print_line(f"{run.path.name}: {parameters}")
        try:
            config = self.search.compose([f"{k}={v}" for k, v in overrides.items()], name)
        except ConfigError as error:
            return self._fail(trial, str(error))
        if not (run.path / PRUNED).is_file():
            run_in_process(run, partial(_train_trial, config, self.config, trial.number))
        if (run.path / PRUNED).is_file():
            self.study.tell(trial, state=TrialState.PRUNED)
        elif run.is_complete:
            values = _values(run, self.config.directions)
            if None in values:
                return self._fail(trial, "the model has no causal decision, and so no causal loss")
            self.study.tell(trial, [value for value in values if value is not None])
        elif state_of(run) == "failed":
            return self._fail(trial, failure_text(run))
        print_line(f"{run.path.name}: {state_of(run)}")
        return None

    def _fail(self, trial: optuna.Trial, reason: str) -> None:
        trial.set_user_attr("why", reason)
        self.study.tell(trial, state=TrialState.FAIL)
        print_line(f"{self._run(trial.number).path.name}: failed: {reason}")

    def _report(self) -> int:
        """Print and write the best trials."""
        trials = self.study.get_trials(deepcopy=False)
        best: list[dict[str, Any]] = [
            {
                "run": self._name(trial.number),
                "parameters": translate_flat(trial.params),
                "values": dict(zip(self.config.directions, trial.values, strict=True)),
            }
            for trial in self.study.best_trials
        ]
        counts = {state.name.lower(): sum(t.state == state for t in trials) for state in _DONE}
        num_left = self.config.trials - sum(counts.values())
        size = num_points(self.dimensions)
        if size is not None and size < self.config.trials:
            print_line(f"{self.directory}: the space has {size} points, and each is tried once")
            num_left = size - sum(counts.values())
        report = {"directions": list(self.config.directions), "trials": counts, "best": best}
        write_text(self.directory / "best.json", json.dumps(report, indent=1) + "\n")
        counts_text = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
        with last_output():
            left = max(num_left, 0)
            print_line(f"{self.directory}: {counts_text or 'nothing yet'}; {left} to go")
            for entry in best:
                values = ", ".join(f"{key} {value:.6g}" for key, value in entry["values"].items())
                parameters = " ".join(f"{key}={v}" for key, v in entry["parameters"].items())
                print_line(f"  {entry['run']}: {values} with {parameters}")
        if STOP.requested and num_left > 0:
            print_line(f"stopped by {STOP.name}: the same command resumes")
            return STOP.exit_code
        return 0 if best else 1

    def _name(self, number: int) -> str:
        return f"{self.config.study}/trial_{number:04d}"

    def _run(self, number: int) -> RunDirectory:
        return RunDirectory(Path(self.config.runs_dir) / self._name(number))

    def _locked(self) -> AbstractContextManager[None]:
        """Hold the lock of the study against other workers."""
        return acquire_lock(self.directory / ".search.lock", timeout=math.inf)


def suggest(trial: optuna.Trial, dimension: Dimension, name: str | None = None) -> str:
    """Return the trial's value, drawn now or before, as text for an override.

    name: of the parameter in the study, where it is not the dimension's key.
    """
    value = dimension.suggest(trial, name or dimension.key)
    return repr(value) if isinstance(value, float) else str(value)


def _values(run: RunDirectory, directions: Sequence[str]) -> list[float | None]:
    values = {
        "causal_loss": run.read_result().get(CAUSAL_LOSS),
        "forward_flops": forward_flops_per_token(run.read_config()),
    }
    return [values[name] for name in directions]


def _train_trial(config: TrainConfig, search: SearchConfig, number: int) -> int:
    # Not in the process that forks.
    from modtrain.experiments.search.trial_callback import train_or_prune  # noqa: PLC0415

    return train_or_prune(config, search, number)
