"""A dense model is a Llama: the weights of one in the other give the same logits."""

import pytest
import torch

from benchmarks._llama import as_llama
from tests.helpers.model_cases import lively, random_tokens, small


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_kv_heads": 1},
        {"head_dim": 6, "num_layers": 1},
        {"tie_embeddings": True, "rope_theta": 500.0, "norm_eps": 1e-3},
    ],
)
def test_a_dense_model_is_a_llama(changes):
    model = lively(small(pattern="dense", **changes), seed=1, dtype=torch.float32)
    tokens_BS = random_tokens(2, 20)
    with torch.no_grad():
        theirs_BSV = as_llama(model, 64)(tokens_BS).logits
        ours_BSV = model(tokens_BS).logits_BSV
    torch.testing.assert_close(ours_BSV, theirs_BSV, atol=1e-4, rtol=1e-4)
