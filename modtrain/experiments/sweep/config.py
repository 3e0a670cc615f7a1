"""Typed configuration of a sweep, beside that of its runs. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from modtrain.common.errors import Problem

_PREFIX = "sweep."


@dataclass
class SweepConfig:
    """Options of a sweep itself, not of its runs.

    retry: restart failed jobs; they resume from their checkpoints.
    """

    retry: bool = False


def split_sweep_options(
    overrides: Sequence[Override],
) -> tuple[SweepConfig, list[Override], list[Problem]]:
    """Take the sweep's own options out of ``overrides``; return them, the rest, and mistakes."""
    sweep_overrides = [o for o in overrides if o.key_or_group.startswith(_PREFIX)]
    rest = [o for o in overrides if o not in sweep_overrides]
    merged = OmegaConf.structured(SweepConfig)
    problems = []
    for override in sweep_overrides:
        name = override.key_or_group.removeprefix(_PREFIX)
        value = None if override.is_sweep_override() else override.value()
        try:
            merged = OmegaConf.merge(merged, {name: value})
        except OmegaConfBaseException:
            text = str(override.input_line).partition("=")[2]
            reason = "is not an option of a sweep, or does not fit"
            remedy = "there is sweep.retry=true"
            problems.append(Problem(override.key_or_group, text, reason, remedy))
    config = OmegaConf.to_object(merged)
    assert isinstance(config, SweepConfig)  # noqa: S101
    return config, rest, problems
