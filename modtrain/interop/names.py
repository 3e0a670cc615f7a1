"""Names of weights here and in Hugging Face models. Shapes are the same on both sides.

A table has the names inside one module of a layer, ours to theirs. `weight_names` puts a model's
together; dense models of Llama's shape and the models of `modtrain.interop.remote_code` share them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from modtrain.models.config import ModelConfig
from modtrain.models.depth.layer import MixtureOfDepths
from modtrain.models.experts.layer import Experts
from modtrain.models.transformer import Transformer

OUTSIDE_LAYERS = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.gain": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
ATTENTION = {
    "norm.gain": "input_layernorm.weight",
    "q.weight": "self_attn.q_proj.weight",
    "k.weight": "self_attn.k_proj.weight",
    "v.weight": "self_attn.v_proj.weight",
    "out.weight": "self_attn.o_proj.weight",
}
QKV_BIAS = {
    "q.bias": "self_attn.q_proj.bias",
    "k.bias": "self_attn.k_proj.bias",
    "v.bias": "self_attn.v_proj.bias",
}
QK_NORM = {
    "q_norm.gain": "self_attn.q_norm.weight",
    "k_norm.gain": "self_attn.k_norm.weight",
}
CONVOLUTION = {
    "norm.gain": "input_layernorm.weight",
    "value.weight": "self_attn.value_proj.weight",
    "gate.weight": "self_attn.gate_proj.weight",
    "taps": "self_attn.taps",
    "out.weight": "self_attn.o_proj.weight",
}
MLP = {
    "norm.gain": "post_attention_layernorm.weight",
    "inner.gate.weight": "mlp.gate_proj.weight",
    "inner.up.weight": "mlp.up_proj.weight",
    "inner.down.weight": "mlp.down_proj.weight",
}
EXPERTS = {
    "norm.gain": "post_attention_layernorm.weight",
    "expert_router.weight": "mlp.router.weight",
    "inner.gate": "mlp.gate_proj",
    "inner.up": "mlp.up_proj",
    "inner.down": "mlp.down_proj",
}
SHARED_EXPERTS = {
    "shared.gate.weight": "mlp.shared.gate_proj.weight",
    "shared.up.weight": "mlp.shared.up_proj.weight",
    "shared.down.weight": "mlp.shared.down_proj.weight",
}
# Inside a router, which has a name for each part that it routes.
ROUTER_NAMES = {"block": "router", "attention": "attention_router", "mlp": "mlp_router"}
LINEAR_SCORE = {"router.weight": "weight"}
MLP_SCORE = {
    "router.hidden.weight": "scorer.hidden.weight",
    "router.hidden.bias": "scorer.hidden.bias",
    "router.out.weight": "scorer.out.weight",
    "router.out.bias": "scorer.out.bias",
}
PREDICTOR = {
    "predictor.hidden.weight": "predictor.hidden.weight",
    "predictor.hidden.bias": "predictor.hidden.bias",
    "predictor.out.weight": "predictor.out.weight",
    "predictor.out.bias": "predictor.out.bias",
}


def weight_names(config: ModelConfig) -> dict[str, str]:
    """Return the name in a Hugging Face model of each tensor of `portable_weights`."""
    names = dict(OUTSIDE_LAYERS)
    routed = set(config.routed_parts)
    for layer, capacity in enumerate(config.capacities):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        is_split = capacity is not None and config.router.target != "block"
        attention, mlp = (
            f"{ours}.{part}.module" if is_split else f"{ours}.module.{part}"
            for part in ("attention", "mlp")
        )
        names |= _prefixed(_mixer(config, layer), attention, theirs)
        names |= _prefixed(_feed_forward(config, layer), mlp, theirs)
        for part, router in ROUTER_NAMES.items():
            if (layer, part) in routed:
                place = f"{ours}.{part}" if is_split else ours
                names |= _prefixed(_router(config), place, f"{theirs}.{router}")
    return names


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a dense model with attention, without building it.

    A tied head is left out.
    """
    d, width = config.d_model, config.head_width
    query_dim, kv_dim = config.num_heads * width, config.kv_heads * width
    attention = {
        "norm.gain": (d,),
        **{
            f"{name}.weight": (rows, d)
            for name, rows in zip("qkv", (query_dim, kv_dim, kv_dim), strict=True)
        },
        "out.weight": (d, query_dim),
    }
    if config.qkv_bias:
        attention |= {"q.bias": (query_dim,), "k.bias": (kv_dim,), "v.bias": (kv_dim,)}
    if config.qk_norm:
        attention |= {"q_norm.gain": (width,), "k_norm.gain": (width,)}
    mlp = {"norm.gain": (d,), "inner.down.weight": (d, config.ff_width)}
    mlp |= {f"inner.{name}.weight": (config.ff_width, d) for name in ("gate", "up")}
    shapes: dict[str, tuple[int, ...]] = {
        "embedding.weight": (config.vocabulary, d),
        "norm.gain": (d,),
    }
    if not config.tie_embeddings:
        shapes["head.weight"] = (config.vocabulary, d)
    for layer in range(config.num_layers):
        for part, table in (("attention", attention), ("mlp", mlp)):
            shapes |= {f"layers.{layer}.module.{part}.{key}": shape for key, shape in table.items()}
    return shapes


