"""A transformer block as an update of the residual stream, and layers of such updates."""

from __future__ import annotations

from typing import Any

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

    def keys_values(self, x_BSD: Tensor, context: SequenceContext) -> tuple[Tensor, Tensor]:
        """Return the attention's keys and values of all tokens; see `Attention.keys_values`."""
        attention: Any = self.attention
        keys, values = attention.keys_values(x_BSD, context)
        return keys, values

    def forward(self, x_BSD: Tensor, context: SequenceContext) -> Output:
        """Return the update (B, S, D) of both parts together."""
        attended = as_output(self.attention(x_BSD, context))
        fed = as_output(self.mlp(x_BSD + attended.value_BSD, context))
        return Output(
            attended.value_BSD + fed.value_BSD,
            experts=attended.experts + fed.experts,
            received_BS=attended.received_BS,
        )


class Residual(nn.Module):
    """x + f(x): a sequence module that every token enters."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x_BSD: Tensor, context: SequenceContext) -> Output:
        """Return the residual stream after the module."""
        output = as_output(self.module(x_BSD, context))
        return output.with_value(x_BSD + output.value_BSD)


class SplitLayer(nn.Module):
    """A layer whose attention and MLP are routed separately, or only one of them is.

    attention, mlp: each a `Residual` or a `MixtureOfDepths`.
    """

    def __init__(self, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.attention, self.mlp = attention, mlp

    def forward(self, x_BSD: Tensor, context: SequenceContext) -> Output:
        """Return the residual stream after both."""
        attended: Output = self.attention(x_BSD, context)
        context = context.count_entered(attended.routing)
        output: Output = self.mlp(attended.value_BSD, context)
        return Output(
            output.value_BSD,
            attended.routing + output.routing,
            attended.experts + output.experts,
            attended.received_BS,
        )
