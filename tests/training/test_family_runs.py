"""Whole runs of the family: stopped and resumed, accumulated, recomputed, recorded, evaluated."""

from itertools import pairwise

import pytest
import torch

from modtrain.checkpoint.recovery import latest
from modtrain.cli.compose import compose
from modtrain.inference.config import EvalRunConfig
from modtrain.inference.evaluate.evaluate import evaluate_run
from modtrain.models.depth.pattern import num_chosen
from modtrain.models.flops import training_flops_per_token
from modtrain.training.metrics_log import read_metrics
from modtrain.training.plan import resolve
from modtrain.training.run import train
from modtrain.training.run_directory import RunDirectory
from tests.helpers.marks import slow
from tests.helpers.runs import stopping
from tests.helpers.saved import assert_same_bits, newest_weights

pytestmark = pytest.mark.usefixtures("no_stop_request")

STEPS, SEQ_LEN = 8, 64
EXPERTS = ("model.experts.count=3", "model.experts.dim=16")
DECISIONS = "model.router.causal=[auxiliary,predictor,threshold]"
SCHEDULE = ("capacity_schedule=linear", "capacity_schedule.levels=3")
QUICK = {
    "every decision, schedule": [DECISIONS, *SCHEDULE],
    "token choice, documents": ["model.router.choice=token", "data.document_mask=true"],
    "balance bias, selective": [
        *(*EXPERTS, "model.experts.balance=bias", "model.experts.noop=1"),
        "strategy.activation_checkpointing=selective",
    ],
    "random score, full": [
        *("model.router.score=random", "strategy.activation_checkpointing=full"),
        *(*EXPERTS, "model.experts.choice=expert", "model.pattern=every_other"),
    ],
}
VARIANTS = QUICK | {
    "every decision": [DECISIONS],
    "token choice": ["model.router.choice=token"],
    "balance bias": [*EXPERTS, "model.experts.balance=bias"],
    "limited experts": [*EXPERTS, "model.experts.capacity_factor=0.8"],
    "expert choice": [*EXPERTS, "model.experts.choice=expert", "model.pattern=dense"],
    "random score": ["model.router.score=random"],
    "schedule": [*SCHEDULE],
    "token choice, schedule": ["model.router.choice=token", *SCHEDULE],
    "documents": ["data.document_mask=true"],
    "both parts": ["model.router.target=both", DECISIONS],
    "selective": [DECISIONS, "strategy.activation_checkpointing=selective"],
    "full": [DECISIONS, "strategy.activation_checkpointing=full"],
}


@pytest.fixture(scope="module")
def start(tiny, tmp_path_factory):
    """Train a run of eight steps, each of which is recorded."""
    folder = tmp_path_factory.mktemp("runs")

    def run(name, *more):
        overrides = [
            *(*tiny, f"budget.steps={STEPS}", "log.every=1", "log.tensorboard=false"),
            *("log.progress=false", "checkpoint.every=100", "eval.every=4"),
            *(f"runs_dir={folder}", f"name={name}"),
        ]
        return train(compose("train", [*overrides, *more]))

    return run


@pytest.fixture(scope="module")
def finished(start):
    """Train a run never stopped; what was trained before is not trained again."""
    runs: dict[tuple[str, ...], RunDirectory] = {}

    def run(*more):
        if more not in runs:
            runs[more] = start(f"whole-{len(runs)}", *more).run
        return runs[more]

    return run


def weights(run: RunDirectory) -> dict[str, torch.Tensor]:
    """Parameters and buffers at the run's end."""
    return newest_weights(run.path, STEPS)


def assert_equal_weights(left: RunDirectory, right: RunDirectory) -> None:
    assert_same_bits(weights(left), weights(right))


def records(run: RunDirectory, kind: str = "loss") -> list[dict[str, float]]:
    """What is recorded of training, or with ``held_out/causal_loss`` of evaluations, untimed."""
    return [
        {key: value for key, value in record.items() if not key.startswith("throughput/")}
        for record in read_metrics(run.metrics)
        if kind in record
    ]


