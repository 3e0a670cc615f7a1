"""Scores by which a routed block chooses its tokens, and a causal prediction of that choice.

Shapes: B batch, S sequence, D model, K chosen.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LinearRouter(nn.Module):
    """One scalar a token, r = w·x, with no squashing (arXiv 2404.02258, section 3.4)."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(d_model))

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Return the scores (B, S), in float32 or wider: in bfloat16 many would tie."""
        wide = torch.promote_types(x_BSD.dtype, torch.float32)
        with torch.autocast(x_BSD.device.type, enabled=False):
            return x_BSD.to(wide) @ self.weight.to(wide)


class Predictor(nn.Module):
    """Guesses from a token alone whether top-k will choose it (arXiv 2404.02258, section 3.5).

    It reads a detached input, so it leaves the gradients of everything else as they are. The input
    is scaled to root mean square 1, for the residual stream grows with depth.
    """

    def __init__(self, d_model: int, hidden_dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.hidden = nn.Linear(d_model, hidden_dim)
        self.out = nn.Linear(hidden_dim, 1)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Return the logits (B, S) of being chosen, without a gradient to ``x_BSD``."""
        x = F.rms_norm(x_BSD.detach(), (x_BSD.shape[-1],), eps=self.eps)
        logits: Tensor = self.out(F.gelu(self.hidden(x))).squeeze(-1)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def top_k(scores_BS: Tensor, count: int) -> Tensor:
    """Return the indices (B, K) of the ``count`` largest scores of each sequence, ascending.

    Ascending order keeps plain causal attention among the chosen valid.
    """
    index_BK: Tensor = scores_BS.detach().topk(count, dim=1, sorted=False).indices
    return index_BK.sort(dim=1).values
