"""Configuration of a model's architecture. Imports no torch, so that errors show at once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from modtrain.common.errors import Problem
from modtrain.common.validation import above_zero, at_least, broken_rules, one_of
from modtrain.models.depth.config import RouterConfig, Selection
from modtrain.models.depth.pattern import layer_capacities, pattern_problems
from modtrain.models.experts.config import ExpertsConfig
from modtrain.models.rope.config import RopeScalingConfig

ACTIVATIONS = ("swiglu", "gelu")
MIXERS = ("attention", "convolution")
# More is a mistake, and would exhaust the memory before any check.
MAX_LAYERS = 10_000


@dataclass
class ModelConfig:
    """A pre-norm, Llama-style decoder with depth routing.

    d_model: width of the residual stream.
    num_layers: number of blocks.
    num_heads: number of attention heads.
    vocab_size: rows of the embedding; null: the tokenizer's size.
    num_kv_heads: heads of keys and values (grouped-query attention); null: ``num_heads``.
    head_dim: width of a head; null: ``d_model / num_heads``.
    d_ff: hidden width of the MLP; null: 4 d for gelu, 8/3 d rounded up to 64 for swiglu.
    activation: of the MLP: ``swiglu`` or ``gelu``.
    tie_embeddings: the output head shares the embedding's weights.
    qk_norm: normalise queries and keys.
    qkv_bias: queries, keys and values have biases (Qwen2).
    mixer: mixes features between tokens: ``attention``, ``convolution`` (causal, depthwise), or a
        list with one of them per layer.
    sliding_window: number of positions that a token attends to, itself included; null: all.
    conv_width: number of tokens under a convolution, the token itself included.
    rope_theta: base of the rotary positions.
    norm_eps: epsilon of RMSNorm.
    init_std: standard deviation of the initial weights; null: ``sqrt(2 / (5 d_model))`` (see
        `modtrain.models.init`).
    pattern: which blocks are routed: ``dense``, ``every``, ``every_other``, ``all_but_ends``;
        graded ``cosine``, ``u_shape``, ``ramp_down``, ``ramp_up`` (see
        `modtrain.models.depth.pattern`);
        or a list with one capacity per layer in which 1 is a dense block, ``[1, 0.125]`` or
        ``"[1, .125]*6"``.
    capacity: the share of tokens routed through a block, in (0, 1]; the lowest of a graded pattern.
    loss_chunk: number of tokens whose logits are in memory at once in training; null: about 32
        million logits.
    """

    d_model: int = 256
    num_layers: int = 8
    num_heads: int = 4
    vocab_size: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    d_ff: int | None = None
    activation: str = "swiglu"
    tie_embeddings: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    mixer: Any = "attention"
    sliding_window: int | None = None
    conv_width: int = 4
    rope_theta: float = 10000.0
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    norm_eps: float = 1e-5
    init_std: float | None = None
    pattern: Any = "every_other"
    capacity: float = 0.125
    router: RouterConfig = field(default_factory=RouterConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    loss_chunk: int | None = None

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def ff_width(self) -> int:
        """Hidden width of the MLP."""
        if self.d_ff is not None:
            return self.d_ff
        if self.activation == "gelu":
            return 4 * self.d_model
        return 64 * -(-8 * self.d_model // (3 * 64))

    @property
    def weight_std(self) -> float:
        """Standard deviation of the initial weights (arXiv 1910.05895, section 2.2)."""
        return math.sqrt(2 / (5 * self.d_model)) if self.init_std is None else self.init_std

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding. Raises ValueError if ``vocab_size`` is not resolved."""
        if self.vocab_size is None:
            raise ValueError("model.vocab_size is not set; resolve it from the tokenizer first")
        return self.vocab_size

    @property
    def capacities(self) -> list[float | None]:
        """The capacity of each layer; None for a dense layer."""
        return layer_capacities(self.pattern, self.capacity, self.num_layers)

    @property
    def is_routed(self) -> bool:
        """Whether any layer is routed."""
        return any(capacity is not None for capacity in self.capacities)

    @property
    def depends_on_micro_batch(self) -> bool:
        """Whether training depends on how sequences are grouped into micro-batches.

        The balance loss multiplies means over a micro-batch, and token choice takes its threshold's
        quantile over it.
        """
        is_balanced = bool(self.expert_labels) and self.experts.balance_kind == "loss"
        return is_balanced or (self.is_routed and self.router.choice == "token")

    @property
    def mixers(self) -> list[str]:
        """The mixer of each layer. Raises ValueError if a list does not have one per layer."""
        if isinstance(self.mixer, str):
            return [self.mixer] * self.num_layers
        names = list(self.mixer)
        if len(names) != self.num_layers:
            raise ValueError(f"has {len(names)} layers, but num_layers={self.num_layers}")
        return names

    @property
    def routed_parts(self) -> list[tuple[int, str]]:
        """Layer and part (``block``, ``attention``, ``mlp``) of each router, in forward order."""
        target = self.router.target
        parts = ("attention", "mlp") if target == "both" else (target,)
        return [
            (layer, part)
            for layer, capacity in enumerate(self.capacities)
            if capacity is not None
            for part in parts
        ]

    @property
    def routed_labels(self) -> list[str]:
        """A name for each of `routed_parts`, such as ``layer_03`` or ``layer_03_mlp``."""
        return [
            f"layer_{layer:02d}" + ("" if part == "block" else f"_{part}")
            for layer, part in self.routed_parts
        ]

    @property
    def expert_labels(self) -> list[str]:
        """A name for each mixture of experts, such as ``layer_03``."""
        return [f"layer_{i:02d}" for i in range(self.num_layers) if self.has_experts(i)]

    def has_experts(self, layer: int) -> bool:
        """Whether the MLP of ``layer`` is a mixture of experts."""
        experts = self.experts
        return experts.count is not None and (self.num_layers - 1 - layer) % experts.every == 0

    @property
    def training_selection(self) -> Selection:
        """The selection in training."""
        return "token" if self.is_routed and self.router.choice == "token" else "top_k"

    @property
    def causal_selections(self) -> list[Selection]:
        """The causal decisions that were trained, if any; reported losses use the first one."""
        if self.is_routed and self.router.needs_causal:
            return list(self.router.causal_routers)
        return ["causal"]

    @property
    def looks_ahead(self) -> bool:
        """Whether the selection in training depends on later tokens."""
        by_experts = self.experts.count is not None and self.experts.choice == "expert"
        router = self.router
        by_depth = self.is_routed and router.needs_causal and router.choice == "expert"
        return by_experts or by_depth

    def problems(self, prefix: str = "model") -> list[Problem]:
        """Everything wrong with the architecture, in the order of the fields."""
        sizes = ("d_model", "num_layers", "num_heads", "vocab_size", "num_kv_heads", "head_dim")
        problems = at_least(
            self, prefix, 1, *sizes, "d_ff", "sliding_window", "conv_width", "loss_chunk"
        )
        if self.num_layers > MAX_LAYERS:
            reason, remedy = f"is above {MAX_LAYERS}", f"use {MAX_LAYERS} at most"
            return problems + broken_rules(self, prefix, (True, "num_layers", reason, remedy))
        sized = not problems
        if sized:
            problems += self._head_problems(prefix)
        problems += above_zero(self, prefix, "rope_theta", "norm_eps", "init_std")
        problems += one_of(self, prefix, "activation", ACTIVATIONS)
        problems += pattern_problems(self.pattern, self.capacity, self.num_layers, prefix)
        problems += self._mixer_problems(prefix)
        problems += self.rope_scaling.problems(f"{prefix}.rope_scaling")
        problems += self.router.problems(f"{prefix}.router")
        if sized and self.activation in ACTIVATIONS:
            problems += self.experts.problems(f"{prefix}.experts", self.ff_width, self.num_layers)
        return problems or [
            *self._kept_keys_problems(prefix),
            *self._attention_score_problems(prefix),
        ]

    def _mixer_problems(self, prefix: str) -> list[Problem]:
        if isinstance(self.mixer, str):
            return one_of(self, prefix, "mixer", MIXERS)
        key, remedy = f"{prefix}.mixer", f"use one of {', '.join(MIXERS)}, or a list of them"
        try:
            names = self.mixers
        except (TypeError, ValueError) as error:
            return [Problem(key, self.mixer, str(error), remedy)]
        return [Problem(key, name, "is not known", remedy) for name in names if name not in MIXERS]

    def _kept_keys_problems(self, prefix: str) -> list[Problem]:
        """Find a routed layer that has no keys and values."""
        if not self.router.keep_kv:
            return []
        for layer, (mixer, capacity) in enumerate(zip(self.mixers, self.capacities, strict=True)):
            if capacity is not None and mixer != "attention":
                reason = f"keeps keys and values, which layer {layer} has none of: it is a {mixer}"
                remedy = f"leave it out, or use {prefix}.mixer=attention in the routed layers"
                return [Problem(f"{prefix}.router.keep_kv", True, reason, remedy)]
        return []

    def _attention_score_problems(self, prefix: str) -> list[Problem]:
        """Find a routed layer without attention over all tokens in the layer before."""
        if self.router.score != "attention":
            return []
        attends = False
        for layer, (mixer, capacity) in enumerate(zip(self.mixers, self.capacities, strict=True)):
            if capacity is not None and not attends:
                reason = (
                    "needs attention over all tokens in the layer before, and layer"
                    f" {layer} has no such layer before it"
                )
                remedy = f"use {prefix}.pattern=every_other, or a learned score"
                key = f"{prefix}.router.score"
                return [Problem(key, self.router.score, reason, remedy)]
            attends = mixer == "attention" and (capacity is None or self.router.target == "mlp")
        return []

    def _head_problems(self, prefix: str) -> list[Problem]:
        # Only even widths: RoPE rotates pairs. No model has more heads than the bound.
        good = [h for h in range(1, min(self.d_model, 4096) + 1) if self.d_model % (2 * h) == 0]
        near = sorted(good, key=lambda h: abs(h - self.num_heads))[:3]
        remedy = f"use {', '.join(map(str, sorted(near)))}, or set " if near else "set "
        is_whole = self.head_dim is not None or self.d_model % self.num_heads == 0
        return broken_rules(
            self,
            prefix,
            (
                not is_whole,
                "num_heads",
                f"does not divide {prefix}.d_model={self.d_model}",
                f"{remedy}{prefix}.head_dim",
            ),
            (
                is_whole and self.head_width % 2 == 1,
                "head_dim" if self.head_dim else "num_heads",
                f"gives heads of odd width {self.head_width}; RoPE rotates pairs",
                "choose an even head width",
            ),
            (
                self.num_heads % self.kv_heads != 0,
                "num_kv_heads",
                f"does not divide {prefix}.num_heads={self.num_heads}",
                f"use a divisor of {self.num_heads}",
            ),
        )


def unrouted_layers(model: ModelConfig) -> ModelConfig | None:
    """Return the dense model of the layers that ``model`` does not route, alone.

    It is the fair control of a routed model: what is left if the routed layers do nothing. None
    where there is no such model: no layer is routed, or all are; routers choose tokens for a part
    of a block only; or the experts of the remaining layers follow no `ExpertsConfig.every`.
    """
    capacities = model.capacities
    kept = [layer for layer, capacity in enumerate(capacities) if capacity is None]
    if len(kept) in (0, len(capacities)) or model.router.target != "block":
        return None
    control = replace(
        model,
        num_layers=len(kept),
        pattern="dense",
        mixer=model.mixer if isinstance(model.mixer, str) else [model.mixers[i] for i in kept],
        router=RouterConfig(),
    )
    has_experts = [model.has_experts(layer) for layer in kept]
    if not any(has_experts):
        return replace(control, experts=ExpertsConfig())
    for every in range(1, len(kept) + 1):
        control = replace(control, experts=replace(model.experts, every=every))
        if [control.has_experts(layer) for layer in range(len(kept))] == has_experts:
            return control
    return None
