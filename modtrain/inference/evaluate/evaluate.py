"""Evaluate a run's checkpoint on held-out text, or sweep its loss over compute budgets."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from modtrain.common.atomic_io import without_nan, write_text
from modtrain.common.errors import Problem, raise_if_any
from modtrain.data.stream.index_json import read_summary
from modtrain.evaluation.held_out import Decision, HeldOut, evaluate
from modtrain.inference.calibration import (
    Calibration,
    budget_of_run,
    budget_problems,
    resolve_decisions,
    training_text,
)
from modtrain.inference.config import ComputeBudgetConfig, EvalRunConfig
from modtrain.inference.evaluate.reporting import (
    draw_sweep,
    evaluation_points,
    sweep_points,
    write_points,
)
from modtrain.inference.evaluate.swaps import evaluate_swaps
from modtrain.inference.loading import LoadedRun, load_run
from modtrain.inference.text_io import results_folder
from modtrain.models.depth.config import ComputeBudget, Selection
from modtrain.models.flops import dense_equivalent_flops
from modtrain.training.run_directory import RunDirectory


def evaluate_run(config: EvalRunConfig) -> dict[str, Any]:
    """Evaluate the run, or sweep its capacities if ``config.sweep`` is set, and write the results.

    They go to ``eval-<step>.json`` or ``sweep-<step>.json`` in ``config.output``, or the run's
    directory if that can be written, and to its ``tensorboard/``; a sweep's curve also to a PNG.
    Budget settings are part of the names.
    docs/concepts/method.md explains the keys.

    Returns:
        The results as plain data.

    Raises:
        ConfigError, CheckpointError, DataError: the run cannot be evaluated, with the remedy.
    """
    raise_if_any(config.problems())
    loaded = load_run(config)
    model = loaded.trained.model
    problems = budget_problems(config.inference, model, "inference")
    if config.swap and not (model.is_routed and model.causal_selections):
        reason = "needs a model with routers and a causal decision"
        problems.append(Problem("swap", True, reason, "leave it out"))
    raise_if_any(problems)
    # Before anything is computed.
    folder = results_folder(loaded.directory.path, config.output)
    measure = _evaluation if config.sweep is None else _sweep
    return measure(config, loaded, folder)


def _evaluation(config: EvalRunConfig, loaded: LoadedRun, folder: Path | None) -> dict[str, Any]:
    settings = config.inference
    selections = resolve_decisions(settings, loaded.trained.model)
    budgets = {
        selection: budget
        for selection in selections
        if (budget := budget_of_run(loaded, selection, settings, config.batch_size)) is not None
    }
    held_out = _held_out(config, loaded, selections, budgets)
    rate = _tokens_per_byte(loaded, held_out)
    results = {**_header(config, loaded, held_out), **_losses(held_out, rate)}
    if held_out.sources:
        results["sources"] = _source_losses(loaded, held_out)
    if config.swap:
        results["router_worth"] = evaluate_swaps(config, loaded)
    if folder is not None:
        name = f"eval-{loaded.step:09d}{settings.suffix}.json"
        write_text(folder / name, json.dumps(without_nan(results), indent=1))
        events = RunDirectory(folder).tensorboard / f"eval{settings.suffix}"
        write_points(events, loaded.step, evaluation_points(results))
    return results


def _sweep(config: EvalRunConfig, loaded: LoadedRun, folder: Path | None) -> dict[str, Any]:
    """Compute the loss over FLOPs, each capacity calibrated like ``inference.capacity``."""
    settings, model = config.inference, loaded.trained.model
    decisions = resolve_decisions(settings, model)
    problems = budget_problems(ComputeBudgetConfig(capacity=1.0), model, "")
    raise_if_any([Problem("sweep", config.sweep, p.reason, p.remedy) for p in problems])
    selection = decisions[0]
    calibration = Calibration(
        loaded.model,
        selection,
        training_text(loaded, settings.calibration_sequences, config.batch_size),
        loaded.autocast,
        caps=ComputeBudget(None, settings.layer_cap, settings.step_cap),
    )
    trained = _held_out(config, loaded, [selection], {})
    rate = _tokens_per_byte(loaded, trained)
    points = []
    for capacity in sorted(config.sweep or []):
        budgets = {selection: calibration.budget(capacity)}
        calibrated = _held_out(config, loaded, [selection], budgets)
        points.append({"capacity": capacity, **_decision(calibrated.decisions[selection], rate)})
    results = {
        **_header(config, loaded, trained),
        "decision": selection,
        "points": points,
        "as_trained": _decision(trained.decisions[selection], rate),
    }
    if folder is not None:
        name = f"sweep-{loaded.step:09d}{settings.suffix}"
        write_text(folder / f"{name}.json", json.dumps(without_nan(results), indent=1))
        draw_sweep(results, folder / f"{name}.png")
        events = RunDirectory(folder).tensorboard / name
        write_points(events, loaded.step, sweep_points(results))
    return results


def _held_out(
    config: EvalRunConfig,
    loaded: LoadedRun,
    selections: list[Selection],
    budgets: Mapping[Selection, ComputeBudget],
) -> HeldOut:
    return evaluate(
        loaded.model,
        loaded.held_out_parts(config.sequences, config.batch_size),
        loaded.autocast(),
        capacities=loaded.capacities,
        selections=selections,
        as_trained=config.sweep is None,
        budgets=budgets,
    )


def _header(config: EvalRunConfig, loaded: LoadedRun, held_out: HeldOut) -> dict[str, Any]:
    settings, seq_len = config.inference, loaded.seq_len
    budget: dict[str, float] = dict(settings.overrides)
    if settings.capacity is not None or config.sweep is not None:
        budget["calibration_sequences"] = settings.calibration_sequences
    dense = dense_equivalent_flops(loaded.trained.model, seq_len).total / seq_len
    return {
        "run": config.run,
        "step": loaded.step,
        "tokens": held_out.tokens,
        "budget": budget or None,
        "trained_flops": held_out.trained_flops,
        "dense_equivalent_flops": dense,
    }


def _losses(held_out: HeldOut, tokens_per_byte: float) -> dict[str, Any]:
    """The losses by decision; those of the first one are also at the top level."""
    top_k = None if held_out.top_k is None else _decision(held_out.top_k, tokens_per_byte)
    decisions = {}
    for name, decision in held_out.decisions.items():
        gap = None if top_k is None else decision.loss - top_k["loss"]
        decisions[name] = {
            **_decision(decision, tokens_per_byte),
            "gap_to_top_k_not_causal": gap,
            "agreement_with_top_k_not_causal": {
                label: asdict(scores) for label, scores in decision.agreement.items()
            },
        }
    first = next(iter(decisions.values()), {})
    return {
        "causal_loss": first.get("loss"),
        "causal_flops": first.get("flops"),
        "perplexity": first.get("perplexity"),
        "bits_per_byte": first.get("bits_per_byte"),
        "decisions": decisions,
        "top_k_not_causal": top_k,
    }


def _decision(decision: Decision, tokens_per_byte: float) -> dict[str, Any]:
    return {
        "loss": decision.loss,
        "perplexity": _perplexity(decision.loss),
        "bits_per_byte": decision.loss / math.log(2) * tokens_per_byte,
        "flops": decision.flops,
        "realised_capacity": decision.realised_capacity,
        "expert_load": decision.expert_load,
    }


def _perplexity(loss: float) -> float:
    """Return e to the loss, which of a model that has diverged may be more than a number can be."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _source_losses(loaded: LoadedRun, held_out: HeldOut) -> dict[str, dict[str, Any]]:
    """The loss of each source of a mixture, by the decision whose loss is reported."""
    rates, losses = _source_rates(loaded), {}
    for name, part in held_out.sources.items():
        decision = part.causal or part.top_k
        if decision is not None:
            shown = _decision(decision, rates[name])
            figures = {key: shown[key] for key in ("loss", "perplexity", "bits_per_byte", "flops")}
            losses[name] = {"tokens": part.tokens, **figures}
    return losses


def _source_rates(loaded: LoadedRun) -> dict[str, float]:
    """Tokens a byte of each source's held-out text; of one directory the name is empty."""
    splits = {n: read_summary(path).splits["valid"] for n, path in loaded.data.paths.items()}
    return {name: split.num_tokens / split.num_bytes for name, split in splits.items()}


def _tokens_per_byte(loaded: LoadedRun, held_out: HeldOut) -> float:
    """Tokens a byte of the text that was evaluated."""
    rates = _source_rates(loaded)
    if not held_out.sources:
        return rates[""]
    num_bytes = sum(part.tokens / rates[name] for name, part in held_out.sources.items())
    return held_out.tokens / num_bytes
