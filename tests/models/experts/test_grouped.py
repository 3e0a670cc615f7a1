"""Products of rows with one matrix a group, on every path.

Shapes: N rows, E groups (experts), D and F features in and out.
"""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from modtrain.models.experts import grouped
from modtrain.models.experts.grouped import grouped_matmul
from tests.helpers.model_cases import quick
from tests.models.experts.experts_reference import assert_close, normal


def grouped_reference(x_ND: Tensor, weight_EDF: Tensor, offsets: list[int]) -> Tensor:
    rows = [torch.zeros(weight_EDF.shape[2], dtype=x_ND.dtype) for _ in x_ND]
    for number, end in enumerate(offsets):
        for row in range(offsets[number - 1] if number else 0, end):
            rows[row] = x_ND[row] @ weight_EDF[number]
    return torch.stack(rows)


@pytest.mark.usefixtures("_poisoned_memory")
@pytest.mark.parametrize("way", ["looped", "blocked"])
def test_grouped_products_equal_the_reference(way, monkeypatch):
    if way == "blocked":
        monkeypatch.setattr(grouped, "_looped_rows", grouped._blocked_rows)
        monkeypatch.setattr(grouped, "_looped_weight_gradient", grouped._blocked_weight_gradient)

    @quick(60)
    @given(st.lists(st.integers(0, 7), min_size=1, max_size=5), st.integers(0, 5), st.booleans())
    @example([0, 0], 3, False)
    @example([30, 0, 1, 0, 0], 2, False)
    def check(counts, behind, expanded):
        offsets = torch.tensor(counts).cumsum(0).int()
        rows = int(offsets[-1]) + behind
        if rows == 0:
            return
        x_ND = normal(rows, 3)
        x_ND[offsets[-1] :] = math.inf
        x_ND.requires_grad_()
        weight_EDF = normal(len(counts), 3, 4, seed=1).requires_grad_()
        actual = grouped_matmul(x_ND, weight_EDF, offsets)
        expected = grouped_reference(x_ND, weight_EDF, offsets.tolist())
        assert_close(actual, expected, "product")
        factor = torch.ones(()) if expanded else normal(rows, 4, seed=2)
        ours = torch.autograd.grad((actual * factor).sum(), [x_ND, weight_EDF])
        theirs = torch.autograd.grad(
            (expected * factor).sum() + 0 * weight_EDF.sum() + 0 * x_ND[: offsets[-1]].sum(),
            [x_ND, weight_EDF],
        )
        for name, one, two in zip(("rows", "weights"), ours, theirs, strict=True):
            assert_close(one, two, f"gradient of {name}")

    check()


def test_the_operators_are_sound():
    offsets = torch.tensor([2, 2, 5], dtype=torch.int32)
    x_ND = normal(7, 3).requires_grad_()
    weight_EDF = normal(3, 3, 4, seed=1).requires_grad_()
    torch.library.opcheck(grouped._rows, (x_ND, weight_EDF, offsets))
    torch.library.opcheck(grouped._weight_gradient, (x_ND.detach(), normal(7, 4), offsets))


def test_flops_are_of_the_rows_computed():
    """Forward and backward; without offsets to read, of all the rows."""
    offsets = torch.tensor([2, 2, 5], dtype=torch.int32)
    for fake, rows in ((False, 5), (True, 7)):
        mode = FakeTensorMode()
        tensors = [normal(7, 3), normal(3, 3, 4), offsets]
        if fake:
            tensors = [mode.from_tensor(tensor) for tensor in tensors]
        x_ND, weight_EDF = (tensor.requires_grad_() for tensor in tensors[:2])
        with FlopCounterMode(display=False) as counter:
            grouped_matmul(x_ND, weight_EDF, tensors[2]).sum().backward()
        assert counter.get_total_flops() == 3 * 2 * rows * 3 * 4


def test_autocast_narrows_grouped_products_but_not_float64():
    offsets = torch.tensor([2, 2, 5], dtype=torch.int32)
    x_ND, weight_EDF = normal(7, 3), normal(3, 3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert grouped_matmul(x_ND, weight_EDF, offsets).dtype == torch.float64
        narrow = grouped_matmul(x_ND.float(), weight_EDF.float(), offsets)
    assert narrow.dtype == torch.bfloat16
    exact = grouped_matmul(x_ND, weight_EDF, offsets)
    assert (narrow - exact).abs().max() <= 0.02 * exact.abs().max()
