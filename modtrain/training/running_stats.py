"""Running statistics of routers and experts, updated once an optimizer step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from modtrain.models.transformer import ModelOutput, Transformer
from modtrain.training.spikes.detector import restore_if


class RunningStats:
    """Sums a model's batch statistics over a step's micro-batches, then updates its buffers."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []

    def add(self, model: Transformer, output: ModelOutput) -> None:
        """Add the batch statistics of one micro-batch."""
        values = model.batch_stats(output)
        sums = self._sums or [torch.zeros_like(value) for value in values]
        self._sums = [total + value for total, value in zip(sums, values, strict=True)]

    def update(
        self,
        model: Transformer,
        accumulate: int,
        mean_over_ranks: Callable[[Tensor], Tensor],
        is_skipped: Tensor | None,
    ) -> None:
        """Update the model's buffers after a step; collective.

        accumulate: micro-batches of the step. is_skipped: 0-dim bool, whether the step was skipped;
        None: it was not.
        """
        if not self._sums:
            return
        # One reduction: the tensors are small, and each would wait for the network.
        flat = torch.cat([value.flatten() for value in self._sums]) / accumulate
        parts = torch.split(mean_over_ranks(flat), [value.numel() for value in self._sums])
        means = [mean.view_as(value) for mean, value in zip(parts, self._sums, strict=True)]
        owners = (*model.routers, *model.mixtures)
        buffers = [buffer for owner in owners for buffer in owner.buffers(recurse=False)]
        with restore_if(is_skipped, buffers):
            model.update_running_stats(means)
        self._sums = []
