"""Continue texts with a trained run: streamed to a terminal, or as JSON lines in bulk."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from modtrain.common.errors import ConfigError, DataError, Problem, raise_if_any
from modtrain.common.terminal import plain_console
from modtrain.inference.calibration import budget_of_run, resolve_decisions
from modtrain.inference.config import GenerateConfig
from modtrain.inference.generate.continuations import (
    OUTPUT_KEYS,
    Continuation,
    JSONLinesWriter,
    PlainWriter,
    output,
)
from modtrain.inference.generate.counts import Statistics
from modtrain.inference.generate.decoder import Decoder, DecoderConfig
from modtrain.inference.generate.text_stream import TextStream
from modtrain.inference.loading import LoadedRun, load_run
from modtrain.inference.text_io import is_unicode, read_text
from modtrain.inference.token_text import Vocabulary
from modtrain.interop.prompt_format import PromptFormat
from modtrain.models.config import ModelConfig
from modtrain.models.depth.config import ComputeBudget, Selection


def generate(config: GenerateConfig) -> None:
    """Continue the prompts of ``config``, and print statistics on standard error.

    Raises:
        ConfigError, CheckpointError, DataError: generation is not possible, with the remedy.
    """
    raise_if_any(config.problems())
    requests = list(_requests(config))
    loaded = load_run(config)
    vocabulary = Vocabulary(loaded.tokenizer.read_bytes(), str(loaded.tokenizer), loaded.end_id)
    settings = decoder_config(config, loaded, vocabulary.end_id)
    prompt_format = PromptFormat.read(loaded.directory.path)
    settings = replace(settings, more_end_ids=prompt_format.end_ids)
    prompts = _prompts(
        config, [request["prompt"] for request in requests], vocabulary, prompt_format
    )
    decoder = Decoder(loaded.model, settings, prompts)
    continuations = [
        _continuation(config, request, vocabulary, prompt)
        for request, prompt in zip(requests, prompts, strict=True)
    ]
    start = time.perf_counter()
    with loaded.autocast(), output(config.output) as out:
        writer = (
            PlainWriter(out, continuations, len(loaded.model.routers))
            if config.input is None
            else JSONLinesWriter(out, continuations, config.show_depth)
        )
        for event in decoder.run():
            if continuations[event.number].push(event):
                decoder.stop(event.number)
            writer.write()
    labels = loaded.trained.model.routed_labels
    _print_statistics(decoder.statistics, labels, time.perf_counter() - start)


def decoder_config(config: GenerateConfig, loaded: LoadedRun, end_id: int) -> DecoderConfig:
    """Return the settings to decode the run's model with.

    Raises:
        ConfigError: the model has no causal decision, or no routers to draft without.
    """
    decisions = resolve_decisions(config.inference, loaded.trained.model)
    raise_if_any(_model_problems(config, loaded.trained.model, decisions))
    selection = decisions[0]
    return DecoderConfig(
        selection,
        max_tokens=config.max_tokens,
        sampling=config.sampling,
        budget=budget_of_run(loaded, selection, config.inference, config.batch_size),
        batch_size=config.batch_size,
        prefill_chunk=config.prefill_chunk,
        end_id=end_id,
        mask_documents=loaded.trained.data.eos_id is not None,
        with_depth=config.show_depth,
        drafts=config.speculate.tokens or 0,
        draft_budget=_draft_budget(loaded, selection, config) if config.speculate.tokens else None,
        capacities=loaded.capacities,
    )


def _prompts(
    config: GenerateConfig, texts: list[str], vocabulary: Vocabulary, prompt_format: PromptFormat
) -> list[list[int]]:
    """Return the tokens of each prompt, as the model knows them.

    Raises:
        ConfigError: there is no chat template.
    """
    if not config.chat:
        begin = list(prompt_format.begin_ids)
        return [begin + vocabulary.encode(text) if text or not begin else begin for text in texts]
    if prompt_format.chat_template is None:
        reason, remedy = "needs a chat template, and the run has none", "import a chat model"
        raise ConfigError([Problem("chat", "true", reason, remedy)])
    return [prompt_format.chat_ids(vocabulary.tokenizer, text) for text in texts]


def _model_problems(
    config: GenerateConfig, model: ModelConfig, decisions: list[Selection]
) -> list[Problem]:
    """Find settings that the model does not support."""
    remedy = "leave it out"
    if not model.is_routed:
        reason = "needs depth routers, and the model has none"
        settings = {"speculate.tokens": config.speculate.tokens, "show_depth": config.show_depth}
        return [Problem(key, value, reason, remedy) for key, value in settings.items() if value]
    if not decisions:
        reason = "was trained without router.causal: there is no causal decision to route by"
        return [Problem("run", config.run, reason, "train with router.causal=[predictor]")]
    if model.router.score == "oracle_norm" and model.router.needs_scores(decisions[0]):
        reason = "has router.score=oracle_norm, which needs the whole sequence"
        remedy = "train with router.gate=none, and decide by a predictor"
        return [Problem("run", config.run, reason, remedy)]
    return []


def _draft_budget(loaded: LoadedRun, selection: Selection, config: GenerateConfig) -> ComputeBudget:
    capacity = config.speculate.capacity
    if capacity == 0:
        return ComputeBudget(step_cap=0)
    # The caps of the full model apply to drafts as well.
    settings = replace(config.inference, capacity=capacity, shift=0.0)
    budget = budget_of_run(loaded, selection, settings, config.batch_size, "speculate")
    return budget or ComputeBudget()


def _continuation(
    config: GenerateConfig, request: dict[str, Any], vocabulary: Vocabulary, prompt: list[int]
) -> Continuation:
    stream = TextStream(vocabulary.tokenizer, config.stop, before=prompt)
    continuation = Continuation(request, stream)
    if config.echo and config.show_depth:
        continuation.prompt = TextStream(vocabulary.tokenizer)
    elif config.echo:
        continuation.pieces = [(request["prompt"], None)]
    return continuation


def _requests(config: GenerateConfig) -> Iterator[dict[str, Any]]:
    if config.input is not None:
        # Not splitlines: JSON strings may contain other line separators.
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
        raise DataError(f"{where}: is not JSON ({error})") from None
    if not isinstance(request, dict) or not isinstance(request.get("prompt"), str):
        raise DataError(f'{where}: has no string under "prompt"')
    if not is_unicode(request["prompt"]):
        raise DataError(f"{where}: its prompt is not valid Unicode")
    reserved = [key for key in OUTPUT_KEYS if key in request]
    if reserved:
        raise DataError(f"{where}: has {', '.join(reserved)}, reserved for the output: rename it")
    return request


def _print_statistics(statistics: Statistics, labels: list[str], seconds: float) -> None:
    """Print counts and speed on standard error, since standard output is for the text."""
    console = plain_console(stderr=True)
    generated = statistics.generated_tokens
    lines = [
        f"{generated:,} tokens after {statistics.prompt_tokens:,} of prompts in {seconds:.1f} s"
        f" ({generated / seconds:,.1f} per second), cache {statistics.cache_bytes / 1e6:,.1f} MB"
    ]
    if labels and statistics.stepped_tokens:
        shares = (
            f"{label} {count / statistics.stepped_tokens:.1%}"
            for label, count in zip(labels, statistics.chosen_R, strict=True)
        )
        lines.append(f"routed: {', '.join(shares)}")
    if statistics.drafted:
        share = statistics.accepted / statistics.drafted
        lines.append(
            f"{share:.1%} of {statistics.drafted:,} drafts accepted:"
            f" {generated / max(1, statistics.steps):.2f} tokens per pass of the full model"
        )
    for line in lines:
        console.print(line)
