"""The working directory inside an output: what an interrupted prepare leaves for the next one."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from modtrain.common.atomic_io import NoLocksError, acquire_lock
from modtrain.common.errors import DataError
from modtrain.data.stream.prepared import INDEX_NAME, SPLITS

WORK_NAME = ".work"
LOCK_NAME = "lock"

_log = logging.getLogger(__name__)


class InUseError(DataError):
    """Another process is preparing the same output."""

    def __init__(self, output: Path) -> None:
        super().__init__(f"another prepare is writing {output}. Wait for it.")


def make_folders(output: Path) -> Path:
    """Make the working directory inside ``output``, and the other folders. Returns it.

    Raises DataError for a directory of something else.
    """
    work = output / WORK_NAME
    # First: another task may make the working directory meanwhile, or finish everything.
    has_content = output.exists() and any(output.iterdir())
    if has_content and not work.exists() and not (output / INDEX_NAME).exists():
        raise DataError(
            f"{output} is not empty and was not made by prepare. Choose another output."
        )
    for folder in (work / "units", work / "shards", *(output / split for split in SPLITS)):
        folder.mkdir(parents=True, exist_ok=True)
    return work


@contextmanager
def work_directory(output: Path) -> Iterator[Path]:
    """The working directory inside ``output``, locked; it is left in place for the next run."""
    work = make_folders(output)
    in_use = InUseError(output)
    with ExitStack() as locks:
        try:
            locks.enter_context(acquire_lock(work / LOCK_NAME, in_use))
        except NoLocksError:
            _log.warning("%s cannot be locked: start no second prepare of it", output)
        shutil.rmtree(work / "staging", ignore_errors=True)
        (work / "staging").mkdir()
        yield work
