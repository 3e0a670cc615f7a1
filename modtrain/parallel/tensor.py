"""Tensor parallelism with sequence-parallel norms, for models whose layers route tokens.

Each rank of a group has a slice of every matrix of a layer: some heads of an attention, some hidden
features of an MLP and of every expert. What a router sees, the residual stream between the parts,
is whole on each rank and the same to the bit, so all choose alike. A part (a block, or an attention
or an MLP routed by itself) scatters it along the sequence where it begins:

    whole stream --scatter_seq--> chunk --norm, gather_seq_sum_grad--> all tokens
    --slices of matrices--> partial sums --reduce_scatter_seq--> chunk: residual, next norm, ...
    --gather_seq--> whole update

Chunks are ceil(S / n) tokens long on every rank, zeros standing behind the last token, so any
number of tokens can be split, as top-k and causal decisions leave it. Routers, gates, a mixture's
norm and choice of experts run whole on each rank; the experts' results are summed over the group.
The loss is made by each rank for its chunk of the tokens.

Costs of a block in forward, in bytes of its K tokens' features, D wide: two gathers, two
reduce-scatters and a gather at the end; backward as many. With experts the MLP's two become a
gather and a sum over their rows, of which token choice has top_k a token.

A gradient of what is whole on each rank comes out whole, and the same on all: the mean over the
group that FSDP takes of it leaves it as it is. Where only a chunk of the tokens or some heads went
through a parameter, its gradient counts as often as there are ranks, so that the mean is the sum.

Under context parallelism "all tokens" are those of this rank's share of the sequences.

Shapes: B batch, S sequence, D model, V vocabulary, M rows, n ranks of the group, L = ceil(S / n).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from modtrain.common.errors import raise_if_any
from modtrain.common.ignored_target import IGNORED
from modtrain.distributed.collectives import Group, cast_for_autocast
from modtrain.models.attention import Attention
from modtrain.models.block import Block, Residual
from modtrain.models.convolution import Convolution
from modtrain.models.depth.layer import MixtureOfDepths
from modtrain.models.experts.layer import ExpertMLPs, Experts
from modtrain.models.feed_forward import MLP, FeedForward
from modtrain.models.norm import RMSNorm
from modtrain.models.sequence import Output, SequenceContext
from modtrain.models.transformer import Transformer
from modtrain.parallel.context import local_length
from modtrain.parallel.swap import swap_class
from modtrain.parallel.validation import tensor_problems


def apply_tensor_parallel(model: Transformer, mesh: DeviceMesh, context_size: int = 1) -> None:
    """Leave each rank its slices of the layers' matrices, as DTensors under the names they had.

    mesh: the group's, 1-D. All of its ranks have to hold equal weights, read the same data and draw
    the same random numbers. The gradients of what stays whole are then to be averaged over it.
    context_size: ranks that share each sequence, where context parallelism follows.

    Raises:
        ConfigError: they cannot be sliced so.
        TypeError: a module is of a type that tensor parallelism does not support.
    """
    raise_if_any(tensor_problems(model.config, mesh.size()))
    group = Group.of(mesh)
    parts = [m.module for m in model.modules() if isinstance(m, Residual | MixtureOfDepths)]
    for part in parts:
        if isinstance(part, Block):
            swap_class(part, TPBlock, group=group)
            _slice_part(part.attention, group, mesh, context_size, is_alone=False)
            _slice_part(part.mlp, group, mesh, context_size, is_alone=False)
        else:
            _slice_part(part, group, mesh, context_size, is_alone=True)
    swap_class(model, TPTransformer, group=group)


class TPTransformer(Transformer):
    """A model whose ranks each make the loss of their chunk of the tokens."""

    group: Group

    def token_loss(self, x_BSD: Tensor, weight_VD: Tensor, targets_BS: Tensor) -> Tensor:
        """Return the mean over all tokens, on every rank."""
        group = self.group
        own_BL = group.local_seq_chunk(targets_BS, IGNORED)
        loss = super().token_loss(group.scatter_seq(x_BSD), group.scale_grad(weight_VD), own_BL)
        own, total = ((t != IGNORED).sum().to(loss.dtype) for t in (own_BL, targets_BS))
        return group.sum_copy_grad(loss * (own / total.clamp(min=1)))


class TPBlock(Block):
    """A block between whose parts each rank has its chunk of the tokens."""

    group: Group

    def forward(self, x_BSD: Tensor, context: SequenceContext) -> Output:
        """Return the whole update (B, S, D)."""
        output = super().forward(self.group.scatter_seq(x_BSD), context)
        return output.with_value(self.group.gather_seq(output.value_BSD, x_BSD.shape[1]))


class _TPPart(nn.Module):
    """A part of a layer.

    is_alone: no block scatters the stream around it.
    """

    group: Group
    context_size: int
    is_alone: bool

    def num_tokens(self, context: SequenceContext) -> int:
        """Return how many tokens the ranks of the group have together."""
        return local_length(context.positions_BS.shape[1], self.context_size)


class _TPModule(_TPPart):
    """A mixer or an MLP with some of the heads or hidden features.

    From a chunk of the tokens, by way of all of them, to a chunk.
    """

    norm: RMSNorm

    def forward(self, x: Tensor, context: SequenceContext) -> Tensor:
        """Return the update of the chunk (B, L, D), or alone the whole one (B, S, D)."""
        x_BLD = self.group.scatter_seq(x) if self.is_alone else x
        update_BSD: Tensor = super().forward(self.all_normed(x_BLD, context), context)
        update_BLD = self.group.reduce_scatter_seq(update_BSD)
        if not self.is_alone:
            return update_BLD
        return self.group.gather_seq(update_BLD, self.num_tokens(context))

    def all_normed(self, x_BLD: Tensor, context: SequenceContext) -> Tensor:
        """Return the normed features of all tokens (B, S, D), of which each rank has a chunk."""
        normed_BLD = _norm_of_part(self.norm, x_BLD, self.group)
        length = self.num_tokens(context)
        return self.group.gather_seq_sum_grad(cast_for_autocast(normed_BLD), length)


class TPAttention(_TPModule, Attention):
    """Attention of some of the heads."""

    def keys_values(self, x_BSD: Tensor, context: SequenceContext) -> tuple[Tensor, Tensor]:
        """Return these heads' keys and values of all tokens of the whole stream."""
        return super().keys_values(self.all_normed(self.group.scatter_seq(x_BSD), context), context)


