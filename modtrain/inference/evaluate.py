"""Evaluate a run's checkpoint on held-out text, causally and under top-k."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from modtrain.data.datamodule import TokenDataModule
from modtrain.data.index import read_summary
from modtrain.errors import CheckpointError, DataError, raise_if_any
from modtrain.files import write_text
from modtrain.inference.config import EvalRunConfig
from modtrain.models.flops import dense_equivalent_flops
from modtrain.models.transformer import Transformer
from modtrain.training import checkpoint
from modtrain.training.config import TrainConfig
from modtrain.training.hardware import resolve_accelerator, resolve_precision
from modtrain.training.held_out import HeldOut, evaluate
from modtrain.training.plan import derive
from modtrain.training.run_directory import RunDirectory


def evaluate_run(config: EvalRunConfig) -> dict[str, Any]:
    """Evaluate the run and write the figures to ``eval-<step>.json`` in its directory.

    Returns:
        The figures as plain data: those of `HeldOut`, perplexity and bits a byte.

    Raises:
        ConfigError, CheckpointError, DataError: what cannot be evaluated, with the remedy.
    """
    raise_if_any(config.problems())
    run = RunDirectory(Path(config.runs_dir) / str(config.run))
    trained = run.read_config()
    step, path = _choose(run, config.step)
    model = load_model(trained, path)
    device = torch.device(resolve_accelerator(config.accelerator))
    data_path = config.data_path or trained.data.path
    _check_tokenizer(run, trained, data_path)
    data = TokenDataModule(
        replace(trained.data, path=data_path),
        micro_batch_size=1,
        accumulate=1,
        num_steps=1,
        eval_batch_size=config.batch_size,
        eval_sequences=config.sequences,
    )
    bf16 = resolve_precision(config.precision, device.type) == "bf16"
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)
    held_out = evaluate(
        model.to(device),
        data.val_dataloader(),
        autocast,
        eos_id=trained.data.eos_id,
        # In the middle of a schedule the model is at other capacities than at its end.
        capacities=derive(trained).capacities_at(max(0, step - 1)),
    )
    figures = _figures(trained, held_out, data_path, step)
    write_text(run.path / f"eval-{step:09d}.json", json.dumps(figures, indent=1))
    return figures


def load_model(config: TrainConfig, path: Path) -> Transformer:
    """Return the model of ``config`` with the weights of the checkpoint ``path``, on the CPU."""
    model = Transformer(config.model, seed=config.seed)
    state = checkpoint.load(path)["state_dict"]
    model.load_state_dict({key.removeprefix("model."): value for key, value in state.items()})
    return model.eval()


def _choose(run: RunDirectory, step: int | None) -> tuple[int, Path]:
    if step is None:
        newest = checkpoint.latest(run.checkpoints)
        if newest is None:
            raise CheckpointError(f"{run.checkpoints} holds no whole checkpoint: train first")
        return newest
    steps = dict(checkpoint.whole_checkpoints(run.checkpoints))
    if step not in steps:
        there = ", ".join(map(str, steps)) or "none"
        raise CheckpointError(f"{run.path} has no checkpoint of step={step}; there are: {there}")
    return step, steps[step]


def _check_tokenizer(run: RunDirectory, trained: TrainConfig, data_path: str) -> None:
    """Raise where the numbers of tokens would mean other text than in training."""
    known = json.loads(run.manifest.read_text())["data_fingerprint"]
    if read_summary(trained.data.path).fingerprint != known:
        raise DataError(
            f"{trained.data.path} holds other data now than {run.path} was trained on:"
            " prepare that again, for its tokenizer is the run's"
        )
    ours, theirs = read_summary(trained.data.path), read_summary(data_path)
    if ours.tokenizer_sha256 != theirs.tokenizer_sha256:
        raise DataError(
            f"{data_path} was made with another tokenizer than {trained.data.path}: prepare it"
            f" with tokenizer.path={Path(trained.data.path, 'tokenizer.json')}"
        )


def _figures(trained: TrainConfig, held_out: HeldOut, data_path: str, step: int) -> dict[str, Any]:
    split = read_summary(data_path).splits["valid"]
    tokens_per_byte = split.num_tokens / split.num_bytes
    loss = held_out.causal_loss
    seq_len = trained.data.seq_len or 1
    return {
        "step": step,
        **held_out.as_dict(),
        "perplexity": None if loss is None else math.exp(loss),
        "bits_per_byte": None if loss is None else loss / math.log(2) * tokens_per_byte,
        "dense_equivalent_flops": dense_equivalent_flops(trained.model, seq_len).total / seq_len,
    }
