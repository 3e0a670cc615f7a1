"""The cost of a model: parameters and executed floating-point operations by part.

A multiply-add counts as 2. `CONVENTIONS` defines what is counted; every count in the project comes
from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from modtrain.models.config import ModelConfig
from modtrain.models.depth.config import Selection
from modtrain.models.depth.pattern import num_chosen

CONVENTIONS = (
    "matrix products only, 2 FLOPs per multiply-add: biases, norms, RoPE, softmax, activations, a"
    " convolution's taps, top-k, gather and scatter are left out",
    "causal attention is counted in full: S x S products for S tokens, also under a sliding window",
    "the output head is counted, the embedding look-up is not",
    "a routed part counts its k = max(1, round(capacity x S)) tokens (token choice: its slots), its"
    " router and its predictor all S; with keep_kv its keys and values count S tokens, and its"
    " attention k x S products",
    "experts count the tokens that they compute, padding up to a fixed capacity included; token"
    " choice among no-op experts counts the balanced load, as on devices with grouped products",
    "padding at the end of a sequence counts as tokens do: it is computed",
    "backward = 2 x forward, for every part; frozen parameters count as trained ones, an upper"
    " bound: their own gradients are not computed, but those of their inputs are",
    "the optimizer's step is left out of training FLOPs and of the budget: AdamW has no matrix"
    " products, those of Muon are printed by themselves",
    "dense-equivalent: the same model without skipping: nothing routed, no no-op experts, each"
    " token with its top_k experts and no padding",
)
TRAINING_OVER_FORWARD = 3


@dataclass(frozen=True)
class Cost:
    """A count by part; the function that returns it defines the unit (FLOPs, parameters)."""

    mixer_projections: int = 0
    attention_products: int = 0
    mlp: int = 0
    experts: int = 0
    expert_router: int = 0
    router: int = 0
    predictor: int = 0
    embedding: int = 0
    norms: int = 0
    head: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """The counts by name of the part."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


class Load(NamedTuple):
    """The tokens that one layer processes of a sequence.

    mixer_tokens: tokens in the mixer, or its queries alone. mixer_squares: their number squared, or
    the mean square if it varies between sequences; unused where all tokens are keys (keep_kv).
    mlp_tokens: tokens in the MLP or before the experts. expert_slots: computed pairs of token and
    expert; 0 if the layer has no experts.
    """

    mixer_tokens: float
    mixer_squares: float
    mlp_tokens: float
    expert_slots: float = 0


def forward_flops(
    config: ModelConfig, seq_len: int, capacities: Sequence[float | None] | None = None
) -> Cost:
    """Executed FLOPs of a forward pass over one sequence of ``seq_len`` tokens, as in training.

    capacities: one per layer, in place of the configuration's, for a capacity schedule.
    """
    capacities = config.capacities if capacities is None else capacities
    loads = [training_load(config, i, capacity, seq_len) for i, capacity in enumerate(capacities)]
    return realised_flops(config, seq_len, loads)


def realised_flops(
    config: ModelConfig, seq_len: int, loads: Sequence[Load], selection: Selection | None = None
) -> Cost:
    """Executed FLOPs per sequence if each layer processed its entry of ``loads``.

    selection: how tokens were selected; None: as in training. If a predictor decides and there is
    no gate, a costly score is not computed.
    """
    total = Cost(head=2 * seq_len * config.d_model * config.vocabulary)
    capacities = config.capacities
    for layer, load in enumerate(loads):
        total += _mixer_flops(config, layer, load, seq_len) + _mlp_flops(config, layer, load)
        if capacities[layer] is not None:
            total += _routing_flops(config, layer, seq_len, selection)
    return total


def dense_equivalent_flops(config: ModelConfig, seq_len: int) -> Cost:
    """FLOPs of a forward pass over one sequence if no token skipped anything."""
    total = Cost(head=2 * seq_len * config.d_model * config.vocabulary)
    for layer in range(config.num_layers):
        slots = seq_len * config.experts.top_k if config.has_experts(layer) else 0
        load = Load(seq_len, seq_len * seq_len, seq_len, slots)
        total += _mixer_flops(config, layer, load, seq_len) + _mlp_flops(config, layer, load)
    return total


def training_flops_per_token(
    config: ModelConfig, seq_len: int, capacities: Sequence[float | None] | None = None
) -> float:
    """Executed FLOPs of forward and backward, per token of the sequence."""
    return TRAINING_OVER_FORWARD * forward_flops(config, seq_len, capacities).total / seq_len


