"""What a start does where a run's checkpoints or its configuration are gone.

Neither may pass for a run that never started: its first steps would be made again over its records,
or the rest of them with another configuration.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from omegaconf import OmegaConf

from modtrain.checkpoint.reading import read_extra_state
from modtrain.checkpoint.recovery import latest, named_checkpoints
from modtrain.common.atomic_io import write_text
from modtrain.common.errors import CheckpointError
from modtrain.common.reading import UnreadableError, read_or_set_aside, read_text
from modtrain.training.config import TrainConfig
from modtrain.training.run_directory import RunDirectory, read_manifest

_RECORDS = (
    *("config.yaml", "command.txt", "manifest.json", "metrics.jsonl", "events.jsonl"),
    *("step_times.jsonl", "slow_nodes.json"),
    *(
        "metrics.csv",
        "left_out.json",
        "mixture.jsonl",
        "result.json",
        "saved_step",
        "wandb_id",
        "wandb",
        "tensorboard",
    ),
    "checkpoints",
)
"""What a run records. Not its logs, which this process writes already, nor a job's files."""
_RESULTS = ("eval-*", "sweep-*", "tasks-*", "inspect-*")


def settle_records(run: RunDirectory, config: TrainConfig) -> str:
    """Restore what a checkpoint has, or move old records aside; return a message, or nothing.

    What only tells about the run is set aside where it is damaged.

    Raises:
        CheckpointError: the run has no checkpoints left, and ``config.resume`` is ``auto``; or a
            configuration that no checkpoint has.
    """
    read_or_set_aside(run.manifest, read_manifest)
    if named_checkpoints(run.checkpoints):
        lost = [path for path in (run.config, run.manifest) if not path.is_file()]
        return _restore(run, lost) if lost else ""
    saved = _saved_step(run)
    # Where the configuration is lost, no directory of checkpoints says that it never saved.
    is_new = run.checkpoints.is_dir() if run.config.is_file() else not _has_metrics(run)
    if saved is None and is_new:
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


def _saved_step(run: RunDirectory) -> str | None:
    """Return the step that was saved last; None where none was, nothing where it is not known."""
    if not os.path.lexists(run.saved_step):
        return None
    try:
        return read_text(run.saved_step, 100).strip()
    except UnreadableError:
        return ""


def _has_metrics(run: RunDirectory) -> bool:
    return run.metrics.is_file() and run.metrics.stat().st_size > 0


def _restore(run: RunDirectory, lost: list[Path]) -> str:
    newest = latest(run.checkpoints)
    saved = {} if newest is None else read_extra_state(newest[1])
    if run.config in lost and "config" not in saved:
        raise CheckpointError(
            f"{run.config} is missing, and {'no' if newest is None else 'the newest'} checkpoint"
            " says what it was: nothing could tell whether this command is of the same run\n"
            f"remedy: restore the file; {run.path / 'command.txt'} has the first start's command"
        )
    names = " and ".join(map(str, lost))
    if run.config in lost:
        write_text(run.config, OmegaConf.to_yaml(OmegaConf.create(saved["config"])))
    if run.manifest in lost:
        if saved.get("data_fingerprint") is None:
            # Of an earlier version.
            return f"{names} is missing: the data are taken for the ones that it was trained on"
        manifest = {"data_fingerprint": saved["data_fingerprint"], "starts": []}
        if saved.get("parent") is not None:
            manifest["parent"] = saved["parent"]
        write_text(run.manifest, json.dumps(manifest))
    return f"{names} was missing: restored from the newest checkpoint"


def _move_records(run: RunDirectory) -> Path:
    number = 1
    while (folder := run.path / f"before-{number}").exists():
        number += 1
    folder.mkdir()
    for path in [*(run.path / name for name in _RECORDS), *_results(run)]:
        if os.path.lexists(path):
            path.rename(folder / path.name)
    return folder


def _results(run: RunDirectory) -> list[Path]:
    """List what verbs have found out about the checkpoints that are lost."""
    paths = [path for pattern in _RESULTS for path in run.path.glob(pattern)]
    return [path for path in paths if path.is_file()]
