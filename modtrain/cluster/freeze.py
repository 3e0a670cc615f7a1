"""A copy of the code that a job runs, so that later edits do not affect pending jobs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import modtrain
from modtrain.common.atomic_io import write_text
from modtrain.training.run_directory import VERSION_FILE, ask_git, code_version

_PARTS = ("modtrain", "conf", "slurm")


def freeze(directory: Path, config_dir: Path | None = None) -> Path:
    """Copy the code, the configurations and the scripts below ``directory``; return the copy.

    Equal code shares one copy, ``<directory>/code/<digest>``. An existing copy is never changed.

    config_dir: of the user's own YAML; it is copied as ``own_conf``.
    """
    files = _files()
    if config_dir is not None:
        files |= _files_below(config_dir, Path("own_conf"))
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        digest.update(f"{name}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    target = directory / "code" / digest.hexdigest()[:12]
    if target.is_dir():
        return target
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    for name, path in files.items():
        (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, temporary / name)
    write_text(temporary / VERSION_FILE, json.dumps(code_version()))
    temporary.rename(target)
    return target


def _files() -> dict[Path, Path]:
    """Return the files of the running modtrain, by their paths in a copy."""
    package = Path(modtrain.__file__).parent
    root = package.parent
    folders = {part: root / part for part in _PARTS}
    if (package / "conf").is_dir():
        # Installed: scripts are inside the package; a job's script expects them beside it.
        folders = {"modtrain": package, "slurm": package / "slurm"}
    elif (tracked := _tracked(root)) is not None:
        return {name: root / name for name in tracked if (root / name).is_file()}
    files: dict[Path, Path] = {}
    for part, folder in folders.items():
        files |= _files_below(folder, Path(part))
    return files


def _tracked(root: Path) -> list[Path] | None:
    """Return the files that git tracks or would add; None outside a checkout."""
    if not (root / ".git").exists():
        return None
    listed = ("ls-files", "-z", "--cached", "--others", "--exclude-standard", "--")
    try:
        output = ask_git(root, *listed, *_PARTS)
    except (OSError, subprocess.SubprocessError):
        return None
    return [Path(os.fsdecode(name)) for name in output.split(b"\0") if name]


def _files_below(folder: Path, part: Path) -> dict[Path, Path]:
    """Return the files below ``folder``, by their paths below ``part`` of a copy."""
    return {
        part / path.relative_to(folder): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
