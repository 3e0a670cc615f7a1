"""Recorded values: which machine they are of, and where others differ from them."""

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def fingerprint() -> str:
    """Name what decides the last bits of a result: the processor and torch's build."""
    processor = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        first = cpuinfo.read_text().split("\n\n")[0]
        lines = (line.split(":", 1) for line in first.splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in lines}
        names = ("vendor_id", "cpu family", "model", "model name")
        processor = " ".join(fields[name] for name in names if name in fields) or processor
    vectors = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()}, {processor}, {vectors}, torch {torch.__version__}"


def dump(value: Any, indent: int = 0) -> str:
    """Return JSON with a line for each list of numbers."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value)
    pad = " " * (indent + 1)
    lines = (f"{pad}{json.dumps(key)}: {dump(value[key], indent + 1)}" for key in value)
    return "{\n" + ",\n".join(lines) + "\n" + " " * indent + "}"


def differences(recorded: Any, actual: Any, tolerance: float | None, where: str = "") -> list[str]:
    """List where ``found`` is not ``recorded``.

    tolerance: how far floats may be apart, relative to the larger one and to 1. Texts and digests,
    for which there is no near, are not compared then. None: every bit counts.
    """
    if isinstance(recorded, Mapping) and isinstance(actual, Mapping):
        pairs = [(str(k), recorded.get(k), actual.get(k)) for k in {**recorded, **actual}]
    elif isinstance(recorded, list) and isinstance(actual, list) and len(recorded) == len(actual):
        pairs = [(str(i), *pair) for i, pair in enumerate(zip(recorded, actual, strict=True))]
    elif _agree(recorded, actual, tolerance):
        return []
    else:
        return [f"{where}: recorded {_short(recorded)}, now {_short(actual)}"]
    return [
        line
        for key, old, new in pairs
        for line in differences(old, new, tolerance, f"{where}/{key}" if where else key)
    ]


def _agree(recorded: Any, actual: Any, tolerance: float | None) -> bool:
    if tolerance is None or type(recorded) is not type(actual) or isinstance(actual, list):
        return type(recorded) is type(actual) and bool(recorded == actual)
    if not isinstance(recorded, float):
        return True
    return abs(recorded - actual) <= tolerance * max(1.0, abs(recorded), abs(actual))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
