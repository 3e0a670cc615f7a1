"""Holds a job to the image of the moment it was submitted: a registry's tag may move meanwhile."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from modtrain.cluster.site import ClusterConfig
from modtrain.common.reading import UnreadableError, read_json

# What prints the digest of the reference that comes in the place of REFERENCE.
_TOOLS = (
    ("skopeo", "inspect", "--no-tags", "--format", "{{.Digest}}", "docker://REFERENCE"),
    ("crane", "digest", "REFERENCE"),
    ("docker", "buildx", "imagetools", "inspect", "--format", "{{.Manifest.Digest}}", "REFERENCE"),
)
_NAMES = ", ".join(tool for tool, *_ in _TOOLS)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
# What an OCI layout's index calls a tag (its image-spec, annotations).
_TAG = "org.opencontainers.image.ref.name"
# Seconds that a registry has to answer.
_PATIENCE = 60
# What enroot takes (its doc/cmd/import.md): docker://[USER@][REGISTRY#]IMAGE[:TAG].
_PYXIS = re.compile(
    r"(?:docker://)?(?:(?P<user>[^@#]+)@)?(?:(?P<registry>[^#]+)#)?"
    r"(?P<image>[a-z0-9/._-]+)(?::(?P<tag>[\w.:-]+))?"
)
_APPTAINER = re.compile(
    r"docker://(?P<image>(?:[^/@]+/)*[^/@:]+)(?::(?P<tag>[\w.-]+))?(?:@(?P<digest>[\w:]+))?"
)


def freeze_image(site: ClusterConfig) -> tuple[str | None, str]:
    """Return the site's image by digest, and what there is to say about it; empty: nothing.

    A registry is asked by skopeo, crane or docker, whichever is on the PATH. Files stay as they
    are, and so does a tag whose digest cannot be known: the text tells why.
    """
    image = site.image
    if image is None or site.container == "none" or _is_file(image, site.container):
        return image, ""
    if image.startswith("oci:"):
        return image, _describe_layout(image)
    reference = _parse(image, site.container)
    if reference is None:
        return image, f"warning: {image} may change before the job starts: only docker:// is frozen"
    if reference.is_frozen:
        return image, ""
    digest, why_not = _ask_registry(f"{reference.address}:{reference.tag}")
    if digest is None:
        return image, f"warning: {image} is a tag, which may move before the job starts: {why_not}"
    return reference.frozen(digest), f"{image} is {digest}: the job takes this one"


@dataclass(frozen=True)
class _Reference:
    """An image in a registry. address: for the tools. prefix, separator: before the digest."""

    address: str
    tag: str
    prefix: str
    separator: str
    is_frozen: bool

    def frozen(self, digest: str) -> str:
        return f"{self.prefix}{self.separator}{digest}"


def _is_file(image: str, container: str) -> bool:
    """Whether the image is no reference to a registry or an OCI layout.

    pyxis takes a path by its slash or dot at the beginning (its README, `--container-image`).
    """
    if container == "pyxis":
        return image.startswith(("/", "./", "../"))
    return not re.match(r"[a-z-]+:", image) or Path(image).exists()


def _parse(image: str, container: str) -> _Reference | None:
    if container == "pyxis":
        match = _PYXIS.fullmatch(image)
        if match is None:
            return None
        tag, registry = match["tag"] or "latest", match["registry"]
        address = f"{registry}/{match['image']}" if registry else match["image"]
        prefix = image if match["tag"] is None else image.removesuffix(f":{match['tag']}")
        # enroot has no @; what follows the colon is what it asks the registry for.
        return _Reference(address, tag, prefix, ":", tag.startswith("sha256:"))
    match = _APPTAINER.fullmatch(image)
    if match is None:
        return None
    # Of a tag and a digest Apptainer takes only one.
    prefix, is_frozen = f"docker://{match['image']}", match["digest"] is not None
    return _Reference(match["image"], match["tag"] or "latest", prefix, "@", is_frozen)


def _ask_registry(reference: str) -> tuple[str | None, str]:
    """Return the digest; or None, and why it is not known."""
    reasons = []
    for tool, *arguments in _TOOLS:
        if shutil.which(tool) is None:
            continue
        command = [tool, *(word.replace("REFERENCE", reference) for word in arguments)]
        try:
            done = subprocess.run(  # noqa: S603
                command, capture_output=True, text=True, timeout=_PATIENCE, check=False
            )
        except subprocess.TimeoutExpired:
            reasons.append(f"{tool} had no answer in {_PATIENCE} s")
            continue
        digest = done.stdout.strip()
        if done.returncode == 0 and _DIGEST.fullmatch(digest):
            return digest, ""
        reasons.append(f"{tool}: {(done.stderr.strip().splitlines() or ['no digest'])[-1]}")
    return None, reasons[0] if reasons else f"its digest is not known without {_NAMES}"


def _describe_layout(image: str) -> str:
    """Tell the digest of ``oci:DIRECTORY[:TAG]``, which Apptainer cannot be given in its place."""
    place, _, tag = image.removeprefix("oci:").partition(":")
    try:
        index = read_json(Path(place) / "index.json", 2**20)
        tags = [(entry.get("annotations", {}).get(_TAG), entry) for entry in index["manifests"]]
        digests = [entry["digest"] for name, entry in tags if tag in ("", name)]
    except (UnreadableError, KeyError, TypeError, AttributeError) as error:
        return f"warning: {image} is no OCI layout that can be read: {error}"
    if len(digests) != 1:
        return f"warning: {image} names {len(digests)} images of its layout"
    return (
        f"warning: {image} is {digests[0]} now, and may be another image before the job starts:"
        " apptainer build makes a .sif of it"
    )
