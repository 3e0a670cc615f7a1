"""Typed configuration of the optimizer. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field

from modtrain.common.errors import Problem
from modtrain.common.validation import above_zero, at_least, decays, not_empty, one_of

ROUTERS = "routers"
"""A pattern of parameters: all that depth routing adds."""
ADJUST_LR = ("match_rms_adamw", "original")


@dataclass
class MuonConfig:
    """What Muon does with the layers' matrices; AdamW's keys hold for all other parameters.

    lr: the highest learning rate of these matrices; null takes ``optimizer.lr``.
    weight_decay: of these matrices; null takes ``optimizer.weight_decay``.
    momentum: decay of the running mean of gradients.
    nesterov: whether the gradient counts once more on top of the mean.
    ns_steps: Newton-Schulz iterations.
    adjust_lr: how the rate follows a matrix's shape (A, B). ``match_rms_adamw``: times 0.2
    sqrt(max(A, B)), after which AdamW's rates fit (arXiv 2502.16982). ``original``: times
    sqrt(max(1, A / B)), with rates around 0.02.
    """

    lr: float | None = None
    weight_decay: float | None = None
    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    adjust_lr: str = "match_rms_adamw"

    def problems(self, prefix: str) -> list[Problem]:
        """Everything wrong with the values."""
        problems = [
            *above_zero(self, prefix, "lr"),
            *at_least(self, prefix, 0, "weight_decay"),
            *decays(self, prefix, "momentum"),
            *at_least(self, prefix, 1, "ns_steps"),
            *one_of(self, prefix, "adjust_lr", ADJUST_LR),
        ]
        # torch.optim.Muon raises at its first step.
        if self.ns_steps >= 100:
            reason, remedy = "is not below torch's limit of 100", "5 is usual"
            problems.append(Problem(f"{prefix}.ns_steps", self.ns_steps, reason, remedy))
        return problems


@dataclass
class ParameterGroupConfig:
    """Parameters with a learning rate of their own.

    parameters: patterns of names, such as ``layers.0-3.*``, or ``routers``.
    lr_scale: what their rate is multiplied by.
    start_step: steps before it leave them as they are; then they are trained, with a warm-up of the
        schedule's length.
    """

    parameters: list[str] = field(default_factory=list)
    lr_scale: float = 1.0
    start_step: int = 0

    def problems(self, prefix: str) -> list[Problem]:
        """Everything wrong with the values."""
        return [
            *not_empty(self, prefix, "parameters", "name some: parameters=[routers]"),
            *above_zero(self, prefix, "lr_scale"),
            *at_least(self, prefix, 0, "start_step"),
        ]


@dataclass
class OptimizerConfig:
    """AdamW with decoupled weight decay (arXiv 1711.05101), or Muon for the layers' matrices.

    name: ``adamw``, or ``muon``: see ``optimizer.muon``.
    lr: the highest learning rate.
    beta1, beta2: decay of the first and of the second moment.
    eps: added to the root of the second moment.
    weight_decay: of matrices; norms' gains, biases and router vectors have none.
    router_lr: the highest learning rate of depth routers and their gates; null takes ``lr``.
    grad_clip: largest global norm of the gradient, null for no clipping. Predictors are clipped
    by themselves, so that they cannot change the trunk's step.
    train: patterns of the names of the parameters that are trained, such as ``[routers]`` or
    ``["layers.0-3.*", head.weight]``; the others are frozen. null: all are trained.
    groups: parameters with rates of their own; of those that a parameter is in, the first counts.
    """

    name: str = "adamw"
    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    router_lr: float | None = None
    grad_clip: float | None = 1.0
    muon: MuonConfig = field(default_factory=MuonConfig)
    train: list[str] | None = None
    groups: list[ParameterGroupConfig] = field(default_factory=list)

    def problems(self, prefix: str) -> list[Problem]:
        """Everything wrong with the values; `registry.find_problems` knows the name."""
        empty = []
        if self.train == []:
            reason, remedy = "is empty: nothing would be trained", "name some, or null for all"
            empty.append(Problem(f"{prefix}.train", self.train, reason, remedy))
        return [
            *empty,
            *(p for n, g in enumerate(self.groups) for p in g.problems(f"{prefix}.groups[{n}]")),
            *above_zero(self, prefix, "lr", "eps", "router_lr", "grad_clip"),
            *decays(self, prefix, "beta1", "beta2"),
            *at_least(self, prefix, 0, "weight_decay"),
            *self.muon.problems(f"{prefix}.muon"),
        ]
