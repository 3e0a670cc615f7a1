"""Tokens run through a cache, in whatever pieces, come to what they come to all at once."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from model_cases import (
    balance_predictors,
    configs,
    lively,
    quick,
    random_tokens,
    settle,
)

from modtrain.models.cache import Cache
from modtrain.models.config import ModelConfig
from modtrain.models.dial import Dial
from modtrain.models.experts_config import ExpertsConfig
from modtrain.models.router_config import RouterConfig

EXPERTS = {
    "moe": ExpertsConfig(count=4, top_k=2, dim=8),
    "integrated": ExpertsConfig(count=4, top_k=2, dim=8, noop=2),
    "expert_choice": ExpertsConfig(count=4, dim=8, noop=1, choice="expert"),
    "shared": ExpertsConfig(count=3, top_k=1, dim=8, shared=1, balance="bias"),
}


def ready(config: ModelConfig, length: int, seed: int = 0):
    """A model that says yes to about half, by whatever decides."""
    model = settle(lively(config, seed), length)
    if config.is_routed and "predictor" in config.router.causal_routers:
        balance_predictors(model, random_tokens(4, length, 50))
    return model.eval()


def pieces(draw, length: int) -> list[int]:
    cuts = draw(st.lists(st.integers(1, length), min_size=0, max_size=length, unique=True))
    ends = [*sorted({*cuts, length})]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


@st.composite
def cases(draw):
    config = draw(configs())
    kind = draw(st.sampled_from([None, None, *EXPERTS]))
    if kind is not None:
        config.experts = EXPERTS[kind]
    if draw(st.integers(0, 5)) == 0:
        config.router = RouterConfig(score=draw(st.sampled_from(["random", "fixed"])))
    if not config.causal_selections:
        config.router.causal = ["predictor"]
    length = draw(st.integers(1, 24))
    batch = draw(st.integers(1, 4))
    return config, batch, length, pieces(draw, length), draw(st.integers(0, 99))


@quick(120)
@given(cases(), st.sampled_from([None, 3]), st.data())
def test_pieces_equal_the_whole(case, eos, data):
    config, batch, length, parts, seed = case
    model = ready(config, 24, seed)
    tokens = random_tokens(batch, length, seed)
    documents = None if eos is None else (tokens == eos).long().cumsum(1)
    selection = data.draw(st.sampled_from(config.causal_selections))
    routers = len(model.routers)
    dial = data.draw(
        st.sampled_from([
            None,
            Dial(layer_cap=0.3),
            Dial(step_cap=1),
            Dial(tuple(0.2 for _ in range(routers)), 0.5, 2),
        ])
    )  # fmt: skip
    whole = model(tokens, selection=selection, documents_BS=documents, dial=dial)
    cache = Cache(config, batch, counts_taken=dial is not None and dial.layer_cap is not None)
    logits, chosen, start = [], [], 0
    for part in parts:
        piece = slice(start, start + part)
        found = model.extend(
            tokens[:, piece],
            cache,
            selection,
            dial=dial,
            documents_NS=None if documents is None else documents[:, piece],
        )
        logits.append(found.logits_BSV)
        chosen.append([record.chosen_BS for record in found.routing])
        start += part
    torch.testing.assert_close(torch.cat(logits, 1), whole.logits_BSV, atol=1e-9, rtol=1e-9)
    for record, *own in zip(whole.routing, *chosen, strict=True):
        assert torch.equal(torch.cat(own, 1), record.chosen_BS)