def portable_weights(model: Transformer) -> dict[str, Tensor]:
    """Return the model's tensors by name, running sums replaced by the value in use.

    A router's ``threshold_sum`` and ``threshold_weight`` become ``threshold``; those of experts
    that choose become ``quantile``.
    """
    weights: dict[str, Tensor] = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, MixtureOfDepths) and module.has_running_stats:
            del weights[f"{name}.threshold_sum"], weights[f"{name}.threshold_weight"]
            weights[f"{name}.threshold"] = module.threshold()
        elif isinstance(module, Experts) and module.config.choice == "expert":
            del weights[f"{name}.quantile_sum"], weights[f"{name}.quantile_weight"]
            weights[f"{name}.quantile"] = module.quantile()
    return weights


def to_hugging_face(model: Transformer) -> dict[str, Tensor]:
    """Return the model's tensors by the names of its Hugging Face model."""
    return rename(portable_weights(model), weight_names(model.config))


def rename(weights: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the tensors by their new names.

    Raises:
        ValueError: ``weights`` and ``names`` differ in the names that they have.
    """
    if differing := sorted(weights.keys() ^ names.keys()):
        raise ValueError(f"tensors without a name, or names without a tensor: {differing}")
    return {names[name]: tensor for name, tensor in weights.items()}


def _prefixed(table: Mapping[str, str], ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.{name}": f"{theirs}.{other}" for name, other in table.items()}


def _mixer(config: ModelConfig, layer: int) -> dict[str, str]:
    if config.mixers[layer] == "convolution":
        return CONVOLUTION
    table = ATTENTION | (QKV_BIAS if config.qkv_bias else {})
    return table | (QK_NORM if config.qk_norm else {})


def _feed_forward(config: ModelConfig, layer: int) -> dict[str, str]:
    experts = config.experts
    if not config.has_experts(layer):
        table = MLP
    else:
        table = EXPERTS | (SHARED_EXPERTS if experts.shared else {})
        if experts.balance_kind == "bias":
            table = table | {"bias": "mlp.router.bias"}
        if experts.choice == "expert":
            table = table | {"quantile": "mlp.router.quantile"}
    return table if config.activation == "swiglu" else dict(_without_gate(table))


def _without_gate(table: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    return ((name, other) for name, other in table.items() if "gate_proj" not in other)


def _router(config: ModelConfig) -> dict[str, str]:
    router = config.router
    table = {"linear": LINEAR_SCORE, "mlp": MLP_SCORE}.get(router.score, {})
    if "predictor" in router.causal_routers:
        table = table | PREDICTOR
    if router.has_threshold:
        table = table | {"threshold": "threshold"}
    if router.gate_scale:
        table = table | {"gate.scale": "gate_scale"}
    return table
