"""The steps of an image's build, run for real where there is no container engine.

Once into a folder of this system, and once, by root, in a bare Debian under chroot.
"""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from packaging.version import Version

import modtrain
from tests.conftest import make_corpus
from tests.docker.test_images import CPU_INDEX, ROOT, canonical, checkout, let_through, locked, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

PLAN = ("plan", "model=mod_60m", "data.seq_len=512", "budget.tokens=1e8")
HEALTHY = ("doctor", "require=[packages,corpus]")
# Minutes of work without a word would look like a hang.
BRIEF = {"PIP_PROGRESS_BAR": "off", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
APT = {"DEBIAN_FRONTEND": "noninteractive"}


def torch_index() -> str:
    """Empty where this system's pip has other places configured: the wheel is looked for there."""
    output = run(sys.executable, "-m", "pip", "config", "list").stdout
    places = ("find-links", "index-url", "no-index")
    return "" if any(place in output for place in places) else CPU_INDEX


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
    away |= {"PYTHON": str(python), "TORCH_INDEX": torch_index(), **BRIEF}
    for step in ("dependencies", "code"):
        run("bash", source / "docker/install.sh", step, source, folder, env=away, cwd=folder.parent)
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


@pytest.fixture(scope="module")
def wheels(environment, python, tmp_path_factory):
    """All that the environment has, as files: the chroot needs no index, nor its configuration."""
    folder = tmp_path_factory.mktemp("wheels")
    names = [f"{n}=={v}" for n, v in frozen(environment, python).items() if n != "modtrain"]
    quiet = {**os.environ, **BRIEF, "DS_BUILD_OPS": "0"}
    pip = (python, "-m", "pip", "wheel", "--quiet", "--wheel-dir", folder)
    run(*pip, "--no-deps", *names, env=quiet)
    run(*pip, "hatchling", env=quiet)
    return folder


def debootstrap() -> str:
    """The program, or a skip with the reason why there is none."""
    if os.geteuid() != 0:
        pytest.skip("NOT CHECKED, the build in a bare Debian: only root may chroot")
    probe = subprocess.run(["unshare", "--mount", "--pid", "--fork", "true"], check=False)
    if probe.returncode:
        pytest.skip("NOT CHECKED, the build in a bare Debian: no right to make namespaces")
    if shutil.which("debootstrap") is None and os.environ.get("CI") and shutil.which("apt-get"):
        subprocess.run(["apt-get", "update", "-q"], check=False)
        subprocess.run(
            ["apt-get", "install", "-qy", "--no-install-recommends", "debootstrap"], check=False
        )
    path = shutil.which("debootstrap")
    if path is None:
        pytest.skip("NOT CHECKED, the build in a bare Debian: apt install debootstrap")
    return path


class Chroot:
    """A Debian in a folder. Its mounts are in a namespace that ends with each command."""

    ENTER = 'mount -t proc p "$0/proc"; mount -t tmpfs t "$0/dev/shm"; exec chroot "$@"'

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, *command: str, user: int = 0, **variables: str) -> subprocess.CompletedProcess:
        home = f"/home/{variables['USER']}" if user else "/root"
        path = "/opt/modtrain/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        given = {"PATH": path, "HOME": home, "OMP_NUM_THREADS": "1", **variables}
        inside = ["env", "-i", *(f"{name}={value}" for name, value in given.items()), *command]
        if user:
            inside = ["sh", "-c", f'cd {home} && exec "$@"', "sh", *inside]
        return subprocess.run(
            [
                *("unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-euc"),
                *(self.ENTER, str(self.folder), f"--userspec={user}:{user}", str(self.folder)),
                *inside,
            ],
            capture_output=True,
            text=True,
            check=False,
        )

    def must(self, *command: str, **options: object) -> str:
        done = self.run(*command, **options)
        assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout


@pytest.fixture(scope="module")
def image(source, wheels, tmp_path_factory):
    """The steps in the order of the Dockerfile, `compiler` left out. It is large: not kept."""
    program = debootstrap()
    root = tmp_path_factory.mktemp("debian")
    # Who is not root has to get into it.
    root.chmod(0o755)
    # What it mounts ends with it, however it ends.
    run("unshare", "--mount", program, "--variant=minbase", "bookworm", root)
    shutil.copytree(source, root / "src")
    shutil.copytree(wheels, root / "wheels")
    debian = Chroot(root)
    # The base image has Python's headers as well, which Inductor includes.
    python = ("python3.11", "python3.11-venv", "libpython3.11-dev", "ca-certificates")
    debian.must("apt-get", "update")
    debian.must("apt-get", "install", "-y", "--no-install-recommends", *python, **APT)
    debian.must("python3.11", "-m", "venv", "/opt/python")
    for step in (
        *(("user", "modtrain", "1000"), ("libraries",)),
        *((step, "/src", "/opt/modtrain") for step in ("dependencies", "code")),
        ("bare",),
    ):
        debian.must(
            *("bash", "/src/docker/install.sh", *step),
            **{"PYTHON": "/opt/python/bin/python", "PIP_NO_INDEX": "1", **BRIEF},
            PIP_FIND_LINKS="/wheels",
        )
    shutil.copyfile(source / "docker/install.sh", root / "install.sh")
    shutil.rmtree(root / "src")
    shutil.rmtree(root / "wheels")
    yield debian
    shutil.rmtree(root)


@pytest.mark.nightly
def test_a_bare_debian_prepares_and_trains_as_no_root_and_keeps_no_tools(image):
    home = image.folder / "home/modtrain"
    make_corpus(home / "corpus")

    def verb(*arguments: str) -> subprocess.CompletedProcess:
        return image.run("modtrain", *arguments, user=1000, USER="modtrain")

    prepare = ("prepare", "corpus=files", "sources=[corpus/*.txt]", "output=data/mine")
    train = ("train", "model=tiny", "data.path=data/mine", "budget.steps=3", "batch.tokens=256")
    small = ("batch.micro_batch_size=4", "eval.sequences=8")
    for arguments in (
        HEALTHY,
        PLAN,
        (*prepare, "seq_len=64", "tokenizer.vocab_size=300", "valid_fraction=0.2"),
        (*train, *small, "name=first"),
    ):
        done = verb(*arguments)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert (home / "runs/first/COMPLETED").stat().st_uid == 1000

    tools = ("gcc", "g++", "cc", "c++", "make", "ld", "nvcc", "pip", "pip3")
    there = [f"{folder}/{t}" for t in tools for folder in ("usr/bin", "opt/modtrain/bin")]
    there += [f"opt/python/bin/{t}" for t in ("pip", "pip3", "wheel")]
    assert [path for path in there if (image.folder / path).exists()] == []
    assert not list(image.folder.glob("root/.cache/pip"))
    assert not list(image.folder.glob("var/lib/apt/lists/*Packages*"))
    assert list(image.folder.glob("usr/lib/*/libibverbs.so.1"))
    assert verb("doctor", "require=[compiler]").returncode == 1

    image.must("bash", "/install.sh", "compiler")
    assert verb("doctor", "require=[compiler]").returncode == 0
