"""From encoded documents to the shards of each split, packed in one way or the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from modtrain.data.config import PrepareConfig
from modtrain.data.prepare.deduplicate import EncodedUnits
from modtrain.data.prepare.encode import UnitRecord
from modtrain.data.prepare.pack import (
    PackLayout,
    TokenFile,
    finished_shard,
    plan_shards,
    write_shard,
)
from modtrain.data.prepare.packed_rows import PackedSplit, pack_splits, plan_row_shards
from modtrain.data.prepare.source_checks import refuse_unknown_ends
from modtrain.data.prepare.stored_tokenizer import StoredTokenizer
from modtrain.data.prepare.worker_pool import run_unfinished
from modtrain.data.stream.prepared import SPLITS, Shard, SplitSummary


def pack_documents(
    config: PrepareConfig, encoded: EncodedUnits, work: Path, progress: bool
) -> dict[str, PackedSplit]:
    """Pack the documents of each split by best fit.

    Raises ConfigError where the sources do not tell where documents end.
    """
    refuse_unknown_ends(config, encoded.records)
    tokens, documents = encoded.tokens, encoded.documents
    return pack_splits(
        tokens, documents, config.seq_len, work, config.num_workers, progress=progress
    )


def write_shards(
    config: PrepareConfig,
    tokens: Mapping[str, Sequence[TokenFile]],
    packed: Mapping[str, PackedSplit] | None,
    layout: PackLayout,
    tokenizer: StoredTokenizer,
    work: Path,
    progress: bool,
) -> dict[str, list[Shard]]:
    """Write the shards of each split, as one batch of jobs, by one set of workers.

    packed: None: the documents are laid end to end.
    """
    output, padding_id = Path(config.output), tokenizer.vocab_size
    jobs = {
        split: plan_shards(tokens[split], layout, output / split, work)
        if packed is None
        else plan_row_shards(
            packed[split], layout, output / split, work, tokenizer.dtype, padding_id
        )
        for split in SPLITS
    }
    all_jobs = [job for split in SPLITS for job in jobs[split]]
    sizes = [job.num_bytes for job in all_jobs]
    shards = run_unfinished(
        "writing shards", write_shard, finished_shard, all_jobs, sizes, config.num_workers, progress
    )
    num_train = len(jobs["train"])
    return {"train": shards[:num_train], "valid": shards[num_train:]}


def split_summary(
    records: Sequence[UnitRecord],
    split: str,
    layout: PackLayout,
    packed: Mapping[str, PackedSplit] | None,
) -> SplitSummary:
    """Count what a split has. packed: None: the documents are laid end to end."""
    counts = [record.splits[split] for record in records]
    num_tokens = sum(count.num_tokens for count in counts)
    num_sequences = layout.num_sequences(num_tokens)
    dropped_tokens = layout.dropped_tokens(num_tokens)
    if packed is not None:
        num_sequences, dropped_tokens = packed[split].num_rows, 0
    return SplitSummary(
        num_sequences=num_sequences,
        num_tokens=num_tokens,
        num_documents=sum(count.num_documents for count in counts),
        num_bytes=sum(count.num_bytes for count in counts),
        dropped_tokens=dropped_tokens,
    )
