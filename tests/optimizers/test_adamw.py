import torch

from modtrain.models.config import ModelConfig
from modtrain.models.transformer import Transformer
from modtrain.optimizers.config import OptimizerConfig
from modtrain.optimizers.registry import build_optimizer


def test_matrices_decay_and_vectors_do_not():
    model = Transformer(ModelConfig(d_model=32, num_layers=2, num_heads=2, vocab_size=20))
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
    model = Transformer(
        ModelConfig(d_model=32, num_layers=2, num_heads=2, vocab_size=20, tie_embeddings=True)
    )
    groups = build_optimizer(model, OptimizerConfig()).param_groups
    given = [id(p) for group in groups for p in group["params"]]
    assert sorted(given) == sorted(id(p) for p in model.parameters())
