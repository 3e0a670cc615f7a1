"""Step times of a run's processes, by node: who is slow. Imports nothing heavy.

In synchronous training all processes take equally long for a step, since they wait for the slowest
one. So what is compared is what each does by itself: waiting for its data and its forward pass; and
a matrix product of fixed size, which tells where forward passes have collectives in them (FSDP).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from modtrain.common.atomic_io import open_to_append, write_text
from modtrain.common.reading import UnreadableError, read_json

STEP_TIMES = "step_times.jsonl"
"""The records of a run of several processes, one a line; older ones in ``step_times.jsonl.1``."""
SLOW_NODES = "slow_nodes.json"
"""What is slow at the moment; not there where nothing is."""
_MAX_BYTES = 8 * 2**20
# What counts as slow: so much more than the usual, and so large a share of the step, in so many
# records one after another.
_FACTOR, _SHARE_OF_STEP, _RECORDS = 1.3, 0.1, 3


@dataclass(frozen=True)
class SlowRank:
    """A process that is slow.

    what: ``data``, ``forward`` or ``product``. factor: of its time over the usual one. since: the
    step of the first record in which it was.
    """

    rank: int
    node: str
    what: str
    factor: float
    since: int

    def __str__(self) -> str:
        """Return a line."""
        names = {
            "data": "waits for its data",
            "forward": "takes for a forward pass",
            "product": "takes for a matrix product",
        }
        name = names[self.what]
        return (
            f"{self.node} (rank {self.rank}) {name} {self.factor:.2g} times as long as the others"
        )


@dataclass
class StragglerDetector:
    """Finds processes that are slow in several records.

    nodes: of each rank.
    """

    nodes: Sequence[str]
    slow: list[SlowRank] = field(default_factory=list, init=False)
    # Steps of the records in a row in which a rank was slow, by rank and kind.
    _streaks: dict[tuple[int, str], list[int]] = field(default_factory=dict, init=False)

    def update(
        self, step: int, step_seconds: float, seconds: dict[str, list[float]]
    ) -> list[SlowRank]:
        """Take a record, and return those that are slow since it, but were not before.

        step_seconds: of a step. seconds: by kind, of each rank.
        """
        before = {(one.rank, one.what) for one in self.slow}
        streaks, self.slow = self._streaks, []
        self._streaks = {}
        for what, values in seconds.items():
            usual = statistics.median_low(values)
            # A product is no part of a step.
            least = 0.0 if what == "product" else _SHARE_OF_STEP * step_seconds
            for rank, value in enumerate(values):
                if usual > 0 and value > _FACTOR * usual and value - usual > least:
                    steps = [*streaks.get((rank, what), []), step]
                    self._streaks[rank, what] = steps[:1] + steps[1:][-_RECORDS:]
                    if len(steps) >= _RECORDS:
                        node, factor = self.nodes[rank], value / usual
                        self.slow.append(SlowRank(rank, node, what, factor, steps[0]))
        return [one for one in self.slow if (one.rank, one.what) not in before]


def record_step_times(
    folder: Path, step: int, nodes: Sequence[str], seconds: dict[str, list[float]]
) -> None:
    """Append a record of all ranks to the run's file, which has a bounded size."""
    path = folder / STEP_TIMES
    with suppress(OSError):
        if path.stat().st_size > _MAX_BYTES:
            path.replace(path.with_name(f"{path.name}.1"))
    by_node: dict[str, list[int]] = {}
    for rank, name in enumerate(nodes):
        by_node.setdefault(name, []).append(rank)
    record = {
        "step": step,
        "nodes": by_node,
        **{f"{what}_seconds": [round(v, 6) for v in values] for what, values in seconds.items()},
    }
    # Training does not depend on it.
    with suppress(OSError), open_to_append(path) as file:
        file.write(json.dumps(record).encode() + b"\n")


def write_slow_nodes(folder: Path, step: int, slow: Sequence[SlowRank]) -> None:
    """Note what is slow, or that nothing is, for `modtrain status`."""
    path = folder / SLOW_NODES
    with suppress(OSError):
        if not slow:
            path.unlink(missing_ok=True)
            return
        time = datetime.now(UTC).isoformat(timespec="seconds")
        content = {"step": step, "time": time, "slow": [asdict(one) for one in slow]}
        write_text(path, json.dumps(content))


def read_slow_nodes(folder: Path) -> list[SlowRank]:
    """Return what was noted last.

    Raises:
        UnreadableError: the file is damaged.
    """
    path = folder / SLOW_NODES
    if not path.is_file():
        return []
    entries: Any = read_json(path).get("slow")
    try:
        return [
            SlowRank(
                int(entry["rank"]),
                str(entry["node"]),
                str(entry["what"]),
                float(entry["factor"]),
                int(entry["since"]),
            )
            for entry in entries
            if entry["what"] in ("data", "forward", "product")
        ]
    except (TypeError, KeyError, ValueError):
        raise UnreadableError(f"{SLOW_NODES} is damaged") from None
