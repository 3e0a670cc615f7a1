"""Parameters that are frozen, that start later, and that have rates of their own."""

import pytest
import torch

from modtrain.models.transformer import Transformer, deciding_parameters
from modtrain.optimizers.config import OptimizerConfig, ParameterGroupConfig
from modtrain.optimizers.parameter_groups import (
    freeze,
    hold_gradients,
    matches,
    num_trained,
    pattern_problems,
)
from modtrain.optimizers.registry import OPTIMIZERS, build_optimizer, find_problems
from modtrain.training.schedule_config import ScheduleConfig
from modtrain.training.schedules import group_lr_factor, lr_factor
from tests.helpers.model_cases import random_tokens, small

MODEL = small(num_layers=3)


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("layers.1.*", "layers.1.mlp.up.weight", True),
        ("layers.1.*", "layers.10.mlp.up.weight", False),
        ("layers.0-2.mlp.*", "layers.2.mlp.up.weight", True),
        ("layers.0-2.mlp.*", "layers.3.mlp.up.weight", False),
        ("layers.0-2.mlp.*", "layers.2.attention.q.weight", False),
        ("*.q.weight", "layers.7.attention.q.weight", True),
        ("embedding.weight", "embedding.weight", True),
        ("layers.9-10.*", "layers.10.norm.gain", True),
    ],
)
def test_a_pattern_means_whole_names(pattern, name, expected):
    assert matches(pattern, name) == expected


def test_routers_alone_are_trained():
    model, config = Transformer(MODEL), OptimizerConfig(train=["routers"])
    freeze(model, config)
    trained = {p for p in model.parameters() if p.requires_grad}
    assert trained and trained == deciding_parameters(model)
    assert sum(p.numel() for p in trained) == num_trained(MODEL, config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, config)
    tokens_BS = random_tokens(2, 12)
    output = model(tokens_BS, tokens_BS)
    sum(output.auxiliary.values(), start=output.loss).backward()
    optimizer.step()
    assert set(optimizer.state) == trained
    for name, parameter in model.named_parameters():
        if parameter not in trained:
            assert parameter.grad is None and torch.equal(parameter, before[name])


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_a_parameter_is_in_the_first_group_that_names_it(name):
    model = Transformer(MODEL)
    groups = [
        ParameterGroupConfig(["routers", "layers.0.*"], lr_scale=0.5),
        ParameterGroupConfig(["layers.*"], lr_scale=2.0, start_step=3),
    ]
    optimizer = build_optimizer(model, OptimizerConfig(name=name, lr=0.1, groups=groups))
    names = {p: n for n, p in model.named_parameters()}
    deciding, seen = deciding_parameters(model), set()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            at = 0
            if names[parameter].startswith("layers."):
                at = 1 if parameter in deciding or names[parameter].startswith("layers.0.") else 2
            assert group["lr"] == pytest.approx(0.1 * (1.0, 0.5, 2.0)[at])
            assert group.get("start_step", 0) == (3 if at == 2 else 0)
            assert group["rate_name"].endswith(("", "_group_1", "_group_2")[at])
            seen.add(parameter)
    assert seen == set(model.parameters())
    for parameter in seen:
        parameter.grad = torch.ones_like(parameter)
    hold_gradients(optimizer.param_groups, 2)
    later = {p for g in optimizer.param_groups if g.get("start_step") for p in g["params"]}
    assert later and {p for p in seen if p.grad is None} == later
    optimizer.step()
    assert not later & set(optimizer.state)


def test_later_parameters_have_a_warm_up_of_their_own():
    schedule = ScheduleConfig(name="wsd", warmup_steps=4, decay=0.2)
    for step in range(40):
        whole = lr_factor(schedule, step, 40)
        assert group_lr_factor(schedule, step, 40, 0) == whole
        expected = 0.0 if step < 10 else whole * min(1.0, (step - 9) / 4)
        assert group_lr_factor(schedule, step, 40, 10) == pytest.approx(expected)


def keys_of(config: OptimizerConfig) -> list[str]:
    return [p.key for p in pattern_problems(MODEL, config, "optimizer")]


def test_a_pattern_of_nothing_is_named():
    wrong = OptimizerConfig(train=["routers", "layers.9.*"])
    (problem,) = pattern_problems(MODEL, wrong, "optimizer")
    assert (problem.key, problem.value) == ("optimizer.train", "layers.9.*")
    assert "layers.*.attention.q.weight" in problem.remedy
    group = ParameterGroupConfig(["head.bias"])
    assert keys_of(OptimizerConfig(groups=[group])) == ["optimizer.groups[0].parameters"]
    later = [ParameterGroupConfig(["*"], start_step=2)]
    assert keys_of(OptimizerConfig(groups=later)) == ["optimizer.groups"]
    both = [ParameterGroupConfig(["routers"]), ParameterGroupConfig(["*"], start_step=2)]
    assert keys_of(OptimizerConfig(groups=both)) == []
    frozen = OptimizerConfig(train=["layers.1.*"], groups=both[1:])
    assert keys_of(frozen) == ["optimizer.groups"]
    dense = pattern_problems(
        small(pattern="dense"), OptimizerConfig(train=["routers"]), "optimizer"
    )
    assert [p.value for p in dense] == ["routers"]


def test_wrong_groups_are_named():
    config = OptimizerConfig(train=[], groups=[ParameterGroupConfig([], 0.0, -1)])
    keys = {problem.key for problem in config.problems("optimizer")}
    own = {f"optimizer.groups[0].{key}" for key in ("parameters", "lr_scale", "start_step")}
    assert keys == own | {"optimizer.train"}
    late = OptimizerConfig(groups=[ParameterGroupConfig(["*"], start_step=1)])
    assert not find_problems(late, "optimizer")
    (problem,) = find_problems(late, "optimizer", uses_zero=True)
    assert problem.key == "optimizer.groups[0].start_step"
