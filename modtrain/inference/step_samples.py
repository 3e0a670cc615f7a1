"""`modtrain data`: which samples an optimizer step of a run read.

They follow from the run's configuration and from what its roll backs left out, and are the same
whatever processes trained the step.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from rich.console import Console
from rich.table import Column, Table

from modtrain.common.errors import ConfigError, Problem, raise_if_any
from modtrain.common.terminal import plain_console
from modtrain.data.stream.datamodule import TokenDataModule
from modtrain.distributed.process_group import ONE_PROCESS
from modtrain.inference.config import StepSamplesConfig
from modtrain.inference.token_text import Vocabulary
from modtrain.training.named_runs import open_run
from modtrain.training.plan import derive
from modtrain.training.run_directory import RunDirectory
from modtrain.training.spikes.journal import SpikeJournal
from modtrain.training.trained_model import with_found_data

_SHOWN_TOKENS = 24


@dataclass(frozen=True)
class Sample:
    """One sample of a step.

    position: in the run's stream, from 0. source: name of it in a mixture, else empty. number: in
    the source. shard, byte: path or URL of the file, and where its tokens begin there. tokens:
    S + 1 of them: inputs and the last target.
    """

    position: int
    source: str
    number: int
    shard: Path | str
    byte: int
    tokens: list[int]


def show_samples(config: StepSamplesConfig, console: Console | None = None) -> None:
    """Print the samples that ``config`` asks for.

    Raises:
        ConfigError, CheckpointError, DataError: the run has no such step, or cannot be read.
    """
    raise_if_any(config.problems())
    run = open_run(config.runs_dir, str(config.run))
    trained = with_found_data(run, run.read_config(), config.data_path)
    samples = samples_of(run, config.step or 1, config.data_path)
    if config.format == "jsonl":
        for sample in samples:
            values = {**vars(sample), "shard": str(sample.shard)}
            if not sample.source:
                del values["source"]
            print(json.dumps(values))  # noqa: T201
        return
    tokenizer = trained.data.tokenizer_path
    decoder = Vocabulary(tokenizer.read_bytes(), str(tokenizer)).tokenizer
    headings = ("position", "sample", "byte")
    columns = [Column(heading, justify="right") for heading in headings]
    sources = ["source"] if trained.data.sources else []
    table = Table(columns[0], *sources, columns[1], "shard", columns[2], "text")
    table.title = f"step {config.step}"
    for sample in samples:
        text = decoder.decode(sample.tokens[:_SHOWN_TOKENS], skip_special_tokens=False)
        source = [sample.source] if sources else []
        place = (f"{sample.number:,}", PurePosixPath(sample.shard).name, f"{sample.byte:,}")
        table.add_row(f"{sample.position:,}", *source, *place, " ".join(text.split()))
    (console or plain_console(soft_wrap=True)).print(table)


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
    data.skipped_samples = SpikeJournal(run, ONE_PROCESS).skipped_samples
    for position, number in data.stream_of(step - 1):
        shard, byte = data.train_data.locate(number)
        source, own = data.train_data.source_of(number)
        yield Sample(position, source, own, shard, byte, data.train_data[number].tolist())
