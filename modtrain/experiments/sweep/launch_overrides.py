"""The overrides that say how the runs of a sweep are started. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from modtrain.cluster.config import is_of_job
from modtrain.common.errors import Problem


@dataclass
class _Options:
    """Options of a sweep itself. retry: restart failed jobs; they resume from their checkpoints."""

    retry: bool = False


@dataclass(frozen=True)
class LaunchOverrides:
    """The overrides that say how runs are started, not what they are.

    retry: restart failed runs. for_hydra: of Hydra and its launcher. for_slurm: of the Slurm jobs.
    """

    retry: bool = False
    for_hydra: list[Override] = field(default_factory=list)
    for_slurm: list[Override] = field(default_factory=list)

    @classmethod
    def split(
        cls, overrides: Sequence[Override]
    ) -> tuple[LaunchOverrides, list[Override], list[Problem]]:
        """Return these overrides, the others, and what is wrong with these."""
        of_sweep = [o for o in overrides if o.key_or_group.startswith("sweep.")]
        options, problems = _sweep_options(of_sweep)
        for_hydra = [o for o in overrides if o.key_or_group.startswith(("hydra.", "hydra/"))]
        for_slurm = [o for o in overrides if is_of_job(str(o.input_line))]
        others = [o for o in overrides if o not in (*of_sweep, *for_hydra, *for_slurm)]
        problems += _sweeper_problems(for_hydra)
        return cls(options.retry, for_hydra, for_slurm), others, problems


def _sweep_options(overrides: Sequence[Override]) -> tuple[_Options, list[Problem]]:
    """Return the values of ``sweep.…`` and what is wrong with them."""
    options, problems = OmegaConf.structured(_Options), []
    for override in overrides:
        name = override.key_or_group.removeprefix("sweep.")
        value = None if override.is_sweep_override() else override.value()
        try:
            options = OmegaConf.merge(options, {name: value})
        except OmegaConfBaseException:
            text = str(override.input_line).partition("=")[2]
            reason = "is not an option of a sweep, or does not fit"
            remedy = "there is sweep.retry=true"
            problems.append(Problem(override.key_or_group, text, reason, remedy))
    return _Options(options.retry), problems


def _sweeper_problems(overrides: Sequence[Override]) -> list[Problem]:
    reason = "is not supported by modtrain's sweeps, whose jobs are known before the first starts"
    remedy = "leave it out; to search: modtrain search"
    return [
        Problem(o.key_or_group, o.input_line or "", reason, remedy)
        for o in overrides
        if o.key_or_group in ("hydra/sweeper", "hydra.mode")
        or o.key_or_group.startswith(("hydra.sweep.", "hydra.sweeper.", "hydra.run."))
    ]
