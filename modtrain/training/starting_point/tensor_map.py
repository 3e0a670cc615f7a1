"""Which tensors of another run a model takes, by name. Nothing is read, and no memory taken."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from modtrain.checkpoint.state import MODEL, model_tensors
from modtrain.models.config import ModelConfig
from modtrain.models.init import canonical_name
from modtrain.models.transformer import Transformer, routing_names
from modtrain.training.starting_point.config import InitConfig

_LAYER = re.compile(r"^layers\.(\d+)\.(.*)$")


@dataclass(frozen=True)
class TensorMap:
    """Names as the bare models have them, parameters and buffers.

    taken: name in this model → name in the other one. new: those of this model that keep their
    initial values. left: those of the other one that nothing takes. mismatches: a line for each
    tensor that has to be taken and cannot be; equal ones of several layers share a line.
    """

    taken: dict[str, str]
    new: tuple[str, ...]
    left: tuple[str, ...]
    mismatches: tuple[str, ...]


class _Tensors:
    """The tensors of a model. by_meaning: name without the modules that routing wraps → name."""

    def __init__(self, config: ModelConfig) -> None:
        with torch.device("meta"):
            model = Transformer(config)
        self.shapes = {
            key.removeprefix(MODEL): tuple(value.shape)
            for key, value in model_tensors(model).items()
        }
        self.routing = routing_names(model)
        self.by_meaning = {canonical_name(name): name for name in self.shapes}


def map_tensors(model: ModelConfig, parent: ModelConfig, init: InitConfig, where: str) -> TensorMap:
    """Map the tensors of ``parent``, the model of the run ``where``, to those of ``model``."""
    here, there = _Tensors(model), _Tensors(parent)
    taken: dict[str, str] = {}
    new: list[str] = []
    wrong: list[tuple[str, str]] = []
    for meaning, name in here.by_meaning.items():
        origin = _origin(meaning, init.layers)
        source = None if origin is None else there.by_meaning.get(origin)
        may_be_new = origin is None or (init.map == "pattern" and name in here.routing)
        if source is not None and here.shapes[name] == there.shapes[source]:
            taken[name] = source
        elif may_be_new:
            new.append(name)
        elif source is None:
            wrong.append((meaning, f"{here.shapes[name]}, and {where} has none"))
        else:
            wrong.append((meaning, f"{there.shapes[source]} in {where}, {here.shapes[name]} now"))
    used = set(taken.values())
    # Of another shape: named above.
    known = {_origin(meaning, init.layers) for meaning in here.by_meaning}
    left = [name for name in there.shapes if name not in used]
    for meaning, name in there.by_meaning.items():
        may_be_left = init.map == "pattern" and name in there.routing
        dropped = init.layers is not None and _layer(meaning) not in (None, *init.layers)
        if name not in used and meaning not in known and not may_be_left and not dropped:
            wrong.append((meaning, f"{there.shapes[name]} in {where}, and none now"))
    return TensorMap(taken, tuple(new), tuple(left), tuple(_join_layers(wrong)))


def _layer(name: str) -> int | None:
    match = _LAYER.match(name)
    return None if match is None else int(match[1])


def _origin(name: str, layers: list[int | None] | None) -> str | None:
    """Return the name that a tensor's source has; None for a layer without one."""
    match = _LAYER.match(name)
    if match is None or layers is None:
        return name
    source = layers[int(match[1])]
    return None if source is None else f"layers.{source}.{match[2]}"


def _join_layers(lines: Iterable[tuple[str, str]]) -> list[str]:
    """Return ``name: text`` for each, once for all layers of which the same is true."""
    joined: dict[tuple[str, str], list[int]] = {}
    for name, text in lines:
        layer = _layer(name)
        rest = name if layer is None else name.partition(".")[2].partition(".")[2]
        numbers = joined.setdefault((rest, text), [])
        if layer is not None:
            numbers.append(layer)
    return [
        f"layers.{_ranges(numbers)}.{rest}: {text}" if numbers else f"{rest}: {text}"
        for (rest, text), numbers in joined.items()
    ]


def _ranges(numbers: list[int]) -> str:
    """Format 0, 1, 2, 5 as ``0-2,5``."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in ranges)
