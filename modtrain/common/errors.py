"""Errors that a user can fix: they are printed as text, never as a traceback.

Every layer may import this module; it imports nothing from modtrain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a configuration.

    key: the dotted config key, as a user would override it (``model.capacity``). value: its value.
    reason: what is wrong with it. remedy: what to write instead.
    """

    key: str
    value: object
    reason: str
    remedy: str

    def __str__(self) -> str:
        shown = self.key if self.value == "" else f"{self.key}={self.value!s}"
        return f"{shown}: {self.reason}\n    remedy: {self.remedy}"


class ModtrainError(Exception):
    """Base of the errors whose message alone should reach the user.

    exit_code: what the command line exits with.
    """

    exit_code = 1


class ConfigError(ModtrainError):
    """A configuration that cannot run. It has all problems, not only the first."""

    exit_code = 2

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = list(problems)
        count = len(self.problems)
        head = f"{count} problem{'s' if count != 1 else ''} in the configuration:"
        super().__init__("\n".join([head, *(f"  - {problem}" for problem in self.problems)]))


class DataError(ModtrainError):
    """Data on disk that is missing, damaged or not what the configuration says."""


class CheckpointError(ModtrainError):
    """A checkpoint or run directory that cannot be used as asked."""


class OtherRunError(CheckpointError):
    """A run directory with a run of another configuration: a retry cannot help."""

    exit_code = 2


class StartingPointError(CheckpointError):
    """Another run that this one cannot start from as configured: a retry cannot help."""

    exit_code = 2


class InUseError(CheckpointError):
    """A run directory in which another process works."""

    exit_code = 73


class NodeError(ModtrainError):
    """A machine that cannot do what was asked of it, though another one may.

    nodes: the machines, where they are others than the one that raises this.
    """

    exit_code = 69

    def __init__(self, message: str, nodes: Sequence[str] = ()) -> None:
        self.nodes = tuple(nodes)
        super().__init__(message)


class StartCheckError(NodeError):
    """Nodes that did not pass the check before the first step. Every rank raises it."""


class TrainingError(ModtrainError):
    """A run that has to stop: the loss is not finite, a budget cannot be met."""


class DivergedError(TrainingError):
    """A loss or a gradient that no step should follow: the same steps would lead to it again."""

    exit_code = 65


class RankError(ModtrainError):
    """What went wrong on another rank, or between the ranks.

    is_reported_here: whether this rank prints it, because rank 0, which prints it otherwise,
        cannot.
    """

    def __init__(self, message: str, is_reported_here: bool = False) -> None:
        super().__init__(message)
        self.is_reported_here = is_reported_here


def raise_if_any(problems: Sequence[Problem]) -> None:
    """Raise one `ConfigError` with all ``problems``, if there are any."""
    if problems:
        raise ConfigError(problems)
