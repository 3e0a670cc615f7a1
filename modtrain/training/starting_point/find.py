"""Find the checkpoint of another run that a run starts from, and check that it can."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from modtrain.checkpoint.layout import MANIFEST
from modtrain.checkpoint.recovery import find_checkpoint, whole_checkpoints
from modtrain.common.atomic_io import file_sha256, write_bytes
from modtrain.common.errors import CheckpointError, StartingPointError
from modtrain.common.reading import MAX_LINE_BYTES, UnreadableError, read_bytes
from modtrain.training.config import TrainConfig
from modtrain.training.named_runs import open_run
from modtrain.training.plan import TrainingPlan
from modtrain.training.run_directory import RunDirectory
from modtrain.training.starting_point.branch import check_branch
from modtrain.training.starting_point.compatibility import check_weights, tokenizer_mismatch
from modtrain.training.starting_point.tensor_map import TensorMap

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parent:
    """What a run's manifest keeps of the checkpoint that the run started from.

    how: ``branch`` or ``init``. run: the directory. digest: SHA-256 of the checkpoint's manifest,
    which has the checksums of all its files.
    """

    how: str
    run: str
    step: int
    digest: str

    def __str__(self) -> str:
        """Return the run and the step."""
        return f"{self.run}, step {self.step}"


@dataclass(frozen=True)
class StartingPoint:
    """Where a run begins that has no checkpoint of its own.

    step: steps that are behind it. path: the parent's checkpoint. tensors: the weights to take from
    it at step 0; None: everything in it. notes: lines to print.
    """

    step: int = 0
    path: Path | None = None
    parent: Parent | None = None
    tensors: TensorMap | None = None
    notes: tuple[str, ...] = ()

    @property
    def record(self) -> dict[str, Any] | None:
        """The parent as plain data, for the run's manifest."""
        return None if self.parent is None else asdict(self.parent)


def find_starting_point(
    config: TrainConfig, plan: TrainingPlan, data_fingerprint: str
) -> StartingPoint:
    """Return where the run ``config`` begins that has no checkpoint; of initial weights step 0.

    A run that was started before begins with the checkpoint that its manifest names.

    config, plan: resolved. data_fingerprint: of the data that it will read.

    Raises:
        StartingPointError: the other run or its checkpoint is not there, or does not fit: all that
            differs; or it is not the checkpoint of the first start.
        CheckpointError: the checkpoint is damaged.
    """
    branch, init = config.branch, config.init
    if branch.run is not None:
        parent_run = _open_parent(config.runs_dir, branch.run, "branch.run")
        check_branch(config, plan, data_fingerprint, parent_run)
        step, path = _find_checkpoint(parent_run, branch.step)
        return StartingPoint(step, path, _parent("branch", config, parent_run, step, path))
    if init.run is None:
        return StartingPoint()
    parent_run = _open_parent(init.runs_dir or config.runs_dir, init.run, "init.run")
    recorded = recorded_parent(RunDirectory.of(config))
    wanted = init.step if recorded is None else int(recorded["step"])
    step, path = _find_checkpoint(parent_run, wanted)
    parent = _parent("init", config, parent_run, step, path)
    tensors, notes = check_weights(config, parent_run, path, str(parent))
    return StartingPoint(0, path, parent, tensors, notes)


def _open_parent(runs_dir: str, name: str, key: str) -> RunDirectory:
    try:
        return open_run(runs_dir, name, key)
    except CheckpointError as error:
        raise StartingPointError(str(error)) from None


def _find_checkpoint(run: RunDirectory, step: int | None) -> tuple[int, Path]:
    """Return what `find_checkpoint` does; one that is not there is no reason to try again."""
    steps = [step for step, _ in whole_checkpoints(run.checkpoints)]
    is_there = bool(steps) if step is None else step in steps
    try:
        return find_checkpoint(run.checkpoints, step)
    except CheckpointError as error:
        raise error if is_there else StartingPointError(str(error)) from None


def inherit_prompt_format(parent: Parent | None, run: RunDirectory, config: TrainConfig) -> None:
    """Copy how the parent's model wants its prompts into ``run``, if its directory says so.

    Its numbers are those of the parent's tokenizer: of data with another one nothing is taken.

    Raises:
        CheckpointError: the parent's file cannot be read.
    """
    if parent is None:
        return
    origin = RunDirectory(Path(parent.run))
    source = origin.prompt_format
    if not source.exists():
        return
    if reason := tokenizer_mismatch(config, origin, origin.read_config()):
        log.warning("the prompt format of %s is not taken over: %s", parent.run, reason)
        return
    try:
        content = read_bytes(source, MAX_LINE_BYTES)
    except UnreadableError as error:
        raise CheckpointError(f"{source.parent}/{error}\nremedy: import that run again") from None
    write_bytes(run.prompt_format, content, run.path)


def recorded_parent(run: RunDirectory) -> Mapping[str, Any] | None:
    """Return the parent that the run's manifest names; None where there is none.

    Raises:
        CheckpointError: the manifest is damaged.
    """
    if not run.manifest.is_file():
        return None
    parent = run.read_manifest().get("parent")
    if parent is None:
        return None
    kinds = {"how": str, "run": str, "step": int, "digest": str}
    if not isinstance(parent, Mapping) or any(
        not isinstance(parent.get(key), kind) for key, kind in kinds.items()
    ):
        raise CheckpointError(
            f"{run.manifest} names no run, step and digest in parent\nremedy: remove the file, and"
            " start the run again, which restores it from the newest checkpoint"
        )
    return parent


def _parent(how: str, config: TrainConfig, run: RunDirectory, step: int, path: Path) -> Parent:
    parent = Parent(how, str(run.path), step, file_sha256(path / MANIFEST))
    own = RunDirectory.of(config)
    recorded = recorded_parent(own)
    if recorded is not None and recorded["digest"] != parent.digest:
        raise StartingPointError(
            f"{path} is another checkpoint than the one that {own.path} started from\n"
            "remedy: restore that one, or give another name= for a new run"
        )
    return parent
