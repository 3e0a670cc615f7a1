import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import GenerationConfig
from transformers.generation.utils import GenerationMixin

from modtrain.inference.config import SamplingConfig
from modtrain.inference.generate.sampling import PerSequenceRNG, SamplingError, distribution, draw
from tests.helpers.model_cases import quick

JUST_BELOW_1 = 1 - 2**-53


class HuggingFace(GenerationMixin):
    """The processors that transformers' own ``generate`` builds from the same settings."""

    config = SimpleNamespace(is_encoder_decoder=False)

    def distribution(self, logits_BV: Tensor, config: SamplingConfig, ids_BS: Tensor) -> Tensor:
        wanted = GenerationConfig(
            do_sample=not config.greedy,
            repetition_penalty=config.repetition_penalty,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
        )
        scores_BV = self._get_logits_processor(wanted, ids_BS.shape[1])(ids_BS, logits_BV)
        if config.greedy:
            return torch.nn.functional.one_hot(scores_BV.argmax(-1), scores_BV.shape[-1]).double()
        return scores_BV.softmax(dim=-1)


@st.composite
def sampling(draw: st.DrawFn) -> SamplingConfig:
    return SamplingConfig(
        greedy=draw(st.sampled_from([False] * 5 + [True])),
        temperature=draw(st.sampled_from([0.1, 0.6, 1.0, 1.7, 8.0])),
        top_k=draw(st.none() | st.integers(1, 45)),
        top_p=draw(st.none() | st.sampled_from([1e-6, 0.2, 0.5, 0.8, 0.95, 1.0])),
        min_p=draw(st.none() | st.sampled_from([0.0, 0.05, 0.3, 0.9, 1.0])),
        repetition_penalty=draw(st.sampled_from([0.5, 1.0, 1.3, 4.0])),
    )


@st.composite
def logits(draw: st.DrawFn) -> Tensor:
    """Normal ones of any scale, some of them -inf."""
    shape = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    logits_BV = torch.randn(shape, generator=generator, dtype=torch.float64)
    missing_BV = torch.rand(shape, generator=generator) < draw(st.sampled_from([0, 0, 0.3]))
    missing_BV[:, 0] = False
    logits_BV *= draw(st.sampled_from([0.3, 1.0, 4.0, 30.0]))
    return logits_BV.masked_fill(missing_BV, -torch.inf)


def marks(ids_BS: Tensor, vocab: int) -> Tensor:
    return torch.zeros(len(ids_BS), vocab, dtype=torch.bool).scatter(1, ids_BS, True)


@given(logits(), sampling(), st.integers(1, 9), st.integers(0, 2**32))
@quick(150)
def test_the_distribution_is_that_of_hugging_face(logits_BV, config, length, seed):
    batch, vocab = logits_BV.shape
    generator = torch.Generator().manual_seed(seed)
    ids_BS = torch.randint(vocab, (batch, length), generator=generator)
    theirs_BV = HuggingFace().distribution(logits_BV.clone(), config, ids_BS)
    ours_BV = distribution(logits_BV, config, marks(ids_BS, vocab))
    assert torch.equal(ours_BV > 0, theirs_BV > 0)
    torch.testing.assert_close(ours_BV, theirs_BV, rtol=1e-9, atol=1e-12)


@given(logits(), sampling())
@quick(60)
def test_a_row_is_drawn_by_what_it_would_be_alone(logits_BV, config):
    batch_BV = distribution(logits_BV, config)
    alone = [distribution(row_1V, config) for row_1V in logits_BV.split(1)]
    assert torch.equal(batch_BV, torch.cat(alone))
    uniform_B = PerSequenceRNG(3, len(logits_BV)).uniform(range(len(logits_BV)))
    single = [draw(*pair) for pair in zip(alone, uniform_B.split(1), strict=True)]
    assert torch.equal(draw(batch_BV, uniform_B), torch.cat(single))


@pytest.mark.parametrize("changes", [{"top_k": 2}, {"min_p": 1.0}])
def test_equal_logits_are_all_kept_or_all_removed(changes):
    logits_BV = torch.tensor([[0.0, 3.0, 1.0, 3.0, 3.0]])
    actual_BV = distribution(logits_BV, SamplingConfig(**changes))
    expected_BV = torch.tensor([[0, 1 / 3, 0, 1 / 3, 1 / 3]], dtype=torch.float64)
    torch.testing.assert_close(actual_BV, expected_BV)