class TPConvolution(_TPModule, Convolution):
    """A convolution of some of the features."""

    def weights(self) -> Tensor:
        """Return the taps of those features."""
        return _local_slice(self.taps)


class TPExperts(_TPPart, Experts):
    """A mixture that runs whole on each rank, but for its experts' matrices."""

    def forward(self, x: Tensor, context: SequenceContext) -> Output:
        """Return the update of the chunk (B, L, D), or alone the whole one (B, S, D)."""
        length = self.num_tokens(context)
        x_BSD = x if self.is_alone else self.group.gather_seq(x, length)
        output = super().forward(x_BSD, context)
        update = self.group.scatter_seq(output.value_BSD)
        if self.is_alone:
            # Sums over experts may differ in their last bits, and the ranks have to choose alike.
            update = self.group.gather_seq(update, length)
        return output.with_value(update)


class TPExpertMLPs(ExpertMLPs):
    """Experts with some of the hidden features each."""

    group: Group

    def forward(self, x_MD: Tensor, offsets_E: Tensor | None) -> Tensor:
        """Return what the whole experts make of the rows."""
        y_MD = super().forward(self.group.copy_sum_grad(x_MD), offsets_E)
        return self.group.sum_copy_grad(y_MD)

    def weights(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return this rank's slices."""
        gate = None if self.gate is None else _local_slice(self.gate)
        return _local_slice(self.up), gate, _local_slice(self.down)


class TPMLP(MLP):
    """The shared experts, with some of the hidden features."""

    group: Group

    def forward(self, x: Tensor) -> Tensor:
        """Return what the whole MLP makes of the tokens."""
        return self.group.sum_copy_grad(super().forward(self.group.copy_sum_grad(x)))


class TPLinear(nn.Linear):
    """Some of the features in, or out; then the results are parts of a sum."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the slice's product."""
        bias = None if self.bias is None else _local_slice(self.bias)
        return F.linear(x, _local_slice(self.weight), bias)


class TPHeadNorm(RMSNorm):
    """A norm that sees some of the heads."""

    group: Group

    def forward(self, x: Tensor) -> Tensor:
        """Return the normed heads."""
        return _norm_of_part(self, x, self.group)


class TPAppliedNorm(RMSNorm):
    """A norm that was applied to a chunk of the tokens, before its module got all of them."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``."""
        return x


def _norm_of_part(norm: RMSNorm, x: Tensor, group: Group) -> Tensor:
    """Normalise what is but a part of all that the gain is learned from."""
    return F.rms_norm(x, (x.shape[-1],), group.scale_grad(norm.gain), norm.eps)


def _slice_part(
    module: nn.Module, group: Group, mesh: DeviceMesh, context_size: int, is_alone: bool
) -> None:
    kind: type[_TPPart] = _TPModule
    if isinstance(module, Experts):
        kind = TPExperts
        _slice(module.inner, mesh, up=2, gate=2, down=1)
        swap_class(module.inner, TPExpertMLPs, group=group)
        if module.shared is not None:
            _slice_mlp(module.shared, mesh)
            swap_class(module.shared, TPMLP, group=group)
    elif isinstance(module, Attention):
        kind = TPAttention
        _slice_linears(mesh, [module.q, module.k, module.v], module.out)
        for norm in (module.q_norm, module.k_norm):
            if norm is not None:
                swap_class(norm, TPHeadNorm, group=group)
    elif isinstance(module, Convolution):
        kind = TPConvolution
        _slice_linears(mesh, [module.value, module.gate], module.out)
        _slice(module, mesh, taps=1)
    elif isinstance(module, FeedForward):
        _slice_mlp(module.inner, mesh)
    else:
        raise TypeError(f"tensor parallelism does not support {type(module).__name__}")
    if issubclass(kind, _TPModule):
        swap_class(module.norm, TPAppliedNorm)
    swap_class(module, kind, group=group, context_size=context_size, is_alone=is_alone)


def _slice_mlp(mlp: MLP, mesh: DeviceMesh) -> None:
    _slice_linears(mesh, [mlp.up] if mlp.gate is None else [mlp.up, mlp.gate], mlp.down)


def _slice_linears(mesh: DeviceMesh, to_hidden: list[nn.Linear], from_hidden: nn.Linear) -> None:
    for linear in to_hidden:
        _slice(linear, mesh, weight=0, bias=0)
    _slice(from_hidden, mesh, weight=1)
    for linear in (*to_hidden, from_hidden):
        swap_class(linear, TPLinear)


def _local_slice(parameter: Tensor | None) -> Tensor:
    # A whole parameter would be counted once by each rank.
    if not isinstance(parameter, DTensor):
        raise TypeError("this parameter is not sliced")
    return parameter.to_local()


def _slice(module: nn.Module, mesh: DeviceMesh, **dims: int) -> None:
    """Keep this rank's slice of the parameters of these names, along the dim that each has."""
    for name, dim in dims.items():
        whole = module._parameters.get(name)
        if whole is not None:
            # Every rank has it whole already: nothing is sent.
            sliced = distribute_tensor(whole.detach(), mesh, [Shard(dim)], src_data_rank=None)
            module._parameters[name] = nn.Parameter(sliced, whole.requires_grad)
