"""Which runs are reported, which are left out and why, and files that are damaged or hostile."""

import json
import os

import pytest

from modtrain.common.errors import ConfigError, DataError
from modtrain.common.reading import UnreadableError, read_json
from modtrain.experiments.report.collect import collect
from modtrain.experiments.report.config import ReportConfig
from modtrain.experiments.report.files import read_config
from modtrain.experiments.report.metrics import evenly, read_metrics
from tests.experiments.report.report_cases import report_of, write_comparison, write_grid, write_run


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "runs"
    root.mkdir()
    return root


def reasons(collection):
    return {run.name: run.reason for run in collection.left_out}


def test_runs_that_cannot_be_reported_are_left_out_with_the_reason(root):
    write_run(root, "good")
    write_run(root, "short", complete=False)
    write_run(root, "lossless", loss=None)
    for name, file in (("no manifest", "manifest.json"), ("no result", "result.json")):
        (write_run(root, name) / file).unlink()
    for name, file in (("a", "config.yaml"), ("b", "result.json"), ("c", "manifest.json")):
        (write_run(root, name) / file).write_text("[1, 2")
    (write_run(root, "d") / "result.json").write_text('{"held_out/causal_loss": 3, "steps": "x"}')
    failed = write_run(root, "failed", complete=False)
    (failed / "failure.json").write_text('{"kind": "DataError", "text": "no\\nshards"}')
    collection = collect(report_of(root))
    assert [run.name for run in collection.runs] == ["good"]
    assert reasons(collection) == {
        "short": "is not complete: stopped",
        "failed": "is not complete: failed, DataError: no shards",
        "lossless": "has no held-out causal loss",
        "no manifest": "manifest.json is missing",
        "no result": "is not complete: stopped",
        "a": reasons(collection)["a"],
        "b": "result.json is not a JSON object",
        "c": "manifest.json is not a JSON object",
        "d": "result.json lacks steps, tokens or flops",
    }
    assert reasons(collection)["a"].startswith("config.yaml cannot be read: ")


def test_incomplete_runs_are_reported_where_that_is_wanted(root):
    write_run(root, "short", complete=False, loss=3.5)
    write_run(root, "empty", complete=False, steps=5)
    collection = collect(report_of(root, include_incomplete=True))
    (run,) = collection.runs
    assert (run.state, run.is_complete, run.loss, run.step) == ("stopped", False, 3.5, 40)
    assert reasons(collection) == {"empty": "has no held-out causal loss yet"}


def test_without_any_run_to_report_the_error_names_each(root):
    write_run(root, "short", complete=False)
    with pytest.raises(
        DataError, match=r"short: is not complete: stopped(.|\n)*include_incomplete"
    ):
        collect(report_of(root))


def test_names_and_patterns_take_the_runs_below_them_once(root):
    for name in ("study/dense/seed_0", "study/mod/seed_0", "alone", "study2", "a[b]"):
        write_run(root, name)

    def names(*patterns):
        return [run.name for run in collect(report_of(root, *patterns)).runs]

    assert names("study") == ["study/dense/seed_0", "study/mod/seed_0"]
    assert names("study/m*", "study") == ["study/mod/seed_0", "study/dense/seed_0"]
    assert names("study*") == ["study/dense/seed_0", "study/mod/seed_0", "study2"]
    assert names("**/seed_0", "a[b]") == ["study/dense/seed_0", "study/mod/seed_0", "a[b]"]
    with pytest.raises(ConfigError, match=r"runs=nothing.*has no run") as error:
        collect(report_of(root, "alone", "nothing", "x*"))
    assert len(error.value.problems) == 2


def test_mistakes_of_a_report_are_reported_at_once(tmp_path):
    (tmp_path / "file").touch()
    config = ReportConfig(
        ["/etc", "a/../b", "x/**y", ""],
        str(tmp_path / "none"),
        str(tmp_path / "file"),
        max_points=1,
        bootstrap_samples=3,
        max_bytes=0,
    )
    keys = [problem.key for problem in config.problems()]
    assert sorted(keys) == sorted(
        ["runs"] * 4 + ["runs_dir", "output", "max_points", "bootstrap_samples", "max_bytes"]
    )
    assert [problem.key for problem in ReportConfig(runs_dir=str(tmp_path)).problems()] == ["runs"]


