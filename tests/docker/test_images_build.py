"""The steps of an image's build, run for real into a folder of this system.

They need no root and no container engine; `test_images_built.py` has the images themselves.
"""

import os
import shutil
import venv
from pathlib import Path

import pytest
from packaging.version import Version

import modtrain
from tests.docker.test_images import ROOT, canonical, checkout, let_through, locked, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

PLAN = ("plan", "model=mod_60m", "data.seq_len=512", "budget.tokens=1e8")
HEALTHY = ("doctor", "require=[packages,corpus]")
# Minutes of work without a word would look like a hang.
BRIEF = {"PIP_PROGRESS_BAR": "off", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """What .dockerignore lets out of the checkout, and nothing else."""
    folder = tmp_path_factory.mktemp("context")
    for path in let_through(checkout()):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, folder / path)
    return folder


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """A Python of its own with pip, as the base image has one."""
    folder = tmp_path_factory.mktemp("python")
    venv.create(folder, with_pip=True)
    return folder / "bin/python"


@pytest.fixture(scope="module")
def environment(source, python, tmp_path_factory):
    """What the build stage leaves in /opt/modtrain."""
    folder = tmp_path_factory.mktemp("opt") / "modtrain"
    away = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    away |= {"PYTHON": str(python), **BRIEF}
    for step in (("dependencies", "cpu"), ("code",)):
        words = ("bash", source / "docker/install.sh", *step, source, folder)
        run(*words, env=away, cwd=folder.parent)
    return folder


def frozen(environment: Path, python: Path) -> dict[str, str]:
    listed = run(python, "-m", "pip", "--python", environment, "list", "--format=freeze").stdout
    return {canonical(name): v for name, v in (line.split("==") for line in listed.split())}


@pytest.mark.nightly
def test_the_environment_works_away_from_the_checkout(environment, python, tmp_path):
    bare = {"PATH": f"{environment}/bin:/usr/bin:/bin", "HOME": str(tmp_path), "COLUMNS": "200"}
    run("modtrain", *HEALTHY, cwd=tmp_path, env=bare)
    planned = run("modtrain", *PLAN, cwd=tmp_path, env=bare).stdout
    assert "FLOPs" in planned
    where = run("python", "-c", "import modtrain; print(modtrain.__file__)", cwd=tmp_path, env=bare)
    assert where.stdout.startswith(str(environment))
    assert not list(tmp_path.glob(".cache/pip"))


@pytest.mark.nightly
def test_every_package_is_as_it_is_locked(environment, python):
    there = frozen(environment, python)
    assert there.pop("modtrain") == modtrain.__version__
    assert "pip" not in there
    public = {name: Version(Version(version).public) for name, version in there.items()}
    assert {name: v for name, v in public.items() if locked().get(name) != v} == {}
