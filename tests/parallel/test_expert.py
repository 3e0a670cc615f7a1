"""Experts over ranks give what one process gives, and what travels for it.

Shapes: B batch, S sequence, M rows, D model, E experts, R ranks that share them.
"""

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks._traffic import sent_bytes
from modtrain.distributed.collectives import Group
from modtrain.models.config import ModelConfig
from modtrain.models.experts.config import ExpertsConfig
from modtrain.models.experts.layer import ExpertMLPs
from modtrain.models.transformer import ModelOutput, Transformer
from modtrain.parallel.config import LayerOptions
from modtrain.parallel.dims import ParallelDims
from modtrain.parallel.expert import apply_expert_parallel, by_expert, spread_experts
from modtrain.parallel.meshes import Meshes, make_meshes
from modtrain.parallel.parallelize import parallelize
from tests.helpers.model_cases import lively, quick, random_tokens, small
from tests.helpers.ranks import on_ranks

TOLERANCE = 1e-5
BATCH, LENGTH, DIM = 4, 16, 16


def meshes_of(data: int, expert: int) -> Meshes:
    ranks = data * expert
    return make_meshes(ParallelDims(ranks, shard=ranks, expert=expert))


def model_of(variant: str, **changes: Any) -> ModelConfig:
    values = {"num_layers": 2} | VARIANTS[variant]
    experts = ExpertsConfig(**({"count": 4, "dim": 8} | values.pop("experts")))
    config = small(experts=experts, **(values | changes))
    assert config.problems() == []
    return config


VARIANTS: dict[str, dict[str, Any]] = {
    "staged": {"experts": {"z_loss_weight": 0.01}},
    "integrated": {
        "pattern": "dense",
        "activation": "gelu",
        "experts": {"noop": 2, "shared": 1, "top_k": 1, "balance": "bias", "bias_rate": 0.1},
    },
    "limited": {"experts": {"noop": 1, "capacity_factor": 0.7, "balance": "none"}},
    "expert choice": {"experts": {"choice": "expert", "noop": 1, "shared": 1}},
}


# The exchange alone.


def _exchanged(counts_RE: list[list[int]], activation: str, mesh: DeviceMesh) -> float:
    """The worst error of results and gradients against all experts in one place."""
    rank = dist.get_rank()
    counts_E = torch.tensor(counts_RE[rank])
    rows = int(counts_E.sum())
    torch.manual_seed(0)
    whole = ExpertMLPs(len(counts_E), 6, 5, activation).double()
    for weight in whole.parameters():
        nn.init.normal_(weight)
    sharded = copy.deepcopy(whole)
    spread_experts(sharded, mesh, Group.of(mesh))
    torch.manual_seed(1 + rank)
    # Behind them are padding rows.
    x_MD = torch.randn(rows + rank, 6, dtype=torch.float64)
    grad_MD = torch.randn_like(x_MD)
    x_MD[rows:] = float("nan")
    outputs = []
    for mlps in (whole, sharded):
        leaf_MD = x_MD.clone().requires_grad_()
        y_MD = mlps(leaf_MD, counts_E.cumsum(0).int())
        y_MD.backward(grad_MD)
        outputs.append([y_MD.detach(), leaf_MD.grad])
    assert not any(tensor[rows:].any() for tensor in outputs[1])
    for name, weight in whole.named_parameters():
        dist.all_reduce(weight.grad)
        outputs[0].append(weight.grad / mesh.size())
        outputs[1].append(sharded.get_parameter(name).grad.full_tensor())
    return max(_distance(one, other) for one, other in zip(*outputs, strict=True))


