"""Which files a corpus consists of: plain paths, globs and files inside installed packages."""

from __future__ import annotations

import glob
import importlib.util
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from modtrain.common.errors import DataError

PACKAGE_PREFIX = "package:"
# Suffix → kind.
KINDS = {
    ".jsonl.gz": "jsonl.gz",
    ".jsonl.zst": "jsonl.zst",
    ".jsonl": "jsonl",
    ".txt": "text",
    ".parquet": "parquet",
}


@dataclass(frozen=True)
class SourceFile:
    """One file of the corpus.

    kind: one of the values of `KINDS`. size: in bytes.
    mtime_ns: time of its last change, in ns; with the size it tells a changed file.
    """

    path: str
    kind: str
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: str) -> SourceFile:
        """Look at a file. Raises DataError for a suffix that is not known."""
        kinds = [kind for suffix, kind in KINDS.items() if path.lower().endswith(suffix)]
        if not kinds:
            suffixes = ", ".join(KINDS)
            raise DataError(
                f"{path}: its suffix is not known. Known are {suffixes}; narrow the source."
            )
        status = Path(path).stat()
        return cls(path, kinds[0], status.st_size, status.st_mtime_ns)


def expand_sources(sources: Sequence[str]) -> list[SourceFile]:
    """Every file that the sources name: in their order, sorted within each, each file once.

    Raises DataError for sources that match no file and for files of an unknown kind, all at once.
    """
    errors: list[str] = []
    files: dict[tuple[int, int], SourceFile] = {}
    for source in sources:
        try:
            for path in _matches(source):
                status = Path(path).stat()
                # A link, or another source, may name the same file.
                if (status.st_dev, status.st_ino) not in files:
                    files[status.st_dev, status.st_ino] = SourceFile.of(path)
        except DataError as error:
            errors.append(str(error))
    if errors:
        raise DataError("\n".join(errors))
    return list(files.values())


def _matches(source: str) -> list[str]:
    pattern = str(Path(_inside_package(source)).expanduser())
    if Path(pattern).is_file():
        return [pattern]
    # Hidden files and folders stay out, as in a shell.
    # Path.glob takes no absolute pattern.
    paths = glob.glob(pattern, recursive=True)  # noqa: PTH207
    files = _each_once(path for path in paths if Path(path).is_file())
    if not files:
        raise DataError(f"{source}: matches no file{_hint(source, pattern)}.")
    return files


def _each_once(paths: Iterable[str]) -> list[str]:
    """Return the paths of distinct files, sorted: links lead to files, or folders, a second time.

    Of several paths to a file, the one with the fewest folders.
    """
    chosen: dict[tuple[int, int], str] = {}
    for path in sorted(paths, key=lambda path: (path.count("/"), path)):
        status = Path(path).stat()
        chosen.setdefault((status.st_dev, status.st_ino), path)
    return sorted(chosen.values())


def _hint(source: str, pattern: str) -> str:
    """Return what to write for a folder, or for a name with characters that a glob reads."""
    folder = Path(pattern)
    if folder.is_dir():
        names = (name.lower() for _, _, names in os.walk(folder) for name in names)
        suffix = next((s for name in names for s in KINDS if name.endswith(s)), ".txt")
        return f": it is a folder; write {glob.escape(source.rstrip('/'))}/**/*{suffix}"
    escaped = source.replace("[", "[[]")
    if "[" in source and glob.glob(pattern.replace("[", "[[]"), recursive=True):  # noqa: PTH207
        return f": [ begins a set of characters; write {escaped}"
    return ""


def _inside_package(source: str) -> str:
    """The path or glob that a source stands for. The package is located, never imported."""
    if not source.startswith(PACKAGE_PREFIX):
        return source
    name, _, relative = source.removeprefix(PACKAGE_PREFIX).partition("/")
    if not name.isidentifier() or not relative:
        raise DataError(f"{source}: write {PACKAGE_PREFIX}NAME/glob, for a top-level package NAME.")
    spec = importlib.util.find_spec(name)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        raise DataError(f"{source}: no package {name} is installed. Install it: pip install {name}")
    return str(Path(glob.escape(folders[0])) / relative)
