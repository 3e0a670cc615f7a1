"""modtrain: train Mixture-of-Depths language models on one machine or many.

The names below are imported when first used, so that ``import modtrain`` loads no torch.
docs/reference/python.md has an example of each.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modtrain.inference.api import generate, load_run
    from modtrain.inference.config import SamplingConfig
    from modtrain.models.config import ModelConfig
    from modtrain.models.depth.config import ComputeBudget, RouterConfig
    from modtrain.models.depth.layer import MixtureOfDepths
    from modtrain.models.depth.losses import predictor_loss
    from modtrain.models.flops import forward_flops
    from modtrain.models.transformer import Transformer

__version__ = "0.1.0"

__all__ = [
    "ComputeBudget",
    "MixtureOfDepths",
    "ModelConfig",
    "RouterConfig",
    "SamplingConfig",
    "Transformer",
    "forward_flops",
    "generate",
    "load_run",
    "predictor_loss",
]

_MODULES = {
    "ComputeBudget": "modtrain.models.depth.config",
    "MixtureOfDepths": "modtrain.models.depth.layer",
    "ModelConfig": "modtrain.models.config",
    "RouterConfig": "modtrain.models.depth.config",
    "SamplingConfig": "modtrain.inference.config",
    "Transformer": "modtrain.models.transformer",
    "forward_flops": "modtrain.models.flops",
    "generate": "modtrain.inference.api",
    "load_run": "modtrain.inference.api",
    "predictor_loss": "modtrain.models.depth.losses",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'modtrain' has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
