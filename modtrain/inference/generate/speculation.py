"""Self-speculation: the model at a low capacity drafts, the full model verifies.

The output has the same distribution as without it (arXiv 2211.17192, section 2.3): a draft x
sampled from q is accepted with probability min(1, p(x) / q(x)), where p is the full model's; the
first rejected one is replaced by a sample from (p - q)+. It saves forward passes of the full model,
which verifies several tokens at once.

Shapes: N sequences, G drafts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from modtrain.inference.generate.config import SamplingConfig
from modtrain.inference.generate.sampling import PerSequenceRNG, distribution, draw
from modtrain.models.cache.cache import Cache
from modtrain.models.transformer import ModelOutput

Extend = Callable[..., ModelOutput]


class Drafts(NamedTuple):
    """Proposed tokens (N, G), and the distributions (N, G, V) that they were sampled from."""

    tokens_NG: Tensor
    probability_NGV: Tensor


class Drafter:
    """Drafts next tokens with the same model at a lower compute budget, and its own cache.

    extend: runs tokens of some rows with that cache, like `Transformer.extend`.
    """

    def __init__(
        self,
        extend: Extend,
        cache: Cache,
        device: torch.device,
        num_tokens: int,
        sampling: SamplingConfig,
        rng: PerSequenceRNG,
    ) -> None:
        self._extend, self._cache, self._device = extend, cache, device
        self._num_tokens = num_tokens
        self._sampling, self._rng = sampling, rng

    def prefill(self, tokens_NS: Tensor, rows: list[int], valid_NS: Tensor | None) -> None:
        """Run tokens of a prompt."""
        self._extend(tokens_NS, self._cache, rows=rows, valid_NS=valid_NS, last_only=True)

    def propose(
        self,
        texts: Sequence[Sequence[int]],
        rows: list[int],
        numbers: list[int],
        seen_NV: Tensor | None,
    ) -> Drafts:
        """Draft what follows the texts of ``rows``, whose newest tokens may not be cached yet.

        numbers: of the sequences, whose generators are used. seen_NV: the tokens that the
        repetition penalty applies to.
        """
        tokens_NS, valid_NS = self._uncached(texts, rows)
        tokens, probabilities = [], []
        for _ in range(self._num_tokens):
            output = self._extend(
                tokens_NS, self._cache, rows=rows, valid_NS=valid_NS, last_only=True
            )
            logits_NV = output.require_logits()[:, -1]
            probability_NV = distribution(logits_NV, self._sampling, seen_NV)
            token_N = draw(probability_NV, self._rng.uniform(numbers))
            if seen_NV is not None:
                seen_NV = seen_NV.scatter(1, token_N.unsqueeze(1), True)
            tokens.append(token_N)
            probabilities.append(probability_NV)
            tokens_NS, valid_NS = token_N.unsqueeze(1), None
        return Drafts(torch.stack(tokens, dim=1), torch.stack(probabilities, dim=1))

    def truncate(self, rows: list[int], seen: list[int]) -> None:
        """Remove drafts after ``seen`` tokens of each row from the cache."""
        kept = [min(self._cache.seen[row], count) for row, count in zip(rows, seen, strict=True)]
        self._cache.truncate(kept, rows)

    def allocated_bytes(self) -> int:
        """Memory of the drafter's cache."""
        return self._cache.allocated_bytes()

    def reset(self, row: int) -> None:
        """Clear a row for another sequence."""
        self._cache.reset(row)

    def _uncached(
        self, texts: Sequence[Sequence[int]], rows: list[int]
    ) -> tuple[Tensor, Tensor | None]:
        """Return the tokens that are not cached (N, S), and False for padding among them."""
        uncached = [text[self._cache.seen[row] :] for text, row in zip(texts, rows, strict=True)]
        return pad_texts(uncached, self._device)


def verify(
    probability_NTV: Tensor, drafts: Drafts | None, rng: PerSequenceRNG, numbers: list[int]
) -> tuple[list[int], Tensor]:
    """Return the number of accepted drafts of each sequence, and the token (N,) after them.

    probability_NTV: the full model's distributions before the first draft and after each, so
    T = G + 1. numbers: of the sequences, whose generators draw equally often whatever is accepted.
    """
    device = probability_NTV.device
    if drafts is None:
        return [0] * len(numbers), draw(probability_NTV[:, 0], rng.uniform(numbers))
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


def pad_texts(texts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return texts as one tensor (N, S), padded at the end, and False for padding.

    The mask is None if nothing is padded.
    """
    lengths = [len(text) for text in texts]
    longest = max(lengths)
    rows = [[*text, *[0] * (longest - len(text))] for text in texts]
    tokens_NS = torch.tensor(rows, dtype=torch.long, device=device)
    if min(lengths) == longest:
        return tokens_NS, None
    length_N1 = torch.tensor(lengths, device=device).unsqueeze(1)
    return tokens_NS, torch.arange(longest, device=device) < length_N1
