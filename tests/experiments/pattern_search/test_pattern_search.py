"""Searches that are planned and trained: rungs, restarts, failures, the front and the best."""

import csv
import json
import os
import signal
from functools import partial
from pathlib import Path

import pytest
import yaml

import modtrain.training.run  # noqa: F401  (loaded here, so that no forked job has to load it)
from modtrain.cli import main as cli
from modtrain.cli.compose import compose
from modtrain.cli.compose_verbs import compose_pattern_search
from modtrain.experiments.pattern_search.candidates import PatternSpace, find_candidates
from modtrain.experiments.pattern_search.runs import RunPlanner, plan_entries
from modtrain.experiments.sweep.job_process import is_in_use, write_failure
from modtrain.training.run_directory import RunDirectory
from modtrain.training.schedules import decay_start
from tests.conftest import fork_modtrain
from tests.experiments.pattern_search.search_cases import composed, search_arguments
from tests.helpers.problems import problems_of
from tests.helpers.saved import assert_same_bits, newest_tensors
from tests.helpers.waiting import wait_until

pytestmark = pytest.mark.usefixtures("no_stop_request")
HOME = Path("runs/s")


@pytest.fixture
def arguments(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return partial(search_arguments, tiny)


def rows():
    with (HOME / "patterns.csv").open() as file:
        return list(csv.DictReader(file))


def read(name):
    return json.loads((HOME / name).read_text())


def runs_of(words):
    """The planner of a command, and its entries by candidate."""
    request = compose_pattern_search(words[1:])
    planner = RunPlanner(request.config, request.base, request.defaults)
    space = PatternSpace(planner.model, planner.seq_len)
    drawn, _ = find_candidates(request.config, space)
    return planner, plan_entries(planner, drawn)


def complete(run, loss):
    """Write a run's end by hand."""
    directory = RunDirectory.of(run.config)
    directory.path.mkdir(parents=True, exist_ok=True)
    directory.complete({"held_out/causal_loss": loss, "flops": run.plan.flops})


def complete_all(words, loss=lambda entry: 4 - entry.candidate.flops_over_dense - entry.rung):
    """Write the ends of all runs of a search, whatever it will decide."""
    planner, entries = runs_of(words)
    for of_candidate in entries.values():
        for entry in of_candidate:
            complete(entry.trunk, 9.0)
            complete(entry.decay, loss(entry))
    complete(planner.dense(), 2.9)
    return entries


def test_each_rung_extends_the_trunk_of_the_one_before():
    request = composed("patterns=[every_other]", "num_drawn=2", "budgets=[1e9,3e9,9e9]")
    planner = RunPlanner(request.config, request.base, request.defaults)
    drawn, _ = find_candidates(request.config, PatternSpace(planner.model, planner.seq_len))
    schedule = request.base.schedule
    for candidate, entries in zip(drawn, plan_entries(planner, drawn).values(), strict=True):
        before = None
        for entry, budget in zip(entries, (1e9, 3e9, 9e9), strict=True):
            trunk, decay = entry.trunk, entry.decay
            step = decay.plan.flops_per_token * decay.plan.tokens_per_step
            assert abs(decay.plan.flops - budget) <= step / 2
            start = decay_start(schedule, decay.plan.steps)
            assert (decay.config.branch.run, decay.config.branch.step) == (trunk.name, start)
            assert trunk.plan.steps == start
            assert trunk.config.checkpoint.keep_steps == [start]
            assert trunk.config.schedule.name == "constant"
            assert (trunk.config.eval.every, trunk.config.eval.zero_routers) == (None, "never")
            assert decay.config.eval == request.base.eval
            assert trunk.config.model.pattern == list(candidate.capacities)
            branch = trunk.config.branch
            if before is None:
                assert branch.run is None
            else:
                assert (branch.run, branch.step) == (before.name, before.plan.steps)
            before = trunk
        # No step but those of the decays is trained twice.
        decays = sum(e.decay.plan.flops - e.trunk.plan.flops for e in entries)
        spent = sum(e.own_flops for e in entries)
        assert spent == pytest.approx(entries[-1].trunk.plan.flops + decays)


def test_the_overrides_of_a_run_make_its_configuration():
    request = composed("patterns=[every_other]", "num_drawn=1", "budgets=[1e9,3e9]")
    planner = RunPlanner(request.config, request.base, request.defaults)
    drawn, _ = find_candidates(request.config, PatternSpace(planner.model, planner.seq_len))
    entry = plan_entries(planner, drawn)["c001"][1]
    for run in (entry.trunk, entry.decay):
        assert compose("train", [*run.job.overrides, f'name="{run.name}"']) == run.config


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("schedule.decay=0", "leaves none for the learning rate to decay"),
        ("schedule.warmup_steps=40", "leaves none for the learning rate to decay"),
        ("budgets=[3e9,3.01e9]", "adds no step before the decay"),
    ],
)
def test_a_rung_without_steps_of_its_own_is_refused(override, text):
    request = composed("patterns=[]", "num_drawn=3", override)
    planner = RunPlanner(request.config, request.base, request.defaults)
    drawn, _ = find_candidates(request.config, PatternSpace(planner.model, planner.seq_len))
    problem = problems_of(plan_entries, planner, drawn)["budgets"]
    assert text in problem.reason


