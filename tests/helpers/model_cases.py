"""Small models and inputs that the tests of this folder share."""

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from modtrain.models.config import ModelConfig
from modtrain.models.depth.config import RouterConfig
from modtrain.models.experts.config import ExpertsConfig
from modtrain.models.sequence import SequenceContext, sequence_context
from modtrain.models.transformer import Transformer
from tests.helpers.thresholds import midway

VOCAB = 48


def quick(examples: int) -> settings:
    """Few examples, the same ones on each run."""
    return settings(max_examples=examples, deadline=None, derandomize=True)


def small(**changes) -> ModelConfig:
    """A model of four layers, the second and fourth routed at a quarter."""
    values = {
        "d_model": 16,
        "num_layers": 4,
        "num_heads": 2,
        "vocab_size": VOCAB,
        "d_ff": 32,
        "capacity": 0.25,
        "router": RouterConfig(predictor_dim=8),
    }
    return ModelConfig(**(values | changes))


_CAUSAL = ["predictor", "auxiliary", "threshold"]
# One of every kind, for what has to hold of all.
MODELS = {
    "dense": small(pattern="dense", num_heads=4, num_kv_heads=2, num_layers=2, qk_norm=True),
    "mod": small(
        tie_embeddings=True,
        qk_norm=True,
        qkv_bias=True,
        router=RouterConfig(causal=_CAUSAL, predictor_dim=8, gate="sigmoid", gate_scale=True),
    ),
    "mod in a window": small(
        num_layers=2, capacity=0.6, sliding_window=5, router=RouterConfig(gate="tanh")
    ),
    "separately routed parts": small(
        num_layers=3,
        mixer=["convolution", "attention", "convolution"],
        activation="gelu",
        pattern=[1, 0.3, 0.3],
        router=RouterConfig(target="both", score="mlp", hidden_dim=6, causal=_CAUSAL),
        experts=ExpertsConfig(count=4, top_k=2, dim=8, every=2),
    ),
    "routed without a router": small(
        num_layers=4,
        pattern=[1, 0.3, 1, 0.5],
        router=RouterConfig(score="oracle_norm", gate="none", causal=["predictor"]),
    ),
    "staged": small(
        num_layers=2,
        router=RouterConfig(choice="token"),
        # No choice can get just a seventh of the tokens: its bias would move as rounding wills.
        experts=ExpertsConfig(count=4, noop=3, top_k=1, dim=12, shared=1, balance="bias"),
    ),
    "limited experts": small(
        num_layers=2,
        capacity=0.5,
        experts=ExpertsConfig(count=4, top_k=2, dim=8, capacity_factor=0.9, balance="loss"),
    ),
    "integrated": small(
        num_layers=2,
        pattern="dense",
        activation="gelu",
        experts=ExpertsConfig(count=4, top_k=2, dim=8, noop=2, shared=1, z_loss_weight=0.01),
    ),
    "expert choice": small(
        num_layers=2, experts=ExpertsConfig(count=4, top_k=2, dim=8, noop=1, choice="expert")
    ),
    "narrow expert choice": small(
        num_layers=2,
        activation="gelu",
        experts=ExpertsConfig(count=4, top_k=1, dim=8, choice="expert", capacity_factor=0.6),
    ),
    "mostly no-ops": small(
        num_layers=2,
        router=RouterConfig(causal=["predictor"], predictor_dim=8),
        experts=ExpertsConfig(count=4, top_k=1, dim=8, noop=9, balance="none", every=2),
    ),
    "kept keys": small(
        num_layers=2,
        capacity=0.4,
        num_heads=4,
        num_kv_heads=2,
        qk_norm=True,
        router=RouterConfig(target="both", keep_kv=True),
        experts=ExpertsConfig(count=4, top_k=1, dim=8, every=2),
    ),
}


