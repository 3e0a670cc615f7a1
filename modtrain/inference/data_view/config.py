"""Configuration of `modtrain data`. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

from modtrain.common.errors import Problem
from modtrain.common.validation import above_zero, at_least, key_of, one_of
from modtrain.data.remote.urls import url_problems
from modtrain.inference.text_io import output_problems

FORMATS = ("table", "text", "jsonl")


@dataclass
class DataViewConfig:
    """Prepared data to look at, or what a step of a run read of them.

    path: directory that ``modtrain prepare`` wrote.
    run: a run's name below ``runs_dir``, in place of ``path``: all that it reads, mixtures too.
    runs_dir: where runs live.
    step: an optimizer step of ``run``, as in its metrics, the first one is 1: only what it read.
    data_path: where the run's prepared data were moved to; null: they are where they were.
    format: ``table``; ``text``: of a step, the whole text of each sample, its documents marked;
        ``jsonl``: a line of JSON for each sample with all of its tokens, or for each split.
    max_chars: characters of each document's text that are shown at most.
    samples: samples of the train split of each source that are shown, evenly spread over it.
    max_tokens: tokens of each split that are read to count the vocabulary's use, evenly spread.
    output: HTML file to write instead of printing.
    """

    path: str | None = None
    run: str | None = None
    runs_dir: str = "runs"
    step: int | None = None
    data_path: str | None = None
    format: str = "table"
    max_chars: int = 2000
    samples: int = 3
    max_tokens: float = 1e9
    output: str | None = None

    def problems(self, prefix: str = "") -> list[Problem]:
        """Everything wrong with the request that can be checked without the data."""
        problems = [
            *at_least(self, prefix, 1, "step", "max_chars"),
            *at_least(self, prefix, 0, "samples"),
            *above_zero(self, prefix, "max_tokens"),
            *one_of(self, prefix, "format", FORMATS),
            *url_problems(self, prefix, *(n for n in ("path", "data_path") if getattr(self, n))),
            *output_problems(self.output),
        ]
        if (self.path is None) == (self.run is None):
            given = "null" if self.path is None else f"{self.path}, and run={self.run}"
            reason = "names nothing to look at" if self.path is None else "are two things"
            remedy = "give run=my_run, or path=... of prepared data"
            problems.append(Problem(key_of(prefix, "path"), given, reason, remedy))
        of_run = {"step": self.step, "data_path": self.data_path}
        for name, value in of_run.items():
            if self.run is None and value is not None:
                reason, remedy = "is of a run, and none is given", "add run=my_run, or leave it out"
                problems.append(Problem(key_of(prefix, name), value, reason, remedy))
        if self.step is None and self.format == "text":
            reason, remedy = "is for the samples of a step", "add step=1, or leave it out"
            problems.append(Problem(key_of(prefix, "format"), self.format, reason, remedy))
        if self.step is not None and self.output is not None:
            reason = "is a page on all data, and a step is given"
            remedy = "leave one of them out; format=text prints a step's whole text"
            problems.append(Problem(key_of(prefix, "output"), self.output, reason, remedy))
        return problems
