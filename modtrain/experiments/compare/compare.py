"""Train several models on one budget and report them side by side, on the causal loss."""

from __future__ import annotations

import json
import shlex
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from modtrain.common.atomic_io import write_text
from modtrain.common.errors import ConfigError, DataError, Problem, TrainingError
from modtrain.common.reading import UnreadableError, read_json
from modtrain.common.terminal import last_output, plain_console
from modtrain.distributed.launch import Launch
from modtrain.experiments.compare.comparison_report import describe, draw, show
from modtrain.experiments.compare.config import Comparison
from modtrain.experiments.compare.step_timing import step_seconds
from modtrain.training.config import TrainConfig
from modtrain.training.plan import resolve
from modtrain.training.run import train
from modtrain.training.run_directory import RunDirectory


def compare(comparison: Comparison) -> int:
    """Train each arm to its end, then print and draw the comparison.

    All arms of one seed come before the next seed, so that an interrupted comparison is balanced.

    Returns:
        The exit code: 0, or that of an arm that a signal stopped.

    Raises:
        ModtrainError: an arm cannot run; all are checked before any is trained.
    """
    if (processes := Launch.from_environment().world_size) > 1:
        reason = f"trains in one process, but {processes} were started"
        remedy = "run it without torchrun or srun, or start a single arm with modtrain train"
        raise ConfigError([Problem("compare", "", reason, remedy)])
    if not comparison.arms:
        _show_report(comparison, plain_console())
        return 0
    resolved = {
        name: [resolve(config) for config in configs] for name, configs in comparison.arms.items()
    }
    arms = {name: [config for config, _ in runs] for name, runs in resolved.items()}
    if comparison.config.train:
        if _complete_runs(arms) != arms:
            # The report is outdated; it is written again when everything is trained.
            comparison.report.unlink(missing_ok=True)
        for runs_of_seed in zip(*resolved.values(), strict=True):
            for config, plan in runs_of_seed:
                outcome = train(config, plan=plan)
                if outcome.exit_code:
                    return outcome.exit_code
    _report_and_show(replace(comparison, arms=arms), plain_console())
    return 0


def _report_and_show(comparison: Comparison, console: Console) -> None:
    config, arms, directory = comparison.config, comparison.arms, comparison.directory
    if config.only or not config.train:
        complete = _complete_runs(arms)
        if not complete:
            raise TrainingError("no run of this comparison is complete: leave train=false out")
        report = _report(replace(comparison, arms=complete))
        with last_output():
            show(report, config.equivalence_margin, console)
        return
    path, picture = comparison.report, directory / "loss_over_flops.png"
    was_complete = _is_current(path, arms)
    if not was_complete:
        draw(arms, picture)
        write_text(path, json.dumps(_report(comparison), indent=1))
    tensorboard = f"{_tensorboard()} --logdir {shlex.quote(str(directory))}"
    lines = f"\npicture: {picture.resolve()}\nTensorBoard: {tensorboard}"
    with last_output():
        if was_complete:
            console.print(f"{directory} is complete: nothing was trained", soft_wrap=True)
        show(read_json(path), config.equivalence_margin, console)
        console.print(lines, soft_wrap=True)


def _show_report(comparison: Comparison, console: Console) -> None:
    """Print the report that was written when the comparison was complete."""
    try:
        report = read_json(comparison.report)
        with last_output():
            show(report, comparison.config.equivalence_margin, console)
    except (UnreadableError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{comparison.report} is damaged: {error}\nremedy: give the command that made it again"
        ) from None
    picture = (comparison.directory / "loss_over_flops.png").resolve()
    with last_output():
        console.print(f"\npicture: {picture}", soft_wrap=True)


def _complete_runs(arms: dict[str, list[TrainConfig]]) -> dict[str, list[TrainConfig]]:
    """Return the complete runs, and no arm without one."""
    complete = {
        name: [config for config in configs if RunDirectory.of(config).is_complete]
        for name, configs in arms.items()
    }
    return {name: configs for name, configs in complete.items() if configs}


def _is_current(report: Path, arms: dict[str, list[TrainConfig]]) -> bool:
    """Whether the report exists and has these arms and runs in this order."""
    if not report.is_file():
        return False
    try:
        stored = [(name, arm["runs"]) for name, arm in read_json(report).items()]
    except (UnreadableError, KeyError, TypeError):
        # Damaged: it is made of the runs again.
        return False
    return stored == [(name, [config.name for config in configs]) for name, configs in arms.items()]


def _tensorboard() -> str:
    """The tensorboard command of this environment, which may not be on the PATH."""
    path = Path(sys.executable).with_name("tensorboard")
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return shlex.quote(str(path)) if path.is_file() else "tensorboard"


def _report(comparison: Comparison) -> dict[str, dict[str, Any]]:
    arms, rounds = comparison.arms, comparison.config.timed_rounds
    times: dict[str, float] = {}
    if rounds:
        # Where not all models fit together, the losses are reported without the times.
        with suppress(torch.OutOfMemoryError):
            times = step_seconds({name: configs[0] for name, configs in arms.items()}, rounds)
    return {
        name: describe(configs, times.get(name), comparison.controls.get(name))
        for name, configs in arms.items()
    }