def training_load(config: ModelConfig, layer: int, capacity: float | None, seq_len: int) -> Load:
    """The load of ``layer`` per sequence in training, at this capacity (None: not routed)."""
    slots = chosen = seq_len
    if capacity is not None:
        slots = chosen = num_chosen(capacity, seq_len)
        if config.router.choice == "token":
            slots = config.router.num_slots(chosen, seq_len)
    target = config.router.target
    mixer_tokens = seq_len if target == "mlp" else slots
    mlp_tokens, mlp_chosen = (seq_len, seq_len) if target == "attention" else (slots, chosen)
    expert_slots = 0.0
    if config.has_experts(layer):
        # Padding slots are sent to no expert, but a fixed capacity is computed in full.
        is_dropless = config.experts.slots(mlp_tokens) is None
        expert_slots = config.experts.computed_slots(mlp_chosen if is_dropless else mlp_tokens)
    return Load(mixer_tokens, mixer_tokens * mixer_tokens, mlp_tokens, expert_slots)


def parameters(config: ModelConfig) -> Cost:
    """Number of parameters by part; a tied head counts once, as the embedding."""
    total = _outer_parameters(config)
    for layer in range(config.num_layers):
        total += _mixer_parameters(config, layer) + _mlp_parameters(config, layer)
    routing = _router_parameters(config)
    for _ in config.routed_parts:
        total += routing
    return total


def active_parameters(config: ModelConfig, seq_len: int) -> Cost:
    """Number of parameters by part that a token passes in training, the mean over a sequence.

    A routed layer's count times the share of the tokens that it takes, an expert's times the share
    that it computes; embedding, head, routers and predictors count whole.
    """
    total, d = _outer_parameters(config), config.d_model
    routing = _router_parameters(config)
    for layer, capacity in enumerate(config.capacities):
        load = training_load(config, layer, capacity, seq_len)
        mixer_share, mlp_share = load.mixer_tokens / seq_len, load.mlp_tokens / seq_len
        mixer = _mixer_parameters(config, layer)
        kept = _kept_parameters(config) if _keeps_keys(config, layer) else Cost()
        total += kept + _times(mixer - kept, mixer_share)
        mlp = _times(_mlp_parameters(config, layer), mlp_share)
        if config.has_experts(layer):
            width = config.experts.width(config.ff_width)
            num_passed = load.expert_slots / seq_len + config.experts.shared * mlp_share
            mlp = replace(mlp, experts=round(num_passed * _matrices(config) * d * width))
        total += mlp
    for _ in config.routed_parts:
        total += routing
    return total


def hidden_matrix_shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """Shapes (out, in) of `modtrain.models.transformer.hidden_matrices`, in no order."""
    shapes: list[tuple[int, int]] = []
    d = config.d_model
    query_dim, kv_dim = config.num_heads * config.head_width, config.kv_heads * config.head_width
    for layer, mixer in enumerate(config.mixers):
        if mixer == "convolution":
            shapes += [(d, d)] * 3
        else:
            shapes += [(query_dim, d), (kv_dim, d), (kv_dim, d), (d, query_dim)]
        width = config.ff_width
        if config.has_experts(layer):
            width = config.experts.shared * config.experts.width(width)
        if width:
            shapes += [(width, d)] * (_matrices(config) - 1) + [(d, width)]
    return shapes


def _outer_parameters(config: ModelConfig) -> Cost:
    """Parameters outside the layers; a tied head counts once, as the embedding."""
    return Cost(
        embedding=config.vocabulary * config.d_model,
        head=0 if config.tie_embeddings else config.vocabulary * config.d_model,
        norms=config.d_model,
    )


def _times(cost: Cost, share: float) -> Cost:
    return Cost(**{name: round(count * share) for name, count in cost.parts().items()})


def _matrices(config: ModelConfig) -> int:
    return 3 if config.activation == "swiglu" else 2


def _keeps_keys(config: ModelConfig, layer: int) -> bool:
    """Whether all tokens are keys and values of the layer, and only some are queries."""
    return config.router.keep_kv and config.capacities[layer] is not None


def _kept_parameters(config: ModelConfig) -> Cost:
    """Parameters between a skipped token and its keys and values."""
    norms = config.d_model + (config.head_width if config.qk_norm else 0)
    kv_dim = config.kv_heads * config.head_width
    rows = config.d_model + config.qkv_bias
    return Cost(mixer_projections=2 * rows * kv_dim, norms=norms)


