"""Configuration of the data layer. Imports nothing heavy: checks run before torch is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from modtrain.common.errors import DataError, Problem
from modtrain.common.validation import (
    above_zero,
    at_least,
    key_of,
    no_addresses,
    not_empty,
    one_of,
)
from modtrain.data.mixture.config import (
    WHEN_EXHAUSTED,
    MixtureStageConfig,
    SourceConfig,
    mixture_problems,
)
from modtrain.data.mixture.schedule import MixtureSchedule, make_schedule
from modtrain.data.mixture.summary import combined_summary
from modtrain.data.packing.summary import BEST_FIT
from modtrain.data.prepare.text_field import TextField
from modtrain.data.remote.urls import DEFAULT_TIMEOUT, is_url, url_problems, without_secrets
from modtrain.data.stream.index import tokenizer_file
from modtrain.data.stream.index_json import read_summary
from modtrain.data.stream.prepared import TOKENIZER_NAME, IndexSummary

VERIFY_LEVELS = ("size", "sha256", "none")
ERROR_POLICIES = ("skip", "stop", "limit")
DEFAULT_MAX_FLAWS = 100
TOKEN_DTYPES = ("uint16", "uint32", "int32", "int64")
DEFAULT_TOKEN_COLUMN = "tokens"  # noqa: S105
SPLIT_AT = ("document", "line")
PACKINGS = ("concatenate", BEST_FIT)
_TASK = re.compile(r"slurm|\d{1,9}/\d{1,9}")
# The 256 bytes and the end-of-document token: a byte-level vocabulary cannot be smaller.
SMALLEST_VOCAB = 257


@dataclass
class DataConfig:
    """Which prepared directory is read, or which mixture of several, and how.

    path: directory that ``modtrain prepare`` wrote, or its URL, such as ``s3://bucket/data``; empty
        where ``sources`` are given.
    seq_len: tokens a sample is trained on; null takes that of the shards, else it must divide it.
    seed: seed of the order of the samples.
    shuffle: whether the samples come in a pseudo-random order, a new one each epoch.
    num_workers: processes that read ahead; 0 reads in the training process.
    prefetch_factor: batches that each worker reads ahead.
    verify: what is checked of the shards before training: ``size``, ``sha256`` or ``none``. Behind
        a URL ``size`` looks at each shard when it is first read, and what comes whole is compared
        with its SHA-256; ``sha256`` fetches all shards first.
    cache_dir: directory on the node's disk for shards from a URL; null: in ``SLURM_TMPDIR``, or
        where TMPDIR says.
    cache_bytes: bytes of shards kept there at most; null: half of what the disk has free; 0: none.
    fetch_timeout: seconds for a request to a server, after which it is made again.
    document_mask: neither attention nor the choice of tokens crosses documents.
    eos_id: the token that ends a document, for ``document_mask``; null takes that of the shards.
    sources: several of them by name, each with ``path``, ``weight`` (1: as any other) and
        ``max_epochs`` (null: no limit); ``data=mixture`` goes with it.
    stages: other weights from a point of the run on, each with ``begin`` (share of the run's
        tokens) or ``tokens``, and ``weights`` by source. A run that resumes may have other stages
        from where it is.
    when_exhausted: what happens where a source's ``max_epochs`` do not suffice: ``error`` before
        the start; ``redistribute``: its weight goes to the other sources.
    """

    path: str = ""
    seq_len: int | None = None
    seed: int = 0
    shuffle: bool = True
    num_workers: int = 0
    prefetch_factor: int = 4
    verify: str = "size"
    cache_dir: str | None = None
    cache_bytes: float | None = None
    fetch_timeout: float = DEFAULT_TIMEOUT
    document_mask: bool = False
    eos_id: int | None = None
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    stages: list[MixtureStageConfig] = field(default_factory=list)
    when_exhausted: str = "error"

    def problems(self, prefix: str) -> list[Problem]:
        """Everything wrong with this configuration that can be seen without the shards."""
        problems = [
            *at_least(self, prefix, 0, "seed", "num_workers", "eos_id"),
            *at_least(self, prefix, 1, "prefetch_factor", "seq_len"),
            *one_of(self, prefix, "verify", VERIFY_LEVELS),
            *url_problems(self, prefix, "path"),
            *above_zero(self, prefix, "fetch_timeout"),
            *at_least(self, prefix, 0, "cache_bytes"),
            *no_addresses(self, prefix, "cache_dir"),
            *one_of(self, prefix, "when_exhausted", WHEN_EXHAUSTED),
            *mixture_problems(prefix, self.sources, self.stages),
        ]
        if self.path and self.sources:
            reason = f"is given, and {key_of(prefix, 'sources')} too"
            remedy = "add data=mixture, or leave the sources out"
            problems.append(Problem(key_of(prefix, "path"), self.path, reason, remedy))
        if self.eos_id is not None and not self.document_mask:
            key, mask = key_of(prefix, "eos_id"), key_of(prefix, "document_mask")
            reason, remedy = f"has no use without {mask}", f"set {mask}=true, or leave it null"
            problems.append(Problem(key, self.eos_id, reason, remedy))
        return problems

    def shard_problems(self, prefix: str) -> list[Problem]:
        """What does not fit the shards, which may be missing. Reads each ``index.json``."""
        if not self.path and not self.sources:
            reason = f"is empty, and there are no {key_of(prefix, 'sources')}"
            remedy = "name a directory that modtrain prepare wrote, or several sources"
            return [Problem(key_of(prefix, "path"), "", reason, remedy)]
        summaries, problems = {}, []
        for name, path in self.paths.items():
            try:
                summaries[name] = read_summary(path)
            except DataError as error:
                key = key_of(prefix, f"sources.{name}.path" if name else "path")
                remedy = f"give {key} a directory that modtrain prepare wrote"
                if is_url(path):
                    remedy += "; look at the address, and at the server's credentials"
                problems.append(Problem(key, path, str(error), remedy))
        if problems:
            return problems
        try:
            stored = self.summary_of(summaries)
        except DataError as error:
            remedy = "prepare them again with the same tokenizer"
            return [Problem(key_of(prefix, "sources"), ", ".join(self.paths), str(error), remedy)]
        if self.eos_id is not None and self.eos_id != stored.eos_id:
            reason = f"does not end the documents of these shards, {stored.eos_id} does"
            remedy = f"set it to {stored.eos_id}, or leave it null"
            problems.append(Problem(key_of(prefix, "eos_id"), self.eos_id, reason, remedy))
        key, seq_len = key_of(prefix, "seq_len"), self.seq_len or stored.seq_len
        if seq_len < 1:
            return problems
        problems += seq_len_problems(key, seq_len, stored.seq_len)
        return problems + packed_len_problems(key, seq_len, summaries)

    @property
    def paths(self) -> dict[str, str]:
        """The directories that are read, by source; of one alone the name is empty."""
        if not self.sources:
            return {"": self.path}
        return {name: self.sources[name].path for name in sorted(self.sources)}

    @property
    def location(self) -> str:
        """The directories, for a message."""
        return ", ".join(self.paths.values())

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer of the data, which all sources share; one behind a URL is fetched.

        Raises DataError where it does not come.
        """
        return tokenizer_file(self._first_path)

    @property
    def tokenizer_location(self) -> str:
        """The path or the URL of the tokenizer, for a message."""
        return f"{self._first_path.rstrip('/')}/{TOKENIZER_NAME}"

    @property
    def _first_path(self) -> str:
        return next(iter(self.paths.values()))

    def summary(self) -> IndexSummary:
        """Read the summary of everything that is read, of all sources together.

        Raises DataError where one is missing or damaged, or their tokenizers differ.
        """
        return self.summary_of({name: read_summary(path) for name, path in self.paths.items()})

    def summary_of(self, summaries: Mapping[str, IndexSummary]) -> IndexSummary:
        """The summary of all sources together, from those of each, which are read already."""
        return combined_summary(summaries) if self.sources else summaries[""]

    def schedule(
        self, num_samples: Mapping[str, int], run_samples: int, seq_len: int
    ) -> MixtureSchedule:
        """Plan the segments of the mixture; arguments and errors as of `make_schedule`."""
        return make_schedule(
            self.sources, self.stages, self.when_exhausted, num_samples, run_samples, seq_len
        )


