import numpy as np
import pytest
from scipy import stats

from modtrain.experiments.compare.paired import PairedChange


def losses(values):
    return {str(seed): value for seed, value in enumerate(values)}


def test_intervals_and_tests_are_those_of_scipy():
    generator = np.random.default_rng(0)
    outcomes = set()
    for scale in (0.0005, 0.002, 0.01):
        for shift in (0.0, 0.003, 0.02):
            base = 2 + 0.1 * generator.standard_normal(5)
            arm = base * (1 + shift + scale * generator.standard_normal(5))
            changes = arm / base - 1
            change = PairedChange.of(losses(arm), losses(base))
            test = stats.ttest_1samp(changes, 0)
            assert change.mean == pytest.approx(changes.mean())
            assert change.interval() == pytest.approx(test.confidence_interval(0.95))
            assert change.is_significant == (test.pvalue < 0.05)
            one_sided = [
                stats.ttest_1samp(changes, bound, alternative=side).pvalue
                for bound, side in ((-0.005, "greater"), (0.005, "less"))
            ]
            assert change.is_equivalent(0.005) == (max(one_sided) < 0.05)
            outcomes.add((change.is_significant, change.is_equivalent(0.005)))
    # A difference may be certain and yet too small to matter.
    assert outcomes == {(True, True), (True, False), (False, True), (False, False)}


def test_only_shared_seeds_are_compared():
    change = PairedChange.of({"0": 2.0, "1": 2.2, "2": 9.0}, {"0": 1.0, "1": 1.1, "3": 9.0})
    assert (change.mean, change.num_seeds) == (pytest.approx(1.0), 2)
    assert PairedChange.of({"0": 2.0}, {"1": 2.0}) is None


def test_one_seed_tests_nothing():
    change = PairedChange.of({"0": 2.0}, {"0": 2.0})
    assert change.is_significant
    assert not change.is_equivalent(0.5)
    with pytest.raises(ValueError, match="two seeds"):
        change.interval()
