"""What is in prepared data, as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter, StrMethodFormatter

from modtrain.common.page_template import page_template
from modtrain.inference.data_view.statistics import (
    Lengths,
    SplitStatistics,
    Statistics,
    length_quantiles,
)
from modtrain.inference.inspect.figures import Drawing, Theme, drawing, themes

_TEMPLATE = "page.html.jinja"
_BINS = 30
# Points of the curve of frequencies, which may have as many as the vocabulary.
_POINTS = 200


@dataclass(frozen=True)
class Subject:
    """What is looked at: its name for people, and what all of its sources share.

    unused: some of the num_unused tokens that never occur, as printable text. packing: what is to
    be said of each split whose documents are packed.
    """

    name: str
    seq_len: int
    vocab_size: int
    num_files: int
    unused: list[str]
    num_unused: int
    packing: list[str]


@dataclass(frozen=True)
class ShownSample:
    """A sample as text. documents: origin, extent and printable text of each."""

    source: str
    number: int
    documents: list[tuple[str, str, str]]

    @property
    def name(self) -> str:
        """The sample's name for people."""
        return f"{self.source + ', ' if self.source else ''}train, sample {self.number:,}"


def render(subject: Subject, statistics: Statistics, samples: Sequence[ShownSample]) -> str:
    """Return the page."""
    both = themes(1)
    trained = [split for split in statistics.splits if split.split == "train"]
    return page_template(Path(__file__).with_name(_TEMPLATE)).render(
        subject=subject,
        splits=statistics.splits,
        has_sources=any(split.source for split in statistics.splits),
        quantiles=[_quantiles(split.lengths) for split in statistics.splits],
        most_repeated=statistics.most_repeated,
        packing=subject.packing,
        is_whole=all(split.is_whole for split in statistics.splits),
        num_read=sum(split.num_read for split in statistics.splits),
        length_drawings=[
            _length_figure(split, split.lengths, both) for split in trained if split.lengths
        ],
        token_drawings=[_token_figure(split, both) for split in trained],
        samples=samples,
        themes=both,
    )


def _quantiles(lengths: Lengths | None) -> list[int]:
    return length_quantiles(lengths, (0.0, 0.1, 0.5, 0.9, 1.0)) if lengths else []


def _length_figure(split: SplitStatistics, lengths: Lengths, both: Sequence[Theme]) -> Drawing:
    """Histograms of the documents, and of the tokens in them, over the documents' lengths."""
    values, counts = lengths
    edges, documents, tokens = length_histogram(values, counts)

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        axes.stairs(documents, edges, fill=True, color=theme.line, label="of the documents")
        axes.stairs(tokens, edges, color=theme.text, lw=1.2, label="of the tokens")
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=7))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set(xlabel="tokens of a document", ylabel="share")
        axes.legend(frameon=False)

    least, median, most = length_quantiles(lengths, (0.0, 0.5, 1.0))
    title = f"Lengths of documents{_of(split)}"
    alt = f"{title}: {counts.sum():,} documents of {least:,} to {most:,} tokens, median {median:,}."
    return drawing(draw, both, title, alt)


def length_histogram(
    values: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges, evenly spaced in the logarithm, and the shares of documents and of tokens between."""
    low, high = float(values[0]), float(values[-1]) + 1
    edges = np.unique(np.round(np.geomspace(low, high, _BINS + 1)))
    edges[0], edges[-1] = low, high
    documents = np.histogram(values, edges, weights=counts)[0]
    tokens = np.histogram(values, edges, weights=counts * values)[0]
    return edges, documents / documents.sum(), tokens / tokens.sum()


def _token_figure(split: SplitStatistics, both: Sequence[Theme]) -> Drawing:
    """How often the tokens occur, the most frequent first."""
    occurring = np.sort(split.counts_V[split.counts_V > 0])[::-1]
    ranks = np.arange(1, len(occurring) + 1)
    chosen = np.unique(np.geomspace(1, len(occurring), _POINTS).astype(np.int64)) - 1

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        axes.plot(ranks[chosen], occurring[chosen], color=theme.line, lw=1.6)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set(xlabel="rank of the token", ylabel="occurrences")

    title = f"Use of the vocabulary{_of(split)}"
    unused = len(split.counts_V) - len(occurring)
    alt = (
        f"{title}: the most frequent token occurs {occurring[0]:,} times, the one in the middle"
        f" {occurring[len(occurring) // 2]:,} times; {unused:,} of {len(split.counts_V):,} never."
    )
    return drawing(draw, both, title, alt)


def _of(split: SplitStatistics) -> str:
    return f", {split.source}" if split.source else ""
