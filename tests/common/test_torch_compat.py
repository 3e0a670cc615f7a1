"""What stands in for what a version of torch lacks does the same."""

from importlib.metadata import version

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch.nn import functional as F

from modtrain.common import torch_compat
from modtrain.models.config import ModelConfig
from modtrain.models.experts.config import ExpertsConfig
from modtrain.parallel import validation
from modtrain.parallel.config import StrategyConfig
from modtrain.parallel.dims import ParallelDims
from tests.helpers.ranks import on_ranks


def _exchanges() -> list[tuple[list, list]]:
    group = dist.group.WORLD.group_name
    x = torch.arange(8.0).view(2, 4) + dist.get_rank()
    both = []
    names = (
        ("all_gather_single", "all_gather_tensor", (1,)),
        ("reduce_scatter_single", "reduce_scatter_tensor", ("sum", 1)),
    )
    for name, older, more in names:
        ours = getattr(torch_compat, name)(x, *more, group)
        there = getattr(collectives, older)(x, *more, group)
        both.append(tuple(collectives.wait_tensor(y).tolist() for y in (ours, there)))
    return both


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_collectives_of_either_name_do_the_same():
    for exchanges in on_ranks(_exchanges, 2):
        for ours, expected in exchanges:
            assert ours == expected


def test_a_limit_of_graphs_is_set_whichever_way_torch_takes_it(monkeypatch):
    monkeypatch.setattr(torch_compat, "HAS_ISOLATED_RECOMPILES", False)
    # Not by the monkeypatch, which would leave a configuration without the key.
    with torch._dynamo.config.patch(recompile_limit=8):
        assert torch_compat.compile_options(9) == {}
        assert torch._dynamo.config.recompile_limit >= 9


def _greater_of_neighbours(x_BCHW, kernel):
    y_BCHW = F.interpolate(x_BCHW, scale_factor=(1.5, 1.25), mode="bilinear")[..., 1:7, 1:8]
    y_BCHW = F.conv2d(y_BCHW, kernel, padding=1)
    greatest_BCHW = F.max_pool2d(y_BCHW, 3, stride=1, padding=1)
    is_above_mean = y_BCHW > greatest_BCHW.mean(dim=(2, 3), keepdim=True)
    return torch.where(is_above_mean, y_BCHW, greatest_BCHW)


@pytest.mark.slow
def test_a_compiled_kernel_reads_a_buffer_after_what_writes_it_in_place():
    """Of torch 2.13 alone the gradients are wrong: fusing forgets the order."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 6, 7), (4, 3, 3, 3))
    inputs = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    options = torch_compat.compile_options(8)
    functions = (_greater_of_neighbours, torch.compile(_greater_of_neighbours, **options))
    eager, compiled = (torch.autograd.grad(f(*inputs).square().sum(), inputs) for f in functions)
    for ours, expected in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-3, rtol=1e-4)


def _keeps_buffers() -> bool:
    wrapped = torch.nn.parallel.DistributedDataParallel(
        torch.nn.BatchNorm1d(2), **torch_compat.ddp_buffer_options()
    )
    return not wrapped.broadcast_buffers


def test_ddp_leaves_buffers_alone_by_either_name(monkeypatch):
    assert on_ranks(_keeps_buffers, 1) == [True]

    def older(module, broadcast_buffers=True):
        raise NotImplementedError

    monkeypatch.setattr(torch_compat, "DistributedDataParallel", older)
    assert torch_compat.ddp_buffer_options() == {"broadcast_buffers": False}


def test_experts_cannot_be_spread_before_torch_has_what_it_takes(monkeypatch):
    config = StrategyConfig(name="fsdp_ep", expert_parallel=2)
    model = ModelConfig(experts=ExpertsConfig(count=4))
    dims = ParallelDims(2, shard=2, expert=2)
    monkeypatch.setattr(validation, "torch_release", lambda: (2, 12))
    assert validation.expert_problems(config, "strategy", model, dims) == []
    monkeypatch.setattr(validation, "torch_release", lambda: (2, 11))
    (problem,) = validation.expert_problems(config, "strategy", model, dims)
    assert problem.key == "strategy.expert_parallel"
    assert version("torch") in problem.reason
