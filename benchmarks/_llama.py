"""A dense model as the Llama of Hugging Face that computes the same."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from modtrain.models.transformer import Transformer

_PARTS = {
    "attention.norm.gain": "input_layernorm.weight",
    "attention.q.weight": "self_attn.q_proj.weight",
    "attention.k.weight": "self_attn.k_proj.weight",
    "attention.v.weight": "self_attn.v_proj.weight",
    "attention.out.weight": "self_attn.o_proj.weight",
    "mlp.norm.gain": "post_attention_layernorm.weight",
    "mlp.inner.gate.weight": "mlp.gate_proj.weight",
    "mlp.inner.up.weight": "mlp.up_proj.weight",
    "mlp.inner.down.weight": "mlp.down_proj.weight",
}


def as_llama(model: Transformer, max_positions: int) -> Any:
    """Return a ``LlamaForCausalLM`` with the weights of ``model``: dense, SwiGLU, no QK-norm."""
    config = model.config
    llama: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocabulary,
            hidden_size=config.d_model,
            intermediate_size=config.ff_width,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_width,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tie_embeddings,
            max_position_embeddings=max_positions,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    ours = model.state_dict()
    theirs = {
        "model.embed_tokens.weight": ours["embedding.weight"],
        "model.norm.weight": ours["norm.gain"],
        "lm_head.weight": ours["head.weight"],
    }
    for layer in range(config.num_layers):
        for own, name in _PARTS.items():
            theirs[f"model.layers.{layer}.{name}"] = ours[f"layers.{layer}.module.{own}"]
    with torch.no_grad():
        llama.load_state_dict(theirs)
    return llama.eval()