def test_a_plan_shows_candidates_and_flops_and_trains_none(arguments, capsys):
    assert cli.main(arguments("--plan")) == 0
    printed = capsys.readouterr().out
    assert not Path("runs").exists()
    assert [f"c00{n}" in printed for n in range(5)] == [True] * 4 + [False]
    assert "rung 0: 4 candidates to 6e+08 FLOPs each" in printed
    assert "rung 1: 2 candidates to 1.2e+09 FLOPs each" in printed
    assert "in all: " in printed
    assert "data repeat" not in printed
    assert cli.main(arguments("--plan", "budgets=[6e8,6e10]")) == 0
    assert "data repeat" in capsys.readouterr().out


def test_a_process_of_several_is_refused(arguments, capsys, monkeypatch):
    ranks = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for key, value in ranks.items():
        monkeypatch.setenv(key, value)
    assert cli.main(arguments()) == 2
    assert "starts its runs itself" in capsys.readouterr().err


@pytest.mark.slow
def test_decisions_stay_as_written_and_results_lead_to_runs(arguments, capsys):
    words = arguments("controls=false")
    entries = complete_all(words)
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert "rung 0: 2 of 4 continue" in printed
    rungs = read("rungs.json")
    assert [rung["budget"] for rung in rungs["rungs"]] == [6e8]
    by_flops = sorted(entries, key=lambda name: -entries[name][0].candidate.flops_over_dense)
    # All are on the front; its two ends continue.
    assert rungs["rungs"][0]["survivors"] == sorted((by_flops[0], by_flops[-1]))
    table = rows()
    assert [row["rung"] for row in table] == ["0"] * 4 + ["1"] * 2
    for row in table:
        entry = entries[row["candidate"]][int(row["rung"])]
        assert row["run"] == entry.decay.name
        assert tuple(map(float, row["capacities"].split())) == entry.candidate.capacities
        assert float(row["forward_flops_over_dense"]) == pytest.approx(
            entry.candidate.flops_over_dense
        )
        spent = sum(e.own_flops for e in entries[row["candidate"]][: entry.rung + 1])
        assert float(row["flops_spent"]) == pytest.approx(spent)
    front = read("pareto.json")["front"]
    assert {entry["candidate"] for entry in front} == {by_flops[0], by_flops[-1]}
    for entry in front:
        of_candidate = entries[entry["candidate"]]
        assert entry["trunks"] == [e.trunk.name for e in of_candidate]
        assert (entry["earlier_rungs"], entry["run"]) == (
            [of_candidate[0].decay.name],
            of_candidate[1].decay.name,
        )
    assert (HOME / "patterns.png").stat().st_size > 10_000

    # What a run is found to be later changes no decision.
    complete(entries[by_flops[0]][0].decay, 99.0)
    before = (HOME / "rungs.json").read_bytes()
    assert cli.main(words) == 0
    assert (HOME / "rungs.json").read_bytes() == before
    # Other candidates would make another search of it.
    assert cli.main([*words, "sampler_seed=1"]) == 2
    assert "rungs.json has decisions of another search" in capsys.readouterr().err


def test_a_failed_candidate_is_named_and_left_out(arguments, capsys):
    words = arguments("controls=false")
    entries = complete_all(words)
    for name, run in (("c001", "decay"), ("c002", "trunk")):
        failed = RunDirectory.of(getattr(entries[name][0], run).config)
        failed.completed_mark.unlink()
        write_failure(failed, "TrainingError", "the loss is not finite")
    RunDirectory.of(entries["c002"][0].decay.config).completed_mark.unlink()
    complete(entries["c003"][0].decay, float("nan"))
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert "left out of rung 0: c001: failed TrainingError: the loss is not finite" in printed
    trunk = entries["c002"][0].trunk.name
    assert f"left out of rung 0: c002: not started; its trunk {trunk} is failed" in printed
    assert "left out of rung 0: c003: its loss is nan" in printed
    assert set(read("rungs.json")["rungs"][0]["failed"]) == {"c001", "c002", "c003"}
    assert read("rungs.json")["rungs"][0]["survivors"] == ["c000"]
    assert {entry["candidate"] for entry in read("pareto.json")["left_out"]} == {
        *("c001", "c002", "c003")
    }
    assert {row["candidate"] for row in rows()} == {"c000"}


def test_a_search_in_which_all_fail_has_no_results(arguments, capsys):
    words = arguments("controls=false")
    entries = complete_all(words, loss=lambda entry: float("nan"))
    assert cli.main(words) == 1
    assert capsys.readouterr().out.count("left out of rung 0") == len(entries)
    assert not (HOME / "patterns.csv").exists()
    assert not (HOME / "rungs.json").exists()