def lively(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> Transformer:
    """A model far from its start: sharp attention, uneven gains, biases, predictors of ~ half."""
    model = Transformer(config, seed).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if name.endswith(("gain", "scale")):
                parameter.copy_(1 + 0.3 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(1.2 * noise / parameter.shape[-1] ** 0.5)
    return model


def balance_predictors(model: Transformer, tokens_BS: Tensor) -> None:
    """Move each predictor's bias so that it is positive for about half of ``tokens_BS``."""
    with torch.no_grad():
        for place, router in enumerate(model.routers):
            logits_BS = model(tokens_BS, selection="predictor").routing[place].predictor_BS
            router.predictor.out.bias -= midway(logits_BS)


def distinct_tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """Token ids (B, S) that are unique in their sequence, so that no two scores tie."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(VOCAB, generator=generator)[:length] for _ in range(batch)]
    return torch.stack(rows)


def random_tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, (batch, length), generator=generator)


def context_of(config: ModelConfig, positions_BS: Tensor, **changes) -> SequenceContext:
    """The context of tokens at these positions; ``changes`` are those of `sequence_context`."""
    return sequence_context(
        positions_BS,
        config.head_width,
        config.rope_theta,
        **({"window": config.sliding_window, "scaling": config.rope_scaling} | changes),
    )


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@st.composite
def configs(draw: st.DrawFn, max_layers: int = 4) -> ModelConfig:
    """Valid models over every choice of shape: heads, groups, widths, MLPs, windows, patterns."""
    num_kv_heads = draw(st.sampled_from([1, 2]))
    num_heads = num_kv_heads * draw(st.sampled_from([1, 2, 3]))
    head_dim = draw(st.sampled_from([None, 2, 6, 8]))
    d_model = num_heads * draw(st.sampled_from([2, 4, 8]))
    if head_dim is not None:
        d_model = draw(st.sampled_from([7, 12, 20]))
    num_layers = draw(st.integers(1, max_layers))
    capacity = st.sampled_from([0.05, 0.125, 0.3, 0.5, 0.85, 1.0])
    listed = st.lists(capacity, min_size=num_layers, max_size=num_layers)
    mixers = st.sampled_from(["attention", "convolution"])
    mixers = st.lists(mixers, min_size=num_layers, max_size=num_layers)
    patterns = st.sampled_from(["dense", "every", "every_other"]) | listed
    if num_layers % 2 == 0:
        patterns |= st.just(f"[1, .125]*{num_layers // 2}")
    return ModelConfig(
        d_model=d_model,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=draw(st.sampled_from([None, num_kv_heads])),
        head_dim=head_dim,
        vocab_size=VOCAB,
        d_ff=draw(st.sampled_from([None, 5, 24])),
        activation=draw(st.sampled_from(["swiglu", "gelu"])),
        tie_embeddings=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        sliding_window=draw(st.sampled_from([None, 1, 3, 9])),
        rope_theta=draw(st.sampled_from([100.0, 10000.0])),
        pattern=draw(patterns),
        capacity=draw(capacity),
        mixer=draw(st.sampled_from(["attention", "attention", "convolution"]) | mixers),
        conv_width=draw(st.sampled_from([1, 3])),
        router=draw(routers()),
        qkv_bias=draw(st.booleans()),
    )


@st.composite
def routers(draw: st.DrawFn) -> RouterConfig:
    """Learned routers with every target, gate and set of causal decisions."""
    causal = st.lists(
        st.sampled_from(["predictor", "auxiliary", "threshold"]), max_size=3, unique=True
    )
    return RouterConfig(
        target=draw(st.sampled_from(["block", "block", "attention", "mlp", "both"])),
        score=draw(st.sampled_from(["linear", "linear", "mlp"])),
        hidden_dim=draw(st.sampled_from([1, 6])),
        gate=draw(st.sampled_from([None, "raw", "sigmoid", "tanh", "none"])),
        gate_scale=draw(st.booleans()),
        causal=draw(causal),
        predictor_dim=draw(st.sampled_from([1, 7])),
    )


def settle(model: Transformer, length: int, batches: int = 3) -> Transformer:
    """Let the running thresholds and biases learn from a few batches."""
    for seed in range(batches):
        with torch.no_grad():
            output = model(random_tokens(4, length, 100 + seed))
            model.update_running_stats(model.batch_stats(output))
    return model


def bits(x: Tensor) -> Tensor:
    """The same memory as integers, in which 0.0 and -0.0 differ."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.detach().view(integers[x.element_size()])