def test_runs_on_other_data_or_held_out_sets_are_separate_groups(root):
    write_run(root, "one")
    write_run(root, "two", seed=1)
    write_run(root, "other data", shards="6" * 64)
    write_run(root, "other sequences", changes={"eval": {"sequences": None}})
    collection = collect(report_of(root))
    assert [[run.name for run in group.runs] for group in collection.groups] == [
        ["one", "two"],
        ["other data"],
        ["other sequences"],
    ]
    assert "on 3 data or held-out sets" in collection.warnings[0]
    first, second, third = (group.title for group in collection.groups)
    assert first == "data 1: sotu (555555555555), 256 held-out sequences of 64 tokens"
    assert "666666666666" in second
    assert "all held-out sequences" in third
    assert not collect(report_of(root, "one", "two")).warnings


def test_numbers_are_those_of_the_result(root):
    path = write_run(root, "run", loss=2.9)
    (run,) = collect(report_of(root)).runs
    result = json.loads((path / "result.json").read_text())
    assert run.loss == result["held_out/causal_loss"] == 2.9
    assert (run.step, run.tokens, run.flops) == (40, result["tokens"], result["flops"])
    assert run.causal_forward_flops == result["held_out/causal_flops_per_token"]
    assert run.forward_flops == result["flops"] / result["tokens"] / 3
    assert run.worth == {"layer_01": 0.0, "layer_03": 0.01}
    assert run.capacities == [None, 0.125, None, 0.125]
    assert run.command == "modtrain train name=run"


def test_curves_times_and_health_are_those_of_the_metrics(root):
    write_run(root, "run", loss=3.0)
    (run,) = collect(report_of(root)).runs
    curve, metrics = run.metrics.curve, run.metrics
    assert curve.step == [10, 20, 30, 40]
    assert curve.loss == pytest.approx([3.6, 3.4, 3.2, 3.0])
    # Steps 25, 30, 35 and 40 are the second half.
    assert metrics.step_seconds == pytest.approx(0.5 + 32.5 / 1000)
    paces = {step: 0.5 + step / 1000 for step in range(5, 41, 5)}
    assert curve.seconds == pytest.approx(
        [sum(5 * pace for step, pace in paces.items() if step <= end) for end in curve.step]
    )
    assert metrics.seconds == pytest.approx(curve.seconds[-1])
    assert metrics.routers["layer_01"].gate[-1] == 0.5
    assert metrics.routers["layer_03"].update[0] == pytest.approx(0.2 * 5 / 40)


def test_malformed_lines_are_skipped_and_counted(root):
    bad = ('{"step": 41, "tok', "[1]\n", '{"step": 3, "tokens": 1, "flops": 1}\n', "\n", "\xff\n")
    nan = '{"step": 50, "tokens": 1, "flops": 1, "held_out/causal_loss": NaN}\n'
    huge = '{"step": 60, "tokens": 1e999, "flops": 1}\n'
    write_run(root, "run", lines=("\n", *bad[1:], nan, huge, "[" * 100_000 + "\n", bad[0]))
    (run,) = collect(report_of(root)).runs
    assert run.metrics.num_malformed == 6
    assert run.notes == ["metrics.jsonl has 6 malformed lines"]
    assert run.metrics.curve.step == [10, 20, 30, 40]


def test_long_curves_are_thinned_with_both_ends(root):
    path = write_run(root, "run", steps=15_000)
    metrics = read_metrics(path / "metrics.jsonl", 10**9, 50)
    # Of 4,500 lines not all records of training are read.
    assert len(metrics.curve) == 50
    assert metrics.step_seconds == pytest.approx(0.5 + 11.25, rel=0.01)
    assert metrics.seconds == pytest.approx(15_000 * (0.5 + 7.5), rel=0.01)
    assert metrics.curve.step[0] == 10
    assert metrics.curve.step[-1] == 15_000
    assert len(metrics.routers["layer_01"].gate) <= 50
    assert metrics.routers["layer_01"].gate[-1] == 0.5
    assert evenly(3, 10) == [0, 1, 2]
    assert evenly(101, 5) == [0, 25, 50, 75, 100]


