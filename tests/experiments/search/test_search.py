"""Searches: real trials in forked processes, pruned, killed, shared among workers."""

import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

# Loaded here, so that each forked trial has it and need not load it.
from modtrain.cli import main as cli
from modtrain.cli.compose_verbs import compose_search
from modtrain.common.errors import OtherRunError
from modtrain.data.stream.index_json import read_summary
from modtrain.experiments.search.config import SearchConfig, parse_space
from modtrain.experiments.search.search import suggest
from modtrain.experiments.search.study import open_study
from modtrain.experiments.sweep.sweep_status import sweep_table
from modtrain.models.flops import forward_flops
from modtrain.training.run_directory import RunDirectory
from tests.conftest import fork_modtrain
from tests.helpers.problems import problems_of
from tests.helpers.waiting import wait_until

pytestmark = pytest.mark.usefixtures("no_stop_request")

SPACE = ("space.model.capacity=interval(0.2,1)", "space.model.pattern=choice(every,every_other)")


@pytest.fixture
def arguments(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keep = [o for o in tiny if not o.startswith(("budget", "eval.every"))]

    def of(*more, steps=4, space=SPACE):
        return ["search", *keep, f"budget.steps={steps}", "eval.every=2", "study=q", *space, *more]

    return of


def study(arguments):
    return open_study(Path("runs/q"), compose_search(arguments[1:]).config)


def run(number):
    return RunDirectory(Path(f"runs/q/trial_{number:04d}"))


def test_a_space_is_of_any_kind():
    space = {
        "a": "interval(0.1,1)",
        "b": "int(interval(1,4))",
        "c": "tag(log,interval(1e-4,1e-2))",
        "d": "choice(x,[1,2],x)",
        "e": "range(2,9,3)",
        "f": "one,two",
    }
    dimensions, problems = parse_space(space)
    assert problems == []
    assert [d.ends for d in dimensions] == [
        *(("0.1", "1.0"), ("1", "4"), ("0.0001", "0.01")),
        *(("x", "[1,2]"), ("2", "8"), ("one", "two")),
    ]
    drawn = {d.key: set() for d in dimensions}
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for _ in range(60):
        trial = study.ask()
        for dimension in dimensions:
            drawn[dimension.key].add(suggest(trial, dimension))
    assert drawn["b"] == {"1", "2", "3", "4"}
    assert drawn["d"] == {"x", "[1,2]"}
    assert drawn["e"] == {"2", "5", "8"}
    assert all(0.1 <= float(value) <= 1 for value in drawn["a"])
    below = sum(float(value) < 1e-3 for value in drawn["c"])
    assert 15 < below < 45  # half of the decades; of an even draw it would be some 5


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("interval(1e-4,", "( is not closed"),
        ("interval(1,2))", ") closes nothing"),
        ("3", "one value"),
    ],
)
def test_why_a_range_is_none_is_in_plain_words(text, reason):
    _, (problem,) = parse_space({"optimizer.lr": text})
    assert reason in problem.reason and "mismatched" not in problem.reason


def test_a_list_is_answered_with_the_choice_that_is_meant():
    _, (problem,) = parse_space({"optimizer.lr": "[1e-3, 2e-3]"})
    assert problem.remedy == "write 'space.optimizer.lr=choice(1e-3,2e-3)'"
    assert parse_space({"optimizer.lr": "choice(1e-3,2e-3)"})[0][0].values == ("0.001", "0.002")


@pytest.mark.parametrize(
    ("more", "key"),
    [
        (["trials=0"], "trials"),
        (["directions=[speed]"], "directions"),
        (["directions=[causal_loss,causal_loss]"], "directions"),
        (["pruner=median", "directions=[causal_loss,forward_flops]"], "pruner"),
        (["pruner=median", "directions=[forward_flops]"], "pruner"),
        (["pruner=median", "eval.every=null"], "pruner"),
        (["pruner=scissors"], "pruner"),
        (["study=../up"], "study"),
        (["space.optimizer.lr=0.1"], "space.optimizer.lr"),
        (["space.optimizer.lr=interval(1,"], "space.optimizer.lr"),
        (["space.optimizer.lr=tag(log,interval(0,1))"], "space.optimizer.lr"),
        (["space.optimizer.lr=interval(2,1)"], "space.optimizer.lr"),
    ],
)
def test_what_a_search_cannot_do_is_reported(arguments, more, key):
    assert list(problems_of(compose_search, arguments(*more)[1:])) == [key]


