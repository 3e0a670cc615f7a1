"""Which runs may share an axis: those with the same data and the same held-out sequences."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import NamedTuple

from modtrain.experiments.report.runs import Run


class _HeldOut(NamedTuple):
    """What two runs share whose losses may be compared."""

    fingerprint: str
    seq_len: str
    document_mask: str
    sequences: str


@dataclass(frozen=True)
class DataGroup:
    """Runs whose losses may be compared. title: what they were evaluated on."""

    title: str
    runs: list[Run]


def group_by_data(runs: Sequence[Run]) -> list[DataGroup]:
    """Return the runs by data, the largest group first; their `Run.data` is its title."""
    runs_by_key: dict[_HeldOut, list[Run]] = {}
    for run in runs:
        keys = ("data.seq_len", "data.document_mask", "eval.sequences")
        held_out = (str(run.config.get(key)) for key in keys)
        runs_by_key.setdefault(_HeldOut(run.fingerprint, *held_out), []).append(run)
    groups = []
    for place, key in enumerate(sorted(runs_by_key, key=lambda key: -len(runs_by_key[key])), 1):
        label = f"data {place}: " if len(runs_by_key) > 1 else ""
        title = label + _title(key, runs_by_key[key])
        groups.append(DataGroup(title, [replace(run, data=title) for run in runs_by_key[key]]))
    return groups


def _title(key: _HeldOut, runs: Sequence[Run]) -> str:
    names = {PurePath(path).name for run in runs for path in _data_paths(run)}
    paths = ", ".join(sorted(names)[:3])
    count = "all" if key.sequences == "None" else key.sequences
    masked = ", documents masked" if key.document_mask == "True" else ""
    sequences = f"{count} held-out sequences of {key.seq_len} tokens{masked}"
    return f"{paths} ({key.fingerprint[:12]}), {sequences}"


def _data_paths(run: Run) -> list[str]:
    """The prepared directories of a run: one, or one for each source of a mixture."""
    sources = [key for key in run.config if re.fullmatch(r"data\.sources\..+\.path", key)]
    return [str(run.config[key]) for key in sources] or [str(run.config.get("data.path"))]
