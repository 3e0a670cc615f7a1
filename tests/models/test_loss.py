"""The chunked loss against cross-entropy of whole logits: value, gradients, memory and FLOPs.

Shapes: B batch, S sequence, N tokens, D model, V vocabulary.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from modtrain.common.ignored_target import IGNORED
from modtrain.models import loss as loss_module
from modtrain.models.loss import next_token_loss
from tests.helpers.dispatch import Seen

pytestmark = pytest.mark.usefixtures("fresh_compiler")
# bfloat16 keeps eight bits, and the two sides round at different places.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 0.02}


def cases(
    count: int, dim: int, vocab: int, *, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Features (N, D), weight (V, D) and targets (N), none of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    x_ND = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    weight_VD = torch.randn(vocab, dim, generator=generator, dtype=torch.float64)
    targets_N = torch.randint(vocab, (count,), generator=generator)
    return x_ND.to(dtype).requires_grad_(), weight_VD.to(dtype).requires_grad_(), targets_N


def whole(x_BSD: Tensor, weight_VD: Tensor, targets_BS: Tensor) -> Tensor:
    """The definition, with 0 where there is nothing to take the mean of."""
    logits_NV = F.linear(x_BSD, weight_VD).flatten(0, -2)
    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    total = F.cross_entropy(
        logits_NV.to(wide), targets_BS.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total / (targets_BS != IGNORED).sum().clamp(min=1)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    scale = float(expected.detach().abs().amax()) if expected.numel() else 0.0
    error = float((actual - expected).detach().abs().amax()) if expected.numel() else 0.0
    assert error <= tolerance * max(scale, 1e-3), f"off by {error:.1e} of {scale:.1e}"


def assert_same(call, x: Tensor, weight_VD: Tensor, targets: Tensor, tolerance: float) -> None:
    """The same loss and gradients as ``whole``'s, of a loss that is scaled afterwards."""
    actual, expected = call(x, weight_VD, targets), whole(x, weight_VD, targets)
    assert_close(actual, expected, tolerance)
    leaves = [tensor for tensor in (x, weight_VD) if tensor.requires_grad]
    gradients = [torch.autograd.grad(value * 3, leaves) for value in (actual, expected)]
    for one, two in zip(*gradients, strict=True):
        assert_close(one, two, tolerance)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    *(st.integers(1, most) for most in (20, 9, 30, 25)),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    st.booleans(),
    st.data(),
)
def test_it_equals_cross_entropy_of_whole_logits(count, dim, vocab, chunk, dtype, autocast, data):
    x_ND, weight_VD, targets_N = cases(count, dim, vocab, dtype=dtype)
    ignored = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    targets_N[torch.tensor(ignored)] = IGNORED
    x_ND.requires_grad_(data.draw(st.booleans()))
    weight_VD.requires_grad_(data.draw(st.booleans()) or not x_ND.requires_grad)
    narrow = autocast and dtype != torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        assert_same(
            lambda *inputs: next_token_loss(*inputs, chunk),
            *(x_ND, weight_VD, targets_N),
            TOLERANCES[torch.bfloat16 if narrow else dtype],
        )


def test_any_leading_dimensions_are_tokens():
    x_ND, weight_VD, targets_N = cases(12, 5, 7)
    x_BSD = x_ND.detach().view(3, 4, 5).requires_grad_()
    targets_BS = targets_N.view(3, 4)
    # Sliced as a batch (B, S + 1) is: not contiguous.
    actual = next_token_loss(x_BSD[:, 1:], weight_VD, targets_BS[:, :-1], 5)
    assert_close(actual, whole(x_BSD[:, 1:], weight_VD, targets_BS[:, :-1]), 1e-12)
    assert_same(next_token_loss, x_BSD, weight_VD, targets_BS, 1e-12)


@pytest.mark.parametrize("count", [0, 4])
def test_nothing_to_learn_from_is_zero_and_so_is_its_gradient(count):
    x_ND, weight_VD, targets_N = cases(count, 3, 5)
    loss = next_token_loss(x_ND, weight_VD, torch.full_like(targets_N, IGNORED), 3)
    loss.backward()
    assert loss == 0
    assert not x_ND.grad.any()
    assert not weight_VD.grad.any()


def test_a_target_that_is_no_token_is_refused():
    x_ND, weight_VD, _ = cases(2, 3, 5)
    for wrong in (-1, 5):
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            next_token_loss(x_ND, weight_VD, torch.tensor([0, wrong]))
    with pytest.raises(ValueError, match="at least one"):
        next_token_loss(x_ND, weight_VD, torch.tensor([0, 1]), 0)


def test_a_nearly_certain_target_keeps_its_gradient_in_bfloat16():
    """Its softmax in bfloat16, less 1, would be off by a third."""
    x_ND = torch.ones(1, 1, dtype=torch.bfloat16)
    weight_VD = torch.tensor([[0.0], [5.0]], dtype=torch.bfloat16, requires_grad=True)
    next_token_loss(x_ND, weight_VD, torch.tensor([1])).backward()
    expected = torch.tensor([[5.0]]).neg().sigmoid()
    torch.testing.assert_close(-weight_VD.grad[1:].float(), expected, rtol=0.005, atol=0)


def test_huge_logits_stay_finite():
    x_ND, weight_VD, targets_N = cases(6, 4, 9, dtype=torch.float32)
    with torch.no_grad():
        x_ND *= 1e5
    assert_same(lambda *inputs: next_token_loss(*inputs, 4), x_ND, weight_VD, targets_N, 2e-6)


