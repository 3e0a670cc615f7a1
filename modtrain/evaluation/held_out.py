"""Loss on held-out text: by causal decisions, and as trained beside it where that is not causal.

Shapes: B batch, S sequence, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from modtrain.data.stream.batch import Batch
from modtrain.models.config import ModelConfig
from modtrain.models.depth.config import ComputeBudget, RouterSwap, Selection
from modtrain.models.flops import Load, forward_flops, realised_flops
from modtrain.models.sequence import RoutingRecord
from modtrain.models.transformer import ModelOutput, Transformer


@dataclass
class Agreement:
    """Agreement of a causal decision with top-k, over the held-out tokens.

    Most tokens are skipped (7 of 8 at the default capacity), so accuracy alone says little.
    """

    accuracy: float
    f1: float
    balanced_accuracy: float


@dataclass
class Decision:
    """The result of a model under one selection; the loss in nats per token.

    flops: executed forward FLOPs per token. realised_capacity: share of routed tokens, by router.
    agreement: of a causal decision with top-k, by router, without caps; empty if training has no
    top-k. expert_load: share of the choices of each expert, no-op experts last, by layer.
    """

    loss: float
    flops: float
    realised_capacity: dict[str, float] = field(default_factory=dict)
    agreement: dict[str, Agreement] = field(default_factory=dict)
    expert_load: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class HeldOut:
    """Means over the held-out tokens; losses in nats per token.

    trained_flops: executed forward FLOPs per token as trained, by the formula.
    decisions: by causal decision; the first one gives the reported loss.
    top_k: as trained, 'not causal', and never changed by a compute budget; None if training is
        causal, or it was not requested.
    sources: the same of each source of a mixture, by name; empty where there is one.
    """

    tokens: int
    trained_flops: float
    decisions: dict[str, Decision] = field(default_factory=dict)
    top_k: Decision | None = None
    sources: dict[str, HeldOut] = field(default_factory=dict)

    @property
    def causal(self) -> Decision | None:
        """The causal decision whose loss is reported; None if there is none."""
        return next(iter(self.decisions.values()), None)


@dataclass(frozen=True)
class Part:
    """Held-out batches of one source.

    total: sums over ranks that evaluate other batches, equally many each; None: one process.
    """

    batches: Iterable[Batch]
    total: Callable[[Tensor], Tensor] | None = None


def evaluate(
    model: Transformer,
    parts: Mapping[str, Part],
    precision: AbstractContextManager[Any],
    *,
    capacities: Sequence[float | None] | None = None,
    selections: Sequence[Selection] | None = None,
    as_trained: bool = True,
    budgets: Mapping[Selection, ComputeBudget] | None = None,
    swap: RouterSwap | None = None,
) -> HeldOut:
    """Evaluate ``model`` on the held-out batches of each source, as trained and causally.

    precision: the context to compute in, such as a strategy's forward context.
    capacities: one per layer, if training is not at the configuration's capacities.
    selections: causal decisions; None: all of the model's. as_trained: False leaves out the
    selection of training where it is not causal, and with it each decision's agreement.
    budgets: compute budgets by causal decision; as trained without one.
    swap: another choice of tokens than the routers'.

    Raises:
        ValueError: a source has no batch.
    """
    config, budgets = model.config, budgets or {}
    selections = config.causal_selections if selections is None else selections
    evaluated = [*selections]
    if config.looks_ahead and as_trained:
        evaluated.append(config.training_selection)
    by_part: dict[str, dict[Selection, _Accumulator]] = {}
    with evaluation_mode(model) as device, precision:
        for name, part in parts.items():
            accumulators = by_part[name] = {
                selection: _Accumulator(model, selection, selections, budgets)
                for selection in evaluated
            }
            for batch in part.batches:
                on_device, num_targets = batch.to(device), batch.num_targets
                for selection, accumulator in accumulators.items():
                    output = model(
                        on_device.inputs_BS,
                        on_device.targets_BS,
                        selection,
                        capacities=capacities,
                        budget=budgets.get(selection),
                        swap=swap,
                        **on_device.masks(),
                    )
                    accumulator.add(output, batch.inputs_BS.shape, num_targets)
    for name, part in parts.items():
        if part.total is not None:
            for accumulator in by_part[name].values():
                accumulator.gather(part.total)
    results = {name: _held_out(accs, selections, capacities) for name, accs in by_part.items()}
    if list(results) == [""]:
        return results[""]
    for selection in evaluated:
        first, *others = (accumulators[selection] for accumulators in by_part.values())
        for other in others:
            first.merge(other)
    whole = _held_out(next(iter(by_part.values())), selections, capacities)
    return replace(whole, sources=results)


def _held_out(
    accumulators: Mapping[Selection, _Accumulator],
    selections: Sequence[Selection],
    capacities: Sequence[float | None] | None,
) -> HeldOut:
    first = next(iter(accumulators.values()), None)
    if first is None or first.tokens == 0:
        raise ValueError("there are no held-out batches, or no selection to evaluate")
    config = first.config
    trained = accumulators.get(config.training_selection)
    flops = forward_flops(config, first.seq_len, capacities).total / first.seq_len
    result = HeldOut(first.tokens, flops)
    for selection in selections:
        result.decisions[selection] = accumulators[selection].decision(trained)
    if trained is not None:
        result.top_k = replace(trained.decision(None), flops=flops)
    return result


@contextmanager
def evaluation_mode(model: Transformer) -> Iterator[torch.device]:
    """Set evaluation mode without gradients, and yield the model's device.

    Random routers draw from the global generator in training's selection. Its state is seeded here
    and restored at the end, as the model's mode is, so they draw the same in each such context.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    cuda = [device] if device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=cuda):
            torch.manual_seed(0)
            yield device
    finally:
        model.train(was_training)


