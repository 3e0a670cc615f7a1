"""Initial weights: reproducible per parameter, and scaled with depth.

- Linear weights and the embedding: normal, standard deviation ``init_std``, by default
  ``sqrt(2 / (5 d_model))`` (arXiv 1910.05895, section 2.2): a constant that suits one width leaves
  narrower models on a plateau for hundreds of steps.
- Projections that write to the residual stream (the last of mixers, MLPs and experts):
  ``init_std / sqrt(2 · num_layers)``, so that the stream's variance at the last block does not
  depend on depth (GPT-2's rule).
- Depth routers' weights: normal, ``1 / sqrt(fan in)``, so that scores have the scale of their
  input. A convolution's taps: normal, ``1 / sqrt(conv_width)``, so that it keeps its input's scale.
- Gains and scales 1, biases 0.

Each parameter has its own generator, seeded by (seed, name): adding a router or a predictor changes
no other parameter, and a dense and a routed model of one seed start from the same trunk. Torch's
global random state is neither used nor changed.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import nn

from modtrain.models.config import ModelConfig

_RESIDUAL_WRITERS = ("attention.out.weight", "down.weight", "mlp.down")
# Names of wrapper modules, left out so that a dense model of the same seed has the same names.
_WRAPPERS = (".module.", ".inner.")


def initialise(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Set every parameter of ``model`` in place."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_meta:
                # A shape alone.
                continue
            canonical = canonical_name(name)
            if name.endswith(("gain", "scale")):
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                generator = torch.Generator(parameter.device).manual_seed(_seed(seed, canonical))
                std = standard_deviation(canonical, config)
                parameter.normal_(0.0, std, generator=generator)


def standard_deviation(name: str, config: ModelConfig) -> float:
    """Return the standard deviation from which the parameter ``name`` is drawn."""
    if name.endswith(_RESIDUAL_WRITERS):
        return config.weight_std / math.sqrt(2 * config.num_layers)
    if name.endswith("taps"):
        return 1 / math.sqrt(config.conv_width)
    if name.endswith(".router.out.weight"):
        return 1 / math.sqrt(config.router.hidden_dim)
    if name.endswith((".router.weight", ".router.hidden.weight")):
        return 1 / math.sqrt(config.d_model)
    return config.weight_std


def canonical_name(name: str) -> str:
    """Return a parameter's name without the modules that routing wraps around what it routes."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, ".")
    return name


def _seed(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)
