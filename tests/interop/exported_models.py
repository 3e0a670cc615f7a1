"""Models of every family beside what they are exported as, with weights far from their start."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modtrain.inference.config import SamplingConfig
from modtrain.inference.generate.decoder import Decoder, DecoderConfig, Token
from modtrain.interop.architectures import architecture_config
from modtrain.interop.folder import hugging_face_model
from modtrain.models.config import ModelConfig
from modtrain.models.depth.config import RouterConfig
from modtrain.models.rope.config import RopeScalingConfig
from modtrain.models.transformer import Transformer
from tests.helpers.model_cases import (
    MODELS,
    VOCAB,
    balance_predictors,
    lively,
    random_tokens,
    settle,
    small,
)

LENGTH = 24

PLAIN = {
    "llama": small(pattern="dense", num_heads=4, num_kv_heads=2, num_layers=2),
    "llama with wide heads and a tied head": small(
        pattern="dense", num_layers=2, head_dim=12, tie_embeddings=True, rope_theta=500.0
    ),
    "mistral": small(pattern="dense", num_layers=2, sliding_window=5),
    "qwen2": small(pattern="dense", num_heads=4, num_kv_heads=2, num_layers=2, qkv_bias=True),
    "qwen2 in a window": small(pattern="dense", num_layers=2, qkv_bias=True, sliding_window=5),
    "positions divided": small(
        pattern="dense", num_layers=2, rope_scaling=RopeScalingConfig("linear", 3.0)
    ),
    "positions scaled as Llama 3": small(
        pattern="dense",
        num_layers=2,
        head_dim=16,
        rope_theta=50.0,
        rope_scaling=RopeScalingConfig("llama3", 8.0, 16, 0.5, 2.0),
    ),
    "positions scaled by YaRN": small(
        pattern="dense",
        num_layers=2,
        head_dim=16,
        qk_norm=True,
        rope_theta=100.0,
        rope_scaling=RopeScalingConfig("yarn", 4.0, 16, beta_fast=4.0),
    ),
    "qwen3": MODELS["dense"],
    "qwen3 in a window": small(pattern="dense", num_layers=2, qk_norm=True, sliding_window=5),
}
OWN = {
    "routed, with biases and scaled positions": small(
        num_layers=2,
        qkv_bias=True,
        qk_norm=True,
        router=RouterConfig(causal=["threshold"]),
        rope_scaling=RopeScalingConfig("yarn", 4.0, 16, attention_factor=1.3, truncate=False),
    ),
    **{name: config for name, config in MODELS.items() if name != "dense"},
    "dense with a GELU": small(pattern="dense", num_layers=2, activation="gelu"),
    "dense convolution": small(
        pattern="dense", num_layers=2, mixer=["attention", "convolution"], conv_width=3
    ),
    "heads that do not divide the width": small(
        pattern="dense", num_layers=2, d_model=14, num_heads=4, head_dim=6
    ),
    "routed attention": small(
        router=RouterConfig(target="attention", input_norm=True, gate="tanh", gate_offset=0.5)
    ),
    "routed MLPs": small(
        capacity=0.5, router=RouterConfig(target="mlp", gate="raw", gate_multiplier=2.0)
    ),
    "scaled by a scalar alone": small(router=RouterConfig(gate="none", gate_scale=True)),
    "scored by attention": small(router=RouterConfig(score="attention", causal=["predictor"])),
    "random": small(router=RouterConfig(score="random", gate="sigmoid")),
    "random for each part": small(num_layers=2, router=RouterConfig(score="random", target="both")),
    "evenly spaced": small(
        pattern=[1, 0.3, 1, 0.15], router=RouterConfig(score="fixed", gate="raw", gate_offset=0.2)
    ),
}


class Exported(NamedTuple):
    """A model, and what it is exported as."""

    ours: Transformer
    theirs: PreTrainedModel


def make_exported(config: ModelConfig, seed: int = 0) -> Exported:
    """A model whose routers take some tokens and leave others, in fp32."""
    ours = settle(lively(config, seed, torch.float32), LENGTH).eval()
    if config.is_routed and "predictor" in config.router.causal_routers:
        balance_predictors(ours, random_tokens(4, LENGTH, 1))
    values = architecture_config(config, 64, 0, config.capacities)
    theirs = hugging_face_model(ours, values)
    # One that no text has: the texts of a test have one length, and none of it is padding.
    theirs.generation_config.eos_token_id = theirs.generation_config.pad_token_id = 10 * VOCAB
    return Exported(ours, theirs)


@cache
def exported(name: str) -> Exported:
    """The exported model of a case; tests leave it as it is."""
    return make_exported((PLAIN | OWN)[name])


def pad_left(prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask (B, S)."""
    length = max(map(len, prompts))
    ids = torch.zeros(len(prompts), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    return ids, mask


def greedy(model: Transformer, prompts: list[list[int]], count: int) -> list[list[int]]:
    """What modtrain continues the prompts with."""
    selection = model.config.causal_selections[0]
    sampling = SamplingConfig(greedy=True)
    config = DecoderConfig(selection, max_tokens=count, sampling=sampling, batch_size=len(prompts))
    texts: list[list[int]] = [[] for _ in prompts]
    for event in Decoder(model, config, prompts).run():
        if isinstance(event, Token):
            texts[event.number].append(event.id)
    return texts
