"""Configuration of an inspection."""

from __future__ import annotations

from dataclasses import dataclass, field

from modtrain.common.errors import Problem
from modtrain.common.validation import at_least, key_of
from modtrain.inference.config import ComputeBudgetConfig, TrainedRunConfig
from modtrain.inference.text_io import file_problems, output_problems, text_problems


@dataclass
class InspectConfig(TrainedRunConfig):
    """What a run's routers are shown, and where the page goes.

    text: a text to show the model, as it is; without ``text`` and ``file``, held-out text.
    file: a UTF-8 text file instead, ``-`` for standard input.
    sequences: held-out sequences; null takes all.
    batch_size: windows computed at a time.
    inference: the decision and how much is computed. As decision ``top_k`` is for models that look
        ahead, and the page then says that it is not causal.
    output: the page; null is ``inspect-<step>….html`` in the run's directory.
    tokens_shown: how many of the tokens are shown one by one; the statistics are of all.
    """

    text: str | None = None
    file: str | None = None
    sequences: int | None = 16
    batch_size: int = 4
    inference: ComputeBudgetConfig = field(default_factory=ComputeBudgetConfig)
    output: str | None = None
    tokens_shown: int = 2000

    def problems(self, prefix: str = "") -> list[Problem]:
        """Everything wrong with the settings."""
        return [
            *super().problems(prefix),
            *at_least(self, prefix, 1, "sequences", "batch_size", "tokens_shown"),
            *self.inference.problems(key_of(prefix, "inference")),
            *self._text_problems(prefix),
            *output_problems(self, prefix),
        ]

    def _text_problems(self, prefix: str) -> list[Problem]:
        if self.text is not None and self.file is not None:
            reason = f"cannot be combined with {key_of(prefix, 'text')}"
            return [Problem(key_of(prefix, "file"), self.file, reason, "leave one of them out")]
        if self.text == "":
            reason = "is empty"
            return [Problem(key_of(prefix, "text"), "''", reason, "give some text, or null")]
        return [*text_problems(self, prefix, "text"), *file_problems(self, prefix, "file")]
