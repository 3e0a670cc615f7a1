"""Continue texts with a trained run: streaming to a terminal, or JSON lines in bulk."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from tokenizers import Tokenizer

from modtrain.common.errors import DataError, Problem, raise_if_any
from modtrain.data.prepare.tokenizer import DocumentEncoder, check_tokenizer
from modtrain.inference.calibration import budget_of_run, resolve_decisions
from modtrain.inference.config import ComputeBudgetConfig
from modtrain.inference.generate.config import GenerateConfig
from modtrain.inference.generate.continuations import (
    OWN_KEYS,
    Continuation,
    JSONLinesWriter,
    PlainWriter,
    Writer,
    output,
)
from modtrain.inference.generate.decoder import Decoder, DecoderConfig, Statistics
from modtrain.inference.generate.text import TextStream
from modtrain.inference.loading import LoadedRun, load_run
from modtrain.inference.prompt_source import is_unicode, read_text
from modtrain.models.config import ModelConfig
from modtrain.models.depth.compute_budget import ComputeBudget
from modtrain.models.depth.config import Selection


def generate(config: GenerateConfig) -> None:
    """Continue the prompts of ``config``, and say on standard error what it took.

    Raises:
        ConfigError, CheckpointError, DataError: what cannot be continued, with the remedy.
    """
    raise_if_any(config.problems())
    requests = list(_requests(config))
    loaded = load_run(config)
    vocabulary = _Vocabulary(loaded.tokenizer)
    settings = decoder_config(config, loaded, vocabulary.end_id)
    prompts = [vocabulary.encode(request["prompt"]) for request in requests]
    decoder = Decoder(loaded.model, settings, prompts)
    continuations = [
        _continuation(config, request, vocabulary, prompt)
        for request, prompt in zip(requests, prompts, strict=True)
    ]
    start = time.perf_counter()
    with loaded.autocast(), output(config.output) as out:
        writer: Writer = PlainWriter(out, continuations, len(loaded.model.routers))
        if config.input is not None:
            writer = JSONLinesWriter(out, continuations, config.show_depth)
        for event in decoder.run():
            if continuations[event.number].hear(event):
                decoder.stop(event.number)
            writer.write()
    labels = loaded.trained.model.routed_labels
    _say(decoder.statistics, labels, time.perf_counter() - start)


def decoder_config(config: GenerateConfig, loaded: LoadedRun, end_id: int) -> DecoderConfig:
    """Return how the run's model is to decode.

    Raises:
        ConfigError: the model has no causal decision, or nothing to draft with.
    """
    decisions = resolve_decisions(config.inference, loaded.trained.model)
    problems = _model_problems(config, loaded.trained.model, decisions)
    raise_if_any(problems)
    selection = decisions[0]
    return DecoderConfig(
        selection,
        config.max_tokens,
        config.sampling,
        _budget(loaded, selection, config.inference, config.batch_size),
        config.batch_size,
        config.prefill_chunk,
        end_id,
        loaded.trained.data.eos_id is not None,
        config.show_depth,
        config.speculate.tokens or 0,
        _draft_budget(loaded, selection, config) if config.speculate.tokens else None,
    )


def _model_problems(
    config: GenerateConfig, model: ModelConfig, decisions: list[Selection]
) -> list[Problem]:
    """Find what is asked for and the model cannot do."""
    remedy = "leave it out"
    if not model.is_routed:
        reason = "needs depth routers, and the model has none"
        asked = {"speculate.tokens": config.speculate.tokens, "show_depth": config.show_depth}
        return [Problem(key, value, reason, remedy) for key, value in asked.items() if value]
    if not decisions:
        reason = "was trained without router.causal: nothing tells who takes part"
        return [Problem("run", config.run, reason, "train with router.causal=[predictor]")]
    if model.router.score == "oracle_norm" and model.router.needs_scores(decisions[0]):
        reason = "has router.score=oracle_norm, which is made of the whole sequence"
        remedy = "train with router.gate=none, and decide by a predictor"
        return [Problem("run", config.run, reason, remedy)]
    return []


def _budget(
    loaded: LoadedRun, selection: Selection, wish: ComputeBudgetConfig, batch_size: int
) -> ComputeBudget | None:
    budget = budget_of_run(loaded, selection, wish, batch_size)
    if loaded.trained.model.router.needs_causal or (
        budget is not None and budget.thresholds is not None
    ):
        return budget
    # Shares, which a checkpoint from the middle of a schedule has other ones of.
    return (budget or ComputeBudget())._replace(thresholds=loaded.shares)


def _draft_budget(loaded: LoadedRun, selection: Selection, config: GenerateConfig) -> ComputeBudget:
    capacity = config.speculate.capacity
    if capacity == 0:
        return ComputeBudget(step_cap=0)
    # What drafts compute is capped as everything is.
    wish = replace(config.inference, capacity=capacity, shift=0.0)
    budget = budget_of_run(loaded, selection, wish, config.batch_size, "speculate")
    return budget or ComputeBudget()


class _Vocabulary:
    """The run's tokenizer both ways."""

    def __init__(self, path: Path) -> None:
        content = path.read_bytes()
        self.tokenizer = Tokenizer.from_str(content.decode())
        self.end_id = check_tokenizer(content, str(path))[1]
        self._encoder = DocumentEncoder(content, str(path))

    def encode(self, text: str) -> list[int]:
        """Return a prompt's tokens; nothing is what begins a document."""
        return self._encoder.encode([text])[0] or [self.end_id]


