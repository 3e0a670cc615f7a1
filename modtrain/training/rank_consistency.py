"""Checks before training that all ranks have the same configuration, code, packages and data.

Ranks that differ would silently train something else, or wait in different collectives.
"""

from __future__ import annotations

import platform
import socket
from typing import Any

from modtrain.common.atomic_io import digest
from modtrain.common.errors import RankError
from modtrain.distributed.process_group import Ranks
from modtrain.training.config import TrainConfig
from modtrain.training.run_directory import code_version, dotted_values, package_versions


def check_rank_consistency(config: TrainConfig, data_fingerprint: str, ranks: Ranks) -> None:
    """Raise RankError on every rank unless all agree with rank 0; collective."""
    own = compared_values(config, data_fingerprint)
    rank0 = ranks.broadcast_from_rank0(own)
    with ranks.raise_on_all_ranks():
        differing = [
            f"  {key}: {_shown(rank0.get(key))} on rank 0, {_shown(own.get(key))} here\n"
            for key in sorted(rank0.keys() | own.keys())
            if rank0.get(key) != own.get(key)
        ]
        if differing:
            raise RankError(
                f"rank {ranks.rank} ({socket.gethostname()}) differs from rank 0:\n"
                + "".join(differing)
                + "remedy: start every process with the same command, code and packages"
            )


def compared_values(config: TrainConfig, data_fingerprint: str) -> dict[str, Any]:
    """Return what must be the same on all ranks, by name."""
    code = code_version()
    values: dict[str, Any] = {
        "python": platform.python_version(),
        "code.commit": code and code["commit"],
        "code.uncommitted changes": code and digest(code["diff"])[:12],
        "data fingerprint": data_fingerprint,
    }
    values |= {f"package {name}": version for name, version in package_versions().items()}
    return values | dotted_values(config)


def _shown(value: object) -> str:
    return "none" if value is None else str(value)
