"""Grids whose budgets share a trunk: fewer FLOPs, and the same bits as without."""

from dataclasses import replace
from pathlib import Path

import pytest

import modtrain.training.run  # noqa: F401  (loaded here, so that no forked job has to load it)
from modtrain.cli import main as cli
from modtrain.experiments.isoflop.config import BatchRuleConfig
from modtrain.experiments.isoflop.trunks import share_trunks
from modtrain.training.run_directory import RunDirectory
from modtrain.training.schedule_config import ScheduleConfig
from modtrain.training.schedules import decay_start
from tests.experiments.isoflop.grid_cases import (
    composed,
    grid_arguments,
    grid_of,
    points_of,
    problems_of_grid,
)
from tests.helpers.saved import assert_same_bits, newest_tensors

pytestmark = pytest.mark.usefixtures("no_stop_request")

WSD = ScheduleConfig("wsd", warmup_steps=3, decay=0.3, final=0.0)
SHARED = (
    *("schedule=wsd", "schedule.warmup_steps=3", "schedule.decay=0.3", "share_trunk=true"),
    *("budgets=[6e8,2.4e9]", "sizes=[0.5,1]", "only=[mod]"),
)


def wsd_grid(**changes):
    families = {name: replace(f, schedule=WSD) for name, f in composed().families.items()}
    constant = BatchRuleConfig(exponent=0.0)
    return grid_of(families, **({"sizes": [0.5, 1.0, 2.0], "batch_rule": constant} | changes))


def test_points_of_one_shape_branch_off_a_trunk_where_each_begins_to_decay():
    alone = wsd_grid(budgets=[1e10, 4e10], tokens_per_parameter=2.0)
    grid = share_trunks(alone, composed().defaults)
    trunks = {trunk.config.name: trunk for trunk in grid.trunks}
    assert trunks
    assert [p.plan.flops for p in grid.points] == [p.plan.flops for p in alone.points]
    shapes = [(p.family, p.resolved.model) for p in alone.points]
    for point in grid.points:
        is_shared = shapes.count((point.family, point.resolved.model)) > 1
        assert (point.trunk is not None) == is_shared
        if point.trunk is None:
            assert point.own_flops == point.plan.flops
            continue
        trunk, start = trunks[point.trunk], decay_start(WSD, point.plan.steps)
        assert point.config.branch.step == start
        assert start in trunk.config.checkpoint.keep_steps
        assert trunk.plan.steps >= start
        assert trunk.config.schedule == replace(WSD, name="constant")
        assert (trunk.family, trunk.resolved.model) == (point.family, point.resolved.model)
        assert point.own_flops == pytest.approx(0.3 * point.plan.flops, rel=0.05)
        assert f'branch.run="{point.trunk}"' in point.job.overrides
    longest = {name: trunk.plan.steps for name, trunk in trunks.items()}
    for name, steps in longest.items():
        assert steps == max(p.config.branch.step for p in grid.points if p.trunk == name)
    spent = sum(run.own_flops for run in [*grid.trunks, *grid.points])
    assert spent < sum(p.plan.flops for p in alone.points)


def test_what_never_decays_or_occurs_once_shares_nothing():
    grid = share_trunks(wsd_grid(budgets=[1e10]), composed().defaults)
    assert grid.trunks == []
    assert "no model is trained at two budgets" in grid.notes[-1]
    cosine = share_trunks(
        grid_of(budgets=[1e10, 4e10], batch_rule=BatchRuleConfig(exponent=0.0), sizes=[0.5, 1.0]),
        composed().defaults,
    )
    assert cosine.trunks == []


def test_what_differs_between_budgets_cannot_be_shared():
    problems = problems_of_grid(replace(composed().config, share_trunk=True))
    assert set(problems) == {"schedule.name", "schedule.warmup_steps"}
    rule = BatchRuleConfig(exponent=0.3)
    more = replace(composed().config, share_trunk=True, schedule=WSD, batch_rule=rule)
    assert set(problems_of_grid(more)) == {"batch_rule.exponent"}


@pytest.mark.nightly
def test_shared_trunks_change_no_bit_of_a_point(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shared = grid_arguments(tiny, *SHARED)
    assert cli.main([*shared, "--plan"]) == 0
    assert "shared trunks" in capsys.readouterr().out
    assert cli.main(shared) == 0
    rows = points_of("g")
    assert len(rows) == 4
    of_trunk = {row["trunk"] for row in rows} - {""}
    assert of_trunk
    for name in of_trunk:
        assert RunDirectory(Path("runs") / name).is_complete
        assert len({row["budget"] for row in rows if row["trunk"] == name}) == 2
    assert cli.main([*grid_arguments(tiny, *SHARED, name="alone"), "share_trunk=false"]) == 0
    for row, alone in zip(rows, points_of("alone"), strict=True):
        assert (row["loss"], row["C"]) == (alone["loss"], alone["C"])
        runs = [Path("runs") / one["run"] for one in (row, alone)]
        assert_same_bits(*map(newest_tensors, runs))


@pytest.mark.slow
def test_points_without_their_trunk_are_named(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    hot = ("optimizer.lr=1e30", "only=[mod]", "sizes=[0.5,1]")
    assert cli.main(grid_arguments(tiny, *SHARED, *hot)) == 1
    printed = capsys.readouterr().out
    assert "not started; its trunk g/family=mod,trunk=" in printed
    assert "is failed" in printed
