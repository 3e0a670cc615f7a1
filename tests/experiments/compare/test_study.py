"""The recorded study: every arm is legal, trains, and is reported before all are complete."""

import json

import pytest

from modtrain.cli import main as cli
from modtrain.cli.compose_verbs import compose_arms
from modtrain.models.transformer import Transformer

STUDY = ["experiment=study"]
# What docs/reports/results.md shows, as it is typed there.
COMMANDS = (
    ".venv/bin/modtrain compare experiment=study",
    ".venv/bin/modtrain compare experiment=study only=[moe]",
    ".venv/bin/modtrain compare experiment=study train=false timed_rounds=0",
)


@pytest.mark.slow
def test_every_arm_is_legal_builds_and_differs_from_the_others():
    comparison = compose_arms(STUDY)
    seen = []
    for name, configs in comparison.arms.items():
        assert [config.seed for config in configs] == [0, 1, 2]
        config = configs[0]
        # The data is not prepared here.
        problems = [p for p in config.problems() if not p.key.startswith("data")]
        assert problems == [], name
        config.model.vocab_size = 64
        Transformer(config.model)
        seen.append((config.model, config.capacity_schedule))
        assert config.budget.flops == comparison.arms["mod"][0].budget.flops
    assert all(seen.count(one) == 1 for one in seen)


@pytest.mark.nightly
def test_the_study_runs_at_a_small_size(prepared, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = [
        *("model=tiny", f"data.path={prepared}", "budget.flops=1e9", "batch.tokens=256"),
        *("batch.micro_batch_size=2", "eval.sequences=4", "strategy.num_threads=1"),
        *("strategy.accelerator=cpu", "seeds=[0, 1]", "model.d_ff=64"),
    ]
    verbs = [command.split()[1:] for command in COMMANDS]
    assert cli.main([*verbs[1], *small]) == 0
    assert cli.main([*verbs[2], *small]) == 0
    assert "moe" in capsys.readouterr().out
    assert cli.main([*verbs[0], *small]) == 0
    report = json.loads((tmp_path / "runs/study/compare.json").read_text())
    assert list(report) == list(compose_arms(STUDY).arms)
    for name, arm in report.items():
        assert len(arm["causal_losses"]) == 2, name
        assert arm["causal_loss"] is not None, name
        assert arm["flops"] == pytest.approx(1e9, rel=0.1), name
