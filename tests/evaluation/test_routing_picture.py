"""The picture of the routing: its size, its colours, and what it does with odd scores."""

import pytest
import torch

from modtrain.evaluation.routing_picture import routing_picture
from modtrain.models.sequence import RoutingRecord

ROUTED = torch.tensor([0x1F, 0x5F, 0xA8], dtype=torch.uint8)


def picture(scores, chosen):
    return routing_picture(["layer_01"], [RoutingRecord(scores, chosen)])


def num_routed(image):
    return int((image == ROUTED).all(dim=-1).sum())


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e30])
def test_as_many_cells_as_routed_tokens_have_the_colour_of_the_legend(scale):
    scores = torch.randn(2, 32) * scale
    none, some, more = (torch.zeros(2, 32, dtype=torch.bool) for _ in range(3))
    some[0, :4] = True
    some[1] = True  # of another sequence
    more[0, :8] = True
    legend, few, many = (num_routed(picture(scores, chosen)) for chosen in (none, some, more))
    assert legend > 0
    assert few - legend == pytest.approx((many - legend) / 2, rel=0.05)
