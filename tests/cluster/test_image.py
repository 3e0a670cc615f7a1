"""The image of a job: a tag becomes a digest where it can be known, and is told of where not."""

import json
import shutil
import socket
import subprocess
from hashlib import sha256
from pathlib import Path

import pytest

from modtrain.cli.compose_verbs import compose_submission
from modtrain.cluster.config import ClusterConfig
from modtrain.cluster.image import freeze_image
from modtrain.cluster.submit import submit
from tests.helpers.waiting import wait_until

DIGEST = "sha256:" + "0123456789abcdef" * 4


def site(container: str, image: str) -> ClusterConfig:
    return ClusterConfig(container=container, image=image)


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """A PATH of its own; call with a tool's name and what it does."""
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    (tmp_path / "bin").mkdir()
    asked = tmp_path / "asked"

    def make(name: str, does: str) -> None:
        path = tmp_path / "bin" / name
        path.write_text(f'#!/bin/sh\necho "{name} $*" >>{asked}\n{does}\n')
        path.chmod(0o755)

    for name in ("skopeo", "crane", "docker"):
        make(name, "echo unauthorized: ask for access >&2; exit 1")
    make.asked = lambda: asked.read_text().splitlines() if asked.exists() else []
    return make


@pytest.mark.parametrize(
    ("container", "image", "asked", "frozen"),
    [
        ("apptainer", "docker://a.b:5000/c/d:e", "a.b:5000/c/d:e", "docker://a.b:5000/c/d@{}"),
        ("apptainer", "docker://a/d", "a/d:latest", "docker://a/d@{}"),
        ("apptainer", "docker://d:e", "d:e", "docker://d@{}"),
        ("pyxis", "a.b#c/d:e", "a.b/c/d:e", "a.b#c/d:{}"),
        ("pyxis", "docker://me@a.b:5000#d", "a.b:5000/d:latest", "docker://me@a.b:5000#d:{}"),
        ("pyxis", "c/d:e.1-f", "c/d:e.1-f", "c/d:{}"),
    ],
)
def test_a_tag_is_frozen_to_its_digest(tools, container, image, asked, frozen):
    tools("skopeo", f'echo "{DIGEST}"')
    image, text = freeze_image(site(container, image))
    assert image == frozen.format(DIGEST)
    assert DIGEST in text
    assert "warning" not in text
    (line,) = tools.asked()
    assert line == f"skopeo inspect --no-tags --format {{{{.Digest}}}} docker://{asked}"
    # What is frozen stays so, and nobody is asked.
    assert freeze_image(site(container, image)) == (image, "")
    assert len(tools.asked()) == 1


def test_another_tool_is_asked_where_one_has_no_answer(tools):
    tools("crane", "echo no digest")
    tools("docker", f"echo {DIGEST}")
    assert freeze_image(site("apptainer", "docker://a/b:c"))[0] == f"docker://a/b@{DIGEST}"
    assert [line.split()[0] for line in tools.asked()] == ["skopeo", "crane", "docker"]
    assert tools.asked()[1] == "crane digest a/b:c"


def test_a_tag_that_cannot_be_frozen_is_reported(tools, monkeypatch):
    image, text = freeze_image(site("pyxis", "a#b:c"))
    assert image == "a#b:c"
    assert text.startswith("warning: a#b:c is a tag, which may move")
    assert text.endswith("unauthorized: ask for access")
    monkeypatch.setenv("PATH", "/nowhere")
    assert "without skopeo, crane, docker" in freeze_image(site("pyxis", "a#b:c"))[1]
    for other in ("library://a/b:c", "oras://a/b:c", "docker://A B"):
        image, text = freeze_image(site("apptainer", other))
        assert (image, text.startswith("warning: ")) == (other, True)


def test_files_are_no_tags(tools, tmp_path):
    (tmp_path / "odd:name.sif").touch()
    for container, image in (
        *(("apptainer", "/images/a.sif"), ("apptainer", "b.sif")),
        *(("apptainer", f"{tmp_path}/odd:name.sif"), ("pyxis", "./c.sqsh"), ("none", "d:e")),
    ):
        assert freeze_image(site(container, image)) == (image, "")
    assert not tools.asked()


