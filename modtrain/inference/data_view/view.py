"""`modtrain data`: what is in prepared data, and what a step of a run read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer

from modtrain.common.atomic_io import write_text
from modtrain.common.errors import raise_if_any
from modtrain.common.terminal import Column, fitted_table
from modtrain.data.config import DataConfig
from modtrain.data.documents.table import DocumentTable
from modtrain.data.mixture.stream import MixtureDataset, load_indexes, open_split
from modtrain.data.stream.dataset import TokenDataset
from modtrain.data.stream.index import ShardIndex
from modtrain.data.stream.prepared import SPLITS
from modtrain.inference.data_view.config import DataViewConfig
from modtrain.inference.data_view.page import ShownSample, Subject, render
from modtrain.inference.data_view.sample_documents import sample_documents
from modtrain.inference.data_view.statistics import (
    SplitStatistics,
    Statistics,
    length_quantiles,
    statistics_of,
    unused_tokens,
)
from modtrain.inference.data_view.step_samples import data_console, decoder_of, show_samples
from modtrain.inference.token_text import TokenTexts
from modtrain.training.named_runs import open_run
from modtrain.training.trained_model import with_found_data

# Of the vocabulary's tokens that never occur, those that are shown.
_UNUSED_SHOWN = 20
_QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)


def view_data(config: DataViewConfig, console: Console | None = None) -> None:
    """Print what ``config`` asks for, or write it as a page.

    Raises:
        ConfigError, CheckpointError, DataError: there is no such run, step or data, or they cannot
            be read.
    """
    raise_if_any(config.problems())
    if config.step is not None:
        show_samples(config, console)
        return
    data = _data_of(config)
    indexes = load_indexes(data)
    splits = {split: _by_source(data, indexes, split) for split in SPLITS}
    by_source = {name: {split: splits[split][name] for split in SPLITS} for name in indexes}
    statistics = statistics_of(indexes, by_source, int(config.max_tokens))
    if config.output is None and config.format == "jsonl":
        for of_split in statistics.splits:
            print(json.dumps(_plain(of_split)))  # noqa: T201
        return
    console = console or data_console()
    summary, tokenizer = data.summary(), decoder_of(data.tokenizer_path)
    subject = Subject(
        name=f"run {config.run}" if config.run else data.location,
        seq_len=next(iter(splits["train"].values())).seq_len,
        vocab_size=summary.vocab_size,
        num_files=summary.num_files,
        unused=_unused_text(statistics, tokenizer),
        num_unused=len(unused_tokens(statistics.splits)),
        packing=[
            line for name, index in indexes.items() for line in index.summary.packing_lines(name)
        ],
    )
    samples = list(_samples(indexes, splits["train"], tokenizer, config))
    if config.output is not None:
        write_text(Path(config.output), render(subject, statistics, samples))
        console.print(f"wrote {config.output}")
        return
    console.print(_table(subject, statistics, console.width))
    for line in _report_lines(subject, statistics, samples):
        console.print(Text(line))


def _data_of(config: DataViewConfig) -> DataConfig:
    if config.path is not None:
        return DataConfig(path=config.path)
    run = open_run(config.runs_dir, str(config.run))
    return with_found_data(run, run.read_config(), config.data_path).data


def _by_source(
    data: DataConfig, indexes: dict[str, ShardIndex], split: str
) -> dict[str, TokenDataset]:
    opened = open_split(data, indexes, split)
    if isinstance(opened, MixtureDataset):
        return dict(zip(opened.names, opened.sources, strict=True))
    return {"": opened}


def _samples(
    indexes: dict[str, ShardIndex],
    data: dict[str, TokenDataset],
    tokenizer: Tokenizer,
    config: DataViewConfig,
) -> Iterator[ShownSample]:
    """Some samples of the train split of each source, evenly spread."""
    for source, samples in data.items():
        table = DocumentTable.open(indexes[source], "train")
        count = min(config.samples, len(samples))
        for place in range(count):
            number = (2 * place + 1) * len(samples) // (2 * count)
            tokens, pieces = samples[number].tolist(), samples.document_pieces(number)
            end_id = indexes[source].summary.eos_id
            documents = sample_documents(tokens, pieces, table, tokenizer, end_id)
            shown = [(d.origin, d.extent, d.shown_text(config.max_chars)) for d in documents]
            yield ShownSample(source, number, shown)


def _unused_text(statistics: Statistics, tokenizer: Tokenizer) -> list[str]:
    numbers = unused_tokens(statistics.splits)[:_UNUSED_SHOWN].tolist()
    texts = TokenTexts(tokenizer)
    return [texts.pieces([number])[0].shown.strip("\n") for number in numbers]


def _plain(of_split: SplitStatistics) -> dict[str, object]:
    values: dict[str, object] = {"source": of_split.source, "split": of_split.split}
    values |= vars(of_split.summary)
    values["bytes_per_token"] = of_split.bytes_per_token
    if of_split.packing is not None:
        values |= vars(of_split.packing)
    values["num_repeats"] = of_split.num_repeats
    values["unused_tokens"] = unused_tokens([of_split]).tolist()
    values["num_read"] = of_split.num_read
    lengths = of_split.lengths
    quantiles = length_quantiles(lengths, _QUANTILES) if lengths else None
    names = [f"{share:g}" for share in _QUANTILES]
    values["length_quantiles"] = quantiles and dict(zip(names, quantiles, strict=True))
    return values


def _report_lines(
    subject: Subject, statistics: Statistics, samples: list[ShownSample]
) -> list[str]:
    lines = [f"{subject.num_unused:,} of {subject.vocab_size:,} tokens never occur"]
    if not all(split.is_whole for split in statistics.splits):
        num_read = sum(split.num_read for split in statistics.splits)
        lines[0] += f" in the {num_read:,} tokens that were read (max_tokens=…)"
    if subject.unused:
        more = " …" if subject.num_unused > len(subject.unused) else ""
        lines[0] += f": {'  '.join(subject.unused)}{more}"
    lines += subject.packing
    lines += [
        f"{repeated.num_documents:,} documents have the text of {repeated.origin}"
        for repeated in statistics.most_repeated
    ]
    for sample in samples:
        lines += ["", f"═══ {sample.name}"]
        for origin, extent, text in sample.documents:
            lines += [f"─── {origin}, {extent}", text]
    return lines


def _table(subject: Subject, statistics: Statistics, width: int) -> Table:
    title = (
        f"{subject.name}: {subject.num_files:,} files, vocabulary {subject.vocab_size:,},"
        f" sequences of {subject.seq_len:,} tokens"
    )
    columns = [
        Column("source"),
        Column("split"),
        Column("documents", justify="right"),
        Column("repeats", rank=1, justify="right"),
        Column("MB", rank=2, justify="right"),
        Column("tokens", justify="right"),
        Column("sequences", rank=4, justify="right"),
        Column("bytes/token", rank=1, justify="right"),
        Column("tokens a document: least", rank=5, justify="right"),
        *(Column(name, rank=3, justify="right") for name in ("10%", "median", "90%", "most")),
    ]
    rows = [_row(split) for split in statistics.splits]
    if not any(split.source for split in statistics.splits):
        columns, rows = columns[1:], [row[1:] for row in rows]
    return fitted_table(columns, rows, width, title)


def _row(split: SplitStatistics) -> list[str]:
    summary, repeats = split.summary, split.num_repeats
    lengths = length_quantiles(split.lengths, _QUANTILES) if split.lengths else None
    return [
        split.source,
        split.split,
        f"{summary.num_documents:,}",
        "unknown" if repeats is None else f"{repeats:,}",
        f"{summary.num_bytes / 1e6:,.1f}",
        f"{summary.num_tokens:,}",
        f"{summary.num_sequences:,}",
        f"{split.bytes_per_token:.2f}",
        *(f"{length:,}" for length in lengths or ()),
        *(["unknown"] * (0 if lengths else len(_QUANTILES))),
    ]