def _distance(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    return float((one.detach() - other.detach()).abs().max()) if one.numel() else 0.0


@st.composite
def cases(draw: st.DrawFn, size: int) -> list[list[int]]:
    """How many rows each rank has for each expert; often none."""
    experts = size * draw(st.integers(1, 3))
    rows = st.lists(st.sampled_from([0, 0, 1, 2, 5]), min_size=experts, max_size=experts)
    return draw(st.lists(rows | st.just([0] * experts), min_size=size, max_size=size))


def _all_exchanged(size: int) -> float:
    """The worst of many cases, which are drawn alike on every rank."""
    errors = [0.0]
    mesh = init_device_mesh("cpu", (size,))

    @quick(40 // size)
    @given(cases(size), st.sampled_from(["swiglu", "gelu"]))
    @example([[0] * size] * size, "swiglu")
    def examine(case: list[list[int]], activation: str) -> None:
        errors.append(_exchanged(case, activation, mesh))

    examine()
    return max(errors)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_rows_go_to_their_experts_and_return(size):
    assert max(on_ranks(_all_exchanged, size, size)) < 1e-12


def test_received_rows_are_sorted_by_expert():
    received_RL = torch.tensor([[2, 0, 1], [0, 0, 0], [1, 2, 1]])
    rows = [(expert, rank) for rank in range(3) for expert in range(3)]
    rows = [pair for pair in rows for _ in range(int(received_RL[pair[1], pair[0]]))]
    place_N = by_expert(received_RL, len(rows)).tolist()
    assert [rows[place_N.index(place)] for place in range(len(rows))] == sorted(rows)


# Whole models.


def objective(output: ModelOutput) -> Tensor:
    return sum(output.auxiliary.values(), start=output.loss)


def pair_of(config: ModelConfig, meshes: Meshes, **options: Any) -> list[Transformer]:
    """One model as it is, and the same one sharded."""
    models = [lively(config, dtype=torch.float32) for _ in range(2)]
    parallelize(models[1], meshes, LayerOptions(**options))
    return models


def gradient_errors(whole: nn.Module, sharded: nn.Module) -> dict[str, float]:
    errors = {}
    pairs = zip(whole.named_parameters(), sharded.named_parameters(), strict=True)
    for (name, expected), (other_name, actual) in pairs:
        assert name == other_name
        if expected.grad is None:
            assert actual.grad is None, name
        else:
            errors[name] = _distance(expected.grad, actual.grad.full_tensor())
    return errors


# What becomes of the parameters.


def _placed() -> dict[str, tuple[Any, ...]]:
    config = model_of("limited", activation="gelu")
    plain = lively(config, dtype=torch.float32)
    _, sharded = pair_of(config, meshes_of(2, 2))
    placements = {}
    for (name, expected), (other_name, weight) in zip(
        plain.state_dict().items(), sharded.state_dict().items(), strict=True
    ):
        assert name == other_name and torch.equal(expected, weight.full_tensor())
        local = weight.to_local()
        if ".inner." in name:
            assert local.untyped_storage().nbytes() == local.nbytes
        placements[name] = (
            tuple(weight.placements),
            weight.device_mesh.mesh_dim_names,
            local.shape,
        )
    return placements


def test_experts_lie_on_both_axes_and_the_rest_on_all_ranks():
    for on_rank in on_ranks(_placed, 4):
        placements, axes, shape = on_rank["layers.1.module.mlp.inner.up"]
        assert (placements, axes) == ((Shard(1), Shard(0)), ("expert_shard", "expert"))
        assert shape == (2, DIM // 2, 8)
        placements, axes, shape = on_rank["embedding.weight"]
        assert placements == (Shard(0),) and len(axes) == 1 and shape == (12, DIM)


def _spread_alone() -> int:
    model = lively(model_of("limited"), dtype=torch.float32)
    apply_expert_parallel(model, meshes_of(1, 2).expert)
    up = model.mixtures[0].inner.up
    dist.barrier()  # none leaves while another still makes its groups
    return int(up.to_local().untyped_storage().nbytes() / up.numel() / up.element_size() * 100)


def test_a_rank_keeps_the_memory_of_its_own_experts_alone():
    assert on_ranks(_spread_alone, 2) == [50, 50]


# What travels.


class Sent(TorchDispatchMode):
    """Counts exchanges, and the bytes of those that leave this rank; keeps the sizes of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.bytes = 0
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.modtrain.exchange.default:
            rows, _, sent, _, _ = args
            self.calls += 1
            if rows.is_floating_point():
                self.dtypes.add(rows.dtype)
                own = sent[dist.get_rank() % len(sent)]
                self.bytes += (sum(sent) - own) * rows.shape[1] * rows.element_size()
        return func(*args, **(kwargs or {}))


def _sent(variant: str, mode: str, precision: str, size: int) -> dict[str, Any]:
    """One micro-batch of each rank, forward and backward."""
    config = model_of(variant, pattern="dense")
    whole, sharded = pair_of(
        config, meshes_of(1, size), activation_checkpointing=mode, precision=precision
    )
    shares = random_tokens(BATCH, LENGTH + 1, 3).chunk(size)
    autocast = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()
    counts: list[list[int]] = []

    def count(_module: nn.Module, inputs: tuple[Tensor, Tensor | None]) -> None:
        if inputs[1] is not None:
            counts.append(inputs[1].diff(prepend=inputs[1].new_zeros(1)).tolist())
        else:
            counts.append([len(inputs[0]) // 4] * 4)

    for mixture in whole.mixtures:
        mixture.inner.register_forward_pre_hook(count)
    own = shares[dist.get_rank()]
    with autocast:
        objectives = [objective(whole(share[:, :-1], share[:, 1:])) for share in shares]
    (sum(objectives) / size).backward()
    with Sent() as sent:
        with autocast:
            total = objective(sharded(own[:, :-1], own[:, 1:]))
        total.backward()
    errors = gradient_errors(whole, sharded)
    return {
        "calls": sent.calls,
        "bytes": sent.bytes,
        "dtypes": sent.dtypes,
        "rows": counts,
        "gradients": {n: p.grad.to_local().tolist() for n, p in sharded.named_parameters()},
        "error": max(errors.values()),
        "scale": max(float(p.grad.abs().max()) for p in whole.parameters()),
        "loss error": _distance(objectives[dist.get_rank()], total),
    }


def test_static_rows_travel_as_in_the_formula():
    layers, rows = 2, 4 * 2 * 5  # slots: ceil(0.7 * 2 * 16 / 5)
    for traffic in on_ranks(_sent, 2, "limited", "none", "fp32", 2):
        assert traffic["rows"][0] == [10] * 4 and sum(traffic["rows"][0]) == rows
        assert traffic["bytes"] == layers * sent_bytes(rows, DIM, 4, 2)
        assert traffic["calls"] == 4 * layers


def test_dropless_rows_travel_as_they_were_counted():
    size, layers = 4, 2
    traffic = on_ranks(_sent, size, "staged", "none", "fp32", size)
    # Layers' counts of every rank's share, share by share.
    shares = [traffic[0]["rows"][rank * layers : (rank + 1) * layers] for rank in range(size)]
    for rank in range(size):
        leave = sum(sum(c) - c[rank] for c in shares[rank])
        come = sum(c[rank] for other in range(size) if other != rank for c in shares[other])
        # There, and its gradient back; what came goes back, and its gradient comes.
        assert traffic[rank]["bytes"] == 2 * (leave + come) * DIM * 4
        assert traffic[rank]["calls"] == 5 * layers
    total = sum(one["bytes"] for one in traffic)
    crossing = sum(sum(c) - c[rank] for rank in range(size) for c in shares[rank])
    assert total == sent_bytes(crossing * size / (size - 1), DIM, 4, size)


def _checkpointed(variant: str) -> dict[str, Any]:
    modes = ("none", "selective", "full")
    return {mode: _sent(variant, mode, "fp32", 2) for mode in modes}


@pytest.mark.parametrize(("variant", "calls"), [("staged", (5, 5, 8)), ("limited", (4, 4, 6))])
def test_checkpointed_layers_exchange_in_step(variant, calls):
    """The same gradients to the bit; ``selective`` sends nothing twice."""
    layers = 2
    for outcome in on_ranks(_checkpointed, 2, variant):
        assert [outcome[mode]["calls"] for mode in outcome] == [layers * number for number in calls]
        for mode in outcome:
            assert outcome[mode]["gradients"] == outcome["none"]["gradients"]


@pytest.mark.parametrize("variant", ["integrated", "expert choice"])
def test_bf16_travels_as_bf16(variant):
    for traffic in on_ranks(_sent, 2, variant, "none", "bf16", 2):
        assert traffic["dtypes"] == {torch.bfloat16}
        assert traffic["loss error"] < 0.02
        assert traffic["error"] < 0.02 * traffic["scale"]


# Under the compiler, and on paper.


def _compiled() -> float:
    """A mixture in one graph, its exchange in it."""
    config = model_of("expert choice", pattern="dense")
    model = lively(config, dtype=torch.float32)
    apply_expert_parallel(model, meshes_of(1, 2).expert)
    inner = model.mixtures[0].inner
    torch.manual_seed(dist.get_rank())
    x_MD = torch.randn(16, DIM)
    outputs = []
    for call in (inner, torch.compile(inner, fullgraph=True, dynamic=False, backend="aot_eager")):
        leaf_MD = x_MD.clone().requires_grad_()
        y_MD = call(leaf_MD, None)
        y_MD.square().sum().backward()
        outputs.append([y_MD, leaf_MD.grad, *(p.grad.to_local() for p in inner.parameters())])
        inner.zero_grad()
    return max(_distance(one, other) for one, other in zip(*outputs, strict=True))


@pytest.mark.slow
def test_static_shapes_compile_into_one_graph():
    assert max(on_ranks(_compiled, 2)) < TOLERANCE


def _on_paper() -> list[tuple[int, ...]]:
    dist.init_process_group("fake", rank=3, world_size=8, store=FakeStore())
    mesh = init_device_mesh("cpu", (8,))
    with FakeTensorMode():
        sharded = ExpertMLPs(16, 6, 5, "gelu")
        spread_experts(sharded, mesh, Group.of(mesh))
        x_MD = torch.empty(80, 6, requires_grad=True)
        shapes = []
        for offsets_E in (None, torch.empty(16, dtype=torch.int32)):
            y_MD = sharded(x_MD, offsets_E)
            y_MD.sum().backward()
            shapes += [tuple(y_MD.shape), tuple(sharded.up.grad.to_local().shape)]
    return shapes


def test_shapes_are_known_without_numbers():
    (shapes,) = on_ranks(_on_paper, 1, joins=False)
    assert shapes == [(80, 6), (2, 6, 5)] * 2
