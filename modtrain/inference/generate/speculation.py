"""Self-speculation: the model at a low capacity drafts, the model as it is verifies.

What comes out is distributed as without it (arXiv 2211.17192, section 2.3): a draft x that was
drawn by q is taken with probability min(1, p(x) / q(x)), p being the model's own; the first one
that is not is replaced by a draw from (p - q)+. What it saves is forward passes of the whole model,
several tokens of which are run at once.

Shapes: N sequences, G drafts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from modtrain.inference.generate.sampling import Dice, distribution, draw
from modtrain.inference.generate.sampling_config import SamplingConfig
from modtrain.models.cache.cache import Cache
from modtrain.models.transformer import ModelOutput

Extend = Callable[..., ModelOutput]


class Drafts(NamedTuple):
    """Proposed tokens (N, G), and the distributions (N, G, V) that they were drawn by."""

    tokens_NG: Tensor
    probability_NGV: Tensor


class Drafter:
    """Guesses next tokens by a cheaper way through the same model, with a cache of its own.

    extend: runs tokens of some rows through that cache, as `Transformer.extend` does.
    """

    def __init__(
        self,
        extend: Extend,
        cache: Cache,
        device: torch.device,
        num_tokens: int,
        sampling: SamplingConfig,
        dice: Dice,
    ) -> None:
        self._extend, self._cache, self._device = extend, cache, device
        self._num_tokens = num_tokens
        self._sampling, self._dice = sampling, dice

    def feed(self, tokens_NS: Tensor, rows: list[int], valid_NS: Tensor | None) -> None:
        """Run tokens that need no guess, such as a prompt's."""
        self._extend(tokens_NS, self._cache, rows=rows, valid_NS=valid_NS, last_only=True)

    def propose(
        self,
        texts: Sequence[Sequence[int]],
        rows: list[int],
        numbers: list[int],
        seen_NV: Tensor | None,
    ) -> Drafts:
        """Draft what follows the texts of ``rows``, of which the cache may lack the newest tokens.

        numbers: of the sequences, whose dice are thrown. seen_NV: what the repetition penalty
        falls on.
        """
        tokens_NS, valid_NS = self._unread(texts, rows)
        tokens, probabilities = [], []
        for _ in range(self._num_tokens):
            output = self._extend(
                tokens_NS, self._cache, rows=rows, valid_NS=valid_NS, last_only=True
            )
            logits_NV = output.require_logits()[:, -1]
            probability_NV = distribution(logits_NV, self._sampling, seen_NV)
            token_N = draw(probability_NV, self._dice.uniform(numbers))
            if seen_NV is not None:
                seen_NV = seen_NV.scatter(1, token_N.unsqueeze(1), True)
            tokens.append(token_N)
            probabilities.append(probability_NV)
            tokens_NS, valid_NS = token_N.unsqueeze(1), None
        return Drafts(torch.stack(tokens, dim=1), torch.stack(probabilities, dim=1))

    def keep(self, rows: list[int], seen: list[int]) -> None:
        """Forget what was drafted beyond ``seen`` tokens of each row."""
        own = [min(self._cache.seen[row], count) for row, count in zip(rows, seen, strict=True)]
        self._cache.truncate(own, rows)

    def allocated_bytes(self) -> int:
        """Memory of the drafts' cache."""
        return self._cache.allocated_bytes()

    def reset(self, row: int) -> None:
        """Make a row ready for another sequence."""
        self._cache.reset(row)

    def _unread(
        self, texts: Sequence[Sequence[int]], rows: list[int]
    ) -> tuple[Tensor, Tensor | None]:
        """Return the tokens that the cache lacks (N, S), and which of them are padding."""
        unread = [text[self._cache.seen[row] :] for text, row in zip(texts, rows, strict=True)]
        return padded(unread, self._device)


def verify(
    probability_NTV: Tensor, drafts: Drafts | None, dice: Dice, numbers: list[int]
) -> tuple[list[int], Tensor]:
    """Return how many drafts of each sequence are taken, and the token (N,) that follows them.

    probability_NTV: the model's own distributions behind each draft and before the first, so
    T = G + 1. numbers: of the sequences, whose dice are thrown: as often whatever is taken.
    """
    device = probability_NTV.device
    if drafts is None:
        chosen_NV = probability_NTV[:, 0]
        return [0] * len(numbers), draw(chosen_NV, dice.uniform(numbers))
    sequences, count = drafts.tokens_NG.shape
    index_NG1 = drafts.tokens_NG.unsqueeze(-1)
    own_NG = probability_NTV[:, :count].gather(2, index_NG1).squeeze(-1)
    drafted_NG = drafts.probability_NGV.gather(2, index_NG1).squeeze(-1)
    uniform_NG = torch.stack([dice.uniform(numbers) for _ in range(count)], dim=1).to(device)
    # u < p / q, without a division: a drafted token has q > 0.
    taken_NG = uniform_NG * drafted_NG < own_NG
    taken_N = taken_NG.long().cumprod(dim=1).sum(dim=1)
    number_N = torch.arange(sequences, device=device)
    zero_N1V = torch.zeros_like(probability_NTV[:, :1])
    drafted_NTV = torch.cat([drafts.probability_NGV, zero_N1V], dim=1)
    rest_NV = (probability_NTV[number_N, taken_N] - drafted_NTV[number_N, taken_N]).clamp(min=0)
    # Where p and q agree to the last bit a draft is always taken, so this is rounding at most.
    is_empty_N1 = rest_NV.sum(dim=1, keepdim=True) <= 0
    rest_NV = torch.where(is_empty_N1, probability_NTV[number_N, taken_N], rest_NV)
    next_N = draw(rest_NV, dice.uniform(numbers))
    return taken_N.tolist(), next_N


def padded(texts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return texts as one tensor (N, S), padded behind, and which tokens are their own.

    None where none is padded.
    """
    lengths = [len(text) for text in texts]
    longest = max(lengths)
    rows = [[*text, *[0] * (longest - len(text))] for text in texts]
    tokens_NS = torch.tensor(rows, dtype=torch.long, device=device)
    if min(lengths) == longest:
        return tokens_NS, None
    length_N1 = torch.tensor(lengths, device=device).unsqueeze(1)
    return tokens_NS, torch.arange(longest, device=device) < length_N1
