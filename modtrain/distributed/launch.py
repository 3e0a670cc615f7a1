"""The rank and world size that torchrun or srun gave this process. Imports nothing heavy."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from modtrain.common.errors import ConfigError, Problem

# torchrun's variables, and srun's that mean the same.
_SRUN_NAMES = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


def node_name(environment: Mapping[str, str] = os.environ) -> str:
    """Return the name of this machine; under Slurm the one that Slurm's own messages have."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


@dataclass(frozen=True)
class Launch:
    """One process of ``world_size``, with ``local_world_size`` processes on each node."""

    world_size: int = 1
    rank: int = 0
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def num_nodes(self) -> int:
        """The number of nodes."""
        return self.world_size // self.local_world_size

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Launch:
        """Read the launcher's variables; without a launcher there is one process.

        Raises:
            ConfigError: a variable has an impossible value.
        """
        names = _variable_names(environment)
        if names is None:
            return cls()
        values = {name: _number(environment, source) for name, source in names.items()}
        world_size, rank = values["WORLD_SIZE"], values["RANK"]
        local_world_size = _local_world_size(environment, world_size)
        if not 0 <= rank < world_size:
            reason = f"is not a rank of {world_size} processes"
            raise ConfigError([Problem(names["RANK"], rank, reason, _REMEDY)])
        if local_world_size < 1 or world_size % local_world_size:
            reason = f"does not divide the {world_size} processes: nodes must have equally many"
            raise ConfigError([Problem("LOCAL_WORLD_SIZE", local_world_size, reason, _REMEDY)])
        return cls(world_size, rank, values["LOCAL_RANK"], local_world_size)

    def export(self, environment: MutableMapping[str, str] = os.environ) -> None:
        """Set torchrun's variables, which every library reads. One process sets none.

        Raises:
            ConfigError: there are several processes, and no rendezvous address.
        """
        if self.world_size == 1:
            return
        environment["RANK"], environment["WORLD_SIZE"] = str(self.rank), str(self.world_size)
        environment["LOCAL_RANK"] = str(self.local_rank)
        environment["LOCAL_WORLD_SIZE"] = str(self.local_world_size)
        environment["GROUP_RANK"] = str(self.rank // self.local_world_size)
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]
        if missing:
            reason = f"is not set: {self.world_size} processes need a rendezvous address"
            raise ConfigError([Problem(name, "", reason, _REMEDY) for name in missing])


_REMEDY = "start with torchrun, or with srun from a script that sets MASTER_ADDR and MASTER_PORT"


def torchrun_command(num_processes: int) -> str:
    """Return the command, up to the overrides, that trains in so many processes on this node."""
    return f"torchrun --standalone --nproc-per-node {num_processes} -m modtrain train"


def _variable_names(environment: Mapping[str, str]) -> dict[str, str] | None:
    """Return the launcher's variable for each of torchrun's, None without a launcher."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return {name: name for name in _SRUN_NAMES}
    # A batch script also has some of srun's variables, but is not a job step.
    if "SLURM_STEP_ID" in environment and all(name in environment for name in _SRUN_NAMES.values()):
        return _SRUN_NAMES
    return None


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    if not value.isdecimal():
        raise ConfigError([Problem(name, value or "null", "is not a whole number", _REMEDY)])
    return int(value)


def _local_world_size(environment: Mapping[str, str], world_size: int) -> int:
    if "LOCAL_WORLD_SIZE" in environment:
        return _number(environment, "LOCAL_WORLD_SIZE")
    nodes = environment.get("SLURM_STEP_NUM_NODES", environment.get("SLURM_NNODES", "1"))
    return world_size // int(nodes) if nodes.isdecimal() and int(nodes) else 0
