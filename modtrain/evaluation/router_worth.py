"""What trained routers are worth: the loss with another choice of tokens at equal capacity.

Shapes: B batch, S sequence, V vocabulary, N sequences.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modtrain.common.ignored_target import IGNORED
from modtrain.data.stream.batch import Batch
from modtrain.evaluation.held_out import evaluation_mode
from modtrain.models.depth.config import RouterSwap, Selection
from modtrain.models.depth.router import to_fp32_or_wider
from modtrain.models.transformer import Transformer

_NUM_RESAMPLES = 2000


@dataclass
class SwapResult:
    """The loss of a model under a swap of its routers' choice, in nats a token.

    change: of the loss over that of the routers' own choice, as a share of the latter. low, high:
    its interval over sequences.
    """

    loss: float
    change: float
    low: float
    high: float


@dataclass
class RouterWorth:
    """The results of `router_worth`. loss: of the routers' own choice, in nats a token."""

    num_sequences: int
    loss: float
    swaps: dict[RouterSwap, SwapResult]


def router_worth(
    model: Transformer,
    batches: Iterable[Batch],
    precision: AbstractContextManager[Any],
    selection: Selection,
    swaps: Sequence[RouterSwap],
    *,
    capacities: Sequence[float | None] | None = None,
    level: float = 0.95,
) -> RouterWorth:
    """Evaluate ``model`` under each of ``swaps`` on the same sequences.

    precision, capacities: as for `held_out.evaluate`. level: of the intervals, by a paired
    bootstrap over sequences. They say how certain a change is for this model, not for another seed
    of training.

    Raises:
        ValueError: there is no batch.
    """
    losses: dict[RouterSwap | None, list[Tensor]] = {swap: [] for swap in (None, *swaps)}
    counts: list[Tensor] = []
    with evaluation_mode(model) as device, precision:
        for batch in batches:
            on_device = batch.to(device)
            counts.append((batch.targets_BS != IGNORED).sum(dim=1))
            for swap, values in losses.items():
                output = model(
                    on_device.inputs_BS,
                    selection=selection,
                    capacities=capacities,
                    swap=swap,
                    **on_device.masks(),
                )
                values.append(_sequence_losses(output.require_logits(), on_device.targets_BS))
    if not losses[None]:
        raise ValueError("there are no held-out batches")
    # A sequence counts for as many tokens as it has, padding left out: all 1 without it.
    count_N = torch.cat(counts).double()
    weight_N = count_N / count_N.mean().clamp(min=1)
    columns = {swap: torch.cat(values) * weight_N for swap, values in losses.items()}
    own_N = columns.pop(None)
    results = {
        swap: _result(own_N, swapped_N, level)
        for swap, swapped_N in columns.items()
        if swap is not None
    }
    return RouterWorth(len(own_N), float(own_N.mean()), results)


def _sequence_losses(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """Return the mean loss of each sequence (B,), 0 without a target, on the host in float64."""
    losses = [
        # One sequence at a time: in float32 the logits of a batch would take twice the memory.
        F.cross_entropy(to_fp32_or_wider(logits_SV), targets_S)
        for logits_SV, targets_S in zip(logits_BSV, targets_BS, strict=True)
    ]
    has_target_B = (targets_BS != IGNORED).any(dim=1)
    return torch.stack(losses).where(has_target_B, 0).cpu().double()


def _result(own_N: Tensor, swapped_N: Tensor, level: float) -> SwapResult:
    generator = torch.Generator().manual_seed(0)
    index_RN = torch.randint(len(own_N), (_NUM_RESAMPLES, len(own_N)), generator=generator)
    change_R = swapped_N[index_RN].mean(dim=1) / own_N[index_RN].mean(dim=1) - 1
    tails_2 = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = change_R.quantile(tails_2).tolist()
    loss = float(swapped_N.mean())
    return SwapResult(loss, loss / float(own_N.mean()) - 1, low, high)
