"""Tables: only what differs, strict JSON, and the same numbers in each format."""

import csv
import io
import json

import pytest

from modtrain.experiments.report.collect import collect
from modtrain.experiments.report.table_files import latex, to_csv, to_json, to_latex
from modtrain.experiments.report.tables import differing_keys, make_tables
from tests.experiments.report.report_cases import (
    report_of,
    write_comparison,
    write_grid,
    write_run,
    write_swaps,
)


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "runs"
    root.mkdir()
    return root


def tables_of(root, **changes):
    collection = collect(report_of(root, **changes))
    directories = {run.name: f"../runs/{run.name}" for run in collection.runs}
    return {table.name: table for table in make_tables(collection, directories)}


def strict(text):
    def refuse(constant):
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


def test_only_differing_keys_are_columns(root):
    write_run(root, "a", capacity=0.25)
    write_run(root, "b", seed=3, changes={"budget": {"steps": 7}})
    # As a run from before a key was added, and one with the same number as an integer.
    old = write_run(root, "c", changes={"optimizer": {"weight_decay": 0.1, "grad_clip": 1}})
    text = (old / "config.yaml").read_text()
    (old / "config.yaml").write_text(text.replace("zero_routers: end\n", "batch_size: 16\n"))
    table = tables_of(root)["runs"]
    shown = [column.key for column in table.shown if column.key.startswith("config.")]
    assert sorted(shown) == [
        "config.budget.steps",
        "config.data.seed",
        "config.model.capacity",
        "config.seed",
    ]
    assert [row["config.model.capacity"] for row in table.rows] == [0.25, 0.125, 0.125]
    assert [row["config.budget.steps"] for row in table.rows] == [None, 7, None]
    assert differing_keys(collect(report_of(root, "a")).runs) == []


def test_numbers_equal_those_of_the_runs_in_every_format(root):
    losses = {"one": 3.123456789012345, "two": 2.75}
    for name, loss in losses.items():
        write_run(root, name, loss=loss)
    table = tables_of(root)["runs"]
    rows = strict(to_json(table))
    assert {row["run"]: row["loss"] for row in rows} == losses
    read = list(csv.DictReader(io.StringIO(to_csv(table))))
    assert {row["run"]: float(row["loss"]) for row in read} == losses
    for row, cells in zip(rows, read, strict=True):
        result = json.loads((root / row["run"] / "result.json").read_text())
        assert row["flops"] == result["flops"] == float(cells["flops"])
        assert row["tokens"] == result["tokens"]
        assert row["steps"] == result["steps"]
        assert row["directory"] == f"../runs/{row['run']}"
        assert row["command"] == f"modtrain train name={row['run']}"
    assert "3.1235" in to_latex(table)
    assert "command" not in to_latex(table)


def test_json_is_strict_whatever_a_configuration_has(root):
    write_run(root, "a", changes={"optimizer": {"lr": float("nan"), "eps": float("inf")}})
    write_run(root, "b", changes={"optimizer": {"lr": [1, {"x": float("inf")}]}})
    rows = strict(to_json(tables_of(root)["runs"]))
    assert [row["config.optimizer.lr"] for row in rows] == ["nan", [1, "{'x': inf}"]]


def test_arms_stand_beside_their_control_and_the_best_dense_arm(root):
    losses = {"dense": (3.0, 3.1), "mod": (2.97, 3.07), "mod_unrouted": (2.9, 3.0)}
    for arm, of_arm in losses.items():
        for seed, loss in enumerate(of_arm):
            write_run(root, f"c/{arm}/seed_{seed}", loss=loss, seed=seed)
    arms = {arm: {"runs": [f"c/{arm}/seed_{seed}" for seed in (0, 1)]} for arm in losses}
    arms["mod"] |= {"is_routed": True, "control": "mod_unrouted"}
    write_comparison(root, "c", arms)
    rows = {row["arm"]: row for row in tables_of(root)["comparisons"].rows}
    mod = rows["mod"]
    assert mod["loss"] == pytest.approx(3.02)
    assert (mod["control"], mod["best_dense"], mod["seeds"]) == ("mod_unrouted", "mod_unrouted", 2)
    expected = ((2.97 / 2.9 - 1) + (3.07 / 3.0 - 1)) / 2
    assert mod["change_over_control"] == pytest.approx(expected)
    assert mod["change_over_control_low"] < expected < mod["change_over_control_high"]
    assert rows["dense"]["control"] is None
    assert rows["dense"]["best_dense"] is None


def test_routers_swaps_laws_and_what_was_left_out_have_tables(root):
    write_grid(root, "grid")
    run = write_run(root, "mod")
    write_swaps(run)
    write_run(root, "short", complete=False)
    tables = tables_of(root)
    assert list(tables) == ["runs", "routers", "swaps", "laws", "optima", "speed_ups", "left_out"]
    of_run = [row for row in tables["routers"].rows if row["run"] == "mod"]
    assert [row["router"] for row in of_run] == ["layer_01", "layer_03", "all"]
    assert of_run[1]["gate_mean"] == 0.5
    assert of_run[1]["worth"] == 0.01
    assert [row["change"] for row in tables["swaps"].rows] == [0.02, 0.01]
    laws = {(r["family"], r["quantity"]): r["value"] for r in tables["laws"].rows}
    assert laws["dense", "beta"] == pytest.approx(0.28, abs=1e-3)
    factors = {row["family"]: row["factor"] for row in tables["speed_ups"].rows}
    assert factors == {"mod": pytest.approx(1.3, rel=0.01)}
    assert tables["left_out"].rows == [{"run": "short", "reason": "is not complete: stopped"}]
    for table in tables.values():
        strict(to_json(table))
        assert to_latex(table).count(r"\\") == len(table.rows) + 1


def test_latex_shows_every_letter():
    assert latex("a_b & 100% #1 $x$ {~^\\}\n") == (
        r"a\_b \& 100\% \#1 \$x\$ \{\textasciitilde{}\textasciicircum{}\textbackslash{}\} "
    )


def test_what_a_run_took_is_reported(root):
    assert "costs" not in tables_of_run(root, "a")
    usage = {
        "begun": 100.0,
        "until": 3700.0,
        "gpus": 4,
        "training_seconds": 1800.0,
        "end": "complete",
    }
    (root / "a/usage.json").write_text(json.dumps({"starts": [usage]}))
    (row,) = tables_of(root)["costs"].rows
    assert (row["run"], row["device"], row["hours"], row["training_hours"]) == ("a", "GPU", 4, 2)
    assert row["mfu"] is None
    assert "peak FLOP/s" in row["unknown"]


def tables_of_run(root, name):
    write_run(root, name)
    return tables_of(root)
