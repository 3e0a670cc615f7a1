"""Typed configuration of a search and its space. Imports nothing heavy."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from modtrain.common.errors import Problem
from modtrain.common.renamed_keys import renamed_problem
from modtrain.common.spelling import list_items, quoted, syntax_fault
from modtrain.common.validation import at_least, one_of
from modtrain.training.config import TrainConfig, directory_problems

if TYPE_CHECKING:
    from optuna import Trial

OBJECTIVES = ("causal_loss", "forward_flops")
PRUNERS = ("none", "median", "halving")


@dataclass(frozen=True)
class Dimension:
    """One key that is searched.

    values: of a choice, as text for an override. low, high: ends of an interval, inclusive. whole:
    integers only. log: uniform in the logarithm. step: of a range.
    """

    key: str
    values: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    whole: bool = False
    log: bool = False
    step: float | None = None

    @property
    def ends(self) -> tuple[str, ...]:
        """Values to check before a search starts: each value of a choice, or both ends."""
        return self.values or (str(self.low), str(self.high))

    @property
    def size(self) -> int | None:
        """The number of values; None for an interval of real numbers."""
        if self.values:
            return len(self.values)
        if self.low == self.high:
            return 1
        if not self.whole and self.step is None:
            return None
        return math.floor((self.high - self.low) / self._spacing + 1e-9) + 1

    def index_of(self, value: Any) -> int:
        """Return which of its values this is, from 0, of a dimension with a size."""
        if self.values:
            return self.values.index(value)
        position: float = (value - self.low) / self._spacing
        return round(position)

    def value_at(self, index: int) -> Any:
        """Return the value of this number, of a dimension with a size."""
        if self.values:
            return self.values[index]
        value = self.low + index * self._spacing
        return int(value) if self.whole else min(value, self.high)

    def suggest(self, trial: Trial, name: str) -> Any:
        """Return the trial's value of the parameter ``name``, drawn now or before."""
        if self.values:
            return trial.suggest_categorical(name, self.values)
        if self.whole:
            step = int(self.step or 1)
            return trial.suggest_int(name, int(self.low), int(self.high), step=step, log=self.log)
        return trial.suggest_float(name, self.low, self.high, step=self.step, log=self.log)

    @property
    def _spacing(self) -> float:
        return self.step or 1


@dataclass
class SearchConfig(TrainConfig):
    """Runs that share everything but what Optuna draws from ``space``.

    study: its directory under ``runs_dir``; the same study is resumed.
    space: key → ``interval(a, b)``, ``int(interval(a, b))``, ``range(a, b, step)`` or
        ``choice(x, y)``; ``tag(log, interval(a, b))`` is uniform in the logarithm.
    trials: number of trials of the study in all, over all starts and workers.
    directions: objectives to minimize: ``causal_loss`` (held out), ``forward_flops`` (per token).
    pruner: ``median`` or ``halving`` stops a trial that is behind at an evaluation; ``none``.
    search_seed: seed of what Optuna draws.
    """

    study: str | None = None
    space: dict[str, str] = field(default_factory=dict)
    trials: int = 20
    directions: list[str] = field(default_factory=lambda: ["causal_loss"])
    pruner: str = "none"
    search_seed: int = 0

    def problems(self, needs_name: bool = False) -> list[Problem]:
        """Everything wrong with the search and with what its trials share."""
        problems = super().problems(needs_name)
        if not self.study:
            remedy = "add study=my_search: the same study is resumed"
            problems.append(Problem("study", "null", "a search needs a name", remedy))
        else:
            problems += directory_problems("study", self.study)
        problems += one_of(self, "", "directions", OBJECTIVES) + one_of(self, "", "pruner", PRUNERS)
        problems += at_least(self, "", 1, "trials") + at_least(self, "", 0, "search_seed")
        if not self.directions or len(set(self.directions)) < len(self.directions):
            reason, remedy = "names none, or one twice", "name one or two, each once"
            problems.append(Problem("directions", self.directions, reason, remedy))
        if self.pruner != "none" and self.directions != ["causal_loss"]:
            reason = "needs directions=[causal_loss]: Optuna prunes by one objective"
            problems.append(Problem("pruner", self.pruner, reason, "leave it out"))
        elif self.pruner != "none" and self.eval.every is None:
            reason = "needs evaluations before the end"
            problems.append(Problem("pruner", self.pruner, reason, "set eval.every"))
        return problems + parse_space(self.space)[1]


@dataclass(frozen=True)
class Search:
    """A search after its checks. compose: builds a trial's configuration from its overrides."""

    config: SearchConfig
    compose: Callable[[Sequence[str], str], TrainConfig]

    @property
    def directory(self) -> Path:
        """The directory of the study and its trials."""
        return Path(self.config.runs_dir) / str(self.config.study)


def join_space(overrides: Sequence[str]) -> list[str]:
    """Join all ``space.KEY=RANGE`` to one override, which Hydra does not parse as a sweep."""
    space_overrides = [text for text in overrides if text.lstrip("+").startswith("space.")]
    if not space_overrides:
        return list(overrides)
    pairs = [text.lstrip("+").removeprefix("space.").partition("=") for text in space_overrides]
    space = ",".join(f"{key}:{quoted(value)}" for key, _, value in pairs)
    return [*(text for text in overrides if text not in space_overrides), f"++space={{{space}}}"]


def parse_space(space: Mapping[str, str]) -> tuple[list[Dimension], list[Problem]]:
    """Return the space's dimensions and what is wrong with it."""
    dimensions, problems = [], []
    if not space:
        remedy = "add space.model.capacity=interval(0.05,0.5)"
        problems.append(Problem("space", "", "is empty: there is nothing to search", remedy))
    for key, text in space.items():
        old_key = renamed_problem(key, text, "space.")
        if old_key is not None:
            problems.append(old_key)
            continue
        remedy = "write interval(0.1,1), int(interval(1,4)), tag(log,interval(1e-4,1e-2)),"
        remedy += " range(2,9,2) or choice(x,y)"
        if text[:1] == "[" and text[-1:] == "]":
            choice = f"space.{key}=choice({','.join(list_items(text))})"
            remedy = f"write {shlex.quote(choice)}"
        try:
            override = OverridesParser.create().parse_override(f"{key}={text}")
            dimensions.append(_dimension(key, override))
        except (HydraException, OmegaConfBaseException):
            reason = f"is no range of values: {syntax_fault(text)}"
            problems.append(Problem(f"space.{key}", text, reason, remedy))
        except (ValueError, TypeError) as error:
            reason = f"is no range of values: {str(error).splitlines()[0]}"
            problems.append(Problem(f"space.{key}", text, reason, remedy))
    return dimensions, problems


def _dimension(key: str, override: Override) -> Dimension:
    value: Any = override.value()
    if isinstance(value, IntervalSweep):
        low, high = value.start, value.end
        log = "log" in value.tags
        if low is None or high is None or not low <= high or (log and low <= 0):
            raise ValueError("its ends must be in order, and above 0 for a logarithm")
        whole = isinstance(low, int) and isinstance(high, int)
        return Dimension(key, low=low, high=high, whole=whole, log=log)
    if isinstance(value, RangeSweep):
        values = list(value.range())
        if len(values) < 2:
            raise ValueError("it has fewer than two values")
        whole = all(isinstance(v, int) for v in values)
        low, high = sorted((values[0], values[-1]))
        return Dimension(key, low=low, high=high, whole=whole, step=abs(values[1] - values[0]))
    if isinstance(value, ChoiceSweep):
        return Dimension(key, values=tuple(dict.fromkeys(override.sweep_string_iterator())))
    raise ValueError("it is one value")
