"""From logits to next tokens: the distribution, random numbers per sequence, sampling, drafts.

Shapes: B batch, N rows to sample for, G drafts, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from modtrain.common.errors import ModtrainError
from modtrain.inference.config import SamplingConfig


class SamplingError(ModtrainError):
    """Logits that no token can be sampled from."""


class Drafts(NamedTuple):
    """Proposed tokens (N, G), and the distributions (N, G, V) that they were sampled from."""

    tokens_NG: Tensor
    probability_NGV: Tensor


def distribution(
    logits_BV: Tensor, config: SamplingConfig, seen_BV: Tensor | None = None
) -> Tensor:
    """Return the probabilities (B, V) of the next token; each row sums to 1.

    seen_BV: the tokens that the repetition penalty applies to; None: none. In float64, or float32
    on devices without it. The largest logits are read on the host.

    Raises:
        SamplingError: a row holds NaN or +inf, or nothing but -inf.
    """
    scores_BV = logits_BV.to(_widest(logits_BV.device))
    if seen_BV is not None and config.repetition_penalty != 1:
        penalty = config.repetition_penalty
        penalised_BV = torch.where(scores_BV < 0, scores_BV * penalty, scores_BV / penalty)
        scores_BV = penalised_BV.where(seen_BV, scores_BV)
    best_B1 = scores_BV.amax(dim=-1, keepdim=True)
    if not bool(best_B1.isfinite().all()):
        raise SamplingError(
            "the model's logits are not finite, so no next token can be sampled: its weights are"
            " damaged, or the precision is too low for them (try precision=fp32)"
        )
    if config.greedy:
        likeliest_B1 = scores_BV.argmax(dim=-1, keepdim=True)
        return torch.zeros_like(scores_BV).scatter(1, likeliest_B1, 1.0)
    # Relative to the largest, so that a low temperature cannot overflow.
    scores_BV = (scores_BV - best_B1) / config.temperature
    return _truncate(scores_BV, config).softmax(dim=-1)


def _truncate(scores_BV: Tensor, config: SamplingConfig) -> Tensor:
    """Set tokens outside of top-k, top-p and min-p to -inf, in Hugging Face's order."""
    if config.top_k is not None:
        top_BK = scores_BV.topk(min(config.top_k, scores_BV.shape[-1]), dim=-1).values
        scores_BV = scores_BV.masked_fill(scores_BV < top_BK[:, -1:], -torch.inf)
    if config.top_p is not None and config.top_p < 1:
        # Stable: which of two equal tokens is dropped must not depend on the batch.
        sorted_BV, index_BV = scores_BV.sort(dim=-1, descending=True, stable=True)
        probability_BV = sorted_BV.softmax(dim=-1)
        before_BV = probability_BV.cumsum(dim=-1) - probability_BV
        dropped_BV = torch.zeros_like(before_BV, dtype=torch.bool)
        dropped_BV = dropped_BV.scatter(1, index_BV, before_BV >= config.top_p)
        scores_BV = scores_BV.masked_fill(dropped_BV, -torch.inf)
    if config.min_p is not None:
        probability_BV = scores_BV.softmax(dim=-1)
        least_B1 = config.min_p * probability_BV.amax(dim=-1, keepdim=True)
        scores_BV = scores_BV.masked_fill(probability_BV < least_B1, -torch.inf)
    return scores_BV


class PerSequenceRNG:
    """One random generator per sequence, on the host.

    A sequence draws the same numbers alone and in a batch, on every device.
    """

    def __init__(self, seed: int, count: int, first: int = 0) -> None:
        """Make the generators of the sequences ``first`` to ``first + count`` of a job.

        The seed of a sequence depends on ``seed`` and its number only.
        """
        seeds = [_hash_seed(seed, first + i) for i in range(count)]
        self._generators = [torch.Generator().manual_seed(number) for number in seeds]

    def uniform(self, rows: Sequence[int]) -> Tensor:
        """Return the next number in [0, 1) of each of the sequences ``rows``: (N,), float64."""
        numbers = torch.empty(len(rows), dtype=torch.float64)
        for index, row in enumerate(rows):
            numbers[index].uniform_(generator=self._generators[row])
        return numbers


def draw(probability_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """Sample by inversion: the token (N,), int64, at which the cumulative sum passes each number.

    probability_NV: rows need not sum to 1, but must not be all zero. uniform_N: in [0, 1), on any
    device. A token of probability 0 is never drawn. Nothing is read on the host.
    """
    device, dtype = probability_NV.device, _widest(probability_NV.device)
    uniform_N = uniform_N.to(dtype).to(device, non_blocking=True)
    cumulative_NV = probability_NV.to(dtype).cumsum(dim=-1)
    # A parallel sum may round unevenly, so tokens of probability 0 take the value before them: the
    # cumulative sum then rises only at tokens with a positive probability.
    cumulative_NV = cumulative_NV.where(probability_NV > 0, -1).cummax(dim=-1).values
    total_N = cumulative_NV[:, -1]
    target_N = torch.minimum(uniform_N * total_N, total_N.nextafter(torch.zeros_like(total_N)))
    return torch.searchsorted(cumulative_NV, target_N.unsqueeze(-1), right=True).squeeze(-1)


def verify(
    probability_NTV: Tensor, drafts: Drafts, rng: PerSequenceRNG, numbers: list[int]
) -> tuple[list[int], Tensor]:
    """Return the number of accepted drafts of each sequence, and the token (N,) after them.

    The text has the same distribution as without drafts (arXiv 2211.17192, section 2.3): a draft x
    sampled from q is accepted with probability min(1, p(x) / q(x)), where p is the full model's;
    the first rejected one is replaced by a sample from (p - q)+.

    probability_NTV: the full model's distributions before the first draft and after each, so
    T = G + 1. numbers: of the sequences, whose generators draw equally often whatever is accepted.
    """
    device = probability_NTV.device
    sequences, count = drafts.tokens_NG.shape
    index_NG1 = drafts.tokens_NG.unsqueeze(-1)
    p_NG = probability_NTV[:, :count].gather(2, index_NG1).squeeze(-1)
    q_NG = drafts.probability_NGV.gather(2, index_NG1).squeeze(-1)
    uniform_NG = torch.stack([rng.uniform(numbers) for _ in range(count)], dim=1).to(device)
    # u < p / q, without a division: a drafted token has q > 0.
    accepted_NG = uniform_NG * q_NG < p_NG
    accepted_N = accepted_NG.long().cumprod(dim=1).sum(dim=1)
    row_N = torch.arange(sequences, device=device)
    zero_N1V = torch.zeros_like(probability_NTV[:, :1])
    q_NTV = torch.cat([drafts.probability_NGV, zero_N1V], dim=1)
    residual_NV = (probability_NTV[row_N, accepted_N] - q_NTV[row_N, accepted_N]).clamp(min=0)
    # If p and q are equal a draft is always accepted, so an empty residual is rounding error.
    is_empty_N1 = residual_NV.sum(dim=1, keepdim=True) <= 0
    residual_NV = torch.where(is_empty_N1, probability_NTV[row_N, accepted_N], residual_NV)
    next_N = draw(residual_NV, rng.uniform(numbers))
    return accepted_N.tolist(), next_N


def _widest(device: torch.device) -> torch.dtype:
    """Return float64 if the device supports it."""
    return torch.float32 if device.type == "mps" else torch.float64


def _hash_seed(seed: int, number: int) -> int:
    """Hash both to 32 bits, which is what torch's CPU generator uses of a seed."""
    content = hashlib.blake2b(f"{seed} {number}".encode(), digest_size=4).digest()
    return int.from_bytes(content, "big")
