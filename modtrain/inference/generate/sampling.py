"""From logits to a next token: the distribution, the dice and the draw.

Shapes: B batch, N rows drawn for, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from modtrain.common.errors import ModtrainError
from modtrain.inference.generate.sampling_config import SamplingConfig


class SamplingError(ModtrainError):
    """Logits that no token can be drawn by."""


def distribution(
    logits_BV: Tensor, config: SamplingConfig, seen_BV: Tensor | None = None
) -> Tensor:
    """Return the probabilities (B, V) that a next token is drawn by; those of a row sum to 1.

    seen_BV: which tokens the repetition penalty falls on; None: on no token. float64, and float32
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
            "the model's logits are not finite, so that there is no next token to draw: its weights"
            " are damaged, or the precision is too low for them (try precision=fp32)"
        )
    if config.greedy:
        likeliest_B1 = scores_BV.argmax(dim=-1, keepdim=True)
        return torch.zeros_like(scores_BV).scatter(1, likeliest_B1, 1.0)
    # Below the largest nothing can overflow, however low the temperature.
    scores_BV = (scores_BV - best_B1) / config.temperature
    return _kept(scores_BV, config).softmax(dim=-1)


def _kept(scores_BV: Tensor, config: SamplingConfig) -> Tensor:
    """Set what top-k, top-p and min-p leave out to -inf, in the order of Hugging Face."""
    if config.top_k is not None:
        top_BK = scores_BV.topk(min(config.top_k, scores_BV.shape[-1]), dim=-1).values
        scores_BV = scores_BV.masked_fill(scores_BV < top_BK[:, -1:], -torch.inf)
    if config.top_p is not None and config.top_p < 1:
        # Stable: which of two equals goes must not depend on the batch.
        sorted_BV, index_BV = scores_BV.sort(dim=-1, descending=True, stable=True)
        share_BV = sorted_BV.softmax(dim=-1)
        before_BV = share_BV.cumsum(dim=-1) - share_BV
        out_BV = torch.zeros_like(before_BV, dtype=torch.bool)
        out_BV = out_BV.scatter(1, index_BV, before_BV >= config.top_p)
        scores_BV = scores_BV.masked_fill(out_BV, -torch.inf)
    if config.min_p is not None:
        share_BV = scores_BV.softmax(dim=-1)
        least_B1 = config.min_p * share_BV.amax(dim=-1, keepdim=True)
        scores_BV = scores_BV.masked_fill(share_BV < least_B1, -torch.inf)
    return scores_BV


class Dice:
    """One random generator a sequence, on the host.

    A sequence draws the same numbers alone and in a batch, on every device, and whatever the
    others do.
    """

    def __init__(self, seeds: Iterable[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    @classmethod
    def of(cls, seed: int, count: int, first: int = 0) -> Dice:
        """Return the dice of the sequences ``first`` to ``first + count`` of a job.

        The seed of a sequence depends on ``seed`` and its number alone.
        """
        return cls(_mixed(seed, first + i) for i in range(count))

    def __len__(self) -> int:
        """How many sequences there are."""
        return len(self._generators)

    def uniform(self, rows: Sequence[int]) -> Tensor:
        """Return the next number in [0, 1) of each of the sequences ``rows``: (N,), float64."""
        numbers = torch.empty(len(rows), dtype=torch.float64)
        for place, row in enumerate(rows):
            numbers[place].uniform_(generator=self._generators[row])
        return numbers


def draw(probability_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """Return the token at which the cumulative distribution passes each number: (N,), int64.

    probability_NV: rows need not sum to 1, but hold something. uniform_N: in [0, 1), on any
    device. A token of probability 0 is never drawn. Nothing is read on the host.
    """
    device, dtype = probability_NV.device, _widest(probability_NV.device)
    uniform_N = uniform_N.to(dtype).to(device, non_blocking=True)
    cumulative_NV = probability_NV.to(dtype).cumsum(dim=-1)
    # A parallel sum may round differently from place to place. So that the rise is at tokens with
    # a probability and nowhere else, the others take the value before them.
    cumulative_NV = cumulative_NV.where(probability_NV > 0, -1).cummax(dim=-1).values
    total_N = cumulative_NV[:, -1]
    target_N = torch.minimum(uniform_N * total_N, total_N.nextafter(torch.zeros_like(total_N)))
    return torch.searchsorted(cumulative_NV, target_N.unsqueeze(-1), right=True).squeeze(-1)


def _widest(device: torch.device) -> torch.dtype:
    """Return float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def _mixed(seed: int, number: int) -> int:
    """Hash both into the 32 bits that torch's generator on the CPU uses of a seed."""
    content = hashlib.blake2b(f"{seed} {number}".encode(), digest_size=4).digest()
    return int.from_bytes(content, "big")
