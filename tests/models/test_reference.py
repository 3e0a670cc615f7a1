"""Gather and scatter against the masked full-length reference: forward and every gradient.

Shapes: B batch, S sequence, D model.
"""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmarks._llama import as_llama
from modtrain.models.config import ModelConfig
from modtrain.models.depth.layer import MixtureOfDepths
from modtrain.models.rope.config import RopeScalingConfig
from modtrain.models.rope.rotary import rotary
from modtrain.models.transformer import Transformer
from tests.helpers import reference
from tests.helpers.model_cases import (
    balance_predictors,
    configs,
    context_of,
    distinct_tokens,
    lively,
    normal,
    quick,
    random_tokens,
    small,
)
from tests.helpers.thresholds import require_margin

pytestmark = pytest.mark.usefixtures("_rotary_in_float64")

# Of float64.
TOLERANCE = 1e-10


def assert_close(actual: Tensor, expected: Tensor, what: str) -> None:
    scale = max(1.0, float(expected.detach().abs().max()))
    error = float((actual - expected).detach().abs().max())
    assert error <= TOLERANCE * scale, f"{what}: off by {error:.1e}"


def assert_same_gradients(actual: Tensor, expected: Tensor, leaves: dict[str, Tensor]) -> None:
    # A router on no path to the loss learns nothing, and asks for no gradient.
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    pairs = zip(
        leaves,
        *(
            torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            for loss in (actual, expected)
        ),
        strict=True,
    )
    for name, ours, theirs in pairs:
        if ours is None or theirs is None:
            assert ours is None or not ours.any(), name
            assert theirs is None or not theirs.any(), name
        else:
            assert_close(ours, theirs, f"gradient of {name}")


def reference_of(
    model: Transformer,
    tokens_BS: Tensor,
    selection: str = "top_k",
    documents_BS: Tensor | None = None,
) -> tuple[Tensor, list[list[Tensor]]]:
    """Logits (B, S, V); and of each router chosen, scores and predictions, (B, S) each."""
    p = dict(model.named_parameters()) | dict(model.named_buffers())
    documents = [None] * len(tokens_BS) if documents_BS is None else documents_BS.tolist()
    rows = [
        reference.transformer(p, model.config, row, selection, own)
        for row, own in zip(tokens_BS, documents, strict=True)
    ]
    logits, traces = zip(*rows, strict=True)
    return torch.stack(logits), [
        [
            torch.stack([torch.as_tensor(value) for value in values])
            for values in zip(*kind, strict=True)
        ]
        for kind in zip(*traces, strict=True)
    ]


def expected_auxiliary(config: ModelConfig, chosen, scores, predictions) -> dict[str, Tensor]:
    """The losses beside the language model's, from what the reference decided."""
    targets = torch.stack(chosen).double()
    terms = {}
    if "predictor" in config.router.causal:
        terms["predictor"] = reference.binary_cross_entropy(torch.stack(predictions), targets)
    if "auxiliary" in config.router.causal:
        loss = reference.binary_cross_entropy(torch.stack(scores), targets)
        terms["auxiliary"] = config.router.auxiliary_weight * loss
    return terms


@quick(80)
@given(configs(), st.integers(1, 20), st.integers(1, 3), st.integers(0, 9), st.booleans())
@example(small(pattern="every", sliding_window=3, num_kv_heads=1), 20, 2, 0, False)
@example(small(pattern="[1, .125]*2", qk_norm=True), 17, 2, 1, True)
@example(
    small(d_model=7, num_heads=3, head_dim=2, pattern="[1, .125]*2", qk_norm=True), 5, 3, 4, False
)
def test_the_whole_model_equals_the_reference(config, seq_len, batch, seed, several):
    config.router.causal = config.router.causal_routers
    if seed % 2:  # a large one shows whether it is there
        config.norm_eps = 0.5
    model = lively(config, seed)
    tokens_BS = distinct_tokens(batch, seq_len, seed)
    targets_BS = random_tokens(batch, seq_len, seed + 1)
    documents_BS = (targets_BS % 4 == 0).long().cumsum(dim=1) if several else None
    expected_BSV, decided = reference_of(model, tokens_BS, documents_BS=documents_BS)
    chosen, scores, predictions = decided

    plain = model(tokens_BS, documents_BS=documents_BS)
    assert_close(plain.logits_BSV, expected_BSV, "logits")
    assert len(plain.routing) == len(chosen)
    for record, own, score_BS in zip(plain.routing, chosen, scores, strict=True):
        assert torch.equal(record.chosen_BS, own)
        assert_close(record.scores_BS, score_BS, "scores")

    output = model(tokens_BS, targets_BS, documents_BS=documents_BS)
    expected = reference.cross_entropy(expected_BSV.flatten(0, 1), targets_BS.flatten())
    assert_close(output.loss, expected, "loss")
    assert output.logits_BSV is None
    extra = expected_auxiliary(config, chosen, scores, predictions) if config.is_routed else {}
    assert output.auxiliary.keys() == extra.keys()
    for name, value in extra.items():
        assert_close(output.auxiliary[name], value, name)
    total = sum(output.auxiliary.values(), output.loss)
    assert_same_gradients(total, sum(extra.values(), expected), dict(model.named_parameters()))