@pytest.mark.nightly
def test_the_ends_of_the_space_are_tried_before_the_first_trial(arguments, capsys):
    space = ("space.model.capacity=interval(0.5,7)", "space.model.pattern=choice(every,zigzag)")
    assert cli.main(arguments(space=space)) == 2
    error = capsys.readouterr().err
    assert "model.capacity=7.0" in error
    assert "model.pattern=zigzag" in error
    assert cli.main(arguments("space.modle.x=interval(0,1)")) == 2
    assert "modle.x" in capsys.readouterr().err
    assert not Path("runs").exists()


@pytest.mark.slow
def test_a_finite_space_is_tried_once_and_the_search_ends(arguments, capsys):
    words = arguments("trials=9", steps=1, space=("space.model.capacity=choice(0.5,0.25)",))
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    assert "the space has 2 points" in shown
    assert "2 complete; 0 to go" in shown
    assert re.search(r"/trial_\d+: causal_loss [\d.]+ with \S+=\S+", shown)
    assert sorted(t.params["model.capacity"] for t in study(words).trials) == ["0.25", "0.5"]


@pytest.mark.slow
def test_a_search_runs_its_trials_once_and_prints_the_front(arguments, capsys):
    two = arguments("trials=2", "directions=[causal_loss,forward_flops]")
    assert cli.main(two) == 0
    assert "2 complete; 0 to go" in capsys.readouterr().out
    report = json.loads(Path("runs/q/best.json").read_text())
    trials = study(two).trials
    for trial in trials:
        config = run(trial.number).read_config()
        assert config.model.capacity == trial.params["model.capacity"]
        assert config.model.pattern == trial.params["model.pattern"]
        result = json.loads(run(trial.number).result.read_text())
        flops = forward_flops(config.model, 64).total / 64
        assert trial.values == [result["held_out/causal_loss"], flops]
    better = [
        t.number
        for t in trials
        if not any(all(a < b for a, b in zip(o.values, t.values, strict=True)) for o in trials)
    ]
    assert {one["run"] for one in report["best"]} == {f"q/trial_{n:04d}" for n in better}
    assert trials[0].params != trials[1].params
    before = {p: p.stat().st_mtime_ns for p in run(0).path.rglob("*")}
    assert cli.main(two) == 0
    assert len(study(two).trials) == 2
    assert before == {
        p: p.stat().st_mtime_ns for p in run(0).path.rglob("*") if p.name != ".claim"
    } | {p: t for p, t in before.items() if p.name == ".claim"}
    assert sweep_table(Path("runs/q")).row_count == 2
    with pytest.raises(OtherRunError, match="has another search:\n  directions: "):
        study(arguments("directions=[causal_loss]"))
    with pytest.raises(OtherRunError, match="has another search:\n  space: "):
        study(arguments("directions=[causal_loss,forward_flops]", space=SPACE[:1]))


@pytest.mark.nightly
def test_ranked_trials_have_the_same_settings(arguments, prepared, monkeypatch, capsys):
    one = arguments("trials=1", space=SPACE[:1])
    two = [*one, "trials=2"]
    assert cli.main(one) == 0
    unfinished = study(one).ask().number
    best = Path("runs/q/best.json").read_text()
    changed = ("budget.steps=6", "seed=5", "model.d_model=128", "data.seed=3", "eval.sequences=4")
    assert cli.main([*two, *changed, "log.every=1"]) == 2
    error = capsys.readouterr().err
    for key, _, value in (text.partition("=") for text in changed):
        assert re.search(rf"^  {key}: \S+ in the study, {value} now$", error, re.M), key
    assert error.count(" now\n") == len(changed)
    assert "study= for a new search" in error
    with monkeypatch.context() as patch:
        other = replace(read_summary(prepared), fingerprint="new")
        patch.setattr("modtrain.data.config.read_summary", lambda _: other)
        assert cli.main(two) == 2
    assert re.search(
        r"^  data fingerprint: \w+ in the study, new now$", capsys.readouterr().err, re.M
    )
    assert study(one).trials[unfinished].state == TrialState.RUNNING
    assert Path("runs/q/best.json").read_text() == best
    assert not run(unfinished).path.exists()
    assert cli.main([*two, "eval.every=3", "log.every=1", "batch.micro_batch_size=1"]) == 0
    assert "2 complete; 0 to go" in capsys.readouterr().out


