"""Statistics of the steps between two records, summed on the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from modtrain.models.sequence import ExpertRecord, RoutingRecord
from modtrain.models.transformer import ModelOutput

Record = TypeVar("Record", RoutingRecord, ExpertRecord)


@dataclass
class StepStatistics:
    """Sums over the micro-batches since the last record. On the device: reading them waits.

    loss, auxiliary: sums over ``count`` micro-batches; auxiliary losses by name, with their weights
    in the objective. grad_norm: the trunk's, of the last step, before clipping. routing, experts:
    the records of the last micro-batch.
    """

    loss: Tensor
    auxiliary: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0
    grad_norm: Tensor | None = None
    routing: tuple[RoutingRecord, ...] = ()
    experts: tuple[ExpertRecord, ...] = ()

    @classmethod
    def zero(cls, device: torch.device) -> StepStatistics:
        """Return empty statistics."""
        return cls(torch.zeros((), device=device))

    @property
    def total(self) -> Tensor:
        """The objective: the loss and the auxiliary losses."""
        return sum(self.auxiliary.values(), start=self.loss)

    def add(self, output: ModelOutput) -> None:
        """Add one micro-batch."""
        if output.loss is not None:
            self.loss = self.loss + output.loss.detach()
        for name, value in output.auxiliary.items():
            before = self.auxiliary.get(name)
            self.auxiliary[name] = value.detach() if before is None else before + value.detach()
        self.count += 1
        self.routing = tuple(_detached(record) for record in output.routing)
        self.experts = tuple(_detached(record) for record in output.experts)

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

    def discard(self, count: int) -> None:
        """Subtract ``count`` micro-batches of skipped steps from the count."""
        self.count -= count

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
        names = self.auxiliary
        return replace(self, loss=loss, auxiliary=dict(zip(names, others, strict=True)))

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


def _detached(record: Record) -> Record:
    """Return the record without its autograd graph."""
    values: list[Any] = [None if value is None else value.detach() for value in record]
    return type(record)(*values)