@pytest.mark.parametrize(("rule", "chosen"), [("lowest_loss", 0), ("cheapest", -1)])
def test_the_best_is_chosen_by_its_rule_and_written_to_its_file(arguments, rule, chosen):
    words = arguments(
        *("controls=false", "budgets=[6e8]", f"best={rule}", "best_within=0.5"),
        "output=mine/experiment/found.yaml",
    )
    entries = complete_all(words)
    assert cli.main(words) == 0
    by_flops = sorted(entries, key=lambda name: -entries[name][0].candidate.flops_over_dense)
    best = by_flops[chosen]
    assert read("pareto.json")["best"] == {"candidate": best, "rule": rule}
    written = yaml.safe_load(Path("mine/experiment/found.yaml").read_text())
    assert written["model"]["pattern"] == list(entries[best][0].candidate.capacities)
    assert not (HOME / "conf").exists()


def test_a_configuration_that_is_found_composes_to_the_run(arguments, tiny):
    words = arguments("controls=false")
    entries = complete_all(words)
    assert cli.main(words) == 0
    best = read("pareto.json")["best"]["candidate"]
    config = compose("train", ["experiment=best"], str(HOME / "conf"))
    run = entries[best][1].decay.config
    assert config.name == "s_best"
    for part in ("model", "budget", "schedule", "batch", "optimizer", "data", "eval"):
        assert getattr(config, part) == getattr(run, part), part
    assert config.branch.run is None
    assert config.checkpoint.keep_steps == []


@pytest.mark.slow
def test_a_killed_search_continues_to_a_front_and_a_config_that_trains(arguments, capsys):
    words = arguments()
    process = fork_modtrain(words)
    wait_until((HOME / "rungs.json").is_file, 240)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    wait_until(lambda: not any(is_in_use(RunDirectory(d)) for d in HOME.iterdir() if d.is_dir()))
    decided = (HOME / "rungs.json").read_bytes()

    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert (HOME / "rungs.json").read_bytes() == decided
    assert "2 of 4 continue" in printed
    table = rows()
    rungs = [row["rung"] for row in table if row["origin"] != "control"]
    assert rungs == ["0"] * 4 + ["1"] * 2
    for row in table:
        result = json.loads((RunDirectory(Path("runs") / row["run"]).result).read_text())
        assert float(row["loss"]) == result["held_out/causal_loss"]
        assert result["flops"] == pytest.approx(float(row["budget"]), rel=0.1)
    best = read("pareto.json")["best"]["candidate"]
    controls = {row["candidate"] for row in table if row["origin"] == "control"}
    assert controls <= {"dense", f"{best}_unrouted"}
    assert "dense" in controls
    assert f"{best} is " in printed
    assert "at equal training FLOPs" in printed

    more = ["budget.flops=null", "budget.steps=1", "name=again"]
    assert cli.main(["train", "--config-dir", str(HOME / "conf"), "experiment=best", *more]) == 0
    assert RunDirectory(Path("runs/again")).is_complete


@pytest.mark.nightly
def test_a_survivor_has_the_bits_of_a_run_from_the_start(arguments):
    words = arguments("patterns=[]", "num_drawn=2", "controls=false")
    assert cli.main(words) == 0
    (name,) = read("rungs.json")["rungs"][0]["survivors"]
    _, entries = runs_of(words)
    decay = entries[name][1].decay
    overrides = [o for o in decay.job.overrides if not o.startswith("branch.")]
    assert cli.main(["train", *overrides, "name=alone"]) == 0
    one, other = (newest_tensors(Path("runs") / n) for n in (decay.name, "alone"))
    assert_same_bits(one, other)


@pytest.mark.slow
def test_a_script_for_slurm_is_of_the_first_trunks(arguments, capsys):
    on_slurm = ("hydra/launcher=slurm", "cluster=cpu", "--dry-run")
    assert cli.main(arguments(*on_slurm)) == 0
    (script,) = HOME.glob("*.sbatch")
    assert "candidate=c000,trunk=0" in script.read_text()
    assert "for the first runs alone" in capsys.readouterr().out
    assert not (HOME / "rungs.json").exists()


def test_an_unfinished_rung_is_not_reported(arguments, capsys, monkeypatch):
    words = arguments("controls=false")
    entries = complete_all(words)
    # Whatever starts, nothing ends: as if the machine had been taken away.
    monkeypatch.setattr(
        "modtrain.experiments.sweep.hydra_multirun.Multirun.launch", lambda *_: None
    )
    RunDirectory.of(entries["c000"][0].decay.config).completed_mark.unlink()
    assert cli.main(words) == 75
    assert not (HOME / "patterns.csv").exists()
    assert "left out" not in capsys.readouterr().out
    complete(entries["c000"][0].decay, 1.0)
    for of_candidate in entries.values():
        RunDirectory.of(of_candidate[1].trunk.config).completed_mark.unlink()
    assert cli.main(words) == 75
    assert [row["rung"] for row in rows()] == ["0"] * 4
    assert not read("pareto.json")["is_last_rung"]
    assert not (HOME / "conf").exists()


@pytest.mark.slow
def test_a_search_is_submitted_as_one_job(arguments, monkeypatch):
    words = [o for o in arguments() if o != "search-patterns"]
    assert cli.main(["submit", "search-patterns", *words, "cluster=cpu", "--dry-run"]) == 0
    assert "search-patterns" in (HOME / "search-patterns.sbatch").read_text()
