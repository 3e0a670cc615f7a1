"""Names of checkpoint directories and files, and the manifest of a checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modtrain.common.atomic_io import digest, file_sha256
from modtrain.common.errors import CheckpointError
from modtrain.common.reading import UnreadableError, read_json

FORMAT = 3
STEP_PREFIX, TEMPORARY_PREFIX = "step-", ".writing-"
MANIFEST, EXTRA_STATE = "manifest.json", "state.pt"


def checkpoint_path(root: Path, step: int) -> Path:
    """Return the directory of the checkpoint of ``step`` under ``root``."""
    return root / f"{STEP_PREFIX}{step:09d}"


def temporary_path(path: Path) -> Path:
    """Return the directory in which the checkpoint ``path`` is written before it is renamed."""
    return path.with_name(TEMPORARY_PREFIX + path.name)


@dataclass(frozen=True)
class Manifest:
    """The files of a whole checkpoint.

    files: name → ``bytes`` and ``sha256``. world_size: how many ranks wrote it.
    """

    step: int
    files: dict[str, dict[str, Any]]
    world_size: int = 1

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(int(entry["bytes"]) for entry in self.files.values())

    def write(self, folder: Path) -> None:
        """Write the manifest into ``folder``."""
        content = {"format": FORMAT, **vars(self), "files": dict(sorted(self.files.items()))}
        content["digest"] = digest(content)
        (folder / MANIFEST).write_text(json.dumps(content, indent=1))

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read the manifest of the checkpoint ``path``.

        Raises:
            CheckpointError: there is none, it is of another format, or names files elsewhere.
        """
        try:
            content = read_json(path / MANIFEST)
            saved_digest = content.pop("digest", None)
            version, world_size = content["format"], int(content.get("world_size", 1))
            files = {
                str(name): {"bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])}
                for name, entry in content["files"].items()
            }
            manifest = cls(int(content["step"]), files, world_size)
        except (UnreadableError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is not a whole checkpoint: {error}") from None
        if version != FORMAT:
            raise CheckpointError(f"{path} has format {version}; this modtrain reads {FORMAT}")
        if saved_digest != digest(content):
            raise CheckpointError(f"{path / MANIFEST} was altered: its digest does not match")
        for name in files:
            if not is_plain_name(name):
                raise CheckpointError(f"{path} names a file outside of it: {name}")
        return manifest

    def check(self, path: Path, rank: int = 0, world_size: int = 1, contents: bool = True) -> None:
        """Compare ``rank``'s share of the files of ``path``: every ``world_size``-th.

        contents: also compare checksums, which reads every byte.

        Raises:
            CheckpointError: a file is missing, of another size, altered, or cannot be read.
        """
        for name in sorted(self.files)[rank::world_size]:
            file, expected = path / name, self.files[name]
            try:
                if not file.is_file():
                    raise CheckpointError(f"{path} lacks its file {name}")
                if file.stat().st_size != (size := expected["bytes"]):
                    raise CheckpointError(f"{file} has another size than {size} bytes")
                if contents and file_sha256(file) != expected["sha256"]:
                    raise CheckpointError(f"{file} does not match its checksum")
            except OSError as error:
                raise CheckpointError(f"{file} cannot be read: {error}") from None


def is_plain_name(name: str) -> bool:
    """Whether ``name`` names a file in the directory itself."""
    return Path(name).name == name and name not in ("", ".", "..")


def verify(path: Path, contents: bool = True) -> int:
    """Check the checkpoint ``path`` as `Manifest.check` does, and return its step."""
    manifest = Manifest.read(path)
    manifest.check(path, contents=contents)
    return manifest.step
