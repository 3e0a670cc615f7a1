"""Environments of their own, for programs whose packages are not modtrain's."""

import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def make_environment(folder: Path, *packages: str, constrained: bool = True) -> Path:
    """Make an environment with ``packages`` and what is installed here; return its Python.

    modtrain is not in it where it is installed from a checkout. constrained: install what
    ``constraints.txt`` names. Without a network the test is skipped.
    """
    venv.create(folder, with_pip=True)
    (site,) = folder.glob("lib/python*/site-packages")
    # Packages of the environment come first, and may be of other versions.
    (site / "shared.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    python = folder / "bin" / "python"
    command = [python, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    command += ["-c", ROOT / "constraints.txt"] if constrained else []
    done = subprocess.run(
        [*command, *packages], capture_output=True, text=True, check=False, cwd=folder
    )
    if done.returncode:
        pytest.skip(f"pip cannot install {', '.join(packages)}: {done.stderr.strip()[-200:]}")
    return python
