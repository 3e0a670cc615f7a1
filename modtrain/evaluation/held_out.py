"""Loss on held-out text: causally, which counts, and as trained beside it where that looks ahead.

Shapes: B batch, S sequence, T = S + 1, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from modtrain.data.stream.documents import document_numbers_if_apart
from modtrain.models.config import ModelConfig
from modtrain.models.depth.compute_budget import Dial
from modtrain.models.depth.config import Selection
from modtrain.models.flops import Load, forward_flops, realised_flops
from modtrain.models.sequence import RoutingRecord
from modtrain.models.transformer import ModelOutput, Transformer


@dataclass
class Agreement:
    """How a causal decision does against top-k, over the held-out tokens.

    Four of five tokens and more are skipped, so accuracy alone says little.
    """

    accuracy: float
    f1: float
    balanced_accuracy: float


@dataclass
class Decision:
    """What a model comes to under one way to choose; the loss in nats a token.

    flops: executed forward FLOPs a token. realised_capacity: share of tokens that took part, by
    router. agreement: of a causal decision with top-k, by router; empty where training has no
    top-k. Caps of a dial are left out of it. expert_load: share of the choices that fell on each
    expert, no-op experts last, by layer.
    """

    loss: float
    flops: float
    realised_capacity: dict[str, float] = field(default_factory=dict)
    agreement: dict[str, Agreement] = field(default_factory=dict)
    expert_load: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class HeldOut:
    """Means over the held-out tokens; losses in nats a token.

    trained_flops: executed forward FLOPs a token as trained, by the formula.
    decisions: by each causal decision that was asked for; the first is what the model is judged by.
    top_k: as trained and 'not causal', never moved by a dial; None where training does not look
        ahead, or nobody asked.
    """

    tokens: int
    trained_flops: float
    decisions: dict[str, Decision] = field(default_factory=dict)
    top_k: Decision | None = None

    @property
    def causal(self) -> Decision | None:
        """The decision that the model is judged by; None where it has none."""
        return next(iter(self.decisions.values()), None)

    @property
    def causal_loss(self) -> float | None:
        """The loss under that decision."""
        return None if self.causal is None else self.causal.loss

    @property
    def top_k_loss(self) -> float | None:
        """The loss as trained, 'not causal'."""
        return None if self.top_k is None else self.top_k.loss


def evaluate(
    model: Transformer,
    batches: Iterable[Tensor],
    precision: AbstractContextManager[Any],
    *,
    eos_id: int | None = None,
    capacities: Sequence[float | None] | None = None,
    selections: Sequence[Selection] | None = None,
    as_trained: bool = True,
    dials: Mapping[Selection, Dial] | None = None,
    total: Callable[[Tensor], Tensor] | None = None,
) -> HeldOut:
    """Evaluate ``model`` on batches (B, S + 1) of token ids, as trained and causally.

    precision: the context to compute in, such as a strategy's forward context.
    eos_id: the end of documents, where the model is to keep them apart.
    capacities: one a layer, where training is at other ones than the configuration's.
    selections: causal decisions; None: all that the model has. as_trained: False leaves out what is
    not causal, and with it each decision's agreement.
    dials: how much a causal decision is to compute, where not as trained.
    total: sums over ranks that evaluate other batches, equally many each; None: there is one.

    Raises:
        ValueError: there is no batch.
    """
    config, dials = model.config, dials or {}
    selections = config.causal_selections if selections is None else selections
    ways = [*selections]
    if config.looks_ahead and as_trained:
        ways.append(config.training_selection)
    tallies = {way: _Tally(model, way, selections, dials) for way in ways}
    with evaluating(model) as device, precision:
        for batch in batches:
            batch_BT = batch.to(device)
            inputs_BS, targets_BS = batch_BT[:, :-1], batch_BT[:, 1:]
            documents_BS = document_numbers_if_apart(inputs_BS, eos_id)
            for selection, tally in tallies.items():
                tally.add(
                    model(
                        inputs_BS,
                        targets_BS,
                        selection,
                        capacities=capacities,
                        documents_BS=documents_BS,
                        dial=dials.get(selection),
                    ),
                    targets_BS,
                )
    if total is not None:
        for tally in tallies.values():
            tally.gather(total)
    first = next(iter(tallies.values()), None)
    if first is None or first.tokens == 0:
        raise ValueError("there are no held-out batches, or nothing to evaluate by")
    trained = tallies.get(config.training_selection)
    flops = forward_flops(config, first.seq_len, capacities).total / first.seq_len
    found = HeldOut(first.tokens, flops)
    for selection in selections:
        found.decisions[selection] = tallies[selection].decision(trained)
    if trained is not None:
        found.top_k = replace(trained.decision(None), flops=flops)
    return found


@contextmanager
def evaluating(model: Transformer) -> Iterator[torch.device]:
    """Compute without gradients, as when generating. Gives the model's device.

    Routers that draw at random as in training do so from the global state: they draw the same in
    each such context, and the state is given back, as the model's mode is.
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


