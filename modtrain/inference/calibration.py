"""Thresholds of a model's routers from a requested share of tokens, by calibration on text.

Shapes: B batch, S sequence, T = S + 1, N all tokens of a text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modtrain.common.errors import ConfigError, Problem, raise_if_any
from modtrain.common.validation import broken_rules, key_of
from modtrain.data.stream.batch import Batch
from modtrain.data.stream.datamodule import TokenDataModule
from modtrain.evaluation.held_out import evaluation_mode
from modtrain.inference.config import ComputeBudgetConfig
from modtrain.inference.loading import LoadedRun
from modtrain.models.config import ModelConfig
from modtrain.models.depth.config import ComputeBudget, Selection
from modtrain.models.transformer import Transformer
from modtrain.training.plan import derive

Precision = Callable[[], AbstractContextManager[Any]]
# A share within a hundredth of the target, or half a token of the text, is close enough.
_TOLERANCE = 0.01


def make_budget(
    model: Transformer,
    selection: Selection,
    config: ComputeBudgetConfig,
    batches: Iterable[Batch] = (),
    precision: Precision = nullcontext,
    *,
    prefix: str = "inference",
) -> ComputeBudget | None:
    """Return the compute budget of ``config`` for ``selection``; None if it changes nothing.

    batches: text of the training split, read if ``config.capacity`` is to be calibrated; see
    `Calibration`. precision: makes the context to compute in. prefix: of the keys in errors.

    Raises:
        ConfigError: the model does not support the budget.
    """
    raise_if_any(budget_problems(config, model.config, prefix))
    if not config.overrides:
        return None
    budget = ComputeBudget(None, config.layer_cap, config.step_cap)
    if config.capacity is not None:
        calibration = Calibration(model, selection, batches, precision, caps=budget)
        return calibration.budget(config.capacity)
    if config.shift:
        trained = [float(router.decision_threshold(selection)) for router in model.routers]
        budget = budget._replace(thresholds=tuple(value + config.shift for value in trained))
    return budget


def budget_of_run(
    loaded: LoadedRun,
    selection: Selection,
    config: ComputeBudgetConfig,
    batch_size: int,
    prefix: str = "inference",
) -> ComputeBudget | None:
    """Return the compute budget for a trained run, calibrated on its own training text."""
    batches = []
    if config.capacity is not None:
        batches = training_text(loaded, config.calibration_sequences, batch_size)
    return make_budget(loaded.model, selection, config, batches, loaded.autocast, prefix=prefix)


def training_text(loaded: LoadedRun, sequences: int, batch_size: int) -> list[Batch]:
    """Return the first ``sequences`` of the run's training stream, in batches."""
    # A mixture's stages begin at shares of the whole run.
    plan = derive(loaded.trained)
    data = TokenDataModule(
        loaded.trained.data,
        micro_batch_size=plan.sequences_per_step,
        accumulate=1,
        num_steps=plan.steps,
        eval_batch_size=1,
    )
    count = min(sequences, len(data.train_data))
    numbers: list[int] = data.order.lookup(np.arange(count)).tolist()
    starts = range(0, count, batch_size)
    parts = [data.train_data.__getitems__(numbers[at : at + batch_size]) for at in starts]
    eos_id, has_padding = loaded.trained.data.eos_id, data.train_data.has_padding
    return [Batch.from_tokens(part_BT, eos_id, has_padding=has_padding) for part_BT in parts]


def resolve_decisions(
    config: ComputeBudgetConfig,
    model: ModelConfig,
    prefix: str = "inference",
    as_trained: bool = False,
) -> list[Selection]:
    """Return the causal decision that ``config`` names; without a name, all of the model's.

    as_trained: also accept the selection of training where it is not causal.

    Raises:
        ConfigError: the model does not have the decision.
    """
    known = model.causal_selections
    if config.decision is None:
        return known
    if as_trained and model.looks_ahead:
        known = [*known, model.training_selection]
    for selection in known:
        if selection == config.decision:
            return [selection]
    remedy = f"use one of: {', '.join(known)}" if known else "leave it out"
    reason = f"is not a {'' if as_trained else 'causal '}decision of this model"
    raise ConfigError([Problem(key_of(prefix, "decision"), config.decision, reason, remedy)])


