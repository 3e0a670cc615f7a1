"""Score a run's checkpoint on tasks by lm-eval, as it is or over compute budgets."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modtrain.common.atomic_io import without_nan, write_text
from modtrain.common.errors import DataError, Problem, raise_if_any
from modtrain.inference.calibration import (
    Calibration,
    budget_of_run,
    budget_problems,
    resolve_decisions,
    training_text,
)
from modtrain.inference.config import ComputeBudgetConfig, EvalRunConfig
from modtrain.inference.evaluate.reporting import write_points
from modtrain.inference.loading import LoadedRun, load_run
from modtrain.inference.tasks.config import TaskConfig
from modtrain.inference.tasks.report import draw_task_sweep, task_points
from modtrain.inference.text_io import results_folder
from modtrain.models.depth.config import ComputeBudget, Selection
from modtrain.training.run_directory import RunDirectory

if TYPE_CHECKING:
    from modtrain.inference.tasks.catalog import LoadedTask
    from modtrain.inference.tasks.language_model import ModtrainLM

# What lm-eval seeds Python's generator with.
_RANDOM_SEED = 0
# lm-eval's own default takes minutes for some metrics.
_BOOTSTRAP_DRAWS = 1000


def evaluate_tasks(config: EvalRunConfig) -> dict[str, Any]:
    """Score the run on ``config.tasks``, or along the capacities of ``config.sweep``.

    The results go to ``tasks-<step>.json`` or ``tasks-sweep-<step>.json`` in ``config.output``, or
    the run's directory if that can be written, and to its ``tensorboard/``; a sweep's curves also
    to a PNG. Budget settings are part of the names. One causal decision is used, the one that
    ``inference.decision`` names, or the model's first one.

    Returns:
        The results as plain data; docs/how-to/evaluate-on-tasks.md explains the keys.

    Raises:
        ConfigError, CheckpointError, DataError: the run or a task cannot be used, with the remedy.
    """
    raise_if_any(config.problems())
    if importlib.util.find_spec("lm_eval") is None:
        reason, remedy = "needs lm-eval, which is not installed", "pip install 'modtrain[tasks]'"
        raise_if_any([Problem("tasks", config.tasks, reason, remedy)])
    loaded = load_run(config)
    raise_if_any(_model_problems(config, loaded))
    folder = results_folder(loaded.directory.path, config.output)
    selection = resolve_decisions(config.inference, loaded.trained.model)[0]
    with _quiet_libraries():
        # lm-eval takes seconds to import.
        from modtrain.inference.tasks.catalog import load_tasks  # noqa: PLC0415
        from modtrain.inference.tasks.language_model import ModtrainLM  # noqa: PLC0415

        tasks = load_tasks(config.tasks or [], config.task)
        model = ModtrainLM(loaded, selection, batch_size=config.batch_size)
        points = [
            {**labels, "tasks": _score(config, model, selection, budget, tasks)}
            for labels, budget in _budgets(config, loaded, selection)
        ]
    results = {**_header(config, loaded, selection), **points[-1]}
    name = f"tasks-{loaded.step:09d}{config.inference.suffix}"
    if config.sweep is not None:
        results |= {"points": points[:-1], "as_trained": results.pop("tasks")}
        name = f"tasks-sweep-{loaded.step:09d}{config.inference.suffix}"
    if folder is not None:
        _write(results, folder, name)
    return results


def _model_problems(config: EvalRunConfig, loaded: LoadedRun) -> list[Problem]:
    model = loaded.trained.model
    problems = budget_problems(config.inference, model, "inference")
    if config.sweep is not None:
        sweep_problems = budget_problems(ComputeBudgetConfig(capacity=1.0), model, "")
        problems += [Problem("sweep", config.sweep, p.reason, p.remedy) for p in sweep_problems]
    if not model.causal_selections:
        reason = "was trained without router.causal: there is no causal decision to route by"
        problems.append(Problem("run", config.run, reason, "train with router.causal=[predictor]"))
    elif model.is_routed and model.router.score == "oracle_norm":
        selection = resolve_decisions(config.inference, model)[0]
        if model.router.needs_scores(selection):
            reason = "has router.score=oracle_norm, which needs the whole sequence"
            remedy = "train with router.gate=none, and decide by a predictor"
            problems.append(Problem("run", config.run, reason, remedy))
    return problems


def _budgets(
    config: EvalRunConfig, loaded: LoadedRun, selection: Selection
) -> Iterator[tuple[dict[str, float], ComputeBudget | None]]:
    """Yield what to call each compute budget, and the budget; the last one has no name."""
    settings = config.inference
    if config.sweep is not None:
        calibration = Calibration(
            loaded.model,
            selection,
            training_text(loaded, settings.calibration_sequences, config.batch_size),
            loaded.autocast,
            caps=ComputeBudget(None, settings.layer_cap, settings.step_cap),
        )
        for capacity in sorted(config.sweep):
            yield {"capacity": capacity}, calibration.budget(capacity)
    as_trained = settings if config.sweep is None else ComputeBudgetConfig()
    yield {}, budget_of_run(loaded, selection, as_trained, config.batch_size)


def _score(
    config: EvalRunConfig,
    model: ModtrainLM,
    selection: Selection,
    budget: ComputeBudget | None,
    tasks: dict[str, LoadedTask],
) -> dict[str, Any]:
    """Return the results of each task by its name, those of a group's tasks among them."""
    from lm_eval.evaluator import evaluate  # noqa: PLC0415

    results: dict[str, Any] = {}
    settings = config.task
    for name, loaded in tasks.items():
        model.set_decision(selection, budget)
        for task in loaded["tasks"].values():
            _configure(task, settings)
        try:
            evaluated = evaluate(
                lm=model,
                task_dict=loaded,
                limit=settings.limit,
                bootstrap_iters=_BOOTSTRAP_DRAWS,
                apply_chat_template=settings.chat,
                fewshot_as_multiturn=settings.chat,
                confirm_run_unsafe_code=settings.allow_code,
            )
        except (KeyError, TypeError, ValueError, AssertionError, ArithmeticError) as error:
            # Whatever a task's configuration leads to in lm-eval.
            raise DataError(f"task {name} fails: {type(error).__name__}: {error}") from error
        results |= _results(name, evaluated, model)
    return results