@pytest.mark.parametrize("changes", [{"greedy": True}, {"top_p": 1e-9}])
def test_of_equals_the_first_is_the_likeliest(changes):
    logits_BV = torch.zeros(3, 2000).index_fill(1, torch.tensor([1200, 70, 1999]), 1.0)
    actual_BV = distribution(logits_BV, SamplingConfig(**changes))
    assert actual_BV.argmax(dim=-1).tolist() == [70, 70, 70]
    assert torch.equal(actual_BV.sum(dim=-1), torch.ones(3, dtype=torch.float64))


def test_top_p_takes_no_more_than_it_needs_and_1_takes_all():
    half, all_ = SamplingConfig(top_p=0.5), SamplingConfig(top_p=1.0)
    assert distribution(torch.zeros(1, 2), half).tolist() == [[1, 0]]
    # The first one's probability rounds to 1.
    actual_BV = distribution(torch.tensor([[0.0, -60.0]]), all_)
    assert actual_BV[0, 0] == 1
    assert 0 < actual_BV[0, 1] < 1e-26


def test_nearly_no_temperature_is_greedy_and_half_precision_is_widened():
    logits_BV = torch.tensor([[1.0, 60000.0, 59968.0]], dtype=torch.float16)
    for temperature in (1e-308, 1e-3):
        actual_BV = distribution(logits_BV, SamplingConfig(temperature=temperature))
        assert actual_BV.tolist() == [[0, 1, 0]]
    assert distribution(logits_BV, SamplingConfig(temperature=100.0))[0, 2] == pytest.approx(
        1 / (1 + math.exp(0.32))
    )


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize(
    "row",
    [[0.0, math.nan, 1.0], [0.0, math.inf, 1.0], [-math.inf] * 3],
    ids=["nan", "inf", "nothing"],
)
def test_logits_that_are_not_finite_raise(row, greedy):
    logits_BV = torch.tensor([[0.0, 1.0, 2.0], row])
    with pytest.raises(SamplingError, match="not finite"):
        distribution(logits_BV, SamplingConfig(greedy=greedy))


def test_a_sequence_draws_the_same_numbers_whatever_the_others_do():
    batch = PerSequenceRNG(7, 3)
    rounds = [[0, 1, 2], [0, 2], [2], [2, 0], [1, 0, 2]]
    drawn: dict[int, list[float]] = {0: [], 1: [], 2: []}
    for rows in rounds:
        for row, number in zip(rows, batch.uniform(rows).tolist(), strict=True):
            drawn[row].append(number)
    for row, numbers in drawn.items():
        alone = PerSequenceRNG(7, 1, first=row)
        assert [alone.uniform([0]).item() for _ in numbers] == numbers
    assert batch.uniform([]).shape == (0,)
    assert batch.uniform([1]).dtype == torch.float64


def test_seeds_and_sequences_draw_different_numbers():
    firsts = [
        number
        for seed in (-1, 0, 1, 2**40)
        for number in PerSequenceRNG(seed, 50).uniform(range(50)).tolist()
    ]
    assert len(set(firsts)) == 200


def test_the_generators_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    PerSequenceRNG(0, 3).uniform([0, 1, 2])
    assert torch.equal(before, torch.get_rng_state())


def chi_square(counts_C: Tensor, probability_C: Tensor) -> float:
    expected_C = probability_C * counts_C.sum()
    return float(((counts_C - expected_C) ** 2 / expected_C).sum())


def test_numbers_are_uniform_within_a_sequence_and_across_sequences():
    one, many = PerSequenceRNG(0, 1), PerSequenceRNG(1, 4000)
    of_one = torch.cat([one.uniform([0] * 1000) for _ in range(4)])
    across = many.uniform(range(4000))
    following = many.uniform(range(4000))
    flat_C = torch.full((20,), 1 / 20)
    for numbers in (of_one, across, following):
        # 19 degrees of freedom: above 43.8 once in a thousand.
        assert chi_square((numbers * 20).long().bincount(minlength=20), flat_C) < 43.8
    for first, second in (
        (across, following),
        (of_one[:-1], of_one[1:]),
        (across[:-1], across[1:]),
    ):
        pair = (first * 4).long() * 4 + (second * 4).long()
        # 15 degrees of freedom: above 37.7 once in a thousand.
        assert chi_square(pair.bincount(minlength=16), torch.full((16,), 1 / 16)) < 37.7


