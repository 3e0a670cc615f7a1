"""Other choices of tokens than a router's own, and the statistics of updates.

Shapes: B batch, S sequence.
"""

import pytest
import torch

from modtrain.evaluation.routing_metrics import update_metrics
from modtrain.models.cache.cache import Cache
from modtrain.models.config import unrouted_layers
from modtrain.models.depth.config import SWAPPED_CHOICES, RouterConfig, RouterSwap
from modtrain.models.depth.router import evenly_spaced_scores
from modtrain.models.transformer import Transformer
from tests.helpers.model_cases import lively, random_tokens, small

CONFIG = small(num_layers=4, pattern="every_other", capacity=0.25)
TOKENS_BS = random_tokens(3, 16)


def forward(model, selection="top_k", **options):
    torch.manual_seed(0)
    with torch.no_grad():
        return model(TOKENS_BS, selection=selection, **options)


def chosen_of(output):
    return torch.stack([record.chosen_BS for record in output.routing])


@pytest.mark.parametrize("selection", ["top_k", "predictor"])
@pytest.mark.parametrize("choice", SWAPPED_CHOICES)
def test_each_sequence_keeps_its_number_of_routed_tokens(choice, selection):
    model = lively(CONFIG)
    # The first router: the later ones see what the swap has made of the stream.
    own = forward(model, selection).routing[0].chosen_BS.sum(dim=1)
    swapped = forward(model, selection, swap=RouterSwap(choice)).routing[0].chosen_BS.sum(dim=1)
    assert swapped.tolist() == own.tolist()


@pytest.mark.parametrize("selection", ["top_k", "predictor"])
@pytest.mark.parametrize("choice", SWAPPED_CHOICES)
def test_padding_is_never_chosen_and_changes_nothing(choice, selection):
    model = lively(CONFIG)
    valid_BS = torch.arange(16) < torch.tensor([[16], [8], [12]])
    outputs = []
    for fill in (1, 2):
        torch.manual_seed(0)
        with torch.no_grad():
            output = model(
                TOKENS_BS.where(valid_BS, fill),
                selection=selection,
                valid_BS=valid_BS,
                is_right_padded=True,
                swap=RouterSwap(choice),
            )
        assert not (chosen_of(output) & ~valid_BS).any()
        outputs.append(output.logits_BSV[valid_BS])
    torch.testing.assert_close(*outputs)
    own = forward(model, selection, valid_BS=valid_BS).routing[0].chosen_BS.sum(dim=1)
    assert output.routing[0].chosen_BS.sum(dim=1).tolist() == own.tolist()


def test_without_the_updates_the_dense_model_of_the_unrouted_layers_remains():
    model = lively(CONFIG)
    control = Transformer(unrouted_layers(CONFIG)).double()
    for own, layer in zip(control.layers, model.layers[::2], strict=True):
        own.load_state_dict(layer.state_dict())
    for name in ("embedding", "norm", "head"):
        getattr(control, name).load_state_dict(getattr(model, name).state_dict())
    zeroed = forward(model, swap=RouterSwap("zero")).logits_BSV
    torch.testing.assert_close(zeroed, forward(control).logits_BSV, rtol=0, atol=0)
    one = forward(model, swap=RouterSwap("zero", routers=(1,))).logits_BSV
    own = forward(model).logits_BSV
    assert not torch.equal(one, zeroed)
    assert not torch.equal(one, own)


