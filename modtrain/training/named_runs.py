"""Runs by name below ``runs_dir``: where they are, and which one is meant. Imports no torch."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from modtrain.common.errors import CheckpointError
from modtrain.common.spelling import spelled
from modtrain.training.run_directory import RunDirectory
from modtrain.training.run_listing import has_runs_below, newest_run, run_names

# Of runs that are listed in a message.
_SHOWN = 12
_ALIKE = 0.5
# What other tools call the newest one.
_NEWEST = ("last", "latest", "newest", "-1")


def name_of(runs_dir: str, name: str) -> str:
    """Return the name below ``runs_dir`` of a run that is given by a path or by a file in it.

    ``runs/first`` and ``./runs/first/`` are ``first``, also where there is none, and so is
    ``runs/first/config.yaml`` where there is one; any other name is returned as it is.
    """
    root, path = Path(runs_dir), Path(name)
    if not name or (not path.is_absolute() and (root / path).is_dir()):
        return name.rstrip("/") or name
    for candidate in (path, path.parent) if path.is_file() else (path,):
        below = os.path.relpath(candidate, root)
        if candidate.is_dir() and not below.startswith("..") and below != ".":
            return below
    below = os.path.relpath(path, root)
    begins_with_root = path.is_absolute() or path.parts[: len(root.parts)] == root.parts != ()
    return name if below.startswith("..") or below == "." or not begins_with_root else below


def open_run(runs_dir: str, name: str, key: str = "run") -> RunDirectory:
    """Return the directory of the run ``name``, which has a configuration. key: gave the name.

    Raises:
        CheckpointError: there is none; names the runs that may be meant.
    """
    path = Path(runs_dir) / name
    if path.is_dir() and not has_runs_below(path):
        # Also what is left of a run: reading it says what is lost.
        return RunDirectory(path)
    if not os.path.lexists(path / "config.yaml"):
        raise CheckpointError(missing_run(runs_dir, name, key))
    return RunDirectory(path)


def missing_run(runs_dir: str, name: str, key: str = "run") -> str:
    """Return the error for a run that is not there, with those that may be meant.

    key: by which it was given.
    """
    root, path = Path(runs_dir), Path(runs_dir) / name
    names = run_names(root)
    below = [other for other in names if other.startswith(f"{name}/")]
    if path.is_dir() and below:
        head = f"{path} is no run, but has runs: {_listed(below)}"
        return f"{head}\nremedy: name one: {spelled(key, below[0])}"
    head = f"there is no run {path}"
    if name in _NEWEST and names:
        return f"{head}\nremedy: the newest is {spelled(key, newest_run(root) or names[-1])}"
    ends = [other for other in names if Path(other).name == Path(name).name]
    near = ends or difflib.get_close_matches(name, names, 1, _ALIKE)
    if near:
        return f"{head}\nremedy: did you mean {spelled(key, near[0])}?"
    if names:
        return f"{head}; there are: {_listed(names)}\nremedy: name one, or add runs_dir=..."
    return f"{head}, and no run below {root}\nremedy: for runs elsewhere add runs_dir=..."


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
