"""Configuration of an evaluation on tasks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from modtrain.common.errors import Problem
from modtrain.common.validation import at_least, key_of, no_addresses


@dataclass
class TaskConfig:
    """How a run is evaluated on tasks.

    path: folder of lm-eval tasks, YAML files, whose names ``tasks`` may have.
    limit: examples of each task, the first ones; null: all.
    num_fewshot: solved examples before each question; null: as the task says, or none.
    chat: put each question into the model's chat template, as what a user says; of an imported
        model.
    num_examples: examples of a task that modtrain makes: copy, lookup, addition, parity.
    seed: of these examples, and of the choice of solved ones, which is that of lm-eval's command.
    allow_code: run Python that the tasks of ``path`` name by ``!function``, load their metrics and
        data by whatever module they name, and run what they generate where they say so. Only for a
        folder whose every file you have read.
    """

    path: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    chat: bool = False
    num_examples: int = 200
    seed: int = 1234
    allow_code: bool = False

    def problems(self, prefix: str = "task") -> list[Problem]:
        """Everything wrong with the settings."""
        problems = [
            *at_least(self, prefix, 1, "limit", "num_examples"),
            *at_least(self, prefix, 0, "num_fewshot", "seed"),
            *no_addresses(self, prefix, "path"),
        ]
        if self.path is not None and not problems and not Path(self.path).is_dir():
            reason, remedy = "is no folder", "give a folder with the YAML files of lm-eval tasks"
            problems.append(Problem(key_of(prefix, "path"), self.path, reason, remedy))
        if self.allow_code and self.path is None:
            reason, remedy = "has no effect without a folder of tasks", "set task.path"
            problems.append(Problem(key_of(prefix, "allow_code"), True, reason, remedy))
        return problems
