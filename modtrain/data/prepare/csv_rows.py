"""Documents of CSV files: a row each, under the names of the first row."""

from __future__ import annotations

import csv
from collections.abc import Iterator

from modtrain.data.prepare.check import DocumentCheck
from modtrain.data.prepare.decompress import BOM, lines_of
from modtrain.data.prepare.flaws import DamagedError, Flaw, TooLargeError
from modtrain.data.prepare.text_field import columns_of

DELIMITERS = {"csv": ",", "tsv": "\t"}


def csv_documents(
    pieces: Iterator[bytes], path: str, delimiter: str, check: DocumentCheck
) -> Iterator[str | Flaw]:
    """Yield the document of each row of a file whose content comes in ``pieces``.

    A field that is larger than a document ends the file: where it ends is not known, for its quote
    may have no other one.
    Raises DataError where the first row does not name the columns of the text.
    """
    # It is the library's own, for all readers of the process.
    csv.field_size_limit(check.max_bytes)
    lines = _Lines(pieces, check.max_bytes)
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    names: list[str] | None = None
    while True:
        line = rows.line_num + 1
        lines.begin_row()
        try:
            row = next(rows)
        except StopIteration:
            return
        except DamagedError as error:
            yield Flaw("damaged", path, line, str(error))
            return
        except (TooLargeError, csv.Error) as error:
            flaw = _flaw(error, path, line, check)
            yield flaw
            if flaw.kind != "bad_csv":
                return
            continue
        if not row:
            continue
        if names is None:
            columns_of(path, row, check.field, has="its first row names")
            names = row
            continue
        yield _document(row, names, path, line, check)


def _flaw(error: Exception, path: str, line: int, check: DocumentCheck) -> Flaw:
    text = str(error)
    if "unexpected end" in text:
        return Flaw("damaged", path, line, "cut short: a quote has no other one")
    if isinstance(error, TooLargeError) or "field limit" in text:
        what = "the rest of the file is left out: a field or line is larger"
        flaw = check.too_large(path, line, what)
        return Flaw(flaw.kind, path, line, f"{flaw.detail}; is a quote without its other one?")
    return Flaw("bad_csv", path, line, f"not CSV: {text}")


def _document(
    row: list[str], names: list[str], path: str, line: int, check: DocumentCheck
) -> str | Flaw:
    if len(row) != len(names):
        detail = f"{len(row)} fields, and the first row names {len(names)}"
        return Flaw("bad_csv", path, line, detail)
    record = dict(zip(names, row, strict=True))
    document = check.of_record(record, path, line)
    if isinstance(document, Flaw) and document.kind == "invalid_utf8":
        return Flaw("invalid_utf8", path, line, "not UTF-8")
    return document


class _Lines:
    """The lines of a file, with their ends, of which one row takes a bounded number of bytes.

    Bytes that are not UTF-8 are kept as lone surrogates.
    """

    def __init__(self, pieces: Iterator[bytes], max_bytes: int) -> None:
        self._lines = lines_of(pieces, max_bytes)
        self._max_bytes = max_bytes
        self._row_bytes = 0
        self._is_first = True

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        if line is None or self._row_bytes + len(line) > self._max_bytes:
            raise TooLargeError
        self._row_bytes += len(line)
        if self._is_first:
            self._is_first, line = False, line.removeprefix(BOM)
        return line.decode("utf-8", "surrogateescape") + "\n"

    def begin_row(self) -> None:
        self._row_bytes = 0
