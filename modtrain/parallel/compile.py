"""What is compiled: a whole model, or each of its layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from modtrain.common.torch_compat import compile_options


def compile_model(model: nn.Module, num_stages: int = 1) -> Any:
    """Compile the whole model in one graph for each stage of the schedule of capacities."""
    return torch.compile(model, **_options(num_stages))


def compile_layers(model: nn.Module, num_stages: int = 1) -> None:
    """Compile each of ``model.layers`` in place, in one graph for each stage.

    Training's graphs alone: `HeldOutCallback` evaluates without the compiler.
    """
    for layer in model.get_submodule("layers").children():
        layer.compile(**_options(num_stages))


def _options(num_stages: int) -> dict[str, Any]:
    return {
        "fullgraph": True,
        "dynamic": False,
        # Layers, and other models in the process, do not count against each other's limit.
        **compile_options(recompile_limit=max(8, num_stages + 1)),
    }
