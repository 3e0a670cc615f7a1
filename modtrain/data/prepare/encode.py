"""From a unit of the corpus to its tokens on disk, one job of a worker."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from modtrain.common.atomic_io import atomic_writer, digest, write_json
from modtrain.common.errors import DataError
from modtrain.common.reading import UnreadableError, read_json
from modtrain.data.config import DEFAULT_MAX_FLAWS, DEFAULT_TOKEN_COLUMN
from modtrain.data.documents.record import content_hash, packed_record, text_hash
from modtrain.data.prepare.flaws import Flaw
from modtrain.data.prepare.readers import UnitReader
from modtrain.data.prepare.request import without_later_options
from modtrain.data.prepare.sources import SourceFile
from modtrain.data.prepare.storage import open_source, shown_name
from modtrain.data.prepare.tokenized.documents import TokenReader, Vocabulary
from modtrain.data.prepare.tokenizer import DocumentEncoder, SplitChooser
from modtrain.data.prepare.units import Unit
from modtrain.data.stream.prepared import SPLITS

# Documents are encoded together up to so many characters, which bounds the memory.
_BATCH_CHARS = 1_000_000
EXAMPLES_OF_A_KIND = 3
# It may tell a name that stands in the file, of any length.
_LONGEST_DETAIL = 1000
_COUNTED_BYTES = 1 << 20


@dataclass(frozen=True)
class EncodeJob:
    """A unit, and all that its tokens depend on.

    work: the working directory, with ``units/``. staging: folder in it for temporary files.
    """

    unit: Unit
    work: str
    staging: str
    tokenizer: str
    tokenizer_sha256: str
    eos_id: int
    dtype: str
    text_column: str
    valid_fraction: float
    seed: int
    on_error: str
    max_document_bytes: int
    separator: str | None = None
    split_at: str = "document"
    text_template: str | None = None
    max_flaws: int = DEFAULT_MAX_FLAWS
    token_dtype: str | None = None
    token_column: str = DEFAULT_TOKEN_COLUMN

    @property
    def key(self) -> str:
        """Name of the unit's files: differs wherever the tokens might."""
        fields = without_later_options({**asdict(self), "unit": self.unit.identity})
        where_it_happens = ("work", "staging", "tokenizer")
        return digest({k: v for k, v in fields.items() if k not in where_it_happens})[:32]

    def token_file(self, split: str) -> Path:
        """Where the tokens of a split are written."""
        return Path(self.work) / "units" / f"{self.key}.{split}.bin"

    def document_file(self, split: str) -> Path:
        """Where the records of a split's documents are written; the unit's, and not yet merged."""
        return Path(self.work) / "units" / f"{self.key}.{split}.documents"

    @property
    def record_file(self) -> Path:
        """Where the unit's record is written, once its tokens are."""
        return Path(self.work) / "units" / f"{self.key}.json"


@dataclass
class SplitCounts:
    """What a unit gave to a split."""

    num_tokens: int = 0
    num_documents: int = 0
    num_bytes: int = 0


@dataclass
class UnitRecord:
    """What came of a unit.

    num_lines: lines read, with which the next unit of the same file numbers its own.
    flaws: kind → count. examples: the first few of each kind. num_open_ends: blocks of tokens of
    which it is not known where their document ends.
    """

    num_lines: int = 0
    splits: dict[str, SplitCounts] = field(
        default_factory=lambda: {split: SplitCounts() for split in SPLITS}
    )
    flaws: dict[str, int] = field(default_factory=dict)
    examples: list[Flaw] = field(default_factory=list)
    num_open_ends: int = 0

    @property
    def num_flaws(self) -> int:
        """Flaws of all kinds."""
        return sum(self.flaws.values())

    def count(self, flaw: Flaw) -> None:
        """Note one flaw. Its place is written to disk, and has no signature."""
        detail = flaw.detail[:_LONGEST_DETAIL]
        flaw = replace(flaw, path=shown_name(flaw.path), detail=detail)
        seen = self.flaws.get(flaw.kind, 0)
        self.flaws[flaw.kind] = seen + 1
        if seen < EXAMPLES_OF_A_KIND:
            self.examples.append(flaw)


def finished_record(job: EncodeJob) -> UnitRecord | None:
    """The record of a unit that an earlier run finished, None if it has to be done."""
    # An earlier version kept no records of the documents.
    if not all(path.exists() for path in (job.record_file, *map(job.document_file, SPLITS))):
        return None
    try:
        content = read_json(job.record_file)
        splits = {name: SplitCounts(**counts) for name, counts in content["splits"].items()}
        examples = [Flaw(**flaw) for flaw in content["examples"]]
        open_ends = content.get("num_open_ends", 0)
        return UnitRecord(content["num_lines"], splits, content["flaws"], examples, open_ends)
    except (UnreadableError, KeyError, TypeError, AttributeError):
        # Damaged: the unit is encoded again.
        return None


def encode_unit(job: EncodeJob) -> UnitRecord:
    """Write tokens and documents of a unit, two files a split, and then its record.

    Raises DataError at the first flaw with ``on_error=stop``, or if a file changes meanwhile.
    """
    staging = Path(job.staging)
    with ExitStack() as opened:
        outputs = {
            split: _Output(
                opened.enter_context(atomic_writer(job.token_file(split), staging)),
                opened.enter_context(atomic_writer(job.document_file(split), staging)),
            )
            for split in SPLITS
        }
        write = _copy_tokens if job.unit.files[0].has_tokens else _encode
        record = write(job, outputs)
    for file in job.unit.files:
        if SourceFile.of(file.path) != file:
            raise DataError(f"{file.shown}: changed while it was read. Run prepare again.")
    write_json(job.record_file, asdict(record), staging)
    return record


