"""From a wish, such as a share of the tokens, to levels that a model's routers go by.

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
from modtrain.common.validation import key_of
from modtrain.data.stream.datamodule import TokenDataModule
from modtrain.data.stream.documents import document_numbers_if_apart
from modtrain.evaluation.held_out import evaluation_mode
from modtrain.inference.config import ComputeBudgetConfig
from modtrain.inference.loading import LoadedRun
from modtrain.models.config import ModelConfig
from modtrain.models.depth.compute_budget import ComputeBudget
from modtrain.models.depth.config import Selection
from modtrain.models.transformer import Transformer

Precision = Callable[[], AbstractContextManager[Any]]
# A share within a hundredth of what is wanted, or half a token of the text, is near enough.
_TOLERANCE = 0.01


def make_budget(
    model: Transformer,
    selection: Selection,
    config: ComputeBudgetConfig,
    batches: Iterable[Tensor] = (),
    precision: Precision = nullcontext,
    *,
    eos_id: int | None = None,
    prefix: str = "inference",
) -> ComputeBudget | None:
    """Return the dial that ``config`` asks for under ``selection``; None where it asks for nothing.

    batches: text (B, S + 1) of the training split, read where ``config.capacity`` is to be
    calibrated; see `Calibration`. precision: makes the context to compute in.
    eos_id: the end of documents, where the model is to keep them apart. prefix: of the keys in
    errors.

    Raises:
        ConfigError: the model cannot be moved so.
    """
    raise_if_any(budget_problems(config, model.config, prefix))
    if not config.asked:
        return None
    thresholds = None
    if config.capacity is not None:
        caps = ComputeBudget(None, config.layer_cap, config.step_cap)
        calibration = Calibration(model, selection, batches, precision, eos_id=eos_id, caps=caps)
        return calibration.budget(config.capacity)
    if config.shift:
        thresholds = tuple(
            float(router.decision_threshold(selection)) + config.shift for router in model.routers
        )
    return ComputeBudget(thresholds, config.layer_cap, config.step_cap)


def budget_of_run(
    loaded: LoadedRun,
    selection: Selection,
    config: ComputeBudgetConfig,
    batch_size: int,
    prefix: str = "inference",
) -> ComputeBudget | None:
    """The same for a trained run, calibrated on its own training text."""
    batches = []
    if config.capacity is not None:
        batches = training_text(loaded, config.calibration_sequences, batch_size)
    return make_budget(
        loaded.model,
        selection,
        config,
        batches,
        loaded.autocast,
        eos_id=loaded.trained.data.eos_id,
        prefix=prefix,
    )


def training_text(loaded: LoadedRun, sequences: int, batch_size: int) -> list[Tensor]:
    """Return the first ``sequences`` that the run was trained on, in batches (B, S + 1)."""
    data = TokenDataModule(
        loaded.trained.data, micro_batch_size=1, accumulate=1, num_steps=1, eval_batch_size=1
    )
    count = min(sequences, len(data.train_data))
    numbers: list[int] = data.order.lookup(np.arange(count)).tolist()
    starts = range(0, count, batch_size)
    return [data.train_data.__getitems__(numbers[at : at + batch_size]) for at in starts]


def resolve_decisions(
    config: ComputeBudgetConfig,
    model: ModelConfig,
    prefix: str = "inference",
    as_trained: bool = False,
) -> list[Selection]:
    """Return the causal decisions to look at; all that the model has where none is named.

    as_trained: what a model that looks ahead chooses by in training may be named too.

    Raises:
        ConfigError: the model does not have the one that is named.
    """
    known = model.causal_selections
    if config.decision is None:
        return known
    if as_trained and model.looks_ahead:
        known = [*known, model.training_selection]
    for selection in known:
        if selection == config.decision:
            return [selection]
    remedy = f"use one of: {', '.join(known)}" if known else "evaluate it without"
    reason = f"is not a {'' if as_trained else 'causal '}decision of this model"
    raise ConfigError([Problem(key_of(prefix, "decision"), config.decision, reason, remedy)])


def budget_problems(config: ComputeBudgetConfig, model: ModelConfig, prefix: str) -> list[Problem]:
    """Everything that ``config`` asks for and ``model`` does not have."""
    reason = None
    if not model.is_routed:
        reason = "moves depth routers, and the model has none"
    elif not model.causal_selections:
        reason = "moves causal decisions, and the model was trained without"
    if reason is not None:
        return [
            Problem(key_of(prefix, name), value, reason, "leave it out")
            for name, value in config.asked.items()
        ]
    if "shift" in config.asked and not model.router.needs_causal:
        reason = f"moves a level, and router.score={model.router.score} has none"
        remedy = f"give {key_of(prefix, 'capacity')} instead"
        return [Problem(key_of(prefix, "shift"), config.shift, reason, remedy)]
    return []


class Calibration:
    """Finds the levels at which every router takes a wanted share of a text.

    A router's level is the quantile of what it decides by. That depends on the choices of the
    routers before it: each pass over the text therefore settles one more of them, and as many
    passes as there are routers settle all. It ends before where a pass finds every share within a
    hundredth of the wanted one, or half a token of the text. Of values that are equal all or none
    are taken, whatever is nearer.

    The same text gives the same levels. The first pass, at the trained levels, serves every share.
    """

    def __init__(
        self,
        model: Transformer,
        selection: Selection,
        batches: Iterable[Tensor],
        precision: Precision = nullcontext,
        *,
        eos_id: int | None = None,
        caps: ComputeBudget | None = None,
    ) -> None:
        """Prepare for ``model`` under ``selection``; nothing is computed yet.

        batches: text (B, S + 1), gone through several times. caps: in force as shares are
        measured; a share is of the tokens that a router wants, before a cap turns some away.
        """
        self.model, self.selection, self.precision = model, selection, precision
        self.batches, self.eos_id = batches, eos_id
        self.caps = caps or ComputeBudget()
        self._as_trained: list[Tensor] | None = None

    def budget(self, share: float) -> ComputeBudget:
        """Return the dial at which each router takes ``share`` of the tokens.

        Raises:
            ValueError: there is no text.
        """
        return self.caps._replace(thresholds=self._levels(share))

    def _levels(self, share: float) -> tuple[float, ...]:
        routers = len(self.model.routers)
        if not self.model.config.router.needs_causal:
            return (share,) * routers
        if share >= 1:
            return (-math.inf,) * routers
        if self._as_trained is None:
            self._as_trained = self._values(self.caps)
        values = self._as_trained
        thresholds = tuple(threshold_for_share(value_N, share) for value_N in values)
        for _ in range(routers - 1):
            values = self._values(self.caps._replace(thresholds=thresholds))
            if all(map(_is_near, values, thresholds, [share] * routers)):
                break
            thresholds = tuple(threshold_for_share(value_N, share) for value_N in values)
        return thresholds

    def _values(self, budget: ComputeBudget) -> list[Tensor]:
        """What each router decides by (N,) under ``budget``."""
        kept: list[list[Tensor]] = [[] for _ in self.model.routers]
        with evaluation_mode(self.model) as device:
            for batch in self.batches:
                inputs_BS, targets_BS = batch[:, :-1].to(device), batch[:, 1:].to(device)
                documents_BS = document_numbers_if_apart(inputs_BS, self.eos_id)
                with self.precision():
                    # With targets the logits are never there as a whole.
                    output = self.model(
                        inputs_BS,
                        targets_BS,
                        self.selection,
                        documents_BS=documents_BS,
                        budget=budget,
                    )
                records = zip(kept, self.model.routers, output.routing, strict=True)
                for values, router, record in records:
                    value_BS = router.decision_values(
                        self.selection, record.scores_BS, record.predictor_BS
                    )
                    values.append(value_BS.flatten().cpu())
        if not all(kept):
            raise ValueError("there is no text to calibrate on")
        return [torch.cat(values) for values in kept]


def threshold_for_share(value_N: Tensor, share: float) -> float:
    """Return the level that ``share`` of the values lie above, one of them at least.

    It is the middle between the last value above and the first one below. Where these are equal,
    the nearest place at which values differ.
    """
    total = len(value_N)
    wanted = max(1, round(share * total))
    ranked_N = value_N.sort(descending=True).values
    if wanted < total and ranked_N[wanted - 1] == ranked_N[wanted]:
        above = int((ranked_N > ranked_N[wanted]).sum())
        with_equals = int((ranked_N >= ranked_N[wanted]).sum())
        wanted = above if wanted - above <= with_equals - wanted else with_equals
    if wanted == 0:
        return float(ranked_N[0])
    if wanted == total:
        return -math.inf
    last, first = ranked_N[wanted - 1], ranked_N[wanted]
    # Between neighbours in floating point there is no middle.
    middle = first + (last - first) / 2
    return float(middle if middle < last else first)


def _is_near(value_N: Tensor, level: float, share: float) -> bool:
    found = int((value_N > level).sum())
    wanted = max(1.0, share * len(value_N))
    return abs(found - wanted) <= max(0.5, _TOLERANCE * wanted)
