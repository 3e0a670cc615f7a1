"""Typed configurations of ``modtrain export`` and ``modtrain import``."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from modtrain.common.errors import Problem
from modtrain.common.validation import at_least, broken_rules, not_empty
from modtrain.training.config import directory_problems

_SIZE = re.compile(r"[1-9]\d*(KB|MB|GB)")


@dataclass
class ExportConfig:
    """Which run becomes a Hugging Face folder, and where.

    run: the run's name below ``runs_dir``.
    runs_dir: directory of the runs.
    step: step of the checkpoint; null: the newest.
    data_path: where the run's prepared data were moved to; null: they are where they were.
    output: the folder to write; absent or empty.
    max_shard_size: of a safetensors file, such as ``500MB``; a larger model gets several.
    """

    run: str | None = None
    runs_dir: str = "runs"
    step: int | None = None
    data_path: str | None = None
    output: str | None = None
    max_shard_size: str = "5GB"

    def problems(self) -> list[Problem]:
        """Everything wrong with the request, the missing package included."""
        return [
            *not_empty(self, "", "run", "add run=my_run"),
            *not_empty(self, "", "output", "add output=my_model"),
            *self._output_problems(),
            *broken_rules(
                self,
                "",
                (
                    _SIZE.fullmatch(self.max_shard_size) is None,
                    "max_shard_size",
                    "is not a size",
                    "give a whole number of KB, MB or GB, such as 5GB",
                ),
            ),
            *_package_problems(),
        ]

    def _output_problems(self) -> list[Problem]:
        path = Path(self.output or "")
        if not self.output or not os.path.lexists(path):
            return []
        if path.is_symlink() or not path.is_dir():
            reason = "is there, and is not a folder"
        elif any(path.iterdir()):
            reason = "is a folder with files in it, and nothing is overwritten"
        else:
            return []
        return [Problem("output", self.output, reason, "give another name, or remove it first")]


@dataclass
class ImportConfig:
    """Which model of others becomes a run.

    source: a Hugging Face folder with safetensors, or a GGUF file.
    name: of the run, below ``runs_dir``.
    runs_dir: directory of the runs.
    tokenizer: a ``tokenizer.json`` in place of the model's own; null: its own.
    seq_len: tokens of a sequence in an evaluation; null: the longest text of the model, 2048 at
        most.
    """

    source: str | None = None
    name: str | None = None
    runs_dir: str = "runs"
    tokenizer: str | None = None
    seq_len: int | None = None

    def problems(self) -> list[Problem]:
        """Everything wrong with the request, missing packages included."""
        return [
            *not_empty(self, "", "source", "add source=FOLDER, or a GGUF file"),
            *not_empty(self, "", "name", "add name=my_run"),
            *at_least(self, "", 1, "seq_len"),
            *self._path_problems(),
            *_package_problems("import"),
        ]

    def _path_problems(self) -> list[Problem]:
        problems = []
        if self.source and not (Path(self.source).is_dir() or Path(self.source).is_file()):
            reason, remedy = (
                "is neither a folder nor a file",
                "download the model, and give its path",
            )
            problems.append(Problem("source", self.source, reason, remedy))
        if self.tokenizer is not None and not Path(self.tokenizer).is_file():
            remedy = "give a tokenizer.json"
            problems.append(Problem("tokenizer", self.tokenizer, "is no file", remedy))
        if self.name:
            problems += directory_problems("name", self.name)
            run = Path(self.runs_dir, self.name)
            if os.path.lexists(run):
                reason = f"is taken: there is {run}, and no run is overwritten"
                problems.append(Problem("name", self.name, reason, "give another name"))
        return problems


def _package_problems(verb: str = "export") -> list[Problem]:
    remedy = "pip install 'modtrain[hf]'"
    try:
        version = metadata.version("transformers")
    except metadata.PackageNotFoundError:
        return [Problem(verb, "", "needs the package transformers: it is missing", remedy)]
    if int(version.partition(".")[0]) < 5:
        return [Problem(verb, "", f"needs transformers 5, and there is {version}", remedy)]
    return []
