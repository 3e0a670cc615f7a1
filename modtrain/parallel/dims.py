"""The degrees of parallelism of a run, and what follows from them. Imports nothing heavy.

One description that meshes, data ranks, memory estimates and benchmarks go by, after torchtitan's
``ParallelDims``.
"""

from __future__ import annotations

from dataclasses import dataclass

from modtrain.common.errors import Problem
from modtrain.distributed.launch import torchrun_command


@dataclass(frozen=True)
class ParallelDims:
    """How many ranks each kind of parallelism spans; 1 where it is not used.

    world_size: all ranks, replicate x shard x context x tensor. Their numbers count in this order,
    the last fastest, so that tensor-parallel ranks are neighbours.
    replicate: copies of the model, each on its own ranks (data parallel).
    shard: ranks over which FSDP shards a copy, and which read different data.
    context: ranks that share each sequence. FSDP shards over them as well.
    tensor: ranks that share each matrix of a layer.
    expert: ranks over which the experts are spread. These are no further ranks: an expert group is
        made of neighbouring shard and context ranks, and FSDP shards its experts over the rest.
    """

    world_size: int = 1
    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1

    @property
    def fsdp(self) -> int:
        """Ranks over which FSDP shards the matrices of a layer."""
        return self.shard * self.context

    @property
    def copy(self) -> int:
        """Ranks that hold one copy of the model together."""
        return self.fsdp * self.tensor

    @property
    def expert_shard(self) -> int:
        """Ranks over which FSDP shards the same experts."""
        return self.fsdp // self.expert

    @property
    def data_parallel(self) -> int:
        """Ranks, or groups of them, that read different data."""
        return self.replicate * self.shard

    def data_rank(self, rank: int) -> int:
        """Return which part of the data ``rank`` reads, of `data_parallel` parts."""
        return rank // (self.context * self.tensor)

    def problems(self, prefix: str, shard_is_set: bool = False) -> list[Problem]:
        """Say which degrees do not divide the ranks.

        shard_is_set: ``shard`` is a choice (``shard_size``), not what the others leave.
        """
        problems = []
        ranks = 1
        degrees = {"tensor_parallel": self.tensor, "context_parallel": self.context}
        if shard_is_set:
            degrees["shard_size"] = self.shard
        for key, degree in degrees.items():
            group = self._processes
            if ranks > 1 and self.world_size % ranks == 0:
                group = f"the {self.world_size // ranks} groups of {ranks} processes"
            if degree > 1 and self.world_size % (ranks * degree):
                reason = f"does not divide {group}"
                remedy = self._remedy(degree)
                problems.append(Problem(f"{prefix}.{key}", degree, reason, remedy))
            ranks *= degree
        if not problems and self.fsdp % self.expert:
            reason = f"does not divide {self._expert_ranks}, over which experts are spread"
            key, remedy = f"{prefix}.expert_parallel", f"{self._remedy(self.expert)}, or null"
            problems.append(Problem(key, self.expert, reason, remedy))
        return problems

    @property
    def _processes(self) -> str:
        return "the one process" if self.world_size == 1 else f"the {self.world_size} processes"

    def _remedy(self, degree: int) -> str:
        if self.world_size > 1:
            return "give a divisor of it"
        return f"start {degree} processes or a multiple, as in {torchrun_command(degree)} …"

    @property
    def _expert_ranks(self) -> str:
        if self.fsdp == self.world_size:
            return self._processes
        parts = f"{self.world_size} processes"
        for name in ("replicate", "tensor"):
            degree = getattr(self, name)
            parts += f" / {degree} ({name})" if degree > 1 else ""
        return f"the {self.fsdp} shard and context ranks ({parts})"