def _configure(task: Any, settings: TaskConfig) -> None:
    """Set what lm-eval's command line sets of a task: zero examples in a task are meant."""
    own = task.get_config("num_fewshot")
    if own is None or (own and settings.num_fewshot is not None):
        task.set_config(key="num_fewshot", value=settings.num_fewshot or 0)
    task.set_fewshot_seed(seed=settings.seed)
    # Some tasks draw from Python's own generator.
    random.seed(_RANDOM_SEED)


def _results(name: str, evaluated: Any, model: ModtrainLM) -> dict[str, Any]:
    cost = model.cost
    tokens = max(1, cost.tokens)
    shared = {
        "tokens": cost.tokens,
        "flops": cost.flops / tokens,
        "dense_equivalent_flops": cost.dense_equivalent_flops / tokens,
        "realised_capacity": cost.realised_capacity,
    }
    results = {}
    for task, values in evaluated["results"].items():
        samples = (evaluated.get("samples") or {}).get(task, [])
        counts = evaluated["n-samples"].get(task, {})
        metrics = _metrics(values)
        results[task] = {
            "metrics": metrics,
            "higher_is_better": evaluated["higher_is_better"].get(task, {}),
            "num_examples": counts.get("effective"),
            "num_fewshot": evaluated["n-shot"].get(task),
            "chance": _chance(samples) if "acc" in metrics else None,
            **({"group": name} if task != name else {}),
            **shared,
        }
    return results


def _metrics(values: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Return value and standard error by metric; one after a filter has the filter's name too."""
    metrics: dict[str, dict[str, float | None]] = {}
    for key, value in values.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = values.get(f"{metric}_stderr,{filter_name}")
        shown = metric if filter_name == "none" else f"{metric} ({filter_name})"
        metrics[shown] = {
            "value": float(value),
            "stderr": float(stderr) if isinstance(stderr, int | float) else None,
        }
    return metrics


def _chance(samples: list[dict[str, Any]]) -> float | None:
    """Return the accuracy of choosing at random; None where nothing is to choose from."""
    counts = [len(sample["arguments"]) for sample in samples]
    if not counts or min(counts) < 2:
        return None
    return sum(1 / count for count in counts) / len(counts)


def _header(config: EvalRunConfig, loaded: LoadedRun, selection: Selection) -> dict[str, Any]:
    from lm_eval import __version__  # noqa: PLC0415

    settings, task = config.inference, config.task
    budget: dict[str, float] = dict(settings.overrides)
    if settings.capacity is not None or config.sweep is not None:
        budget["calibration_sequences"] = settings.calibration_sequences
    return {
        "run": config.run,
        "step": loaded.step,
        "decision": selection,
        "budget": budget or None,
        "max_length": loaded.max_length,
        "limit": task.limit,
        "seed": task.seed,
        "chat": task.chat,
        "lm_eval": __version__,
    }


def _write(results: dict[str, Any], folder: Path, name: str) -> None:
    write_text(folder / f"{name}.json", json.dumps(without_nan(results), indent=1))
    if "points" in results:
        draw_task_sweep(results, folder / f"{name}.png")
    events = RunDirectory(folder).tensorboard / name
    write_points(events, results["step"], task_points(results))


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keep what lm-eval and its libraries print and log away from the results."""
    names = ("lm_eval", "datasets", "evaluate", "huggingface_hub", "httpx2")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        # On a terminal, progress is shown.
        with Path(os.devnull).open("w") as nowhere:
            bars = sys.stderr if sys.stderr.isatty() else nowhere
            with redirect_stdout(bars), redirect_stderr(bars):
                yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
