"""One run of a report, from the files of its directory."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from modtrain.cluster.cost import cost_of
from modtrain.cluster.runs import HELD_OUT
from modtrain.cluster.runs import read_run as read_record
from modtrain.common.reading import UnreadableError, read_json, read_text
from modtrain.common.renamed_keys import flatten
from modtrain.experiments.report.files import number, printable, read_config
from modtrain.experiments.report.metrics import (
    CAUSAL_FLOPS,
    ROUTED_WORTH,
    Metrics,
    read_metrics,
    worth_of,
)
from modtrain.experiments.sweep.job_process import FAILURE, state_of
from modtrain.models.depth.pattern import layer_capacities
from modtrain.models.flops import TRAINING_OVER_FORWARD
from modtrain.training.config import TrainConfig
from modtrain.training.run_directory import RunDirectory
from modtrain.training.usage import USAGE, Cost

_MAX_LAYERS = 1024
_MAX_TEXT_BYTES = 2**16
_SEED = re.compile(r"/seed_\d+$")
_NUM_EVALUATIONS = 20


@dataclass(frozen=True)
class Swap:
    """The loss under another choice of tokens, by `modtrain eval swap=true`.

    router: ``all``, or one's label. loss: nats a token. change: of the loss, relative, with its
    interval over sequences.
    """

    choice: str
    gate: str
    router: str
    loss: float
    change: float
    low: float
    high: float


@dataclass(frozen=True)
class Run:
    """A run that is reported.

    name: its path below the directory of runs. series: runs with the same one differ in their seed
    alone, or are of one family. config: by dotted key. loss: the last held-out causal one, nats a
    token. causal_forward_flops: executed a token in the causal decision. capacities: by layer, None
    for a dense one; empty where they are not known. worth: of each router; routed_worth: of all.
    swaps: of the newest evaluation that has them. data: what it was trained and evaluated on.
    cost: what it took by its own records; None of a run that has none.
    """

    name: str
    path: Path
    state: str
    series: str
    config: Mapping[str, Any]
    command: str
    machine: str
    fingerprint: str
    loss: float
    step: float
    tokens: float
    flops: float
    causal_forward_flops: float | None
    capacities: list[float | None]
    worth: dict[str, float]
    routed_worth: float | None
    swaps: list[Swap]
    metrics: Metrics
    notes: list[str] = field(default_factory=list)
    data: str = ""
    cost: Cost | None = None

    @property
    def is_complete(self) -> bool:
        """Whether training has reached its end."""
        return self.state == "complete"

    @property
    def is_routed(self) -> bool:
        """Whether any layer is routed."""
        return any(capacity is not None for capacity in self.capacities)

    @property
    def forward_flops(self) -> float | None:
        """Mean executed FLOPs of a forward pass per token, over training."""
        return self.flops / self.tokens / TRAINING_OVER_FORWARD if self.tokens else None

    @property
    def seed(self) -> str:
        """The seed, as text."""
        return str(self.config.get("seed"))


class LeftOutError(Exception):
    """Why a run is not reported."""


@cache
def default_config() -> dict[str, Any]:
    """Return the defaults of training by dotted key: a run from before a key was added had them."""
    return flatten(asdict(TrainConfig()))


def read_run(
    path: Path, name: str, max_bytes: int, max_points: int, include_incomplete: bool
) -> Run:
    """Read the run in the directory ``path``.

    Raises:
        LeftOutError: it is not to be reported.
        UnreadableError: a file that is needed cannot be used.
    """
    state = state_of(RunDirectory(path))
    if state != "complete" and not include_incomplete:
        raise LeftOutError(f"is not complete: {state}{_failure(path)}")
    config = default_config() | read_config(path / "config.yaml", max_bytes)
    notes: list[str] = []
    metrics = _metrics(path, max_bytes, max_points, notes)
    final: Mapping[str, Any] = metrics.last
    if state == "complete":
        # An old result has ``steps`` alone.
        final = read_json(path / "result.json", max_bytes)
        final = {"step": final.get("steps")} | final
    loss, step, tokens, flops = (
        number(final.get(k)) for k in (HELD_OUT, "step", "tokens", "flops")
    )
    if loss is None:
        where = "" if state == "complete" else " yet"
        raise LeftOutError(f"has no held-out causal loss{where}")
    if step is None or tokens is None or flops is None:
        raise UnreadableError("result.json lacks steps, tokens or flops")
    machine, fingerprint = _manifest(path, max_bytes)
    return Run(
        name=printable(name),
        path=path,
        state=state,
        series=_SEED.sub("", printable(name)),
        config=config,
        command=_command(path),
        machine=machine,
        fingerprint=fingerprint,
        loss=loss,
        step=step,
        tokens=tokens,
        flops=flops,
        causal_forward_flops=number(final.get(CAUSAL_FLOPS)),
        capacities=_capacities(config, notes),
        worth=worth_of(dict(final)),
        routed_worth=number(final.get(ROUTED_WORTH)),
        swaps=_swaps(path, max_bytes, notes),
        metrics=metrics,
        notes=notes,
        cost=_cost(path, name),
    )


def _cost(path: Path, name: str) -> Cost | None:
    if not (path / USAGE).is_file():
        return None
    return cost_of(read_record(path, name))


def _failure(path: Path) -> str:
    try:
        failure = read_json(path / FAILURE, _MAX_TEXT_BYTES)
    except UnreadableError:
        return ""
    text = " ".join(f"{failure.get('kind')}: {failure.get('text')}".split())
    return f", {text[:200]}"


def _metrics(path: Path, max_bytes: int, max_points: int, notes: list[str]) -> Metrics:
    try:
        metrics = read_metrics(path / "metrics.jsonl", max_bytes, max_points)
    except UnreadableError as error:
        notes.append(f"{error}: it has no curve")
        return Metrics()
    if metrics.num_malformed:
        notes.append(f"metrics.jsonl has {metrics.num_malformed:,} malformed lines")
    return metrics


def _manifest(path: Path, max_bytes: int) -> tuple[str, str]:
    """Return the machine of the newest start, and the fingerprint of the data."""
    manifest = read_json(path / "manifest.json", max_bytes)
    fingerprint = manifest.get("data_fingerprint")
    if not isinstance(fingerprint, str):
        raise UnreadableError("manifest.json lacks the data's fingerprint")
    starts = manifest.get("starts")
    start = starts[-1] if isinstance(starts, list) and starts else {}
    parts = (start.get("host"), start.get("device")) if isinstance(start, dict) else ()
    return ", ".join(str(part)[:80] for part in parts if part is not None), fingerprint


def _command(path: Path) -> str:
    try:
        return read_text(path / "command.txt", _MAX_TEXT_BYTES).strip()
    except UnreadableError:
        return ""


def _capacities(config: Mapping[str, Any], notes: list[str]) -> list[float | None]:
    num_layers = config.get("model.num_layers")
    capacity = number(config.get("model.capacity"))
    try:
        if not isinstance(num_layers, int) or not 0 < num_layers <= _MAX_LAYERS or capacity is None:
            raise ValueError("model.num_layers or model.capacity")
        capacities = layer_capacities(config.get("model.pattern") or "", capacity, num_layers)
        if len(capacities) != num_layers or not all(c is None or 0 < c <= 1 for c in capacities):
            raise ValueError("model.pattern")
    except (ValueError, TypeError) as error:
        notes.append(f"its capacities are not known: {str(error)[:80]}")
        return []
    return capacities


def _swaps(path: Path, max_bytes: int, notes: list[str]) -> list[Swap]:
    """Return the swaps of the newest evaluation that has some."""
    files = sorted(path.glob("eval-*.json"), reverse=True)[:_NUM_EVALUATIONS]
    for file in files:
        try:
            worth = read_json(file, max_bytes).get("router_worth")
        except UnreadableError as error:
            notes.append(printable(str(error)))
            continue
        rows = worth.get("swaps") if isinstance(worth, dict) else None
        if isinstance(rows, list):
            return [swap for row in rows if (swap := _swap(row)) is not None]
    return []


def _swap(row: object) -> Swap | None:
    if not isinstance(row, dict):
        return None
    texts = [row.get(key) for key in ("choice", "gate", "router")]
    values = [number(row.get(key)) for key in ("loss", "change", "low", "high")]
    if None in values or not all(isinstance(text, str) and len(text) <= 80 for text in texts):
        return None
    return Swap(*texts, *values)  # type: ignore[arg-type]