def test_the_digest_of_a_layout_on_disk_is_reported(tmp_path):
    entries = [
        {"digest": digest, "annotations": {"org.opencontainers.image.ref.name": tag}}
        for tag, digest in (("old", "sha256:0"), ("new", DIGEST))
    ]
    (tmp_path / "index.json").write_text(json.dumps({"manifests": entries}))
    image, text = freeze_image(site("apptainer", f"oci:{tmp_path}:new"))
    assert image == f"oci:{tmp_path}:new"
    assert f"is {DIGEST} now" in text
    assert "names 2 images" in freeze_image(site("apptainer", f"oci:{tmp_path}"))[1]
    for damaged in ("[]", "{", '{"manifests": [1]}', '{"manifests": {"a": 1}}'):
        (tmp_path / "index.json").write_text(damaged)
        assert "no OCI layout" in freeze_image(site("apptainer", f"oci:{tmp_path}:new"))[1]


def test_the_script_of_a_job_has_the_digest(tools, tiny, tmp_path, monkeypatch, capsys):
    tools("skopeo", f"echo {DIGEST}")
    monkeypatch.chdir(tmp_path)
    container = ("cluster=cpu", "cluster.container=pyxis", "cluster.image='a#b:c'")
    mounts = f"cluster.mounts=[{tmp_path.anchor}]"
    words = ["train", "name=x", *tiny, *container, mounts, "dry_run=true"]
    submit(compose_submission(words))
    assert f"a#b:c is {DIGEST}" in capsys.readouterr().out
    text = (tmp_path / "runs/x/submit.sbatch").read_text()
    assert f"image='a#b:{DIGEST}'\n" in text


@pytest.fixture
def registry(tmp_path):
    """Debian's registry on a port of this machine, without TLS."""
    if shutil.which("docker-registry") is None or shutil.which("skopeo") is None:
        pytest.skip("NOT CHECKED, a real registry: apt install docker-registry skopeo")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (tmp_path / "registry.yml").write_text(
        f"version: 0.1\nstorage: {{filesystem: {{rootdirectory: {tmp_path}/registry}}}}\n"
        f"http: {{addr: '127.0.0.1:{port}'}}\n"
    )
    command = ["docker-registry", "serve", tmp_path / "registry.yml"]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_until(lambda: "listening on" in (tmp_path / "log").read_text(), 60)
        yield f"127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


@pytest.mark.slow
@pytest.mark.nightly
def test_a_real_registry_is_asked(registry, tmp_path, monkeypatch):
    """The tag moves on, and the job's image does not."""
    conf = tmp_path / ".config/containers/registries.conf"
    conf.parent.mkdir(parents=True)
    conf.write_text(f'[[registry]]\nlocation = "{registry}"\ninsecure = true\n')
    monkeypatch.setenv("HOME", str(tmp_path))
    push(tmp_path, registry, "first")
    image, text = freeze_image(site("apptainer", f"docker://{registry}/a/b:c"))
    assert image.startswith(f"docker://{registry}/a/b@sha256:"), text
    push(tmp_path, registry, "second")
    assert label_of(image) == "first"
    assert label_of(f"docker://{registry}/a/b:c") == "second"
    assert freeze_image(site("apptainer", f"docker://{registry}/a/b:c"))[0] != image
    unknown, text = freeze_image(site("pyxis", f"{registry}#a/b:none"))
    assert unknown == f"{registry}#a/b:none"
    assert "manifest unknown" in text


def push(folder: Path, registry: str, label: str) -> None:
    """Push an image without layers to the tag ``c``."""
    layout = folder / label
    (layout / "blobs/sha256").mkdir(parents=True)

    def blob(content: dict) -> dict:
        data = json.dumps(content).encode()
        name = sha256(data).hexdigest()
        (layout / "blobs/sha256" / name).write_bytes(data)
        return {"digest": f"sha256:{name}", "size": len(data)}

    config = blob(
        {
            **{"architecture": "amd64", "os": "linux", "config": {"Labels": {"is": label}}},
            "rootfs": {"type": "layers", "diff_ids": []},
        }
    )
    kind = "application/vnd.oci.image"
    parts = {"config": {"mediaType": f"{kind}.config.v1+json", **config}, "layers": []}
    manifest = blob({"schemaVersion": 2, "mediaType": f"{kind}.manifest.v1+json", **parts})
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    entry = {"mediaType": f"{kind}.manifest.v1+json", **manifest}
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    to = f"docker://{registry}/a/b:c"
    command = ["skopeo", "copy", "--insecure-policy", f"oci:{layout}", to]
    subprocess.run(command, check=True)


def label_of(image: str) -> str:
    command = ["skopeo", "inspect", "--no-tags", image]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)["Labels"]["is"]