def budget_problems(config: ComputeBudgetConfig, model: ModelConfig, prefix: str) -> list[Problem]:
    """Find settings of ``config`` that ``model`` does not support."""
    reason = None
    if not model.is_routed:
        reason = "changes depth routers, and the model has none"
    elif not model.causal_selections:
        reason = "changes causal decisions, and the model was trained without any"
    if reason is not None:
        rules = ((True, name, reason, "leave it out") for name in config.overrides)
        return broken_rules(config, prefix, *rules)
    reason = f"changes a threshold, and router.score={model.router.score} has none"
    remedy = f"set {key_of(prefix, 'capacity')} instead"
    has_none = "shift" in config.overrides and not model.router.needs_causal
    return broken_rules(config, prefix, (has_none, "shift", reason, remedy))


class Calibration:
    """Finds the thresholds at which every router takes a given share of a text.

    A router's threshold is a quantile of its decision values, which depend on the choices of the
    routers before it. Each pass over the text fixes one more router, so as many passes as there are
    routers fix all. It ends early if every share is within a hundredth of the target, or half a
    token of the text. Equal values are taken all or not at all, whichever is nearer.

    The same text gives the same thresholds. The first pass, at the trained thresholds, serves every
    share.
    """

    def __init__(
        self,
        model: Transformer,
        selection: Selection,
        batches: Iterable[Batch],
        precision: Precision = nullcontext,
        *,
        caps: ComputeBudget | None = None,
    ) -> None:
        """Prepare for ``model`` under ``selection``; nothing is computed yet.

        batches: text, iterated several times. caps: in effect during calibration; a
        share is of the tokens above a router's threshold, before caps.
        """
        self.model, self.selection, self.precision = model, selection, precision
        self.batches, self.caps = batches, caps or ComputeBudget()
        self._as_trained: list[Tensor] | None = None

    def budget(self, share: float) -> ComputeBudget:
        """Return the compute budget at which each router takes ``share`` of the tokens.

        Raises:
            ValueError: there is no text.
        """
        routers = len(self.model.routers)
        if not self.model.config.router.needs_causal:
            return self.caps._replace(thresholds=(share,) * routers)
        if share >= 1:
            return self.caps._replace(thresholds=(-math.inf,) * routers)
        if self._as_trained is None:
            self._as_trained = self._values(self.caps)
        thresholds = tuple(threshold_for_share(value_N, share) for value_N in self._as_trained)
        for _ in range(routers - 1):
            values = self._values(self.caps._replace(thresholds=thresholds))
            if all(map(_is_close, values, thresholds, [share] * routers)):
                break
            thresholds = tuple(threshold_for_share(value_N, share) for value_N in values)
        return self.caps._replace(thresholds=thresholds)

    def _values(self, budget: ComputeBudget) -> list[Tensor]:
        """The decision values (N,) of each router under ``budget``."""
        collected: list[list[Tensor]] = [[] for _ in self.model.routers]
        with evaluation_mode(self.model) as device:
            for batch in self.batches:
                on_device = batch.to(device)
                with self.precision():
                    # With targets, the logits are computed in chunks.
                    output = self.model(
                        on_device.inputs_BS,
                        on_device.targets_BS,
                        self.selection,
                        budget=budget,
                        **on_device.masks(),
                    )
                records = zip(collected, self.model.routers, output.routing, strict=True)
                for values, router, record in records:
                    value_BS = router.decision_values(
                        self.selection, record.scores_BS, record.predictor_BS
                    )
                    is_valid = slice(None) if record.valid_BS is None else record.valid_BS
                    values.append(value_BS[is_valid].flatten().cpu())
        if not all(collected):
            raise ValueError("there is no text to calibrate on")
        return [torch.cat(values) for values in collected]


def threshold_for_share(value_N: Tensor, share: float) -> float:
    """Return the threshold that ``share`` of the values exceed, and at least one of them.

    It is the midpoint between the lowest value above and the highest value below. If these are
    equal, it is between the nearest values that differ.
    """
    total = len(value_N)
    count = max(1, round(share * total))
    ranked_N = value_N.sort(descending=True).values
    if count < total and ranked_N[count - 1] == ranked_N[count]:
        without_ties = int((ranked_N > ranked_N[count]).sum())
        with_ties = int((ranked_N >= ranked_N[count]).sum())
        count = without_ties if count - without_ties <= with_ties - count else with_ties
    if count == 0:
        return float(ranked_N[0])
    if count == total:
        return -math.inf
    above, below = ranked_N[count - 1], ranked_N[count]
    # Adjacent floating-point numbers have no midpoint.
    middle = below + (above - below) / 2
    return float(middle if middle < above else below)


def _is_close(value_N: Tensor, threshold: float, share: float) -> bool:
    count = int((value_N > threshold).sum())
    target = max(1.0, share * len(value_N))
    return abs(count - target) <= max(0.5, _TOLERANCE * target)
