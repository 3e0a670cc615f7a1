"""Images of docker/Dockerfile as they are built: what is in them, and that they train."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.version import Version

import modtrain
from tests.conftest import make_corpus
from tests.docker.buildah import Builder, Image, skip_unless_possible, store
from tests.docker.test_images import ROOT, canonical, locked, run

pytestmark = [pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(5400)]

# Of an image's layers, uncompressed. Measured: 2.05 and 6.16 GB.
MAX_CPU_BYTES = 2.3e9
MAX_CUDA_BYTES = 6.8e9
# Of no user that the image knows.
UID = 4711


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builder]:
    folder = tmp_path_factory.mktemp("images")
    skip_unless_possible(15, folder)
    builder = Builder(store(folder))
    yield builder
    if builder.store == folder:
        # Gigabytes, which pytest would keep for three sessions.
        builder.call("rmi", "--all", "--force")


@pytest.fixture(scope="module")
def cpu(builder: Builder) -> Image:
    return builder.build("cpu")


@pytest.fixture(scope="module")
def cuda(builder: Builder) -> Image:
    skip_unless_possible(40, builder.store)
    return builder.build("cuda")


def size_of(image: Image) -> str:
    return f"{image.name}: {image.num_bytes / 1e9:.2f} GB, built in {image.seconds:.0f} s"


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """What a user mounts: a corpus, and runs/ and data/ of their own."""
    make_corpus(tmp_path / "workspace/data/corpus")
    (tmp_path / "workspace/runs").mkdir()
    run("chown", "-R", f"{UID}:{UID}", tmp_path / "workspace")
    return tmp_path / "workspace"


def must(image: Image, *arguments: str, **options: object) -> str:
    done = image.run(*arguments, **options)
    assert done.returncode == 0, f"{arguments}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def test_it_trains_resumes_and_generates_as_any_user(cpu, workspace):
    def verb(*arguments: str) -> str:
        return must(cpu, *arguments, user=UID, workspace=workspace)

    verb("doctor", "require=[packages,corpus]")
    prepare = ("prepare", "corpus=files", "sources=[data/corpus/*.txt]", "output=data/mine")
    verb(*prepare, "seq_len=64", "tokenizer.vocab_size=300", "valid_fraction=0.2")
    train = ("train", "name=first", "model=tiny", "data.path=data/mine", "batch.tokens=256")
    small = ("batch.micro_batch_size=4", "eval.sequences=8", "budget.steps=6", "checkpoint.every=2")
    verb(*train, *small)
    # As if it had been killed before its last checkpoint.
    first = workspace / "runs/first"
    (first / "COMPLETED").unlink()
    shutil.rmtree(max((first / "checkpoints").glob("step-*")))
    assert "resumes from step 4" in verb(*train, *small)
    assert (first / "COMPLETED").stat().st_uid == UID
    manifest = json.loads((first / "manifest.json").read_text())
    head = run("git", "-C", ROOT, "rev-parse", "HEAD").stdout.strip()
    assert manifest["starts"][0]["code"]["commit"].startswith(head)
    text = verb("generate", "run=first", "prompt=the tree", "max_tokens=8")
    assert text.strip()


def test_the_image_describes_itself(cpu):
    print(size_of(cpu))
    assert cpu.num_bytes < MAX_CPU_BYTES, size_of(cpu)
    assert cpu.config["User"] == "1000:1000"
    assert cpu.config["Healthcheck"]["Test"][:2] == ["CMD", "modtrain"]
    labels = cpu.config["Labels"]
    assert labels["org.opencontainers.image.version"] == modtrain.__version__
    head = run("git", "-C", ROOT, "rev-parse", "HEAD").stdout.strip()
    assert labels["org.opencontainers.image.revision"].startswith(head)
    assert "NVIDIA_REQUIRE_CUDA" not in cpu.variables
    # The default command, as the user of the image.
    assert "usage" in must(cpu, *cpu.config["Cmd"]).lower()


def packages(image: Image) -> dict[str, Version]:
    code = (
        "from importlib.metadata import distributions as d\n"
        "print(*(f'{p.name}=={p.version}' for p in d()))"
    )
    done = image.execute("/opt/modtrain/bin/python", "-c", code)
    pairs = [entry.split("==") for entry in done.stdout.split()]
    return {canonical(name): Version(version) for name, version in pairs}


def not_locked(there: dict[str, Version]) -> dict[str, Version]:
    public = {name: Version(v.public) for name, v in there.items() if name != "modtrain"}
    return {name: version for name, version in public.items() if locked().get(name) != version}


def test_it_has_the_locked_packages_and_no_tools(cpu):
    there = packages(cpu)
    assert str(there["modtrain"]) == modtrain.__version__
    assert there["torch"].local == "cpu"
    assert not_locked(there) == {}
    tools = "gcc g++ cc c++ make ld nvcc pip pip3 wheel"
    tools_there = cpu.execute("bash", "-c", f"for tool in {tools}; do command -v $tool; done; true")
    assert tools_there.stdout == ""
    # Neither caches nor a site's configuration of pip, which may have its password.
    places = "/root/.cache /etc/pip.conf /var/cache/pip /src"
    kept = cpu.execute("bash", "-c", f"find {places} /var/lib/apt/lists -type f; ls /mnt")
    assert kept.stdout == ""


def test_a_compiler_comes_with_its_own_target(builder, cpu):
    assert cpu.run("doctor", "require=[compiler]").returncode == 1
    must(builder.build("cpu-compile"), "doctor", "require=[packages,corpus,compiler]", user=UID)


def test_the_cuda_image_asks_for_the_driver_that_its_torch_needs(cuda):
    """All but the GPU: it imports with CUDA's libraries, and NCCL is there."""
    print(size_of(cuda))
    assert cuda.num_bytes < MAX_CUDA_BYTES, size_of(cuda)
    code = "import torch; print(torch.version.cuda, torch.cuda.nccl.version())"
    done = cuda.execute("/opt/modtrain/bin/python", "-c", code, user=UID)
    assert done.returncode == 0, done.stderr[-3000:]
    version = done.stdout.split()[0]
    assert cuda.variables["NVIDIA_REQUIRE_CUDA"] == f"cuda>={version}"
    must(cuda, "doctor", "require=[packages,corpus,nccl]", user=UID)
    # There is no GPU that it was given.
    assert cuda.run("doctor", "require=[cuda]").returncode == 1
    assert not_locked(packages(cuda)) == {}


def test_a_cuda_image_is_not_built_for_another_driver(builder, cuda):
    """Nor without a word on which, before anything is downloaded."""
    unknown = builder.try_to_build("cuda", CUDA_VERSION="")
    assert unknown.returncode
    assert "give --build-arg CUDA_VERSION" in unknown.stderr
