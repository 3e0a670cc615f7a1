"""AdamW, and Muon on the layers' matrices with AdamW on the rest, in one process."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from modtrain.checkpoint.checkpointer import Checkpointer
from modtrain.checkpoint.state import named_state, restore
from modtrain.cli.compose import compose
from modtrain.common.errors import CheckpointError, OtherRunError
from modtrain.distributed.process_group import ONE_PROCESS
from modtrain.models.depth.config import RouterConfig
from modtrain.models.experts.config import ExpertsConfig
from modtrain.models.flops import hidden_matrix_shapes, parameters
from modtrain.models.transformer import Transformer, hidden_matrices
from modtrain.optimizers.config import MuonConfig, OptimizerConfig
from modtrain.optimizers.registry import OPTIMIZERS, build_optimizer
from modtrain.training.plan import resolve
from modtrain.training.plan_report import show
from modtrain.training.run import train
from modtrain.training.spikes.detector import skip_step
from tests.helpers.model_cases import random_tokens, small
from tests.helpers.problems import problems_of
from tests.helpers.runs import stopping
from tests.helpers.saved import assert_same_bits, newest_tensors

MODELS = {
    "mod": small(router=RouterConfig(score="mlp", hidden_dim=6, gate_scale=True)),
    "parts": small(
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        mixer=["convolution", "attention", "convolution"],
        activation="gelu",
        pattern=[1, 0.3, 0.3],
        router=RouterConfig(target="both"),
        experts=ExpertsConfig(count=4, top_k=2, dim=8, every=2, shared=2),
        tie_embeddings=True,
    ),
}
CONFIG = OptimizerConfig(
    name="muon", lr=1e-2, weight_decay=0.2, muon=MuonConfig(lr=3e-2, weight_decay=0.4)
)


def learn(model: Transformer, steps: int, *optimizers: torch.optim.Optimizer) -> None:
    for step in range(steps):
        tokens = random_tokens(2, 17, step)
        output = model(tokens[:, :-1], tokens[:, 1:])
        (output.loss + sum(output.auxiliary.values())).backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()


def test_matrices_decay_and_vectors_do_not():
    model = Transformer(small())
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.5, weight_decay=0.2))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        # Without a gradient a step is the decay alone, decoupled from the moments: w (1 - lr wd).
        factor = 1 - 0.5 * 0.2 if parameter.ndim >= 2 else 1.0
        assert torch.allclose(parameter, before[name] * factor), name
        assert ("weight" not in name) or ("router" in name) or parameter.ndim == 2


def test_every_parameter_is_optimised_once():
    model = Transformer(small(tie_embeddings=True))
    groups = build_optimizer(model, OptimizerConfig()).param_groups
    given = [id(p) for group in groups for p in group["params"]]
    assert sorted(given) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize("case", MODELS)
def test_the_layers_matrices_are_known_before_the_model_is_built(case):
    config = MODELS[case]
    model = Transformer(config)
    matrices = hidden_matrices(model)
    assert sorted(tuple(m.shape) for m in matrices) == sorted(hidden_matrix_shapes(config))
    names = {id(p): name for name, p in model.named_parameters()}
    others = ("router", "predictor", "embedding", "head.", "taps")
    assert not [m for m in matrices if any(word in names[id(m)] for word in others)]


def test_each_part_steps_as_torch_does():
    model = Transformer(MODELS["parts"])
    other = copy.deepcopy(model)
    hidden = hidden_matrices(other)
    rest = [p for p in other.parameters() if all(p is not matrix for matrix in hidden)]
    decays = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": 0.2},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    separate = [
        torch.optim.Muon(hidden, lr=3e-2, weight_decay=0.4, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(decays, lr=1e-2, betas=(0.9, 0.95), fused=True),
    ]
    learn(model, 3, build_optimizer(model, CONFIG))
    learn(other, 3, *separate)
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two), name


def test_one_rate_and_decay_do_for_both_unless_the_matrices_have_their_own():
    groups = build_optimizer(Transformer(small()), OptimizerConfig("muon", lr=0.5)).param_groups
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [
        *((0.5, 0.1), (0.5, 0.1), (0.5, 0.0))
    ]


def test_flops_and_memory_are_those_of_the_step():
    config = MODELS["parts"]
    model = Transformer(config)
    optimizer = build_optimizer(model, CONFIG)
    learn(model, 1, optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    muon = OPTIMIZERS["muon"]
    assert muon.step_flops(config, CONFIG) == counter.get_total_flops() > 0
    states = [value for state in optimizer.state.values() for value in state.values()]
    assert muon.state_bytes(config) == sum(4 * s.numel() for s in states if s.ndim)
    assert muon.state_bytes(config) < 8 * parameters(config).total
    assert OPTIMIZERS["adamw"].step_flops(config, OptimizerConfig()) == 0


@pytest.mark.parametrize("first", [True, False])
def test_a_skipped_step_keeps_every_bit(first):
    model = Transformer(small(num_layers=2))
    optimizer = build_optimizer(model, CONFIG)
    if not first:
        learn(model, 1, optimizer)
    before = [t.clone() for t in named_state(model, optimizer)[0].values()]
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    skip_step(optimizer, torch.tensor(True))
    optimizer.step()
    after = named_state(model, optimizer)[0].values()
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_torchs_own_state_dict_goes_in_and_out():
    models = [Transformer(small(num_layers=2)) for _ in range(2)]
    one, two = (build_optimizer(model, CONFIG) for model in models)
    learn(models[0], 2, one)
    models[1].load_state_dict(models[0].state_dict())
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for model, optimizer in zip(models, (one, two), strict=True):
        optimizer.param_groups[0]["lr"] = 0.1
        learn(model, 1, optimizer)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("saved", ["adamw", "muon"])
def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path, saved):
    model = Transformer(small(num_layers=2))
    now = {"adamw": "muon", "muon": "adamw"}[saved]
    optimizer = build_optimizer(model, OptimizerConfig(saved))
    learn(model, 1, optimizer)
    tensors, rest = named_state(model, optimizer)
    with Checkpointer(ONE_PROCESS) as checkpointer:
        checkpointer.save(tmp_path / "step-000000001", tensors, rest, 1, None)
    with pytest.raises(CheckpointError, match="another model or optimizer"):
        restore(tmp_path / "step-000000001", model, build_optimizer(model, OptimizerConfig(now)))


@pytest.mark.parametrize(
    ("more", "key", "message"),
    [
        (["optimizer.name=lion"], "optimizer.name", "adamw, muon"),
        (["optimizer.muon.momentum=0.9"], "optimizer.muon", "use optimizer=muon"),
        (["optimizer=muon", "optimizer.muon.momentum=1"], "optimizer.muon.momentum", "0.9"),
        (["optimizer=muon", "optimizer.muon.lr=0"], "optimizer.muon.lr", "positive"),
        (["optimizer=muon", "optimizer.muon.weight_decay=-1"], "optimizer.muon.weight_decay", "0"),
        (["optimizer=muon", "optimizer.muon.ns_steps=100"], "optimizer.muon.ns_steps", "5"),
        (["optimizer=muon", "optimizer.muon.adjust_lr=none"], "optimizer.muon.adjust_lr", "orig"),
        (["optimizer=muon", "strategy=deepspeed_2"], "optimizer.name", "strategy=fsdp"),
    ],
)
def test_what_cannot_be_is_an_error_at_start(tiny, more, key, message):
    problems = problems_of(resolve, compose("train", [*tiny, "name=refused", *more]))
    assert list(problems) == [key]
    assert message in problems[key].remedy


def test_the_plan_shows_what_the_optimizer_costs_beside_the_budget(tiny, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    plans = {}
    for name in ("adamw", "muon"):
        config = compose("plan", [*tiny, f"optimizer={name}"])
        plans[name] = resolve(config, needs_data=False)[1]
        show(config)
    assert plans["muon"] == plans["adamw"]
    shown = capsys.readouterr().out
    flops = OPTIMIZERS["muon"].step_flops(*_model_and_optimizer(tiny))
    assert f"{flops:.3e} FLOPs a step" in shown
    assert OPTIMIZERS["muon"].state_label in shown


def _model_and_optimizer(tiny):
    config, _ = resolve(compose("plan", [*tiny, "optimizer=muon"]), needs_data=False)
    return config.model, config.optimizer


@pytest.mark.slow
@pytest.mark.usefixtures("no_stop_request")
def test_a_stopped_run_resumes_under_its_own_optimizer(tiny, tmp_path):
    def start(name, *more):
        lines = [*tiny, f"name={name}", f"runs_dir={tmp_path}", "optimizer=muon", *more]
        return train(compose("train", lines))

    whole = start("whole")
    with stopping(5):
        assert start("cut").status == "stopped"
    with pytest.raises(OtherRunError, match=r"optimizer\.name: muon in the run, adamw now"):
        start("cut", "optimizer.name=adamw")
    assert start("cut").status == "complete"
    left, right = (newest_tensors(tmp_path / name) for name in ("whole", "cut"))
    assert any(key.endswith("momentum_buffer") for key in left)
    assert_same_bits(left, right)
    assert whole.run.is_complete
