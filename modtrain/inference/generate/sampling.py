"""From logits to a next token: the distribution, random numbers per sequence, and sampling.

Shapes: B batch, N rows to sample for, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from modtrain.common.errors import ModtrainError
from modtrain.inference.generate.config import SamplingConfig


class SamplingError(ModtrainError):
    """Logits that no token can be sampled from."""


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

    def __init__(self, seeds: Iterable[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    @classmethod
    def from_seed(cls, seed: int, count: int, first: int = 0) -> PerSequenceRNG:
        """Return the generators of the sequences ``first`` to ``first + count`` of a job.

        The seed of a sequence depends on ``seed`` and its number only.
        """
        return cls(_hash_seed(seed, first + i) for i in range(count))

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self._generators)

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


def _widest(device: torch.device) -> torch.dtype:
    """Return float64 if the device supports it."""
    return torch.float32 if device.type == "mps" else torch.float64


def _hash_seed(seed: int, number: int) -> int:
    """Hash both to 32 bits, which is what torch's CPU generator uses of a seed."""
    content = hashlib.blake2b(f"{seed} {number}".encode(), digest_size=4).digest()
    return int.from_bytes(content, "big")
