"""Images of docker/Dockerfile, built and run by Debian's buildah: it needs no engine, but root."""

import ast
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from tests.docker.test_images import DOCKER, run

BASE = "localhost/debian-python:bookworm"
# What the base image has beside Debian: a Python with pip, and headers, which Inductor includes.
_PACKAGES = "python3.11 python3.11-venv libpython3.11-dev ca-certificates"
_MAKE_PYTHON = f"""
export DEBIAN_FRONTEND=noninteractive
apt-get update -q && apt-get install -qy --no-install-recommends {_PACKAGES}
apt-get clean && rm -rf /var/lib/apt/lists/*
python3.11 -m venv /opt/python
"""
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def missing() -> str | None:
    """Return why no image can be built here; None where one can."""
    if os.geteuid() != 0:
        return "only root may build without an engine"
    tools = ("buildah", "debootstrap")
    if os.environ.get("CI") and shutil.which("apt-get") and not all(map(shutil.which, tools)):
        subprocess.run(["apt-get", "update", "-q"], check=False)
        install = ["apt-get", "install", "-qy", "--no-install-recommends", *tools]
        subprocess.run(install, check=False)
    lacking = [tool for tool in tools if shutil.which(tool) is None]
    if lacking:
        return f"apt install {' '.join(lacking)}"
    if subprocess.run(["unshare", "--mount", "true"], check=False).returncode:
        return "no right to make namespaces"
    return None


@dataclass(frozen=True)
class Image:
    """A target that was built. seconds: what it took, by layers of the store where it has them."""

    builder: "Builder"
    name: str
    seconds: float

    @cached_property
    def config(self) -> dict[str, Any]:
        """What the image says of itself, as Docker has it."""
        shown = self.builder.buildah("inspect", "--type", "image", self.name).stdout
        return json.loads(shown)["Docker"]["config"]

    @property
    def variables(self) -> dict[str, str]:
        return dict(entry.split("=", 1) for entry in self.config["Env"])

    @property
    def num_bytes(self) -> int:
        """Of all its layers, uncompressed."""
        images = json.loads(self.builder.buildah("images", "--json").stdout)
        (entry,) = [i for i in images if self.name in (i["names"] or [])]
        amount, unit = entry["size"].split()
        return round(float(amount) * 1000 ** ("B", "KB", "MB", "GB").index(unit.upper()))

    def run(
        self, *arguments: str, user: int | None = None, workspace: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Start a container as Docker would: by the image's entry point, user and variables.

        user: another one, of whom the image has heard nothing. workspace: mounted as the image's
        working directory.
        """
        return self.execute(*self.config["Entrypoint"], *arguments, user=user, workspace=workspace)

    def execute(
        self, *command: str, user: int | None = None, workspace: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in a new container in the place of its entry point."""
        options = [] if user is None else ["--user", f"{user}:{user}"]
        if workspace is not None:
            options += ["--volume", f"{workspace}:{self.config['WorkingDir']}"]
        # One thread, as for all that tests run.
        options += ["--env", "OMP_NUM_THREADS=1"]
        container = self.builder.buildah("from", self.name).stdout.strip()
        try:
            return self.builder.call("run", *options, container, "--", *command)
        finally:
            self.builder.buildah("rm", container)


class Builder:
    """buildah with a store of its own, for layers and containers."""

    def __init__(self, store: Path) -> None:
        self.store = store
        store.mkdir(parents=True, exist_ok=True)
        lines = ["[storage]", 'driver = "overlay"']
        lines += [f'graphroot = "{store}/layers"', f'runroot = "{store}/run"']
        (store / "storage.conf").write_text("\n".join([*lines, ""]))

    def call(
        self, *arguments: object, program: str | Path = "buildah", **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command of buildah, or a program that calls it."""
        own = {"BUILDAH_ISOLATION": "chroot", "BUILDER": "buildah"}
        own["CONTAINERS_STORAGE_CONF"] = str(self.store / "storage.conf")
        return subprocess.run(
            [str(word) for word in (program, *arguments)],
            env={**os.environ, **own, **variables},
            capture_output=True,
            text=True,
            check=False,
        )

    def buildah(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run a command of buildah that must succeed."""
        done = self.call(*arguments)
        assert done.returncode == 0, f"{arguments}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done

    def make_base(self) -> None:
        """Debian 12 with Python 3.11 in the place of Docker Hub's, unless the store has it."""
        if self.call("inspect", "--type", "image", BASE).returncode == 0:
            return
        root = self.store / "debian"
        # What it mounts ends with it, however it ends.
        run("unshare", "--mount", "debootstrap", "--variant=minbase", "bookworm", root)
        container = self.buildah("from", "scratch").stdout.strip()
        self.buildah("copy", container, root, "/")
        shutil.rmtree(root)
        self.buildah("run", container, "--", "sh", "-euc", _MAKE_PYTHON)
        variables = (f"PATH=/opt/python/bin:{_PATH}", "LANG=C.UTF-8")
        self.buildah("config", *(f"--env={variable}" for variable in variables), container)
        self.buildah("commit", "--rm", "--format", "docker", container, BASE)

    def try_to_build(self, target: str, **arguments: str) -> subprocess.CompletedProcess[str]:
        """Build a target by `docker/build.sh`, with what pip has configured on this machine."""
        self.make_base()
        conf, places = pip_configuration()
        (self.store / "pip.conf").write_text(conf)
        given = {"PYTHON_IMAGE": BASE, **arguments}
        options = [word for pair in given.items() for word in ("--build-arg", "=".join(pair))]
        options += [word for place in places for word in ("--volume", f"{place}:{place}:ro")]
        build, configured = DOCKER / "build.sh", str(self.store / "pip.conf")
        return self.call(target, "--layers", *options, program=build, PIP_CONFIG_FILE=configured)

    def build(self, target: str, **arguments: str) -> Image:
        """Build a target.

        Raises:
            AssertionError: it cannot be built; with the end of what was printed.
        """
        began = time.monotonic()
        done = self.try_to_build(target, **arguments)
        assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-6000:]}"
        return Image(self, f"localhost/modtrain:{target}", time.monotonic() - began)


