"""What to tell who starts one process where several were meant, or would use more devices."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence

from modtrain.distributed.launch import Launch, torchrun_command
from modtrain.parallel.config import StrategyConfig


def one_process_note(
    strategy: StrategyConfig,
    launch: Launch,
    device_type: str,
    num_devices: int,
    overrides: Sequence[str],
    environment: Mapping[str, str] = os.environ,
) -> str:
    """Return a note with the command that starts a process a device; empty where none is due.

    device_type: that the run computes on. num_devices: of this type that the process sees.
    overrides: of this start of ``modtrain train``.
    """
    name = strategy.name
    if launch.world_size > 1 or (name == "single" and num_devices < 2):
        return ""
    words = [word for word in overrides if not word.startswith(("strategy=", "strategy.name="))]
    command = f"{torchrun_command(max(2, num_devices))} {shlex.join(words)}".rstrip()
    command += f" strategy={'ddp' if name == 'single' else name}"
    command += "\n    or let this command start them: add launch=local"
    command += "" if num_devices > 1 else " num_processes=2"
    if "SLURM_JOB_ID" in environment:
        command += "\n    as a job of Slurm: modtrain submit train …"
    if num_devices > 1:
        devices = "GPUs" if device_type == "cuda" else "devices"
        return (
            f"warning: this is one process, and uses 1 of {num_devices} {devices}."
            f" For all of them:\n    {command}"
        )
    return (
        f"strategy={name} is for several processes, and one was started. To start two:"
        f"\n    {command}"
    )
