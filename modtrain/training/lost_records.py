"""What a start does where a run's checkpoints or its configuration are gone.

Neither may pass for a run that never started: its first steps would be made again over its records,
or the rest of them with another configuration.
"""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf

from modtrain.checkpoint.reading import read_extra_state
from modtrain.checkpoint.recovery import has_checkpoints, latest
from modtrain.common.atomic_io import write_text
from modtrain.common.errors import CheckpointError
from modtrain.training.config import TrainConfig
from modtrain.training.run_directory import RunDirectory

_RECORDS = (
    *("config.yaml", "command.txt", "manifest.json", "metrics.jsonl", "events.jsonl"),
    *("left_out.json", "result.json", "saved_step", "wandb_id", "wandb", "tensorboard"),
    "checkpoints",
)
"""What a run records. Not its logs, which this process writes already, nor a job's files."""


def settle_records(run: RunDirectory, config: TrainConfig) -> str:
    """Restore what a checkpoint has, or move old records aside; return a message, or nothing.

    Raises:
        CheckpointError: the run has no checkpoints left, and ``config.resume`` is ``auto``; or a
            configuration that no checkpoint has.
    """
    if has_checkpoints(run.checkpoints):
        return "" if run.config.is_file() else _restore_config(run)
    saved = run.saved_step.read_text().strip() if run.saved_step.is_file() else None
    if saved is None and (run.checkpoints.is_dir() or not run.config.is_file()):
        # It never saved.
        return ""
    what = f"step {saved} was saved" if saved else "the run was started before"
    if config.resume == "fresh":
        kept = _move_records(run)
        return f"{run.path}: {what}, and no checkpoint is left; its records are in {kept} now"
    raise CheckpointError(
        f"{run.checkpoints} has no checkpoint, but {what}: a start from the first step would"
        " overwrite the run's records\n"
        "remedy: restore the checkpoints, or mount what has them; to start from the first step and"
        " keep the old records beside the new, add resume=fresh"
    )


def _restore_config(run: RunDirectory) -> str:
    newest = latest(run.checkpoints)
    content = None if newest is None else read_extra_state(newest[1]).get("config")
    if newest is None or content is None:
        raise CheckpointError(
            f"{run.config} is missing, and {'no' if newest is None else 'the newest'} checkpoint"
            " says what it was: nothing could tell whether this command is of the same run\n"
            f"remedy: restore the file; {run.path / 'command.txt'} has the first start's command"
        )
    write_text(run.config, OmegaConf.to_yaml(OmegaConf.create(content)))
    return f"{run.config} was missing: restored from the checkpoint of step {newest[0]}"


def _move_records(run: RunDirectory) -> Path:
    number = 1
    while (folder := run.path / f"before-{number}").exists():
        number += 1
    folder.mkdir()
    for name in _RECORDS:
        path = run.path / name
        if path.exists():
            path.rename(folder / name)
    return folder
