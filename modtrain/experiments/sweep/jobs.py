"""The jobs of a sweep: their overrides, their names, and the file that lists them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Override

from modtrain.common.atomic_io import write_text
from modtrain.common.errors import CheckpointError, Problem
from modtrain.common.overrides import SOURCES
from modtrain.common.reading import UnreadableError, read_json
from modtrain.common.renamed_keys import flatten, translate_flat
from modtrain.common.spelling import quoted
from modtrain.training.config import TrainConfig

_MAX_NAME_CHARS = 120
_UNSAFE = re.compile(r"[^A-Za-z0-9._=,+-]")


@dataclass(frozen=True)
class SweepJob:
    """One run of a sweep.

    name: its directory below the sweep's. swept: the overrides that differ between jobs, key →
    value as text. overrides: all of its training configuration, with the sweep's ``name``.
    """

    name: str
    swept: dict[str, str]
    overrides: list[str]


def expand(overrides: Sequence[Override]) -> tuple[list[SweepJob], list[Problem]]:
    """Return the jobs that Hydra's basic sweeper makes from ``overrides``, in its order."""
    endless = [o for o in overrides if o.is_sweep_override() and not o.is_discrete_sweep()]
    if endless:
        reason, remedy = "has infinitely many values", "list them, or use modtrain search"
        return [], [
            Problem(o.get_key_element(), o.input_line or "", reason, remedy) for o in endless
        ]
    swept = {o.get_key_element() for o in overrides if o.is_sweep_override()}
    if not swept:
        remedy = "give a key several values, as in model.capacity=0.125,0.25, or leave -m out"
        return [], [Problem("-m", "", "sweeps nothing: each key has one value", remedy)]
    if "name" in swept:
        remedy = "give the sweep one name; its jobs are named by what is swept"
        return [], [Problem("name", "", "has several values", remedy)]
    (batch,) = BasicSweeper.split_arguments(list(overrides), None)
    jobs: dict[str, SweepJob] = {}
    problems = []
    for arguments in batch:
        pairs = dict(argument.split("=", 1) for argument in arguments)
        job_overrides = {key: pairs[key] for key in sorted(swept)}
        name = job_name(job_overrides)
        if name in jobs:
            remedy = "name each value once"
            problems.append(Problem(name, "", "occurs twice", remedy))
        jobs[name] = SweepJob(name, job_overrides, list(arguments))
    return list(jobs.values()), problems


def job_name(swept: Mapping[str, str]) -> str:
    """Return a directory name for these overrides, independent of their order.

    Characters that are special to a file system or a shell are replaced, and long names are cut; a
    digest is then appended, so that different overrides have different names.
    """
    text = ",".join(f"{key}={value}" for key, value in sorted(swept.items()))
    safe = _UNSAFE.sub("_", text)
    if safe == text and len(safe) <= _MAX_NAME_CHARS and not safe.startswith("."):
        return safe
    return f"{safe[:_MAX_NAME_CHARS]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def overrides_of(job: SweepJob, config: TrainConfig) -> list[str]:
    """Return the overrides of a job's run. config: the run's, with its name."""
    unnamed = [text for text in job.overrides if not text.startswith("name=")]
    return [*unnamed, f"name={quoted(str(config.name))}"]


def overrides_between(before: TrainConfig, after: TrainConfig) -> list[str]:
    """Return the overrides that make ``after`` of ``before``, but for the name."""
    old, new = (flatten(asdict(config), whole=[SOURCES]) for config in (before, after))
    return [
        f"{key}={as_value(value)}"
        for key, value in new.items()
        if key != "name" and (key not in old or old[key] != value)
    ]


def as_value(value: Any) -> str:
    """Write a value as Hydra reads it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, Sequence):
        return f"[{','.join(map(as_value, value))}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}: {as_value(one)}' for key, one in value.items())}}}"
    return repr(value)


def read_jobs(directory: Path) -> dict[str, dict[str, str]]:
    """Return the swept overrides of the sweep's jobs by name; empty without a sweep."""
    path = directory / "sweep.json"
    if not path.is_file():
        return {}
    try:
        stored = read_json(path)["jobs"]
        return {name: translate_flat(job["overrides"]) for name, job in stored.items()}
    except (UnreadableError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is damaged: {error}\n"
            "remedy: remove it and start the sweep again, which lists its jobs anew"
        ) from None


def write_jobs(directory: Path, jobs: Sequence[SweepJob]) -> None:
    """Add ``jobs`` to the sweep's list."""
    listed = read_jobs(directory) | {job.name: job.swept for job in jobs}
    directory.mkdir(parents=True, exist_ok=True)
    content = {"jobs": {name: {"overrides": swept} for name, swept in listed.items()}}
    write_text(directory / "sweep.json", json.dumps(content, indent=1) + "\n")