class _Tally:
    """Running sums of one way to choose, on the host."""

    def __init__(
        self,
        model: Transformer,
        selection: Selection,
        compared: Sequence[Selection],
        dials: Mapping[Selection, Dial],
    ) -> None:
        self.model, self.config, self.selection = model, model.config, selection
        self.compared, self.dials = compared, dials
        self.routers, self.mixtures = model.routers, model.mixtures
        self.tokens = self.sequences = self.seq_len = 0
        self.loss = 0.0
        self.chosen_R, self.squares_R = (_zeros(len(self.routers)) for _ in range(2))
        # Of each causal decision and router: how often it said no or yes where top-k did.
        self.confusion: dict[str, Tensor] = {}
        experts = self.config.experts
        self.executed_M = _zeros(len(self.mixtures))
        self.load_ME = _zeros(len(self.mixtures), (experts.count or 0) + experts.noop)

    @property
    def mean_loss(self) -> float:
        return self.loss / self.tokens

    def add(self, output: ModelOutput, targets_BS: Tensor) -> None:
        count, length = targets_BS.numel(), targets_BS.shape[1]
        self.tokens, self.sequences = self.tokens + count, self.sequences + len(targets_BS)
        self.seq_len = length
        self.loss += float(output.loss if output.loss is not None else 0) * count
        for i, record in enumerate(output.routing):
            # A sequence's attention products grow with the square of its own number of tokens.
            count_B = record.chosen_BS.sum(dim=1).cpu().double()
            self.chosen_R[i] += count_B.sum()
            self.squares_R[i] += (count_B**2).sum()
        for i, mixture in enumerate(output.experts):
            self.executed_M[i] += mixture.executed_E.sum().cpu().double()
            self.load_ME[i] += mixture.load_E.cpu().double() * len(targets_BS)
        if self.selection == "top_k" and self.config.is_routed and self.config.router.needs_causal:
            self._compare(output.routing)

    def gather(self, total: Callable[[Tensor], Tensor]) -> None:
        """Take in what the other ranks have counted."""
        counts_3 = torch.tensor([self.tokens, self.sequences, self.loss], dtype=torch.float64)
        confusion = [self.confusion[name] for name in self.confusion]
        parts = [counts_3, self.chosen_R, self.squares_R, self.executed_M, self.load_ME, *confusion]
        flat = total(torch.cat([part.flatten() for part in parts]))
        pieces = torch.split(flat, [part.numel() for part in parts])
        found = [piece.view(part.shape) for part, piece in zip(parts, pieces, strict=True)]
        tokens, sequences, self.loss = found[0].tolist()
        self.tokens, self.sequences = round(tokens), round(sequences)
        self.chosen_R, self.squares_R, self.executed_M, self.load_ME = found[1:5]
        self.confusion = dict(zip(self.confusion, found[5:], strict=True))

    def decision(self, trained: _Tally | None) -> Decision:
        labels = self.config.routed_labels
        cost = realised_flops(self.config, self.seq_len, self._loads(), self.selection)
        flops = cost.total / self.seq_len
        agreement = {}
        if trained is not None and self.selection in trained.confusion:
            cells = trained.confusion[self.selection].tolist()
            agreement = {name: _agreement(*four) for name, four in zip(labels, cells, strict=True)}
        shares = (self.chosen_R / self.tokens).tolist()
        loads = (self.load_ME / self.sequences).tolist()
        return Decision(
            self.mean_loss,
            flops,
            dict(zip(labels, shares, strict=True)),
            agreement,
            dict(zip(self.config.expert_labels, loads, strict=True)),
        )

    def _compare(self, records: tuple[RoutingRecord, ...]) -> None:
        """Count where each causal decision agrees with the choice that was made."""
        for selection in self.compared:
            cells_R4 = self.confusion.setdefault(selection, _zeros(len(self.routers), 4))
            levels = self.dials.get(selection, Dial()).levels
            for i, (router, record) in enumerate(zip(self.routers, records, strict=True)):
                value_BS = router.value(selection, record.scores_BS, record.predictor_BS)
                level = router.level(selection) if levels is None else levels[i]
                guess_BS = value_BS > level
                cell_BS = guess_BS.long() * 2 + record.chosen_BS.long()
                cells_R4[i] += torch.bincount(cell_BS.flatten(), minlength=4).cpu().double()

    def _loads(self) -> list[Load]:
        """What each layer processed of a mean sequence."""
        parts = self.config.routed_parts
        count_R2 = torch.stack([self.chosen_R, self.squares_R], dim=1) / self.sequences
        counts = dict(zip(parts, map(tuple, count_R2.tolist()), strict=True))
        slots = dict(
            zip(self.config.expert_labels, (self.executed_M / self.sequences).tolist(), strict=True)
        )
        everyone = (float(self.seq_len), float(self.seq_len**2))
        return [
            _load(self.config, layer, counts, everyone, slots.get(f"layer_{layer:02d}", 0.0))
            for layer in range(self.config.num_layers)
        ]


def _load(
    config: ModelConfig,
    layer: int,
    counts: dict[tuple[int, str], tuple[float, ...]],
    everyone: tuple[float, ...],
    slots: float,
) -> Load:
    block = counts.get((layer, "block"), everyone)
    mixed = counts.get((layer, "attention"), block)
    fed = counts.get((layer, "mlp"), block)
    return Load(mixed[0], mixed[1], fed[0], slots if config.has_experts(layer) else 0.0)


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def _agreement(true_no: float, missed: float, false_yes: float, true_yes: float) -> Agreement:
    total = true_no + missed + false_yes + true_yes
    recall = true_yes / max(1.0, true_yes + missed)
    rejection = true_no / max(1.0, true_no + false_yes)
    f1 = 2 * true_yes / max(1.0, 2 * true_yes + missed + false_yes)
    return Agreement((true_no + true_yes) / total, f1, (recall + rejection) / 2)
