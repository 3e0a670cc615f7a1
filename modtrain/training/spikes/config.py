"""Typed configuration of the handling of loss spikes. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

from modtrain.common.errors import Problem
from modtrain.common.validation import above_zero, at_least, one_of

SPIKE_ACTIONS = ("none", "stop", "skip", "roll_back")
# What the run does after a spike, and the key that limits how often.
_CONTINUES = {
    "skip": ("makes no update at such a step", "max_in_a_row"),
    "roll_back": ("leaves out the samples since the checkpoint", "max_rollbacks"),
}


@dataclass
class SpikeConfig:
    """What is done when the loss or the gradient norm spikes.

    A step is a spike if its loss (the mean over ranks and micro-batches) or the norm of its
    gradient before clipping is more than ``threshold`` standard deviations above the mean of the
    last ``window`` steps, or is NaN or infinite. Spikes do not enter the mean.

    action: ``none``: only NaN and infinity stop the run. ``stop``: a spike stops it. ``skip``: the
        optimizer step is skipped; schedule and data advance. ``roll_back``: resume from the newest
        checkpoint without the samples from there to the spike.
    threshold: standard deviations above the running mean from which a step is a spike.
    window: number of steps for mean and deviation.
    warmup: steps before anything but NaN and infinity counts as a spike.
    max_in_a_row: for ``skip``: one more spike in a row stops the run.
    max_rollbacks: for ``roll_back``: over the whole run; the next spike stops it.
    rollback_steps: for ``roll_back``: how many steps' samples up to the spike are left out; null:
        all since the checkpoint.

    Threshold and window are those of OLMo's step-skipping optimizer (github.com/allenai/OLMo-core,
    ``optim/skip_step_optimizer.py``). PaLM restarted from a checkpoint about 100 steps before
    the spike and skipped 200 to 500 batches (arXiv 2204.02311, section 5.1).
    """

    action: str = "none"
    threshold: float = 6.0
    window: int = 128
    warmup: int = 64
    max_in_a_row: int = 3
    max_rollbacks: int = 3
    rollback_steps: int | None = None

    def problems(self, prefix: str) -> list[Problem]:
        """Everything wrong with the policy."""
        return [
            *one_of(self, prefix, "action", SPIKE_ACTIONS),
            *above_zero(self, prefix, "threshold"),
            # A deviation takes two values.
            *at_least(self, prefix, 2, "window", "warmup"),
            *at_least(self, prefix, 1, "max_in_a_row", "max_rollbacks", "rollback_steps"),
        ]

    def strategy_problems(self, prefix: str, strategy: str) -> list[Problem]:
        """Find an action that the strategy does not support."""
        if self.action not in _CONTINUES or not strategy.startswith("deepspeed"):
            return []
        reason = f"continues after a NaN, and strategy.name={strategy} ends the run at one"
        remedy = "use stop or none, or strategy=fsdp"
        return [Problem(f"{prefix}.action", self.action, reason, remedy)]


def resume_remedy(config: SpikeConfig, strategy: str, is_finite: bool) -> str:
    """Return how a run that stopped at a step can resume, and what would be another run.

    config: under which it stopped. strategy: its name. is_finite: the step is a spike and no NaN or
    infinity.
    """
    options = []
    for action, (effect, limit) in _CONTINUES.items():
        if action == config.action:
            # It reached its limit.
            options.append(f"a larger spike.{limit}")
            continue
        is_refused = SpikeConfig(action).strategy_problems("spike", strategy)
        options.append(f"{'strategy=fsdp ' if is_refused else ''}spike={action}, which {effect}")
    if is_finite:
        options.append("spike=none or a larger spike.threshold, which let such a step pass")
    return (
        f"start it again with {'; or with '.join(options)}. Unchanged it reaches the same step,"
        " unless a device was at fault. With another optimizer.lr or optimizer.grad_clip it is"
        " another run: give another name= too"
    )
