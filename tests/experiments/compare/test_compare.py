import json

import pytest

from modtrain.cli.compose_verbs import compose_arms
from modtrain.common.errors import ConfigError, DataError, TrainingError
from modtrain.experiments.compare.compare import compare
from modtrain.experiments.compare.verdict import verdict
from modtrain.training.run_directory import RunDirectory
from tests.helpers.problems import problems_of

MARGIN = 0.005


def arm(loss, flops=100.0, seconds=1.0, by_seed=None):
    return {
        "causal_loss": loss,
        "causal_losses": by_seed or {"0": loss},
        "forward_flops_per_token": flops,
        "micro_batch_seconds": seconds,
    }


@pytest.mark.parametrize(
    ("loss", "text"),
    [(1.9, "beats dense at this size: causal loss -5.00%"), (2.1, "loses to dense"), (2, "equals")],
)
def test_the_verdict_names_the_better_arm(loss, text):
    (line,) = verdict({"dense": arm(2.0), "mod": arm(loss, flops=60.0, seconds=0.7)}, MARGIN)
    assert text in line
    assert "0.600 of its forward FLOPs and 0.700 of its step time" in line


def test_without_a_causal_loss_there_is_no_verdict():
    (line,) = verdict({"dense": arm(2.0), "mod": arm(None)}, MARGIN)
    assert "cannot be compared" in line


def test_a_routed_arm_is_compared_with_its_control_and_the_best_dense_arm():
    report = {
        name: arm(loss) | {"is_routed": False, "control": None}
        for name, loss in (("deep", 2.0), ("mod", 1.9), ("mod_unrouted", 1.85), ("wide", 1.8))
    }
    report["mod"] |= {"is_routed": True, "control": "mod_unrouted"}
    lines = verdict(report, MARGIN)
    assert [line.split(" at this size")[0] for line in lines] == [
        "mod beats deep",
        "mod_unrouted beats deep",
        "wide beats deep",
        "mod loses to mod_unrouted, the dense model of its unrouted layers,",
        "mod loses to wide",
    ]


ARMS = "+arms={%s}"


def names_of(*arms, changes=()):
    """The arms of a comparison of the tiny model, and the control of each routed one."""
    comparison = compose_arms(["model=tiny", "budget.steps=1", ARMS % ", ".join(arms), *changes])
    return list(comparison.arms), comparison.controls


def test_arms_with_the_same_unrouted_layers_share_a_control():
    arms, controls = names_of(
        'a: ["model.pattern=dense"]',
        'b: ["model.capacity=0.25", "capacity_schedule=cosine"]',
        'c: ["model.router.gate=sigmoid"]',
        'd: ["model.pattern=every"]',
        'e: ["optimizer.lr=0.1"]',
    )
    assert arms == ["a", "b", "b_unrouted", "c", "d", "e", "e_unrouted"]
    assert controls == {"b": "b_unrouted", "c": "b_unrouted", "e": "e_unrouted"}


def test_an_arm_that_is_the_control_already_is_used():
    dense = 'half: ["model.pattern=dense", "model.num_layers=2", "model.router.gate=none"]'
    arms, controls = names_of('mod: ["model.num_layers=4"]', dense)
    assert (arms, controls) == (["mod", "half"], {"mod": "half"})


@pytest.mark.slow
def test_a_control_can_be_left_out_or_trained_alone():
    arms = ("a: []", 'b: ["model.pattern=dense"]')
    assert names_of(*arms, changes=["controls=false"]) == (["a", "b"], {})
    assert names_of(*arms, changes=["only=[a_unrouted]"])[0] == ["a_unrouted"]
    for only, name in (("b_unrouted", "b"), ("c_unrouted", "c")):
        with pytest.raises(ConfigError, match=f"only={name}_unrouted: is not an arm"):
            names_of(*arms, changes=[f"only=[{only}]"])


def test_another_arm_may_not_have_the_name_of_a_control():
    with pytest.raises(ConfigError, match="arms=a_unrouted: is the name of the control of a"):
        names_of("a: []", 'a_unrouted: ["model.pattern=every"]')


def overrides(tiny, tmp_path):
    budget = [o for o in tiny if not o.startswith("budget")]
    arms = '+arms={whole: ["model.pattern=dense"], routed: ["model.capacity=0.25"]}'
    return [*budget, "budget.flops=2e9", f"runs_dir={tmp_path}", "name=pair", arms]


