"""The language model's loss, without holding the logits of all tokens in memory.

Shapes: B batch, S sequence, N tokens, C tokens of a chunk, D model, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from modtrain.common.ignored_target import IGNORED

LOGITS_IN_MEMORY = 2**25
"""Number of logits of a chunk by default: 128 MiB in float32."""


def next_token_loss(
    x_BSD: Tensor, weight_VD: Tensor, targets_BS: Tensor, chunk: int | None = None
) -> Tensor:
    """Mean cross-entropy in nats of the logits x @ weight.T; 0 if every target is ignored.

    Logits are computed ``chunk`` tokens at a time. If a gradient is needed, each chunk's gradient
    is computed in the forward pass from its logits: no product is computed twice, and backward only
    multiplies. There is no second derivative. Softmax, the loss and the sum over chunks of the
    weight's gradient are in float32 or wider; under autocast the products are in its dtype.

    x_BSD: features of the tokens, (…, D). targets_BS: ids, (…); `IGNORED` ones do not count.
    chunk: tokens at a time; None: as many as give `LOGITS_IN_MEMORY` logits.

    Raises:
        ValueError: ``chunk`` is below 1.
    """
    if chunk is None:
        chunk = max(1, LOGITS_IN_MEMORY // weight_VD.shape[0])
    if chunk < 1:
        raise ValueError(f"a chunk has at least one token, not {chunk}")
    x_ND, targets_N = x_BSD.reshape(-1, x_BSD.shape[-1]), targets_BS.reshape(-1)
    dtype = _product_dtype(x_ND)
    # Inside the autograd function gradients are disabled, so this has to be asked here.
    enabled = torch.is_grad_enabled()
    for_x, for_weight = enabled and x_ND.requires_grad, enabled and weight_VD.requires_grad
    if not (for_x or for_weight):
        return _loss_and_gradients(x_ND, weight_VD, targets_N, chunk, dtype, False, False)[0]
    loss: Tensor = _NextTokenLoss.apply(  # type: ignore[no-untyped-call]
        x_ND, weight_VD, targets_N, chunk, dtype, for_x, for_weight
    )
    return loss


class _NextTokenLoss(torch.autograd.Function):
    """The loss; its gradients are saved for backward, which multiplies them by its factor."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        chunk: int,
        dtype: torch.dtype,
        for_x: bool,
        for_weight: bool,
    ) -> Tensor:
        loss, for_x_ND, for_weight_VD = _loss_and_gradients(
            x_ND, weight_VD, targets_N, chunk, dtype, for_x, for_weight
        )
        ctx.save_for_backward(for_x_ND, for_weight_VD)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        for_x_ND, for_weight_VD = ctx.saved_tensors
        # Not in place: the graph may be retained for another backward.
        for_x_ND = None if for_x_ND is None else for_x_ND * factor.to(for_x_ND.dtype)
        if for_weight_VD is not None:
            for_weight_VD = for_weight_VD * factor.to(for_weight_VD.dtype)
        return for_x_ND, for_weight_VD, None, None, None, None, None


def _loss_and_gradients(
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    chunk: int,
    dtype: torch.dtype,
    for_x: bool,
    for_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the loss and the requested gradients, (N, D) and (V, D)."""
    wide = torch.promote_types(dtype, torch.float32)
    counts_N1 = (targets_N != IGNORED).unsqueeze(1)
    share = counts_N1.sum().clamp(min=1).to(wide).reciprocal()
    ids_N1 = targets_N.unsqueeze(1).where(counts_N1, 0)
    loss = torch.zeros((), dtype=wide, device=x_ND.device)
    pieces_CD: list[Tensor] = []
    total_VD: Tensor | None = None
    with torch.autocast(x_ND.device.type, enabled=False):
        product_VD = weight_VD.to(dtype)
        for start in range(0, x_ND.shape[0], chunk):
            part = slice(start, start + chunk)
            x_CD, counts_C1 = x_ND[part].to(dtype), counts_N1[part]
            log_prob_C1, grad_CV = _chunk(x_CD, product_VD, ids_N1[part], for_x or for_weight)
            loss = loss - log_prob_C1.where(counts_C1, 0.0).sum()
            # The mask and the mean multiply tensors of width D rather than V.
            if for_x and grad_CV is not None:
                pieces_CD.append(((grad_CV @ product_VD) * (counts_C1 * share)).to(x_ND.dtype))
            if for_weight and grad_CV is not None:
                total_VD = _add_product(total_VD, grad_CV, x_CD * counts_C1, wide)
            del grad_CV  # It would be kept until the next chunk's is made.
    for_x_ND = (torch.cat(pieces_CD) if pieces_CD else torch.zeros_like(x_ND)) if for_x else None
    if not for_weight:
        return loss * share, for_x_ND, None
    if total_VD is None:
        return loss * share, for_x_ND, torch.zeros_like(weight_VD)
    return loss * share, for_x_ND, total_VD.mul_(share).to(weight_VD.dtype)


def _chunk(
    x_CD: Tensor, weight_VD: Tensor, ids_C1: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the log-probability of each id, and the logits' gradient: softmax minus one-hot."""
    wide = torch.promote_types(x_CD.dtype, torch.float32)
    log_probs_CV = torch.log_softmax(x_CD @ weight_VD.T, dim=-1, dtype=wide)
    log_prob_C1 = log_probs_CV.gather(1, ids_C1)
    if not with_gradient:
        return log_prob_C1, None
    # Subtract 1 before rounding: a nearly certain id's gradient would be nothing but rounding.
    grad_CV = log_probs_CV.exp_().to(x_CD.dtype)
    return log_prob_C1, grad_CV.scatter_(1, ids_C1, log_prob_C1.expm1().to(x_CD.dtype))


def _add_product(
    total_VD: Tensor | None, grad_CV: Tensor, x_CD: Tensor, wide: torch.dtype
) -> Tensor:
    """Add grad.T @ x to the running sum, in place, in the sum's precision."""
    if total_VD is None:
        return (grad_CV.T @ x_CD).to(wide)
    if x_CD.dtype == wide:
        return torch.addmm(total_VD, grad_CV.T, x_CD, out=total_VD)
    return total_VD.add_(grad_CV.T @ x_CD)


def _product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of ``F.linear(x)``: autocast's if enabled, which does not apply to float64."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype
