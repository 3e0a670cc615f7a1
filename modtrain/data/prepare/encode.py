"""From a unit of the corpus to its tokens on disk, one job of a worker."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from modtrain.common.atomic_io import atomic_writer, digest, write_json
from modtrain.common.errors import DataError
from modtrain.common.reading import UnreadableError, read_json
from modtrain.data.config import DEFAULT_MAX_FLAWS, DEFAULT_TOKEN_COLUMN
from modtrain.data.prepare.flaws import Flaw
from modtrain.data.prepare.lost_text import LostText
from modtrain.data.prepare.readers import UnitReader
from modtrain.data.prepare.request import without_later_options
from modtrain.data.prepare.sources import SourceFile
from modtrain.data.prepare.storage import open_source
from modtrain.data.prepare.tokenized.documents import TokenReader, Vocabulary
from modtrain.data.prepare.tokenizer import DocumentEncoder, SplitChooser
from modtrain.data.prepare.units import Unit
from modtrain.data.stream.index import SPLITS

# Documents are encoded together up to so many characters, which bounds the memory.
_BATCH_CHARS = 1_000_000
EXAMPLES_OF_A_KIND = 3
_COUNTED_BYTES = 1 << 20


@dataclass(frozen=True)
class EncodeJob:
    """A unit, and all that its tokens depend on.

    work: the working directory, with ``units/`` and ``staging/``.
    """

    unit: Unit
    work: str
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
        fields = without_later_options(asdict(self))
        where_it_happens = ("work", "tokenizer")
        return digest({k: v for k, v in fields.items() if k not in where_it_happens})[:32]

    def token_file(self, split: str) -> Path:
        """Where the tokens of a split are written."""
        return Path(self.work) / "units" / f"{self.key}.{split}.bin"

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
        """Note one flaw."""
        seen = self.flaws.get(flaw.kind, 0)
        self.flaws[flaw.kind] = seen + 1
        if seen < EXAMPLES_OF_A_KIND:
            self.examples.append(flaw)


def finished_record(job: EncodeJob) -> UnitRecord | None:
    """The record of a unit that an earlier run finished, None if it has to be done."""
    if not job.record_file.exists():
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
    """Write the tokens of a unit, a file a split, and then its record.

    Raises DataError at the first flaw with ``on_error=stop``, or if a file changes meanwhile.
    """
    staging = Path(job.work) / "staging"
    train, valid = (job.token_file(split) for split in SPLITS)
    with atomic_writer(train, staging) as train_file, atomic_writer(valid, staging) as valid_file:
        write = _copy_tokens if job.unit.files[0].has_tokens else _encode
        record = write(job, {"train": train_file, "valid": valid_file})
    for file in job.unit.files:
        if SourceFile.of(file.path) != file:
            raise DataError(f"{file.path}: changed while it was read. Run prepare again.")
    write_json(job.record_file, asdict(record), staging)
    return record


def _copy_tokens(job: EncodeJob, outputs: dict[str, BinaryIO]) -> UnitRecord:
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
        split = "valid" if chooser.is_valid(document.tokens.astype("<u4").tobytes()) else "train"
        outputs[split].write(document.tokens.astype(dtype).tobytes())
        if document.is_ended:
            outputs[split].write(np.array([job.eos_id], dtype).tobytes())
        counts = record.splits[split]
        counts.num_tokens += len(document.tokens) + document.is_ended
        counts.num_documents += 1
        counts.num_bytes += document.num_bytes
        record.num_open_ends += not document.is_ended
    return record


def _count(flaw: Flaw, record: UnitRecord, job: EncodeJob) -> None:
    """Note a flaw, or raise the DataError that ``on_error`` asks for."""
    if job.on_error == "stop":
        raise DataError(f"{in_file(flaw, job.unit)}. on_error=skip leaves it out.")
    record.count(flaw)
    if job.on_error == "limit" and record.num_flaws > job.max_flaws:
        raise DataError(too_many_flaws(in_file(flaw, job.unit), job.max_flaws))


def _encode(job: EncodeJob, outputs: dict[str, BinaryIO]) -> UnitRecord:
    encoder = DocumentEncoder.of_file(job.tokenizer, job.tokenizer_sha256)
    chooser = SplitChooser(job.seed, job.valid_fraction, job.split_at)
    record = UnitRecord()
    reader = UnitReader(
        job.unit, job.text_column, job.max_document_bytes, job.separator, job.text_template
    )
    for texts in _batches(reader, record, job, encoder.lost_text):
        parts = [part for text in texts for part in chooser.parts(text).items()]
        encoded = encoder.encode([text for _, text in parts])
        for (split, text), numbers in zip(parts, encoded, strict=True):
            if job.eos_id in numbers:
                raise DataError(
                    f"{job.unit.files[0].path}: has the end token {job.eos_id} of the tokenizer in"
                    " its text, where no document ends. Make it special in the tokenizer's"
                    " added_tokens, or give another tokenizer.path."
                )
            tokens = np.array([*numbers, job.eos_id], np.dtype(job.dtype).newbyteorder("<"))
            outputs[split].write(tokens.tobytes())
            counts = record.splits[split]
            counts.num_tokens += len(tokens)
            counts.num_documents += 1
            counts.num_bytes += len(text.encode())
    record.num_lines = reader.num_lines
    return record


def _batches(
    reader: UnitReader, record: UnitRecord, job: EncodeJob, lost_text: LostText
) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for read in reader:
        lost = "" if isinstance(read, Flaw) else lost_text.of(read)
        document = Flaw("lost_text", *reader.place, lost) if lost else read
        if isinstance(document, Flaw):
            _count(document, record, job)
            continue
        batch.append(document)
        size += len(document)
        if size >= _BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


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
        with open_source(flaw.path) as file:
            while left and (part := file.read(min(left, _COUNTED_BYTES))):
                before += part.count(b"\n")
                left -= len(part)
    return Flaw(flaw.kind, flaw.path, before + flaw.line, flaw.detail)
