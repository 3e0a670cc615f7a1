"""Statistics of routers and experts over a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modtrain.models.sequence import ExpertRecord, RoutingRecord

# Of each router: tokens, without padding; scores; their squares; scores above 0; chosen tokens that
# the previous router chose too; and the four of `RoutingRecord.update_sums_4`.
_NUM_SUMS = 9


@dataclass(frozen=True)
class RoutingTotals:
    """Sums over a step's tokens: over micro-batches, and over ranks, their order does not matter.

    routers: of each router its sums, then how often each position was chosen. experts: of each
    mixture the choices of each expert, then the tokens that each computed.
    """

    routers: tuple[Tensor, ...] = ()
    experts: tuple[Tensor, ...] = ()

    @classmethod
    @torch.no_grad()
    def of(cls, routing: Sequence[RoutingRecord], experts: Sequence[ExpertRecord]) -> RoutingTotals:
        """Return the sums of one micro-batch. On the device: nothing is read."""
        previous = (None, *routing)
        return cls(
            tuple(_router_sums(*pair) for pair in zip(routing, previous, strict=False)),
            tuple(torch.cat([record.choices_R, record.executed_E]) for record in experts),
        )

    def __add__(self, other: RoutingTotals) -> RoutingTotals:
        """Return the sums of both; an empty one adds nothing."""
        if not (self.routers or self.experts):
            return other
        return RoutingTotals(
            tuple(a + b for a, b in zip(self.routers, other.routers, strict=True)),
            tuple(a + b for a, b in zip(self.experts, other.experts, strict=True)),
        )

    def over_ranks(self, total: Callable[[Tensor], Tensor]) -> RoutingTotals:
        """Return the sums over all ranks, on the CPU; collective.

        total: sums a tensor of the CPU over the ranks.
        """
        # To the host first: not every device has float64.
        parts = [part.cpu().double() for part in (*self.routers, *self.experts)]
        if not parts:
            return self
        summed = torch.split(total(torch.cat(parts)), [len(part) for part in parts])
        count = len(self.routers)
        return RoutingTotals(tuple(summed[:count]), tuple(summed[count:]))

    def router_metrics(self, labels: Sequence[str]) -> dict[str, float]:
        """Return statistics of each depth router's decisions.

        ``score_mean``, ``score_std``: of the scores. ``above_half``: share of scores whose sigmoid
        is above 1/2, which the auxiliary loss moves towards the capacity. ``chosen``: share of
        routed tokens. ``chosen_again``: share of these that the previous router chose too; by
        chance it is the capacity. ``position_entropy``: of the chosen tokens' positions, over
        log S; 1 for a uniform distribution. ``gate_mean``: mean gate of the routed tokens.
        ``update_ratio``: root mean square of their gated updates over that of their stream.
        """
        metrics: dict[str, float] = {}
        for i, (label, sums) in enumerate(zip(labels, self.routers, strict=True)):
            name = f"router/{label}"
            tokens, score, square, above, again, *update = sums[:_NUM_SUMS].tolist()
            chosen_S = sums[_NUM_SUMS:]
            chosen = float(chosen_S.sum())
            mean = score / tokens
            variance = (square - tokens * mean**2) / max(1, tokens - 1)
            metrics[f"{name}/score_mean"] = mean
            metrics[f"{name}/score_std"] = math.sqrt(max(0.0, variance))
            metrics[f"{name}/above_half"] = above / tokens
            metrics[f"{name}/chosen"] = chosen / tokens
            if i > 0:
                metrics[f"{name}/chosen_again"] = again / max(1, chosen)
            metrics[f"{name}/gate_mean"], metrics[f"{name}/update_ratio"] = update_metrics(update)
            metrics[f"{name}/position_entropy"] = _entropy(chosen_S)
        return metrics

    def expert_metrics(self, labels: Sequence[str], num_noop: int) -> dict[str, float]:
        """Return statistics of each mixture of experts.

        ``load_max``: the largest share of the choices over an even one; 1 is even.
        ``load_entropy``: of the shares, over the log of their number. ``dropped``: share of choices
        beyond an expert's capacity. ``noop_share``: share of the choices of no-op experts, if there
        are any.
        """
        metrics: dict[str, float] = {}
        for label, sums in zip(labels, self.experts, strict=True):
            name, count = f"experts/{label}", (len(sums) - num_noop) // 2
            record = ExpertRecord(*torch.split(sums, [count + num_noop, count]))
            load_R = record.load
            metrics[f"{name}/load_max"] = float(load_R.max()) * len(load_R)
            metrics[f"{name}/load_entropy"] = _entropy(load_R)
            metrics[f"{name}/dropped"] = float(record.dropped)
            if num_noop:
                metrics[f"{name}/noop_share"] = float(load_R[-num_noop:].sum())
        return metrics


def update_metrics(update_sums: Sequence[float]) -> tuple[float, float]:
    """Return the mean gate of the routed tokens and their updates over their stream.

    update_sums: see `RoutingRecord`; of no routed token both are 0.
    """
    count, gates, updates, stream = update_sums
    return gates / max(1, count), math.sqrt(updates / stream) if stream else 0.0


def _router_sums(record: RoutingRecord, before: RoutingRecord | None) -> Tensor:
    scores_BS, chosen_BS = record.scores_BS.float(), record.chosen_BS
    num_tokens = scores_BS.new_full((), scores_BS.numel())
    if record.valid_BS is not None:
        # Zero adds nothing to any of the sums.
        valid_BS = record.valid_BS.expand_as(scores_BS)
        scores_BS, num_tokens = scores_BS.where(valid_BS, 0), valid_BS.sum().float()
    again_BS = chosen_BS if before is None else chosen_BS & before.chosen_BS
    chosen_S = chosen_BS.float().sum(dim=0)
    own_5 = torch.stack(
        [
            num_tokens,
            scores_BS.sum(),
            scores_BS.square().sum(),
            (scores_BS > 0).float().sum(),
            again_BS.float().sum(),
        ]
    )
    update_4 = own_5.new_zeros(4) if record.update_sums_4 is None else record.update_sums_4
    return torch.cat([own_5, update_4.float(), chosen_S])


def _entropy(counts: Tensor) -> float:
    """Entropy of the shares over its largest value, log N."""
    shares = counts / counts.sum().clamp(min=1)
    entropy = -(shares * shares.clamp(min=1e-12).log()).sum()
    return float(entropy) / math.log(max(2, len(shares)))
