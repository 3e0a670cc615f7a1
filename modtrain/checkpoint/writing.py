"""One checkpoint written by all ranks: to a temporary directory, which rank 0 then renames."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.state_dict_saver import save as save_sharded

from modtrain.checkpoint.layout import EXTRA_STATE, MANIFEST, Manifest, temporary_path
from modtrain.checkpoint.parts import Part
from modtrain.checkpoint.reading import describe_failure, raise_interrupt
from modtrain.common.atomic_io import sync
from modtrain.common.errors import CheckpointError, RankError
from modtrain.distributed.process_group import Ranks

Files = dict[str, dict[str, Any]]


def write(
    path: Path,
    parts: Callable[[], list[Part]],
    extra_state: Any,
    step: int,
    ranks: Ranks,
    digest: str,
) -> None:
    """Write the checkpoint ``path``; collective.

    parts: called once, returns what this rank writes; those of all ranks make up every tensor.
    extra_state: everything else, of which rank 0's is written. digest: of the tensors' names and
    shapes; it must be the same on every rank.

    Raises:
        CheckpointError: on every rank, if one could not write its part. Nothing is left of it, and
            earlier checkpoints are untouched.
    """
    temporary = temporary_path(path)
    try:
        ranks.run_on_rank0(lambda: _make_directory(path, temporary))
        files = _write_parts(temporary, parts, ranks)
        reports = ranks.gather_object((socket.gethostname(), digest, files)) or []
        ranks.run_on_rank0(lambda: _commit(path, temporary, extra_state, step, reports))
    except (CheckpointException, Exception) as error:
        if ranks.is_rank0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise_interrupt(error)
        if isinstance(error, CheckpointError):
            raise
        if isinstance(error, RankError):
            # Rank 0 shows the remedy.
            raise CheckpointError(f"{path} could not be written: {error}") from error
        raise CheckpointError(
            f"{path} could not be written: {describe_failure(error)}. Earlier checkpoints are"
            " untouched. Free space or repair the disk, then rerun to resume"
        ) from error


def refuse_to_overwrite(path: Path) -> None:
    """Raise CheckpointError if ``path`` exists."""
    if path.exists():
        raise CheckpointError(f"{path} exists: a checkpoint is never written twice")


def _make_directory(path: Path, temporary: Path) -> None:
    refuse_to_overwrite(path)
    shutil.rmtree(temporary, ignore_errors=True)
    # Not its parents: a directory that vanished, such as a lost mount, must not be created again.
    temporary.mkdir()


def _write_parts(temporary: Path, parts: Callable[[], list[Part]], ranks: Ranks) -> Files:
    """Write this rank's tensors; return size and checksum of each file that it wrote."""
    writer = FileSystemWriter(temporary)
    writer.fs = files = _HashingFiles()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        save_sharded(
            {},
            storage_writer=writer,
            planner=_PartsPlanner(parts),
            process_group=ranks.group,
            no_dist=ranks.group is None,
        )
    return files.written


def _commit(
    path: Path, temporary: Path, extra_state: Any, step: int, reports: list[tuple[str, str, Files]]
) -> None:
    """Check that every rank's files are there, add rank 0's own, and rename the directory."""
    files: Files = {}
    for rank, (host, digest, rank_files) in enumerate(reports):
        if digest != reports[0][1]:
            raise CheckpointError(
                f"rank {rank} on {host} would save other tensors than rank 0: start all ranks"
                " with one configuration and one version of the code"
            )
        for name, entry in rank_files.items():
            file = temporary / name
            if not file.is_file() or file.stat().st_size != entry["bytes"]:
                raise CheckpointError(
                    f"{file}, written by rank {rank} on {host}, is not visible on rank 0:"
                    " checkpoints need a file system that all nodes share"
                )
        files |= rank_files
    own_files = _HashingFiles()
    with own_files.create_stream(temporary / EXTRA_STATE, "wb") as stream:
        torch.save(extra_state, stream)
    Manifest(step, files | own_files.written, len(reports)).write(temporary)
    for file in (temporary / EXTRA_STATE, temporary / MANIFEST, temporary):
        sync(file)
    temporary.rename(path)
    sync(path.parent)


class _PartsPlanner(DefaultSavePlanner):
    """Writes the parts that `parts_of` assigned; torch's planner would assign its own."""

    def __init__(self, parts: Callable[[], list[Part]]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._get_parts = parts
        self._parts: dict[MetadataIndex, Part] = {}

    def create_local_plan(self) -> SavePlan:
        # Called here because torch raises an error in one rank's plan on all ranks.
        self._parts = {part.item.index: part for part in self._get_parts()}
        self.plan = SavePlan([part.item for part in self._parts.values()])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._parts[write_item.index].tensor


class _HashingFiles(FileSystem):
    """Files whose checksum is computed while they are written, without reading them again."""

    def __init__(self) -> None:
        self.written: Files = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with _HashingStream(io.FileIO(path, mode)) as stream:
            try:
                yield stream
            except Exception as error:
                # torch.save raises its own error instead.
                raise stream.failure or error from error
        digest = stream.digest.hexdigest()
        self.written[Path(path).name] = {"bytes": stream.size, "sha256": digest}

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.written[Path(new_path).name] = self.written.pop(Path(path).name)

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        """Make nothing: rank 0 has made the directory, and must not be created again."""


class _HashingStream(io.BufferedWriter):
    def __init__(self, raw: io.FileIO) -> None:
        super().__init__(raw)
        self.size, self.digest = 0, hashlib.sha256()
        self.failure: OSError | None = None

    def write(self, content: Any) -> int:
        self.digest.update(content)
        try:
            written = super().write(content)
        except OSError as error:
            self.failure = error
            raise
        self.size += written
        return written

    def fileno(self) -> int:
        # Torch calls it to fsync, and does not flush before.
        self.flush()
        return super().fileno()
