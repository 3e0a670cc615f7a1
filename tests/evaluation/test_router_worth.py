from contextlib import nullcontext

import pytest
import torch

from modtrain.data.stream.batch import Batch
from modtrain.evaluation.router_worth import router_worth
from modtrain.models.depth.config import RouterSwap
from tests.helpers.model_cases import VOCAB, lively, random_tokens, small

SWAPS = [RouterSwap("zero"), RouterSwap("random"), RouterSwap("zero", routers=(0,))]


@pytest.mark.slow
def test_losses_and_intervals_are_those_of_a_slow_loop():
    model = lively(small(num_layers=4, pattern="every_other", capacity=0.25)).eval()
    tokens_BS = random_tokens(5, 17) % VOCAB
    batches = [Batch.from_tokens(part) for part in tokens_BS.split([3, 2])]
    worth = router_worth(model, batches, nullcontext(), "predictor", SWAPS)
    assert worth.num_sequences == 5
    assert list(worth.swaps) == SWAPS
    zero = worth.swaps[SWAPS[0]]
    losses = {}
    for swap in (None, SWAPS[0]):
        with torch.no_grad():
            values = [
                float(model(row[None, :-1], row[None, 1:], "predictor", swap=swap).loss)
                for row in tokens_BS
            ]
        losses[swap] = torch.tensor(values, dtype=torch.float64)
    assert worth.loss == pytest.approx(float(losses[None].mean()))
    assert zero.loss == pytest.approx(float(losses[SWAPS[0]].mean()))
    assert zero.change == pytest.approx(zero.loss / worth.loss - 1)
    assert zero.low <= zero.change <= zero.high
    # About two standard errors of the paired differences.
    error = (losses[SWAPS[0]] - losses[None]).std() / 5**0.5 / worth.loss
    assert zero.high - zero.low == pytest.approx(float(4 * error), rel=0.5)


def test_without_a_sequence_there_is_an_error():
    with pytest.raises(ValueError, match="no held-out batches"):
        router_worth(lively(small()), [], nullcontext(), "predictor", SWAPS)
