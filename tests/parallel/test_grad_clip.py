"""The norm of gradients in pieces, and clipping by it, against the whole ones in one process."""

import math

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from modtrain.parallel.grad_clip import clip
from tests.helpers.ranks import on_ranks

# By name: shape, mesh and placements; None is a plain tensor. Uneven, and pieces that are empty.
_PIECES = {
    "plain": ((5,), None, None),
    "over all": ((7, 2), "flat", [Shard(0)]),
    "one row": ((1, 6), "flat", [Shard(0)]),
    "copies of halves": ((5, 3), "square", [Replicate(), Shard(0)]),
    "over both axes": ((6, 4), "square", [Shard(0), Shard(1)]),
    "halves, unknown to the others": ((3, 4), "inner", [Shard(1)]),
    "without a gradient": ((2,), "flat", [Shard(0)]),
}


def _wholes(scale=1.0):
    generator = torch.Generator().manual_seed(1)
    return {name: scale * torch.randn(p[0], generator=generator) for name, p in _PIECES.items()}


def _parameters(scale=1.0):
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    meshes = {"flat": init_device_mesh("cpu", (4,)), "square": square, "inner": square["inner"]}
    parameters = {}
    for name, whole in _wholes(scale).items():
        _, mesh, placements = _PIECES[name]
        gradient = whole if mesh is None else distribute_tensor(whole, meshes[mesh], placements)
        parameters[name] = nn.Parameter(torch.zeros_like(gradient))
        if name != "without a gradient":
            parameters[name].grad = gradient
    return parameters


def _clips(limit, scale):
    parameters = _parameters(scale)
    norm = clip(parameters.values(), limit)
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    wholes = {
        name: grad if name == "plain" else grad.full_tensor() for name, grad in gradients.items()
    }
    assert type(norm) is torch.Tensor and norm.shape == () and norm.dtype == torch.float32
    # Tensors would be sent by reference, and a rank that has ended has none.
    return float(norm), {name: whole.numpy() for name, whole in wholes.items()}


@pytest.mark.parametrize(("limit", "scale"), [(0.5, 1.0), (1e6, 1.0), (None, 1.0), (0.5, 1e15)])
def test_pieces_are_clipped_as_the_whole(limit, scale):
    wholes = _wholes(scale)
    del wholes["without a gradient"]
    parameters = [nn.Parameter(torch.zeros_like(whole)) for whole in wholes.values()]
    for parameter, whole in zip(parameters, wholes.values(), strict=True):
        parameter.grad = whole
    norm = nn.utils.clip_grad_norm_(parameters, math.inf if limit is None else limit)
    outcomes = on_ranks(_clips, 4, limit, scale)
    for norms, gradients in outcomes:
        assert norms == outcomes[0][0], "the same bits on every rank"
        assert norms == pytest.approx(float(norm), rel=1e-6)
        for name, whole in wholes.items():
            torch.testing.assert_close(torch.from_numpy(gradients[name]), whole)


def test_one_process_needs_no_group():
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    assert clip([parameter, nn.Parameter(torch.zeros(3))], 1.0) == 5
    torch.testing.assert_close(parameter.grad, torch.tensor([0.6, 0.8]), atol=1e-6, rtol=0)
    assert clip([nn.Parameter(torch.zeros(3))], 1.0) == 0
    assert clip([], 1.0) == 0


def _clips_a_bad_one(bad):
    parameters = _parameters()
    piece = parameters["over all"].grad.to_local()
    if torch.distributed.get_rank() == 2:
        piece[0, 0] = bad
    return float(clip(parameters.values(), None))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_on_one_rank_shows_on_all(bad):
    for norm in on_ranks(_clips_a_bad_one, 4, bad):
        assert math.isnan(norm) if math.isnan(bad) else norm == math.inf