def test_choices_are_what_their_names_say():
    model = lively(CONFIG)
    record = forward(model).routing[0]
    lowest_BS = forward(model, swap=RouterSwap("lowest")).routing[0].chosen_BS
    scores_BS, count = record.scores_BS, int(record.chosen_BS[0].sum())
    expected = scores_BS.topk(count, dim=1, largest=False).indices.sort(dim=1).values
    assert lowest_BS.nonzero()[:, 1].view(3, -1).equal(expected)
    even_BS = forward(model, swap=RouterSwap("even")).routing[0].chosen_BS
    assert even_BS.equal(evenly_spaced_scores(scores_BS.unsqueeze(-1), count) > 0)
    predicted_BS = forward(model, swap=RouterSwap("predictor")).routing[0].chosen_BS
    expected = record.predictor_BS.topk(count, dim=1).indices.sort(dim=1).values
    assert predicted_BS.nonzero()[:, 1].view(3, -1).equal(expected)
    shuffled = forward(model, swap=RouterSwap("shuffled")).routing[0]
    assert not shuffled.chosen_BS.equal(record.chosen_BS)
    # A token's gate comes with the score of the token that it has the place of.
    for own, other in ((record, shuffled), (shuffled, record)):
        gates = [r.scores_BS[r.chosen_BS].sort().values for r in (own, other)]
        assert gates[0].equal(gates[1])
    random = [forward(model, swap=RouterSwap("random")).routing[0].chosen_BS for _ in range(2)]
    assert random[0].equal(random[1])
    assert not random[0].equal(record.chosen_BS)


def test_the_largest_updates_are_those_of_the_oracle_router():
    router = RouterConfig(score="oracle_norm", causal=["predictor"], predictor_dim=8)
    config = small(num_layers=2, pattern="every_other", capacity=0.25, router=router)
    model = lively(config)
    own = forward(model)
    swapped = forward(model, swap=RouterSwap("update_norm"))
    assert swapped.logits_BSV.equal(own.logits_BSV)


@pytest.mark.parametrize("gate", ["raw", "tanh", "none"])
def test_the_mean_gate_is_that_of_the_own_choice(gate):
    config = small(
        num_layers=2, pattern="every_other", capacity=0.25, router=RouterConfig(gate=gate)
    )
    model = lively(config)
    own, swapped = forward(model), forward(model, swap=RouterSwap("random", mean_gate=True))
    gates = [update_metrics(o.routing[0].update_sums_4.tolist())[0] for o in (swapped, own)]
    assert gates[0] == pytest.approx(gates[1], rel=1e-5)
    changed = forward(model, swap=RouterSwap("random")).logits_BSV
    assert torch.equal(swapped.logits_BSV, changed) == (gate == "none")


@pytest.mark.parametrize("is_padded", [False, True])
def test_update_statistics_are_those_of_the_routed_tokens(is_padded):
    config = small(num_layers=1, pattern=[0.25], router=RouterConfig(gate="sigmoid"))
    model = lively(config)
    layer = model.routers[0]
    valid_BS = None
    if is_padded:
        valid_BS = torch.arange(16) < torch.tensor([[16], [9], [1]])
    output = forward(model, valid_BS=valid_BS)
    record = output.routing[0]
    x_BSD = model.embedding(TOKENS_BS).detach()
    gates, updates, streams = [], [], []
    hook = layer.register_forward_hook(lambda _m, _i, out: updates.append(out.value_BSD - x_BSD))
    forward(model, valid_BS=valid_BS)
    hook.remove()
    for b, s in record.chosen_BS.nonzero().tolist():
        gates.append(float(record.scores_BS[b, s].sigmoid()))
        streams.append((updates[0][b, s].square().sum(), x_BSD[b, s].square().sum()))
    gate_mean, update_ratio = update_metrics(record.update_sums_4.tolist())
    assert gate_mean == pytest.approx(sum(gates) / len(gates))
    ratio = sum(u for u, _ in streams) / sum(x for _, x in streams)
    assert update_ratio == pytest.approx(float(ratio.sqrt()))


def test_nothing_is_measured_while_decoding():
    model = lively(CONFIG)
    record = model.extend(TOKENS_BS, Cache(CONFIG, 3)).routing[0]
    assert record.update_sums_4 is None


def test_a_scalar_of_no_token_is_finite():
    model = lively(CONFIG)
    for predictor in [router.predictor for router in model.routers]:
        torch.nn.init.constant_(predictor.out.bias, -100.0)
    record = forward(model, "predictor").routing[0]
    assert int(record.chosen_BS.sum()) == 0
    assert update_metrics(record.update_sums_4.tolist()) == (0, 0)
