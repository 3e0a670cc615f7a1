"""The optimizers that there are. A new one is a file beside this one and a line in `OPTIMIZERS`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modtrain.common.errors import Problem
from modtrain.common.validation import one_of
from modtrain.optimizers.adamw import AdamWSpec
from modtrain.optimizers.base import OptimizerSpec
from modtrain.optimizers.config import OptimizerConfig
from modtrain.optimizers.muon import MuonSpec

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

OPTIMIZERS: dict[str, OptimizerSpec] = {"adamw": AdamWSpec(), "muon": MuonSpec()}


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """Make the optimizer that ``config`` names, over the parameters that need gradients."""
    return OPTIMIZERS[config.name].build(model, config)


def _uneven_starts(config: OptimizerConfig, prefix: str) -> list[Problem]:
    """Find groups that start later than others, which one count of steps cannot tell apart."""
    reason = "is not for DeepSpeed, which counts steps once for all parameters"
    remedy = "use strategy=ddp or strategy=fsdp; or two runs: optimizer.train, then init.run"
    return [
        Problem(f"{prefix}.groups[{number}].start_step", group.start_step, reason, remedy)
        for number, group in enumerate(config.groups)
        if group.start_step
    ]


def find_problems(config: OptimizerConfig, prefix: str, uses_zero: bool = False) -> list[Problem]:
    """Everything wrong with the choice of the optimizer.

    uses_zero: the run is DeepSpeed's.
    """
    problems = one_of(config, prefix, "name", tuple(OPTIMIZERS))
    problems += _uneven_starts(config, prefix) if uses_zero else []
    for name, spec in OPTIMIZERS.items():
        own = None if spec.section is None else getattr(config, spec.section)
        if not problems and name != config.name and own is not None and own != type(own)():
            key = f"{prefix}.{spec.section}"
            reason = f"has no effect with {prefix}.name={config.name}"
            problems.append(Problem(key, own, reason, f"leave it out, or use optimizer={name}"))
    if not problems and uses_zero and OPTIMIZERS[config.name].zero_state is None:
        able = " or ".join(f"optimizer={n}" for n, s in OPTIMIZERS.items() if s.zero_state)
        reason = "cannot run under DeepSpeed's ZeRO, which steps flat pieces of the parameters"
        remedy = f"use {able}, or strategy=ddp or strategy=fsdp"
        problems.append(Problem(f"{prefix}.name", config.name, reason, remedy))
    return problems


def spec_of(optimizer: Optimizer) -> OptimizerSpec:
    """Return what is known of the kind of ``optimizer``.

    Raises:
        TypeError: it is none of `OPTIMIZERS`.
    """
    for spec in OPTIMIZERS.values():
        if spec.is_instance(optimizer):
            return spec
    raise TypeError(f"{type(optimizer).__name__} is none of {', '.join(OPTIMIZERS)}")
