"""Corpus → tokenizer, token shards and their index: parallel, resumable, the same to the byte.

The work is split into units that depend only on the corpus. Every file is written under a temporary
name and renamed, and ``index.json`` comes last. So the output does not depend on the number of
workers or on interruptions, and a directory without an index is never taken for complete.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modtrain.common.atomic_io import sync, write_json
from modtrain.common.errors import DataError, raise_if_any
from modtrain.data.config import PrepareConfig
from modtrain.data.packing.summary import BEST_FIT
from modtrain.data.prepare.deduplicate import EncodedUnits, without_repeats
from modtrain.data.prepare.documents import UnitDocuments, lines_before, write_side_files
from modtrain.data.prepare.encode import EncodeJob, encode_unit, finished_record
from modtrain.data.prepare.given_tokenizer import given_tokenizer
from modtrain.data.prepare.pack import PackLayout, TokenFile
from modtrain.data.prepare.packed_rows import write_packing_files
from modtrain.data.prepare.report import PrepareReport, flaw_counts, flaw_examples
from modtrain.data.prepare.request import REQUEST_NAME, TIMES, differing_keys, request_of
from modtrain.data.prepare.source_checks import (
    refuse_empty_split,
    refuse_many_flaws,
    refuse_misfits,
    tell_unknown_ends,
)
from modtrain.data.prepare.sources import expand_sources
from modtrain.data.prepare.splits import pack_documents, split_summary, write_shards
from modtrain.data.prepare.stored_tokenizer import StoredTokenizer, ensure_tokenizer, smallest_dtype
from modtrain.data.prepare.units import Unit, plan_units
from modtrain.data.prepare.work_directory import WORK_NAME, work_directory
from modtrain.data.prepare.worker_pool import run_unfinished
from modtrain.data.stream.index import ShardIndex
from modtrain.data.stream.index_json import index_content
from modtrain.data.stream.prepared import (
    INDEX_NAME,
    PACKING_FILES,
    SPLITS,
    IndexSummary,
    Shard,
    SideFile,
)

_log = logging.getLogger(__name__)


def prepare(config: PrepareConfig, progress: bool = True) -> PrepareReport:
    """Make the prepared directory that ``config`` describes, or resume a partial one.

    It does everything, whatever ``config.task`` is: `prepare_task` does the part of a task.

    progress: show a bar on a terminal, or log lines elsewhere.
    Raises ConfigError for a configuration that cannot work; DataError for a corpus that cannot be
    read, an output made of something else, and a split without a single sequence.
    """
    raise_if_any(config.problems())
    try:
        return _prepare(config, progress)
    except OSError as error:
        raise DataError(f"{error.filename or config.output}: {error.strerror or error}") from error


def _prepare(config: PrepareConfig, progress: bool) -> PrepareReport:
    output = Path(config.output)
    files = expand_sources(config.sources)
    refuse_misfits(config, files)
    given = given_tokenizer(config.tokenizer)
    request = request_of(config, files, given)
    if (output / INDEX_NAME).exists():
        return _report_of_finished(output, request)
    with work_directory(output) as work:
        if (output / INDEX_NAME).exists():
            # By another process, between the two looks.
            return _report_of_finished(output, request)
        units = plan_units(files, config.text_column, config.text_template)
        tokenizer = ensure_tokenizer(config, units, output, work, work / "staging", given)
        is_packed = config.packing == BEST_FIT
        layout = PackLayout(
            config.seq_len,
            config.sequences_per_sample,
            config.samples_per_shard,
            smallest_dtype(tokenizer.vocab_size + is_packed),
        )
        encoded = _encode(config, units, tokenizer, work=work, progress=progress)
        # Before repeats are counted: they are no damage.
        refuse_many_flaws(config, units, encoded.records)
        if config.deduplicate:
            encoded = without_repeats(
                encoded, tokenizer.dtype, work, config.num_workers, progress=progress
            )
        records = encoded.records
        packed = pack_documents(config, encoded, work, progress) if is_packed else None
        splits = {split: split_summary(records, split, layout, packed) for split in SPLITS}
        flaws = flaw_counts(records)
        tell_unknown_ends(records)
        has_tokens = any(file.has_tokens for file in files)
        examples = flaw_examples(units, records)
        refuse_empty_split(splits, examples, flaws, config, has_tokens=has_tokens)
        shards = write_shards(config, encoded.tokens, packed, layout, tokenizer, work, progress)
        summary = IndexSummary(
            seq_len=config.seq_len,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            dtype=tokenizer.dtype,
            tokenizer_sha256=tokenizer.sha256,
            fingerprint="",
            num_files=len(files),
            flaws=flaws,
            splits=splits,
            end_token=None if given is None else given.end_token,
            packing=None if packed is None else {s: packed[s].packing for s in SPLITS},
        )
        sides = write_side_files(output, files, encoded.documents, work / "staging")
        sides |= write_packing_files(output, packed or {}, work / "staging")
        write_json(output / REQUEST_NAME, request, work / "staging")
        finish(output, summary, shards, work / "staging", sides)
    # Only now that the lock in it is closed: on NFS an open file would keep the folder.
    # What a process that starts now makes in it may be left, and is removed by the next one.
    shutil.rmtree(work, ignore_errors=True)
    summary = ShardIndex.load(output).summary
    return PrepareReport(output, summary, False, examples)


def finish(
    output: Path,
    summary: IndexSummary,
    shards: dict[str, list[Shard]],
    staging: Path,
    side_files: dict[str, SideFile] | None = None,
) -> None:
    """Write ``index.json``, which makes the directory ``output`` whole."""
    for split in SPLITS:
        names = {shard.name for shard in shards[split]}
        for path in (output / split).glob("shard-*.tar"):
            # Left by an interrupted run with other options.
            if path.name not in names:
                path.unlink()
        sync(output / split)
    for name in set(PACKING_FILES).difference(side_files or {}):
        (output / name).unlink(missing_ok=True)
    sync(output)
    write_json(output / INDEX_NAME, index_content(summary, shards, side_files), staging)


def _report_of_finished(output: Path, request: dict[str, Any]) -> PrepareReport:
    keys = differing_keys(output, request)
    if keys == [TIMES]:
        # A corpus copied or installed anew has new times and the same text.
        _log.warning(
            "the sources have other modification times, but equal names and sizes: taken as equal"
        )
    elif keys:
        raise DataError(
            f"{output} has data that was prepared with other options: {', '.join(keys)} differ "
            f"(contents: names and sizes of the sources). "
            f"Choose another output, or remove {output} to prepare it again."
        )
    summary = ShardIndex.load(output).summary
    # Left if a run was killed between its last two steps.
    shutil.rmtree(output / WORK_NAME, ignore_errors=True)
    return PrepareReport(output, summary, was_complete=True)


def encode_jobs(
    config: PrepareConfig,
    units: Sequence[Unit],
    tokenizer: StoredTokenizer,
    work: Path,
    staging: Path,
) -> list[EncodeJob]:
    """The job of each unit."""
    return [
        EncodeJob(
            unit=unit,
            work=str(work),
            staging=str(staging),
            tokenizer=str(tokenizer.path),
            tokenizer_sha256=tokenizer.sha256,
            eos_id=tokenizer.eos_id,
            dtype=tokenizer.dtype,
            text_column=config.text_column,
            valid_fraction=config.valid_fraction,
            seed=config.seed,
            on_error=config.on_error,
            max_document_bytes=config.max_document_bytes,
            separator=config.separator_text,
            split_at=config.split_at,
            text_template=config.text_template,
            max_flaws=config.max_flaws,
            token_dtype=config.token_dtype,
            token_column=config.token_column,
        )
        for unit in units
    ]


def _encode(
    config: PrepareConfig,
    units: Sequence[Unit],
    tokenizer: StoredTokenizer,
    *,
    work: Path,
    progress: bool,
) -> EncodedUnits:
    jobs = encode_jobs(config, units, tokenizer, work, work / "staging")
    sizes = [unit.num_bytes for unit in units]
    records = run_unfinished(
        "encoding", encode_unit, finished_record, jobs, sizes, config.num_workers, progress
    )
    tokens = {
        split: [
            TokenFile(str(job.token_file(split)), record.splits[split].num_tokens, job.key)
            for job, record in zip(jobs, records, strict=True)
        ]
        for split in SPLITS
    }
    before = lines_before(units, records)
    documents = {
        split: [
            UnitDocuments(str(job.document_file(split)), count.num_tokens, job.unit.files, lines)
            for job, count, lines in zip(
                jobs, (r.splits[split] for r in records), before, strict=True
            )
        ]
        for split in SPLITS
    }
    return EncodedUnits(records, tokens, documents)
