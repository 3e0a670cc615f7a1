"""Peak FLOP/s of known devices, and what ``auto`` resolves to."""

from __future__ import annotations

import os
import socket

import torch

from modtrain.common.errors import ConfigError, NodeError, Problem

ACCELERATOR = "MODTRAIN_ACCELERATOR"
"""The variable by which a job that has GPUs says that ``auto`` is ``cuda``, and nothing else."""

# Dense bf16 peaks in FLOP/s, from the manufacturers' data sheets. Longer names first: the first one
# that occurs in the device's name counts.
_BF16_PEAKS = (
    ("B200", 2.25e15),
    ("GH200", 989e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("A10G", 70e12),
    ("RTX 4090", 165e12),
)
GPU_NAMES = tuple(name for name, _ in _BF16_PEAKS)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Return the device's peak FLOP/s at ``precision`` (``bf16``, ``fp32``), None if unknown.

    For an unknown device no MFU is reported rather than a wrong one.
    """
    if device.type != "cuda" or precision != "bf16":
        return None
    return bf16_peak(torch.cuda.get_device_name(device))


def bf16_peak(name: str) -> float | None:
    """Return the bf16 peak in FLOP/s of the GPU of this name, None if unknown."""
    return next((peak for part, peak in _BF16_PEAKS if part.lower() in name.lower()), None)


def resolve_precision(precision: str, device_type: str) -> str:
    """Return ``bf16`` or ``fp32`` for ``auto``: bf16 where the device computes it natively."""
    if precision != "auto":
        return precision
    return "bf16" if device_type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def resolve_accelerator(accelerator: str) -> str:
    """Return ``cuda``, ``mps`` or ``cpu`` for ``auto``; in a job that has GPUs it is ``cuda``.

    Raises:
        ConfigError: the device is not available.
        NodeError: it is not, and the job has asked for it.
    """
    required = os.environ.get(ACCELERATOR, "")
    if accelerator == "auto" and required:
        accelerator = required
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if accelerator == "auto":
        return next((name for name, is_available in available.items() if is_available), "cpu")
    if not available.get(accelerator, True):
        if accelerator == required:
            built_for = torch.version.cuda or "no CUDA"
            raise NodeError(
                f"{socket.gethostname()} has no {accelerator} device for this job, which asks for"
                f" one: torch {torch.__version__}, built for {built_for}, finds none\nremedy: see"
                " nvidia-smi and modtrain doctor on that node; a driver that is older than the"
                " wheels is not used; strategy.accelerator=cpu trains without"
            )
        remedy = "use auto or cpu; modtrain doctor says what is missing"
        raise ConfigError([Problem("accelerator", accelerator, "is not available", remedy)])
    return accelerator


def num_devices(device_type: str) -> int:
    """Return how many devices of the type this process sees."""
    return torch.cuda.device_count() if device_type == "cuda" else 1
