"""Grouped matrix products: rows sorted by group, one weight matrix per group (expert).

``offsets_E`` has the cumulative ends of the groups. It is not read on the host where that would
wait for a device, and all shapes are static.

Shapes: N rows, E groups (experts), D and F features in and out, J blocks of T rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.utils.flop_counter import register_flop_formula

# Kernels load rows in vectors of 16 bytes.
_ALIGNMENT = 8
# Blocks per group under an even load: at most a quarter more rows, and 5 E matrices in memory.
_BLOCKS = 4


def grouped_matmul(x_ND: Tensor, weight_EDF: Tensor, offsets_E: Tensor) -> Tensor:
    """Multiply the rows from offsets_E[e - 1] up to offsets_E[e] by weight_EDF[e].

    Args:
        x_ND: rows, sorted by group.
        weight_EDF: a matrix per group, of the dtype of ``x_ND``; under autocast both are cast.
        offsets_E: cumulative ends of the groups, int32, at most N each; groups may be empty.

    Returns (N, F). Rows after the last offset are zero, whatever their input, and so are their
    gradients. `torch.utils.flop_counter` counts 2 D F FLOPs for each row before the last offset;
    with fake tensors, whose offsets cannot be read, for all N rows.
    """
    device = x_ND.device.type
    # As for torch's own products, autocast does not apply to float64.
    if torch.is_autocast_enabled(device) and x_ND.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x_ND, weight_EDF = x_ND.to(dtype), weight_EDF.to(dtype)
    out_NF: Tensor = _rows(x_ND, weight_EDF, offsets_E)
    return out_NF


# A custom operator: on the CPU it may read offsets, and the compiler sees a single node.
@torch.library.custom_op("modtrain::grouped_rows", mutates_args=())
def _rows(x_ND: Tensor, weight_EDF: Tensor, offsets_E: Tensor) -> Tensor:
    if x_ND.device.type == "cpu":
        return _looped_rows(x_ND, weight_EDF, offsets_E)
    if _is_native(x_ND, weight_EDF.shape[-1]):
        out_NF = F.grouped_mm(x_ND.contiguous(), weight_EDF, offs=offsets_E)
        after_last_N = torch.arange(len(x_ND), device=x_ND.device) >= offsets_E[-1]
        return out_NF.masked_fill_(after_last_N.unsqueeze(-1), 0)
    return _blocked_rows(x_ND, weight_EDF, offsets_E)


@torch.library.custom_op("modtrain::grouped_weight_gradient", mutates_args=())
def _weight_gradient(x_ND: Tensor, grad_NF: Tensor, offsets_E: Tensor) -> Tensor:
    if x_ND.device.type == "cpu":
        return _looped_weight_gradient(x_ND, grad_NF, offsets_E)
    if _is_native(x_ND, grad_NF.shape[-1]):
        out_EDF = F.grouped_mm(x_ND.contiguous().t(), grad_NF.contiguous(), offs=offsets_E)
        # Kernels leave the result of an empty group undefined.
        empty_E = offsets_E.diff(prepend=offsets_E.new_zeros(1)) == 0
        return out_EDF.masked_fill_(empty_E[:, None, None], 0)
    return _blocked_weight_gradient(x_ND, grad_NF, offsets_E)


@_rows.register_fake
def _(x_ND: Tensor, weight_EDF: Tensor, offsets_E: Tensor) -> Tensor:
    del offsets_E
    return x_ND.new_empty(x_ND.shape[0], weight_EDF.shape[2])


@_weight_gradient.register_fake
def _(x_ND: Tensor, grad_NF: Tensor, offsets_E: Tensor) -> Tensor:
    return x_ND.new_empty(offsets_E.shape[0], x_ND.shape[1], grad_NF.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    del output
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x_ND, weight_EDF, offsets_E = ctx.saved_tensors
    # The gradient of a sum is an expanded scalar, and kernels do not support its strides.
    grad_NF = grad_NF.contiguous()
    x_grad = weight_grad = None
    if ctx.needs_input_grad[0]:
        x_grad = _rows(grad_NF, weight_EDF.transpose(1, 2), offsets_E)
    if ctx.needs_input_grad[1]:
        weight_grad = _weight_gradient(x_ND, grad_NF, offsets_E)
    return x_grad, weight_grad, None


_rows.register_autograd(_backward, setup_context=_save)


@register_flop_formula(
    [torch.ops.modtrain.grouped_rows, torch.ops.modtrain.grouped_weight_gradient], get_raw=True
)
def _flops(x_ND: Tensor, other: Tensor, offsets_E: Tensor, out_val: Any = None) -> int:
    del out_val
    rows = x_ND.shape[0] if is_fake(offsets_E) else int(offsets_E[-1])
    return 2 * rows * x_ND.shape[1] * other.shape[-1]


def _is_native(x_ND: Tensor, width: int) -> bool:
    """Whether torch has a grouped kernel for this; its fallback waits for the offsets."""
    return (
        x_ND.device.type == "cuda"
        and torch.version.hip is None
        and x_ND.dtype == torch.bfloat16
        and x_ND.shape[1] % _ALIGNMENT == 0
        and width % _ALIGNMENT == 0
        and torch.cuda.get_device_capability(x_ND.device)[0] in (9, 10)
    )


def _looped_rows(x_ND: Tensor, weight_EDF: Tensor, offsets_E: Tensor) -> Tensor:
    out_NF = x_ND.new_empty(x_ND.shape[0], weight_EDF.shape[2])
    start = 0
    for weight_DF, end in zip(weight_EDF, offsets_E.tolist(), strict=True):
        torch.mm(x_ND[start:end], weight_DF, out=out_NF[start:end])
        start = end
    out_NF[start:] = 0
    return out_NF


def _looped_weight_gradient(x_ND: Tensor, grad_NF: Tensor, offsets_E: Tensor) -> Tensor:
    out_EDF = x_ND.new_empty(offsets_E.shape[0], x_ND.shape[1], grad_NF.shape[1])
    start = 0
    for out_DF, end in zip(out_EDF, offsets_E.tolist(), strict=True):
        torch.mm(x_ND[start:end].t(), grad_NF[start:end], out=out_DF)
        start = end
    return out_EDF


def _blocked_rows(x_ND: Tensor, weight_EDF: Tensor, offsets_E: Tensor) -> Tensor:
    """Batched products over blocks of rows, each within one group."""
    row_N, group_J, size = _blocks(x_ND.shape[0], offsets_E)
    x_JTD = _scatter_to_blocks(x_ND, row_N, len(group_J), size)
    out_JTF = x_JTD @ weight_EDF.index_select(0, group_J)
    # Rows after the last offset read the last block, which is always empty.
    return out_JTF.flatten(0, 1).index_select(0, row_N.clamp(max=len(group_J) * size - 1))


def _blocked_weight_gradient(x_ND: Tensor, grad_NF: Tensor, offsets_E: Tensor) -> Tensor:
    row_N, group_J, size = _blocks(x_ND.shape[0], offsets_E)
    x_JTD = _scatter_to_blocks(x_ND, row_N, len(group_J), size)
    part_JDF = x_JTD.transpose(1, 2) @ _scatter_to_blocks(grad_NF, row_N, len(group_J), size)
    zero_EDF = part_JDF.new_zeros(offsets_E.shape[0], *part_JDF.shape[1:])
    return zero_EDF.index_add_(0, group_J, part_JDF)


def _blocks(rows: int, offsets_E: Tensor) -> tuple[Tensor, Tensor, int]:
    """Assign rows to blocks when every group is padded to whole blocks.

    Returns the index of each row in the blocks (N), the group of each block (J), and the rows per
    block. Rows after the last offset go behind the last block.
    """
    groups, device = offsets_E.shape[0], offsets_E.device
    size = max(1, -(-rows // (_BLOCKS * groups)))
    # Padding adds less than a block per group, so the last of these stays empty.
    count = -(-rows // size) + groups
    ends_E = offsets_E.long()
    starts_E = torch.cat([ends_E.new_zeros(1), ends_E[:-1]])
    blocks_E = (ends_E - starts_E + size - 1) // size
    block_ends_E = blocks_E.cumsum(0)
    number_N = torch.arange(rows, device=device)
    group_N = torch.searchsorted(ends_E, number_N, right=True).clamp_(max=groups - 1)
    index_N = ((block_ends_E - blocks_E) * size - starts_E)[group_N] + number_N
    index_N = torch.where(number_N < ends_E[-1], index_N, count * size)
    group_J = torch.searchsorted(block_ends_E, torch.arange(count, device=device), right=True)
    return index_N, group_J.clamp_(max=groups - 1), size


def _scatter_to_blocks(x_ND: Tensor, index_N: Tensor, blocks: int, size: int) -> Tensor:
    """Scatter rows into blocks (J, T, D), zero-padded; rows behind the last block are dropped."""
    out = x_ND.new_zeros(blocks * size + 1, x_ND.shape[1]).index_copy_(0, index_N, x_ND)
    return out[:-1].view(blocks, size, -1)
