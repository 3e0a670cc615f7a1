"""Statistics of routers and experts: of a step's tokens, however they are split."""

import itertools
import math

import pytest
import torch

from modtrain.evaluation.routing_metrics import RoutingTotals
from modtrain.models.sequence import ExpertRecord, RoutingRecord

BATCH, LENGTH, NOOP = 6, 16, 1
LABELS = ("layer_01", "layer_03")


def records(seed: int = 0) -> tuple[list[RoutingRecord], list[ExpertRecord]]:
    """Two routers that agree more than by chance, and a mixture of four experts and a no-op."""
    draw = torch.Generator().manual_seed(seed)
    routing = []
    shared_BS = torch.randn(BATCH, LENGTH, generator=draw)
    for mean in (-0.5, 3.0):
        scores_BS = shared_BS + torch.randn(BATCH, LENGTH, generator=draw) + mean
        # Another number of tokens in each sequence, as token choice has it.
        chosen_BS = scores_BS > mean + torch.randn(BATCH, 1, generator=draw)
        values_B3 = torch.rand(BATCH, 3, generator=draw)
        sums_B4 = torch.cat([chosen_BS.sum(dim=1, keepdim=True), values_B3], dim=1)
        routing.append(RoutingRecord(scores_BS, chosen_BS, update_sums_4=sums_B4))
    choices_BR = torch.randint(0, 9, (BATCH, 4 + NOOP), generator=draw).float()
    executed_BE = (choices_BR[:, :4] - 1).clamp(min=0)
    return routing, [ExpertRecord(choices_BR, executed_BE)]


def totals(rows: slice) -> RoutingTotals:
    routing, experts = records()
    return RoutingTotals.of(
        [
            RoutingRecord(r.scores_BS[rows], r.chosen_BS[rows], update_sums_4=u[rows].sum(dim=0))
            for r in routing
            if (u := r.update_sums_4) is not None
        ],
        [
            ExpertRecord(e.choices_R[rows].sum(dim=0), e.executed_E[rows].sum(dim=0))
            for e in experts
        ],
    )


def metrics(sums: RoutingTotals) -> dict[str, float]:
    return sums.router_metrics(LABELS) | sums.expert_metrics(["layer_02"], NOOP)


def one_rank(values: torch.Tensor) -> torch.Tensor:
    return values


@pytest.mark.parametrize("sizes", [(1,) * 6, (2, 4), (5, 1), (3, 3)])
def test_micro_batches_and_ranks_change_no_statistic(sizes):
    bounds = torch.tensor([0, *sizes]).cumsum(0).tolist()
    parts = [totals(slice(*pair)) for pair in itertools.pairwise(bounds)]
    whole = metrics(totals(slice(None)).over_ranks(one_rank))
    accumulated = sum(parts, RoutingTotals())
    assert metrics(accumulated.over_ranks(one_rank)) == pytest.approx(whole, rel=1e-5)
    # Each part on a rank of its own.
    flat = [torch.cat([*part.routers, *part.experts]).double() for part in parts]
    summed = parts[0].over_ranks(lambda own: own - own + sum(flat))
    assert metrics(summed) == pytest.approx(whole, rel=1e-5)


def test_statistics_equal_their_definitions():
    routing, experts = records()
    actual = metrics(totals(slice(None)).over_ranks(one_rank))
    first, second = routing
    for label, record in zip(LABELS, routing, strict=True):
        scores, chosen = record.scores_BS, record.chosen_BS
        count, gates, updates, stream = record.update_sums_4.sum(dim=0).tolist()
        shares = chosen.sum(dim=0) / chosen.sum()
        entropy = -sum(p * math.log(p) for p in shares.tolist() if p) / math.log(LENGTH)
        expected = {
            "score_mean": float(scores.mean()),
            "score_std": float(scores.std()),
            "above_half": float((scores.sigmoid() > 0.5).float().mean()),
            "chosen": float(chosen.float().mean()),
            "gate_mean": gates / count,
            "update_ratio": math.sqrt(updates / stream),
            "position_entropy": entropy,
        }
        if record is second:
            both = (first.chosen_BS & second.chosen_BS).sum() / second.chosen_BS.sum()
            expected["chosen_again"] = float(both)
        own = {k.removeprefix(f"router/{label}/"): v for k, v in actual.items() if label in k}
        assert own == pytest.approx(expected, rel=1e-4)
    choices, executed = experts[0].choices_R.sum(dim=0), experts[0].executed_E.sum(dim=0)
    load = (choices / choices.sum()).tolist()
    assert actual["experts/layer_02/load_max"] == pytest.approx(5 * max(load))
    assert actual["experts/layer_02/noop_share"] == pytest.approx(load[-1])
    dropped = 1 - float(executed.sum() / choices[:4].sum())
    assert actual["experts/layer_02/dropped"] == pytest.approx(dropped)


def test_without_routed_tokens_every_statistic_is_finite():
    scores_BS = torch.zeros(2, LENGTH)
    record = RoutingRecord(scores_BS, scores_BS > 0, update_sums_4=torch.zeros(4))
    nothing = ExpertRecord(torch.zeros(5), torch.zeros(4))
    sums = RoutingTotals.of([record, record], [nothing])
    assert all(map(math.isfinite, metrics(sums.over_ranks(one_rank)).values()))
