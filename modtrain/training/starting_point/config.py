"""Configuration of initial weights from another run. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from modtrain.common.errors import Problem
from modtrain.common.validation import at_least, broken_rules, one_of
from modtrain.models.config import ModelConfig
from modtrain.models.depth.config import LEARNED_SCORES, RouterConfig

if TYPE_CHECKING:
    from modtrain.training.schedule_config import CapacityScheduleConfig

MAPS = ("same", "pattern")


@dataclass
class InitConfig:
    """Another run whose weights this run starts with, at step 0.

    Budget, schedule, data, learning rate, strategy and number of processes are this run's own.

    run: name of that run; null: draw initial weights.
    runs_dir: where it lives; null: this run's ``runs_dir``.
    step: of its checkpoint; null: the newest.
    map: which tensors have to match. ``same``: all. ``pattern``: all but those of depth routers:
        the two may route other layers, other parts of them or none; routers that only this run has
        start anew, and those that only the other has are left.
    layers: for each layer of this model, counted from 0, the layer of the other run whose weights
        it takes, or null for initial weights; null: each its own.
    optimizer: take the optimizer's state (moments and count of steps) as well.
    keep_function: make a routed model that computes at first what the dense one of ``init.run``
        does. New routers score every token 0, where the gate has to be 1, and the capacity has to
        start at 1.
    check_tokenizer: refuse data of another tokenizer than the other run's.
    """

    run: str | None = None
    runs_dir: str | None = None
    step: int | None = None
    map: str = "same"
    layers: list[int | None] | None = None
    optimizer: bool = False
    keep_function: bool = False
    check_tokenizer: bool = True

    def problems(self, prefix: str) -> list[Problem]:
        """Everything wrong with it that can be checked without the other run."""
        problems = [
            *one_of(self, prefix, "map", MAPS),
            *at_least(self, prefix, 0, "step"),
            *(
                Problem(f"{prefix}.layers", layer, "is not a layer", "count layers from 0")
                for layer in self.layers or []
                if layer is not None and layer < 0
            ),
        ]
        if self.run is not None or self == InitConfig():
            return problems
        reason = "is missing: the other keys of init say how its weights are taken"
        remedy = "add init.run=NAME, or leave them out"
        return [*problems, Problem(f"{prefix}.run", "null", reason, remedy)]

    def model_problems(
        self, prefix: str, model: ModelConfig, schedule: CapacityScheduleConfig
    ) -> list[Problem]:
        """Find a model that the weights cannot be mapped to, or would not keep their function."""
        layers, router = self.layers, model.router
        count = 0 if layers is None else len(layers)
        problems = broken_rules(
            self,
            prefix,
            (
                layers is not None and count != model.num_layers,
                "layers",
                f"has {count} layers, and model.num_layers={model.num_layers}",
                "give one for each layer of this model",
            ),
        )
        if not self.keep_function:
            return problems
        learned = " or ".join(LEARNED_SCORES)
        return problems + broken_rules(
            self,
            prefix,
            (
                self.map != "pattern" or not model.is_routed,
                "keep_function",
                "is for a dense model that becomes a routed one",
                f"add {prefix}.map=pattern and model.pattern=every_other, or leave it out",
            ),
            (
                layers is not None,
                "layers",
                f"has no meaning with {prefix}.keep_function, which needs every layer",
                "leave one of them out",
            ),
            (
                router.score not in LEARNED_SCORES or router.choice != "expert",
                "keep_function",
                f"needs learned scores and expert choice, not model.router.score={router.score}"
                f" and model.router.choice={router.choice}",
                f"set model.router.score to {learned}, and model.router.choice=expert",
            ),
            (
                router.gate_kind == "none",
                "keep_function",
                "needs a gate, from which a router that scores every token 0 learns",
                "set model.router.gate=near_one",
            ),
            (
                router.gate_kind != "none" and gate_at_zero(router) != 1,
                "keep_function",
                f"needs a gate that is 1 at the score 0; this one is {gate_at_zero(router):g}",
                "set model.router.gate=near_one",
            ),
            (
                schedule.name == "constant" or schedule.start != 1,
                "keep_function",
                "needs capacities that start at 1",
                "set capacity_schedule=linear capacity_schedule.start=1",
            ),
        )


def gate_at_zero(router: RouterConfig) -> float:
    """Return the factor that a new router's gate puts on the update of a token of score 0."""
    factor = 0.5 if router.gate_kind == "sigmoid" else 0.0
    return factor * router.gate_factor + router.gate_offset
