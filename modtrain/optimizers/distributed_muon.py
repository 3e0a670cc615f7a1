"""torch's Muon where matrices lie in pieces on many ranks.

Newton-Schulz needs the whole matrix. torch's own step takes DTensors, but multiplies them piece by
piece in bfloat16: a sum over ranks at every product, and a step that differs by percents from that
of one process. Here a matrix's update is gathered once, in bfloat16, in which the iteration begins
anyway. The ranks share the matrices among them: each one makes another one orthogonal, and sends
the result to all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate


class DistributedMuon(torch.optim.Muon):
    """torch's Muon over plain matrices, and the same step for DTensors on any meshes of all ranks.

    Collective where there are DTensors: a gather and a broadcast a matrix, 2 and 4 bytes an
    element. A rank holds three of the largest whole matrices beside its own pieces.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step."""
        if not any(isinstance(p, DTensor) for group in self.param_groups for p in group["params"]):
            # torch's decorator leaves it untyped.
            return super().step(closure)  # type: ignore[no-untyped-call]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        world_size = dist.get_world_size()
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.grad is not None]
            for first in range(0, len(matrices), world_size):
                self._step_round(group, matrices[first : first + world_size])
        return loss

    def _step_round(self, group: Mapping[str, Any], matrices: Sequence[DTensor]) -> None:
        """Step as many matrices as there are ranks at most; rank i has the i-th to work on."""
        rank = dist.get_rank()
        own: Tensor | None = None
        for owner, matrix in enumerate(matrices):
            whole = _gather(self._update(group, matrix))
            if owner == rank:
                own = whole
        if own is not None:
            own = _orthogonal_step(group, own)
        for owner, matrix in enumerate(matrices):
            if owner == rank and own is not None:
                step = own
            else:
                step = torch.empty(matrix.shape, dtype=torch.float32, device=matrix.device)
            dist.broadcast(step, src=owner)
            matrix.mul_(1 - group["lr"] * group["weight_decay"])
            matrix.add_(_scatter(step, matrix), alpha=group["lr"])

    def _update(self, group: Mapping[str, Any], matrix: DTensor) -> DTensor:
        """Move the momentum, and return what is to be made orthogonal, in bfloat16."""
        gradient: Any = matrix.grad
        state, momentum = self.state[matrix], group["momentum"]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        mean = state["momentum_buffer"]
        mean.lerp_(gradient, 1 - momentum)
        update: Any = gradient.lerp(mean, momentum) if group["nesterov"] else mean
        narrow: DTensor = update.bfloat16()
        return narrow


def _orthogonal_step(group: Mapping[str, Any], update: Tensor) -> Tensor:
    """Return what torch's Muon adds to a whole matrix at rate 1, in fp32."""
    step = nn.Parameter(torch.zeros_like(update, dtype=torch.float32))
    step.grad = update.float()
    # A single step from zero, without momentum, is the orthogonal matrix with its factors.
    how = {key: group[key] for key in ("ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")}
    muon: Any = torch.optim.Muon(
        [step], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False, **how
    )
    muon.step()
    return step.detach()


def _gather(pieces: DTensor) -> Tensor:
    """Return the whole tensor."""
    placements = list(pieces.placements)
    # One axis after the other: FSDP's pieces of a tensor-parallel slice go before the slices.
    for axis in range(len(placements)):
        placements[axis] = Replicate()
        pieces = pieces.redistribute(placements=placements)
    return pieces.to_local()


def _scatter(whole: Tensor, like: DTensor) -> DTensor:
    """Return what of ``whole``, which every rank has, lies here, laid out as ``like``."""
    mesh = like.device_mesh
    everywhere = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=like.placements)
