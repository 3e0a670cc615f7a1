"""The trunk of a run that branches off another run's checkpoint.

The branch's weights are to be those of a run trained from the start, to the bit. So both runs must
be the same up to the checkpoint: model, data, batches, and the learning rate of every step.
"""

from __future__ import annotations

from modtrain.common.errors import StartingPointError
from modtrain.training.config import TrainConfig
from modtrain.training.mixture_change import mixture_differences
from modtrain.training.plan import TrainingPlan, derive
from modtrain.training.run_directory import RunDirectory, differences
from modtrain.training.schedules import Capacities, lr_factor

_FREE_KEYS = (
    *("name", "runs_dir", "budget", "schedule", "branch", "init", "log", "checkpoint", "eval"),
    *("start_check", "max_time", "data.cache_dir", "data.cache_bytes", "data.fetch_timeout"),
    *(
        "data.path",
        "data.sources.*.path",
        "data.num_workers",
        "data.prefetch_factor",
        "data.verify",
        "data.stages",
    ),
)
"""Keys in which a branch may differ from its trunk.

Of budget, schedule and the data's stages, what follows counts.
"""


def check_branch(
    config: TrainConfig, plan: TrainingPlan, data_fingerprint: str, trunk: RunDirectory
) -> None:
    """Raise StartingPointError unless ``trunk`` is the first part of the run: all that differs.

    config, plan: of the branch, resolved. data_fingerprint: of the data that it will read.
    """
    step = config.branch.step or 0
    differing = differences(trunk.read_config(), config, "the trunk", _FREE_KEYS)
    differing += _differing_files(trunk, data_fingerprint)
    if step >= plan.steps:
        differing.append(f"  branch.step: {step} is not before the last of {plan.steps} steps")
    if not differing:
        differing += _differing_steps(trunk.read_config(), config, plan, step)
    if differing:
        raise StartingPointError(
            "\n".join([f"{trunk.path} is not the first {step} steps of {config.name}:", *differing])
            + "\nremedy: let both runs differ only in budget and schedule, and only after that"
            " step; to start a new run with its weights, use init.run in place of branch.run"
        )


def _differing_files(trunk: RunDirectory, data_fingerprint: str) -> list[str]:
    then = trunk.read_manifest()["data_fingerprint"]
    lines = []
    if then != data_fingerprint:
        lines.append(f"  data: {then[:12]} in the trunk, {data_fingerprint[:12]} now")
    if (trunk.path / "left_out.json").is_file():
        lines.append("  samples: the trunk was rolled back, and leaves some out")
    return lines


def _differing_steps(
    trunk: TrainConfig, config: TrainConfig, plan: TrainingPlan, step: int
) -> list[str]:
    """Find the first step before ``step`` in which learning rate or capacities differ."""
    trunk_plan = derive(trunk, plan.dims)
    lines = []
    for number in range(step):
        rate = lr_factor(config.schedule, number, plan.steps)
        rate_then = lr_factor(trunk.schedule, number, trunk_plan.steps)
        if rate != rate_then:
            lines.append(
                f"  schedule: the rate of step {number + 1} is {rate_then:.6g} of the highest in"
                f" the trunk, {rate:.6g} now"
            )
            break
    if _capacities(trunk_plan, step) != _capacities(plan, step):
        lines.append("  capacity_schedule: other capacities than in the trunk")
    position = step * plan.sequences_per_step
    return lines + mixture_differences(trunk, trunk_plan, config, plan, position)


def _capacities(plan: TrainingPlan, step: int) -> list[tuple[int, int, Capacities]]:
    """Return the capacities of the first ``step`` steps, with first and last step of each."""
    stages = [stage for stage in plan.stages if stage.first < step]
    return [(stage.first, min(stage.stop, step), stage.capacities) for stage in stages]