def pip_configuration() -> tuple[str, list[Path]]:
    """Return a pip.conf of what pip has configured here, and the files and folders it names."""
    listed = run(sys.executable, "-m", "pip", "config", "list").stdout
    kept = ("index-url", "extra-index-url", "find-links", "trusted-host", "cert", "timeout")
    settings = {}
    for line in listed.splitlines():
        key, _, value = line.partition("=")
        name = key.removeprefix(":env:.").rpartition(".")[2]
        if name in kept:
            settings[name] = ast.literal_eval(value).split()
    places = [word.removeprefix("file://") for words in settings.values() for word in words]
    # An index names its files by a path relative to it.
    paths = [Path(place) for place in places if place.startswith("/")]
    folders = [path.parent if path.name == "simple" else path for path in paths]
    lines = [f"{name} = {' '.join(words)}" for name, words in settings.items()]
    return "\n".join(["[global]", *lines, ""]), folders


def store(folder: Path) -> Path:
    """Return where layers are kept: in MODTRAIN_IMAGES for the next time, else in ``folder``."""
    kept = os.environ.get("MODTRAIN_IMAGES")
    return folder if kept is None else Path(kept)


def skip_unless_possible(free_gib: int, folder: Path) -> None:
    """Skip where no image can be built, or the disk has less than ``free_gib`` left."""
    if (reason := missing()) is not None:
        pytest.skip(f"NOT CHECKED, images: {reason}")
    free = shutil.disk_usage(folder).free / 2**30
    if free < free_gib:
        pytest.skip(f"NOT CHECKED, images: {free_gib} GiB of disk are needed, {free:.0f} are free")
