"""How long the points of a grid take: at a given rate, on a named GPU, or as timed here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np

from modtrain.common.errors import ConfigError, Problem
from modtrain.experiments.isoflop.config import IsoflopConfig
from modtrain.experiments.isoflop.grid import Point, Trunk

# Timed training steps of a model, after two that warm up.
_ROUNDS = 3

Hours = Callable[[Point | Trunk], float]


def hours_of(config: IsoflopConfig, points: Sequence[Point]) -> tuple[Hours | None, str]:
    """Return what gives the hours of a point, and in words where they come from.

    None where nothing gives a rate. Times the smallest, the middle and the largest model of each
    family here if ``measure`` asks for it; rates between them are interpolated in the logarithm of
    the FLOPs a token.

    Raises:
        ConfigError: ``gpu`` is not known.
    """
    if config.flops_per_second is not None:
        rate = config.flops_per_second
        return lambda point: point.own_flops / rate / 3600, f"at {rate:.3g} FLOPs a second"
    if config.gpu is not None:
        rate = _peak(config.gpu) * config.mfu
        words = f"on {config.gpu}, at {rate:.3g} FLOPs a second a device (MFU {config.mfu:g})"
        return lambda p: p.own_flops / rate / p.plan.dims.world_size / 3600, words
    if not config.measure:
        return None, ""
    rates = _measured(points)

    def hours(point: Point | Trunk) -> float:
        at, measured = zip(*rates[point.family], strict=True)
        rate = np.interp(np.log(point.plan.flops_per_token), np.log(at), measured)
        return float(point.own_flops / rate / 3600)

    low, high = (f(r for family in rates.values() for _, r in family) for f in (min, max))
    return hours, f"here, as timed: {low:.3g} to {high:.3g} FLOPs a second"


def _peak(gpu: str) -> float:
    from modtrain.training.hardware import GPU_NAMES, bf16_peak  # noqa: PLC0415  (needs torch)

    peak = bf16_peak(gpu)
    if peak is None:
        remedy = f"use one of {', '.join(GPU_NAMES)}, or give flops_per_second"
        raise ConfigError([Problem("gpu", gpu, "is not a GPU whose peak is known", remedy)])
    return peak


def _measured(points: Sequence[Point]) -> dict[str, list[tuple[float, float]]]:
    """Return for each family pairs of FLOPs a token and FLOPs a second, by the first."""
    from modtrain.experiments.compare.step_timing import step_seconds  # noqa: PLC0415

    rates: dict[str, list[tuple[float, float]]] = {}
    for family, group in groupby(sorted(points, key=_by_family), key=lambda p: p.family):
        models = list(group)
        for point in dict.fromkeys((models[0], models[len(models) // 2], models[-1])):
            seconds = step_seconds({"": point.resolved}, _ROUNDS)[""]
            flops = (
                point.plan.flops_per_token
                * point.plan.seq_len
                * point.config.batch.micro_batch_size
            )
            rates.setdefault(family, []).append((point.plan.flops_per_token, flops / seconds))
    return rates


def _by_family(point: Point) -> tuple[str, float]:
    return point.family, point.plan.flops_per_token
