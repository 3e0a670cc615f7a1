"""Which files a corpus consists of: paths, globs, addresses and files of installed packages."""

from __future__ import annotations

import glob
import importlib.util
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from modtrain.common.errors import DataError
from modtrain.data.prepare.decompress import COMPRESSIONS
from modtrain.data.prepare.saved_dataset import saved_dataset
from modtrain.data.prepare.storage import (
    file_name,
    is_command,
    remote_matches,
    shown_name,
    status_of,
)
from modtrain.data.prepare.tokenized.kinds import KINDS as TOKEN_KINDS
from modtrain.data.prepare.tokenized.kinds import SUFFIXES as TOKEN_SUFFIXES
from modtrain.data.prepare.tokenized.kinds import index_of, token_folder, token_kind
from modtrain.data.remote.urls import is_url
from modtrain.data.stream.prepared import INDEX_NAME, SPLITS

PACKAGE_PREFIX = "package:"
# Suffix → kind. What is read from its beginning to its end may be compressed.
_STREAMS = {".txt": "text", ".jsonl": "jsonl", ".csv": "csv", ".tsv": "tsv", ".tar": "tar"}
KINDS = {
    **{
        f"{suffix}.{compression}": f"{kind}.{compression}"
        for suffix, kind in _STREAMS.items()
        for compression in COMPRESSIONS
    },
    ".tgz": "tar.gz",
    **_STREAMS,
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
_KNOWN = (
    f"{', '.join(_STREAMS)}, each also with {', '.join('.' + c for c in COMPRESSIONS)},"
    " .parquet, .arrow and .feather, and with token numbers .bin, .npy and .mds"
)


@dataclass(frozen=True)
class SourceFile:
    """One file of the corpus.

    kind: one of the values of `KINDS`, or of the kinds of token numbers.
    size: in bytes; 0 for what a command prints.
    mtime_ns: time of its last change, in ns, or what stands for its version where it lies behind an
        address; with the size it tells a changed file.
    number: of several addresses that differ in their queries alone, from 0.
    """

    path: str
    kind: str
    size: int
    mtime_ns: int
    number: int = field(default=0, compare=False)

    @property
    def compression(self) -> str:
        """One of COMPRESSIONS, or empty."""
        return self.kind.partition(".")[2]

    @property
    def has_tokens(self) -> bool:
        """Whether it holds token numbers in place of text."""
        return self.kind in TOKEN_KINDS

    @property
    def name(self) -> str:
        """What tells it from others, wherever its folder lies."""
        return file_name(self.path)

    @property
    def shown(self) -> str:
        """Its path or address without what may be secret."""
        return shown_name(self.path)

    @property
    def identity(self) -> dict[str, Any]:
        """What tells it from others and from other versions of it, without a signature.

        A signature that is renewed makes it no other file.
        """
        identity = {**asdict(self), "path": self.shown}
        if self.number == 0:
            # Earlier versions did not have it.
            del identity["number"]
        return identity

    @classmethod
    def of(cls, path: str) -> SourceFile:
        """Look at a file. Raises DataError for a suffix that is not known."""
        if is_command(path):
            return cls(path, "tar", 0, 0)
        if kind := token_kind(path):
            size, version = status_of(path)
            index = index_of(path, kind)
            if index is not None:
                if not index.is_file():
                    raise DataError(f"{path}: there is no {index.name} beside it.")
                # What is read of the file changes with its index.
                index_size, index_version = status_of(str(index))
                size, version = size + index_size, max(version, index_version)
            return cls(path, kind, size, version)
        name = file_name(path).lower()
        kinds = [kind for suffix, kind in KINDS.items() if name.endswith(suffix)]
        if not kinds:
            raise DataError(
                f"{shown_name(path)}: its suffix is not known. Known are {_KNOWN}; narrow the"
                " source."
            )
        size, version = status_of(path)
        return cls(path, kinds[0], size, version)


def expand_sources(sources: Sequence[str]) -> list[SourceFile]:
    """Every file that the sources name: in their order, sorted within each, each file once.

    Raises DataError for sources that match no file and for files of an unknown kind, all at once.
    """
    errors: list[str] = []
    files: dict[object, SourceFile] = {}
    for source in sources:
        try:
            for path in _matches(source):
                # A link, or another source, may name the same file.
                key = _identity(path)
                if key not in files:
                    files[key] = SourceFile.of(path)
        except DataError as error:
            errors.append(str(error))
    if errors:
        raise DataError("\n".join(errors))
    seen: Counter[str] = Counter()
    numbered = []
    for file in files.values():
        numbered.append(replace(file, number=seen[file.shown]))
        seen[file.shown] += 1
    return numbered


def _identity(path: str) -> object:
    if is_command(path) or is_url(path):
        return path
    status = Path(path).stat()
    return status.st_dev, status.st_ino


def _matches(source: str) -> list[str]:
    if is_command(source):
        return [source]
    if is_url(source):
        urls = remote_matches(source)
        if not urls:
            raise DataError(f"{shown_name(source)}: matches no file.")
        is_pattern = any(character in source for character in "*[")
        return urls if is_pattern else [path for url in urls for path in _files_behind(url)]
    pattern = str(Path(_inside_package(source)).expanduser())
    if Path(pattern).is_file():
        return [pattern]
    if Path(pattern).is_dir():
        folder = Path(pattern)
        if saved := saved_dataset(pattern, source) or token_folder(folder):
            return saved
    # Hidden files and folders stay out, as in a shell.
    # Path.glob takes no absolute pattern.
    paths = glob.glob(pattern, recursive=True)  # noqa: PTH207
    files = _each_once(path for path in paths if Path(path).is_file())
    if not files:
        raise DataError(f"{source}: matches no file{_hint(source, pattern)}.")
    return files


def _files_behind(url: str) -> list[str]:
    """Return the address of a file, or those of the files of a saved data set."""
    name = file_name(url).lower()
    if "?" in url or name.endswith((*KINDS, *TOKEN_SUFFIXES, ".idx")):
        return [url]
    return saved_dataset(url, shown_name(url)) or [url]


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
    if all((folder / name).exists() for name in (INDEX_NAME, *SPLITS)):
        return (
            f": it is prepared data already; train on it with {shlex.quote(f'data.path={source}')}"
        )
    if folder.is_dir():
        below = glob.iglob(f"{glob.escape(str(folder))}/**/*", recursive=True)  # noqa: PTH207
        suffix = next(filter(None, map(_known_suffix, below)), None)
        if suffix is None:
            return f": it is a folder without a file of a known kind. Known are {_KNOWN}"
        below_it = f"{glob.escape(source.rstrip('/'))}/**/*{suffix}"
        return f": it is a folder; write {_spelled(below_it)}"
    escaped = source.replace("[", "[[]")
    if "[" in source and glob.glob(pattern.replace("[", "[[]"), recursive=True):  # noqa: PTH207
        return f": [ begins a set of characters; write {_spelled(escaped)}"
    return ""


def _spelled(pattern: str) -> str:
    """Return a pattern, and what a shell and Hydra take for it where they read it otherwise."""
    if re.fullmatch(r"[\w./*-]+", pattern):
        return pattern
    # It imports Hydra, for those who made a mistake.
    from modtrain.common.spelling import list_in_quotes  # noqa: PLC0415

    return f"{pattern} (in a command: {list_in_quotes('sources', pattern)})"


def _known_suffix(path: str) -> str:
    """Return the suffix of a file of a known kind, spelled as it is; else nothing."""
    suffixes = (s for s in (*KINDS, *TOKEN_SUFFIXES) if path.lower().endswith(s))
    suffix = next(suffixes, "")
    return path[-len(suffix) :] if suffix and Path(path).is_file() else ""


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
