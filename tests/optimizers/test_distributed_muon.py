"""Muon on matrices in pieces: the step of one process, and checkpoints from layout to layout."""

from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor, Replicate

from modtrain.checkpoint.checkpointer import Checkpointer
from modtrain.checkpoint.recovery import recover
from modtrain.checkpoint.state import named_state, restore
from modtrain.distributed.process_group import Ranks
from modtrain.models.transformer import Transformer
from modtrain.optimizers.config import MuonConfig, OptimizerConfig
from modtrain.optimizers.registry import build_optimizer
from modtrain.parallel.config import LayerOptions
from modtrain.parallel.dims import ParallelDims
from modtrain.parallel.meshes import make_meshes
from modtrain.parallel.parallelize import parallelize
from tests.helpers.model_cases import small
from tests.helpers.ranks import on_ranks

# Rows that three ranks have in unequal pieces, and more matrices than ranks.
MODEL = small(num_layers=3, pattern="dense", num_heads=4, num_kv_heads=2, d_ff=28)
CONFIG = OptimizerConfig(name="muon", lr=1e-3, eps=1e-3, muon=MuonConfig(lr=3e-3, weight_decay=0.3))
LAYOUTS = {
    "one": None,
    "fsdp 2": ParallelDims(2, shard=2),
    "fsdp 3": ParallelDims(3, shard=3),
    "hsdp 2x2": ParallelDims(4, replicate=2, shard=2),
    "fsdp_tp 1x2": ParallelDims(2, tensor=2),
    "fsdp_tp 2x2": ParallelDims(4, shard=2, tensor=2),
    "fsdp_cp_tp 1x2x2": ParallelDims(4, context=2, tensor=2),
}


def _model_and_muon(dims, seed=0):
    model = Transformer(MODEL, seed)
    if dims is not None:
        parallelize(model, make_meshes(dims), LayerOptions())
    return model, build_optimizer(model, CONFIG)


def _world_size(dims):
    return 1 if dims is None else dims.world_size


def _learn(optimizer, steps):
    """Step with gradients that are the same in every layout, to the bit.

    Rounding of a sum over ranks would grow: the iteration is steep for small singular values.
    """
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                whole = torch.randn(parameter.shape, generator=generator)
                parameter.grad = _laid_out(whole, parameter)
        optimizer.step()


def _laid_out(whole, parameter):
    if not isinstance(parameter, DTensor):
        return whole
    mesh = parameter.device_mesh
    everywhere = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim)
    return everywhere.redistribute(placements=parameter.placements)


def _whole(model, optimizer):
    tensors = named_state(model, optimizer)[0]
    return {
        key: (value.full_tensor() if isinstance(value, DTensor) else value).detach().numpy().copy()
        for key, value in tensors.items()
    }


def _steps(dims):
    model, optimizer = _model_and_muon(dims)
    _learn(optimizer, range(3))
    return _whole(model, optimizer)


def _assert_close(actual, wanted):
    assert actual.keys() == wanted.keys()
    for key, value in wanted.items():
        assert abs(actual[key] - value).max() <= 1e-7 * max(1, abs(value).max()), key


@pytest.mark.on_commit("fsdp 3", "fsdp_tp 1x2")
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
def test_a_step_of_many_ranks_is_that_of_one_process(layout):
    dims = LAYOUTS[layout]
    alone = _steps(None)
    for actual in on_ranks(_steps, dims.world_size, dims):
        _assert_close(actual, alone)


def _saves(root, dims):
    """Save at the second step, and return the state of the third."""
    model, optimizer = _model_and_muon(dims)
    _learn(optimizer, range(2))
    tensors, rest = named_state(model, optimizer)
    with Checkpointer(Ranks.create()) as checkpointer:
        checkpointer.save(Path(root) / "step-000000002", tensors, rest, 2, None)
    saved = _whole(model, optimizer)
    _learn(optimizer, [2])
    return saved, _whole(model, optimizer)


def _resumes(root, dims):
    model, optimizer = _model_and_muon(dims, seed=1)
    ranks = Ranks.create()
    _, path = recover(Path(root), ranks)
    restore(path, model, optimizer, ranks)
    restored = _whole(model, optimizer)
    _learn(optimizer, [2])
    return restored, _whole(model, optimizer)


@pytest.mark.on_commit(1)
@pytest.mark.parametrize(
    ("before", "after"), [("fsdp 2", "fsdp_tp 1x2"), ("fsdp_tp 1x2", "fsdp 2"), ("one", "fsdp 3")]
)
def test_a_checkpoint_resumes_under_another_layout(tmp_path, before, after):
    first, second = (LAYOUTS[name] for name in (before, after))
    saved, ended = on_ranks(_saves, _world_size(first), str(tmp_path), first)[0]
    for restored, actual in on_ranks(_resumes, _world_size(second), str(tmp_path), second):
        assert any(key.endswith("momentum_buffer") for key in saved)
        assert restored.keys() == saved.keys()
        assert all((restored[key] == saved[key]).all() for key in saved)
        _assert_close(actual, ended)


def _resumes_itself(root, dims):
    return _saves(root, dims), _resumes(root, dims)


def test_a_resume_is_bitwise_equal(tmp_path):
    for saved, resumed in on_ranks(_resumes_itself, 2, str(tmp_path), LAYOUTS["fsdp 2"]):
        for one, other in zip(saved, resumed, strict=True):
            assert all((one[key] == other[key]).all() for key in one)
