"""Show what a trained run's routers do with a text, as one HTML page.

Shapes: B batch, S sequence, T = S + 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from modtrain.common.atomic_io import write_text
from modtrain.common.errors import ConfigError, DataError, Problem, raise_if_any
from modtrain.data.prepare.tokenizer import DocumentEncoder
from modtrain.inference.calibration import budget_of_run, resolve_decisions
from modtrain.inference.config import ComputeBudgetConfig
from modtrain.inference.inspect.config import InspectConfig
from modtrain.inference.inspect.page import Subject, render
from modtrain.inference.inspect.trace import trace
from modtrain.inference.loading import LoadedRun, load_run
from modtrain.inference.prompt_source import read_text
from modtrain.inference.token_text import TokenTexts
from modtrain.models.config import ModelConfig
from modtrain.models.depth.config import Selection
from modtrain.models.loss import IGNORED


def inspect_run(config: InspectConfig) -> Path:
    """Run the model over the text and write the page. Returns where it is.

    Raises:
        ConfigError, CheckpointError, DataError: what cannot be inspected, with the remedy.
    """
    raise_if_any(config.problems())
    loaded = load_run(config)
    selection = choose_decision(loaded.trained.model, config.inference)
    budget = budget_of_run(loaded, selection, config.inference, config.batch_size)
    source, windows = _windows(config, loaded)
    found = trace(
        loaded.model,
        windows,
        selection,
        loaded.autocast(),
        eos_id=loaded.trained.data.eos_id,
        capacities=loaded.capacities,
        budget=budget,
    )
    texts = TokenTexts(Tokenizer.from_file(str(loaded.tokenizer)))
    model = loaded.trained.model
    subject = Subject(
        run=str(config.run),
        step=loaded.step,
        source=source,
        seq_len=loaded.seq_len,
        selection=selection,
        budget=", ".join(f"{name} {value}" for name, value in config.inference.asked.items()),
        is_causal=selection in model.causal_selections,
        num_layers=model.num_layers,
        capacities=list(loaded.shares),
    )
    name = f"inspect-{loaded.step:09d}{config.inference.suffix}.html"
    default = loaded.directory.path / name
    path = default if config.output is None else Path(config.output)
    pieces = texts.pieces(found.token_N.tolist())
    write_text(path, render(subject, found, pieces, config.tokens_shown))
    return path


def choose_decision(model: ModelConfig, wish: ComputeBudgetConfig) -> Selection:
    """Return the decision to look at; also as trained, where it is named.

    Raises:
        ConfigError: the model does not have it, or what it chooses by in training is to be moved.
    """
    found = resolve_decisions(wish, model, as_trained=True)
    key, remedy = "inference.decision", f"use {model.training_selection}, which is not causal"
    if not found:
        reason = "has no default: the model was trained without a causal decision"
        raise ConfigError([Problem(key, "null", reason, remedy)])
    if found[0] not in model.causal_selections and wish.asked:
        reason = f"is not moved by {', '.join(wish.asked)}"
        raise ConfigError([Problem(key, found[0], reason, "leave that out")])
    return found[0]


def text_windows(
    token_N: Sequence[int], seq_len: int, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut a text into (inputs, targets) of ``seq_len``, the last one shorter.

    The last token of a window is asked for the first one of the next; that of the text for nothing.
    """
    inputs_N = torch.tensor(token_N, dtype=torch.int64)
    targets_N = torch.cat([inputs_N[1:], torch.tensor([IGNORED])])
    whole = len(inputs_N) // seq_len * seq_len
    sides = [side_N[:whole].view(-1, seq_len) for side_N in (inputs_N, targets_N)]
    if whole:
        yield from zip(*(torch.split(side, batch_size) for side in sides), strict=True)
    if whole < len(inputs_N):
        yield inputs_N[None, whole:], targets_N[None, whole:]


def _windows(
    config: InspectConfig, loaded: LoadedRun
) -> tuple[str, Iterable[tuple[Tensor, Tensor]]]:
    """Return the text's name and its windows."""
    if config.text is None and config.file is None:
        batches = loaded.held_out(config.sequences, config.batch_size)
        return "held-out text", ((batch_BT[:, :-1], batch_BT[:, 1:]) for batch_BT in batches)
    text = config.text if config.text is not None else read_text(str(config.file))
    (numbers,) = DocumentEncoder(loaded.tokenizer.read_bytes(), str(loaded.tokenizer)).encode(
        [text]
    )
    if not numbers:
        raise DataError("the text has no token")
    source = "the text given" if config.file is None else Path(config.file).name
    return source, text_windows(numbers, loaded.seq_len, config.batch_size)
