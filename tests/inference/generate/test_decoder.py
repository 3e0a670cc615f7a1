"""A running batch gives each sequence what it would get alone, run whole for each token."""

import functools
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modtrain.inference.config import SamplingConfig
from modtrain.inference.generate.decoder import Decoder, DecoderConfig, End, Token
from modtrain.inference.generate.sampling import PerSequenceRNG, distribution, draw
from modtrain.models.depth.config import ComputeBudget, RouterConfig
from modtrain.models.experts.config import ExpertsConfig
from tests.helpers.model_cases import VOCAB, balance_predictors, lively, quick, small
from tests.helpers.thresholds import require_margin
from tests.models.cache import cache_cases

END = 5
MODELS = {
    "mod": {},
    "threshold": {"router": RouterConfig(causal=["threshold"])},
    "both": {"router": RouterConfig(target="both", predictor_dim=8), "pattern": "every"},
    "window": {"sliding_window": 5},
    "convolution": {"mixer": ["convolution", "attention", "attention", "convolution"]},
    "staged": {"experts": ExpertsConfig(count=4, dim=8)},
    "integrated": {"experts": ExpertsConfig(count=4, dim=8, noop=2), "pattern": "dense"},
    "dense": {"pattern": "dense"},
    "fixed": {"router": RouterConfig(score="fixed")},
}


@functools.cache
def ready(name: str):
    return cache_cases.ready(small(**MODELS[name]), 24, seed=3)


def slowly(model, config: DecoderConfig, prompt: list[int], number: int):
    """One sequence, all of it run again for each token: (tokens made, depths, reason)."""
    text, rng = list(prompt), PerSequenceRNG(config.sampling.seed, 1, first=number)
    reason = "length"

    def run():
        tokens = torch.tensor([text])
        documents = (tokens == END).long() if config.mask_documents else None
        if documents is not None:
            documents = documents.cumsum(1) - documents
        with torch.no_grad():
            output = model(
                tokens, selection=config.selection, documents_BS=documents, budget=config.budget
            )
        require_margin(model, output, config.selection, config.budget)
        return output

    while len(text) < len(prompt) + config.max_tokens:
        seen = torch.zeros(1, VOCAB, dtype=torch.bool)
        seen[0, text] = True
        chances = distribution(run().logits_BSV[:, -1], config.sampling, seen)
        token = int(draw(chances, rng.uniform([0])))
        if token == config.end_id:
            reason = "end"
            break
        text.append(token)
    depths = sum((r.chosen_BS[0].long() for r in run().routing), torch.zeros(len(text)).long())
    return text[len(prompt) :], depths.tolist(), reason


def collected(events) -> dict[int, tuple[list[Token], str]]:
    tokens, reasons = {}, {}
    for event in events:
        if isinstance(event, End):
            assert event.number not in reasons
            reasons[event.number] = event.reason
        else:
            assert event.number not in reasons, "nothing comes after the end"
            tokens.setdefault(event.number, []).append(event)
    return {number: (tokens.get(number, []), reasons[number]) for number in reasons}


@st.composite
def settings(draw_):
    sampling = draw_(
        st.sampled_from([
            SamplingConfig(greedy=True),
            SamplingConfig(seed=3),
            SamplingConfig(seed=4, temperature=0.7, top_p=0.9, repetition_penalty=1.3),
        ])
    )  # fmt: skip
    return {
        "sampling": sampling,
        "max_tokens": draw_(st.integers(1, 9)),
        "batch_size": draw_(st.integers(1, 4)),
        "prefill_chunk": draw_(st.sampled_from([1, 3, 100])),
        "with_depth": draw_(st.booleans()),
        "end_id": draw_(st.sampled_from([None, END])),
        "mask_documents": draw_(st.booleans()),
        "budget": draw_(
            st.sampled_from([None, ComputeBudget(layer_cap=0.4), ComputeBudget(step_cap=1)])
        ),
    }


@pytest.mark.slow
@quick(40)
@given(
    st.sampled_from(list(MODELS)),
    settings(),
    st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12), min_size=1, max_size=5),
)
def test_a_batch_equals_one_by_one_run_whole(name, choices, prompts):
    model = ready(name)
    choices["mask_documents"] = choices["mask_documents"] and choices["end_id"] is not None
    config = DecoderConfig(model.config.causal_selections[0], **choices)
    actual = collected(Decoder(model, config, prompts).run())
    assert actual.keys() == set(range(len(prompts)))
    for number, prompt in enumerate(prompts):
        tokens, reason = actual[number]
        text, depths, why = slowly(model, config, prompt, number)
        assert reason == why
        if config.with_depth:
            assert [t.id for t in tokens] == [*prompt, *text]
            assert [t.is_prompt for t in tokens] == [True] * len(prompt) + [False] * len(text)
            assert [t.depth for t in tokens] == depths
        else:
            assert [t.id for t in tokens] == text


