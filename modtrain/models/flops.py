"""What a model costs: parameters and floating-point operations by part, as executed.

A multiplication with its addition counts as 2. `CONVENTIONS` says what is in and what is out; every
count in the project comes from here.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from modtrain.models.config import ModelConfig
from modtrain.models.pattern import num_chosen

CONVENTIONS = (
    "matrix products only, 2 FLOPs a multiply-add: norms, RoPE, softmax, activations, top-k,"
    " gather and scatter are left out",
    "causal attention is counted whole: S x S products for S tokens, also under a sliding window",
    "the output head is counted, the embedding look-up is not",
    "a routed block counts its k = max(1, round(capacity x S)) tokens, its router and its"
    " predictor all S",
    "backward = 2 x forward, for every part",
    "dense-equivalent: the same model with every block dense and no router",
)
TRAINING_OVER_FORWARD = 3


@dataclass(frozen=True)
class Cost:
    """A count by part; the unit (FLOPs a sequence, parameters, …) is that of who made it."""

    attention_projections: int = 0
    attention_products: int = 0
    mlp: int = 0
    router: int = 0
    predictor: int = 0
    embedding: int = 0
    norms: int = 0
    head: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """The counts by part's name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def forward_flops(config: ModelConfig, seq_len: int) -> Cost:
    """Executed FLOPs of a forward pass over one sequence of ``seq_len`` tokens, under top-k."""
    counts = [
        seq_len if capacity is None else num_chosen(capacity, seq_len)
        for capacity in config.capacities
    ]
    return realised_flops(config, seq_len, [(count, count * count) for count in counts])


def realised_flops(config: ModelConfig, seq_len: int, tokens: list[tuple[float, float]]) -> Cost:
    """Executed FLOPs a sequence where each layer processed ``tokens`` = (mean k, mean k²)."""
    total = Cost(head=2 * seq_len * config.d_model * config.vocabulary)
    for capacity, (count, square) in zip(config.capacities, tokens, strict=True):
        total += _block_flops(config, count, square)
        if capacity is not None:
            total += _routing_flops(config, seq_len)
    return total


def dense_equivalent_flops(config: ModelConfig, seq_len: int) -> Cost:
    """FLOPs of a forward pass over one sequence if no block were routed."""
    total = Cost(head=2 * seq_len * config.d_model * config.vocabulary)
    for _ in range(config.num_layers):
        total += _block_flops(config, seq_len, seq_len * seq_len)
    return total


def training_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Executed FLOPs of forward and backward, a token of the sequence."""
    return TRAINING_OVER_FORWARD * forward_flops(config, seq_len).total / seq_len


def parameters(config: ModelConfig) -> Cost:
    """Number of parameters by part; a tied head counts once, as the embedding."""
    d, query_dim = config.d_model, config.num_heads * config.head_width
    kv_dim = config.kv_heads * config.head_width
    matrices = 3 if config.activation == "swiglu" else 2
    block = Cost(
        attention_projections=2 * d * query_dim + 2 * d * kv_dim,
        mlp=matrices * d * config.ff_width,
        norms=2 * d + (2 * config.head_width if config.qk_norm else 0),
    )
    width = config.router.predictor_dim if "predictor" in config.router.causal else 0
    routing = Cost(router=d, predictor=(d + 1) * width + (width + 1 if width else 0))
    total = Cost(
        embedding=config.vocabulary * d,
        head=0 if config.tie_embeddings else config.vocabulary * d,
        norms=d,
    )
    for capacity in config.capacities:
        total += block if capacity is None else block + routing
    return total


def _block_flops(config: ModelConfig, count: float, square: float) -> Cost:
    d, query_dim = config.d_model, config.num_heads * config.head_width
    kv_dim = config.kv_heads * config.head_width
    matrices = 3 if config.activation == "swiglu" else 2
    return Cost(
        attention_projections=round(2 * count * d * (2 * query_dim + 2 * kv_dim)),
        attention_products=round(4 * square * query_dim),
        mlp=round(2 * count * d * config.ff_width * matrices),
    )


def _routing_flops(config: ModelConfig, seq_len: int) -> Cost:
    width = config.router.predictor_dim if "predictor" in config.router.causal else 0
    return Cost(
        router=2 * seq_len * config.d_model, predictor=2 * seq_len * (config.d_model + 1) * width
    )
