"""Routing decisions, expert choices and prediction quality of a model, token by token.

Shapes: B batch, S sequence, V vocabulary, N all tokens of the text, R routers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modtrain.common.ignored_target import IGNORED
from modtrain.data.stream.batch import Batch
from modtrain.evaluation.held_out import (
    Agreement,
    agreement_of,
    count_cells,
    evaluation_mode,
    mean_loads,
)
from modtrain.evaluation.routing_metrics import update_metrics
from modtrain.models.depth.config import TRAINING_SELECTIONS, ComputeBudget, RouterSwap, Selection
from modtrain.models.depth.layer import MixtureOfDepths
from modtrain.models.depth.pattern import num_chosen
from modtrain.models.depth.router import to_fp32_or_wider
from modtrain.models.depth.selection import top_k_of_documents
from modtrain.models.flops import dense_equivalent_flops, realised_flops
from modtrain.models.sequence import RoutingRecord
from modtrain.models.transformer import ModelOutput, Transformer

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class RouterTrace:
    """One depth router over the text.

    decides_by: name of ``value_N``, which is None for routers that ignore content.
    threshold: above which a token is routed; None if the top k of a window are.
    gate_mean, update_ratio: see `update_metrics`; NaN without a routed token.
    worth: relative change of the text's loss without the router's updates; None: not known.
    agreement: of the decision with the top k of its scores in each window; None: it has none.
    """

    label: str
    decides_by: str
    threshold: float | None
    value_N: Floats | None
    chosen_N: NDArray[np.bool_]
    gate_mean: float = math.nan
    update_ratio: float = math.nan
    worth: float | None = None
    agreement: Agreement | None = None


@dataclass(frozen=True)
class ExpertTrace:
    """One mixture of experts over the text.

    share_E: of all choices, by expert, the ``noop`` ones last; all 0 if there was no token.
    """

    label: str
    share_E: Floats
    noop: int


@dataclass(frozen=True)
class Trace:
    """A text of N tokens as the model computed it, in independent windows.

    position_N: in the window. loss_N, entropy_N: of the token's prediction of the next one, in
    nats; the loss is NaN where there is no next token. flops, dense_flops: executed in forward
    passes over the whole text, and if no token had skipped anything.
    """

    token_N: NDArray[np.int64]
    position_N: NDArray[np.int64]
    loss_N: Floats
    entropy_N: Floats
    routers: list[RouterTrace]
    experts: list[ExpertTrace]
    flops: float = math.nan
    dense_flops: float = math.nan

    @property
    def depths(self) -> NDArray[np.int64]:
        """The number of routed parts that each token entered."""
        zero_N = np.zeros(len(self.token_N), dtype=np.int64)
        return sum((router.chosen_N.astype(np.int64) for router in self.routers), zero_N)

    @property
    def mean_loss(self) -> float | None:
        """Mean of the known losses; None if there are none."""
        known = self.loss_N[~np.isnan(self.loss_N)]
        return float(known.mean()) if len(known) else None


def trace(
    model: Transformer,
    windows: Iterable[Batch],
    selection: Selection,
    precision: AbstractContextManager[Any],
    *,
    capacities: Sequence[float | None] | None = None,
    budget: ComputeBudget | None = None,
    swap: RouterSwap | None = None,
) -> Trace:
    """Run ``model`` over windows of any size.

    A target of -100 is unknown; padding is left out. precision, capacities: as for
    `held_out.evaluate`. budget: the compute budget of a causal decision. swap: another choice of
    tokens than the routers'.

    Raises:
        ValueError: there is no window.
    """
    recorder = _TraceRecorder(model, selection, budget)
    with evaluation_mode(model) as device, precision:
        for window in windows:
            on_device = window.to(device)
            output = model(
                on_device.inputs_BS,
                selection=selection,
                capacities=capacities,
                budget=budget,
                swap=swap,
                **on_device.masks(),
            )
            recorder.add(on_device, output)
            recorder.compare(output.routing, on_device.documents_BS, capacities)
    return recorder.trace()


def deciding_values(
    router: MixtureOfDepths,
    selection: Selection,
    record: RoutingRecord,
    budget: ComputeBudget | None = None,
) -> tuple[str, Tensor | None, float | None]:
    """Return the router's decision values (B, S), with their name and the threshold if any."""
    if not router.config.needs_causal:
        return f"no content ({router.config.score})", None, None
    if selection in TRAINING_SELECTIONS:
        return "score", record.scores_BS, None
    threshold = float(router.decision_threshold(selection, budget))
    value_BS = router.decision_values(selection, record.scores_BS, record.predictor_BS)
    name = "predictor's logit" if selection == "predictor" else "score"
    # At a threshold of minus infinity every token is routed, and there is no line to draw.
    return name, value_BS, threshold if math.isfinite(threshold) else None


def prediction_quality(logits_SV: Tensor, targets_S: Tensor) -> tuple[Tensor, Tensor]:
    """Return loss and entropy (S,) in nats; the loss is NaN where the target is -100."""
    log_SV = to_fp32_or_wider(logits_SV).log_softmax(-1)
    entropy_S = -(log_SV.exp() * log_SV).sum(-1)
    known_S = targets_S != IGNORED
    loss_S = -log_SV.gather(1, targets_S.where(known_S, 0).unsqueeze(1)).squeeze(1)
    return loss_S.where(known_S, torch.nan), entropy_S