@pytest.mark.slow
@quick(40)
@given(
    st.sampled_from(list(MODELS)),
    settings(),
    st.integers(1, 4),
    st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12), min_size=1, max_size=4),
)
def test_greedy_self_speculation_changes_nothing(name, choices, drafts, prompts):
    model = ready(name)
    choices |= {
        "mask_documents": False,
        "sampling": SamplingConfig(greedy=True, repetition_penalty=1.2),
    }
    selection = model.config.causal_selections[0]
    plain = DecoderConfig(selection, **choices)
    drafted = DecoderConfig(
        selection, **choices, drafts=drafts, draft_budget=ComputeBudget(step_cap=0)
    )
    expected = collected(Decoder(model, plain, prompts).run())
    for number, prompt in enumerate(prompts):
        generated = [token.id for token in expected[number][0] if not token.is_prompt]
        output = model(torch.tensor([prompt + generated]), selection=selection, budget=plain.budget)
        require_margin(model, output, selection, plain.budget)
    decoder = Decoder(model, drafted, prompts)
    assert collected(decoder.run()) == expected
    counts = decoder.statistics
    assert 0 <= counts.accepted <= counts.drafted


def test_each_sequence_is_counted_as_one_pass_over_it():
    model = ready("mod")
    prompts = [[1, 2, 3, 4, 5, 6], [7, 8], [9]]
    config = DecoderConfig("predictor", 5, SamplingConfig(greedy=True), batch_size=2)
    decoder = Decoder(model, config, prompts)
    texts = [[*prompt] for prompt in prompts]
    for event in decoder.run():
        if isinstance(event, Token):
            texts[event.number].append(event.id)
    for text, count in zip(texts, decoder.statistics.by_sequence, strict=True):
        # The last token is not read.
        output = model(torch.tensor([text[:-1]]), selection="predictor")
        chosen_R = [int(record.chosen_BS.sum()) for record in output.routing]
        assert (count.tokens, count.chosen_R) == (len(text) - 1, chosen_R)


def test_drafts_of_the_same_model_are_all_taken():
    model = ready("mod")
    config = DecoderConfig("predictor", 12, SamplingConfig(seed=1), drafts=3)
    decoder = Decoder(model, config, [[1, 2, 3]])
    list(decoder.run())
    assert decoder.statistics.accepted == decoder.statistics.drafted == 9
    assert decoder.statistics.steps == 3


@pytest.mark.on_commit(1)
@pytest.mark.slow
@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.8, "top_k": 9}, {"repetition_penalty": 2.0}]
)
def test_self_speculation_leaves_the_distribution_as_it_is(sampling):
    """Of three tokens, each pair of neighbours comes as often as the model's own chances say."""
    config = small(vocab_size=6, d_ff=16)
    torch.manual_seed(0)
    model = settle_small(config)
    prompt, count = [2, 1, 4], 6000
    settings = SamplingConfig(seed=11, **sampling)
    drafted = DecoderConfig(
        "predictor", 3, settings, batch_size=500, drafts=2, draft_budget=ComputeBudget(step_cap=0)
    )
    decoder = Decoder(model, drafted, [prompt] * count)
    actual = collected(decoder.run())
    triples = [tuple(t.id for t in tokens) for tokens, _ in actual.values()]
    expected = {}
    for triple in itertools.product(range(6), repeat=3):
        chance, text = 1.0, list(prompt)
        for token in triple:
            with torch.no_grad():
                logits = model(torch.tensor([text]), selection="predictor").logits_BSV[:, -1]
            seen = torch.zeros(1, 6, dtype=torch.bool)
            seen[0, text] = True
            chance *= float(distribution(logits, settings, seen)[0, token])
            text.append(token)
        expected[triple] = chance
    observed = {t: triples.count(t) / count for t in expected}
    away = sum(abs(observed[t] - expected[t]) for t in expected) / 2
    # The mean total variation of as many draws from the right distribution.
    generator = torch.Generator().manual_seed(0)
    chances = torch.tensor(list(expected.values()), dtype=torch.float64)
    draws = torch.multinomial(chances, count * 40, replacement=True, generator=generator)
    shares = torch.stack([
        torch.bincount(part, minlength=len(chances)) / count for part in draws.view(40, count)
    ])  # fmt: skip
    usual = (shares - chances).abs().sum(1) / 2
    assert away < usual.mean() + 4 * usual.std()
    # And the test could see a difference: drafts are not always right.
    assert 0.1 < decoder.statistics.accepted / decoder.statistics.drafted < 0.95


def settle_small(config):
    model = lively(config, seed=1)
    tokens = torch.randint(6, (4, 24), generator=torch.Generator().manual_seed(0))
    balance_predictors(model, tokens)
    return model.eval()


def test_a_stopped_sequence_generates_no_more():
    model = ready("mod")
    config = DecoderConfig("predictor", 20, SamplingConfig(greedy=True), batch_size=2)
    decoder = Decoder(model, config, [[1], [2], [3]])
    heard = {0: 0, 1: 0, 2: 0}
    for event in decoder.run():
        assert not (event.number == 1 and heard[1] == 4)
        heard[event.number] += isinstance(event, Token)
        if event.number == 1 and heard[1] == 4:
            decoder.stop(1)
    assert heard == {0: 20, 1: 4, 2: 20}


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="empty"):
        Decoder(ready("mod"), DecoderConfig("predictor", 3), [[1], []])
