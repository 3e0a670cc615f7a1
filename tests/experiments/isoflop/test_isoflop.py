"""Grids that are planned and trained: real runs, what a kill or a failure leaves, the points."""

import json
import os
import re
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

import modtrain.training.run  # noqa: F401  (loaded here, so that no forked job has to load it)
from modtrain.cli import main as cli
from modtrain.cli.compose_verbs import compose_isoflop
from modtrain.data.config import DataConfig
from modtrain.data.stream.index_json import read_summary
from modtrain.experiments.isoflop.config import CONVENTIONS
from modtrain.experiments.isoflop.grid import make_grid
from modtrain.experiments.isoflop.grid_report import warnings_of
from modtrain.experiments.isoflop.points import parameter_counts
from modtrain.experiments.sweep.job_process import is_in_use, state_of
from modtrain.models.flops import parameters
from modtrain.training.run_directory import RunDirectory
from modtrain.training.schedule_config import ScheduleConfig
from tests.conftest import fork_modtrain
from tests.experiments.isoflop.grid_cases import DENSE, composed, grid_arguments, grid_of, points_of
from tests.helpers.marks import slow
from tests.helpers.waiting import wait_until

pytestmark = pytest.mark.usefixtures("no_stop_request")


@pytest.fixture
def arguments(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return partial(grid_arguments, tiny)


def points():
    return points_of("g")


def runs_of(path="runs/g"):
    return {d.name: RunDirectory(d) for d in Path(path).iterdir() if "family=" in d.name}


def test_a_plan_shows_every_run_and_trains_none(arguments, capsys):
    code = cli.main(arguments("--plan", "flops_per_second=1e6", "seeds=[1,2]"))
    printed = capsys.readouterr().out
    assert code == 0
    assert not Path("runs").exists()
    rows = [line for line in printed.splitlines() if line.startswith("│")]
    assert len(rows) == 9
    cells = [cell.strip() for cell in rows[0].strip("│").split("│")]
    assert cells[:3] == ["dense", "6e+08", "0.5"]
    hours = [float(row.strip("│").split("│")[-1]) for row in rows]
    assert hours == pytest.approx([6e8 / 1e6 / 3600] * 9, rel=0.1)
    assert "in all: 18 runs" in printed
    total = float(re.search(r"(\S+) hours one after the other", printed)[1])
    assert total == pytest.approx(2 * sum(hours), rel=0.01)
    assert "points have fewer than min_steps=200 steps" in printed


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["gpu=zx81", "plan_only=true"], "gpu=zx81: is not a GPU whose peak is known"),
        (["nodes=2"], "add hydra/launcher=slurm"),
        slow(["hydra/launcher=cluster"], "cluster"),
        slow(["strategy=ddp", "strategy.world_size=2"], "number of the run's processes"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_trained(arguments, capsys, more, text):
    assert cli.main(arguments(*more)) == 2
    assert text in capsys.readouterr().err
    assert not Path("runs").exists()


def test_warnings_name_what_makes_a_grid_doubtful(prepared):
    data = DataConfig(path=str(prepared))
    few_tokens = {"budgets": [1e10], "tokens_per_parameter": 2.0, "min_steps": 1}
    families = {name: replace(f, data=data) for name, f in composed().families.items()}
    small = {"families": families, **few_tokens}
    repeated, off_grid, few = "data repeat in", "no smaller model than", "sizes a budget are few"
    warnings = warnings_of(grid_of(sizes=[1.0, 2.0], **small))
    assert [sum(text in w for w in warnings) for text in (repeated, off_grid, few)] == [1, 3, 1]
    stored = read_summary(data.path).splits["train"].num_sequences * 64
    points = grid_of(sizes=[0.5, 1.0, 2.0], **small).points
    most = max(point.plan.tokens for point in points)
    (repeats, _) = warnings_of(grid_of(sizes=[0.5, 1.0, 2.0], **small))
    assert f"up to {most / stored:.2f} epochs" in repeats
    # Without prepared data nothing is known of epochs.
    (only,) = warnings_of(grid_of(sizes=[0.5, 1.0, 2.0], **few_tokens))
    assert few in only
    long = ScheduleConfig(warmup_steps=min(point.plan.steps for point in points))
    families = {name: replace(f, schedule=long) for name, f in composed().families.items()}
    (warm_up, _) = warnings_of(grid_of(families, sizes=[0.5, 1.0, 2.0], **few_tokens))
    assert "no more than its warm-up" in warm_up
    fewer = few_tokens | {"min_steps": 10**9}
    (steps, _) = warnings_of(grid_of(sizes=[0.5, 1.0, 2.0], **fewer))
    assert f"down to {min(point.plan.steps for point in points)} (" in steps


def test_parameters_are_counted_by_each_convention():
    for point in grid_of(sizes=[1.0]).points:
        model, counts = point.resolved.model, parameter_counts(point)
        assert tuple(counts) == CONVENTIONS
        outside = 2 * model.vocabulary * model.d_model
        assert counts["total"] == parameters(model).total
        for name in ("total", "active"):
            assert counts[name] - counts[f"{name}_non_embedding"] == outside
        # C = 6 N D.
        assert 6 * counts["effective"] * point.plan.tokens == pytest.approx(point.plan.flops)
        is_sparse = model.is_routed or model.experts.count is not None
        assert (counts["active"] < counts["total"]) == is_sparse


@pytest.mark.slow
def test_hours_are_those_of_a_short_timing_here_or_of_a_gpu(arguments, capsys):
    assert cli.main(arguments("--plan", "measure=true", "sizes=[1]", "only=[mod]")) == 0
    assert "hours one after the other, here, as timed: " in capsys.readouterr().out
    assert cli.main(arguments("--plan", "gpu=h100", "mfu=0.5")) == 0
    assert "at 4.94e+14 FLOPs a second a device (MFU 0.5)" in capsys.readouterr().out


@pytest.mark.slow
def test_points_are_fitted_where_they_are_enough(arguments, capsys):
    """Complete runs are written by hand here, with the losses of a known law."""
    grid = (
        "budgets=[1e9,1e10,1e11]",
        "sizes=[0.25,0.5,1,2,4]",
        "only=[dense]",
        "shape.aspect_min=2",
    )
    request = compose_isoflop(arguments(*grid)[1:])
    for point in make_grid(request.config, request.families, request.defaults).points:
        size, tokens = parameter_counts(point)["effective"], point.plan.tokens
        run = RunDirectory.of(point.config)
        run.path.mkdir(parents=True)
        run.complete({"held_out/causal_loss": 1.69 + 406.4 / size**0.34 + 410.7 / tokens**0.28})
    assert cli.main(arguments(*grid)) == 0
    assert "15 jobs, 0 to train" in capsys.readouterr().out
    law = json.loads(Path("runs/g/fit/fit.json").read_text())
    assert law["parameters"] == "effective"
    assert len(points()) == 15
    fitted = law["families"]["dense"]["law"]
    assert fitted["alpha"]["value"] == pytest.approx(0.34, abs=0.01)
    assert fitted["beta"]["value"] == pytest.approx(0.28, abs=0.01)


@pytest.mark.slow
def test_a_grid_is_trained_to_points_and_a_killed_one_continues(arguments, capsys):
    grid = arguments("seeds=[5]", "sizes=[1,2]", "checkpoint.every=2", "parameters=active")
    process = fork_modtrain(grid)
    wait_until(lambda: Path("runs/g").is_dir() and any(r.is_complete for r in runs_of().values()))
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 75
    wait_until(lambda: not any(map(is_in_use, runs_of().values())))
    states = [state_of(run) for run in runs_of().values()]
    # What is complete is there already; the rest is named.
    assert 0 < len(points()) == states.count("complete") < 6

    assert cli.main(grid) == 0
    assert f"6 jobs, {6 - states.count('complete')} to train" in capsys.readouterr().out
    rows = points()
    assert len(rows) == 6
    assert {(row["family"], row["size"]) for row in rows} == {
        (family, size) for family in ("dense", "mod", "mod_unrouted") for size in ("1.0", "2.0")
    }
    for row in rows:
        run = RunDirectory(Path("runs") / row["run"])
        result = json.loads(run.result.read_text())
        assert float(row["loss"]) == result["held_out/causal_loss"]
        assert (float(row["C"]), int(row["D"])) == (result["flops"], result["tokens"])
        assert float(row["C"]) == pytest.approx(6e8, rel=0.1)
        assert row["N"] == row["N_active"]
        assert row["seed"] == "5"
        assert run.read_config().data.seed == 5
    assert Path("runs/g/loss_by_size.png").stat().st_size > 10_000

    assert cli.main(grid) == 0
    assert "6 jobs, 0 to train" in capsys.readouterr().out
    # A grid with other rules is another grid.
    assert cli.main([*grid, "lr_rule.exponent=0"]) == 2
    assert "optimizer.lr" in capsys.readouterr().err


@pytest.mark.slow
def test_a_failed_point_is_named_left_out_and_started_again_on_request(arguments, capsys):
    families = f'{{{DENSE}, hot: ["model.pattern=dense", "optimizer.lr=1e30"]}}'
    grid = arguments("sizes=[1]", families=families)
    assert cli.main(grid) == 1
    printed = capsys.readouterr().out
    name = "g/budget=6e+08,family=hot,size=1"
    assert f"left out of points.csv: {name}: failed DivergedError: the loss" in printed
    assert [row["family"] for row in points()] == ["dense"]
    starts = RunDirectory(Path("runs") / name).manifest
    assert cli.main(grid) == 1
    assert len(json.loads(starts.read_text())["starts"]) == 1
    assert cli.main([*grid, "sweep.retry=true"]) == 1
    assert len(json.loads(starts.read_text())["starts"]) == 2
    # Without any point there is no file of an earlier start.
    assert cli.main([*grid, "only=[hot]"]) == 1
    assert not Path("runs/g/points.csv").exists()


@pytest.mark.slow
def test_points_run_beside_one_another(arguments):
    joblib = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    assert cli.main(arguments("sizes=[1]", "only=[dense,mod]", *joblib)) == 0
    assert {row["family"] for row in points()} == {"dense", "mod"}


@pytest.mark.slow
def test_a_script_for_slurm_has_a_task_for_each_point(arguments, monkeypatch):
    on_slurm = ("hydra/launcher=slurm", "cluster=cpu", "--dry-run")
    assert cli.main(arguments("sizes=[1]", "only=[mod]", *on_slurm)) == 0
    (script,) = Path("runs/g").glob("*.sbatch")
    assert "budget=6e+08,family=mod,size=1" in script.read_text()
    assert not Path("runs/g/points.csv").exists()
