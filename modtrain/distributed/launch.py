"""Where this process stands among those that torchrun or srun started. Imports nothing heavy."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from modtrain.common.errors import ConfigError, Problem

# As torchrun sets them, and what srun calls the same.
_SRUN_NAMES = {
    "RANK": "SLURM_PROCID",
    "WORLD_SIZE": "SLURM_NTASKS",
    "LOCAL_RANK": "SLURM_LOCALID",
}


@dataclass(frozen=True)
class Launch:
    """One process among ``world_size``, of which ``local_world_size`` are on each node."""

    world_size: int = 1
    rank: int = 0
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def num_nodes(self) -> int:
        """How many nodes there are."""
        return self.world_size // self.local_world_size

    @property
    def node(self) -> int:
        """The number of this process's node."""
        return self.rank // self.local_world_size

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Launch:
        """Read what the launcher told; without a launcher this process is alone.

        Raises:
            ConfigError: the launcher told something that cannot be.
        """
        names = _names(environment)
        if names is None:
            return cls()
        found = {name: _number(environment, there) for name, there in names.items()}
        world_size, rank = found["WORLD_SIZE"], found["RANK"]
        local_world_size = _local_world_size(environment, world_size)
        if not 0 <= rank < world_size:
            reason = f"is no rank of {world_size} processes"
            raise ConfigError([Problem(names["RANK"], rank, reason, _REMEDY)])
        if local_world_size < 1 or world_size % local_world_size:
            reason = f"does not divide the {world_size} processes: nodes must have equally many"
            raise ConfigError([Problem("LOCAL_WORLD_SIZE", local_world_size, reason, _REMEDY)])
        return cls(world_size, rank, found["LOCAL_RANK"], local_world_size)

    def export(self, environment: MutableMapping[str, str] = os.environ) -> None:
        """Say it in torchrun's words, which every library understands; alone, say nothing.

        Raises:
            ConfigError: there are several processes, and nobody said where they meet.
        """
        if self.world_size == 1:
            return
        environment["RANK"], environment["WORLD_SIZE"] = str(self.rank), str(self.world_size)
        environment["LOCAL_RANK"] = str(self.local_rank)
        environment["LOCAL_WORLD_SIZE"] = str(self.local_world_size)
        environment["GROUP_RANK"] = str(self.node)
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]
        if missing:
            reason = f"is not set: {self.world_size} processes do not know where to meet"
            raise ConfigError([Problem(name, "", reason, _REMEDY) for name in missing])


_REMEDY = "start with torchrun, or with srun from a script that sets MASTER_ADDR and MASTER_PORT"


def _names(environment: Mapping[str, str]) -> dict[str, str] | None:
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return {name: name for name in _SRUN_NAMES}
    # A batch script has some of srun's variables as well, but is no step.
    if "SLURM_STEP_ID" in environment and all(
        there in environment for there in _SRUN_NAMES.values()
    ):
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
