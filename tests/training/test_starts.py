"""How a run starts and stops: without a name, for so many epochs, for so long."""

import csv

import pytest

from modtrain.cli.compose import compose
from modtrain.common.errors import ConfigError
from modtrain.data.stream.index_json import read_summary
from modtrain.training.metrics_log import read_metrics
from modtrain.training.plan import resolve
from modtrain.training.run import train


@pytest.fixture
def overrides(tiny, tmp_path):
    kept = [text for text in tiny if not text.startswith("budget.")]
    quiet = ["eval.every=null", "log=csv", "log.progress=false", "log.every=1"]
    return [*kept, *quiet, f"runs_dir={tmp_path}/runs"]


@pytest.mark.slow
@pytest.mark.usefixtures("no_stop_request")
def test_a_run_without_a_name_stops_in_time_and_resumes_by_its_name(overrides, capsys):
    stopped = train(compose("train", [*overrides, "budget.steps=100000", "max_time=1s"]))
    name, output = stopped.run.path.name, capsys.readouterr().out
    assert (stopped.status, stopped.exit_code) == ("stopped", 75)
    assert f"{stopped.run.path} is a new run; to resume it, add name={name}" in output
    assert "stopped by max_time: step " in output
    assert f"is saved; add name={name} to the command to resume" in output
    saved = int(stopped.run.saved_step.read_text())
    again = train(
        compose("train", [*overrides, "budget.steps=100000", "max_time=1s", f"name={name}"])
    )
    assert again.run.path == stopped.run.path
    output = capsys.readouterr().out
    assert f"resumes from step {saved}" in output
    assert "rerun the same command to resume" in output
    steps = [record["step"] for record in read_metrics(again.run.metrics)]
    assert steps == list(range(1, int(again.run.saved_step.read_text()) + 1))
    with again.run.metrics_csv.open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == steps


def test_epochs_are_the_tokens_of_the_prepared_data(overrides, prepared):
    config = compose("train", [*overrides, "budget.epochs=1.5"])
    resolved, plan = resolve(config)
    available = read_summary(prepared).splits["train"].num_sequences * 64
    assert abs(plan.tokens - 1.5 * available) <= plan.tokens_per_step / 2
    assert (resolved.budget.epochs, resolved.budget.tokens) == (None, plan.tokens)
    # Shorter samples are more, of the same tokens.
    halved = compose("train", [*overrides, "budget.epochs=1.5", "data.seq_len=32"])
    assert resolve(halved)[1].tokens == plan.tokens
    # What a run records resumes it.
    stated = compose("train", [*overrides, f"budget.tokens={resolved.budget.tokens}"])
    assert resolve(stated)[0] == resolved


@pytest.mark.parametrize(
    ("added", "words"),
    [
        (["budget.epochs=1", "budget.steps=5"], ["2 are given", "budget.epochs"]),
        (["budget.epochs=0.001"], ["budget.epochs=0.001", "less than one step"]),
        (["budget.epochs=-1"], ["budget.epochs=-1"]),
        (["budget.steps=1", "max_time=30"], ["max_time=30", "write 30s, or 30m"]),
    ],
)
def test_impossible_budgets_and_times_have_a_remedy(overrides, added, words):
    with pytest.raises(ConfigError) as error:
        resolve(compose("train", [*overrides, *added]))
    assert all(word in str(error.value) for word in words)


def test_epochs_of_a_mixture_are_refused(overrides, prepared):
    entry = f"{{path: {prepared}}}"
    sources = ["data=mixture", f"data.sources={{a: {entry}, b: {entry}}}"]
    kept = [text for text in overrides if not text.startswith("data.path")]
    with pytest.raises(ConfigError, match=r"epochs(.|\n)*mixture(.|\n)*max_epochs"):
        resolve(compose("train", [*kept, *sources, "budget.epochs=1"]))


def test_epochs_need_the_prepared_data_for_a_plan_too(overrides):
    more = ["budget.epochs=1", "data.path=nowhere", "data.seq_len=64", "model.vocab_size=300"]
    with pytest.raises(ConfigError, match=r"budget.epochs=1.*none in nowhere(.|\n)*budget.tokens"):
        resolve(compose("plan", [*overrides, *more]), needs_data=False)