@pytest.mark.slow
@pytest.mark.on_commit(
    *("every decision, schedule", "balance bias, selective", "random score, full", "schedule")
)
@pytest.mark.parametrize("name", VARIANTS)
def test_a_stopped_run_ends_bitwise_as_the_one_never_stopped(start, finished, name):
    overrides = VARIANTS[name]
    whole, cut = finished(*overrides), f"cut-{name.replace(' ', '-').replace(',', '')}"
    with stopping(4):
        stopped = start(cut, *overrides)
    assert stopped.status == "stopped"
    assert latest(stopped.run.checkpoints)[0] == 5
    resumed = start(cut, *overrides)
    assert resumed.status == "complete"
    assert_equal_weights(whole, resumed.run)
    for kind in ("loss", "held_out/causal_loss"):
        assert records(whole, kind) == records(resumed.run, kind)
    assert len(records(whole)) == STEPS


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("every decision, schedule", "threshold_sum"),
        ("token choice, documents", "threshold_weight"),
        ("balance bias, selective", "mlp.bias"),
        ("random score, full", "mlp.quantile_sum"),
    ],
)
def test_running_states_move_and_are_saved(finished, name, ending):
    states = {k: v for k, v in weights(finished(*VARIANTS[name])).items() if k.endswith(ending)}
    assert states
    assert all(state.any() for state in states.values())


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("every decision, schedule", "full"),
        slow("every decision, schedule", "selective"),
        slow("token choice, documents", "full"),
        ("token choice, documents", "selective"),
        # These have it already.
        ("balance bias, selective", "none"),
        ("random score, full", "none"),
    ],
)
def test_activation_checkpointing_changes_no_weight(finished, name, mode):
    """No running state moves twice either."""
    plain = finished(*VARIANTS[name])
    again = finished(*VARIANTS[name], f"strategy.activation_checkpointing={mode}")
    assert_equal_weights(plain, again)
    assert records(plain) == records(again)


@pytest.mark.slow
def test_accumulation_changes_neither_the_result_nor_the_capacities(finished):
    overrides = ("model.router.causal=[auxiliary,predictor]", *SCHEDULE)
    small = finished(*overrides, "batch.micro_batch_size=1")
    large = finished(*overrides, "batch.micro_batch_size=4")
    one, two = weights(small), weights(large)
    assert all(torch.allclose(one[name], two[name], atol=2e-4) for name in one)
    for left, right in zip(records(small), records(large), strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-3)
        assert left["flops"] == right["flops"]
        # Of the whole step, not of a micro-batch of it.
        figures = [key for key in left if key.startswith(("router/", "experts/"))]
        assert figures and all(left[key] == pytest.approx(right[key], abs=5e-3) for key in figures)


def test_each_step_has_the_capacities_and_the_flops_of_its_stage(finished):
    run = finished(*VARIANTS["every decision, schedule"])
    config, plan = resolve(run.read_config())
    assert len(plan.stages) == 3
    spent = 0.0
    for step, record in enumerate(records(run)):
        capacities = plan.capacities_at(step)
        per_token = training_flops_per_token(config.model, SEQ_LEN, capacities)
        spent += per_token * plan.tokens_per_step
        assert record["flops"] == pytest.approx(spent)
        assert record["flops"] == plan.flops_until(step + 1)
        for layer in (1, 3):
            share = num_chosen(capacities[layer], SEQ_LEN) / SEQ_LEN
            assert record[f"router/layer_{layer:02d}/chosen"] == share
    flops = [0.0, *(record["flops"] for record in records(run))]
    gains = [two - one for one, two in pairwise(flops)]
    assert gains == sorted(gains, reverse=True)
    assert len(set(gains)) == 3


