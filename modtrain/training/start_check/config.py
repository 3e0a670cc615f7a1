"""Typed configuration of the check before the first step. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

from modtrain.common.errors import Problem
from modtrain.common.validation import above_zero, at_least


@dataclass
class StartCheckConfig:
    """What is checked on every node of a run of several processes, before its first step.

    enabled: check devices, paths, versions and clocks. A node that fails is named, and a Slurm job
        starts again without it.
    max_clock_skew: seconds that a node's clock may differ from that of rank 0's node.
    all_reduce: MiB that all processes sum on their devices, once; 0: none. The sum is checked, and
        the log has the bandwidth.
    """

    enabled: bool = True
    max_clock_skew: float = 60.0
    all_reduce: int = 0

    def problems(self, prefix: str) -> list[Problem]:
        """Everything wrong with the check."""
        return [
            *above_zero(self, prefix, "max_clock_skew"),
            *at_least(self, prefix, 0, "all_reduce"),
        ]
