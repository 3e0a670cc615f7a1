"""Every shipped configuration composes, builds, steps, and costs as in its name and formula."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from modtrain.cli.compose import compose, conf_dir
from modtrain.cli.compose_verbs import compose_arms, compose_isoflop
from modtrain.experiments.isoflop.grid import make_grid
from modtrain.experiments.isoflop.grid_report import warnings_of
from modtrain.models.flops import forward_flops, parameters, realised_flops, training_load
from modtrain.models.transformer import Transformer

MODELS = sorted(path.stem for path in (conf_dir() / "model").glob("*.yaml"))
LENGTH = 256
PAPER_SIZES = {"60m": 60e6, "220m": 220e6, "1b": 1e9, "3b": 3e9}


def composed(*overrides):
    config = compose("train", ["name=x", "budget.steps=1", "data.seq_len=256", *overrides])
    if config.model.vocab_size is None:
        config.model.vocab_size = 512
    return config


@pytest.mark.parametrize("name", MODELS)
def test_a_model_builds_steps_and_costs_as_in_the_formula(name):
    config = composed(f"model={name}").model
    assert config.problems() == []
    # Layers repeat: the first ones stand for all of them.
    config.num_layers = min(config.num_layers, 4)
    assert config.problems() == []
    # Without values: sizes and operations are real, memory is not needed.
    with FakeTensorMode():
        model = Transformer(config)
        tokens = torch.zeros(2, LENGTH, dtype=torch.long)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(tokens)
        output = model(tokens, tokens)
        loss = sum(output.auxiliary.values(), start=output.loss)
        loss.backward()
    loads = [training_load(config, i, c, LENGTH) for i, c in enumerate(config.capacities)]
    assert realised_flops(config, LENGTH, loads) == forward_flops(config, LENGTH)
    if config.experts.noop:
        # Who goes to a no-op is not known without values: the counter takes every choice for one
        # that computes.
        top_k = config.experts.top_k
        loads = [load._replace(expert_slots=load.mlp_tokens * top_k) for load in loads]
    expected = realised_flops(config, LENGTH, loads).total * 2
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-3)
    assert all(p.grad is not None for p in model.parameters())
    assert parameters(config).total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("size", PAPER_SIZES)
def test_sizes_are_those_of_their_names(size):
    dense, routed = (composed(f"model={kind}_{size}").model for kind in ("dense", "mod"))
    assert parameters(dense).total == pytest.approx(PAPER_SIZES[size], rel=0.1)
    assert (dense.d_model, dense.num_layers) == (routed.d_model, routed.num_layers)
    assert not dense.is_routed
    assert routed.is_routed


@pytest.mark.parametrize(
    "group", ["optimizer", "schedule", "capacity_schedule", "strategy", "spike", "log", "data"]
)
def test_every_choice_of_a_group_composes_without_a_problem(group):
    for path in (conf_dir() / group).glob("*.yaml"):
        config = composed(f"{group}={path.stem}")
        problems = [p for p in config.problems() if p.key != "data.path"]
        assert problems == [], path


def test_every_corpus_composes():
    for path in (conf_dir() / "corpus").glob("*.yaml"):
        compose("prepare", [f"corpus={path.stem}"])


def test_the_quickstart_compares_like_with_like():
    comparison = compose_arms(["experiment=quickstart"])
    assert str(comparison.directory) == "runs/quickstart"
    (dense,), (routed,) = comparison.arms["dense"], comparison.arms["mod"]
    assert (dense.name, routed.name) == ("quickstart/dense", "quickstart/mod")
    assert dense.model.pattern == "dense"
    assert (routed.model.pattern, routed.model.capacity) == ("every_other", 0.125)
    routed.model.pattern = dense.model.pattern
    routed.name = dense.name
    assert routed == dense


def test_the_small_isoflop_grid_has_the_controls_and_no_warning_but_of_data():
    request = compose_isoflop(
        ["experiment=isoflop_small", "data.seq_len=128", "model.vocab_size=512", "plan_only=true"]
    )
    grid = make_grid(request.config, request.families, request.defaults)
    assert {point.family for point in grid.points} == {"dense", "mod", "mod_unrouted"}
    assert len(grid.points) == 45
    assert [line for line in warnings_of(grid) if not line.startswith("data repeat")] == []