@dataclass(frozen=True)
class _Output:
    """The files of a split."""

    tokens: BinaryIO
    documents: BinaryIO


@dataclass(frozen=True)
class _Document:
    """A text and where it stands: path, and line as the unit counts it."""

    text: str
    place: tuple[str, int]


def _encode(job: EncodeJob, outputs: dict[str, _Output]) -> UnitRecord:
    encoder = DocumentEncoder.of_file(job.tokenizer, job.tokenizer_sha256)
    chooser = SplitChooser(job.seed, job.valid_fraction, job.split_at)
    record = UnitRecord()
    reader = UnitReader(
        job.unit, job.text_column, job.max_document_bytes, job.separator, job.text_template
    )
    files = {file.path: number for number, file in enumerate(job.unit.files)}
    for documents in _batches(reader, record, job):
        parts = [chooser.parts(document.text) for document in documents]
        encoded = encoder.encode_documents([list(by_split.values()) for by_split in parts])
        for document, by_split, numbers in zip(documents, parts, encoded, strict=True):
            if isinstance(numbers, str):
                _count(Flaw("lost_text", *document.place, numbers), record, job)
                continue
            path, line = document.place
            place = (line, files[path], text_hash(document.text))
            for (split, text), own in zip(by_split.items(), numbers, strict=True):
                _write(job, outputs[split], record.splits[split], (text, own), place)
    record.num_lines = reader.num_lines
    return record


def _copy_tokens(job: EncodeJob, outputs: dict[str, _Output]) -> UnitRecord:
    """Write the documents of a file that has tokens already."""
    chooser, record = SplitChooser(job.seed, job.valid_fraction), UnitRecord()
    (file,) = job.unit.files
    reader = TokenReader(
        file,
        Vocabulary.of_file(job.tokenizer, job.tokenizer_sha256, job.eos_id),
        default_dtype=job.dtype,
        dtype=job.token_dtype,
        column=job.token_column,
        max_bytes=job.max_document_bytes,
    )
    dtype = np.dtype(job.dtype).newbyteorder("<")
    for document in reader:
        if isinstance(document, Flaw):
            _count(document, record, job)
            continue
        content = document.tokens.astype("<u4").tobytes()
        split = "valid" if chooser.is_valid(content) else "train"
        output, counts = outputs[split], record.splits[split]
        output.tokens.write(document.tokens.astype(dtype).tobytes())
        if document.is_ended:
            output.tokens.write(np.array([job.eos_id], dtype).tobytes())
        place = (reader.number, 0, content_hash(content))
        output.documents.write(packed_record(counts.num_tokens, *place, document.num_bytes))
        counts.num_tokens += len(document.tokens) + document.is_ended
        counts.num_documents += 1
        counts.num_bytes += document.num_bytes
        record.num_open_ends += not document.is_ended
    return record


def _write(
    job: EncodeJob,
    output: _Output,
    counts: SplitCounts,
    part: tuple[str, list[int]],
    place: tuple[int, int, bytes],
) -> None:
    """Write the part of a document that is in one split: its text's numbers, and its record.

    place: of the whole document: line, number of its file, hash.
    """
    text, numbers = part
    if job.eos_id in numbers:
        raise DataError(
            f"{job.unit.files[0].shown}: has the end token {job.eos_id} of the tokenizer in"
            " its text, where no document ends. Make it special in the tokenizer's"
            " added_tokens, or give another tokenizer.path."
        )
    tokens = np.array([*numbers, job.eos_id], np.dtype(job.dtype).newbyteorder("<"))
    num_bytes = len(text.encode())
    output.tokens.write(tokens.tobytes())
    output.documents.write(packed_record(counts.num_tokens, *place, num_bytes))
    counts.num_tokens += len(tokens)
    counts.num_documents += 1
    counts.num_bytes += num_bytes


def _batches(reader: UnitReader, record: UnitRecord, job: EncodeJob) -> Iterator[list[_Document]]:
    batch: list[_Document] = []
    size = 0
    for content in reader:
        if isinstance(content, Flaw):
            if job.on_error == "stop" and batch:
                # A document before it may have the first flaw.
                yield batch
            _count(content, record, job)
            continue
        batch.append(_Document(content, reader.place))
        size += len(content)
        if size >= _BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _count(flaw: Flaw, record: UnitRecord, job: EncodeJob) -> None:
    """Note a flaw, or raise the DataError that ``on_error`` asks for."""
    if job.on_error == "stop":
        raise DataError(f"{in_file(flaw, job.unit)}. on_error=skip leaves it out.")
    record.count(flaw)
    if job.on_error == "limit" and record.num_flaws > job.max_flaws:
        raise DataError(too_many_flaws(in_file(flaw, job.unit), job.max_flaws))


def too_many_flaws(last: Flaw, max_flaws: int) -> str:
    """Return the message of a corpus with more flaws than ``on_error=limit`` allows."""
    return (
        f"more than max_flaws={max_flaws:,} documents have flaws; one of them: {last}."
        " Raise max_flaws, or on_error=skip leaves out whatever their number is."
    )


def in_file(flaw: Flaw, unit: Unit) -> Flaw:
    """A flaw with its line counted from the start of the file rather than of the unit."""
    before = 0
    if unit.kind == "jsonl" and unit.start:
        # The line that holds the byte before the range is not the unit's, but counts.
        before, left = 1, unit.start - 1
        with open_source(unit.files[0].path) as file:
            while left and (part := file.read(min(left, _COUNTED_BYTES))):
                before += part.count(b"\n")
                left -= len(part)
    return Flaw(flaw.kind, shown_name(flaw.path), before + flaw.line, flaw.detail)
