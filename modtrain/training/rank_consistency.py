"""Ranks that train together have to have the same configuration, code, packages and data."""

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
    """Raise RankError on all ranks unless they have the same configuration, code, packages, data.

    Ranks that differ would silently train something else, or wait in different collectives.
    """
    code = code_version()
    values: dict[str, Any] = {
        "python": platform.python_version(),
        "code.commit": code and code["commit"],
        "code.uncommitted changes": code and digest(code["diff"])[:12],
        "data fingerprint": data_fingerprint,
        **{f"package {name}": version for name, version in package_versions().items()},
        **dotted_values(config),
    }
    own = {key: value for key, value in values.items() if value is not None}
    rank0 = ranks.broadcast_from_rank0(own)
    with ranks.raise_on_all_ranks():
        differing = [
            f"  {key}: {rank0.get(key, 'none')} on rank 0, {own.get(key, 'none')} here\n"
            for key in sorted(rank0.keys() | own.keys())
            if rank0.get(key) != own.get(key)
        ]
        if differing:
            raise RankError(
                f"rank {ranks.rank} ({socket.gethostname()}) differs from rank 0:\n"
                + "".join(differing)
                + "remedy: start every process with the same command, code and packages"
            )