def test_records_name_each_loss_and_what_routers_did(finished):
    run = finished(DECISIONS, *EXPERTS, "model.experts.noop=1", "model.experts.capacity_factor=0.8")
    for record in records(run):
        for loss in ("predictor_loss", "auxiliary_loss", "balance_loss", "z_loss"):
            assert record[loss] > 0
        for layer in ("01", "03"):
            assert 0 <= record[f"router/layer_{layer}/above_half"] <= 1
        for layer in ("00", "01", "02", "03"):
            name = f"experts/layer_{layer}"
            assert record[f"{name}/load_max"] >= 1
            assert 0 < record[f"{name}/load_entropy"] <= 1
            assert 0 <= record[f"{name}/dropped"] < 1
            assert 0 < record[f"{name}/noop_share"] < 1
    # Dropping is of training, by a capacity that is below an even load.
    assert any(record["experts/layer_00/dropped"] > 0 for record in records(run))


def test_held_out_records_have_each_decision(finished):
    run = finished(*VARIANTS["every decision, schedule"])
    losses = records(run, "held_out/causal_loss")
    assert [record["step"] for record in losses] == [4, 8]
    for record in losses:
        assert record["held_out/causal_loss"] == record["held_out/causal_loss_auxiliary"]
        assert "held_out/top_k_loss (not causal)" in record
        for name in ("auxiliary", "predictor", "threshold"):
            assert record[f"held_out/causal_loss_{name}"] > 0
            assert record[f"held_out/causal_flops_per_token_{name}"] > 0
            for layer in ("01", "03"):
                assert 0 <= record[f"held_out/layer_{layer}/realised_capacity_{name}"] <= 1
                for figure in ("accuracy", "f1", "balanced_accuracy"):
                    assert 0 <= record[f"held_out/layer_{layer}/{name}_{figure}"] <= 1


@pytest.mark.slow
@pytest.mark.on_commit(1)
@pytest.mark.parametrize("name", ["random score", "every decision, schedule"])
def test_looking_changes_nothing_of_the_training(finished, name):
    often = finished(*VARIANTS[name], "eval.every=2")
    never = finished(*VARIANTS[name], "eval.every=null")
    assert_equal_weights(often, never)
    assert records(often) == records(never)
    assert len(records(often, "held_out/causal_loss")) == STEPS // 2


def test_random_scores_are_drawn_anew(finished):
    """Or the tests of random runs would show nothing."""
    run = finished(*VARIANTS["random score"], "eval.every=2")
    assert len({record["router/layer_01/score_mean"] for record in records(run)}) == STEPS


def evaluated(run: RunDirectory, **changes) -> dict:
    own = {"run": run.path.name, "runs_dir": str(run.path.parent)}
    return evaluate_run(EvalRunConfig(**own, sequences=8, accelerator="cpu", **changes))


@pytest.mark.parametrize("name", QUICK)
def test_an_evaluation_afterwards_finds_what_the_run_recorded_last(finished, name):
    run = finished(*VARIANTS[name])
    figures = evaluated(run)
    last = records(run, "held_out/causal_loss")[-1]
    assert last["step"] == STEPS
    assert figures["causal_loss"] == pytest.approx(last["held_out/causal_loss"], rel=1e-6)
    top_k = figures["top_k_not_causal"] or {"loss": None}
    assert top_k["loss"] == last.get("held_out/top_k_loss (not causal)")
    for decision, actual in figures["decisions"].items():
        key = f"held_out/causal_loss_{decision}"
        assert actual["loss"] == pytest.approx(last.get(key, figures["causal_loss"]), rel=1e-6)


def test_an_evaluation_in_the_middle_of_a_schedule_is_at_the_capacities_of_that_step(start):
    run = start(
        "midway", "capacity_schedule=step", "capacity_schedule.end=0.8", "checkpoint.every=4"
    ).run
    figures = {step: evaluated(run, step=step) for step in (4, 8)}
    for record in records(run, "held_out/causal_loss"):
        actual = figures[record["step"]]
        assert actual["top_k_not_causal"]["loss"] == pytest.approx(
            record["held_out/top_k_loss (not causal)"], rel=1e-6
        )
    assert figures[4]["trained_flops"] > 1.2 * figures[8]["trained_flops"]