def _continuation(
    config: GenerateConfig, request: dict[str, Any], vocabulary: _Vocabulary, prompt: list[int]
) -> Continuation:
    found = Continuation(request, TextStream(vocabulary.tokenizer, config.stop, before=prompt))
    if config.echo and config.show_depth:
        found.prompt = TextStream(vocabulary.tokenizer)
    elif config.echo:
        found.pieces = [(request["prompt"], None)]
    return found


def _requests(config: GenerateConfig) -> Iterator[dict[str, Any]]:
    if config.input is not None:
        # Not splitlines: JSON may have other ends of lines within its texts.
        lines = read_text(config.input).split("\n")
        for number, line in enumerate(lines, start=1):
            if line.strip():
                request = _request(line, f"{config.input}, line {number}")
                yield from (
                    {**request, "sample": sample} if config.samples > 1 else request
                    for sample in range(config.samples)
                )
        return
    prompt = config.prompt or ""
    if config.file is not None:
        prompt = read_text(config.file)
    yield from ({"prompt": prompt} for _ in range(config.samples))


def _request(line: str, where: str) -> dict[str, Any]:
    try:
        request = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: is no JSON ({error})") from None
    if not isinstance(request, dict) or not isinstance(request.get("prompt"), str):
        raise DataError(f'{where}: has no text under "prompt"')
    if not is_unicode(request["prompt"]):
        raise DataError(f"{where}: its prompt is not valid Unicode")
    taken = [key for key in OWN_KEYS if key in request]
    if taken:
        raise DataError(f"{where}: has {', '.join(taken)}, which is to be written: rename it")
    return request


def _say(statistics: Statistics, labels: list[str], seconds: float) -> None:
    """Say on standard error what it took: standard output is the text's."""
    console = Console(stderr=True, highlight=False)
    made = statistics.made_tokens
    lines = [
        f"{made:,} tokens behind {statistics.prompt_tokens:,} of prompts in {seconds:.1f} s"
        f" ({made / seconds:,.1f} a second), cache {statistics.cache_bytes / 1e6:,.1f} MB"
    ]
    if labels and statistics.stepped_tokens:
        shares = (
            f"{label} {count / statistics.stepped_tokens:.1%}"
            for label, count in zip(labels, statistics.chosen_R, strict=True)
        )
        lines.append(f"took part: {', '.join(shares)}")
    if statistics.drafted:
        share = statistics.accepted / statistics.drafted
        lines.append(
            f"{share:.1%} of {statistics.drafted:,} drafts were right:"
            f" {made / max(1, statistics.steps):.2f} tokens for each pass of the whole model"
        )
    for line in lines:
        console.print(line, markup=False)
