"""Show the routing decisions of a trained run on a text, as one HTML page.

Shapes: B batch, S sequence, T = S + 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import OmegaConf
from tokenizers import Tokenizer

from modtrain.common.atomic_io import write_text
from modtrain.common.errors import ConfigError, DataError, Problem, raise_if_any
from modtrain.common.ignored_target import IGNORED
from modtrain.data.prepare.tokenizer import DocumentEncoder
from modtrain.data.stream.batch import Batch
from modtrain.inference.calibration import budget_of_run, resolve_decisions
from modtrain.inference.config import ComputeBudgetConfig, InspectConfig
from modtrain.inference.inspect.page import Subject, render
from modtrain.inference.inspect.trace import Trace, trace
from modtrain.inference.loading import LoadedRun, load_run
from modtrain.inference.text_io import is_writable, read_text
from modtrain.inference.token_text import TokenTexts
from modtrain.models.config import ModelConfig
from modtrain.models.depth.config import RouterSwap, Selection


def inspect_run(config: InspectConfig) -> Path:
    """Run the model over the text and write the page. Returns its path.

    Raises:
        ConfigError, CheckpointError, DataError: the run cannot be inspected, with the remedy.
    """
    raise_if_any(config.problems())
    loaded = load_run(config)
    if config.output is None and not is_writable(loaded.directory.path):
        reason = f"is in {loaded.directory.path}, which is read-only"
        raise ConfigError([Problem("output", "null", reason, "give output=page.html")])
    selection = choose_decision(loaded.trained.model, config.inference)
    budget = budget_of_run(loaded, selection, config.inference, config.batch_size)
    source, windows = _windows(config, loaded)

    def traced(swap: RouterSwap | None = None) -> Trace:
        return trace(
            loaded.model,
            windows,
            selection,
            loaded.autocast(),
            capacities=loaded.capacities,
            budget=budget,
            swap=swap,
        )

    recorded = traced()
    if (loss := recorded.mean_loss) is not None:
        zeroed = [traced(RouterSwap("zero", routers=(i,))) for i in range(len(recorded.routers))]
        routers = [
            replace(router, worth=(without.mean_loss or 0) / loss - 1)
            for router, without in zip(recorded.routers, zeroed, strict=True)
        ]
        recorded = replace(recorded, routers=routers)
    texts = TokenTexts(Tokenizer.from_file(str(loaded.tokenizer)))
    model = loaded.trained.model
    subject = Subject(
        run=str(config.run),
        step=loaded.step,
        source=source,
        seq_len=loaded.seq_len,
        selection=selection,
        budget=", ".join(f"{name} {value}" for name, value in config.inference.overrides.items()),
        is_causal=selection in model.causal_selections,
        num_layers=model.num_layers,
        capacities=[loaded.capacities[layer] or 1.0 for layer, _ in model.routed_parts],
        model=OmegaConf.to_yaml(OmegaConf.structured(model)).rstrip(),
    )
    name = f"inspect-{loaded.step:09d}{config.inference.suffix}.html"
    path = Path(config.output or loaded.directory.path / name)
    pieces = texts.pieces(recorded.token_N.tolist())
    write_text(path, render(subject, recorded, pieces, config.tokens_shown))
    return path


def choose_decision(model: ModelConfig, settings: ComputeBudgetConfig) -> Selection:
    """Return the decision to inspect; also the selection of training, if it is named.

    Raises:
        ConfigError: the model does not have it, or a compute budget is given for the selection of
            training.
    """
    selections = resolve_decisions(settings, model, as_trained=True)
    key, remedy = "inference.decision", f"use {model.training_selection}, which is not causal"
    if not selections:
        reason = "has no default: the model was trained without a causal decision"
        raise ConfigError([Problem(key, "null", reason, remedy)])
    if selections[0] not in model.causal_selections and settings.overrides:
        reason = f"is not changed by {', '.join(settings.overrides)}"
        raise ConfigError([Problem(key, selections[0], reason, "leave that out")])
    return selections[0]


def text_windows(
    token_N: Sequence[int], seq_len: int, batch_size: int, eos_id: int | None = None
) -> Iterator[Batch]:
    """Split a text into windows of ``seq_len``, the last one shorter.

    The target of a window's last token is the next window's first; that of the text is ignored.
    """
    inputs_N = torch.tensor(token_N, dtype=torch.int64)
    targets_N = torch.cat([inputs_N[1:], torch.tensor([IGNORED])])
    whole = len(inputs_N) // seq_len * seq_len
    sides = [side_N[:whole].view(-1, seq_len) for side_N in (inputs_N, targets_N)]
    if whole:
        for inputs_BS, targets_BS in zip(*(torch.split(x, batch_size) for x in sides), strict=True):
            yield Batch.from_targets(inputs_BS, targets_BS, eos_id)
    if whole < len(inputs_N):
        yield Batch.from_targets(inputs_N[None, whole:], targets_N[None, whole:], eos_id)


def _windows(config: InspectConfig, loaded: LoadedRun) -> tuple[str, Iterable[Batch]]:
    """Return the name of the text and its windows."""
    if config.text is None and config.file is None:
        return "held-out text", loaded.held_out(config.sequences, config.batch_size)
    text = config.text if config.text is not None else read_text(str(config.file))
    encoder = DocumentEncoder(loaded.tokenizer.read_bytes(), str(loaded.tokenizer))
    numbers = encoder.encode_whole(text, "the text")
    if not numbers:
        raise DataError("the text has no token")
    source = "the text given" if config.file is None else Path(config.file).name
    eos_id = loaded.trained.data.eos_id
    return source, [*text_windows(numbers, loaded.seq_len, config.batch_size, eos_id)]
