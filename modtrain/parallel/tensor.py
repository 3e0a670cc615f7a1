"""Tensor parallelism with sequence-parallel norms, for models whose layers route tokens.

Each rank of a group has a slice of every matrix of a layer: some heads of an attention, some hidden
features of an MLP and of every expert. What a router sees, the residual stream between the parts,
is whole on each rank and the same to the bit, so all choose alike. A part (a block, or an attention
or an MLP routed by itself) cuts it along the sequence where it begins:

    whole stream --cut--> share --norm, spread--> all tokens --slices of matrices-->
    partial sums --collect--> share: residual, next norm, ... --join--> whole update

Shares are ceil(S / n) tokens long on every rank, zeros standing behind the last token, so any
number of tokens goes, as top-k and causal decisions leave it. Routers, gates, a mixture's norm and
choice of experts run whole on each rank; the experts' results are summed over the group. The loss
is made by each rank for its share of the tokens.

Costs of a block in forward, in bytes of its K tokens' features, D wide: two gathers, two
reduce-scatters and a gather at the end; backward as many. With experts the MLP's two become a
gather and a sum over their rows, of which token choice has top_k a token.

A gradient of what is whole on each rank comes out whole, and the same on all: the mean over the
group that FSDP takes of it leaves it as it is. Where only a share of the tokens or heads went
through a parameter, its gradient counts as often as there are ranks, so that the mean is the sum.

Shapes: B batch, S sequence, D model, V vocabulary, M rows, n ranks of the group, L = ceil(S / n).
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from modtrain.common.errors import raise_if_any
from modtrain.distributed.collectives import Group, as_multiplied
from modtrain.models.attention import Attention
from modtrain.models.block import Block
from modtrain.models.convolution import Convolution
from modtrain.models.depth.layer import MixtureOfDepths, Residual
from modtrain.models.experts.layer import ExpertMLPs, Experts
from modtrain.models.feed_forward import MLP, FeedForward
from modtrain.models.loss import IGNORED
from modtrain.models.norm import RMSNorm
from modtrain.models.sequence import Output, SequenceContext
from modtrain.models.transformer import Transformer
from modtrain.parallel.validation import tensor_problems


def slice_layers(model: Transformer, mesh: DeviceMesh) -> None:
    """Leave each rank its slices of the layers' matrices, as DTensors under the names they had.

    mesh: the group's, 1-D. All of its ranks have to hold equal weights, read the same data and draw
    the same random numbers. The gradients of what stays whole are then to be averaged over it.

    Raises:
        ConfigError: they cannot be cut so.
    """
    raise_if_any(tensor_problems(model.config, mesh.size()))
    group = Group.of(mesh)
    parts = [m.module for m in model.modules() if isinstance(m, Residual | MixtureOfDepths)]
    for part in parts:
        if isinstance(part, Block):
            _become(part, _SlicedBlock, group=group)
            _slice_part(part.attention, group, mesh, is_alone=False)
            _slice_part(part.mlp, group, mesh, is_alone=False)
        else:
            _slice_part(part, group, mesh, is_alone=True)
    _become(model, _TokenParallel, group=group)


class _TokenParallel(Transformer):
    """A model whose ranks each make the loss of their share of the tokens."""

    group: Group

    def token_loss(self, x_BSD: Tensor, weight_VD: Tensor, targets_BS: Tensor) -> Tensor:
        """Return the mean over all tokens, on every rank."""
        group = self.group
        own_BL = group.own_share(targets_BS, IGNORED)
        loss = super().token_loss(group.cut(x_BSD), group.counted(weight_VD), own_BL)
        own, all_of_them = ((t != IGNORED).sum().to(loss.dtype) for t in (own_BL, targets_BS))
        return group.total(loss * (own / all_of_them.clamp(min=1)))


class _SlicedBlock(Block):
    """A block between whose parts each rank has its share of the tokens."""

    group: Group

    def forward(self, x_BSD: Tensor, context: SequenceContext) -> Output:
        """Return the whole update (B, S, D)."""
        found = super().forward(self.group.cut(x_BSD), context)
        return found._replace(value_BSD=self.group.join(found.value_BSD, x_BSD.shape[1]))


class _Sliced(nn.Module):
    """A mixer or an MLP: from a share of the tokens, by way of all of them, to a share.

    is_alone: no block cuts the stream around it.
    """

    group: Group
    is_alone: bool
    norm: RMSNorm

    def forward(self, x: Tensor, context: SequenceContext) -> Tensor:
        """Return the update of the share (B, L, D), or alone the whole one (B, S, D)."""
        length = context.positions_BS.shape[1]
        x_BLD = _normed(self.norm, self.group.cut(x) if self.is_alone else x, self.group)
        all_BSD = self.group.spread(as_multiplied(x_BLD), length)
        update_BSD: Tensor = super().forward(all_BSD, context)
        update_BLD = self.group.collect(update_BSD)
        return self.group.join(update_BLD, length) if self.is_alone else update_BLD


class _SlicedAttention(_Sliced, Attention):
    """Attention with some of the heads."""


class _SlicedConvolution(_Sliced, Convolution):
    """A convolution of some of the features."""

    def weights(self) -> Tensor:
        """Return the taps of those features."""
        return _local(self.taps)


class _SlicedFeedForward(_Sliced, FeedForward):
    """An MLP with some of the hidden features."""


class _ApartExperts(Experts):
    """A mixture that runs whole on each rank, but for its experts' matrices."""

    group: Group
    is_alone: bool

    def forward(self, x: Tensor, context: SequenceContext) -> Output:
        """Return the update of the share (B, L, D), or alone the whole one (B, S, D)."""
        length = context.positions_BS.shape[1]
        found = super().forward(x if self.is_alone else self.group.join(x, length), context)
        update = self.group.cut(found.value_BSD)
        if self.is_alone:
            # Sums over experts may differ in their last bits, and the ranks have to choose alike.
            update = self.group.join(update, length)
        return found._replace(value_BSD=update)


