"""The shape of a model, as typed configuration. Imports nothing heavy: mistakes show at once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from modtrain.checks import above_zero, at_least, one_of
from modtrain.errors import Problem
from modtrain.models.pattern import layer_capacities, pattern_problems

ACTIVATIONS = ("swiglu", "gelu")
GATES = ("raw", "none")
CAUSAL_ROUTERS = ("predictor",)


@dataclass
class RouterConfig:
    """How a routed block scores its tokens.

    gate: what the block's update is multiplied by. ``raw``: the score itself (arXiv 2404.02258,
        eq. 1). ``none``: a control without the multiplication, in which the router never learns.
    causal: decisions trained beside top-k that need no later token, for evaluation and sampling.
        ``predictor``: a small MLP on the stop-gradient input of the router (section 3.5).
    predictor_dim: hidden width of that MLP.
    """

    gate: str = "raw"
    causal: list[str] = field(default_factory=lambda: ["predictor"])
    predictor_dim: int = 64

    def problems(self, prefix: str) -> list[Problem]:
        """Everything wrong with the router's settings."""
        found = [
            *one_of(self, prefix, "gate", GATES),
            *one_of(self, prefix, "causal", CAUSAL_ROUTERS),
            *at_least(self, prefix, 1, "predictor_dim"),
        ]
        if len(set(self.causal)) != len(self.causal):
            found.append(
                Problem(f"{prefix}.causal", self.causal, "names a router twice", "name each once")
            )
        return found


@dataclass
class ModelConfig:
    """A pre-norm, Llama-shaped decoder with depth routing.

    vocab_size: rows of the embedding; null takes the tokenizer's size.
    num_kv_heads: heads of keys and values (grouped-query attention); null: ``num_heads``.
    head_dim: width of a head; null: ``d_model / num_heads``.
    d_ff: hidden width of the MLP; null: 4 d for gelu, 8/3 d rounded up to 64 for swiglu.
    sliding_window: how many positions back a token sees, itself included; null: all.
    init_std: standard deviation of the initial weights; null: sqrt(2 / (5 d_model)) (see
        `modtrain.models.init`).
    pattern: which blocks are routed: ``dense``, ``every``, ``every_other``, or a list with one
        capacity a layer in which 1 is a dense block, ``[1, 0.125]`` or ``"[1, .125]*6"``.
    capacity: the share of tokens that takes part in a routed block, in (0, 1].
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
    sliding_window: int | None = None
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    init_std: float | None = None
    pattern: Any = "every_other"
    capacity: float = 0.125
    router: RouterConfig = field(default_factory=RouterConfig)

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
        """Rows of the embedding. Raises ValueError while they are not known."""
        if self.vocab_size is None:
            raise ValueError("model.vocab_size is not set; resolve it from the tokenizer first")
        return self.vocab_size

    @property
    def capacities(self) -> list[float | None]:
        """The capacity of each layer; None where the layer is dense."""
        return layer_capacities(self.pattern, self.capacity, self.num_layers)

    @property
    def is_routed(self) -> bool:
        """Whether any layer is routed."""
        return any(capacity is not None for capacity in self.capacities)

    def problems(self, prefix: str = "model") -> list[Problem]:
        """Everything wrong with the model's shape, in the order of the fields."""
        sizes = ("d_model", "num_layers", "num_heads", "vocab_size", "num_kv_heads", "head_dim")
        found = at_least(self, prefix, 1, *sizes, "d_ff", "sliding_window")
        if not found:
            found += self._head_problems(prefix)
        found += above_zero(self, prefix, "rope_theta", "norm_eps", "init_std")
        found += one_of(self, prefix, "activation", ACTIVATIONS)
        found += pattern_problems(self.pattern, self.capacity, self.num_layers, prefix)
        return found + self.router.problems(f"{prefix}.router")

    def _head_problems(self, prefix: str) -> list[Problem]:
        found = []
        if self.head_dim is None and self.d_model % self.num_heads:
            # Heads of even width alone: RoPE turns pairs. No model has more heads than the bound.
            good = [h for h in range(1, min(self.d_model, 4096) + 1) if self.d_model % (2 * h) == 0]
            near = sorted(good, key=lambda h: abs(h - self.num_heads))[:3]
            remedy = f"use {', '.join(map(str, sorted(near)))}, or set " if near else "set "
            found.append(
                Problem(
                    f"{prefix}.num_heads",
                    self.num_heads,
                    f"does not divide {prefix}.d_model={self.d_model}",
                    f"{remedy}{prefix}.head_dim",
                )
            )
        elif self.head_width % 2:
            found.append(
                Problem(
                    f"{prefix}.{'head_dim' if self.head_dim else 'num_heads'}",
                    self.head_dim or self.num_heads,
                    f"gives heads of odd width {self.head_width}; RoPE turns pairs",
                    "choose an even head width",
                )
            )
        if self.num_heads % self.kv_heads:
            found.append(
                Problem(
                    f"{prefix}.num_kv_heads",
                    self.kv_heads,
                    f"does not divide {prefix}.num_heads={self.num_heads}",
                    f"use a divisor of {self.num_heads}",
                )
            )
        return found