def _mixer_flops(config: ModelConfig, layer: int, load: Load, seq_len: int) -> Cost:
    d = config.d_model
    if config.mixers[layer] == "convolution":
        return Cost(mixer_projections=round(2 * load.mixer_tokens * d * 3 * d))
    query_dim, kv_dim = config.num_heads * config.head_width, config.kv_heads * config.head_width
    cost = Cost(mixer_projections=round(2 * load.mixer_tokens * d * (2 * query_dim + 2 * kv_dim)))
    pairs = load.mixer_squares
    if _keeps_keys(config, layer):
        skipped, pairs = seq_len - load.mixer_tokens, load.mixer_tokens * seq_len
        cost += Cost(mixer_projections=round(2 * skipped * d * 2 * kv_dim))
    return cost + Cost(attention_products=round(4 * pairs * query_dim))


def _mlp_flops(config: ModelConfig, layer: int, load: Load) -> Cost:
    d, matrices, experts = config.d_model, _matrices(config), config.experts
    if not config.has_experts(layer):
        return Cost(mlp=round(2 * load.mlp_tokens * d * config.ff_width * matrices))
    width = experts.width(config.ff_width)
    slots = load.expert_slots + load.mlp_tokens * experts.shared
    return Cost(
        experts=round(2 * slots * d * width * matrices),
        expert_router=round(2 * load.mlp_tokens * d * ((experts.count or 0) + experts.noop)),
    )


def _routing_flops(
    config: ModelConfig, layer: int, seq_len: int, selection: Selection | None
) -> Cost:
    """FLOPs of all routers and predictors of a routed layer."""
    router, d = config.router, config.d_model
    parts = 2 if router.target == "both" else 1
    width = router.predictor_dim if "predictor" in router.causal_routers else 0
    scores = {"linear": 2 * seq_len * d, "mlp": 2 * seq_len * (d + 1) * router.hidden_dim}
    cost = Cost(
        router=parts * scores.get(router.score, 0), predictor=parts * 2 * seq_len * (d + 1) * width
    )
    if not router.needs_scores(selection or config.training_selection):
        return cost
    if router.score == "attention":
        # Computed once for all routers that use it.
        query_dim = config.num_heads * config.head_width
        return cost + Cost(router=2 * seq_len * seq_len * query_dim)
    if router.score != "oracle_norm":
        return cost
    slots = config.experts.computed_slots(seq_len) if config.has_experts(layer) else 0
    all_tokens = Load(seq_len, seq_len * seq_len, seq_len, slots)
    update = Cost()
    if router.target != "mlp":
        update += _mixer_flops(config, layer, all_tokens, seq_len)
    if router.target != "attention":
        update += _mlp_flops(config, layer, all_tokens)
    return cost + Cost(router=update.total)


def _mixer_parameters(config: ModelConfig, layer: int) -> Cost:
    d = config.d_model
    if config.mixers[layer] == "convolution":
        return Cost(mixer_projections=3 * d * d + config.conv_width * d, norms=d)
    query_dim, kv_dim = config.num_heads * config.head_width, config.kv_heads * config.head_width
    norms = d + (2 * config.head_width if config.qk_norm else 0)
    biases = query_dim + 2 * kv_dim if config.qkv_bias else 0
    return Cost(mixer_projections=2 * d * query_dim + 2 * d * kv_dim + biases, norms=norms)


def _mlp_parameters(config: ModelConfig, layer: int) -> Cost:
    d, matrices, experts = config.d_model, _matrices(config), config.experts
    if not config.has_experts(layer):
        return Cost(mlp=matrices * d * config.ff_width, norms=d)
    count = experts.count or 0
    width = experts.width(config.ff_width)
    return Cost(
        experts=(count + experts.shared) * matrices * d * width,
        expert_router=(count + experts.noop) * d,
        norms=d,
    )


def _router_parameters(config: ModelConfig) -> Cost:
    router, d = config.router, config.d_model

    def token_mlp(width: int) -> int:
        return (d + 1) * width + width + 1 if width else 0

    scores = {"linear": d, "mlp": token_mlp(router.hidden_dim)}
    return Cost(
        router=scores.get(router.score, 0) + (1 if router.gate_scale else 0),
        predictor=token_mlp(router.predictor_dim if "predictor" in router.causal_routers else 0),
    )
