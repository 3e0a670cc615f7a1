"""Differences between two arms, seed by seed: tests of a difference and of equivalence."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from scipy.stats import t as student_t

LEVEL = 0.95


@dataclass(frozen=True)
class PairedChange:
    """The relative change of a loss over another, by the seeds that both have.

    mean: of the changes. num_seeds: that both have. error: standard error of the mean; None below
    two seeds.
    """

    mean: float
    num_seeds: int
    error: float | None = None

    @classmethod
    def of(cls, losses: Mapping[str, float], base: Mapping[str, float]) -> PairedChange | None:
        """Compare losses by seed; None without a shared seed."""
        changes = [losses[seed] / base[seed] - 1 for seed in losses if seed in base]
        if not changes:
            return None
        error = None
        if len(changes) > 1:
            error = statistics.stdev(changes) / math.sqrt(len(changes))
        return cls(statistics.mean(changes), len(changes), error)

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """Return the bounds of Student's interval.

        Raises:
            ValueError: there are fewer than two seeds.
        """
        if self.error is None:
            raise ValueError("an interval needs two seeds")
        half = float(student_t.ppf((1 + level) / 2, self.num_seeds - 1)) * self.error
        return self.mean - half, self.mean + half

    @property
    def is_significant(self) -> bool:
        """Whether the 95% interval leaves out 0; True where one seed leaves nothing to test."""
        if self.error is None:
            return True
        low, high = self.interval()
        return not low <= 0 <= high

    def is_equivalent(self, margin: float) -> bool:
        """Whether two one-sided tests at 5% reject every change of ``margin`` or more.

        That is, the 90% interval lies within (-margin, margin) (Schuirmann 1987).
        """
        if self.error is None:
            return False
        low, high = self.interval(2 * LEVEL - 1)
        return -margin < low and high < margin