@given(
    st.lists(st.sampled_from([0.0, 0.0, 1e-12, 0.1, 1.0, 3.0]), min_size=1, max_size=30).filter(
        any
    ),
    st.sampled_from([0.0, 5e-324, 0.3, 0.5, 0.999, JUST_BELOW_1, 1.0]),
    st.sampled_from([torch.float32, torch.float64]),
)
@quick(200)
def test_the_draw_is_the_first_token_whose_cumulative_probability_is_above(values, number, dtype):
    probability_1V = torch.tensor([values], dtype=dtype)
    token = draw(probability_1V, torch.tensor([number], dtype=torch.float64))
    assert token.dtype == torch.int64
    assert token.shape == (1,)
    exact = probability_1V[0].tolist()
    assert exact[token] > 0
    # 1 is what a number just below it rounds to where there is no float64.
    number = min(number, JUST_BELOW_1)
    at, below = sum(exact[: token + 1]), sum(exact[:token])
    slack = 4e-16 * sum(exact) * len(exact)
    assert below - slack <= number * sum(exact) <= at + slack


def test_the_ends_of_the_range_draw_the_first_and_the_last_possible_token():
    probability_V = torch.tensor([0.0, 0.0, 0.2, 0.0, 0.3, 0.5, 0.0, 0.0])
    ends_N = torch.tensor([0.0, JUST_BELOW_1, 1.0], dtype=torch.float64)
    assert draw(probability_V.expand(3, -1), ends_N).tolist() == [2, 5, 5]
    # A token's share of the range holds its lower end.
    assert draw(torch.tensor([[0.5, 0.5]]), torch.tensor([0.5])).tolist() == [1]
    one_hot_VV = torch.eye(6)
    for number in ends_N:
        assert draw(one_hot_VV, number.expand(6)).tolist() == list(range(6))


def test_what_is_far_less_likely_than_float32_resolves_is_drawn_too():
    probability_NV = torch.tensor([[1 - 1e-9, 1e-9]], dtype=torch.float64)
    assert draw(probability_NV, torch.tensor([1 - 1e-10], dtype=torch.float64)).tolist() == [1]
    assert draw(probability_NV, torch.tensor([1 - 1e-8], dtype=torch.float64)).tolist() == [0]


def test_a_sum_that_rounds_unevenly_draws_no_impossible_token(monkeypatch):
    """As parallel ones do: where nothing is added, the sum still goes up and down a little."""
    exact = Tensor.cumsum
    uneven_V = 1e-9 * torch.randn(400, generator=torch.Generator().manual_seed(0)).double()
    monkeypatch.setattr(Tensor, "cumsum", lambda x, dim: exact(x, dim) + uneven_V)
    generator = torch.Generator().manual_seed(1)
    probability_V = torch.zeros(400, dtype=torch.float64)
    probability_V[[30, 100, 101, 250]] = 0.25
    edges = torch.tensor([0.0, 0.25, 0.5, 0.75, JUST_BELOW_1], dtype=torch.float64)
    jitter_N = 2e-9 * torch.rand(2000, generator=generator, dtype=torch.float64) - 1e-9
    uniform_N = (edges.repeat(400) + jitter_N).clamp(0, JUST_BELOW_1)
    actual_N = draw(probability_V.expand(2000, -1), uniform_N)
    assert set(actual_N.tolist()) == {30, 100, 101, 250}


def test_a_draw_reads_nothing_on_the_host():
    """Tensors without values: whatever asked for one would raise."""
    with FakeTensorMode():
        probability_NV, uniform_N = torch.rand(4, 50), torch.rand(4, dtype=torch.float64)
        assert draw(probability_NV, uniform_N).shape == (4,)


def test_every_setting_out_of_range_is_reported_under_its_key():
    assert SamplingConfig().problems() == []
    edge = SamplingConfig(top_k=1, top_p=1.0, min_p=0.0, temperature=1e-9, repetition_penalty=0.1)
    assert edge.problems() == []
    assert SamplingConfig(min_p=1.0).problems() == []
    wrong = SamplingConfig(temperature=0.0, top_k=0, top_p=0.0, min_p=1.5, repetition_penalty=-1.0)
    problems = {problem.key: problem for problem in wrong.problems("sampling")}
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    assert problems.keys() == {f"sampling.{name}" for name in names}
    assert all(problem.value == getattr(wrong, key[9:]) for key, problem in problems.items())
    assert "sampling.greedy=true" in problems["sampling.temperature"].remedy
    for changes in ({"temperature": math.nan}, {"temperature": math.inf}, {"top_p": 1.01}):
        assert [p.key for p in SamplingConfig(**changes).problems()] == [*changes]
    for changes in ({"min_p": -0.1}, {"min_p": math.nan}, {"top_p": math.nan}):
        assert [p.key for p in SamplingConfig(**changes).problems()] == [*changes]
