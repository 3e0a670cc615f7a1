"""Typed configuration of ``modtrain export``."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from modtrain.common.errors import Problem
from modtrain.common.validation import broken_rules, not_empty

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


def _package_problems() -> list[Problem]:
    remedy = "pip install 'modtrain[hf]'"
    try:
        version = metadata.version("transformers")
    except metadata.PackageNotFoundError:
        return [Problem("export", "", "needs the package transformers: it is missing", remedy)]
    if int(version.partition(".")[0]) < 5:
        return [Problem("export", "", f"needs transformers 5, and there is {version}", remedy)]
    return []