class _Accumulator:
    """Running sums of one selection, on the host."""

    def __init__(
        self,
        model: Transformer,
        selection: Selection,
        compared: Sequence[Selection],
        budgets: Mapping[Selection, ComputeBudget],
    ) -> None:
        self.config, self.selection = model.config, selection
        self.compared, self.budgets = compared, budgets
        self.routers, mixtures = model.routers, len(model.mixtures)
        self.tokens = self.sequences = self.seq_len = 0
        self.loss = 0.0
        self.chosen_R, self.squares_R = (_zeros(len(self.routers)) for _ in range(2))
        # By causal decision and router: counts of (skip, route) against top-k.
        self.confusion: dict[str, Tensor] = {}
        experts = self.config.experts
        self.executed_M = _zeros(mixtures)
        self.choices_MR = _zeros(mixtures, (experts.count or 0) + experts.noop)

    def add(self, output: ModelOutput, shape: Sequence[int], num_targets: int) -> None:
        """Add a batch of this shape (B, S), of whose tokens ``num_targets`` are predicted."""
        sequences, self.seq_len = shape
        self.tokens, self.sequences = self.tokens + num_targets, self.sequences + sequences
        self.loss += float(output.loss if output.loss is not None else 0) * num_targets
        for i, record in enumerate(output.routing):
            # A sequence's attention products grow with the square of its own number of tokens.
            count_B = record.chosen_BS.sum(dim=1).cpu().double()
            self.chosen_R[i] += count_B.sum()
            self.squares_R[i] += (count_B**2).sum()
        for i, mixture in enumerate(output.experts):
            self.executed_M[i] += mixture.executed_E.sum().cpu().double()
            self.choices_MR[i] += mixture.choices_R.cpu().double()
        if self.selection == "top_k" and self.config.is_routed and self.config.router.needs_causal:
            self._compare(output.routing)

    def gather(self, total: Callable[[Tensor], Tensor]) -> None:
        """Replace the sums by those over all ranks."""
        counts_3 = torch.tensor([self.tokens, self.sequences, self.loss], dtype=torch.float64)
        confusion = [self.confusion[name] for name in self.confusion]
        parts = [
            counts_3,
            self.chosen_R,
            self.squares_R,
            self.executed_M,
            self.choices_MR,
            *confusion,
        ]
        flat = total(torch.cat([part.flatten() for part in parts]))
        pieces = torch.split(flat, [part.numel() for part in parts])
        totals = [piece.view(part.shape) for part, piece in zip(parts, pieces, strict=True)]
        tokens, sequences, self.loss = totals[0].tolist()
        self.tokens, self.sequences = round(tokens), round(sequences)
        self.chosen_R, self.squares_R, self.executed_M, self.choices_MR = totals[1:5]
        self.confusion = dict(zip(self.confusion, totals[5:], strict=True))

    def merge(self, other: _Accumulator) -> None:
        """Add the sums of the same selection over other batches."""
        self.tokens, self.sequences = self.tokens + other.tokens, self.sequences + other.sequences
        self.loss += other.loss
        for name in ("chosen_R", "squares_R", "executed_M", "choices_MR"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for selection, cells_R4 in other.confusion.items():
            self.confusion[selection] = self.confusion[selection] + cells_R4

    def decision(self, trained: _Accumulator | None) -> Decision:
        labels = self.config.routed_labels
        cost = realised_flops(self.config, self.seq_len, self._loads(), self.selection)
        flops = cost.total / self.seq_len
        agreement = {}
        if trained is not None and self.selection in trained.confusion:
            cells = trained.confusion[self.selection].tolist()
            agreement = {
                name: agreement_of(*four) for name, four in zip(labels, cells, strict=True)
            }
        shares = (self.chosen_R / self.tokens).tolist()
        shares_MR = (self.choices_MR / self.choices_MR.sum(-1, keepdim=True).clamp(min=1)).tolist()
        return Decision(
            self.loss / self.tokens,
            flops,
            dict(zip(labels, shares, strict=True)),
            agreement,
            dict(zip(self.config.expert_labels, shares_MR, strict=True)),
        )

    def _compare(self, records: tuple[RoutingRecord, ...]) -> None:
        """Count where each causal decision agrees with the actual choice."""
        for selection in self.compared:
            cells_R4 = self.confusion.setdefault(selection, _zeros(len(self.routers), 4))
            for i, (router, record) in enumerate(zip(self.routers, records, strict=True)):
                value_BS = router.decision_values(selection, record.scores_BS, record.predictor_BS)
                threshold = router.decision_threshold(selection, self.budgets.get(selection))
                cell_BS = (value_BS > threshold).long() * 2 + record.chosen_BS.long()
                cells_R4[i] += count_cells(cell_BS, record.valid_BS)

    def _loads(self) -> list[Load]:
        """The mean load of each layer per sequence."""
        count_R2 = torch.stack([self.chosen_R, self.squares_R], dim=1) / self.sequences
        slots_M = (self.executed_M / self.sequences).tolist()
        return mean_loads(self.config, self.seq_len, count_R2.tolist(), slots_M)


def count_cells(cell_BS: Tensor, valid_BS: Tensor | None) -> Tensor:
    """Return how often each of four numbers occurs (4,), not in padding; on the host in float64."""
    cell_N = cell_BS.flatten() if valid_BS is None else cell_BS[valid_BS.expand_as(cell_BS)]
    return torch.bincount(cell_N, minlength=4).cpu().double()


def mean_loads(
    config: ModelConfig,
    seq_len: int,
    count_R2: Sequence[Sequence[float]],
    slots_M: Sequence[float],
) -> list[Load]:
    """Return the load of each layer per sequence of ``seq_len`` tokens.

    count_R2: mean and mean square of the tokens that each router took of a sequence. slots_M: mean
    of the computed pairs of token and expert, by mixture of experts.
    """
    counts = dict(zip(config.routed_parts, count_R2, strict=True))
    slots = dict(zip(config.expert_labels, slots_M, strict=True))
    all_tokens = [float(seq_len), float(seq_len**2)]
    loads = []
    for layer in range(config.num_layers):
        block = counts.get((layer, "block"), all_tokens)
        mixer = counts.get((layer, "attention"), block)
        mlp = counts.get((layer, "mlp"), block)
        loads.append(Load(mixer[0], mixer[1], mlp[0], slots.get(f"layer_{layer:02d}", 0.0)))
    return loads


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def agreement_of(tn: float, fn: float, fp: float, tp: float) -> Agreement:
    """Scores of true and false negatives and positives."""
    recall = tp / max(1.0, tp + fn)
    specificity = tn / max(1.0, tn + fp)
    f1 = 2 * tp / max(1.0, 2 * tp + fn + fp)
    return Agreement((tn + tp) / (tn + fn + fp + tp), f1, (recall + specificity) / 2)
