"""`modtrain eval` of a trained run: figures against a slow loop, files, TensorBoard, the sweep."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from modtrain.cli.compose import compose
from modtrain.common.errors import ConfigError
from modtrain.data.stream.datamodule import TokenDataModule
from modtrain.inference.calibration import budget_of_run, training_text
from modtrain.inference.config import ComputeBudgetConfig, EvalRunConfig
from modtrain.inference.evaluate import evaluate
from modtrain.inference.evaluate.evaluate import evaluate_run
from modtrain.inference.evaluate.reporting import show
from modtrain.inference.loading import load_run
from modtrain.models.flops import Load, dense_equivalent_flops, realised_flops
from modtrain.models.transformer import Transformer
from tests.helpers.thresholds import require_margin

EVERY = ["predictor", "auxiliary", "threshold"]
HEAD = ["run", "step", "tokens", "budget", "trained_flops", "dense_equivalent_flops"]
WAY = ["loss", "perplexity", "bits_per_byte", "flops", "realised_capacity", "expert_load"]
AGAINST = ["gap_to_top_k_not_causal", "agreement_with_top_k_not_causal"]
SWEPT = [0.5, 0.03, 0.2, 1.0]


@pytest.fixture(scope="module")
def routed(start):
    """A run whose routers want some tokens and not others, by every decision."""
    return start(
        "routed",
        "budget.steps=6",
        "model.capacity=0.25",
        f"model.router.causal=[{','.join(EVERY)}]",
    )


def request(run, **changes) -> EvalRunConfig:
    values = {"sequences": 6, "batch_size": 4, "accelerator": "cpu"}
    return EvalRunConfig(run=run.path.name, runs_dir=str(run.path.parent), **(values | changes))


def flat(node, prefix="") -> dict:
    if not isinstance(node, dict) or not node:
        return {prefix: node}
    values = {}
    for key, value in node.items():
        values |= flat(value, f"{prefix}/{key}" if prefix else key)
    return values


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def slowly(loaded, selection, budget, sequences=6):
    """Loss, executed FLOPs a token and shares, a sequence and a token at a time."""
    config, shares = loaded.trained.model, []
    loss = flops = 0.0
    for batch in loaded.held_out(sequences, 1):
        inputs, targets = batch.inputs_BS, batch.targets_BS[0]
        output = loaded.model(inputs, selection=selection, budget=budget)
        # In float32, and the batches of the evaluation are larger.
        require_margin(loaded.model, output, selection, budget, least=1e-6)
        for logits, target in zip(output.logits_BSV[0].double(), targets, strict=True):
            loss -= float(logits[target] - logits.exp().sum().log())
        counts = [int(record.chosen_BS.sum()) for record in output.routing]
        shares.append([count / len(targets) for count in counts])
        routed = dict(zip((layer for layer, _ in config.routed_parts), counts, strict=True))
        took = [routed.get(layer, len(targets)) for layer in range(config.num_layers)]
        loads = [Load(count, count**2, count) for count in took]
        flops += realised_flops(config, len(targets), loads, selection).total
    tokens = sequences * len(targets)
    means = [sum(column) / sequences for column in zip(*shares, strict=True)]
    return loss / tokens, flops / tokens, means


@pytest.mark.parametrize(
    "settings",
    [{}, {"capacity": 0.4}, {"shift": -0.05, "layer_cap": 0.5}, {"step_cap": 1, "capacity": 0.8}],
    ids=str,
)
def test_figures_are_those_of_a_slow_loop(routed, settings):
    settings = ComputeBudgetConfig(calibration_sequences=8, **settings)
    figures = evaluate_run(request(routed, inference=settings))
    loaded = load_run(request(routed))
    valid = loaded.data.summary().splits["valid"]
    assert list(figures["decisions"]) == EVERY
    ways = {**figures["decisions"], "top_k": figures["top_k_not_causal"]}
    with torch.no_grad():
        for name, actual in ways.items():
            budget = None if name == "top_k" else budget_of_run(loaded, name, settings, 4)
            loss, flops, shares = slowly(loaded, name, budget)
            assert actual["loss"] == pytest.approx(loss, rel=1e-5)
            assert actual["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
            bits = loss / math.log(2) * valid.num_tokens / valid.num_bytes
            assert actual["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
            assert actual["flops"] == pytest.approx(flops, rel=1e-4)
            assert list(actual["realised_capacity"].values()) == pytest.approx(shares, abs=1e-9)
    top_k = figures["top_k_not_causal"]
    for actual in figures["decisions"].values():
        assert actual["gap_to_top_k_not_causal"] == actual["loss"] - top_k["loss"]
    first = figures["decisions"]["predictor"]
    short = {"causal_loss": "loss", "causal_flops": "flops"}
    for key in ("causal_loss", "causal_flops", "perplexity", "bits_per_byte"):
        assert figures[key] == first[short.get(key, key)]
    equivalent = dense_equivalent_flops(loaded.trained.model, 64).total / 64
    assert figures["dense_equivalent_flops"] == equivalent


def test_the_file_has_the_documented_keys_and_a_budget_another_file(routed):
    plain = evaluate_run(request(routed))
    path = routed.path / "eval-000000006.json"
    before = path.read_bytes()
    assert json.loads(before) == plain
    assert set(plain) == {
        *(*HEAD, "causal_loss", "causal_flops", "perplexity", "bits_per_byte"),
        *("decisions", "top_k_not_causal"),
    }
    assert plain["budget"] is None
    assert set(plain["top_k_not_causal"]) == set(WAY)
    for figures in plain["decisions"].values():
        assert set(figures) == {*WAY, *AGAINST}
        for scores in figures["agreement_with_top_k_not_causal"].values():
            assert set(scores) == {"accuracy", "f1", "balanced_accuracy"}
    settings = ComputeBudgetConfig(
        decision="threshold", capacity=0.4, layer_cap=0.9, calibration_sequences=4
    )
    moved = evaluate_run(request(routed, inference=settings))
    named = routed.path / "eval-000000006-threshold-capacity_0.4-layer_cap_0.9.json"
    assert json.loads(named.read_text()) == moved
    assert moved["budget"] == {"capacity": 0.4, "layer_cap": 0.9, "calibration_sequences": 4}
    assert list(moved["decisions"]) == ["threshold"]
    assert moved["decisions"]["threshold"] != plain["decisions"]["threshold"]
    assert moved["top_k_not_causal"] == plain["top_k_not_causal"]
    assert path.read_bytes() == before
    assert set(scalars(routed.tensorboard / named.stem.replace("-000000006", ""))) < set(
        scalars(routed.tensorboard / "eval")
    )


def test_the_file_of_a_model_that_has_diverged_is_json(routed, tmp_path, monkeypatch):
    measure = evaluate._held_out

    def diverged(*arguments):
        held_out = measure(*arguments)
        losses = (math.nan, 1e4, 2.0)
        decisions = {
            name: replace(decision, loss=loss)
            for (name, decision), loss in zip(held_out.decisions.items(), losses, strict=True)
        }
        return replace(held_out, decisions=decisions)

    monkeypatch.setattr(evaluate, "_held_out", diverged)
    evaluate_run(request(routed, output=str(tmp_path)))
    stored = json.loads((tmp_path / "eval-000000006.json").read_text(), parse_constant=pytest.fail)
    ways = stored["decisions"].values()
    assert stored["causal_loss"] is None
    assert [way["loss"] for way in ways] == [None, 1e4, 2.0]
    assert [way["perplexity"] for way in ways] == [None, None, math.exp(2)]


def test_the_agreement_of_a_moved_decision_is_that_of_the_moved_level(routed):
    everybody = evaluate_run(request(routed, inference=ComputeBudgetConfig(capacity=1.0)))
    for decision in everybody["decisions"].values():
        assert set(decision["realised_capacity"].values()) == {1.0}
        for scores in decision["agreement_with_top_k_not_causal"].values():
            assert scores["accuracy"] == pytest.approx(0.25)
            assert scores["balanced_accuracy"] == 0.5


def test_what_is_not_causal_is_labelled_so(routed, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    figures = evaluate_run(request(routed, inference=ComputeBudgetConfig(capacity=0.5)))
    show(figures)
    lines = [line for line in capsys.readouterr().out.splitlines() if "top-k" in line.lower()]
    assert len(lines) == 7
    assert all("top-k loss, not causal" in line or "top-k, not causal" in line for line in lines)
    tags = scalars(routed.tensorboard / "eval-capacity_0.5")
    # Keys of the figures with a file, tags with TensorBoard.
    for names in (flat(figures), tags):
        about = [name for name in names if "top" in name.lower()]
        assert about
        for name in about:
            assert "not causal" in name or "not_causal" in name
    agreements = [tag for tag in tags if "accuracy" in tag or "/f1" in tag]
    assert len(agreements) == len(EVERY) * 2 * 3
    assert all("against top-k, not causal" in tag for tag in agreements)


def test_the_table_shows_the_budget(routed, capsys):
    show(evaluate_run(request(routed, inference=ComputeBudgetConfig(shift=0.5, step_cap=1))))
    first, _ = capsys.readouterr().out.split("\n", 1)
    assert first == "held-out text, step 6, 384 tokens, shift=0.5, step_cap=1"
    show(evaluate_run(request(routed)))
    first, _ = capsys.readouterr().out.split("\n", 1)
    assert first == "held-out text, step 6, 384 tokens"


def test_tensorboard_has_the_figures_at_the_checkpoints_step_once(routed):
    for _ in range(2):
        figures = evaluate_run(request(routed))
    assert len(list((routed.tensorboard / "eval").iterdir())) == 1
    events = scalars(routed.tensorboard / "eval")
    assert {step for points in events.values() for step, _ in points} == {6}
    assert {len(points) for points in events.values()} == {1}
    ways = {**figures["decisions"], "top-k, not causal": figures["top_k_not_causal"]}
    expected = {}
    for name, way in ways.items():
        expected |= {f"validation/eval/{name}/{key}": way[key] for key in WAY[:3]}
        expected[f"validation/eval/{name}/flops_per_token"] = way["flops"]
        expected |= flat(way["realised_capacity"], f"validation/eval/{name}/@")
        if name in EVERY:
            expected[f"validation/eval/{name}/gap to top-k, not causal"] = way[AGAINST[0]]
            for label, scores in way[AGAINST[1]].items():
                for key, value in scores.items():
                    tag = f"validation/eval/{name}/{label}/{key} against top-k, not causal"
                    expected[tag] = value
    expected = {
        key.replace("@/", "") + ("/realised_capacity" if "@" in key else ""): value
        for key, value in expected.items()
    }
    assert {tag: points[0][1] for tag, points in events.items()} == pytest.approx(
        expected, rel=1e-6
    )


def test_calibration_reads_what_the_run_was_trained_on_first(routed):
    loaded = load_run(request(routed))
    data = TokenDataModule(
        loaded.trained.data, micro_batch_size=2, accumulate=1, num_steps=3, eval_batch_size=1
    )
    first = torch.cat([batch.inputs_BS for batch in data.train_dataloader()])
    batches = training_text(loaded, 6, 4)
    assert [len(batch.inputs_BS) for batch in batches] == [4, 2]
    assert torch.equal(torch.cat([batch.inputs_BS for batch in batches]), first)
    held_out = {tuple(row) for b in loaded.held_out(None, 8) for row in b.inputs_BS.tolist()}
    assert not held_out & {tuple(row.tolist()) for row in first}
    # No more than there is, each once.
    every = torch.cat([batch.targets_BS for batch in training_text(loaded, 10**6, 512)])
    assert len(every) == len(data.train_data) == len(every.unique(dim=0))


@pytest.fixture(scope="module")
def swept(routed):
    settings = ComputeBudgetConfig(calibration_sequences=8)
    return evaluate_run(request(routed, sweep=SWEPT, inference=settings))


def test_a_sweep_has_a_point_a_capacity_that_is_the_evaluation_there(routed, swept):
    assert set(swept) == {*HEAD, "decision", "points", "as_trained"}
    assert swept["decision"] == "predictor"
    assert swept["budget"] == {"calibration_sequences": 8}
    assert [point["capacity"] for point in swept["points"]] == sorted(SWEPT)
    for point in swept["points"]:
        assert set(point) == {"capacity", *WAY}
    flops = [point["flops"] for point in swept["points"]]
    assert all(below < above for below, above in pairwise(flops))
    for chosen, at in ((0.2, swept["points"][1]), (None, swept["as_trained"])):
        settings = ComputeBudgetConfig(
            capacity=chosen, decision="predictor", calibration_sequences=8
        )
        alone = evaluate_run(request(routed, inference=settings))["decisions"]["predictor"]
        assert {key: at[key] for key in WAY} == {key: alone[key] for key in WAY}


def test_a_sweep_is_written_drawn_and_recorded(routed, swept, capsys, monkeypatch):
    assert json.loads((routed.path / "sweep-000000006.json").read_text()) == swept
    assert (routed.path / "sweep-000000006.png").read_bytes().startswith(b"\x89PNG")
    events = scalars(routed.tensorboard / "sweep-000000006")
    assert len(events) == 6
    for key in ("loss", "perplexity", "bits_per_byte"):
        curve = events[f"validation/eval/sweep/{key} by kFLOPs a token"]
        steps = [round(point["flops"] / 1000) for point in swept["points"]]
        assert [step for step, _ in curve] == steps
        values = [point[key] for point in swept["points"]]
        assert [value for _, value in curve] == pytest.approx(values)
        ((step, value),) = events[f"validation/eval/sweep/{key} as trained by kFLOPs a token"]
        assert step == round(swept["as_trained"]["flops"] / 1000)
        assert value == pytest.approx(swept["as_trained"][key])
    monkeypatch.setenv("COLUMNS", "200")
    show(swept)
    shown = capsys.readouterr().out
    for text in ("sweep of predictor, causal", "calibration_sequences=8", "0.03", "as trained"):
        assert text in shown
    share = swept["points"][0]["flops"] / swept["dense_equivalent_flops"]
    assert f"{share:.3f}" in shown


def test_a_sweep_under_caps_or_of_another_decision_has_a_file_of_its_own(routed):
    settings = ComputeBudgetConfig(decision="auxiliary", layer_cap=0.5, calibration_sequences=4)
    figures = evaluate_run(request(routed, sweep=[1.0], inference=settings))
    name = "sweep-000000006-auxiliary-layer_cap_0.5"
    assert json.loads((routed.path / f"{name}.json").read_text()) == figures
    assert figures["decision"] == "auxiliary"
    assert set(figures["points"][0]["realised_capacity"].values()) == {0.5}


def test_a_sweep_makes_no_needless_pass(routed, monkeypatch):
    seen, forward = [], Transformer.forward

    def counted(model, *arguments, **named):
        seen.append(arguments[2])
        return forward(model, *arguments, **named)

    monkeypatch.setattr(Transformer, "forward", counted)
    settings = ComputeBudgetConfig(decision="threshold", calibration_sequences=8)
    evaluate_run(request(routed, sweep=[1.0], inference=settings))
    # Two batches of held-out text for the point and for the model as trained.
    assert seen == ["threshold"] * 4
    evaluate_run(request(routed, sweep=[0.4, 0.6, 1.0], inference=settings))
    # Two of training text for both shares, and once more for each.
    assert seen[4:] == ["threshold"] * (8 + 2 + 4)


def test_a_model_without_routers_is_evaluated_but_not_moved(dense, capsys):
    figures = evaluate_run(request(dense))
    assert figures["top_k_not_causal"] is None
    assert figures["decisions"]["causal"]["gap_to_top_k_not_causal"] is None
    assert figures["causal_flops"] == figures["trained_flops"] == figures["dense_equivalent_flops"]
    show(figures)
    assert "top-k" not in capsys.readouterr().out
    for changes, key in (
        ({"sweep": [0.5]}, "sweep"),
        ({"inference": ComputeBudgetConfig(capacity=0.5)}, "inference.capacity"),
        ({"inference": ComputeBudgetConfig(step_cap=1)}, "inference.step_cap"),
    ):
        with pytest.raises(ConfigError, match="the model has none") as error:
            evaluate_run(request(dense, **changes))
        assert [problem.key for problem in error.value.problems] == [key]


def test_expert_choice_looks_ahead_and_its_loads_are_printed(start, capsys):
    experts = ["model.experts.count=3", "model.experts.dim=16", "model.experts.choice=expert"]
    run = start("experts", "budget.steps=1", "model.pattern=dense", *experts)
    figures = evaluate_run(request(run))
    causal, top_k = figures["decisions"]["causal"], figures["top_k_not_causal"]
    assert causal["gap_to_top_k_not_causal"] == causal["loss"] - top_k["loss"] != 0
    assert causal["agreement_with_top_k_not_causal"] == causal["realised_capacity"] == {}
    for way in (causal, top_k):
        assert [sum(shares) for shares in way["expert_load"].values()] == pytest.approx([1.0] * 4)
    assert top_k["expert_load"]["layer_00"] == pytest.approx([1 / 3] * 3)
    show(figures)
    shown = capsys.readouterr().out
    assert "no-op experts last (causal)" in shown
    assert "no-op experts last (top-k, not causal)" in shown


def test_without_a_causal_decision_top_k_alone_is_printed_and_nothing_is_swept(start, capsys):
    run = start("none", "budget.steps=1", "model.router.causal=[]")
    figures = evaluate_run(request(run))
    assert figures["causal_loss"] is figures["perplexity"] is None
    assert (figures["decisions"], figures["top_k_not_causal"]["loss"] > 0) == ({}, True)
    show(figures)
    assert "none: trained without router.causal" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="trained without"):
        evaluate_run(request(run, sweep=[0.5]))


@pytest.mark.parametrize(
    ("sweep", "settings", "keys"),
    [
        ([0.5, 1.0], {}, []),
        ([], {}, ["sweep"]),
        ([0.5, 0.0, 1.5], {}, ["sweep", "sweep"]),
        ([0.5, 0.5], {}, ["sweep"]),
        ([0.5], {"capacity": 0.5}, ["inference.capacity"]),
        ([0.5], {"shift": 0.5}, ["inference.shift"]),
    ],
)
def test_every_mistake_in_a_sweep_is_reported(sweep, settings, keys):
    problems = EvalRunConfig(
        run="a", sweep=sweep, inference=ComputeBudgetConfig(**settings)
    ).problems()
    assert [problem.key for problem in problems] == keys


def test_the_command_line_has_the_budget_and_the_sweep():
    config = compose("eval", ["run=a", "sweep=[0.03, 1]", "inference.step_cap=0"])
    assert (config.sweep, config.inference) == ([0.03, 1.0], ComputeBudgetConfig(step_cap=0))
    assert config.problems() == []


def test_swaps_measure_what_the_routers_are_worth(routed, capsys):
    figures = evaluate_run(request(routed, swap=True, inference=ComputeBudgetConfig("auxiliary")))
    worth = figures["router_worth"]
    assert (worth["decision"], worth["sequences"]) == ("auxiliary", 6)
    assert worth["loss"] == pytest.approx(figures["causal_loss"])
    rows = {(row["choice"], row["gate"], row["router"]): row for row in worth["swaps"]}
    choices = ("zero", "random", "even", "lowest", "shuffled", "predictor", "update_norm")
    own = {choice for choice, gate, router in rows if (gate, router) == ("own", "all")}
    assert own == set(choices)
    assert ("zero", "own", "layer_03") in rows
    for row in rows.values():
        assert row["change"] == pytest.approx(row["loss"] / worth["loss"] - 1)
    show(figures)
    shown = capsys.readouterr().out
    assert "what the routers are worth: auxiliary, 6 sequences" in shown
    assert "Without the routed updates the loss changes by" in shown


def test_swaps_need_routers_and_the_capacity_as_trained(dense, routed):
    with pytest.raises(ConfigError, match="swap=True: needs a model with routers"):
        evaluate_run(request(dense, swap=True))
    moved = ComputeBudgetConfig(capacity=0.5)
    with pytest.raises(ConfigError, match=r"inference\.capacity=0\.5: cannot be combined"):
        evaluate_run(request(routed, swap=True, inference=moved))
