"""Statistics summed on the device: of the steps between two records, and of routers in a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from modtrain.evaluation.routing_metrics import RoutingTotals
from modtrain.models.transformer import ModelOutput, Transformer


@dataclass
class StepStatistics:
    """Sums over the micro-batches since the last record. On the device: reading them waits.

    loss, auxiliary: sums over ``count`` micro-batches; auxiliary losses by name, with their weights
    in the objective. grad_norm: the trunk's, of the last step, before clipping. routing: sums over
    the last step's tokens; empty if that step is not recorded.
    """

    loss: Tensor
    auxiliary: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0
    grad_norm: Tensor | None = None
    routing: RoutingTotals = field(default_factory=RoutingTotals)

    @classmethod
    def zero(cls, device: torch.device) -> StepStatistics:
        """Return empty statistics."""
        return cls(torch.zeros((), device=device))

    @property
    def total(self) -> Tensor:
        """The objective: the loss and the auxiliary losses."""
        return sum(self.auxiliary.values(), start=self.loss)

    def add(self, output: ModelOutput, with_routing: bool = False) -> None:
        """Add one micro-batch. with_routing: of a step whose routing is recorded."""
        if output.loss is not None:
            self.loss = self.loss + output.loss.detach()
        for name, value in output.auxiliary.items():
            before = self.auxiliary.get(name)
            self.auxiliary[name] = value.detach() if before is None else before + value.detach()
        self.count += 1
        if with_routing:
            self.routing = self.routing + RoutingTotals.of(output.routing, output.experts)

    def restore_if(self, is_skipped: Tensor, before: StepStatistics) -> None:
        """Go back to the sums ``before`` a step if it is skipped; ``count`` stays."""
        nan = torch.full_like(self.loss, torch.nan)
        self.loss = torch.where(is_skipped, before.loss, self.loss)
        for name, value in self.auxiliary.items():
            other = before.auxiliary.get(name, torch.zeros_like(value))
            self.auxiliary[name] = torch.where(is_skipped, other, value)
        if self.grad_norm is not None:
            other = nan if before.grad_norm is None else before.grad_norm
            self.grad_norm = torch.where(is_skipped, other, self.grad_norm)

    def means(self) -> dict[str, float]:
        """Return the mean losses of a micro-batch; NaN without one."""
        sums = {"loss": self.loss, **{f"{name}_loss": v for name, v in self.auxiliary.items()}}
        return {
            name: float(total) / self.count if self.count else math.nan
            for name, total in sums.items()
        }

    def mean(self, over_ranks: Callable[[Tensor], Tensor]) -> StepStatistics:
        """Return the mean of the ranks' sums; collective."""
        flat = over_ranks(torch.stack([self.loss, *self.auxiliary.values()]).float())
        loss, *others = flat.unbind()
        return replace(self, loss=loss, auxiliary=dict(zip(self.auxiliary, others, strict=True)))

    def state(self, accumulate: int) -> dict[str, Any]:
        """Return what a checkpoint stores. accumulate: micro-batches a step."""
        return {
            "loss": self.loss.cpu(),
            "auxiliary": {name: value.cpu() for name, value in self.auxiliary.items()},
            "grad_norm": None if self.grad_norm is None else self.grad_norm.cpu(),
            "count": self.count,
            "accumulate": accumulate,
        }

    @classmethod
    def from_state(
        cls, state: Mapping[str, Any], accumulate: int, device: torch.device
    ) -> StepStatistics:
        """Restore what `state` returned, also where a step has other micro-batches now."""
        scale = accumulate / state["accumulate"]
        norm = state["grad_norm"]
        return cls(
            loss=state["loss"].to(device) * scale,
            auxiliary={n: value.to(device) * scale for n, value in state["auxiliary"].items()},
            count=round(state["count"] * scale),
            grad_norm=None if norm is None else norm.to(device),
        )


class RunningStats:
    """Sums what routers and experts see in a step, then updates the model's running statistics."""

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


@contextmanager
def restore_if(is_skipped: Tensor | None, buffers: Iterable[Tensor]) -> Iterator[None]:
    """Undo the block's changes of ``buffers`` to the bit if ``is_skipped``; None: never."""
    if is_skipped is None:
        yield
        return
    copies = [(buffer, buffer.clone()) for buffer in buffers]
    yield
    for buffer, before in copies:
        buffer.copy_(torch.where(is_skipped, before, buffer))
