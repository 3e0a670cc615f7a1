"""Documents whose whole text stands in an earlier one, taken out of the units' tokens.

The first in the order of the sources stays. Which ones go depends on the texts and their order
alone, not on units or workers.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from modtrain.common.atomic_io import atomic_writer, digest, write_json
from modtrain.common.reading import UnreadableError, read_json
from modtrain.data.documents.record import UNIT_RECORD, Records
from modtrain.data.documents.table import find_repeats
from modtrain.data.prepare.documents import UnitDocuments
from modtrain.data.prepare.encode import SplitCounts, UnitRecord
from modtrain.data.prepare.pack import TokenFile
from modtrain.data.prepare.worker_pool import run_unfinished
from modtrain.data.stream.prepared import ITEM_SIZES, SPLITS


@dataclass(frozen=True)
class EncodedUnits:
    """What came of the units, in their order; tokens and documents by split."""

    records: list[UnitRecord]
    tokens: dict[str, list[TokenFile]]
    documents: dict[str, list[UnitDocuments]]


def without_repeats(
    encoded: EncodedUnits, dtype: str, work: Path, num_workers: int, *, progress: bool
) -> EncodedUnits:
    """What is left without the documents whose text stands in an earlier one."""
    records = [replace(r, splits=dict(r.splits), flaws=dict(r.flaws)) for r in encoded.records]
    tokens = {split: list(files) for split, files in encoded.tokens.items()}
    documents = {split: list(units) for split, units in encoded.documents.items()}
    jobs = {split: drop_jobs(tokens[split], documents[split], dtype, work) for split in SPLITS}
    for record, of_unit in zip(records, zip(*jobs.values(), strict=True), strict=True):
        if count := num_dropped(of_unit):
            record.flaws["repeated"] = count
    places = [(s, n) for s in SPLITS for n, job in enumerate(jobs[s]) if job is not None]
    all_jobs = [job for split in SPLITS for job in jobs[split] if job is not None]
    sizes = [ITEM_SIZES[dtype] * job.tokens.num_tokens for job in all_jobs]
    left = run_unfinished(
        "dropping repeats", drop_documents, finished_drop, all_jobs, sizes, num_workers, progress
    )
    for (split, number), job, counts in zip(places, all_jobs, left, strict=True):
        records[number].splits[split] = counts
        tokens[split][number] = TokenFile(str(job.file("bin")), counts.num_tokens, job.key)
        documents[split][number] = replace(
            job.documents, path=str(job.file("documents")), num_tokens=counts.num_tokens
        )
    return EncodedUnits(records, tokens, documents)


@dataclass(frozen=True)
class DropJob:
    """The documents that one unit loses of a split.

    dropped: a bit for each of its documents, packed. work: the working directory, with ``units/``
    and ``staging/``.
    """

    tokens: TokenFile
    documents: UnitDocuments
    dropped: bytes
    dtype: str
    work: str

    @property
    def key(self) -> str:
        """Stands for what is left."""
        return digest([self.tokens.key, hashlib.sha256(self.dropped).hexdigest()])[:32]

    def file(self, suffix: str) -> Path:
        """One of the files of what is left, beside those of the whole unit."""
        split = Path(self.tokens.path).name.split(".")[1]
        return Path(self.work) / "units" / f"{self.key}.{split}.{suffix}"


def drop_jobs(
    tokens: Sequence[TokenFile], documents: Sequence[UnitDocuments], dtype: str, work: Path
) -> list[DropJob | None]:
    """For each unit of a split, in their order, what it loses; None: nothing."""
    jobs: list[DropJob | None] = []
    counts = [unit.num_documents for unit in documents]
    repeats = find_repeats(counts, lambda number: documents[number].records()["hash"])
    for file, unit, dropped in zip(tokens, documents, repeats, strict=True):
        packed = np.packbits(dropped).tobytes()
        jobs.append(DropJob(file, unit, packed, dtype, str(work)) if dropped.any() else None)
    return jobs


def finished_drop(job: DropJob) -> SplitCounts | None:
    """What an earlier run left of the unit, None if it has to be done."""
    if not all(job.file(suffix).exists() for suffix in ("json", "bin", "documents")):
        return None
    try:
        return SplitCounts(**read_json(job.file("json")))
    except (UnreadableError, TypeError):
        # Damaged: it is done again.
        return None


def drop_documents(job: DropJob) -> SplitCounts:
    """Write tokens and documents of what is left of a unit, and then its counts."""
    records = job.documents.records()
    is_kept = ~_dropped(job, records)
    edges = np.append(records["start"].astype(np.int64), job.tokens.num_tokens)
    lengths = edges[1:] - edges[:-1]
    staging, dtype = Path(job.work) / "staging", np.dtype(job.dtype).newbyteorder("<")
    kept = np.array(records[is_kept], dtype=UNIT_RECORD)
    kept["start"] = np.cumsum(lengths[is_kept]) - lengths[is_kept]
    tokens = np.memmap(job.tokens.path, dtype, "r", shape=(job.tokens.num_tokens,))
    turns = np.flatnonzero(np.diff(is_kept.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
    with atomic_writer(job.file("bin"), staging) as file:
        for first, stop in turns.tolist():
            file.write(tokens[edges[first] : edges[stop]].data)
    with atomic_writer(job.file("documents"), staging) as file:
        file.write(kept.tobytes())
    num_tokens = int(lengths[is_kept].sum())
    counts = SplitCounts(num_tokens, len(kept), int(kept["num_bytes"].sum()))
    write_json(job.file("json"), asdict(counts), staging)
    return counts


def num_dropped(jobs: Sequence[DropJob | None]) -> int:
    """How many documents a unit loses: those that are in several splits count once.

    jobs: of the unit, one a split.
    """
    most: Counter[bytes] = Counter()
    for job in jobs:
        if job is not None:
            records = job.documents.records()
            own = records[_dropped(job, records)]
            columns = (own["line"], own["file"].astype(np.uint64), own["hash"])
            # Of two counts the larger one: parts of a document have its line and its hash.
            most |= Counter(row.tobytes() for row in np.column_stack(columns))
    return most.total()


def _dropped(job: DropJob, records: Records) -> np.ndarray:
    bits = np.frombuffer(job.dropped, np.uint8)
    return np.unpackbits(bits, count=len(records)).astype(np.bool_)
