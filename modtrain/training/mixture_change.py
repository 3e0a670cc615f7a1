"""What a run may change of its mixture of data: the stages ahead of where it is.

The samples before that place stay those that were read, by the segments of both streams. The run's
configuration has the new stages then, and ``mixture.jsonl`` a line with what they were before.
"""

from __future__ import annotations

import datetime
import json
import os
from dataclasses import asdict

from omegaconf import OmegaConf

from modtrain.checkpoint.reading import read_extra_state
from modtrain.checkpoint.recovery import latest
from modtrain.common.atomic_io import open_to_append, write_text
from modtrain.common.errors import OtherRunError
from modtrain.data.mixture.schedule import Segment
from modtrain.data.mixture.usage import planned_schedule
from modtrain.training.config import TrainConfig
from modtrain.training.plan import TrainingPlan, derive
from modtrain.training.run_directory import RunDirectory, with_stages_of


def settle_mixture(run: RunDirectory, config: TrainConfig) -> str:
    """Accept other stages than the run was started with, and write them down; return a message.

    config: resolved. Returns nothing where the run is new or the stages are what they were.

    Raises:
        OtherRunError: the run has read samples that the new stages change, or something else than
            the stages differs.
    """
    if not run.config.is_file():
        return ""
    before = run.read_config()
    if before.data.stages == config.data.stages:
        return ""
    run.check_same(with_stages_of(config, before))
    newest = latest(run.checkpoints)
    step, position = 0, 0
    if newest is not None:
        step, position = newest[0], int(read_extra_state(newest[1])["progress"]["samples"])
    check_same_mixture(before, config, position, f"{run.path} is a run")
    line = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "step": step,
        "position": position,
        "before": [asdict(stage) for stage in before.data.stages],
        "now": [asdict(stage) for stage in config.data.stages],
    }
    with open_to_append(run.path / "mixture.jsonl") as file:
        file.write(json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    write_text(run.config, OmegaConf.to_yaml(OmegaConf.structured(with_stages_of(before, config))))
    return f"{run.path}: data.stages are others from step {step} on; mixture.jsonl has both"


def check_same_mixture(before: TrainConfig, now: TrainConfig, position: int, subject: str) -> None:
    """Raise OtherRunError unless both read the same samples before ``position`` of the stream.

    before, now: resolved. subject: what ``before`` is of, as the beginning of a sentence.
    """
    if differing := mixture_differences(before, derive(before), now, derive(now), position):
        raise OtherRunError(
            "\n".join([f"{subject} that has read {position:,} samples of its mixture:", *differing])
            + "\nremedy: undo the change of data.stages, or let the new stages begin later"
        )


def mixture_differences(
    before: TrainConfig,
    plan_before: TrainingPlan,
    now: TrainConfig,
    plan: TrainingPlan,
    position: int,
) -> list[str]:
    """Return a line with both mixtures if they differ before ``position`` of the stream."""
    if not now.data.sources:
        return []
    pairs = ((before, plan_before), (now, plan))
    then, later = (_segments(config, its_plan, position) for config, its_plan in pairs)
    if then == later:
        return []
    place = next(
        (a.start for a, b in zip(then, later, strict=False) if a != b),
        max(then + later, key=lambda segment: segment.start).start,
    )
    return [f"  data.stages: other weights from sample {place:,} on than were read"]


def _segments(config: TrainConfig, plan: TrainingPlan, position: int) -> tuple[Segment, ...]:
    run_samples = plan.steps * plan.sequences_per_step
    _, schedule = planned_schedule(config.data, plan.seq_len, run_samples)
    return schedule.before(position)