def test_files_that_would_harm_are_refused(tmp_path):
    path = tmp_path / "config.yaml"
    for text, reason in (
        ("[" * 100_000, "nested too deeply"),
        ("a: &x [1]\nb: *x", "aliases"),
        ("!!python/object/apply:os.system [exit]", "could not determine a constructor"),
        ("- 1", "it is not a mapping"),
        ("a: \x00", "control characters|special characters"),
    ):
        path.write_text(text)
        with pytest.raises(UnreadableError, match=reason):
            read_config(path, 10**9)
    path.write_text("a" * 2_000_000)
    with pytest.raises(UnreadableError, match="larger than 1,048,576 bytes"):
        read_config(path, 10**9)
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(UnreadableError, match=r"pipe.json is not a file"):
        read_json(tmp_path / "pipe.json", 100)
    with pytest.raises(UnreadableError, match=r"cannot be read|is not a file"):
        read_json(tmp_path, 100)


def test_the_layers_of_a_configuration_are_checked(root):
    write_run(root, "many", changes={"model": {"num_layers": 10**9}})
    write_run(root, "text", changes={"model": {"pattern": "[1]*3", "num_layers": 4}})
    write_run(root, "none", changes={"model": {"pattern": None}})
    collection = collect(report_of(root))
    assert [run.capacities for run in collection.runs] == [[], [], []]
    assert all("capacities are not known" in run.notes[0] for run in collection.runs)


def test_arms_and_families_are_the_series(root):
    write_run(root, "pair/dense/seed_0", loss=3.0, pattern="dense")
    write_run(root, "pair/mod/seed_0", loss=2.9)
    write_run(root, "sweep/x=1")
    arms = {arm: {"runs": [f"pair/{arm}/seed_0"]} for arm in ("dense", "mod")}
    write_comparison(root, "pair", arms)
    assert {run.name: run.series for run in collect(report_of(root)).runs} == {
        "pair/dense/seed_0": "pair: dense",
        "pair/mod/seed_0": "pair: mod",
        "sweep/x=1": "sweep/x=1",
    }


def test_damaged_comparisons_and_grids_are_named(root):
    write_run(root, "a/one")
    write_run(root, "b/one")
    write_run(root, "c/one")
    (root / "a/compare.json").write_text('{"arm": {"runs": 3}}')
    (root / "b/points.csv").write_text("N,D\n1,2\n")
    (root / "c/points.csv").write_text("run,family,N,D,loss\nc/one,x,1,2,-3\n")
    collection = collect(report_of(root))
    assert [warning[:2] for warning in collection.warnings] == ["a:", "b:", "c:"]
    assert len(collection.runs) == 3


@pytest.mark.slow
def test_a_grid_is_fitted_to_the_runs_that_are_reported(root):
    write_grid(root, "grid")
    (group,) = collect(report_of(root)).groups
    (grid,) = group.grids
    assert grid.parameters == "effective"
    assert len(grid.points) == 30
    assert not grid.notes
    assert grid.fit.families["dense"].law["alpha"].value == pytest.approx(0.34, abs=1e-3)
    assert {run.series for run in group.runs} == {"grid: dense", "grid: mod"}
    lines = (root / "grid/points.csv").read_text().splitlines()
    trunks = ["trunk", *("grid/t" if "=dense" in line else "" for line in lines[1:])]
    (root / "grid/points.csv").write_text("\n".join(map(",".join, zip(lines, trunks, strict=True))))
    (group,) = collect(report_of(root)).groups
    assert group.grids[0].notes[0].startswith("15 points are branches of 1 trunks")
    (group,) = collect(report_of(root, "grid/family=dense*size=?")).groups
    (grid,) = group.grids
    assert set(grid.points.families) == {"dense"}
    assert grid.fit is None
    assert "has 9 points" in grid.reason
