"""Typed configuration of generation."""

from __future__ import annotations

from dataclasses import dataclass, field

from modtrain.common.errors import Problem
from modtrain.common.validation import at_least, key_of, shares
from modtrain.inference.config import ComputeBudgetConfig, TrainedRunConfig
from modtrain.inference.generate.sampling_config import SamplingConfig
from modtrain.inference.prompt_source import file_problems, output_problems, text_problems


@dataclass
class SpeculateConfig:
    """Self-speculation: the model at a low capacity drafts, the model itself verifies.

    tokens: how many tokens are drafted at once; null: none.
    capacity: of the routers while they draft, calibrated as ``inference.capacity`` is; 0 leaves
        every routed part out.
    """

    tokens: int | None = None
    capacity: float = 0.0

    def problems(self, prefix: str = "") -> list[Problem]:
        """Everything wrong with the settings."""
        found = [*at_least(self, prefix, 1, "tokens"), *shares(self, prefix, "capacity")]
        if self.capacity and self.tokens is None:
            reason, remedy = "has no use without drafts", f"set {key_of(prefix, 'tokens')}"
            found.append(Problem(key_of(prefix, "capacity"), self.capacity, reason, remedy))
        return found


@dataclass
class GenerateConfig(TrainedRunConfig):
    """What a run is to continue, and how.

    prompt: the text to continue; without ``prompt``, ``file`` and ``input`` a document from its
        beginning.
    file: a file that holds the prompt, ``-`` for standard input.
    input: a file of JSON lines with a ``prompt`` each, ``-`` for standard input.
    output: the file to write; null: standard output.
    samples: continuations of each prompt.
    max_tokens: tokens of each continuation at most.
    stop: texts that end a continuation, which they are left out of.
    batch_size: sequences that run at once.
    prefill_chunk: tokens of a prompt that run at once.
    echo: begin with the prompt.
    show_depth: colour or mark each token by the number of routed parts that it entered.
    """

    prompt: str | None = None
    file: str | None = None
    input: str | None = None
    output: str | None = None
    samples: int = 1
    max_tokens: int = 256
    stop: list[str] = field(default_factory=list)
    batch_size: int = 8
    prefill_chunk: int = 2048
    echo: bool = False
    show_depth: bool = False
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    inference: ComputeBudgetConfig = field(default_factory=ComputeBudgetConfig)
    speculate: SpeculateConfig = field(default_factory=SpeculateConfig)

    def problems(self, prefix: str = "") -> list[Problem]:
        """Everything wrong with the request."""
        found = [
            *super().problems(prefix),
            *at_least(self, prefix, 1, "samples", "max_tokens", "batch_size", "prefill_chunk"),
            *self.sampling.problems(key_of(prefix, "sampling")),
            *self.inference.problems(key_of(prefix, "inference")),
            *self.speculate.problems(key_of(prefix, "speculate")),
        ]
        if "" in self.stop:
            reason, remedy = "holds an empty text, which would stop everything", "leave it out"
            found.append(Problem(key_of(prefix, "stop"), self.stop, reason, remedy))
        return found + self._source_problems(prefix)

    def _source_problems(self, prefix: str) -> list[Problem]:
        named = [name for name in ("prompt", "file", "input") if getattr(self, name) is not None]
        found = [
            Problem(key_of(prefix, name), getattr(self, name), reason, "give one of them")
            for reason in (f"stands beside {' and '.join(named)}",)
            for name in named[1:]
        ]
        return [
            *found,
            *text_problems(self, prefix, "prompt"),
            *file_problems(self, prefix, "file", "input"),
            *output_problems(self, prefix),
        ]
