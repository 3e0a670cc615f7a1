"""`modtrain checkpoints`: lists, verifies, prunes and consolidates a run's checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Column, Table

from modtrain.checkpoint.config import CheckpointsConfig
from modtrain.checkpoint.consolidate import consolidate
from modtrain.checkpoint.layout import STEP_PREFIX, Manifest, checkpoint_path, verify
from modtrain.checkpoint.reading import read_extra_state
from modtrain.checkpoint.recovery import (
    named_checkpoints,
    prune,
    whole_checkpoints,
    with_checkpoint,
)
from modtrain.common.atomic_io import digest
from modtrain.common.errors import CheckpointError, raise_if_any
from modtrain.common.terminal import last_output, plain_console
from modtrain.training.config import TrainConfig
from modtrain.training.named_runs import open_run
from modtrain.training.run_directory import RunDirectory

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# `Transformer` ties its head to its embedding.
_TIED = {"head.weight": "embedding.weight"}


def run_checkpoints(config: CheckpointsConfig, console: Console | None = None) -> None:
    """Run the action of ``config`` and print the result.

    Raises:
        ConfigError, CheckpointError: the action is not possible; names every damaged checkpoint.
    """
    raise_if_any(config.problems())
    run = open_run(config.runs_dir, str(config.run))
    trained = run.read_config()
    console = console or plain_console(soft_wrap=True)
    if config.action == "prune":
        _prune(config, run, console)
    elif config.action == "consolidate":
        _consolidate(config, run, trained, console)
    else:
        _list(run, console, contents=config.action == "verify")


def _list(run: RunDirectory, console: Console, contents: bool) -> None:
    """Print a row for each; with ``contents`` read every byte, and raise if one is damaged."""
    headings = ("step", "bytes", "ranks", "tokens", "FLOPs", "verified" if contents else "whole")
    columns = [Column(heading, justify="right") for heading in headings]
    table = Table(*columns, title=str(run.checkpoints))
    damaged = []
    for path in named_checkpoints(run.checkpoints):
        try:
            verify(path, contents)
            table.add_row(*_row(path), "yes")
        except CheckpointError as error:
            if not path.exists():
                # A training process has pruned it meanwhile.
                continue
            damaged.append(str(error))
            table.add_row(path.name.removeprefix(STEP_PREFIX), "", "", "", "", "no")
    with last_output():
        console.print(table)
    if contents and damaged:
        raise CheckpointError("\n".join(["damaged checkpoints:", *damaged]))
    with last_output():
        for message in damaged:
            console.print(message)


def _row(path: Path) -> tuple[str, str, str, str, str]:
    manifest, extra_state = Manifest.read(path), read_extra_state(path)
    progress = extra_state.get("progress", {}) if isinstance(extra_state, dict) else {}
    tokens, flops = progress.get("tokens"), progress.get("flops")
    is_named_by_step = path == checkpoint_path(path.parent, manifest.step)
    return (
        str(manifest.step) if is_named_by_step else f"{manifest.step} ({path.name})",
        f"{manifest.num_bytes:,}",
        str(manifest.world_size),
        "" if tokens is None else f"{tokens:,}",
        "" if flops is None else f"{flops:.3g}",
    )


def _prune(config: CheckpointsConfig, run: RunDirectory, console: Console) -> None:
    retention = run.retention()
    keep_last = config.keep_last or retention.keep_last
    keep_every = config.keep_every or retention.keep_every
    # A training process prunes by itself, and one that starts may be reading a checkpoint.
    with run.locked():
        steps = retention.keep_steps
        removed = prune(run.checkpoints, keep_last, keep_every, contents=True, keep_steps=steps)
    with last_output():
        for path in removed:
            console.print(f"removed {path}")
        console.print(f"{len(whole_checkpoints(run.checkpoints))} checkpoints are left")


def _consolidate(
    config: CheckpointsConfig, run: RunDirectory, trained: TrainConfig, console: Console
) -> None:
    plain: Any = OmegaConf.to_container(OmegaConf.structured(trained))
    metadata = {
        "format": "pt",
        "run": str(config.run),
        "model": json.dumps(plain["model"]),
        "config_sha256": digest(plain),
    }
    tied = _TIED if trained.model.tie_embeddings else {}

    def write(step: int, path: Path) -> tuple[int, Path, int]:
        output = Path(config.output or run.path / f"model-{step:09d}.safetensors")
        step_metadata = {**metadata, "step": str(step)}
        return step, output, consolidate(path, output, _DTYPES[config.dtype], step_metadata, tied)

    step, output, size = with_checkpoint(run.checkpoints, config.step, write)
    with last_output():
        console.print(f"wrote {output}: the weights of step {step}, {size:,} bytes")