class Fixed(nn.Module):
    """A predictor that has made up its mind."""

    def __init__(self, logits_BS: Tensor) -> None:
        super().__init__()
        self.logits_BS = logits_BS

    def forward(self, _x_BSD: Tensor) -> Tensor:
        return self.logits_BS


def routed_reference(
    layer: MixtureOfDepths, config: ModelConfig, x_BSD: Tensor, at_BS: Tensor, chosen_BS: Tensor
) -> Tensor:
    p = dict(layer.named_parameters())
    documents = [0] * x_BSD.shape[1]
    rows = zip(x_BSD, at_BS, chosen_BS.tolist(), strict=True)
    part = config.routed_parts[-1][1]
    return torch.stack(
        [
            reference.routed_layer(
                p, "", config, x_SD, reference.Sequence(at_S, documents), chosen, part
            )
            for x_SD, at_S, chosen in rows
        ]
    )


def one_layer(config: ModelConfig, seed: int = 0) -> MixtureOfDepths:
    """The last router of a model of one layer."""
    config.pattern, config.num_layers = [config.capacity if config.capacity < 1 else 0.5], 1
    config.mixer = config.mixers[0] if isinstance(config.mixer, str) else config.mixer[0]
    return lively(config, seed).routers[-1]


def rising_positions(batch: int, length: int, seed: int) -> Tensor:
    """Positions (B, S) with gaps, different in each sequence."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 4, (batch, length), generator=generator).cumsum(1)


@quick(40)
@given(configs(), st.integers(1, 16), st.integers(1, 3), st.integers(0, 9), st.booleans())
def test_a_routed_block_equals_the_reference(config, seq_len, batch, seed, own_positions):
    layer = one_layer(config, seed)
    x_BSD = normal(batch, seq_len, config.d_model, seed=seed).requires_grad_()
    at_BS = torch.arange(seq_len).expand(batch, -1)
    if own_positions:
        at_BS = rising_positions(batch, seq_len, seed)
    context = context_of(config, at_BS if own_positions else at_BS[:1])
    actual_BSD, (record,), *_ = layer(x_BSD, context)
    p = {name: value.detach() for name, value in layer.named_parameters()}
    scores_BS = torch.stack([reference.score(p, "", config, x_SD) for x_SD in x_BSD.detach()])
    chosen_BS = torch.tensor([reference.largest(row, layer.capacity) for row in scores_BS])
    assert torch.equal(record.chosen_BS, chosen_BS)
    expected_BSD = routed_reference(layer, config, x_BSD, at_BS, chosen_BS)
    assert_close(actual_BSD, expected_BSD, "output")
    weight_BSD = normal(batch, seq_len, config.d_model, seed=seed + 1)
    leaves = {"input": x_BSD} | dict(layer.named_parameters())
    assert_same_gradients(
        (actual_BSD * weight_BSD).sum(), (expected_BSD * weight_BSD).sum(), leaves
    )


@quick(40)
@given(configs(), st.data(), st.integers(1, 12), st.integers(1, 4), st.integers(0, 9))
def test_causal_selection_equals_the_reference_for_any_choice(config, data, seq_len, batch, seed):
    """Any mask at all: ragged counts, sequences of which none or all take part."""
    config.router.causal = ["predictor"]
    layer = one_layer(config, seed)
    row = (
        st.just([False] * seq_len)
        | st.just([True] * seq_len)
        | st.lists(st.booleans(), min_size=seq_len, max_size=seq_len)
    )
    chosen_BS = torch.tensor(data.draw(st.lists(row, min_size=batch, max_size=batch)))
    layer.predictor = Fixed(torch.where(chosen_BS, 0.7, -0.7))
    x_BSD = normal(batch, seq_len, config.d_model, seed=seed).requires_grad_()
    at_BS = rising_positions(batch, seq_len, seed)
    context = context_of(config, at_BS, selection="predictor")
    actual_BSD, (record,), *_ = layer(x_BSD, context)
    assert torch.equal(record.chosen_BS, chosen_BS)
    expected_BSD = routed_reference(layer, config, x_BSD, at_BS, chosen_BS)
    assert_close(actual_BSD, expected_BSD, "output")
    assert torch.equal(actual_BSD[~chosen_BS], x_BSD[~chosen_BS])
    weight_BSD = normal(batch, seq_len, config.d_model, seed=seed + 1)
    leaves = {"input": x_BSD} | dict(layer.named_parameters())
    assert_same_gradients(
        (actual_BSD * weight_BSD).sum(), (expected_BSD * weight_BSD).sum(), leaves
    )


def test_a_logit_of_zero_is_a_no():
    layer = one_layer(small())
    layer.predictor = Fixed(torch.tensor([[0.0, 1e-9, -1e-9]]))
    context = context_of(small(), torch.arange(3)[None], selection="predictor")
    _, (record,), *_ = layer(normal(1, 3, 16), context)
    assert record.chosen_BS.tolist() == [[False, True, False]]


@pytest.mark.parametrize("share", [-100.0, None, 100.0], ids=["none", "ragged", "all"])
@pytest.mark.parametrize("window", [None, 3])
def test_the_causal_model_equals_the_reference(share, window):
    model = lively(small(pattern="every_other", sliding_window=window))
    tokens_BS = random_tokens(4, 14)
    balance_predictors(model, tokens_BS)
    if share is not None:
        with torch.no_grad():
            for router in model.routers:
                router.predictor.out.bias.fill_(share)
    output = model(tokens_BS, selection="predictor")
    require_margin(model, output, "predictor")
    expected_BSV, (chosen, _, predictions) = reference_of(model, tokens_BS, "predictor")
    counts = torch.stack(chosen).sum(dim=2)
    if share is None:
        assert len(counts.unique()) > 2, "the counts are to be ragged"
    else:
        assert (counts == (14 if share > 0 else 0)).all()
    for layer, record in enumerate(output.routing):
        assert torch.equal(record.chosen_BS, chosen[layer])
        assert_close(record.predictor_BS, predictions[layer], "predictor")
    assert_close(output.logits_BSV, expected_BSV, "logits")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_kv_heads": 1},
        {"head_dim": 6, "num_layers": 1},
        {"tie_embeddings": True, "rope_theta": 500.0, "norm_eps": 1e-3},
    ],
)
def test_a_dense_model_is_a_llama(changes):
    """The weights of one in the other give the same logits."""
    model = lively(small(pattern="dense", **changes), seed=1, dtype=torch.float32)
    tokens_BS = random_tokens(2, 20)
    with torch.no_grad():
        theirs_BSV = as_llama(model, 64)(tokens_BS).logits
        ours_BSV = model(tokens_BS).logits_BSV
    torch.testing.assert_close(ours_BSV, theirs_BSV, atol=1e-4, rtol=1e-4)


def test_rotary_factors_are_as_precise_as_their_angles():
    positions_BS = torch.arange(4096)[None]
    angle_BSW = reference.angles(positions_BS, 64, 1e4)
    bound_BS1 = 2 * torch.finfo(torch.float32).eps * (1 + positions_BS.unsqueeze(-1))
    exact = (angle_BSW.cos(), angle_BSW.sin())
    factors = rotary(positions_BS, 64, 1e4, RopeScalingConfig())
    for ours_BSW, exact_BSW in zip(factors, exact, strict=True):
        assert ((ours_BSW - exact_BSW).abs() <= bound_BS1).all()
