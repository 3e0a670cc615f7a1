"""Which checkpoint to resume from: the newest whole one, on which all ranks agree.

Rank 0 lists the checkpoints, each rank reads its share of the files, and damage that one rank finds
is known to all. Only rank 0 renames and removes.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from modtrain.checkpoint.layout import (
    STEP_PREFIX,
    TEMPORARY_PREFIX,
    Manifest,
    checkpoint_path,
    verify,
)
from modtrain.common.errors import CheckpointError
from modtrain.common.reading import set_aside
from modtrain.distributed.process_group import ONE_PROCESS, Ranks

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Candidate:
    """A directory that is named like a checkpoint.

    manifest: None if it is damaged. damage: what is wrong with it; empty if nothing is.
    """

    path: Path
    manifest: Manifest | None
    damage: str = ""

    @classmethod
    def read(cls, path: Path) -> _Candidate:
        try:
            return cls(path, Manifest.read(path))
        except CheckpointError as error:
            return cls(path, None, str(error))

    @property
    def step(self) -> int:
        """The manifest's step; without one that of the name, or -1."""
        if self.manifest is not None:
            return self.manifest.step
        return int(self.number) if self.number else -1

    @property
    def number(self) -> str:
        """The number in the name; empty if it is not one that modtrain gives."""
        number = self.path.name.removeprefix(STEP_PREFIX)
        is_own = number.isdecimal() and checkpoint_path(self.path.parent, int(number)) == self.path
        return number if is_own else ""

    @property
    def is_named_by_step(self) -> bool:
        """Whether it has the name that modtrain gives to its step."""
        return bool(self.number) and int(self.number) == self.step


def whole_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """List (step, path) of the checkpoints under ``root`` that look whole, oldest first.

    The step is the manifest's, not the name's; of two with one step the one named by it counts.
    Sizes of files are compared, contents are not.

    Raises:
        CheckpointError: ``root`` cannot be listed.
    """
    return [(candidate.step, candidate.path) for candidate in _whole_candidates(root)]


def named_checkpoints(root: Path) -> list[Path]:
    """List what is named like a checkpoint under ``root``, damaged or not, by name.

    Raises:
        CheckpointError: it cannot be listed.
    """
    return sorted(_list(root, STEP_PREFIX))


def latest(
    root: Path, ranks: Ranks = ONE_PROCESS, before: int | None = None
) -> tuple[int, Path] | None:
    """Return (step, path) of the newest checkpoint with no damaged byte, None without one.

    Collective over ``ranks``, which share the reading and get the same result. before: only
    checkpoints of earlier steps count.
    """

    def newest_first() -> list[_Candidate]:
        candidates = _whole_candidates(root)[::-1]
        return [c for c in candidates if before is None or c.step < before]

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
    returned one are renamed to ``damaged-…``, so that their steps can be saved again; one with the
    name of another step gets its own, or becomes ``duplicate-…``. Collective over ``ranks``, which
    share the reading and get the same result.

    Raises:
        CheckpointError, RankError: on every rank: ``root`` cannot be listed, there are checkpoints
            and none is whole, or a damaged one cannot be renamed.
    """

    def newest_first() -> list[_Candidate]:
        for path in _list(root, TEMPORARY_PREFIX):
            shutil.rmtree(path, ignore_errors=True)
        for candidate in _candidates(root):
            _settle_name(candidate)
        return _candidates(root)

    newest, damaged = _newest_whole(newest_first, ranks)
    if damaged and newest is None:
        # All of them: more likely a disk, a node or a version of modtrain than flipped bits.
        reasons = "".join(f"\n  {reason}" for _, reason in damaged)
        raise CheckpointError(
            f"none of the checkpoints under {root} can be used:{reasons}\n"
            "remedy: repair what keeps them from being read; to start over, move them elsewhere and"
            " add resume=fresh"
        )
    with ranks.raise_on_all_ranks():
        for path, reason in damaged if ranks.is_rank0 else ():
            # Its step can then be saved again.
            log.warning("%s; kept as %s", reason, set_aside(path).name)
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
    for candidate in reversed(_whole_candidates(root)):
        step, path = candidate.step, candidate.path
        if not candidate.is_named_by_step:
            # A user's copy.
            continue
        if num_kept < keep_last:
            num_kept += not contents or _looks_whole(candidate, contents=True)
        elif step not in keep_steps and (keep_every is None or step % keep_every):
            # Renamed first: an interrupted removal must not leave a directory that looks whole.
            doomed = path.with_name(TEMPORARY_PREFIX + "removed-" + path.name)
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
            removed.append(path)
    return removed[::-1]


def _list(root: Path, prefix: str) -> list[Path]:
    """Return the paths in ``root`` whose names begin with ``prefix``; none if it is not there.

    Raises:
        CheckpointError: it cannot be listed: whether it has checkpoints is then unknown.
    """
    try:
        return [path for path in root.iterdir() if path.name.startswith(prefix)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(
            f"{root} cannot be listed: {error.strerror}. It may have checkpoints, so nothing starts"
            " without them\nremedy: let the user of this process read the directory"
        ) from None


def _candidates(root: Path) -> list[_Candidate]:
    """List the newest first; of one step, the one named by it first."""
    candidates = [_Candidate.read(path) for path in _list(root, STEP_PREFIX)]
    return sorted(candidates, key=lambda c: (c.step, c.is_named_by_step, c.path), reverse=True)


def _whole_candidates(root: Path) -> list[_Candidate]:
    """List those that look whole, one for each step, oldest first."""
    whole: dict[int, _Candidate] = {}
    for candidate in _candidates(root):
        if candidate.step not in whole and _looks_whole(candidate):
            whole[candidate.step] = candidate
    return list(whole.values())[::-1]


def _looks_whole(candidate: _Candidate, contents: bool = False) -> bool:
    damage = candidate.damage
    try:
        if candidate.manifest is not None:
            candidate.manifest.check(candidate.path, contents=contents)
    except CheckpointError as error:
        damage = str(error)
    if damage:
        log.warning("skipping a checkpoint: %s", damage)
    return not damage


def _settle_name(candidate: _Candidate) -> None:
    """Rename a checkpoint with the name of another step, which would be in that one's way."""
    path, step = candidate.path, candidate.step
    if candidate.manifest is None or candidate.is_named_by_step:
        return
    if not candidate.number:
        log.warning(
            "%s is a checkpoint of step %d under a name of its own: it is used if no other of that"
            " step is whole, and never removed",
            *(path, step),
        )
        return
    named = checkpoint_path(path.parent, step)
    if named.exists():
        named = set_aside(path, "duplicate")
    else:
        path.rename(named)
    log.warning("%s was the checkpoint of step %d: renamed to %s", path, step, named.name)


def _newest_whole(
    list_candidates: Callable[[], list[_Candidate]], ranks: Ranks
) -> tuple[tuple[int, Path] | None, list[tuple[Path, str]]]:
    """Return (step, path) of the first whole one of rank 0's candidates, and the damaged before."""
    damaged: list[tuple[Path, str]] = []
    for candidate in ranks.run_on_rank0(list_candidates):
        path, manifest = candidate.path, candidate.manifest
        reason = candidate.damage or _damage(path, manifest, ranks)
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
