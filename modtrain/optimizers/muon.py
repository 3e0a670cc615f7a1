"""Muon for the layers' matrices, AdamW for everything else.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) steps a matrix by its momentum
made orthogonal, in ``ns_steps`` Newton-Schulz iterations. The step is `torch.optim.Muon`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from modtrain.models.config import ModelConfig
from modtrain.models.flops import hidden_matrix_shapes, parameters
from modtrain.optimizers import adamw
from modtrain.optimizers.base import OptimizerSpec
from modtrain.optimizers.config import OptimizerConfig
from modtrain.optimizers.parameter_groups import split_groups

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

# One momentum in fp32.
_BYTES_PER_PARAMETER = 4


class MuonSpec(OptimizerSpec):
    """Muon over `hidden_matrices`, AdamW over the rest, as one optimizer."""

    name = "muon"
    state_label = "Muon's momentum, AdamW moments of the rest"
    section = "muon"

    def build(self, model: nn.Module, config: OptimizerConfig) -> Optimizer:
        """See `OptimizerSpec.build`. ``model`` is a `Transformer`."""
        from modtrain.models.transformer import Transformer, hidden_matrices
        from modtrain.optimizers.distributed_muon import DistributedMuon
        from modtrain.optimizers.joint import JointOptimizer

        if not isinstance(model, Transformer):
            raise TypeError("Muon needs a Transformer: it has to know the layers' matrices")
        own = config.muon
        matrices = [matrix for matrix in hidden_matrices(model) if matrix.requires_grad]
        hidden = set(matrices)
        rest = [p for p in model.parameters() if p.requires_grad and p not in hidden]
        parts: list[Optimizer] = []
        if matrices:
            whole = {"params": matrices, "lr": self._rate(config), "rate_name": "lr_muon"}
            muon = DistributedMuon(
                split_groups([whole], model, config),
                lr=self._rate(config),
                weight_decay=config.weight_decay if own.weight_decay is None else own.weight_decay,
                momentum=own.momentum,
                nesterov=own.nesterov,
                ns_steps=own.ns_steps,
                adjust_lr_fn=own.adjust_lr,
            )
            parts.append(muon)
        if rest:
            parts.append(adamw.adamw(rest, config, model))
        return JointOptimizer(parts)

    def is_instance(self, optimizer: Optimizer) -> bool:
        """See `OptimizerSpec.is_instance`."""
        from modtrain.optimizers.joint import JointOptimizer

        return isinstance(optimizer, JointOptimizer)

    def initial_state(self, group: Mapping[str, Any], parameter: Tensor) -> dict[str, Tensor]:
        """See `OptimizerSpec.initial_state`."""
        import torch

        if "betas" in group:
            return adamw.AdamWSpec().initial_state(group, parameter)
        return {"momentum_buffer": torch.zeros_like(parameter.detach())}

    def state_bytes(self, model: ModelConfig) -> int:
        """See `OptimizerSpec.state_bytes`."""
        hidden = sum(rows * columns for rows, columns in hidden_matrix_shapes(model))
        rest = parameters(model).total - hidden
        return _BYTES_PER_PARAMETER * hidden + adamw.BYTES_PER_PARAMETER * rest

    def rates(self, config: OptimizerConfig) -> dict[str, float]:
        """See `OptimizerSpec.rates`."""
        return super().rates(config) | {"lr_muon": self._rate(config)}

    def _rate(self, config: OptimizerConfig) -> float:
        own = config.muon.lr
        return config.lr if own is None else own

    def step_flops(self, model: ModelConfig, config: OptimizerConfig) -> int:
        """See `OptimizerSpec.step_flops`."""
        # An iteration: X Xᵀ, its square, and that times X; X has the smaller side r in front.
        shapes = (sorted(shape) for shape in hidden_matrix_shapes(model))
        return config.muon.ns_steps * sum(4 * r * r * c + 2 * r**3 for r, c in shapes)
