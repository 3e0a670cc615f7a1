"""Documents of WebDataset archives: one a sample, from its ``.txt`` or its ``.json`` member.

Nothing is extracted, so that names are only names; links and devices are flaws.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Self

from modtrain.data.prepare.check import DocumentCheck, decoded
from modtrain.data.prepare.decompress import BOM
from modtrain.data.prepare.flaws import DamagedError, Flaw, shown_names

# A name longer than a header's field has a header of its own, and so have other attributes.
_MAX_HEADER_BYTES = 1 << 20
# As webdataset does: such members tell of the archive.
_META = re.compile(r"__[^/]*__($|/)")
_HINT = "such a member holds one JSON object"


_EXTENSIONS_SHOWN = 8


@dataclass
class _Sample:
    """Members in sequence whose names differ in their extensions alone.

    number: of its first member. texts: by kind, ``txt`` or ``json``: its content or what is wrong
    with it. chosen: by kind, the extension of that. others: extensions that could be as well.
    """

    key: str
    number: int
    extensions: list[str] = field(default_factory=list)
    texts: dict[str, bytes | Flaw] = field(default_factory=dict)
    chosen: dict[str, str] = field(default_factory=dict)
    others: dict[str, list[str]] = field(default_factory=dict)


def tar_documents(pieces: Iterator[bytes], path: str, check: DocumentCheck) -> Iterator[str | Flaw]:
    """Yield the document of each sample of an archive, whose content comes in ``pieces``."""
    number = 0
    sample: _Sample | None = None
    try:
        for number, member, stream in _members(pieces):
            if member.isdir() or _META.match(member.name):
                continue
            if not member.isreg() or member.issparse():
                detail = f"member {member.name!r} is a link, a device or sparse"
                yield Flaw("not_a_file", path, number, detail)
                continue
            key, extension = _key_and_extension(member.name)
            if not key:
                continue
            if sample is None or key != sample.key:
                if sample is not None:
                    yield _document(sample, path, check)
                sample = _Sample(key, number)
            _add(sample, extension, _content(member, stream, number, path, check))
    except DamagedError as error:
        # A sample's text is whole, whatever followed; of its .json a .txt might have followed.
        if sample is not None and "txt" in sample.texts and check.field.template is None:
            yield _document(sample, path, check)
        yield Flaw("damaged", path, number + 1, str(error))
        return
    if sample is not None:
        yield _document(sample, path, check)


def _add(sample: _Sample, extension: str, content: bytes | Flaw | None) -> None:
    if len(sample.extensions) < _EXTENSIONS_SHOWN:
        sample.extensions.append(extension)
    if content is None:
        return
    kind = extension.rpartition(".")[2]
    # That without a further dot in its extension comes first.
    if kind in sample.chosen and (sample.chosen[kind] == kind) == (extension == kind):
        others = sample.others.setdefault(kind, [])
        if len(others) < _EXTENSIONS_SHOWN:
            others.append(extension)
    elif kind not in sample.chosen or extension == kind:
        sample.chosen[kind], sample.texts[kind] = extension, content
        sample.others.pop(kind, None)


def _key_and_extension(name: str) -> tuple[str, str]:
    # It imports torch, which takes a second.
    from webdataset.tariterators import base_plus_ext  # noqa: PLC0415

    key, extension = base_plus_ext(name)
    if key is None or key.endswith("/"):
        # A hidden file, as a shell and the paths of other sources leave it out.
        return "", ""
    return key, (extension or "").lower()


def _content(
    member: tarfile.TarInfo, stream: _Forward, number: int, path: str, check: DocumentCheck
) -> bytes | Flaw | None:
    """Return the content of a member that may be text, None for another one."""
    if not member.name.lower().endswith((".txt", ".json")):
        return None
    if member.size > check.max_bytes:
        return check.too_large(path, number, f"member {member.name!r} is larger")
    return stream.take(member.size)


def _document(sample: _Sample, path: str, check: DocumentCheck) -> str | Flaw:
    text, record = sample.texts.get("txt"), sample.texts.get("json")
    kinds = ["json" if text is None else "txt"]
    if check.field.template is not None:
        kinds = ["txt", "json"]
    for kind in kinds:
        if kind in sample.others:
            return _several(sample, kind, path)
    content = record if text is None else text
    if isinstance(content, Flaw):
        return content
    if content is None:
        names = shown_names(sample.extensions)
        detail = f"sample {sample.key!r} has no .txt and no .json member, only {names}"
        return Flaw("no_text", path, sample.number, detail)
    # A document must not depend on the system that wrote it.
    content = content.removeprefix(BOM)
    if text is None:
        return check.of_json(content, path, sample.number, _HINT)
    if check.field.template is not None:
        return _templated(content.replace(b"\r\n", b"\n"), record, path, sample.number, check)
    return check.of_text(content.replace(b"\r\n", b"\n"), path, sample.number)


def _several(sample: _Sample, kind: str, path: str) -> Flaw:
    names = shown_names([sample.chosen[kind], *sample.others[kind]])
    detail = (
        f"sample {sample.key!r} has several .{kind} members: {names}. What stands before the first"
        " dot of a name is that of its sample: give each document another one"
    )
    return Flaw("several_texts", path, sample.number, detail)


def _templated(
    text: bytes, record: bytes | Flaw | None, path: str, number: int, check: DocumentCheck
) -> str | Flaw:
    """Return the document of a template, for which ``txt`` is one more field of the record."""
    if isinstance(record, Flaw):
        return record
    whole = decoded(text, path, number)
    if isinstance(whole, Flaw):
        return whole
    if record is None:
        return check.of_record({"txt": whole}, path, number)
    return check.of_json(record.removeprefix(BOM), path, number, _HINT, {"txt": whole})


class _Forward:
    """What tarfile reads of the pieces of a file: forwards, and headers of bounded size only."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._waiting = bytearray()
        self._at = 0
        self._header_bytes = _MAX_HEADER_BYTES

    def tell(self) -> int:
        return self._at

    def seek(self, position: int) -> None:
        if position < self._at:
            raise DamagedError("a member lies before the one that it follows")
        while self._at < position and (self._waiting or self._fill()):
            count = min(position - self._at, len(self._waiting))
            del self._waiting[:count]
            self._at += count

    def read(self, size: int) -> bytes:
        """Read a part of a header."""
        self._header_bytes -= size
        if size < 0 or self._header_bytes < 0:
            raise DamagedError(f"a header of more than {_MAX_HEADER_BYTES:,} bytes")
        return self._read(size)

    def take(self, size: int) -> bytes:
        """Read the content of a member, whose header comes just before."""
        content = self._read(size)
        if len(content) < size:
            raise DamagedError("the archive is cut short")
        return content

    def refuse_more(self) -> None:
        """Raise DamagedError where anything but zeros follows the archive's end mark."""
        while self._waiting or self._fill():
            if any(self._waiting):
                raise DamagedError(
                    "more follows behind its end, as of archives joined by cat: name each by itself"
                )
            self._waiting.clear()

    def begin_header(self) -> None:
        self._header_bytes = _MAX_HEADER_BYTES

    def _read(self, size: int) -> bytes:
        while len(self._waiting) < size and self._fill():
            pass
        content = bytes(self._waiting[:size])
        del self._waiting[:size]
        self._at += len(content)
        return content

    def _fill(self) -> bool:
        piece = next(self._pieces, b"")
        self._waiting += piece
        return bool(piece)


class _StrictTarInfo(tarfile.TarInfo):
    """A member whose header is whole: tarfile takes a damaged one for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            member = super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise DamagedError(f"not a tar archive, or cut short: {error}") from None
        if member.size < 0 or member.type == tarfile.GNUTYPE_SPARSE:
            raise DamagedError(f"member {member.name!r} is sparse, or of a negative size")
        return member


def _members(pieces: Iterator[bytes]) -> Iterator[tuple[int, tarfile.TarInfo, _Forward]]:
    """Yield the members of an archive with their numbers, the stream at their content."""
    stream = _Forward(pieces)
    number = 0
    try:
        with tarfile.TarFile(fileobj=stream, mode="r", tarinfo=_StrictTarInfo) as archive:  # type: ignore[arg-type]
            while (member := archive.next()) is not None:
                number += 1
                yield number, member, stream
                archive.members.clear()  # type: ignore[attr-defined]
                archive.pax_headers.clear()  # type: ignore[attr-defined]
                stream.begin_header()
        stream.refuse_more()
    except (tarfile.TarError, ValueError, OverflowError, UnicodeError, RecursionError) as error:
        raise DamagedError(f"not a tar archive, or cut short: {error}") from None
