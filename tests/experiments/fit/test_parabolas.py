"""A parabola of each budget, or the reason why there is none."""

import numpy as np
import pytest

from modtrain.experiments.fit.bootstrap import budget_groups, resample_weights
from modtrain.experiments.fit.config import FitConfig
from modtrain.experiments.fit.frontier import FlopsRule, Frontier
from modtrain.experiments.fit.parabolas import Parabola, fit_parabolas
from modtrain.experiments.fit.points import make_points
from tests.experiments.fit.simulated import LAW, simulated_points


def parabolas(points, samples=0, **settings):
    groups = budget_groups(points, 0.02)
    weights = resample_weights(len(points), list(groups.values()), samples, np.random.default_rng())
    return list(fit_parabolas(points, groups, weights, FitConfig(**settings)))


def at_one_budget(log_N, loss):
    return make_points(loss, N=np.exp(log_N), C=[1e20] * len(loss))


def test_a_parabola_is_recovered():
    log_N = np.linspace(10, 16, 6)
    (parabola,) = parabolas(at_one_budget(log_N, 2.5 + 0.1 * (log_N - 12.7) ** 2), samples=50)
    assert np.log(parabola.N.value) == pytest.approx(12.7)
    assert parabola.loss.value == pytest.approx(2.5)
    assert [np.log(parabola.N.low), np.log(parabola.N.high)] == pytest.approx([12.7, 12.7])
    np.testing.assert_allclose(parabola.loss_at(np.exp(log_N)), 2.5 + 0.1 * (log_N - 12.7) ** 2)
    assert 0.5 < parabola.share_interior <= 1
    assert len(parabola.N_S) == 50


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        ([4, 3, 2, 1.5, 1.2], "above the largest size"),
        ([1.2, 1.5, 2, 3, 4], "below the smallest size"),
        ([1, 2, 2.5, 2, 1], "no minimum"),
        ([3, 2, 3], "3 sizes, but a parabola needs 4"),
    ],
)
def test_a_minimum_that_is_not_interior_is_refused(loss, reason):
    ((C, refusal),) = parabolas(at_one_budget(np.linspace(10, 12, len(loss)), loss))
    assert pytest.approx(1e20) == C
    assert reason in refusal


def test_equal_sizes_count_once():
    points = at_one_budget([10, 11, 12, 12, 12], [3, 2, 3, 3.1, 2.9])
    assert "3 sizes" in parabolas(points)[0][1]


def test_a_refused_budget_does_not_end_the_others():
    good, bad = simulated_points(num_budgets=2), simulated_points(centre=30, num_budgets=3)
    joined = {
        name: np.concatenate([getattr(good, f"{name}_P"), getattr(bad, f"{name}_P")[-7:]])
        for name in ("loss", "N")
    }
    C = np.concatenate([good.C_P, 10 * bad.C_P[-7:]])
    kinds = [isinstance(parabola, Parabola) for parabola in parabolas(make_points(**joined, C=C))]
    assert kinds == [True, True, False]


def test_the_law_has_no_parabola_so_its_minimum_is_biased():
    """What the documents warn of: without any noise, and the more the wider the sizes."""
    frontier = Frontier(LAW, FlopsRule(6.0, 0.0, 0.0))
    bias = {
        width: max(
            abs(np.log(parabola.N.value / frontier.parameters(parabola.C)))
            for parabola in parabolas(simulated_points(width=width))
            if isinstance(parabola, Parabola)
        )
        for width in (2.0, 4.0, 16.0)
    }
    assert 0 < bias[2.0] < bias[4.0] < bias[16.0]
    assert bias[16.0] > 0.05


def test_an_interval_of_few_resamples_is_not_given():
    points = at_one_budget(np.linspace(10, 12, 4), [2.02, 2.0, 1.99, 2.0])
    (parabola,) = parabolas(points, samples=200)
    assert parabola.share_interior < 0.5
    assert parabola.N.low is None
    assert parabola.N.value is not None
