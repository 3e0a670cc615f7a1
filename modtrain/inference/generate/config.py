"""Configuration of generation: prompts, sampling, self-speculation."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from modtrain.common.errors import Problem
from modtrain.common.validation import above_zero, at_least, key_of, shares
from modtrain.inference.config import ComputeBudgetConfig, TrainedRunConfig
from modtrain.inference.text_io import file_problems, output_problems, text_problems


@dataclass
class SamplingConfig:
    """How a next token is sampled; the settings apply in this order.

    The conventions are those of Hugging Face's ``generate``.

    repetition_penalty: logits of tokens that occur in the text are divided by it if positive,
        multiplied if negative (arXiv 1909.05858, section 4.1); 1: none.
    greedy: take the most likely token; the settings below have no effect then.
    temperature: divisor of the logits.
    top_k: only tokens whose logit is not below the k-th largest; null: all.
    top_p: the fewest tokens, most likely first, whose probabilities sum to this much
        (arXiv 1904.09751); null: all.
    min_p: only tokens with at least this share of the largest probability (arXiv 2407.01082);
        null: all.
    seed: of the random numbers; any integer.
    """

    repetition_penalty: float = 1.0
    greedy: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0

    def problems(self, prefix: str = "") -> list[Problem]:
        """Everything wrong with the settings."""
        problems = [
            *above_zero(self, prefix, "repetition_penalty"),
            *at_least(self, prefix, 1, "top_k"),
            *(shares(self, prefix, "min_p") if self.min_p is not None else []),
        ]
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            greedy = key_of(prefix, "greedy")
            remedy = f"give a positive number, or {greedy}=true for the most likely token"
            key = key_of(prefix, "temperature")
            problems.append(Problem(key, self.temperature, "is not above 0", remedy))
        if self.top_p is not None and not 0 < self.top_p <= 1:
            key, remedy = (key_of(prefix, "top_p"), "give a number above 0, up to 1, or null")
            problems.append(Problem(key, self.top_p, "is not in (0, 1]", remedy))
        return problems


@dataclass
class SpeculateConfig:
    """Self-speculation: the model at a low capacity drafts, the full model verifies.

    tokens: number of tokens to draft at once; null: none.
    capacity: of the routers when drafting, calibrated like ``inference.capacity``; 0 skips every
        routed part.
    """

    tokens: int | None = None
    capacity: float = 0.0

    def problems(self, prefix: str = "") -> list[Problem]:
        """Everything wrong with the settings."""
        problems = [*at_least(self, prefix, 1, "tokens"), *shares(self, prefix, "capacity")]
        if self.capacity and self.tokens is None:
            reason, remedy = "has no effect without drafts", f"set {key_of(prefix, 'tokens')}"
            problems.append(Problem(key_of(prefix, "capacity"), self.capacity, reason, remedy))
        return problems


@dataclass
class GenerateConfig(TrainedRunConfig):
    """Prompts to continue with a trained run, and how.

    prompt: the text to continue; without ``prompt``, ``file`` and ``input`` a new document begins.
    file: a file with the prompt, ``-`` for standard input.
    input: a file of JSON lines with a ``prompt`` each, ``-`` for standard input.
    output: the file to write; null: standard output.
    samples: number of continuations of each prompt.
    max_tokens: maximum number of tokens of each continuation.
    stop: strings that end a continuation, and are left out of it.
    batch_size: number of sequences to run at once.
    prefill_chunk: number of tokens of a prompt to run at once.
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
        """Everything wrong with the settings."""
        problems = [
            *super().problems(prefix),
            *at_least(self, prefix, 1, "samples", "max_tokens", "batch_size", "prefill_chunk"),
            *self.sampling.problems(key_of(prefix, "sampling")),
            *self.inference.problems(key_of(prefix, "inference")),
            *self.speculate.problems(key_of(prefix, "speculate")),
        ]
        if "" in self.stop:
            reason, remedy = "has an empty string, which would stop everything", "leave it out"
            problems.append(Problem(key_of(prefix, "stop"), self.stop, reason, remedy))
        return problems + self._source_problems(prefix)

    def _source_problems(self, prefix: str) -> list[Problem]:
        given = [name for name in ("prompt", "file", "input") if getattr(self, name) is not None]
        reason = f"cannot be combined: {' and '.join(given)} are given"
        problems = [
            Problem(key_of(prefix, name), getattr(self, name), reason, "give one of them")
            for name in given[1:]
        ]
        return [
            *problems,
            *text_problems(self, prefix, "prompt"),
            *file_problems(self, prefix, "file", "input"),
            *output_problems(self, prefix),
        ]
