"""What ranks exchange within a layer, compiled."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from modtrain.distributed.collectives import Group
from tests.helpers.ranks import on_ranks

EXCHANGES = {
    "scatter_seq": Group.scatter_seq,
    "gather_seq of all": lambda group, x: group.gather_seq(x, 8),
    "gather_seq": lambda group, x: group.gather_seq(x, 7),
    "gather_seq_sum_grad of all": lambda group, x: group.gather_seq_sum_grad(x, 8),
    "gather_seq_sum_grad": lambda group, x: group.gather_seq_sum_grad(x, 7),
    "reduce_scatter_seq": Group.reduce_scatter_seq,
    "copy_sum_grad": Group.copy_sum_grad,
    "sum_copy_grad": Group.sum_copy_grad,
    "scale_grad": Group.scale_grad,
}


def _compiled_and_eager():
    group = Group.of(init_device_mesh("cpu", (2,)))
    pairs = {}
    for name, exchange in EXCHANGES.items():
        # One sequence's chunk is contiguous as it is, which copies nothing.
        for batch in (1, 2):
            torch.compiler.reset()  # all are one function to its limit of graphs
            torch.manual_seed(group.rank)
            x_BSD, weight = torch.randn(batch, 4, 3), torch.randn(batch, 8, 3)

            def function(x_BSD, exchange=exchange):
                return exchange(group, x_BSD.sin()).cos()

            results = []
            compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=False)
            for each in (compiled, function):
                leaf = x_BSD.clone().requires_grad_()
                y = each(leaf)
                (y * weight[:, : y.shape[1]]).sum().backward()
                results.append((y.detach().numpy(), leaf.grad.numpy()))
            pairs[name, batch] = results
    return pairs


@pytest.mark.slow
def test_compiled_exchanges_have_the_eager_gradients():
    """Torch 2.11 compiles the gradient of an autograd function that returns a view to zero."""
    for pairs in on_ranks(_compiled_and_eager, 2):
        for case, ((y, gradient), (wanted_y, wanted)) in pairs.items():
            assert y == pytest.approx(wanted_y, abs=1e-6), case
            assert gradient == pytest.approx(wanted, abs=1e-6), case
            assert abs(wanted).max() > 0, case
