"""Executed forward FLOPs over texts of different lengths.

Shapes: R routers, M mixtures of experts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from modtrain.evaluation.held_out import mean_loads
from modtrain.models.config import ModelConfig
from modtrain.models.depth.config import Selection
from modtrain.models.flops import dense_equivalent_flops, realised_flops
from modtrain.models.sequence import Output
from modtrain.models.transformer import Transformer


@dataclass
class _Texts:
    """Sums over texts of one length: their number, and by router the chosen tokens, squared too."""

    number: int
    chosen_R: list[int]
    squares_R: list[int]

    def add(self, chosen_R: Sequence[int]) -> None:
        self.number += 1
        for router, count in enumerate(chosen_R):
            self.chosen_R[router] += count
            self.squares_R[router] += count * count


@dataclass
class ForwardCost:
    """Counts the tokens that texts computed, by router, and gives their FLOPs.

    A text counts as one forward pass over its tokens (see `modtrain.models.flops.CONVENTIONS`); of
    texts that begin alike, what is taken from a cache counts once.
    """

    config: ModelConfig
    selection: Selection
    _texts: dict[tuple[int, int], _Texts] = field(default_factory=dict)
    _slots_M: list[float] = field(default_factory=list)

    def add(self, length: int, chosen_R: Sequence[int], cached: bool = False) -> None:
        """Count a text of ``length`` tokens, of which router r took ``chosen_R[r]``.

        cached: it is the beginning of a text that was counted, and came from its cache: it counts
        once less.
        """
        key = (length, -1 if cached else 1)
        zeros = [0] * len(chosen_R)
        self._texts.setdefault(key, _Texts(0, [*zeros], [*zeros])).add(chosen_R)

    def watch_experts(self, model: Transformer) -> list[RemovableHandle]:
        """Count what the experts of ``model`` compute, until the returned handles are removed."""
        mixtures = model.mixtures
        self._slots_M = self._slots_M or [0.0] * len(mixtures)

        def count(number: int) -> Callable[[nn.Module, Any, Output], None]:
            def hook(_: nn.Module, __: Any, output: Output) -> None:
                self._slots_M[number] += float(output.experts[0].executed_E.sum())

            return hook

        return [
            mixture.register_forward_hook(count(number)) for number, mixture in enumerate(mixtures)
        ]

    @property
    def tokens(self) -> int:
        """Tokens that were computed."""
        return sum(length * sign * texts.number for (length, sign), texts in self._texts.items())

    @property
    def flops(self) -> float:
        """Executed forward FLOPs, of all texts."""
        total, tokens = 0.0, max(1, self.tokens)
        for (length, sign), texts in self._texts.items():
            count_R2 = [
                (chosen / texts.number, squares / texts.number)
                for chosen, squares in zip(texts.chosen_R, texts.squares_R, strict=True)
            ]
            # FLOPs of experts are linear in their rows, so these may be shared out by tokens.
            slots_M = [slots * length / tokens for slots in self._slots_M]
            loads = mean_loads(self.config, length, count_R2, slots_M)
            one = realised_flops(self.config, length, loads, self.selection).total
            total += sign * texts.number * one
        return total

    @property
    def dense_equivalent_flops(self) -> float:
        """Forward FLOPs of the same texts if no token passed by any block."""
        return float(
            sum(
                sign * texts.number * dense_equivalent_flops(self.config, length).total
                for (length, sign), texts in self._texts.items()
            )
        )

    @property
    def realised_capacity(self) -> dict[str, float]:
        """Share of the tokens that each router took, by its label."""
        sums: dict[int, float] = defaultdict(float)
        for (_, sign), texts in self._texts.items():
            for router, chosen in enumerate(texts.chosen_R):
                sums[router] += sign * chosen
        tokens = max(1, self.tokens)
        labels = self.config.routed_labels
        return {label: sums[router] / tokens for router, label in enumerate(labels)}
