"""Typed configuration of a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from modtrain.common.errors import ConfigError, Problem
from modtrain.common.validation import above_zero, at_least
from modtrain.experiments.controls import UNROUTED, without_inert_settings
from modtrain.models.config import unrouted_layers
from modtrain.training.config import TrainConfig
from modtrain.training.schedule_config import CapacityScheduleConfig


@dataclass
class CompareConfig(TrainConfig):
    """Runs that share everything but their arm's overrides, the budget above all.

    arms: name of the arm → overrides of the training configuration, as on the command line. The
        first is what the others are compared with.
    seeds: each arm is trained with every one of these, for its weights and the order of its data;
        empty: once, as ``seed`` and ``data.seed`` say.
    controls: train beside each routed arm the dense model of its unrouted layers alone, as the arm
        ``<name>_unrouted``. It is the model that remains where routed layers do nothing, so a
        routed arm has to beat it (docs/reports/results.md). Arms with the same one share it.
    only: arms to train and report; empty: all of them.
    train: false reports the complete runs and trains none.
    equivalence_margin: over several seeds the report also tests whether two arms are equivalent:
        whether a change of the causal loss by this share or more can be excluded.
    timed_rounds: training steps of each arm that are timed side by side at the end; 0: none.
    """

    arms: dict[str, list[str]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)
    controls: bool = True
    only: list[str] = field(default_factory=list)
    train: bool = True
    equivalence_margin: float = 0.005
    timed_rounds: int = 8

    def problems(self, needs_name: bool = True) -> list[Problem]:
        """Everything wrong with the comparison and with what its arms share."""
        problems = super().problems(needs_name)
        if len(self.arms) < 2:
            reason = "a comparison needs at least two arms"
            remedy = """add 'arms={a: ["model.capacity=0.5"], b: ["model.capacity=0.25"]}'"""
            problems.append(Problem("arms", dict(self.arms), reason, remedy))
        problems += [
            Problem("only", name, "is not an arm", f"there are: {', '.join(self.arms)}")
            for name in self.only
            if name not in self.arms and not self._may_be_control(name)
        ]
        if len(set(self.seeds)) != len(self.seeds):
            problems.append(Problem("seeds", self.seeds, "names a seed twice", "name each once"))
        problems += [
            Problem("seeds", seed, "is not in [0, 2^32)", "give one that is")
            for seed in self.seeds
            if not 0 <= seed < 2**32
        ]
        problems += above_zero(self, "", "equivalence_margin")
        return problems + at_least(self, "", 0, "timed_rounds")

    def _may_be_control(self, name: str) -> bool:
        return self.controls and name.endswith(UNROUTED) and name[: -len(UNROUTED)] in self.arms


@dataclass(frozen=True)
class Comparison:
    """What is to be compared, composed and checked.

    arms: the runs of each arm, one a seed; none: the report that there is, is shown. controls: of
    routed arms, the arm that is the dense model of their unrouted layers alone.
    """

    config: CompareConfig
    arms: dict[str, list[TrainConfig]]
    controls: dict[str, str] = field(default_factory=dict)

    @property
    def directory(self) -> Path:
        """Where the report goes."""
        return Path(self.config.runs_dir) / str(self.config.name)

    @property
    def report(self) -> Path:
        """The report's file."""
        return self.directory / "compare.json"


def add_controls(
    arms: Mapping[str, CompareConfig],
) -> tuple[dict[str, CompareConfig], dict[str, str]]:
    """Add to ``arms`` the dense model of the unrouted layers of each arm that has one.

    Returns all arms, a control behind the first arm that it belongs to, and the name of the control
    of each arm that has one: another arm's where it is the same model, trained in the same way.

    Raises:
        ConfigError: an arm has a control's name, but is another model; or it starts with weights
            that its control cannot take.
    """
    names: dict[str, str] = {}
    known = {name: _as_trained(config) for name, config in arms.items()}
    expanded: dict[str, CompareConfig] = {}
    for name, config in arms.items():
        expanded[name] = config
        model = None if config.model.problems() else unrouted_layers(config.model)
        if model is None:
            continue
        control = replace(config, model=model, capacity_schedule=CapacityScheduleConfig())
        same = [other for other in known if known[other] == _as_trained(control)]
        if not same and name + UNROUTED in known:
            reason = f"is the name of the control of {name}, and another model"
            problem = Problem("arms", name + UNROUTED, reason, "rename it, or set controls=false")
            raise ConfigError([problem])
        if not same and config.init.run is not None:
            reason = f"have fewer layers than {name}, which starts with other weights (init.run)"
            raise ConfigError([Problem("controls", True, reason, "set controls=false")])
        names[name] = same[0] if same else name + UNROUTED
        if not same:
            known[names[name]], expanded[names[name]] = _as_trained(control), control
    return expanded, names


def _as_trained(config: CompareConfig) -> CompareConfig:
    """Return what tells two arms apart; a configuration that is wrong is refused later."""
    return config if config.model.problems() else without_inert_settings(config)
