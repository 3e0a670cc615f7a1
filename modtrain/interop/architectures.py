"""Which Hugging Face architecture a model is, and its configuration there.

A dense model of Llama's shape is a plain Llama, Mistral, Qwen2 or Qwen3, which loads in any program
that knows these. Everything else that decides causally is a `modtrain.interop.remote_code` model.
The tables serve `modtrain import` in the other direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from modtrain.common.errors import Problem
from modtrain.models.config import ModelConfig

LLAMA, MISTRAL, QWEN2, QWEN3, OWN = "llama", "mistral", "qwen2", "qwen3", "modtrain"
FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "initializer_range": "init_std",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}
"""Keys of every architecture's configuration, and the fields of `ModelConfig` that they are."""
ROPE_FIELDS: dict[str, dict[str, str]] = {
    "none": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_max_position_embeddings": "original_positions",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original_positions",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
        "truncate": "truncate",
    },
}
"""By scaling, keys of ``rope_parameters`` and the fields of `RopeScalingConfig` that they are."""
_DEFAULT_ROPE = {"none": "default"}
# A field that may be null, and the property with the value in its place.
_RESOLVED = {
    "vocab_size": "vocabulary",
    "d_ff": "ff_width",
    "num_kv_heads": "kv_heads",
    "head_dim": "head_width",
    "init_std": "weight_std",
}


def architecture(model: ModelConfig) -> str:
    """Return the ``model_type`` of the model's Hugging Face configuration."""
    is_plain = (
        not model.is_routed
        and not model.expert_labels
        and model.activation == "swiglu"
        and set(model.mixers) == {"attention"}
    )
    # Qwen3 with biases has one on the output of attention too.
    if not is_plain or (model.qk_norm and model.qkv_bias):
        return OWN
    if model.qk_norm:
        return QWEN3
    if model.qkv_bias:
        return QWEN2
    if model.sliding_window is not None:
        return MISTRAL
    # A Llama's width is a multiple of its heads.
    return LLAMA if model.d_model % model.num_heads == 0 else OWN


def export_problems(model: ModelConfig) -> list[Problem]:
    """Find why the model cannot decide causally, which is what an exported model does."""
    if not model.is_routed:
        return []
    router = model.router
    if not model.causal_selections:
        reason = "leaves the model without a causal decision"
        remedy = "train with router.causal=[predictor]"
        return [Problem("model.router.causal", "[]", reason, remedy)]
    looking = [name for name in model.causal_selections if router.needs_scores(name)]
    if router.score == "oracle_norm" and looking:
        reason = f"needs the whole sequence, for the decision {looking[0]} or for the gate"
        remedy = "train with router.gate=none and router.causal=[predictor]"
        return [Problem("model.router.score", router.score, reason, remedy)]
    return []


def architecture_config(
    model: ModelConfig, max_positions: int, end_id: int, capacities: Sequence[float | None]
) -> dict[str, Any]:
    """Return the values of the model's Hugging Face configuration.

    max_positions: tokens of the longest text. end_id: the end-of-document token, which also begins
    a text. capacities: of each layer at the checkpoint.
    """
    values: dict[str, Any] = {
        **{key: getattr(model, _RESOLVED.get(name, name)) for key, name in FIELDS.items()},
        "max_position_embeddings": max_positions,
        "rope_parameters": _rope_parameters(model),
        "bos_token_id": end_id,
        "eos_token_id": end_id,
    }
    kind = architecture(model)
    if kind == OWN:
        return values | _own_values(model, capacities)
    if kind == MISTRAL:
        return values | {"sliding_window": model.sliding_window}
    if kind in (QWEN2, QWEN3) and model.sliding_window is not None:
        window = {"use_sliding_window": True, "sliding_window": model.sliding_window}
        return values | window | {"layer_types": ["sliding_attention"] * model.num_layers}
    return values


def _rope_parameters(model: ModelConfig) -> dict[str, Any]:
    scaling = model.rope_scaling
    kind = _DEFAULT_ROPE.get(scaling.name, scaling.name)
    values = {key: getattr(scaling, name) for key, name in ROPE_FIELDS[scaling.name].items()}
    given = {key: value for key, value in values.items() if value is not None}
    return {"rope_type": kind, "rope_theta": model.rope_theta, **given}


def _own_values(model: ModelConfig, capacities: Sequence[float | None]) -> dict[str, Any]:
    values: dict[str, Any] = {
        "sliding_window": model.sliding_window,
        "qk_norm": model.qk_norm,
        "attention_bias": model.qkv_bias,
        "gated_mlp": model.activation == "swiglu",
        "layer_mixers": model.mixers,
        "conv_width": model.conv_width,
        "layer_capacities": list(capacities),
        "layer_experts": [model.has_experts(layer) for layer in range(model.num_layers)],
    }
    return values | _router_values(model) | _expert_values(model)


def _router_values(model: ModelConfig) -> dict[str, Any]:
    if not model.is_routed:
        return {}
    router = model.router
    needs_whole_text = router.score in ("attention", "oracle_norm")
    return {
        "routed_part": router.target,
        "keep_kv": router.keep_kv,
        "router_score": "none" if needs_whole_text else router.score,
        "router_hidden_size": router.hidden_dim,
        "router_input_norm": router.norms_input,
        "decisions": list(router.causal_routers) if router.needs_causal else ["position"],
        "predictor_hidden_size": router.predictor_dim,
        "gate": router.gate_kind,
        "gate_multiplier": router.gate_factor,
        "gate_offset": router.gate_offset,
        "gate_scale": router.gate_scale,
    }


def _expert_values(model: ModelConfig) -> dict[str, Any]:
    experts = model.experts
    if experts.count is None:
        return {}
    return {
        "num_experts": experts.count,
        "num_experts_per_tok": experts.top_k,
        "num_noop_experts": experts.noop,
        "num_shared_experts": experts.shared,
        "moe_intermediate_size": experts.width(model.ff_width),
        "expert_choice": experts.choice,
        "expert_bias": experts.balance_kind == "bias",
    }