@pytest.mark.slow
def test_a_file_system_without_locks_is_named(arguments, no_locks, capsys):
    assert cli.main(arguments()) == 1
    assert "a file system with flock" in capsys.readouterr().err
    assert [p.name for p in Path("runs/q").iterdir()] == [".search.lock"]


@pytest.mark.slow
def test_a_killed_trial_resumes_with_its_parameters(arguments):
    one = arguments("trials=1", steps=30)
    process = fork_modtrain(one)
    wait_until(lambda: list(run(0).checkpoints.glob("step-*")))
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    (begun,) = study(one).trials
    assert begun.state == TrialState.RUNNING
    assert not run(0).is_complete
    again = fork_modtrain(one)
    again.join(90)
    assert again.exitcode == 0
    (ended,) = study(one).trials
    assert ended.params == begun.params
    assert ended.state == TrialState.COMPLETE
    assert "resumes from step" in (run(0).logs / "job.log").read_text()


def known_trials(arguments, losses):
    """Give the study trials that were better than any to come can be."""
    known = study(arguments)
    for loss in losses:
        trial = known.ask()
        for dimension in parse_space(compose_search(arguments[1:]).config.space)[0]:
            suggest(trial, dimension)
        for step in (2, 4):
            trial.report(loss, step)
        known.tell(trial, loss)


@pytest.mark.nightly
def test_a_trial_that_does_badly_is_pruned_and_keeps_its_directory(arguments, capsys):
    pruned = arguments("trials=6", "pruner=median", steps=6)
    Path("runs/q").mkdir(parents=True)
    known_trials(pruned, [0.1] * 5)
    assert cli.main(pruned) == 0
    trial = study(pruned).trials[5]
    assert trial.state == TrialState.PRUNED
    assert list(trial.intermediate_values) == [2]
    assert run(5).metrics.is_file()
    assert not run(5).is_complete
    assert json.loads(Path("runs/q/best.json").read_text())["trials"]["pruned"] == 1
    assert "trial_0005: pruned" in capsys.readouterr().out


@pytest.mark.nightly
def test_a_failed_trial_counts_and_names_its_error(arguments, capsys):
    bad = arguments("trials=1", space=("space.optimizer.lr=interval(1e29,1e30)",))
    assert cli.main(bad) == 1
    (trial,) = study(bad).trials
    assert trial.state == TrialState.FAIL
    assert "NaN" in trial.user_attrs["why"]
    assert cli.main(bad) == 1
    assert len(study(bad).trials) == 1


def test_a_line_cut_short_by_a_power_cut_is_no_end_of_the_study(tmp_path):
    config = SearchConfig(study="q", space={"a": "interval(0,1)"})
    open_study(tmp_path, config).ask()
    with (tmp_path / "study.journal").open("a") as file:
        file.write('{"op_code": 5, "wor')
    open_study(tmp_path, config).ask()
    assert len(open_study(tmp_path, config).trials) == 2


@pytest.mark.nightly
def test_workers_share_a_study_and_none_makes_too_many(arguments):
    five = arguments("trials=5")
    workers = [fork_modtrain(five) for _ in range(3)]
    for worker in workers:
        worker.join(240)
    assert {worker.exitcode for worker in workers} == {0}
    trials = study(five).trials
    assert [t.state for t in trials] == [TrialState.COMPLETE] * 5
    assert len({t.params["model.capacity"] for t in trials}) == 5
    starts = [json.loads(run(n).manifest.read_text())["starts"] for n in range(5)]
    assert [len(s) for s in starts] == [1] * 5
