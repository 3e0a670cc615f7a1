"""What the rest of the package has to know of an optimizer. Imports nothing heavy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from modtrain.models.config import ModelConfig
from modtrain.optimizers.config import OptimizerConfig

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer


class OptimizerSpec(ABC):
    """One kind of optimizer. Methods that need torch import it themselves.

    name: its `OptimizerConfig.name`.
    state_label: what it keeps between steps, as `modtrain plan` prints it.
    section: the field of `OptimizerConfig` that holds the keys of its own, if it has any.
    zero_state: the names of its state's tensors if DeepSpeed's ZeRO can run it: its step is
        elementwise, with these tensors, which have the shape of the parameter, and a ``step``.
        None: ZeRO, which steps flat pieces of several parameters, cannot run it.
    zero_hyperparameters: what such a run takes over from a checkpoint's groups of parameters.
    """

    name: ClassVar[str]
    state_label: ClassVar[str]
    section: ClassVar[str | None] = None
    zero_state: ClassVar[tuple[str, ...] | None] = None
    zero_hyperparameters: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def build(self, model: nn.Module, config: OptimizerConfig) -> Optimizer:
        """Make one over the parameters of ``model`` that need gradients, sharded or not."""

    @abstractmethod
    def is_instance(self, optimizer: Optimizer) -> bool:
        """Whether ``optimizer`` is one of this kind."""

    @abstractmethod
    def initial_state(self, group: Mapping[str, Any], parameter: Tensor) -> dict[str, Tensor]:
        """Return the state of a parameter of ``group`` as the first step makes it, zeros."""

    @abstractmethod
    def state_bytes(self, model: ModelConfig) -> int:
        """Return the bytes of its state for the whole model, all parameters being trained."""

    def rates(self, config: OptimizerConfig) -> dict[str, float]:
        """Return the highest learning rate of each part, by the name that records have it under."""
        own = config.router_lr
        return {"lr": config.lr} if own is None else {"lr": config.lr, "lr_router": own}

    def step_flops(self, model: ModelConfig, config: OptimizerConfig) -> int:
        """Return the FLOPs of the matrix products of one step for the whole model."""
        del model, config
        return 0
