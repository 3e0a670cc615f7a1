"""The runs below a directory. Imports nothing heavy: a shell's completion lists them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

# A directory with one of these is a run's, or a job's.
_MARK_FILES = frozenset(("config.yaml", "jobs.jsonl", "submit.sbatch"))
_RUN_FOLDERS = frozenset(("checkpoints", "tensorboard", "logs", "code"))


def find_runs(root: Path) -> list[Path]:
    """List the directories of runs at and below ``root``, by name. Runs may be nested."""
    return sorted(_walk(root, set()))


def run_names(root: Path) -> list[str]:
    """Return the names of the runs below ``root`` that have a configuration."""
    paths = find_runs(root)
    return [str(p.relative_to(root)) for p in paths if os.path.lexists(p / "config.yaml")]


def newest_run(root: Path) -> str | None:
    """Return the name of the run below ``root`` that was started first most recently, if any."""
    times = {}
    for name in run_names(root):
        with suppress(OSError):
            times[name] = (root / name / "config.yaml").stat().st_mtime
    return max(times, key=lambda name: times[name], default=None)


def has_runs_below(path: Path) -> bool:
    """Whether there are directories of runs below ``path``."""
    return any(folder != path for folder in _walk(path, set()))


def _walk(folder: Path, visited: set[tuple[int, int]]) -> Iterator[Path]:
    with suppress(OSError):
        status = folder.stat()
        if (status.st_dev, status.st_ino) in visited:
            # A link to a folder that was visited, or to a parent.
            return
        visited.add((status.st_dev, status.st_ino))
        entries = list(os.scandir(folder))
        is_run = any(entry.name in _MARK_FILES for entry in entries)
        if is_run:
            yield folder
        for entry in entries:
            hidden = entry.name.startswith(".") or (is_run and entry.name in _RUN_FOLDERS)
            if not hidden and entry.is_dir():
                yield from _walk(folder / entry.name, visited)
