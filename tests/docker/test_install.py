"""What docker/install.sh and docker/build.sh ask pip and the builders for."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docker.test_images import CPU_INDEX, DOCKER, RECIPE, ROOT, locked, run

# In the place of Python: pip is not called, what it was to install is written down.
FAKE_PYTHON = r"""#!/bin/bash
[[ " $* " = *" pip "* ]] || exec "$REAL" "$@"
for word; do [[ $word != torch* ]] || torch=$word; done
echo "$*" >>"$LOG"
[[ -n ${torch:-} ]] || exit 0
[[ $torch != *+cpu || -n $HAS_CPU_BUILD ]] || exit 1
folder=$(echo "$VENV"/lib/python3*/site-packages)/torch
mkdir -p "$folder" && touch "$folder/__init__.py"
if [[ $torch = *+cpu || $* = */whl/cpu* ]]; then cuda=None; else cuda="'13.0'"; fi
echo "cuda = $cuda" >"$folder/version.py"
"""


@pytest.fixture
def dependencies(tmp_path):
    """Runs that step for a target, without pip; returns the process and what pip was asked."""
    fake = tmp_path / "python"
    fake.write_text(FAKE_PYTHON)
    fake.chmod(0o755)

    def call(target: str, has_cpu_build: bool = False, **variables: str):
        venv, log = tmp_path / "venv", tmp_path / "log"
        shutil.rmtree(venv, ignore_errors=True)
        log.write_text("")
        own = {"REAL": sys.executable, "PYTHON": str(fake), "LOG": str(log), "VENV": str(venv)}
        own["HAS_CPU_BUILD"] = "yes" if has_cpu_build else ""
        done = subprocess.run(
            ["bash", RECIPE, "dependencies", target, ROOT, venv],
            env={"PATH": os.environ["PATH"], **own, **variables},
            capture_output=True,
            text=True,
            check=False,
        )
        asked = log.read_text().splitlines()
        return done, [line.split("install ", 1)[1] for line in asked if "torch=" in line]

    return call


def test_torch_comes_from_pips_own_places_where_they_have_it(dependencies):
    version = str(locked()["torch"])
    plain = "--no-cache-dir --no-deps"
    assert dependencies("cpu", has_cpu_build=True)[1] == [f"{plain} torch=={version}+cpu"]
    done, asked = dependencies("cpu")
    assert asked[1:] == [f"{plain} --index-url {CPU_INDEX} torch=={version}"]
    assert f"it comes from {CPU_INDEX}" in done.stdout
    mine = {"TORCH_INDEX": "https://mine/simple", "PIP_CACHE_DIR": "/cache"}
    asked = dependencies("cpu", **mine)[1]
    assert asked == [f"--no-deps --index-url https://mine/simple torch=={version}"]
    # Three: no CPU build of that version, which pip would prefer.
    assert dependencies("cuda")[1] == [f"{plain} torch==={version}"]


def test_torch_of_another_cuda_is_not_built(dependencies):
    assert dependencies("cuda", CUDA_VERSION="13.0")[0].returncode == 0
    for given, message in (
        ({"CUDA_VERSION": "12.6"}, "torch brings CUDA 13.0, and CUDA_VERSION=12.6"),
        ({"TORCH_INDEX": CPU_INDEX}, "torch has no CUDA"),
    ):
        done, _ = dependencies("cuda", **given)
        assert done.returncode == 1
        assert message in done.stderr
    done, _ = dependencies("gpu")
    assert (done.returncode, "TARGET=gpu" in done.stderr) == (2, True)


@pytest.fixture
def builders(tmp_path, monkeypatch):
    """Programs that write down what they are called with, in the place of the real ones."""
    bash = Path(shutil.which("bash")).parent
    monkeypatch.setenv("PATH", f"{tmp_path}:{bash}:/usr/bin:/bin")
    for name in ("docker", "podman", "buildah"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho "{name} $*" >>{tmp_path}/calls\n')
        (tmp_path / name).chmod(0o755)
    return tmp_path


@pytest.mark.parametrize("builder", ["docker", "podman", "buildah"])
def test_the_builder_is_given_what_is_known(builders, builder):
    site = {"BUILDER": builder, "PIP_CONFIG_FILE": "/site/pip.conf"}
    run(DOCKER / "build.sh", "cuda-compile", "--pull", env={**os.environ, **site})
    build, images = (builders / "calls").read_text().splitlines()
    assert build.startswith(f"{builder} build --file {DOCKER}/Dockerfile --target cuda-compile ")
    assert build.endswith(f"--secret id=pip,src=/site/pip.conf --pull {ROOT}")
    assert images == f"{builder} images modtrain:cuda-compile"
    cuda = ".".join(str(part) for part in locked()["nvidia-cuda-runtime"].release[:2])
    assert f" --build-arg CUDA_VERSION={cuda} " in build
    head = run("git", "-C", ROOT, "rev-parse", "HEAD").stdout.strip()
    assert f" --build-arg REVISION={head}" in build
    assert ("--format docker" in build) == (builder != "docker")