def test_a_tied_weight_gets_both_gradients():
    _, weight_VD, targets_N = cases(6, 4, 9)
    inputs_N = targets_N.roll(1)
    gradients = []
    for call in (whole, lambda *inputs: next_token_loss(*inputs, 4)):
        x_ND = torch.tanh(F.embedding(inputs_N, weight_VD))
        gradients.append(torch.autograd.grad(call(x_ND, weight_VD, targets_N), weight_VD)[0])
    assert_close(*gradients, 1e-12)


def test_gradients_add_up_over_calls_and_over_a_retained_graph():
    x_ND, weight_VD, targets_N = cases(6, 4, 9)
    loss = next_token_loss(x_ND, weight_VD, targets_N, 4)
    loss.backward(retain_graph=True)
    first = weight_VD.grad.clone()
    (2 * loss).backward()
    assert_close(weight_VD.grad, 3 * first, 1e-12)
    next_token_loss(x_ND, weight_VD, targets_N, 4).backward()
    assert_close(weight_VD.grad, 4 * first, 1e-12)
    assert_close(weight_VD, nn.Parameter(weight_VD.detach().clone()), 0.0)


def test_a_second_derivative_is_refused_not_wrong():
    x_ND, weight_VD, targets_N = cases(6, 4, 9)
    factor = torch.ones((), dtype=torch.float64, requires_grad=True)
    loss = factor * next_token_loss(x_ND, weight_VD, targets_N, 4)
    (gradient,) = torch.autograd.grad(loss, x_ND, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("autocast", [False, True])
def test_no_tensor_is_larger_than_a_chunks_logits(autocast):
    x_ND, weight_VD, targets_N = cases(40, 4, 30, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        with Seen() as seen:
            next_token_loss(x_ND, weight_VD, targets_N, 7).backward()
        assert seen.elements == 7 * 30
        with Seen() as seen:
            whole(x_ND, weight_VD, targets_N).backward()
        assert seen.elements == 40 * 30


def test_two_chunks_logits_are_the_most_in_memory():
    """Logits and their softmax; nothing of the chunk before."""
    x_ND, weight_VD, targets_N = cases(100, 2, 300, dtype=torch.float32)
    logits = 20 * 300 * 4
    with Seen() as seen:
        next_token_loss(x_ND, weight_VD, targets_N, 20).backward()
    assert 2 * logits <= seen.peak_bytes < 2.5 * logits


@pytest.mark.parametrize(("limit", "rows"), [(64, 6), (5, 1)])
def test_the_default_chunk_has_a_bounded_number_of_logits(monkeypatch, limit, rows):
    monkeypatch.setattr(loss_module, "LOGITS_IN_MEMORY", limit)
    x_ND, weight_VD, targets_N = cases(40, 1, 10)
    with Seen() as seen:
        next_token_loss(x_ND, weight_VD, targets_N)
    assert seen.elements == max(rows * 10, 40)


@pytest.mark.parametrize(
    ("for_x", "for_weight", "products"), [(True, True, 3), (True, False, 2), (False, True, 2)]
)
def test_no_product_is_computed_twice_or_in_vain(for_x, for_weight, products):
    x_ND, weight_VD, targets_N = cases(11, 4, 30)
    x_ND.requires_grad_(for_x)
    weight_VD.requires_grad_(for_weight)
    with FlopCounterMode(display=False) as forward:
        loss = next_token_loss(x_ND, weight_VD, targets_N, 4)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert forward.get_total_flops() == products * 2 * 11 * 4 * 30
    assert backward.get_total_flops() == 0
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        actual = next_token_loss(x_ND, weight_VD, targets_N, 4)
    assert forward.get_total_flops() == 2 * 11 * 4 * 30
    assert_close(actual, whole(x_ND, weight_VD, targets_N), 1e-12)
    assert not actual.requires_grad


def test_autocast_computes_products_in_its_dtype_and_softmax_in_float32():
    x_ND, weight_VD, targets_N = cases(11, 4, 30, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16), Seen() as seen:
        next_token_loss(x_ND, weight_VD, targets_N, 4).backward()
    assert seen.dtypes["mm"] == torch.bfloat16
    assert seen.dtypes["_log_softmax"] == torch.float32


def test_without_a_gradient_none_is_computed():
    x_ND, weight_VD, targets_N = cases(11, 4, 30)
    with torch.no_grad(), Seen() as seen:
        next_token_loss(x_ND, weight_VD, targets_N, 4)
    assert not {"exp_", "expm1", "scatter_"} & seen.dtypes.keys()
    with Seen() as seen:
        next_token_loss(x_ND, weight_VD, targets_N, 4)
    assert {"exp_", "expm1", "scatter_"} <= seen.dtypes.keys()


def compiled_loss(backend: str, autocast: bool):
    counter = CompileCounterWithBackend(backend)

    @torch.compile(backend=counter, fullgraph=True, dynamic=False)
    def call(*inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return next_token_loss(*inputs, 5)

    return call, counter


@pytest.mark.slow
@pytest.mark.on_commit(1)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_it_is_one_graph_equal_to_eager(backend, autocast):
    inputs = cases(12, 4, 30, dtype=torch.float32)
    call, counter = compiled_loss(backend, autocast)
    tolerance = TOLERANCES[torch.bfloat16 if autocast else torch.float32]
    assert_same(call, *inputs, tolerance)
    with torch.no_grad():
        assert_close(call(*inputs), whole(*inputs), tolerance)
    assert counter.frame_count == 2
