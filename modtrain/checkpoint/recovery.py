"""Which checkpoint to go on from: the newest whole one, on which all ranks agree.

Rank 0 lists and tells the others, each rank reads its share of the files, and what one of them
finds wrong all of them hear. Only rank 0 renames and removes.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TypeVar

from modtrain.checkpoint.layout import ASIDE, PREFIX, Manifest, verify
from modtrain.common.errors import CheckpointError
from modtrain.distributed.process_group import Ranks

T = TypeVar("T")
log = logging.getLogger(__name__)

# What rank 0 tells of a candidate: its path, its manifest, or what is wrong with that.
_Candidate = tuple[Path, Manifest | None, str]


def whole_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """List (step, path) of the checkpoints under ``root`` that look whole, oldest first.

    What counts is the manifest inside, not the name. Sizes are compared, contents are not.
    """
    paths = root.glob(f"{PREFIX}*") if root.is_dir() else ()
    steps = ((_step_if_whole(path, contents=False), path) for path in paths)
    return sorted((step, path) for step, path in steps if step is not None)


def latest(root: Path, ranks: Ranks | None = None) -> tuple[int, Path] | None:
    """Return (step, path) of the newest checkpoint whose every byte is right, None without one.

    ranks: share the reading and get the same answer; collective. None: this process alone.
    """

    def newest_first() -> list[_Candidate]:
        return [_candidate(path) for _, path in reversed(whole_checkpoints(root))]

    for path, manifest, said in _checked(newest_first, ranks):
        if manifest is not None and not said:
            return manifest.step, path
        if _is_first(ranks):
            log.warning("passing over a checkpoint: %s", said)
    return None


def chosen(root: Path, step: int | None) -> tuple[int, Path]:
    """Return (step, path) of the whole checkpoint of ``step``, or of the newest one for None.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    if step is None:
        newest = latest(root)
        if newest is None:
            raise CheckpointError(f"{root} holds no whole checkpoint: train first")
        return newest
    steps = dict(whole_checkpoints(root))
    if step not in steps:
        there = ", ".join(map(str, steps)) or "none"
        raise CheckpointError(f"{root} has no checkpoint of step={step}; there are: {there}")
    verify(steps[step])
    return step, steps[step]


def with_chosen(root: Path, step: int | None, use: Callable[[int, Path], T]) -> T:
    """Return what ``use`` makes of (step, path) of the checkpoint that is `chosen`.

    A run that trains may remove it meanwhile: then the choice is made again.

    Raises:
        CheckpointError: as `chosen` does.
    """
    while True:
        found, path = chosen(root, step)
        try:
            return use(found, path)
        except (CheckpointError, OSError):
            if path.exists():
                raise


def recover(root: Path, ranks: Ranks | None = None) -> tuple[int, Path] | None:
    """Make ``root`` fit to go on from: return what `latest` would, with nothing in the way.

    What an interrupted save or removal left is removed. Damaged checkpoints newer than the one
    returned are kept under the name ``damaged-…``, so that their steps can be saved again.

    ranks: share the reading and get the same answer; collective. None: this process alone.

    Raises:
        CheckpointError, RankError: there are some, and none is whole; or a damaged one cannot be
            moved away. On every rank.
    """

    def newest_first() -> list[_Candidate]:
        for path in root.glob(f"{ASIDE}*"):
            shutil.rmtree(path, ignore_errors=True)
        return [_candidate(path) for path in sorted(root.glob(f"{PREFIX}*"), reverse=True)]

    wrong: list[tuple[Path, str]] = []
    for path, manifest, said in _checked(newest_first, ranks):
        if manifest is not None and not said:
            with _together(ranks):
                if _is_first(ranks):
                    for damaged, why in wrong:
                        _put_away(damaged, why)
            return manifest.step, path
        wrong.append((path, said))
    if wrong:
        # All of them: rather a disk, a node or a version of modtrain than as many flipped bits.
        reasons = "".join(f"\n  {said}" for _, said in wrong)
        raise CheckpointError(
            f"none of the checkpoints under {root} can be used:{reasons}\n"
            "remedy: mend what keeps them from being read; or, to begin anew, move them away"
        )
    return None


def prune(root: Path, keep_last: int, keep_every: int | None, contents: bool = False) -> list[Path]:
    """Remove whole checkpoints but the newest ``keep_last`` and multiples of ``keep_every``.

    contents: read what is kept; a damaged one does not count, and another is kept in its place.

    Returns the removed ones.
    """
    kept, removed = 0, []
    for step, path in reversed(whole_checkpoints(root)):
        if kept < keep_last:
            kept += not contents or _step_if_whole(path, contents=True) is not None
        elif keep_every is None or step % keep_every:
            # Renamed first: a removal cut short must not leave a directory that looks whole.
            doomed = path.with_name(ASIDE + "removed-" + path.name)
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
            removed.append(path)
    return removed[::-1]


def _step_if_whole(path: Path, contents: bool) -> int | None:
    try:
        return verify(path, contents)
    except CheckpointError as error:
        log.warning("passing over a checkpoint: %s", error)
        return None


def _is_first(ranks: Ranks | None) -> bool:
    return ranks is None or ranks.is_rank0


def _together(ranks: Ranks | None) -> AbstractContextManager[None]:
    return nullcontext() if ranks is None else ranks.raise_on_all_ranks()


def _candidate(path: Path) -> _Candidate:
    try:
        return path, Manifest.read(path), ""
    except CheckpointError as error:
        return path, None, str(error)


def _checked(
    candidates: Callable[[], list[_Candidate]], ranks: Ranks | None
) -> Iterator[_Candidate]:
    """Go through rank 0's candidates with what is wrong with each, the same on every rank."""
    found: list[_Candidate] = []
    with _together(ranks):
        if _is_first(ranks):
            found = candidates()
    found = found if ranks is None else ranks.broadcast_from_rank0(found)
    for path, manifest, said in found:
        yield path, manifest, said or _wrong(path, manifest, ranks)


def _wrong(path: Path, manifest: Manifest | None, ranks: Ranks | None) -> str:
    """Return what any rank finds wrong with its share, or nothing."""
    own = ""
    rank, world_size = (0, 1) if ranks is None else (ranks.rank, ranks.world_size)
    try:
        if manifest is not None:
            manifest.check(path, rank, world_size)
    except CheckpointError as error:
        own = str(error)
    told = [own] if ranks is None else ranks.all_gather_object(own)
    return next((said for said in told if said), "")


def _put_away(path: Path, said: str) -> None:
    kept = path.with_name(f"damaged-{path.name}")
    while kept.exists():
        kept = kept.with_name(kept.name + "-again")
    path.rename(kept)
    log.warning("%s; kept as %s", said, kept.name)
