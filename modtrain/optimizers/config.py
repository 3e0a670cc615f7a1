"""Typed configuration of the optimizer. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

from modtrain.common.errors import Problem
from modtrain.common.validation import above_zero, decays, not_negative


@dataclass
class OptimizerConfig:
    """AdamW with decoupled weight decay (arXiv 1711.05101).

    name: ``adamw``.
    lr: the highest learning rate.
    beta1, beta2: decay of the first and of the second moment.
    eps: added to the root of the second moment.
    weight_decay: of matrices; norms' gains, biases and router vectors have none.
    grad_clip: largest global norm of the gradient, null for no clipping. Predictors are clipped
    by themselves, so that they cannot change the trunk's step.
    """

    name: str = "adamw"
    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    grad_clip: float | None = 1.0

    def problems(self, prefix: str) -> list[Problem]:
        """Everything wrong with the values; `registry.find_problems` knows the name."""
        return [
            *above_zero(self, prefix, "lr", "eps", "grad_clip"),
            *decays(self, prefix, "beta1", "beta2"),
            *not_negative(self, prefix, "weight_decay"),
        ]
