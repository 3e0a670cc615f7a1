"""The points of a grid: equal FLOPs, the same relative sizes, and the rules that shape them."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modtrain.cli.compose import compose
from modtrain.cli.compose_verbs import compose_isoflop
from modtrain.experiments.isoflop.config import BatchRuleConfig, LearningRateConfig, ShapeConfig
from modtrain.experiments.isoflop.shapes import ShapeRule
from modtrain.models.config import unrouted_layers
from modtrain.models.experts.config import ExpertsConfig
from modtrain.models.flops import training_flops_per_token
from modtrain.optimizers.config import MuonConfig, OptimizerConfig
from tests.experiments.isoflop.grid_cases import (
    composed,
    family_of,
    grid_of,
)
from tests.helpers.model_cases import quick
from tests.helpers.problems import problems_of

SIZES = [0.5, 1.0, 2.0]


@quick(3)
@given(
    st.lists(st.floats(1e10, 1e11), min_size=1, max_size=2, unique=True),
    st.floats(5, 60),
    st.lists(st.floats(0.2, 5), min_size=1, max_size=3, unique_by=lambda s: round(math.log2(s))),
)
def test_each_point_spends_its_budget_and_all_families_have_the_same_sizes(budgets, ratio, sizes):
    wide = ShapeConfig(aspect_min=1, aspect_max=40)
    changes = {"budgets": budgets, "sizes": sizes, "tokens_per_parameter": ratio, "shape": wide}
    try:
        grid = grid_of(**changes)
    except Exception as error:
        # Where even the smallest model is too large, two sizes have its shape.
        assert "the same shape" in str(error)
        return
    families = {point.family for point in grid.points}
    # A control may be the dense family, point by point.
    assert len(families) + len(grid.notes) == 5
    for family in families:
        for budget in budgets:
            points = [p for p in grid.points if (p.family, p.budget) == (family, budget)]
            assert sorted(p.size for p in points) == sorted(sizes)
            points.sort(key=lambda p: p.size)
            for point in points:
                step = point.plan.flops_per_token * point.plan.tokens_per_step
                assert abs(point.plan.flops - budget) <= step / 2
                assert point.config.budget.flops == budget
            # Larger sizes are larger models, for fewer tokens.
            assert all(a.plan.flops_per_token < b.plan.flops_per_token for a, b in pairwise(points))


def test_the_optimum_is_where_tokens_are_in_proportion_to_parameters():
    grid = grid_of(budgets=[1e10, 4e10], tokens_per_parameter_of={"mod": 5.0}, sizes=SIZES)
    for family, ratio in {"dense": 20, "mod": 5, "mode": 20}.items():
        for budget, optimum in grid.optima[family].items():
            num_parameters, tokens = optimum / 6, budget / optimum
            assert tokens / num_parameters == pytest.approx(ratio)
            assert 6 * num_parameters * tokens == pytest.approx(budget)
    for point in grid.points:
        if point.target is not None:
            target = grid.optima[point.family][point.budget] * point.size
            assert point.target == pytest.approx(target)


@pytest.mark.parametrize("name", ["dense", "mod", "mode"])
@pytest.mark.parametrize("tolerance", [0.0, 0.3])
def test_the_shape_is_the_one_that_a_search_over_all_finds(name, tolerance):
    config = ShapeConfig(aspect_min=4, aspect_max=20, tolerance=tolerance)
    base = replace(composed().families[name].model, vocab_size=300)
    rule = ShapeRule(config, base, 64)
    step = 2 if base.pattern == "every_other" else 1
    shapes = {}
    for d_model in range(8, 321, 8):
        for num_layers in range(step, 81, step):
            if 4 <= d_model / num_layers <= 20:
                model = rule.model(d_model, num_layers)
                shapes[d_model, num_layers] = training_flops_per_token(model, 64)
    middle = math.sqrt(4 * 20)
    for target in (2e5, 7e5, 3e6, 1.1e7):
        off = {s: abs(math.log(f / target)) for s, f in shapes.items()}
        aspect = {s: abs(math.log(s[0] / s[1] / middle)) for s in shapes}
        near = [s for s in shapes if off[s] <= math.log1p(tolerance)]
        expected = min(near, key=lambda s: (aspect[s], off[s])) if near else None
        if expected is None:
            expected = min(shapes, key=lambda s: (off[s], aspect[s]))
        shape = rule.nearest(target)
        assert (shape.model.d_model, shape.model.num_layers) == expected
        assert shape.flops_per_token == shapes[expected]
        assert shape.model.head_width == base.head_width


def test_a_control_is_its_points_unrouted_layers_alone():
    grid = grid_of(sizes=SIZES)
    points = {(p.family, p.size): p for p in grid.points}
    for family in ("mod", "mode"):
        for size in SIZES:
            point, control = points[family, size], points[f"{family}_unrouted", size]
            assert control.resolved.model == unrouted_layers(point.resolved.model)
            assert control.plan.flops == pytest.approx(point.plan.flops, rel=0.1)
            assert control.plan.tokens > point.plan.tokens
            assert control.config.optimizer == point.config.optimizer
    assert not any(p.family.startswith("dense_") for p in grid.points)
    assert {p.family for p in grid_of(sizes=SIZES, controls=False).points} == {
        *("dense", "mod", "mode")
    }
    assert {p.family for p in grid_of(sizes=SIZES, only=["mod_unrouted"]).points} == {
        "mod_unrouted"
    }


def test_a_control_that_another_family_has_already_is_trained_once():
    sigmoid = family_of(router=replace(composed().families["mod"].model.router, gate="sigmoid"))
    families = {"mod": family_of(), "sigmoid": sigmoid, "all": family_of(pattern="every")}
    grid = grid_of(families, sizes=SIZES)
    assert {p.family for p in grid.points} == {"mod", "mod_unrouted", "sigmoid", "all"}
    wide = replace(families["mod"], model=replace(families["mod"].model, capacity=0.126))
    assert len(grid_of({"mod": families["mod"], "wide": wide}, sizes=SIZES).notes) == 1
    assert grid.notes == [
        "sigmoid_unrouted is mod_unrouted: it is trained once, as mod_unrouted",
        "all has no control: it has no whole layers that are not routed",
    ]


def test_rates_and_batches_follow_their_rules():
    grid = grid_of(
        budgets=[1e10, 8e10],
        sizes=SIZES,
        lr_rule=LearningRateConfig(width=64, exponent=0.5, factors={"mod": 2.0}),
        batch_rule=BatchRuleConfig(budget=1e10, exponent=1 / 3),
    )
    for point in grid.points:
        factor = 2.0 if point.family == "mod" else 1.0
        expected = 1e-3 * factor * math.sqrt(64 / point.resolved.model.d_model)
        assert point.config.optimizer.lr == pytest.approx(expected, rel=1e-3)
        assert point.config.batch.tokens == {1e10: 256, 8e10: 512}[point.budget]


def test_muons_own_rate_follows_too():
    muon = replace(
        composed().families["mod"], optimizer=OptimizerConfig(name="muon", muon=MuonConfig(lr=0.02))
    )
    (point, *_) = grid_of({"mod": muon}, sizes=[1.0]).points
    factor = point.config.optimizer.lr / 1e-3
    assert point.config.optimizer.muon.lr == pytest.approx(0.02 * factor, rel=1e-3)


def test_seeds_are_of_weights_and_data_and_come_one_after_the_other():
    grid = grid_of(seeds=[7, 3], sizes=SIZES, budgets=[4e10, 1e10])
    assert [p.seed for p in grid.points] == sorted((p.seed for p in grid.points), reverse=True)
    assert all(p.config.data.seed == p.seed for p in grid.points)
    assert len({p.config.name for p in grid.points}) == len(grid.points)
    first = [p.budget for p in grid.points if p.seed == 7]
    assert first == sorted(first)


@pytest.mark.slow
def test_a_points_overrides_make_its_configuration():
    odd = family_of(part="data", path="a, b=[c]")
    odd.model.router.causal = ["predictor", "threshold"]
    odd.eval.every = None
    (point, control) = grid_of({"odd": odd}, sizes=[1.0]).points
    for one in (point, control):
        name = f'name="{one.config.name}"'
        assert compose("train", [*one.job.overrides, name]) == one.config


def test_two_sizes_of_one_shape_are_refused_for_every_family_of():
    changes = {"budgets": [1e9], "sizes": [1.0, 1.01]}
    problems = problems_of(grid_of, **changes)
    assert set(problems) == {"dense: sizes", "mod: sizes", "mode: sizes"}
    assert "the same shape as 1:" in problems["mod: sizes"].reason


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"d_ff": 64}, "model.d_ff"),
        ({"pattern": "[1, .125]*2"}, "model.pattern"),
        ({"pattern": [1, 0.5, 1, 0.5]}, "model.pattern"),
        ({"mixer": ["convolution", *["attention"] * 3]}, "model.mixer"),
        ({"experts": ExpertsConfig(count=4, dim=16)}, "model.experts.dim"),
        ({"num_kv_heads": 2}, "shape.width_multiple"),
        ({"pattern": "every", "num_heads": 1}, "sizes"),
        ({"head_dim": 64}, "shape"),
    ],
)
def test_what_cannot_follow_a_shape_is_refused(changes, key):
    shape = ShapeConfig(aspect_min=9.30001, aspect_max=9.300011 if key == "shape" else 64)
    shape = replace(shape, width_multiple=24 if key == "shape.width_multiple" else None)
    problems = problems_of(grid_of, {"mod": family_of(**changes)}, sizes=[1.0, 1.1], shape=shape)
    assert set(problems) == {f"mod: {key}"}
    assert problems[f"mod: {key}"].remedy


def test_everything_wrong_with_a_grid_comes_at_once():
    problems = problems_of(
        compose_isoflop,
        [
            *("name=g", "budgets=[1e9,1e9]", "families={a b: []}", "only=[c]", "sizes=[]"),
            *("budget.flops=3", "lr_rule.factors={q: 1}", "tokens_per_parameter_of={a: 0}"),
            *("shape.aspect_min=900", "gpu=h100", "seeds=[1,1]", "parameters=some"),
            *("sweep.retries=true", "hydra.sweep.dir=x"),
        ],
    )
    assert {
        *("budgets", "families", "only", "sizes", "budget.flops", "lr_rule.factors"),
        *("tokens_per_parameter_of", "shape.aspect_min", "gpu", "seeds", "parameters"),
        *("sweep.retries", "hydra.sweep.dir"),
    } <= set(problems)


def test_the_mistake_of_a_family_is_named_with_it():
    families = 'families={a: ["model.patern=dense"]}'
    problems = problems_of(compose_isoflop, ["plan_only=true", "budgets=[1e10]", families])
    assert "a: model.patern" in problems