class _SlicedExpertMLPs(ExpertMLPs):
    """Experts with some of the hidden features each."""

    group: Group

    def forward(self, x_MD: Tensor, offsets_E: Tensor | None) -> Tensor:
        """Return what the whole experts make of the rows."""
        return self.group.total(super().forward(self.group.each(x_MD), offsets_E))

    def weights(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return this rank's slices."""
        gate = None if self.gate is None else _local(self.gate)
        return _local(self.up), gate, _local(self.down)


class _SlicedMLP(MLP):
    """The shared experts, with some of the hidden features."""

    group: Group

    def forward(self, x: Tensor) -> Tensor:
        """Return what the whole MLP makes of the tokens."""
        return self.group.total(super().forward(self.group.each(x)))


class _SlicedLinear(nn.Linear):
    """Some of the features in, or out; then the results are parts of a sum."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, _local(self.weight))


class _PartNorm(RMSNorm):
    """A norm that sees some of the heads."""

    group: Group

    def forward(self, x: Tensor) -> Tensor:
        return _normed(self, x, self.group)


class _NormBefore(RMSNorm):
    """A norm that was applied to a share of the tokens, before its module got all of them."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def _normed(norm: RMSNorm, x: Tensor, group: Group) -> Tensor:
    """Normalise what is but a part of all that the gain is learned from."""
    return F.rms_norm(x, (x.shape[-1],), group.counted(norm.gain), norm.eps)


def _slice_part(module: nn.Module, group: Group, mesh: DeviceMesh, is_alone: bool) -> None:
    how = {"group": group, "is_alone": is_alone}
    if isinstance(module, Experts):
        _slice(module.inner, mesh, up=2, gate=2, down=1)
        _become(module.inner, _SlicedExpertMLPs, group=group)
        if module.shared is not None:
            _slice_mlp(module.shared, mesh)
            _become(module.shared, _SlicedMLP, group=group)
        _become(module, _ApartExperts, **how)
        return
    if isinstance(module, Attention):
        _slice_linears(mesh, [module.q, module.k, module.v], module.out)
        for norm in (module.q_norm, module.k_norm):
            if norm is not None:
                _become(norm, _PartNorm, group=group)
        kind: type[_Sliced] = _SlicedAttention
    elif isinstance(module, Convolution):
        _slice_linears(mesh, [module.value, module.gate], module.out)
        _slice(module, mesh, taps=1)
        kind = _SlicedConvolution
    elif isinstance(module, FeedForward):
        _slice_mlp(module.inner, mesh)
        kind = _SlicedFeedForward
    else:
        raise TypeError(f"nobody said how to slice {type(module).__name__}")
    _become(module.norm, _NormBefore)
    _become(module, kind, **how)


def _slice_mlp(mlp: MLP, mesh: DeviceMesh) -> None:
    _slice_linears(mesh, [mlp.up] if mlp.gate is None else [mlp.up, mlp.gate], mlp.down)


def _slice_linears(mesh: DeviceMesh, to_hidden: list[nn.Linear], from_hidden: nn.Linear) -> None:
    for linear in to_hidden:
        _slice(linear, mesh, weight=0)
    _slice(from_hidden, mesh, weight=1)
    for linear in (*to_hidden, from_hidden):
        _become(linear, _SlicedLinear)


def _slice(module: nn.Module, mesh: DeviceMesh, **dims: int) -> None:
    """Keep this rank's slice of the parameters of these names, cut by the dim that each has."""
    for name, dim in dims.items():
        whole = module._parameters.get(name)
        if whole is not None:
            # Every rank has it whole already: nothing is sent.
            sliced = distribute_tensor(whole.detach(), mesh, [Shard(dim)], src_data_rank=None)
            module._parameters[name] = nn.Parameter(sliced, whole.requires_grad)


def _local(parameter: Tensor | None) -> Tensor:
    if not isinstance(parameter, DTensor):
        raise TypeError("this parameter has not been cut into slices")
    return parameter.to_local()


def _become(module: nn.Module, kind: type[nn.Module], **attributes: Any) -> None:
    """Let a module compute in another way; its parameters and their names stay what they are."""
    module.__class__ = kind
    for name, value in attributes.items():
        setattr(module, name, value)
