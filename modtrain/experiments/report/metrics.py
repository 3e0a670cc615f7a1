"""A run's metrics.jsonl: the curve of its held-out causal loss, times, and its routers' health."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from modtrain.cluster.runs import HELD_OUT
from modtrain.common.reading import parse_object, read_bytes
from modtrain.experiments.report.files import number

STEP_SECONDS = "throughput/step_seconds"
CAUSAL_FLOPS = "held_out/causal_flops_per_token"
ROUTED_WORTH = "held_out/routed_worth"
_HEALTH = re.compile(r"router/(layer_[a-z0-9_]{1,40})/(gate_mean|update_ratio)")
_WORTH = re.compile(r"held_out/(layer_[a-z0-9_]{1,40})/worth")
# From this many lines on only some of the training records are read.
_MANY_LINES = 4000


@dataclass
class Curve:
    """Held-out causal losses (nats a token), and where training was. seconds: None: not known."""

    step: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    seconds: list[float | None] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.loss)

    def thinned(self, most: int) -> Curve:
        """Return at most ``most`` of its points, among them the first and the last."""
        kept = evenly(len(self), most)
        return Curve(**{name: [values[i] for i in kept] for name, values in vars(self).items()})


@dataclass
class RouterHistory:
    """A router's health over training tokens; NaN where a record lacks it.

    gate: mean gate of its tokens. update: size of their updates over the residual stream's.
    """

    tokens: list[float] = field(default_factory=list)
    gate: list[float] = field(default_factory=list)
    update: list[float] = field(default_factory=list)


@dataclass
class Metrics:
    """What is known of a run's training.

    step_seconds: median of the run's second half. seconds: of all training steps. num_malformed:
    lines that are no records. last: the newest value of each metric that a report shows.
    """

    curve: Curve = field(default_factory=Curve)
    routers: dict[str, RouterHistory] = field(default_factory=dict)
    step_seconds: float | None = None
    seconds: float | None = None
    num_malformed: int = 0
    last: dict[str, Any] = field(default_factory=dict)

    @property
    def worth(self) -> dict[str, float]:
        """Relative change of the loss without a router's updates, by label."""
        return worth_of(self.last)


def worth_of(metrics: dict[str, Any]) -> dict[str, float]:
    """Return what ``metrics`` have of the routers' worth, by label."""
    worth_by_router = {}
    for key, value in metrics.items():
        match = _WORTH.fullmatch(key)
        if match and (worth := number(value)) is not None:
            worth_by_router[match[1]] = worth
    return worth_by_router


def evenly(count: int, most: int) -> list[int]:
    """Return at most ``most`` indices of ``count``, evenly spaced from the first to the last."""
    return sorted(set(np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()))


def read_metrics(path: Path, max_bytes: int, max_points: int) -> Metrics:
    """Read a run's metrics; lines that are not records are skipped and counted.

    Of more than 4,000 lines only some records of training are read, but every evaluation.

    Raises:
        UnreadableError: the file is missing or too large.
    """
    reader = _Reader()
    lines = read_bytes(path, max_bytes).splitlines()
    for is_sampled, record in _records(lines, max_points, reader.metrics):
        reader.add(record, with_routers=is_sampled)
    return reader.finish(max_points)


def _records(
    lines: list[bytes], max_points: int, metrics: Metrics
) -> Iterator[tuple[bool, dict[str, Any]]]:
    """Yield the records to read, each with whether the routers' health is read of it."""
    stride = -(-len(lines) // _MANY_LINES)
    routed = set(evenly(len(lines), 2 * max_points))
    # The last one is that of the end of training.
    backwards = range(len(lines) - 1, -1, -1)
    routed.add(next((place for place in backwards if b'"router/' in lines[place]), -1))
    mark = f'"{HELD_OUT}"'.encode()
    for place, line in enumerate(lines):
        is_sampled = place in routed
        if place % stride and not is_sampled and mark not in line:
            continue
        record = parse_object(line)
        if record is not None:
            yield is_sampled, record
        elif line.strip():
            metrics.num_malformed += 1


class _Reader:
    """Takes records in order."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.step = 0.0
        self.timed: list[tuple[float, float]] = []
        self.seconds = 0.0

    def add(self, record: dict[str, Any], with_routers: bool) -> None:
        at = [number(record.get(name)) for name in ("step", "tokens", "flops")]
        step, tokens, flops = at
        if step is None or tokens is None or flops is None or step < self.step:
            # Steps are written in order: what falls back is of another file.
            self.metrics.num_malformed += 1
            return
        self.step = step
        last = self.metrics.last
        last.update({"step": step, "tokens": tokens, "flops": flops})
        self._add_time(step, number(record.get(STEP_SECONDS)))
        if with_routers:
            self._add_routers(tokens, record)
        loss = number(record.get(HELD_OUT))
        if loss is None:
            return
        curve = self.metrics.curve
        for values, value in ((curve.step, step), (curve.tokens, tokens), (curve.flops, flops)):
            values.append(value)
        curve.seconds.append(self._seconds_at(step))
        curve.loss.append(loss)
        last[HELD_OUT] = loss
        for key, value in record.items():
            if key in (CAUSAL_FLOPS, ROUTED_WORTH) or _WORTH.fullmatch(key):
                last[key] = value

    def finish(self, max_points: int) -> Metrics:
        metrics = self.metrics
        half = [seconds for step, seconds in self.timed if step > self.step / 2]
        metrics.step_seconds = statistics.median(half) if half else None
        metrics.seconds = self._seconds_at(self.step)
        metrics.curve = metrics.curve.thinned(max_points)
        for history in metrics.routers.values():
            kept = evenly(len(history.tokens), max_points)
            for name, values in list(vars(history).items()):
                setattr(history, name, [values[i] for i in kept])
        return metrics

    def _add_time(self, step: float, seconds: float | None) -> None:
        if seconds is None or seconds < 0:
            return
        before = self.timed[-1][0] if self.timed else 0.0
        self.seconds += (step - before) * seconds
        self.timed.append((step, seconds))

    def _seconds_at(self, step: float) -> float | None:
        """Return the time of training up to ``step``, at the newest pace since the last record."""
        if not self.timed:
            return None
        before, pace = self.timed[-1]
        return self.seconds + (step - before) * pace

    def _add_routers(self, tokens: float, record: dict[str, Any]) -> None:
        health_by_router: dict[str, dict[str, float]] = {}
        for key, value in record.items():
            match = _HEALTH.fullmatch(key) if key.startswith("router/") else None
            if match and (health := number(value)) is not None:
                health_by_router.setdefault(match[1], {})[match[2]] = health
        for label, health_of in health_by_router.items():
            history = self.metrics.routers.setdefault(label, RouterHistory())
            history.tokens.append(tokens)
            history.gate.append(health_of.get("gate_mean", float("nan")))
            history.update.append(health_of.get("update_ratio", float("nan")))
