"""Which checkpoint to resume from: the newest whole one, on which all ranks agree.

Rank 0 lists the checkpoints, each rank reads its share of the files, and damage that one rank finds
is known to all. Only rank 0 renames and removes.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

from modtrain.checkpoint.layout import STEP_PREFIX, TEMPORARY_PREFIX, Manifest, verify
from modtrain.common.errors import CheckpointError
from modtrain.distributed.process_group import ONE_PROCESS, Ranks

T = TypeVar("T")
log = logging.getLogger(__name__)

# Path, manifest, and the damage, empty if there is none; the manifest is None if it is damaged.
_Candidate = tuple[Path, Manifest | None, str]


def whole_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """List (step, path) of the checkpoints under ``root`` that look whole, oldest first.

    The step is the manifest's, not the name's. Sizes of files are compared, contents are not.
    """
    paths = root.glob(f"{STEP_PREFIX}*") if root.is_dir() else ()
    steps = ((_step_if_whole(path, contents=False), path) for path in paths)
    return sorted((step, path) for step, path in steps if step is not None)


def latest(root: Path, ranks: Ranks = ONE_PROCESS) -> tuple[int, Path] | None:
    """Return (step, path) of the newest checkpoint with no damaged byte, None without one.

    Collective over ``ranks``, which share the reading and get the same result.
    """

    def newest_first() -> list[_Candidate]:
        return [_candidate(path) for _, path in reversed(whole_checkpoints(root))]

    newest, damaged = _newest_whole(newest_first, ranks)
    for _, damage in damaged if ranks.is_rank0 else ():
        log.warning("skipping a checkpoint: %s", damage)
    return newest


def find_checkpoint(root: Path, step: int | None) -> tuple[int, Path]:
    """Return (step, path) of the whole checkpoint of ``step``, or of the newest one for None.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    if step is None:
        newest = latest(root)
        if newest is None:
            raise CheckpointError(f"{root} has no whole checkpoint: train first")
        return newest
    paths = dict(whole_checkpoints(root))
    if step not in paths:
        steps = ", ".join(map(str, paths)) or "none"
        raise CheckpointError(f"{root} has no checkpoint of step={step}; there are: {steps}")
    verify(paths[step])
    return step, paths[step]


def with_checkpoint(root: Path, step: int | None, use: Callable[[int, Path], T]) -> T:
    """Return ``use(step, path)`` of the checkpoint that `find_checkpoint` returns.

    A run in training may remove it meanwhile: then another one is looked for.

    Raises:
        CheckpointError: as `find_checkpoint` does.
    """
    while True:
        found_step, path = find_checkpoint(root, step)
        try:
            return use(found_step, path)
        except (CheckpointError, OSError):
            if path.exists():
                raise


def recover(root: Path, ranks: Ranks = ONE_PROCESS) -> tuple[int, Path] | None:
    """Return the checkpoint to resume from, as `latest` does, and clean up ``root``.

    The remains of an interrupted save or removal are removed. Damaged checkpoints newer than the
    returned one are renamed to ``damaged-…``, so that their steps can be saved again. Collective
    over ``ranks``, which share the reading and get the same result.

    Raises:
        CheckpointError, RankError: on every rank: there are checkpoints and none is whole, or a
            damaged one cannot be renamed.
    """

    def newest_first() -> list[_Candidate]:
        for path in root.glob(f"{TEMPORARY_PREFIX}*"):
            shutil.rmtree(path, ignore_errors=True)
        return [_candidate(path) for path in sorted(root.glob(f"{STEP_PREFIX}*"), reverse=True)]

    newest, damaged = _newest_whole(newest_first, ranks)
    if damaged and newest is None:
        # All of them: more likely a disk, a node or a version of modtrain than flipped bits.
        reasons = "".join(f"\n  {reason}" for _, reason in damaged)
        raise CheckpointError(
            f"none of the checkpoints under {root} can be used:{reasons}\n"
            "remedy: repair what keeps them from being read; to start over, move them elsewhere"
        )
    with ranks.raise_on_all_ranks():
        for path, reason in damaged if ranks.is_rank0 else ():
            _quarantine(path, reason)
    return newest


def prune(
    root: Path,
    keep_last: int,
    keep_every: int | None,
    contents: bool = False,
    keep_steps: Collection[int] = (),
) -> list[Path]:
    """Remove whole checkpoints except the newest ``keep_last`` and those to stay for good.

    Multiples of ``keep_every`` and the steps of ``keep_steps`` stay for good.

    contents: read what is kept; a damaged one does not count, and another is kept in its place.

    Returns the removed ones.
    """
    num_kept, removed = 0, []
    for step, path in reversed(whole_checkpoints(root)):
        if num_kept < keep_last:
            num_kept += not contents or _step_if_whole(path, contents=True) is not None
        elif step not in keep_steps and (keep_every is None or step % keep_every):
            # Renamed first: an interrupted removal must not leave a directory that looks whole.
            doomed = path.with_name(TEMPORARY_PREFIX + "removed-" + path.name)
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
            removed.append(path)
    return removed[::-1]


def _step_if_whole(path: Path, contents: bool) -> int | None:
    try:
        return verify(path, contents)
    except CheckpointError as error:
        log.warning("skipping a checkpoint: %s", error)
        return None


def _candidate(path: Path) -> _Candidate:
    try:
        return path, Manifest.read(path), ""
    except CheckpointError as error:
        return path, None, str(error)


def _newest_whole(
    list_candidates: Callable[[], list[_Candidate]], ranks: Ranks
) -> tuple[tuple[int, Path] | None, list[tuple[Path, str]]]:
    """Return (step, path) of the first whole one of rank 0's candidates, and the damaged before."""
    damaged: list[tuple[Path, str]] = []
    for path, manifest, damage in ranks.run_on_rank0(list_candidates):
        reason = damage or _damage(path, manifest, ranks)
        if manifest is not None and not reason:
            return (manifest.step, path), damaged
        damaged.append((path, reason))
    return None, damaged


def _damage(path: Path, manifest: Manifest | None, ranks: Ranks) -> str:
    """Return the first damage that any rank finds in its share of the files, or nothing."""
    own = ""
    try:
        if manifest is not None:
            manifest.check(path, ranks.rank, ranks.world_size)
    except CheckpointError as error:
        own = str(error)
    return next((damage for damage in ranks.all_gather_object(own) if damage), "")


def _quarantine(path: Path, reason: str) -> None:
    """Rename a damaged checkpoint, so that its step can be saved again."""
    kept = path.with_name(f"damaged-{path.name}")
    while kept.exists():
        kept = kept.with_name(kept.name + "-again")
    path.rename(kept)
    log.warning("%s; kept as %s", reason, kept.name)
