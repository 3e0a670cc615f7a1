import json

import pytest

from modtrain.configuration import compose_arms
from modtrain.errors import ConfigError
from modtrain.experiments.compare import compare, verdict
from modtrain.training.run_directory import RunDirectory


def arm(loss, flops=100.0, seconds=1.0):
    return {
        "causal_loss": loss,
        "forward_flops_per_token": flops,
        "micro_batch_seconds": seconds,
    }


@pytest.mark.parametrize(
    ("loss", "said"),
    [(1.9, "beats dense at this size: causal loss -5.00%"), (2.1, "loses to dense"), (2, "equals")],
)
def test_the_verdict_says_who_is_ahead_for_better_or_worse(loss, said):
    (line,) = verdict({"dense": arm(2.0), "mod": arm(loss, flops=60.0, seconds=0.7)})
    assert said in line
    assert "0.600 of its forward FLOPs and 0.700 of its step time" in line


def test_without_a_causal_loss_there_is_no_verdict():
    (line,) = verdict({"dense": arm(2.0), "mod": arm(None)})
    assert "cannot be compared" in line


def overrides(tiny, tmp_path):
    budget = [o for o in tiny if not o.startswith("budget")]
    arms = '+arms={whole: ["model.pattern=dense"], routed: ["model.capacity=0.25"]}'
    return [*budget, "budget.flops=2e9", f"runs_dir={tmp_path}", "name=pair", arms]


def test_arms_spend_the_same_flops_and_the_report_stands_once(tiny, tmp_path, capsys):
    directory, arms, _ = compose_arms(overrides(tiny, tmp_path))
    assert compare(directory, arms, rounds=1) == 0
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
    assert compare(directory, arms, rounds=1) == 0
    assert "is complete: nothing was trained" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in directory.rglob("*") if p.is_file()}
    assert RunDirectory(directory / "routed").is_complete


def test_a_report_is_made_anew_when_its_arms_change_and_needs_no_causal_loss(
    tiny, tmp_path, capsys
):
    short = [o for o in overrides(tiny, tmp_path) if "arms" not in o]
    both = '+arms={a: ["model.pattern=dense"], b: ["model.router.causal=[]"]}'
    turned = '+arms={b: ["model.router.causal=[]"], a: ["model.pattern=dense"]}'
    for arms in (both, turned):
        directory, configs, _ = compose_arms([*short, arms])
        assert compare(directory, configs, rounds=1) == 0
        assert "cannot be compared" in capsys.readouterr().out
        assert list(json.loads((directory / "compare.json").read_text())) == list(configs)


def test_a_mistake_in_an_arm_names_the_arm(tiny, tmp_path):
    arms = '+arms={a: ["model.capacity=many"], b: ["optimizer=adam"]}'
    with pytest.raises(ConfigError) as error:
        compose_arms([*tiny, f"runs_dir={tmp_path}", arms])
    assert {p.key for p in error.value.problems} == {"a: model.capacity", "b: optimizer"}


def test_one_arm_is_no_comparison(tiny):
    with pytest.raises(ConfigError, match="at least two arms"):
        compose_arms(list(tiny))
