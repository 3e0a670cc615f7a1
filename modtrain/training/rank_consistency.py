"""Whether all ranks are of one mind before they train: configuration, code, packages, data.

Ranks that differ would train on without a word, or wait for each other in different collectives.
"""

from __future__ import annotations

import platform
import socket
from typing import Any

from modtrain.common.atomic_io import digest
from modtrain.common.errors import RankError
from modtrain.distributed.process_group import Ranks
from modtrain.training.config import TrainConfig
from modtrain.training.run_directory import code_version, flat, package_versions


def check_alike(config: TrainConfig, data_fingerprint: str, ranks: Ranks) -> None:
    """Raise on every rank unless all are as rank 0 is; collective.

    Raises:
        RankError: names a rank, its host, and what differs with both values.
    """
    here = facts(config, data_fingerprint)
    first = ranks.broadcast_from_rank0(here)
    with ranks.raise_on_all_ranks():
        differing = [
            f"  {key}: {_shown(first.get(key))} on rank 0, {_shown(here.get(key))} here"
            for key in sorted(first.keys() | here.keys())
            if first.get(key) != here.get(key)
        ]
        if differing:
            raise RankError(
                "\n".join(
                    [f"rank {ranks.rank} ({socket.gethostname()}) differs from rank 0:", *differing]
                )
                + "\nremedy: start every process with the same command, code and packages"
            )


def facts(config: TrainConfig, data_fingerprint: str) -> dict[str, Any]:
    """Return what has to be the same everywhere, by name."""
    code = code_version()
    told: dict[str, Any] = {
        "python": platform.python_version(),
        "code.commit": code and code["commit"],
        "code.uncommitted changes": code and digest(code["diff"])[:12],
        "data fingerprint": data_fingerprint,
    }
    told |= {f"package {name}": version for name, version in package_versions().items()}
    return told | flat(config)


def _shown(value: object) -> str:
    return "none" if value is None else str(value)
