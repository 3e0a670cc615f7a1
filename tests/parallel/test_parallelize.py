"""Models cut over ranks compute, learn and decide as one process does on the whole batch."""

import contextlib
import functools
from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from modtrain.evaluation.held_out import evaluate
from modtrain.models.depth.config import RouterConfig
from modtrain.models.experts.config import ExpertsConfig
from modtrain.models.loss import IGNORED
from modtrain.models.transformer import Transformer, is_predictor
from modtrain.parallel import fsdp as parallelize
from modtrain.parallel.activation_checkpointing import MODES
from modtrain.parallel.config import LayerOptions
from modtrain.parallel.grad_clip import clip
from modtrain.parallel.meshes import AXES, make_meshes
from modtrain.parallel.validation import tensor_problems
from tests.helpers.model_cases import distinct_tokens, settle, small
from tests.helpers.ranks import on_ranks

_CAUSAL = ["predictor", "auxiliary", "threshold"]
_CASES = {
    "dense": small(pattern="dense", num_heads=4, num_kv_heads=2, num_layers=2),
    "mod": small(
        tie_embeddings=True,
        qk_norm=True,
        router=RouterConfig(causal=_CAUSAL, predictor_dim=8, gate="sigmoid", gate_scale=True),
    ),
    "parts routed apart": small(
        num_layers=3,
        mixer=["convolution", "attention", "convolution"],
        activation="gelu",
        pattern=[1, 0.3, 0.3],
        router=RouterConfig(target="both", score="mlp", hidden_dim=6, causal=_CAUSAL),
        experts=ExpertsConfig(count=4, top_k=2, dim=8, every=2),
    ),
    "staged mode": small(
        num_layers=2,
        router=RouterConfig(choice="token"),
        # No expert can get just a fifth of the tokens: its bias would move as rounding wills.
        experts=ExpertsConfig(count=5, top_k=1, dim=12, shared=1, balance="bias"),
    ),
    "integrated mode": small(
        num_layers=2,
        pattern="dense",
        experts=ExpertsConfig(count=3, top_k=2, dim=8, noop=1, choice="expert"),
    ),
}
# World size, strategy, and sizes of its groups.
_LAYOUTS = {
    "fsdp 1": (1, "fsdp", {}),
    "fsdp 2": (2, "fsdp", {}),
    "fsdp 4": (4, "fsdp", {}),
    "hsdp 2x2": (4, "hsdp", {"shard_size": 2}),
    "fsdp_tp 1x2": (2, "fsdp_tp", {"tensor_parallel": 2}),
    "fsdp_tp 2x1": (2, "fsdp_tp", {"tensor_parallel": 1}),
    "fsdp_tp 2x2": (4, "fsdp_tp", {"tensor_parallel": 2}),
}
# Each step has four micro-batches, however many of them a rank has; some losses are no means over
# the tokens, so all have to have the same.
_MICRO_BATCHES, _LENGTH, _STEPS, _LIMIT = 4, 19, 2, 0.5


