"""From a budget to steps: what follows from the configuration, the model and the data.

Nothing here touches torch: `modtrain plan` and the checks before a run are quick.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from modtrain.data.index import IndexSummary, read_summary
from modtrain.errors import DataError, Problem, raise_if_any
from modtrain.models.flops import training_flops_per_token
from modtrain.training.config import TrainConfig


@dataclass(frozen=True)
class TrainingPlan:
    """The derived side of a run.

    seq_len: tokens a sequence. sequences_per_step: over all devices and accumulation.
    accumulate: micro-batches a step on each device. flops_per_token: executed, training.
    """

    seq_len: int
    sequences_per_step: int
    accumulate: int
    steps: int
    flops_per_token: float
    world_size: int = 1

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step learns from."""
        return self.sequences_per_step * self.seq_len

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return self.steps * self.tokens_per_step

    @property
    def flops_per_step(self) -> float:
        """Executed training FLOPs of one optimizer step."""
        return self.flops_per_token * self.tokens_per_step

    @property
    def flops(self) -> float:
        """Executed training FLOPs of the whole run."""
        return self.flops_per_step * self.steps


def resolve(config: TrainConfig, needs_data: bool = True) -> tuple[TrainConfig, TrainingPlan]:
    """Fill in what follows from the data, and derive the plan.

    Returns the configuration with ``model.vocab_size`` and ``data.seq_len`` set, and its plan.
    ``needs_data=False`` goes on without prepared data where the configuration says enough.

    Raises:
        ConfigError: everything that is wrong, at once.
    """
    found = config.problems(needs_name=needs_data)
    summary = _summary(config.data.path)
    if summary is not None or needs_data:
        found += config.data.shard_problems("data")
        if summary is None:
            raise_if_any(found)
    found += _vocabulary_problems(config, summary)
    seq_len, length_problems = _sequence_length(config, summary)
    found += length_problems
    if seq_len:
        found += _batch_problems(config, seq_len)
    raise_if_any(found)
    vocab_size = config.model.vocab_size or (summary.vocab_size if summary else 0)
    resolved = replace(
        config,
        model=replace(config.model, vocab_size=vocab_size),
        data=replace(config.data, seq_len=seq_len),
    )
    return resolved, derive(resolved)


def derive(config: TrainConfig, world_size: int = 1) -> TrainingPlan:
    """Derive the plan of a configuration in which nothing is open.

    Raises:
        ConfigError: the budget does not pay for a single step.
    """
    seq_len = config.data.seq_len
    if seq_len is None:
        raise ValueError("data.seq_len is not resolved")
    per_token = training_flops_per_token(config.model, seq_len)
    sequences = config.batch.tokens // seq_len
    tokens_per_step = sequences * seq_len
    budget = config.budget
    if budget.steps is not None:
        steps = budget.steps
    elif budget.tokens is not None:
        steps = round(budget.tokens / tokens_per_step)
    else:
        steps = round((budget.flops or 0) / (per_token * tokens_per_step))
    if steps < 1:
        name, value = ("tokens", budget.tokens) if budget.tokens else ("flops", budget.flops)
        need = tokens_per_step if budget.tokens else per_token * tokens_per_step
        raise_if_any(
            [
                Problem(
                    f"budget.{name}",
                    value,
                    f"does not pay for one step, which takes {need:.3g}",
                    "give more, or lower batch.tokens",
                )
            ]
        )
    accumulate = sequences // (config.batch.micro_batch_size * world_size)
    return TrainingPlan(seq_len, sequences, accumulate, steps, per_token, world_size)


def _summary(path: str) -> IndexSummary | None:
    try:
        return read_summary(path)
    except DataError:
        return None


def _vocabulary_problems(config: TrainConfig, summary: IndexSummary | None) -> list[Problem]:
    size = config.model.vocab_size
    if summary is None:
        if size is not None:
            return []
        return [
            Problem(
                "model.vocab_size",
                "null",
                f"comes from the tokenizer, but there is no prepared data in {config.data.path}",
                "run modtrain prepare first, or set model.vocab_size",
            )
        ]
    if size is None or size >= summary.vocab_size:
        return []
    return [
        Problem(
            "model.vocab_size",
            size,
            f"is smaller than the tokenizer's {summary.vocab_size}",
            f"set it to {summary.vocab_size} or more, or to null",
        )
    ]


def _sequence_length(
    config: TrainConfig, summary: IndexSummary | None
) -> tuple[int, list[Problem]]:
    length = config.data.seq_len
    if summary is None:
        if length is not None:
            return length, []
        remedy = "run modtrain prepare first, or set data.seq_len"
        return 0, [
            Problem("data.seq_len", "null", "comes from the shards, which are not there", remedy)
        ]
    if length is None:
        return summary.seq_len, []
    # A length that does not fit the shards is told by the data's own problems.
    return (length if length > 0 and summary.seq_len % length == 0 else 0), []


def _batch_problems(config: TrainConfig, seq_len: int, world_size: int = 1) -> list[Problem]:
    tokens, micro = config.batch.tokens, config.batch.micro_batch_size
    unit = seq_len * micro * world_size
    if min(tokens, micro) < 1 or tokens % unit == 0:
        return []
    near = max(unit, round(tokens / unit) * unit)
    return [
        Problem(
            "batch.tokens",
            tokens,
            f"is no multiple of seq_len x micro_batch_size x devices ="
            f" {seq_len} x {micro} x {world_size} = {unit}",
            f"use {near}, or another batch.micro_batch_size",
        )
    ]
