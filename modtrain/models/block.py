"""A transformer block as an update of the residual stream."""

from __future__ import annotations

from torch import Tensor, nn

from modtrain.models.sequence import Output, SequenceContext, as_output


class Block(nn.Module):
    """Attention (or another mixer), then an MLP (or experts), each pre-norm.

    Like every sequence module it returns the update f(x), not x + f(x): the caller adds the
    residual, so that a router can gate the update and no residual is added twice.
    """

    def __init__(self, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.attention, self.mlp = attention, mlp

    def forward(self, x_BSD: Tensor, context: SequenceContext) -> Output:
        """Return the update (B, S, D) of both parts together."""
        attended = as_output(self.attention(x_BSD, context))
        fed = as_output(self.mlp(x_BSD + attended.value_BSD, context))
        return Output(
            attended.value_BSD + fed.value_BSD,
            experts=attended.experts + fed.experts,
            received_BS=attended.received_BS,
        )
