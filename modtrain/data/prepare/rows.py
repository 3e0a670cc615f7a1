"""Documents of tables, a row each: Parquet, and Arrow as ``datasets`` writes it.

A table is read a few rows at a time, and no page or batch that would take more memory than a
document may, once decompressed, is read at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from mmap import ACCESS_READ, mmap
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
from pyarrow import parquet

from modtrain.data.prepare.arrow_messages import messages, stream_start
from modtrain.data.prepare.arrow_values import record_of, value_of
from modtrain.data.prepare.check import DocumentCheck
from modtrain.data.prepare.flaws import Flaw
from modtrain.data.prepare.parquet_pages import check_footer, chunk_pages
from modtrain.data.prepare.sources import SourceFile
from modtrain.data.prepare.storage import local_copy, open_anywhere
from modtrain.data.prepare.text_field import TextField, columns_of

_BATCH_ROWS = 256
_BUFFER_BYTES = 1 << 20
# What an item of a list takes: its place, its number in the dictionary, and whether it is there.
_ITEM_BYTES = 8
# Pages and batches hold many rows: they may have so many bytes, whatever a document may have.
_MIN_LIMIT_BYTES = 1 << 26
_ERRORS = (OSError, ValueError, OverflowError, MemoryError, pa.ArrowException)


class RowGroup(NamedTuple):
    """num_bytes: of all columns, decompressed."""

    num_rows: int
    num_bytes: int


def row_groups(file: SourceFile, field: TextField) -> list[RowGroup] | None:
    """Return the row groups of a Parquet file; None where it is damaged.

    Raises DataError where it has no column that the text comes from.
    """
    try:
        with open_anywhere(file.path) as source:
            check_footer(source, file.size)
            source.seek(0)
            footer = parquet.ParquetFile(source)
            columns_of(file.path, footer.schema_arrow.names, field)
            groups = [footer.metadata.row_group(i) for i in range(footer.num_row_groups)]
            return [RowGroup(group.num_rows, group.total_byte_size) for group in groups]
    except _ERRORS:
        return None


def parquet_documents(
    file: SourceFile, groups: range, row: int, check: DocumentCheck
) -> Iterator[str | Flaw]:
    """Yield the document of each row of some row groups. row: number of rows before them."""
    path, limit = file.path, max(check.max_bytes, _MIN_LIMIT_BYTES)
    try:
        with open_anywhere(path) as source, _opened(source, file.size) as table:
            columns = columns_of(path, table.schema_arrow.names, check.field)
            for group in groups:
                page, num_items = _sizes(source, table, group, columns)
                if page > limit or num_items * _ITEM_BYTES > limit:
                    what = f"row group {group} is left out: a page has {page:,} bytes, more"
                    if page <= limit:
                        what = f"row group {group} is left out: its lists have {num_items:,} items"
                        what += f", at {_ITEM_BYTES} bytes more"
                    yield check.too_large(path, row + 1, what, limit)
                    row += table.metadata.row_group(group).num_rows
                    continue
                # A row may lie on a page of its own, or stand for one of the dictionary;
                # decoding takes its bytes a few times.
                size = min(_BATCH_ROWS, max(1, limit // 4 // max(1, page)))
                for batch in table.iter_batches(size, [group], columns=columns):
                    for document in _documents(batch, path, row, check):
                        row += 1
                        yield document
    except _ERRORS as error:
        yield Flaw("damaged", path, row + 1, f"not parquet, or cut short: {error}")


def _opened(source: BinaryIO, size: int) -> Any:
    """Return the table of a file of so many bytes."""
    check_footer(source, size)
    source.seek(0)
    footer = parquet.read_metadata(source)
    # Each item of a list may be one that stands in the file once: it stays a number.
    leaves = [footer.schema.column(number) for number in range(footer.num_columns)]
    texts = [leaf.path for leaf in leaves if _is_list(leaf) and leaf.physical_type == "BYTE_ARRAY"]
    return parquet.ParquetFile(
        source,
        metadata=footer,
        read_dictionary=texts,
        buffer_size=_BUFFER_BYTES,
        pre_buffer=False,
    )


def _is_list(leaf: Any) -> bool:
    return bool(leaf.max_repetition_level)


def _sizes(source: BinaryIO, table: Any, group: int, columns: list[str]) -> tuple[int, int]:
    """Return the bytes of the largest page of some columns, and the most items of their lists."""
    metadata = table.metadata.row_group(group)
    largest = num_items = 0
    for number in range(metadata.num_columns):
        chunk = metadata.column(number)
        if {chunk.path_in_schema, chunk.path_in_schema.partition(".")[0]} & {*columns}:
            pages = chunk_pages(source, chunk)
            largest = max(largest, pages.largest)
            if _is_list(table.schema.column(number)):
                num_items = max(num_items, pages.num_values)
    return largest, num_items


def arrow_documents(path: str, check: DocumentCheck) -> Iterator[str | Flaw]:
    """Yield the document of each row of an Arrow stream or file, compressed or not."""
    row, limit = 0, max(check.max_bytes, _MIN_LIMIT_BYTES)
    try:
        with local_copy(path) as local, local.open("rb") as file:
            with mmap(file.fileno(), 0, access=ACCESS_READ) as data:
                sizes, start = messages(data), stream_start(data)
            with pa.memory_map(str(local)) as source:
                source.seek(start)
                # A dictionary is read with the first rows after it.
                if any(not message.is_rows and message.size > limit for message in sizes):
                    yield check.too_large(path, 1, "a dictionary is larger", limit)
                    return
                reader = pa.ipc.open_stream(source)
                columns = columns_of(path, reader.schema.names, check.field)
                for message in sizes:
                    if not message.is_rows:
                        continue
                    if message.size > limit:
                        what = (
                            f"the rest is left out: its next rows take {message.size:,} bytes, more"
                        )
                        yield check.too_large(path, row + 1, what)
                        return
                    batch = reader.read_next_batch().select(columns)
                    yield from _checked(batch, path, row, check)
                    row += batch.num_rows
                if next(iter(reader), None) is not None:
                    raise ValueError("its messages are damaged")
    except StopIteration:
        yield Flaw("damaged", path, row + 1, "the Arrow file is cut short")
    except _ERRORS as error:
        yield Flaw("damaged", path, row + 1, f"not Arrow, or cut short: {error}")


def _checked(batch: Any, path: str, row: int, check: DocumentCheck) -> Iterator[str | Flaw]:
    try:
        # Nothing else looks whether offsets lie inside the data.
        batch.validate(full=True)
    except pa.ArrowException as error:
        detail = f"rows {row + 1} to {row + batch.num_rows} are left out: {error}"
        yield Flaw("damaged", path, row + 1, detail)
        return
    yield from _documents(batch, path, row, check)


def _documents(batch: Any, path: str, row: int, check: DocumentCheck) -> Iterator[str | Flaw]:
    """Yield one document or flaw a row. row: number of rows before the batch."""
    is_whole = check.field.template is None and batch.schema.names == [check.field.column]
    for number in range(batch.num_rows):
        row += 1
        try:
            if is_whole:
                yield check.of_text(value_of(batch.column(0)[number]), path, row)
                continue
            record = record_of(batch, number, check.field.names)
        except UnicodeDecodeError as error:
            yield Flaw("invalid_utf8", path, row, f"not UTF-8: {error.reason}")
            continue
        yield check.of_record(record, path, row)