@pytest.mark.slow
def test_arms_spend_the_same_flops_and_the_report_is_written_once(tiny, tmp_path, capsys):
    comparison = compose_arms([*overrides(tiny, tmp_path), "timed_rounds=1"])
    directory = comparison.directory
    assert compare(comparison) == 0
    report = json.loads((directory / "compare.json").read_text())
    whole, routed = report["whole"], report["routed"]
    assert whole["flops"] == pytest.approx(routed["flops"], rel=0.05)
    assert whole["steps"] < routed["steps"]
    assert whole["top_k_loss_not_causal"] is None
    assert routed["forward_flops_per_token"] < whole["forward_flops_per_token"]
    assert (directory / "loss_over_flops.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out.splitlines()
    assert shown[-2] == f"picture: {directory / 'loss_over_flops.png'}"
    assert shown[-1].endswith(f"tensorboard --logdir {directory}")

    before = {p: p.stat().st_mtime_ns for p in directory.rglob("*") if p.is_file()}
    assert compare(comparison) == 0
    assert "is complete: nothing was trained" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in directory.rglob("*") if p.is_file()}
    assert RunDirectory(directory / "routed").is_complete

    named = compose_arms([f"runs_dir={tmp_path}", "name=pair"])
    assert compare(named) == 0
    again = capsys.readouterr().out
    assert all(text in again for text in ("whole", "routed", "loss_over_flops.png"))
    (directory / "compare.json").write_text('{"whole": 3}')
    with pytest.raises(DataError, match="is damaged"):
        compare(named)
    for more in ("budget.flops=1e9", "name=other"):
        with pytest.raises(ConfigError, match="at least two arms"):
            compose_arms([f"runs_dir={tmp_path}", "name=pair", more])


@pytest.mark.slow
def test_a_report_is_rewritten_when_its_arms_change(tiny, tmp_path, capsys):
    short = [o for o in overrides(tiny, tmp_path) if "arms" not in o]
    both = '+arms={a: ["model.pattern=dense"], b: ["model.router.causal=[]"]}'
    turned = '+arms={b: ["model.router.causal=[]"], a: ["model.pattern=dense"]}'
    for arms in (both, turned):
        comparison = compose_arms([*short, arms, "timed_rounds=0"])
        assert compare(comparison) == 0
        assert "cannot be compared" in capsys.readouterr().out
        report = json.loads((comparison.directory / "compare.json").read_text())
        assert list(report) == list(comparison.arms)


@pytest.mark.slow
def test_a_mistake_in_an_arm_names_the_arm(tiny, tmp_path):
    arms = '+arms={a: ["model.capacity=many"], b: ["optimizer=adam"]}'
    problems = problems_of(compose_arms, [*tiny, f"runs_dir={tmp_path}", arms])
    assert problems.keys() == {"a: model.capacity", "b: optimizer"}


def test_one_arm_is_no_comparison(tiny):
    with pytest.raises(ConfigError, match="at least two arms"):
        compose_arms(list(tiny))


def test_a_difference_smaller_than_the_spread_of_the_seeds_has_no_winner():
    base = arm(2.0, by_seed={"0": 1.9, "1": 2.0, "2": 2.1})
    noisy = arm(1.99, by_seed={"0": 2.0, "1": 1.9, "2": 2.07})
    steady = arm(1.95, by_seed={"0": 1.851, "1": 1.95, "2": 2.049})
    text = verdict({"base": base, "noisy": noisy, "steady": steady}, MARGIN)
    assert text[0].startswith("noisy does not differ significantly from base")
    assert text[1].startswith("steady beats base")
    assert "at 95%, 3 seeds; not shown to be equivalent within ±0.50%" in text[1]


@pytest.mark.nightly
def test_seeds_are_runs_of_their_own_and_a_row_can_be_trained_alone(tiny, tmp_path, capsys):
    shared = [*overrides(tiny, tmp_path), "seeds=[3, 5]", "timed_rounds=0"]
    with pytest.raises(TrainingError, match="no run"):
        compare(compose_arms([*shared, "train=false"]))
    assert compare(compose_arms([*shared, "only=[routed]"])) == 0
    assert "causal loss" in capsys.readouterr().out
    directory = tmp_path / "pair"
    assert not (directory / "compare.json").exists()
    assert not (directory / "whole").exists()
    assert RunDirectory(directory / "routed/seed_5").is_complete

    assert compare(compose_arms(shared)) == 0
    report = json.loads((directory / "compare.json").read_text())
    for name in ("whole", "routed"):
        losses = report[name]["causal_losses"]
        assert set(losses) == {"3", "5"}
        assert losses["3"] != losses["5"]
        assert report[name]["causal_loss"] == pytest.approx(sum(losses.values()) / 2)
        configs = [RunDirectory(directory / name / f"seed_{s}").read_config() for s in (3, 5)]
        assert [(c.seed, c.data.seed) for c in configs] == [(3, 3), (5, 5)]


def test_a_missing_arm_and_a_repeated_seed_are_reported(tiny, tmp_path):
    words = [*overrides(tiny, tmp_path), "only=[route]", "seeds=[1, 1]"]
    assert problems_of(compose_arms, words).keys() == {"only", "seeds"}


@pytest.mark.nightly
def test_a_report_of_other_seeds_is_not_shown_as_this_one(tiny, tmp_path):
    shared = [*overrides(tiny, tmp_path), "timed_rounds=0"]
    path = tmp_path / "pair/compare.json"
    for seed in (0, 1, 0):
        assert compare(compose_arms([*shared, f"seeds=[{seed}]"])) == 0
        assert set(json.loads(path.read_text())["whole"]["causal_losses"]) == {str(seed)}
    # A row that is trained anew makes the report old.
    compare(compose_arms([*shared, "seeds=[2]", "only=[routed]"]))
    assert not path.exists()


def test_several_processes_are_refused(tiny, tmp_path, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 were started"):
        compare(compose_arms(overrides(tiny, tmp_path)))
