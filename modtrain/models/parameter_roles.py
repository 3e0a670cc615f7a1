"""What a model's parameters are for: products of its layers, or decisions of its routers."""

from __future__ import annotations

from torch import nn

from modtrain.models.depth.layer import MixtureOfDepths
from modtrain.models.experts.layer import Experts
from modtrain.models.transformer import Transformer


def deciding_parameters(module: nn.Module) -> set[nn.Parameter]:
    """Return the parameters of the routers, predictors and gates in ``module``."""
    deciding: set[nn.Parameter] = set()
    for inner in module.modules():
        parts: tuple[nn.Module | None, ...] = ()
        if isinstance(inner, MixtureOfDepths):
            parts = (inner.router, inner.predictor, inner.gate)
        elif isinstance(inner, Experts):
            parts = (inner.expert_router,)
        deciding.update(p for part in parts if part is not None for p in part.parameters())
    return deciding


def hidden_matrices(model: Transformer) -> list[nn.Parameter]:
    """Return the matrices that the layers multiply by, each one (out, in), in running order.

    Those of mixers, MLPs and shared experts. Not the embedding and the head, nor what decides, nor
    routed experts, whose matrices lie in one tensor (E, in, out), nor a convolution's taps.
    `modtrain.models.flops.hidden_matrix_shapes` has their shapes.
    """
    deciding = deciding_parameters(model)
    linears = [m for layer in model.layers for m in layer.modules() if isinstance(m, nn.Linear)]
    weights = [linear.get_parameter("weight") for linear in linears]
    return [weight for weight in weights if weight not in deciding]