def seq_len_problems(key: str, seq_len: int, stored: int) -> list[Problem]:
    """What is wrong with reading samples of ``seq_len`` from shards of ``stored`` tokens."""
    if stored % seq_len == 0:
        return []
    divisors = [n for n in range(min(seq_len, stored), 0, -1) if stored % n == 0]
    how = "is larger than" if seq_len > stored else "does not divide"
    remedy = f"{key}={divisors[0]}, or prepare the data again with seq_len={seq_len}"
    return [Problem(key, seq_len, f"{how} the shards' sequence length {stored}", remedy)]


def packed_len_problems(
    key: str, seq_len: int, summaries: Mapping[str, IndexSummary]
) -> list[Problem]:
    """What is wrong with samples of ``seq_len`` from sources, some of which are packed by best fit.

    Half a packed sequence could be nothing but padding, and would cut documents.
    """
    return [
        Problem(
            key,
            seq_len,
            f"is not {summary.seq_len}, for which packing={BEST_FIT} put the documents"
            f"{f' of {name}' if name else ''} together",
            f"{key}={summary.seq_len}, or prepare them again with seq_len={seq_len}",
        )
        for name, summary in summaries.items()
        if summary.packing is not None and summary.seq_len != seq_len
    ]


@dataclass
class TokenizerConfig:
    """The tokenizer of a prepared directory.

    path: a ``tokenizer.json`` to use, a SentencePiece model, a file of tiktoken's ranks, or a
        Hugging Face folder with one of them; null trains a byte-level BPE on the corpus.
    vocab_size: tokens of the trained vocabulary, the end-of-document token included.
    train_bytes: bytes of text that it is trained on at most, spread over the whole corpus.
    end_token: the token of ``path`` that ends a document; null: one with a usual name, such as
        ``<|endoftext|>``, else the one that ``tokenizer_config.json`` and the like beside it name.
    encoding: of a file of ranks: one of tiktoken's names, such as ``cl100k_base``, or a JSON file
        with ``pat_str`` and ``special_tokens``; null: as the file is named.
    """

    path: str | None = None
    vocab_size: int = 4096
    train_bytes: int = 50_000_000
    end_token: str | None = None
    encoding: str | None = None

    def problems(self, prefix: str) -> list[Problem]:
        """Everything wrong with this configuration, with keys below ``prefix``."""
        problems = []
        for name in ("end_token", "encoding"):
            if getattr(self, name) is not None and self.path is None:
                reason = "is for a tokenizer that you have"
                remedy = f"add {prefix}.path, or leave it out"
                problems.append(Problem(f"{prefix}.{name}", getattr(self, name), reason, remedy))
        return [
            *problems,
            *no_addresses(self, prefix, "path"),
            *at_least(self, prefix, SMALLEST_VOCAB, "vocab_size"),
            *at_least(self, prefix, 1, "train_bytes"),
        ]