@dataclass
class _Trace:
    """What a few steps came to: by step, and weights and buffers at the end."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    chosen: list[list] = field(default_factory=list)
    state: dict = field(default_factory=dict)


def _step(model, optimizer, batches, trace, mean, gather, precision):
    """Learn from micro-batches; thresholds and biases from the mean of what each has seen."""
    loss, seen, chosen = 0.0, 0, []
    for number, batch_BT in enumerate(batches):
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(number == len(batches) - 1)
        with precision or contextlib.nullcontext():
            output = model(batch_BT[:, :-1], batch_BT[:, 1:])
        total = output.loss + sum(output.auxiliary.values())
        (total / len(batches)).backward()
        loss += total.detach() / len(batches)
        observed = model.batch_stats(output)
        seen += torch.cat([torch.zeros(1), *(value.flatten() for value in observed)])
        chosen.append([record.chosen_BS.tolist() for record in output.routing])
    trace.losses.append(float(mean(loss)))
    trace.chosen += gather(chosen)
    by_kind = [[], []]
    for name, parameter in model.named_parameters():
        by_kind[is_predictor(name)].append(parameter)
    trace.norms += [float(clip(parameters, _LIMIT)) for parameters in by_kind]
    optimizer.step()
    optimizer.zero_grad()
    pieces = mean(seen / len(batches))[1:].split([value.numel() for value in observed])
    model.update_running_stats(
        [piece.view_as(v) for piece, v in zip(pieces, observed, strict=True)]
    )


def _optimizer(model):
    # Of gradients near zero Adam makes steps of full length, and rounding would decide their sign.
    parameters = list(model.parameters())
    groups = [[p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim < 2]]
    groups = [{"params": params} for params in groups]
    return torch.optim.AdamW(groups, lr=1e-2, eps=1e-3, fused=True)


def _learns(model, rank, size, mean, gather, precision=None):
    """Train rank ``rank`` of ``size`` on its part of the micro-batches."""
    trace, optimizer = _Trace(), _optimizer(model)
    per_rank = _MICRO_BATCHES // size
    for step in range(_STEPS):
        batches = distinct_tokens(_MICRO_BATCHES, _LENGTH, step).split(1)
        own = batches[rank * per_rank : (rank + 1) * per_rank]
        _step(model, optimizer, own, trace, mean, gather, precision)
    for name, value in model.state_dict().items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        trace.state[name] = whole.detach().numpy()
    return trace


def _itself(x):
    return x


@functools.cache
def _in_one_process(case, autocast=False):
    precision = torch.autocast("cpu", torch.bfloat16) if autocast else None
    return _learns(Transformer(_CASES[case]), 0, 1, _itself, _itself, precision)


def _on_a_rank(strategy, sizes, cases, options=None, autocast=False):
    world_size = dist.get_world_size()
    meshes = make_meshes(strategy, world_size, **sizes)

    def mean(x):
        x = x.clone()
        dist.all_reduce(x)
        return x / world_size

    def gather(chosen):
        every = [None] * world_size
        dist.all_gather_object(every, chosen)
        # The ranks of a tensor-parallel group read the same, and have to decide the same.
        copies = world_size // meshes.data_size
        for rank, found in enumerate(every):
            assert found == every[rank // copies * copies]
        return [found for rank in range(0, world_size, copies) for found in every[rank]]

    traces = {}
    for case in cases:
        model = Transformer(_CASES[case])
        names = [name for name, _ in model.named_parameters()]
        keys = list(model.state_dict())
        for _ in range(2):  # the second does nothing
            getattr(parallelize, strategy)(model, meshes, options or LayerOptions())
        assert [name for name, _ in model.named_parameters()] == names
        assert list(model.state_dict()) == keys
        precision = torch.autocast("cpu", torch.bfloat16) if autocast else None
        traces[case] = _learns(model, meshes.data_rank, meshes.data_size, mean, gather, precision)
        assert [name for name, _ in model.named_parameters()] == names
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return traces


def _assert_alike(found, wanted, atol=1e-5):
    assert found.chosen == wanted.chosen
    assert found.losses == pytest.approx(wanted.losses, abs=atol)
    assert found.norms == pytest.approx(wanted.norms, abs=atol)
    assert found.state.keys() == wanted.state.keys()
    for name, value in wanted.state.items():
        torch.testing.assert_close(
            torch.from_numpy(found.state[name]),
            torch.from_numpy(value),
            atol=atol,
            rtol=0,
            msg=name,
        )


def _assert_learns_alike(layout, cases, options=None, autocast=False, timeout=120):
    world_size, *rest = _LAYOUTS[layout]
    traces = on_ranks(_on_a_rank, world_size, *rest, cases, options, autocast, timeout=timeout)
    for case in cases:
        wanted = _in_one_process(case, autocast)
        assert wanted.norms[0] > _LIMIT, "nothing would be clipped"
        for trace in traces:
            _assert_alike(trace[case], wanted)


@pytest.mark.on_commit(4)
@pytest.mark.parametrize("layout", _LAYOUTS)
def test_learns_as_in_one_process(layout):
    _assert_learns_alike(layout, list(_CASES))


def test_bf16_is_what_autocast_makes_of_a_whole_model():
    """What is gathered narrow, autocast would have cast; nothing that decides is."""
    _assert_learns_alike("fsdp 2", ["mod", "staged mode"], LayerOptions("bf16"), autocast=True)


def _gathers_in(precision):
    model = Transformer(_CASES["staged mode"])
    parallelize.fsdp(model, make_meshes("fsdp", 2), LayerOptions(precision))
    narrow = []

    def look(module, inputs, prefix):
        for name, parameter in module.named_parameters(recurse=False):
            assert not isinstance(parameter, DTensor), "computes with a piece"
            narrow.extend([f"{prefix}.{name}"] * (parameter.dtype == torch.bfloat16))

    for prefix, module in model.named_modules():
        module.register_forward_pre_hook(functools.partial(look, prefix=prefix))
    tokens_BS = distinct_tokens(1, 9)
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens_BS, tokens_BS)
    return sorted(narrow)


def test_only_layers_matrices_are_gathered_narrow():
    mixer = [f"attention.{name}.weight" for name in ("k", "out", "q", "v")]
    inner = [f"mlp.inner.{name}" for name in ("down", "gate", "up")]
    shared = [f"mlp.shared.{name}.weight" for name in ("down", "gate", "up")]
    wanted = [f"layers.{i}.module.{n}" for i in (0, 1) for n in (*mixer, *inner, *shared)]
    assert on_ranks(_gathers_in, 2, "bf16") == [wanted] * 2
    assert on_ranks(_gathers_in, 2, "fp32") == [[]] * 2


def test_options_reach_every_layer():
    model = Transformer(_CASES["mod"])
    options = LayerOptions(activation_checkpointing="full", compile=True)
    parallelize.prepare_layers(model, options)
    for layer in model.layers:
        assert "Checkpoint" in type(layer).__name__
        assert layer._compiled_call_impl is not None


def test_bf16_in_slices_is_near():
    world_size, strategy, sizes = _LAYOUTS["fsdp_tp 1x2"]
    options = LayerOptions("bf16")
    for trace in on_ranks(_on_a_rank, world_size, strategy, sizes, ["mod"], options, True):
        wanted = _in_one_process("mod", autocast=True)
        assert trace["mod"].losses == pytest.approx(wanted.losses, abs=0.02)
        assert trace["mod"].norms == pytest.approx(wanted.norms, rel=0.1, abs=1e-3)


@pytest.mark.parametrize("layout", ["fsdp 2", "fsdp_tp 1x2"])
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointed_layers_learn_alike(layout, mode):
    options = LayerOptions(activation_checkpointing=mode)
    _assert_learns_alike(layout, ["mod", "staged mode"], options)


@pytest.mark.on_commit(2)
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("layout", "mode"),
    [
        *((layout, mode) for layout in ("fsdp 2", "hsdp 2x2") for mode in MODES),
        *(("fsdp_tp 1x2", mode) for mode in MODES if mode != "full"),
    ],
)
def test_compiled_layers_learn_alike(layout, mode):
    options = LayerOptions(activation_checkpointing=mode, compile=True)
    _assert_learns_alike(layout, ["staged mode"], options, timeout=800)


def _evaluates(strategy, sizes, case):
    meshes = make_meshes(strategy, dist.get_world_size(), **sizes)
    model = settle(Transformer(_CASES[case]), _LENGTH - 1)
    getattr(parallelize, strategy)(model, meshes, LayerOptions())
    batches = distinct_tokens(_MICRO_BATCHES, _LENGTH, 9).split(1)[
        meshes.data_rank :: meshes.data_size
    ]

    def total(x):
        dist.all_reduce(x, group=meshes.layers.get_group())
        return x

    found = evaluate(model, batches, contextlib.nullcontext(), total=total)
    # Saved or clipped after it, a model is in its pieces.
    assert all(isinstance(value, DTensor) for value in model.parameters())
    return found


@pytest.mark.parametrize("layout", ["fsdp 2", "fsdp_tp 1x2"])
@pytest.mark.parametrize("case", ["mod", "parts routed apart"])
def test_evaluates_as_in_one_process(layout, case):
    world_size, strategy, sizes = _LAYOUTS[layout]
    whole = settle(Transformer(_CASES[case]), _LENGTH - 1)
    batches = distinct_tokens(_MICRO_BATCHES, _LENGTH, 9).split(1)
    wanted = evaluate(whole, batches, contextlib.nullcontext())
    shares = [s for d in wanted.decisions.values() for s in d.realised_capacity.values()]
    assert len(set(shares)) > 3, "as many tokens take part everywhere"
    for found in on_ranks(_evaluates, world_size, strategy, sizes, case):
        assert found.tokens == wanted.tokens
        for decision, ours in [*found.decisions.items(), ("top_k", found.top_k)]:
            theirs = wanted.top_k if decision == "top_k" else wanted.decisions[decision]
            assert ours.loss == pytest.approx(theirs.loss, abs=1e-5)
            assert ours.realised_capacity == theirs.realised_capacity
            assert ours.agreement == theirs.agreement
            for layer, load in theirs.expert_load.items():
                assert ours.expert_load[layer] == pytest.approx(load)


def _of_a_part(tokens_BS, targets_BS, documents_BS):
    meshes = make_meshes("fsdp_tp", 2, tensor_parallel=2)
    model = Transformer(_CASES["parts routed apart"])
    parallelize.fsdp_tp(model, meshes, LayerOptions())
    return _loss_and_gradients(model, *map(torch.tensor, (tokens_BS, targets_BS, documents_BS)))


def _loss_and_gradients(model, tokens_BS, targets_BS, documents_BS):
    with torch.no_grad():
        logits_BSV = model(tokens_BS).require_logits()
    output = model(tokens_BS, targets_BS, documents_BS=documents_BS)
    output.loss.backward()
    gradients = {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    return (
        float(output.loss.detach()),
        logits_BSV.numpy(),
        {n: g.numpy() for n, g in gradients.items()},
    )


@pytest.mark.parametrize("length", [1, 9])
def test_shares_of_a_loss_that_leaves_tokens_out(length):
    """One rank's share counts for less than the other's, or for nothing."""
    tokens_BS = distinct_tokens(2, length, 1)
    targets_BS = distinct_tokens(2, length, 2)
    targets_BS[0, length // 2 :] = IGNORED
    documents_BS = torch.arange(length).expand(2, -1) // 4
    wanted = _loss_and_gradients(
        Transformer(_CASES["parts routed apart"]), tokens_BS, targets_BS, documents_BS
    )
    inputs = [x.tolist() for x in (tokens_BS, targets_BS, documents_BS)]
    for loss, logits_BSV, gradients in on_ranks(_of_a_part, 2, *inputs):
        assert loss == pytest.approx(wanted[0], abs=1e-5)
        assert logits_BSV == pytest.approx(wanted[1], abs=1e-5)
        assert gradients.keys() == wanted[2].keys()
        for name, gradient in gradients.items():
            assert gradient == pytest.approx(wanted[2][name], abs=1e-5), name


def _groups(strategy, sizes):
    meshes = make_meshes(strategy, 4, **sizes)
    axes = {
        axis: dist.get_process_group_ranks(meshes.whole[axis].get_group())
        for axis in AXES[strategy]
    }
    return meshes.data_size, meshes.data_rank, axes, meshes.layers.shape, meshes.rest.shape


@pytest.mark.parametrize(
    ("strategy", "sizes", "of_rank_2"),
    [
        ("fsdp", {}, (4, 2, {"data": [0, 1, 2, 3]}, (4,), (4,))),
        (
            "hsdp",
            {"shard_size": 2},
            (4, 2, {"replicate": [0, 2], "shard": [2, 3]}, (2, 2), (2, 2)),
        ),
        ("hsdp", {}, (4, 2, {"replicate": [2], "shard": [0, 1, 2, 3]}, (1, 4), (1, 4))),
        (
            "fsdp_tp",
            {"tensor_parallel": 2},
            (2, 1, {"data": [0, 2], "tensor": [2, 3]}, (2,), (4,)),
        ),
        (
            "fsdp_ep",
            {"expert_parallel": 2},
            (4, 2, {"expert_data": [0, 2], "expert": [2, 3]}, (4,), (4,)),
        ),
    ],
)
def test_neighbours_share_the_inner_groups(strategy, sizes, of_rank_2):
    assert on_ranks(_groups, 4, strategy, sizes)[2] == of_rank_2


def test_groups_that_do_not_divide_the_ranks():
    with pytest.raises(ValueError, match="groups of 3 do not divide 4 ranks"):
        make_meshes("hsdp", 4, shard_size=3)
    with pytest.raises(ValueError, match="ddp has no meshes; fsdp, hsdp"):
        make_meshes("ddp", 4)


def test_what_cannot_be_sliced_is_told_at_once():
    config = small(
        num_heads=4,
        num_kv_heads=2,
        d_ff=30,
        mixer=["attention", "convolution"] * 2,
        router=RouterConfig(score="attention", target="mlp"),
        experts=ExpertsConfig(count=2, top_k=2, every=4, dim=6),
    )
    found = tensor_problems(config, 4)
    keys = ["num_kv_heads", "d_ff", "experts.dim", "router.score"]
    assert [problem.key for problem in found] == [f"model.{key}" for key in keys]
    assert [p.key for p in tensor_problems(config, 3)][:2] == [
        "model.num_heads",
        "model.num_kv_heads",
    ]
    assert "model.d_model" in [p.key for p in tensor_problems(config, 3)]
    assert tensor_problems(config, 1) == []
    assert "is made of all heads" in str(tensor_problems(config, 2)[0])


def _pieces(case):
    meshes = make_meshes("fsdp", 4)
    model = Transformer(_CASES[case])
    parallelize.fsdp(model, meshes, LayerOptions())
    return {name: tuple(p.to_local().shape) for name, p in model.named_parameters()}


def test_few_experts_are_cut_by_their_features():
    """Cut by number, five experts on four ranks would travel as eight."""
    mlp = "layers.1.module.mlp."
    for shapes in on_ranks(_pieces, 4, "staged mode"):
        assert shapes[f"{mlp}inner.up"] == (5, 4, 12)
        assert shapes[f"{mlp}inner.down"] == (5, 3, 16)
        assert shapes[f"{mlp}shared.up.weight"] == (3, 16)
