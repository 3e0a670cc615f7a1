"""From FLOPs a token to a model's shape: the rule of depth against width."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

from modtrain.common.errors import Problem
from modtrain.experiments.isoflop.config import ShapeConfig
from modtrain.models.config import ModelConfig
from modtrain.models.flops import training_flops_per_token

# Wider models are not looked for.
_MAX_WIDTH = 1 << 17


@dataclass(frozen=True)
class Shape:
    """A model and its training FLOPs a token."""

    model: ModelConfig
    flops_per_token: float

    @property
    def aspect(self) -> float:
        """Width over number of layers."""
        return self.model.d_model / self.model.num_layers


class ShapeRule:
    """The shapes of one family.

    base: the family's model, whose width, depth and heads are replaced. seq_len: tokens a sequence.
    """

    def __init__(self, config: ShapeConfig, base: ModelConfig, seq_len: int) -> None:
        self.config, self.base, self.seq_len = config, base, seq_len
        self._costs: dict[tuple[int, int], float] = {}

    @property
    def width_multiple(self) -> int:
        """What widths are multiples of."""
        group = self.base.num_heads // self.base.kv_heads
        return self.config.width_multiple or self.base.head_width * group

    @property
    def layers_multiple(self) -> int:
        """What numbers of layers are multiples of."""
        if self.config.layers_multiple is not None:
            return self.config.layers_multiple
        of_pattern = 2 if self.base.pattern == "every_other" else 1
        of_experts = self.base.experts.every if self.base.experts.count else 1
        return math.lcm(of_pattern, of_experts)

    def problems(self) -> list[Problem]:
        """Find what of the base model does not follow from a width and a depth."""
        base, group = self.base, self.base.head_width
        listed = "lists a value a layer, and the number of layers varies"
        rules = {
            "model.pattern": (
                not isinstance(base.pattern, str) or base.pattern.strip().startswith("["),
                base.pattern,
                listed,
                "use a pattern with a name, such as every_other",
            ),
            "model.mixer": (not isinstance(base.mixer, str), base.mixer, listed, "name one mixer"),
            "model.d_ff": (
                base.d_ff is not None,
                base.d_ff,
                "is one width of the MLP for all sizes",
                "leave it null: it follows from the width",
            ),
            "model.experts.dim": (
                base.experts.dim is not None,
                base.experts.dim,
                "is one width of the experts for all sizes",
                "leave it null: it follows from the width",
            ),
            "shape.width_multiple": (
                self.width_multiple % (group * (base.num_heads // base.kv_heads)) != 0,
                self.width_multiple,
                f"is not a multiple of {group * (base.num_heads // base.kv_heads)}, a group of"
                " heads",
                "choose a multiple, or leave it null",
            ),
        }
        return [Problem(key, *rest) for key, (is_wrong, *rest) in rules.items() if is_wrong]

    def nearest(self, target: float) -> Shape | None:
        """Return the shape for ``target`` training FLOPs a token; None if no shape is allowed."""
        candidates = list(self._candidates(target))
        if not candidates:
            return None
        near = [c for c in candidates if _distance(c, target) <= math.log1p(self.config.tolerance)]
        if near:
            return min(near, key=lambda c: (self._aspect_distance(c), _distance(c, target)))
        return min(candidates, key=lambda c: (_distance(c, target), self._aspect_distance(c)))

    def model(self, d_model: int, num_layers: int) -> ModelConfig:
        """Return the family's model of this shape; heads stay as wide as they are."""
        base, head_width = self.base, self.base.head_width
        num_heads = d_model // head_width
        group = base.num_heads // base.kv_heads
        return replace(
            base,
            d_model=d_model,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=None if base.num_kv_heads is None else num_heads // group,
        )

    @cached_property
    def _middle(self) -> float:
        return math.sqrt(self.config.aspect_min * self.config.aspect_max)

    def _aspect_distance(self, shape: Shape) -> float:
        return abs(math.log(shape.aspect / self._middle))

    def _candidates(self, target: float) -> Iterator[Shape]:
        """Yield for each width the shapes around ``target``; deeper ones cost more."""
        margin = 1 + self.config.tolerance
        for d_model in range(self.width_multiple, _MAX_WIDTH, self.width_multiple):
            depths = self._depths(d_model)
            cost = partial(self._cost, d_model)
            if not depths:
                continue
            # From the last one below the margin to the first one above it.
            first = max(0, bisect_left(depths, target / margin, key=cost) - 1)
            last = bisect_left(depths, target * margin, key=cost)
            for depth in depths[first : last + 1]:
                model = self.model(d_model, depth)
                if not model.problems():
                    yield Shape(model, cost(depth))
            if cost(depths[0]) > target * margin:
                # The fewest layers of a wider model cost more.
                return

    def _depths(self, d_model: int) -> Sequence[int]:
        """Return the numbers of layers that a width may have."""
        step = self.layers_multiple
        fewest = math.ceil(d_model / self.config.aspect_max / step * (1 - 1e-12))
        most = math.floor(d_model / self.config.aspect_min / step * (1 + 1e-12))
        return range(max(1, fewest) * step, most * step + 1, step)

    def _cost(self, d_model: int, num_layers: int) -> float:
        key = (d_model, num_layers)
        if key not in self._costs:
            model = self.model(d_model, num_layers)
            self._costs[key] = training_flops_per_token(model, self.seq_len)
        return self._costs[key]


def _distance(shape: Shape, target: float) -> float:
    return abs(math.log(shape.flops_per_token / target))