class _TraceRecorder:
    """Collects the results of each forward pass, on the host."""

    def __init__(
        self, model: Transformer, selection: Selection, budget: ComputeBudget | None
    ) -> None:
        self.model, self.selection, self.budget = model, selection, budget
        self.columns: dict[str, list[Tensor]] = {}
        self.valid_BS: Tensor | None = None
        self.decisions: list[tuple[str, float | None]] = []
        self.choices: list[Tensor] = []
        self.update_sums_R4 = torch.zeros(len(model.routers), 4, dtype=torch.float64)
        # Counts of (skip, route) by the decision against top-k.
        self.cells_R4 = torch.zeros(len(model.routers), 4, dtype=torch.float64)
        self.flops = self.dense_flops = 0.0

    def add(self, window: Batch, output: ModelOutput) -> None:
        inputs_BS = window.inputs_BS
        self.valid_BS = None if window.valid_BS is None else window.valid_BS.cpu()
        self._keep("token", inputs_BS)
        self._keep("position", torch.arange(inputs_BS.shape[1]).expand(inputs_BS.shape))
        # One sequence at a time: log-probabilities of a batch would double the logits' memory.
        pairs = zip(output.require_logits(), window.targets_BS, strict=True)
        losses, entropies = zip(*(prediction_quality(*pair) for pair in pairs), strict=True)
        self._keep("loss", torch.stack(losses), torch.float64)
        self._keep("entropy", torch.stack(entropies), torch.float64)
        self.decisions = []
        for i, (router, record) in enumerate(zip(self.model.routers, output.routing, strict=True)):
            name, value_BS, threshold = deciding_values(router, self.selection, record, self.budget)
            self.decisions.append((name, threshold))
            if value_BS is not None:
                self._keep(f"value {i}", value_BS, torch.float64)
            self._keep(f"chosen {i}", record.chosen_BS)
            if record.update_sums_4 is not None:
                self.update_sums_R4[i] += record.update_sums_4.cpu().double()
        counts = self._choices(output)
        if self.choices:
            counts = [a + b for a, b in zip(self.choices, counts, strict=True)]
        self.choices = counts
        self._add_flops(output, *inputs_BS.shape)

    def compare(
        self,
        records: Sequence[RoutingRecord],
        documents_BS: Tensor | None,
        capacities: Sequence[float | None] | None,
    ) -> None:
        """Count where a causal decision does what the top k of the scores would."""
        config = self.model.config
        router = config.router
        has_top_k = router.choice == "expert" and router.needs_causal
        if self.selection in TRAINING_SELECTIONS or not has_top_k:
            return
        if not router.needs_scores(self.selection):
            return
        shares = config.capacities if capacities is None else capacities
        for i, record in enumerate(records):
            layer, _ = config.routed_parts[i]
            count = num_chosen(shares[layer] or 1.0, record.scores_BS.shape[1])
            top_BS = top_k_of_documents(record.scores_BS, count, documents_BS, record.valid_BS)
            cell_BS = record.chosen_BS.long() * 2 + top_BS.long()
            self.cells_R4[i] += count_cells(cell_BS, record.valid_BS)

    def _add_flops(self, output: ModelOutput, sequences: int, seq_len: int) -> None:
        config = self.model.config
        count_RB = [record.chosen_BS.sum(dim=1).cpu().double() for record in output.routing]
        count_R2 = [(float(count_B.mean()), float((count_B**2).mean())) for count_B in count_RB]
        slots_M = [float(mixture.executed_E.sum()) / sequences for mixture in output.experts]
        loads = mean_loads(config, seq_len, count_R2, slots_M)
        spent = realised_flops(config, seq_len, loads, self.selection).total
        self.flops += sequences * spent
        self.dense_flops += sequences * dense_equivalent_flops(config, seq_len).total

    def trace(self) -> Trace:
        if not self.columns:
            raise ValueError("there is no text to inspect")
        column = {name: torch.cat(parts).numpy() for name, parts in self.columns.items()}
        config = self.model.config
        decisions = zip(config.routed_labels, self.decisions, strict=True)
        routers = []
        for i, (label, decision) in enumerate(decisions):
            sums, cells = self.update_sums_R4[i].tolist(), self.cells_R4[i].tolist()
            gate, update = update_metrics(sums) if sums[0] else (math.nan, math.nan)
            router = RouterTrace(
                label,
                *decision,
                column.get(f"value {i}"),
                column[f"chosen {i}"],
                gate_mean=gate,
                update_ratio=update,
                agreement=agreement_of(*cells) if any(cells) else None,
            )
            routers.append(router)
        # Under expert choice no-op experts are only part of the softmax and get no tokens.
        noop = config.experts.noop if config.experts.choice == "token" else 0
        experts = [
            ExpertTrace(label, (count_E / count_E.sum().clamp(min=1)).numpy(), noop)
            for label, count_E in zip(config.expert_labels, self.choices, strict=True)
        ]
        names = ("token", "position", "loss", "entropy")
        columns = {f"{name}_N": column[name] for name in names}
        return Trace(
            **columns,
            routers=routers,
            experts=experts,
            flops=self.flops,
            dense_flops=self.dense_flops,
        )

    def _keep(self, name: str, values: Tensor, dtype: torch.dtype | None = None) -> None:
        # To the host first: not every device has float64.
        values = values.cpu()
        values_N = values.flatten() if self.valid_BS is None else values[self.valid_BS]
        self.columns.setdefault(name, []).append(values_N.to(dtype or values.dtype))

    def _choices(self, output: ModelOutput) -> list[Tensor]:
        """Return the number of choices of each expert of each mixture."""
        config = self.model.config.experts
        # Under expert choice no-op experts get no tokens.
        chosen = config.count if config.choice == "expert" else None
        return [record.choices_R[:chosen].cpu().double() for record in output.experts]