def template_problems(template: str | None, column: str) -> list[Problem]:
    """What is wrong with a template of several fields, beside the column that it replaces."""
    if template is None:
        return []
    problems = []
    try:
        TextField(column, template)
    except ValueError as error:
        remedy = r"write names in braces: 'text_template=\"{title}\\n{body}\"'"
        problems.append(Problem("text_template", template, str(error), remedy))
    if column != PrepareConfig.text_column:
        reason, remedy = "is given, and text_template too", "give one of the two"
        problems.append(Problem("text_column", column, reason, remedy))
    return problems


def _output_problems(output: str) -> list[Problem]:
    """What is wrong with where prepared data are written to."""
    if not is_url(output):
        return []
    shown = without_secrets(output)
    reason = "is an address, and prepare writes to a disk"
    name = shown.rstrip("/").rpartition("/")[2]
    remedy = f"write output=data/{name}, and copy it there"
    if output.startswith("s3://"):
        remedy += f": aws s3 cp --recursive data/{name} {shown}"
    return [Problem("output", shown, reason, remedy)]


@dataclass
class PrepareConfig:
    r"""A corpus, and the shards to make of it.

    sources: files, globs (``**`` recurses) or ``package:NAME/glob`` for files inside an installed
        Python package, addresses of any driver of fsspec, such as ``s3://bucket/*.parquet``, or
        ``pipe:COMMAND``, which runs a command that prints a tar archive.
        Known are .txt (one file, one document), .jsonl, .csv and .tsv, WebDataset .tar (a sample,
        a document), each also with .gz, .zst, .bz2 or .xz, .parquet, .arrow and .feather, and
        folders that ``datasets`` saved. Token numbers: .bin with .idx (Megatron), .bin and .npy
        (nanoGPT, llm.c, OLMo), and the folders of MosaicML and LitData, all with
        ``tokenizer.path``.
    output: directory to write.
    text_column: key or column that holds a document's text, or a path to it, such as
        ``messages.0.content``.
    text_template: a document's text out of several fields, such as ``{title}\n{body}``, in place of
        ``text_column``; a brace itself is written twice.
    token_dtype: of token numbers in files that do not tell it; null takes the smallest that the
        vocabulary fits in, and 64 bits for bytes in MosaicML's shards.
    token_column: column that holds the token numbers in MosaicML's shards.
    tokenizer: which tokenizer.
    seq_len: tokens a stored sequence is trained on; it holds one more, the last target.
    packing: ``concatenate`` lays all documents end to end and cuts sequences. ``best_fit`` puts
        whole documents together, cuts only those longer than a sequence, and fills up with padding,
        which is neither trained on nor routed.
    sequences_per_sample: sequences stored in one sample of a tar shard.
    samples_per_shard: samples in one tar shard.
    separator: text that ends a document inside a .txt file, such as ``<|endoftext|>``, or a blank
        line, written ``\n\n``; it is left out. null: a file is one document.
    valid_fraction: share of the text that is held out.
    split_at: ``document``: whole documents are held out, chosen by a hash of seed and text.
        ``line``: the end of each document, from a line on: for one file, or few documents.
    on_error: ``skip`` counts and skips damaged input, ``stop`` raises at the first, ``limit`` where
        there are more than ``max_flaws``.
    max_flaws: pieces of damaged input that ``on_error=limit`` leaves out.
    max_document_bytes: a larger document, or line that holds one, is damaged input. Bounds the
        memory that a process needs.
    deduplicate: documents whose whole text stands in an earlier one, of any file, are left out and
        counted. A trained tokenizer still sees them.
    num_workers: processes; 0 takes every usable CPU, 1 works in this process.
    task: null: this command does everything. ``slurm``: it is one of the tasks of a Slurm step or
        job array, which share the work; ``1/3``: the second of three, however they are started.
    seed: seed of the choice of held-out documents.
    """

    sources: list[str] = field(default_factory=list)
    output: str = ""
    text_column: str = "text"
    text_template: str | None = None
    token_dtype: str | None = None
    token_column: str = DEFAULT_TOKEN_COLUMN
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    seq_len: int = 256
    packing: str = "concatenate"
    sequences_per_sample: int = 64
    samples_per_shard: int = 64
    separator: str | None = None
    valid_fraction: float = 0.05
    split_at: str = "document"
    on_error: str = "skip"
    max_flaws: int = DEFAULT_MAX_FLAWS
    max_document_bytes: int = 1 << 28
    deduplicate: bool = False
    num_workers: int = 0
    task: str | None = None
    seed: int = 0

    @property
    def separator_text(self) -> str | None:
        r"""The separator with line ends and tabs in the place of ``\n`` and ``\t``."""
        text = self.separator
        return None if text is None else text.replace("\\n", "\n").replace("\\t", "\t")

    def problems(self) -> list[Problem]:
        """Everything wrong with this configuration."""
        problems = [
            *not_empty(self, "", "sources", "name files: 'sources=[corpus/*.jsonl]'"),
            *_output_problems(self.output),
            *not_empty(self, "", "output", "name a directory: output=data/mine"),
            *not_empty(self, "", "text_column", "text_column=text is usual"),
            *not_empty(self, "", "token_column", "token_column=tokens is usual"),
            *self.tokenizer.problems("tokenizer"),
            *one_of(self, "", "on_error", ERROR_POLICIES),
            *one_of(self, "", "split_at", SPLIT_AT),
            *one_of(self, "", "packing", PACKINGS),
            *at_least(self, "", 1, "seq_len", "sequences_per_sample", "samples_per_shard"),
            *at_least(self, "", 1 << 10, "max_document_bytes"),
            *at_least(self, "", 0, "num_workers", "seed", "max_flaws"),
            *([] if self.token_dtype is None else one_of(self, "", "token_dtype", TOKEN_DTYPES)),
            *template_problems(self.text_template, self.text_column),
        ]
        if self.task is not None and not _TASK.fullmatch(self.task):
            reason, remedy = "is no task", "write task=slurm, or task=0/3, task=1/3 and task=2/3"
            problems.append(Problem("task", self.task, reason, remedy))
        if self.separator == "":
            reason, remedy = "is empty", "give a text, or null: a file is one document"
            problems.append(Problem("separator", "", reason, remedy))
        if not 0 < self.valid_fraction < 1:
            reason = "is not between 0 and 1, both excluded"
            problems.append(Problem("valid_fraction", self.valid_fraction, reason, "try 0.05"))
        return problems
