"""How much of each source a run reads, by stage. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby

from modtrain.common.errors import Problem
from modtrain.data.config import DataConfig
from modtrain.data.mixture.schedule import MixtureSchedule, epoch_limit
from modtrain.data.stream.index_json import read_summary


@dataclass(frozen=True)
class StageUsage:
    """What a run reads in a stage, or in all.

    start, stop: positions in the stream. samples: by source.
    """

    start: int
    stop: int
    samples: dict[str, int]


@dataclass(frozen=True)
class MixtureUsage:
    """What a run reads of a mixture.

    available: samples of each source in an epoch. stages: those that the run comes to, in order.
    suffices_for: samples that the sources' epochs suffice for, where they do not for the run.
    """

    available: dict[str, int]
    stages: tuple[StageUsage, ...]
    suffices_for: int | None

    @property
    def total(self) -> dict[str, int]:
        """Samples of each source in the whole run."""
        return {n: sum(stage.samples[n] for stage in self.stages) for n in self.available}


def mixture_usage(config: DataConfig, seq_len: int, run_samples: int) -> MixtureUsage:
    """Return what a run of ``run_samples`` samples of ``seq_len`` tokens reads of each source.

    Raises:
        ConfigError: stages that such a run cannot have.
        DataError: a source is missing or damaged.
    """
    available, schedule = planned_schedule(config, seq_len, run_samples)
    # It loads numpy, and `status` imports this module.
    from modtrain.data.mixture.order import MixtureOrder  # noqa: PLC0415

    order = MixtureOrder(schedule, list(available.values()), config.seed, config.shuffle)
    last = run_samples if schedule.end is None else min(run_samples, schedule.end)
    starts = [next(group).start for _, group in groupby(schedule.segments, lambda s: s.stage)]
    starts = [start for start in starts if start < last]
    stops = [*starts[1:], last][: len(starts)]
    counts = [order.samples_between(*ends) for ends in zip(starts, stops, strict=True)]
    stages = tuple(
        StageUsage(start, stop, dict(zip(available, samples, strict=True)))
        for start, stop, samples in zip(starts, stops, counts, strict=True)
    )
    return MixtureUsage(available, stages, last if last < run_samples else None)


def planned_schedule(
    config: DataConfig, seq_len: int, run_samples: int
) -> tuple[dict[str, int], MixtureSchedule]:
    """Return each source's samples in an epoch, and the segments; errors as `mixture_usage`."""
    summaries = {name: read_summary(path) for name, path in config.paths.items()}
    available = {name: summary.num_samples(seq_len) for name, summary in summaries.items()}
    return available, config.schedule(available, run_samples, seq_len)


def usage_problems(config: DataConfig, usage: MixtureUsage, prefix: str) -> list[Problem]:
    """Find sources whose epochs do not suffice for the run."""
    if usage.suffices_for is not None:
        reason = (
            f"have max_epochs that suffice for {usage.suffices_for:,} samples, less than the run"
        )
        remedy = "raise a max_epochs, or train for less"
        return [Problem(f"{prefix}.sources", ", ".join(usage.available), reason, remedy)]
    if config.when_exhausted == "redistribute":
        return []
    problems = []
    for name, count in _beyond(config, usage.available, usage.total).items():
        source, epochs = config.sources[name], count / usage.available[name]
        problems.append(
            Problem(
                f"{prefix}.sources.{name}.max_epochs",
                source.max_epochs,
                f"does not suffice: the run reads the source {epochs:.4g} times",
                f"raise it, lower the weight, train for less, or set {prefix}.when_exhausted="
                "redistribute, which gives the weight to the other sources then",
            )
        )
    return problems


def _beyond(
    config: DataConfig, available: Mapping[str, int], total: Mapping[str, int]
) -> dict[str, int]:
    """The sources of which more is read than their epochs are, with how many samples."""
    limits = {name: epoch_limit(config.sources[name], count) for name, count in available.items()}
    return {
        name: total[name]
        for name, limit in limits.items()
        if limit is not None and total[name] > limit
    }
