"""AdamW (arXiv 1711.05101): torch's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from modtrain.models.config import ModelConfig
from modtrain.models.flops import parameters
from modtrain.optimizers.base import OptimizerSpec
from modtrain.optimizers.config import OptimizerConfig
from modtrain.optimizers.parameter_groups import split_groups

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import AdamW, Optimizer

BYTES_PER_PARAMETER = 8
"""Two moments in fp32."""


class AdamWSpec(OptimizerSpec):
    """AdamW over all parameters."""

    name = "adamw"
    state_label = "AdamW moments"
    zero_state = ("exp_avg", "exp_avg_sq")
    zero_hyperparameters = ("lr", "initial_lr", "betas", "eps", "weight_decay")

    def build(self, model: nn.Module, config: OptimizerConfig) -> Optimizer:
        """See `OptimizerSpec.build`."""
        return adamw([p for p in model.parameters() if p.requires_grad], config, model)

    def is_instance(self, optimizer: Optimizer) -> bool:
        """See `OptimizerSpec.is_instance`."""
        from torch.optim import Adam

        return isinstance(optimizer, Adam)

    def initial_state(self, group: Mapping[str, Any], parameter: Tensor) -> dict[str, Tensor]:
        """See `OptimizerSpec.initial_state`."""
        import torch

        # On the host unless the step itself runs on the device (torch.optim.Adam._init_group).
        device = parameter.device if group["capturable"] or group["fused"] else torch.device("cpu")
        state = {"step": torch.zeros((), dtype=torch.float32, device=device)}
        names = ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group["amsgrad"] else ()))
        return state | {name: torch.zeros_like(parameter.detach()) for name in names}

    def state_bytes(self, model: ModelConfig) -> int:
        """See `OptimizerSpec.state_bytes`."""
        return BYTES_PER_PARAMETER * parameters(model).total


def adamw(parameters: Sequence[nn.Parameter], config: OptimizerConfig, model: nn.Module) -> AdamW:
    """AdamW over ``parameters`` of ``model``: matrices decay, vectors (gains, biases) do not.

    Depth routers have groups of their own where `OptimizerConfig.router_lr` is set, and so have the
    parameters that `OptimizerConfig.groups` names. A group's
    ``rate_name`` is the name of its rate in `OptimizerSpec.rates`.
    """
    from torch.optim import AdamW

    from modtrain.models.transformer import router_parameters

    routers = set() if config.router_lr is None else router_parameters(model)
    groups = [
        {
            "params": [p for p in parameters if (p.ndim >= 2) == decays and (p in routers) == own],
            "weight_decay": config.weight_decay if decays else 0.0,
            "rate_name": "lr_router" if own else "lr",
            **({"lr": config.router_lr} if own else {}),
        }
        for own in (False, True)
        for decays in (True, False)
    ]
    return AdamW(
        split_groups(groups, model, config),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=parameters[0].device.type in ("cpu", "cuda"),
    )
