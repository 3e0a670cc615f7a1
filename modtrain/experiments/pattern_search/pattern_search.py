"""Search over the capacities of the layers, by successive halving with two objectives.

Imports no torch: the runs are forked from this process, which must not have started its threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console

from modtrain.cluster.status import wide_console
from modtrain.common.errors import ConfigError, Problem, raise_if_any
from modtrain.common.terminal import last_output
from modtrain.experiments.controls import UNROUTED
from modtrain.experiments.pattern_search.best_config import write_best
from modtrain.experiments.pattern_search.candidates import PatternSpace, find_candidates
from modtrain.experiments.pattern_search.config import PatternSearchConfig
from modtrain.experiments.pattern_search.decisions import RUNGS, DecisionLog, decide
from modtrain.experiments.pattern_search.figures import FIGURE, draw
from modtrain.experiments.pattern_search.plan_report import show_plan
from modtrain.experiments.pattern_search.result_report import show_results
from modtrain.experiments.pattern_search.results import (
    PARETO,
    PATTERNS,
    Outcome,
    Results,
    outcome_of,
    write_csv,
    write_pareto,
)
from modtrain.experiments.pattern_search.runs import Entry, PlannedRun, RunPlanner, plan_entries
from modtrain.experiments.sweep.job_process import EXIT_RESUMABLE, state_of
from modtrain.experiments.sweep.launch_overrides import LaunchOverrides
from modtrain.experiments.sweep.runner import ComposeJob, Runner, refuse_several_processes
from modtrain.experiments.sweep.sweep import shared_problems
from modtrain.models.config import unrouted_layers
from modtrain.training.config import TrainConfig
from modtrain.training.plan import forward_flops_per_token
from modtrain.training.run_directory import RunDirectory
from modtrain.training.stop_signal import STOP

_ENDED = ("complete", "failed")


@dataclass(frozen=True)
class PatternSearch:
    """A search, composed and checked.

    base: what the candidates share. defaults: the training configuration without overrides.
    launch: how the runs are started. compose_job: builds the configuration of a Slurm job.
    user_dir: of the user's own YAML.
    """

    config: PatternSearchConfig
    base: TrainConfig
    defaults: TrainConfig
    launch: LaunchOverrides
    compose_job: ComposeJob
    user_dir: str | None = None


def search_patterns(request: PatternSearch) -> int:
    """Print the plan of the search, or train its rungs and write the front and the best pattern.

    Returns:
        The exit code: 0 where the last rung and the controls are complete, whatever failed before;
        130 or 75 where a signal stopped the search; else 1.

    Raises:
        ConfigError: everything wrong with any run, before one starts.
        CheckpointError: another process works on the search, its decisions are of other settings,
            or the file system has no locks.
    """
    config, console = request.config, wide_console()
    refuse_several_processes("search-patterns")
    runner = Runner(request.launch, request.compose_job, request.user_dir)
    planner = RunPlanner(config, request.base, request.defaults)
    space = PatternSpace(planner.model, planner.seq_len)
    candidates, notes = find_candidates(config, space)
    entries = plan_entries(planner, candidates)
    dense = planner.dense()
    if config.plan_only:
        show_plan(config, entries, dense, notes, console)
        return 0
    _check([run for of in entries.values() for e in of for run in (e.trunk, e.decay)], runner)
    log = DecisionLog(config.directory / RUNGS, candidates, config.budgets, config.keep)
    results = Results(config, entries, forward_flops_per_token(dense.resolved))
    return _Searcher(request, runner, planner, log, results, console).run()


class _Searcher:
    """The rungs of a search, one after the other."""

    def __init__(
        self,
        request: PatternSearch,
        runner: Runner,
        planner: RunPlanner,
        log: DecisionLog,
        results: Results,
        console: Console,
    ) -> None:
        self.request, self.config, self.runner = request, request.config, runner
        self.planner, self.log, self.results, self.console = planner, log, results, console

    def run(self) -> int:
        """Train what is missing, and report what is there."""
        names = list(self.results.entries)
        code = 0
        for rung, budget in enumerate(self.config.budgets):
            entries = [self.results.entries[name][rung] for name in names]
            is_decided = rung < len(self.log.decisions)
            code = 0 if is_decided else self._train(entries)
            if self.runner.is_dry_run:
                self._print("a script for the first runs alone: the others start from them")
                return code
            if code:
                # Unfinished: what is reported are the rungs before.
                break
            self._collect(entries)
            if not self.results.outcomes[rung]:
                break
            if rung + 1 < len(self.config.budgets):
                if not is_decided:
                    points = {n: o.point for n, o in self.results.outcomes[rung].items()}
                    failed = self.results.missing[rung]
                    self.log.write(decide(budget, self.config.keep, points, failed))
                names = self.log.decisions[rung].survivors
                self._print(f"rung {rung}: {len(names)} of {len(entries)} continue")
        if self.results.is_complete and not code:
            code = self._train_controls()
        self._report()
        return code or (0 if self.results.is_complete else 1)

    def _train(self, entries: Sequence[Entry]) -> int:
        """Train a rung; return 0 once each run is complete or failed, else the exit code.

        A decay starts from its trunk, so it is trained where that is complete.
        """
        code = self._train_runs([entry.trunk for entry in entries])
        if code or self.runner.is_dry_run:
            return code
        ready = [e.decay for e in entries if RunDirectory.of(e.trunk.config).is_complete]
        return self._train_runs(ready) if ready else 0

    def _train_runs(self, runs: Sequence[PlannedRun]) -> int:
        code = self.runner.train(self.config.directory, [(run.job, run.config) for run in runs])
        if STOP.requested:
            return STOP.exit_code
        if self.runner.is_dry_run or all(_has_ended(run) for run in runs):
            return 0
        return code or EXIT_RESUMABLE

    def _collect(self, entries: Sequence[Entry]) -> None:
        """Add the results of a rung, and name the candidates that have none."""
        outcomes: dict[str, Outcome] = {}
        missing: dict[str, str] = {}
        for entry in entries:
            name, outcome = entry.candidate.name, outcome_of(entry.decay)
            if isinstance(outcome, Outcome):
                outcomes[name] = outcome
                continue
            trunk = RunDirectory.of(entry.trunk.config)
            if not trunk.is_complete:
                outcome = f"{outcome}; its trunk {entry.trunk.name} is {state_of(trunk)}"
            missing[name] = outcome
            self._print(f"left out of rung {entry.rung}: {name}: {outcome.splitlines()[0]}")
        self.results.outcomes.append(outcomes)
        self.results.missing.append(missing)

    def _train_controls(self) -> int:
        """Train the controls; return the exit code."""
        controls = self._controls() if self.config.controls else {}
        if not controls:
            return 0
        _check(list(controls.values()), self.runner)
        code = self._train_runs(list(controls.values()))
        for name, run in controls.items():
            outcome = outcome_of(run)
            if isinstance(outcome, Outcome):
                self.results.controls[name] = outcome
            else:
                self._print(f"no control {name}: {outcome.splitlines()[0]}")
                code = code or 1
        return code

    def _controls(self) -> dict[str, PlannedRun]:
        controls = {"dense": self.planner.dense()}
        best = self.results.best
        if best is None:
            return controls
        candidate = self.results.entries[best][-1].candidate
        unrouted = unrouted_layers(candidate.apply(self.planner.model))
        if unrouted is None:
            self._print(f"{best} has no unrouted control: it has no whole layers that are dense")
            return controls
        name = best + UNROUTED
        return controls | {name: self.planner.control(name, unrouted)}

    def _report(self) -> None:
        """Write and print what there is."""
        results, directory = self.results, self.config.directory
        while results.outcomes and not results.outcomes[-1]:
            # A rung without any result: the one before is the last one.
            results.outcomes.pop()
        if not results.outcomes:
            return
        write_csv(results, directory / PATTERNS)
        write_pareto(results, directory / PARETO)
        draw(results, directory / FIGURE)
        with last_output():
            show_results(results, self.console)
            self._print(f"results: {directory / PATTERNS}, {directory / PARETO}")
            self._print(f"figure: {(directory / FIGURE).resolve()}")
        if results.is_complete and results.best is not None:
            self._write_best(results.outcomes[-1][results.best])

    def _write_best(self, outcome: Outcome) -> None:
        path = self.config.output_path
        write_best(outcome, self.request.defaults, f"{self.config.name}_best", path)
        command = f"modtrain train experiment={path.stem}"
        if path.parent.name == "experiment":
            command = f"modtrain train --config-dir {path.parent.parent} experiment={path.stem}"
        with last_output():
            self._print(f"best pattern: {path}; {command}")

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True, highlight=False)


def _has_ended(run: PlannedRun) -> bool:
    return state_of(RunDirectory.of(run.config)) in _ENDED


def _check(runs: Sequence[PlannedRun], runner: Runner) -> None:
    """Raise ConfigError with everything that keeps a run from being trained."""
    wrong: dict[Problem, list[str]] = {}
    for run in runs:
        try:
            runner.check(run.config)
        except ConfigError as error:
            for problem in error.problems:
                wrong.setdefault(problem, []).append(run.job.name)
    raise_if_any(shared_problems(wrong, len(runs)) + runner.multirun.problems())
