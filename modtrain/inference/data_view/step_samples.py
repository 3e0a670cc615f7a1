"""Which samples an optimizer step of a run read, and which documents.

They follow from the run's configuration and from what its roll backs left out, and are the same
whatever processes trained the step.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from modtrain.common.errors import ConfigError, Problem
from modtrain.common.terminal import WIDE, Column, fitted_table, plain_console
from modtrain.data.documents.table import DocumentTable
from modtrain.data.prepare.tokenizer import parse_tokenizer
from modtrain.data.stream.datamodule import TokenDataModule
from modtrain.distributed.process_group import ONE_PROCESS
from modtrain.inference.data_view.config import DataViewConfig
from modtrain.inference.data_view.sample_documents import SampleDocument, sample_documents
from modtrain.training.named_runs import open_run
from modtrain.training.plan import derive
from modtrain.training.run_directory import RunDirectory
from modtrain.training.spikes.journal import SpikeJournal
from modtrain.training.trained_model import with_found_data

# Characters of a document in a line of the table.
_LINE_CHARS = 60


@dataclass(frozen=True)
class Sample:
    """One sample of a step.

    position: in the run's stream, from 0. source: name of it in a mixture, else empty. number: in
    the source. shard, byte: path or URL of the file, and where its tokens begin there. tokens:
    S + 1 of them: inputs and the last target; -1 is padding. documents: that they are of, in order.
    """

    position: int
    source: str
    number: int
    shard: Path | str
    byte: int
    tokens: list[int]
    documents: list[SampleDocument]


def show_samples(config: DataViewConfig, console: Console | None = None) -> None:
    """Print the samples of a step that ``config`` asks for.

    Raises:
        ConfigError, CheckpointError, DataError: the run has no such step, or cannot be read.
    """
    run = open_run(config.runs_dir, str(config.run))
    samples = samples_of(run, config.step or 1, config.data_path)
    if config.format == "jsonl":
        for sample in samples:
            print(json.dumps(_plain(sample)))  # noqa: T201
        return
    console = console or data_console()
    if config.format == "text":
        for sample in samples:
            console.print("\n".join(_text_lines(sample, config.max_chars)), soft_wrap=True)
    else:
        console.print(_table(list(samples), config, console.width))


def data_console() -> Console:
    """A console as wide as the terminal, and wide enough for all columns elsewhere."""
    return plain_console(soft_wrap=True, width=None if sys.stdout.isatty() else WIDE)


def _plain(sample: Sample) -> dict[str, object]:
    values = {**asdict(sample), "shard": str(sample.shard)}
    if not sample.source:
        del values["source"]
    # They stand in the sample once already.
    for document in values["documents"]:
        document["num_read"] = len(document.pop("tokens"))
    return values


def _text_lines(sample: Sample, max_chars: int) -> Iterator[str]:
    source = f"{sample.source}, " if sample.source else ""
    place = f"{PurePosixPath(sample.shard).name}, byte {sample.byte:,}"
    yield f"═══ position {sample.position:,}: {source}sample {sample.number:,}, {place}"
    for document in sample.documents:
        yield f"─── {document.origin}, {document.extent}"
        yield document.shown_text(max_chars)


def _table(samples: list[Sample], config: DataViewConfig, width: int) -> Table:
    """A row for each document; a sample's place stands in the first of its rows."""
    columns = [
        Column("position", justify="right"),
        Column("source"),
        Column("sample", rank=1, justify="right"),
        Column("shard", rank=3),
        Column("byte", rank=4, justify="right"),
        Column("document", least=20),
        Column("tokens", rank=2),
        Column("text", least=16),
    ]
    rows = [row for sample in samples for row in _rows(sample, config.max_chars)]
    if not any(sample.source for sample in samples):
        del columns[1]
        rows = [[row[0], *row[2:]] for row in rows]
    table = fitted_table(columns, rows, width, f"step {config.step}")
    if any(document.file is None for sample in samples for document in sample.documents):
        table.caption = "an earlier version prepared the data: where documents came from is unknown"
    return table


def _rows(sample: Sample, max_chars: int) -> Iterator[list[str]]:
    place = [f"{sample.number:,}", PurePosixPath(sample.shard).name, f"{sample.byte:,}"]
    first = [f"{sample.position:,}", sample.source, *place]
    for document in sample.documents:
        text = document.shown_text(min(_LINE_CHARS, max_chars))
        yield [*first, document.origin, document.extent, " ".join(text.split())]
        first = [""] * len(first)


def samples_of(run: RunDirectory, step: int, data_path: str | None = None) -> Iterator[Sample]:
    """Return the samples of an optimizer step, which counts from 1, in the order of the stream.

    data_path: where the data were moved to; None: they are where they were.

    Raises:
        ConfigError: the run has fewer steps.
        CheckpointError: the run cannot be read.
        DataError: the data are missing, damaged, or not those that the run was trained on.
    """
    trained = with_found_data(run, run.read_config(), data_path)
    plan = derive(trained)
    if step > plan.steps:
        reason = f"is behind the run's last step, {plan.steps}"
        raise ConfigError([Problem("step", step, reason, "give one that the run has")])
    data = TokenDataModule(
        trained.data,
        micro_batch_size=plan.sequences_per_step,
        accumulate=1,
        num_steps=plan.steps,
        eval_batch_size=1,
    )
    num_samples = plan.steps * plan.sequences_per_step
    data.skipped_samples = SpikeJournal(run, ONE_PROCESS, num_samples).skipped_samples
    end_id, tokenizer = data.summary.eos_id, decoder_of(trained.data.tokenizer_path)
    tables = {name: DocumentTable.open(index, "train") for name, index in data.indexes.items()}
    for position, number in data.stream_of(step - 1):
        shard, byte = data.train_data.locate(number)
        source, own = data.train_data.source_of(number)
        tokens = data.train_data[number].tolist()
        pieces = data.train_data.document_pieces(number)
        documents = sample_documents(tokens, pieces, tables[source], tokenizer, end_id)
        yield Sample(position, source, own, shard, byte, tokens, documents)


def decoder_of(path: Path) -> Tokenizer:
    """The tokenizer of a prepared directory."""
    return parse_tokenizer(path.read_bytes(), str(path))
