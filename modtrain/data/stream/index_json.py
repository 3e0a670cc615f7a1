"""``index.json``: what is written there, and its values read with their types checked.

Imports neither torch nor numpy.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from modtrain.common.atomic_io import digest
from modtrain.common.errors import DataError
from modtrain.common.reading import UnreadableError, read_json
from modtrain.data.packing.summary import BEST_FIT, Packing, SplitPacking
from modtrain.data.remote.fetched import fetched
from modtrain.data.remote.urls import is_url
from modtrain.data.stream.prepared import (
    DAMAGED,
    INDEX_NAME,
    ITEM_SIZES,
    PACKING_FILES,
    SIDE_FILES,
    SPLITS,
    IndexSummary,
    Shard,
    SideFile,
    SplitSummary,
)

INDEX_VERSION = 1
# Earlier versions of modtrain would take padding for damage: they refuse this one.
PACKED_INDEX_VERSION = 2
_MAX_INDEX_BYTES = 1 << 32
_TAR_BLOCK = 512
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.tar")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def read_summary(path: str | Path) -> IndexSummary:
    """The summary of the prepared directory ``path``; no shard is looked at.

    Raises DataError where there is no index or a damaged one.
    """
    return _summary(_read(path))


def read_index(
    path: str | Path,
) -> tuple[IndexSummary, dict[str, tuple[Shard, ...]], dict[str, SideFile]]:
    """Return the summary, the shards of each split and the side files of a prepared directory.

    Raises DataError where there is no index, or one that does not fit itself.
    """
    content = _read(path)
    summary = _summary(content)
    shards = {
        name: tuple(_shard(item, summary) for item in split.list_of("shards"))
        for name, split in content.splits().items()
    }
    side_files = _side_files(content, summary)
    _check_sums(content, summary, shards)
    return summary, shards, side_files


def fingerprint(shards: Mapping[str, Sequence[Shard]], summary: IndexSummary) -> str:
    """Identity of what a run reads: equal for equal tokens in the same sequences."""
    sums = {split: [shard.sha256 for shard in shards[split]] for split in shards}
    content = [INDEX_VERSION, summary.seq_len, summary.tokenizer_sha256, sums]
    return digest(content if summary.packing is None else [*content, BEST_FIT])


def index_content(
    summary: IndexSummary,
    shards: Mapping[str, Sequence[Shard]],
    side_files: Mapping[str, SideFile] | None = None,
) -> dict[str, Any]:
    """What ``index.json`` says; the fingerprint is worked out here."""
    content = dict(vars(summary))
    if summary.end_token is None:
        del content["end_token"]
    del content["packing"]
    if summary.packing is not None:
        packed = {split: vars(own) for split, own in summary.packing.items()}
        content["packing"] = {"kind": BEST_FIT, "splits": packed}
    sides = {
        name: {"bytes": side.num_bytes, "sha256": side.sha256}
        for name, side in (side_files or {}).items()
    }
    return {
        **({"side_files": sides} if sides else {}),
        "report": {name: content.pop(name) for name in ("num_files", "flaws")},
        **content,
        "version": INDEX_VERSION if summary.packing is None else PACKED_INDEX_VERSION,
        "fingerprint": fingerprint(shards, summary),
        "splits": {
            name: {
                **vars(summary.splits[name]),
                "shards": [
                    {
                        "name": shard.name,
                        "bytes": shard.num_bytes,
                        "sha256": shard.sha256,
                        "members": [list(member) for member in shard.members],
                    }
                    for shard in shards[name]
                ],
            }
            for name in SPLITS
        },
    }


class _Object:
    """A JSON object of the index whose values are read with their types checked."""

    def __init__(self, file: str | Path, content: object, where: str = "") -> None:
        self.file = file
        self.where = where
        if not isinstance(content, dict):
            self.fail(f"{where or 'the file'} is not an object")
        self.content: dict[str, Any] = content

    def fail(self, what: str) -> NoReturn:
        raise DataError(f"{self.file}: {what}. {DAMAGED}")

    def integer(self, key: str, minimum: int = 0) -> int:
        value = self.content.get(key)
        # True is an int to Python, not to us.
        if type(value) is not int or value < minimum:
            self.fail(f"{self.where}{key} is {value!r}, not an integer of {minimum} or more")
        return value

    def text(self, key: str, pattern: re.Pattern[str]) -> str:
        value = self.content.get(key)
        if not isinstance(value, str) or not pattern.fullmatch(value):
            self.fail(f"{self.where}{key} is {value!r}, which it must not be")
        return value

    def optional_text(self, key: str) -> str | None:
        return None if self.content.get(key) is None else self.text(key, re.compile(r"(?s).+"))

    def object(self, key: str) -> _Object:
        return _Object(self.file, self.content.get(key), f"{self.where}{key}.")

    def list_of(self, key: str) -> list[_Object]:
        value = self.content.get(key)
        if not isinstance(value, list):
            self.fail(f"{self.where}{key} is not a list")
        return [_Object(self.file, v, f"{self.where}{key}[{i}].") for i, v in enumerate(value)]

    def splits(self) -> dict[str, _Object]:
        splits = self.object("splits")
        return {name: splits.object(name) for name in SPLITS}


def _why_missing(path: str | Path, file: str) -> str:
    """Return why ``path`` has no index, and what to do."""
    if not is_url(path) and Path(path).is_file():
        if Path(path).name == INDEX_NAME:
            return f"{path}: is a file; give its directory, {Path(path).parent}."
        from modtrain.common.spelling import list_in_quotes  # noqa: PLC0415  (imports Hydra)

        sources = list_in_quotes("sources", str(path))
        return (
            f"{path}: is a file, not a directory of prepared data. Prepare it: modtrain prepare"
            f" corpus=files {sources} split_at=line output=data/mine"
        )
    more = "" if is_url(path) or Path(path).is_dir() else " There is no such directory."
    return (
        f"{file}: missing, so {path} holds no finished data.{more} "
        f"Run modtrain prepare; an interrupted one is resumed."
    )


def _read(path: str | Path) -> _Object:
    file = f"{str(path).rstrip('/')}/{INDEX_NAME}"
    if is_url(path):
        place = fetched(str(path), INDEX_NAME, _MAX_INDEX_BYTES)
    else:
        place = Path(path, INDEX_NAME)
        file = str(place)
    if not os.path.lexists(place):
        raise DataError(_why_missing(path, file))
    try:
        content = read_json(place, _MAX_INDEX_BYTES, _Patterns().replace)
    except UnreadableError as error:
        raise DataError(f"{path}/{error}. {DAMAGED}") from None
    checked = _Object(file, content)
    version = checked.integer("version")
    if version not in (INDEX_VERSION, PACKED_INDEX_VERSION):
        raise DataError(
            f"{file}: has version {version}; this modtrain reads version {INDEX_VERSION} and "
            f"{PACKED_INDEX_VERSION}. "
            "Run modtrain prepare into another output."
        )
    return checked


def _summary(content: _Object) -> IndexSummary:
    report = content.object("report")
    flaws = report.object("flaws")
    summary = IndexSummary(
        seq_len=content.integer("seq_len", 1),
        vocab_size=content.integer("vocab_size", 1),
        eos_id=content.integer("eos_id"),
        dtype=content.text("dtype", re.compile("|".join(ITEM_SIZES))),
        tokenizer_sha256=content.text("tokenizer_sha256", _SHA256),
        fingerprint=content.text("fingerprint", _SHA256),
        num_files=report.integer("num_files"),
        flaws={kind: flaws.integer(kind) for kind in flaws.content},
        splits={
            name: SplitSummary(**{key: split.integer(key) for key in SplitSummary.__annotations__})
            for name, split in content.splits().items()
        },
        end_token=content.optional_text("end_token"),
        packing=_packing(content),
    )
    most = 2 ** (8 * ITEM_SIZES[summary.dtype])
    if summary.vocab_size + (summary.packing is not None) > most:
        content.fail(
            f"vocab_size is {summary.vocab_size}, more than {summary.dtype} can tell apart"
        )
    if summary.eos_id >= summary.vocab_size:
        content.fail(f"eos_id is {summary.eos_id}, outside a vocabulary of {summary.vocab_size}")
    return summary


def _packing(content: _Object) -> Packing | None:
    if content.integer("version") == INDEX_VERSION:
        return None
    packing = content.object("packing")
    packing.text("kind", re.compile(BEST_FIT))
    return {
        name: SplitPacking(**{key: split.integer(key) for key in SplitPacking.__annotations__})
        for name, split in packing.splits().items()
    }


class _Patterns:
    """Lists of members that were read: equal ones are one object, as of nearly all shards.

    Without this, an index of 100,000 shards takes a gigabyte.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]] = {}

    def replace(self, content: dict[str, Any]) -> dict[str, Any]:
        """Put tuples in the place of a shard's members, if they are what they must be."""
        members = content.get("members")
        if isinstance(members, list) and all(map(_is_member, members)):
            pattern = tuple(map(tuple, members))
            content["members"] = self._seen.setdefault(pattern, pattern)
        return content


def _shard(content: _Object, summary: IndexSummary) -> Shard:
    num_bytes = content.integer("bytes")
    if num_bytes % _TAR_BLOCK:
        content.fail(f"{content.where}bytes is {num_bytes}, which no tar file has")
    members = content.content.get("members")
    # JSON has no tuples: it is one that was checked.
    if not isinstance(members, tuple):
        content.fail(f"{content.where}members is not a list of [offset, sequences]")
    sequence_bytes = (summary.seq_len + 1) * ITEM_SIZES[summary.dtype]
    end = 0
    for offset, count in members:
        if offset < end or offset + count * sequence_bytes > num_bytes:
            content.fail(f"{content.where}members has one outside its shard, at byte {offset}")
        end = offset + count * sequence_bytes
    # A name with a separator could lead out of the directory.
    name = content.text("name", _SHARD_NAME)
    return Shard(name, num_bytes, content.text("sha256", _SHA256), members)


def _side_files(content: _Object, summary: IndexSummary) -> dict[str, SideFile]:
    names = SIDE_FILES if summary.packing is None else (*SIDE_FILES, *PACKING_FILES)
    if "side_files" not in content.content and summary.packing is None:
        return {}
    listed = content.object("side_files")
    files = {name: listed.object(name) for name in names}
    return {
        name: SideFile(file.integer("bytes"), file.text("sha256", _SHA256))
        for name, file in files.items()
    }


def _check_sums(
    content: _Object, summary: IndexSummary, all_shards: Mapping[str, Sequence[Shard]]
) -> None:
    for name, shards in all_shards.items():
        actual = sum(shard.num_sequences for shard in shards)
        expected = summary.splits[name].num_sequences
        if actual != expected:
            content.fail(f"the shards of {name} hold {actual} sequences, not {expected}")
        counts = [count for shard in shards for _, count in shard.members]
        if any(count != counts[0] for count in counts[:-1]) or counts[-1:] > counts[:1]:
            content.fail(f"the members of {name} are not of one size, the last one excepted")
        if len({shard.name for shard in shards}) != len(shards):
            content.fail(f"{name} names a shard twice")
    if fingerprint(all_shards, summary) != summary.fingerprint:
        content.fail("the fingerprint does not fit the content")


def _is_member(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(number) is int and number >= 0 for number in value)
        and value[1] > 0
    )
