"""What theory says that a rank sends in a training step, from the shapes of the whole model.

A parameter that is cut over n ranks is gathered once forward and once backward, the root's once in
all, and its gradient reduced once. With every collective done as by rings a rank sends (n - 1) / n
of what is whole, and twice that where a sum ends on all ranks (`benchmarks._paper.sent`).

Shapes: B sequences of S tokens, D model, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import prod
from typing import NamedTuple

from benchmarks._paper import ALL, Paper, sent
from modtrain.models.config import ModelConfig
from modtrain.models.depth.pattern import num_chosen
from modtrain.parallel.context import local_length

_DECIDING = re.compile(r"\.(router|predictor|expert_router)\.")
_EXPERTS = re.compile(r"\.inner\.(up|gate|down)$")
# Cut by what they read in place of what they write, under tensor parallelism.
_READING = re.compile(r"\.(out|down)\.weight$|\.down$")

Key = tuple[str, str]


class Theory(NamedTuple):
    """What collectives of one kind over one axis should come to.

    sent: bytes that a rank has to send. bound: bytes with what static shapes add: pieces of a
    parameter that are all as long as the longest, and dropless experts that all compute.
    """

    number: int = 0
    sent: float = 0.0
    bound: float = 0.0

    def plus(self, other: Theory) -> Theory:
        """Return both together."""
        return Theory(self.number + other.number, self.sent + other.sent, self.bound + other.bound)


# Kind, number, bytes of what is whole, and the same with padding.
_Exchange = tuple[str, int, float, float]


class _Group(NamedTuple):
    """Parameters that FSDP gathers together: their shapes on the ranks of the group of ``axis``."""

    axis: str
    is_root: bool
    shapes: list[tuple[int, ...]]


def theory(paper: Paper) -> dict[Key, Theory]:
    """Return what each kind of collective over each axis should come to, in a step of one batch."""
    totals: dict[Key, Theory] = {}

    def add(kind: str, axis: str, number: int, whole: float, padded: float | None = None) -> None:
        size = paper.sizes[axis]
        if size == 1:
            return
        # Groups of all ranks are one.
        key = kind, ALL if size == paper.sizes[ALL] else axis
        padded = whole if padded is None else padded
        totals[key] = totals.get(key, Theory()).plus(
            Theory(number, sent(kind, whole, size), sent(kind, padded, size))
        )

    for group in _groups(paper):
        size = paper.sizes[group.axis]
        whole = sum(prod(shape) for shape in group.shapes)
        padded = sum(_padded(shape, size) for shape in group.shapes)
        gathers = 1 if group.is_root else 2
        width = 4 if group.is_root else _width(paper)
        add("all-gather", group.axis, gathers, gathers * width * whole, gathers * width * padded)
        add("reduce-scatter", group.axis, 1, 4 * whole, 4 * padded)
        if "replicate" in paper.sizes:
            add("all-reduce", "replicate", 1, 4 * whole / size, 4 * padded / size)
    norms = 1 + any(".predictor." in name for name in paper.shapes)
    add("all-reduce", ALL, norms, 4 * norms)
    if states := _running_states(paper.config.model):
        add("all-reduce", ALL, 1, 4 * states)
    if paper.sizes.get("expert", 1) > 1:
        is_all = paper.sizes["expert"] == paper.sizes[ALL]
        totals["all-to-all", ALL if is_all else "expert"] = _exchanges(paper)
    if "tensor" in paper.sizes:
        for kind, number, num_bytes, padded_bytes in _slices(paper):
            add(kind, "tensor", number, num_bytes, padded_bytes)
    if "context" in paper.sizes:
        for kind, number, num_bytes, padded_bytes in _shares(paper):
            add(kind, "context", number, num_bytes, padded_bytes)
    return totals


def _width(paper: Paper) -> int:
    """Bytes of a number in which layers are gathered and products made."""
    return 2 if paper.config.precision == "bf16" else 4


def _groups(paper: Paper) -> Iterator[_Group]:
    """Give what FSDP gathers together: each layer's matrices, its spread experts, and the rest."""
    root: list[tuple[int, ...]] = []
    layers: dict[tuple[str, str], list[tuple[int, ...]]] = {}
    for name, shape in paper.shapes.items():
        if not name.startswith("layers.") or len(shape) < 2 or _DECIDING.search(name):
            root.append(tuple(shape))
            continue
        number = name.split(".")[1]
        axis = "shard"
        local = list(shape)
        if _EXPERTS.search(name) and "expert" in paper.sizes:
            axis = "expert_shard"
            local[0] //= paper.sizes["expert"]
        if "tensor" in paper.sizes:
            # Linear layers are (write, read), experts' matrices (expert, read, write).
            reads = bool(_READING.search(name))
            dim = (1 if reads else 2) if len(local) > 2 else int(reads)
            local[dim] //= paper.sizes["tensor"]
        layers.setdefault((number, axis), []).append(tuple(local))
    for (_, axis), shapes in layers.items():
        yield _Group(axis, False, shapes)
    yield _Group("shard_tensor" if "tensor" in paper.sizes else "shard", True, root)


def _padded(shape: tuple[int, ...], size: int) -> float:
    """Numbers in ``size`` pieces that are all as large as the largest."""
    dim = 0
    if len(shape) > 2 and shape[0] % size:
        # Matrices of experts are cut by another dim where the first does not come out even.
        dim = next((d for d in range(1, len(shape)) if shape[d] % size == 0), 0)
    return prod(shape) / shape[dim] * -(-shape[dim] // size) * size


def _running_states(model: ModelConfig) -> int:
    """Numbers that thresholds, biases and quantiles learn from a step."""
    states = len(model.routed_parts) if model.is_routed and model.router.has_threshold else 0
    for layer in range(model.num_layers):
        if model.has_experts(layer) and model.experts.choice == "expert":
            states += model.experts.count or 0
        elif model.has_experts(layer) and model.experts.balance_kind == "bias":
            states += (model.experts.count or 0) + model.experts.noop
    return states


def _tokens(paper: Paper) -> Iterator[tuple[int, int]]:
    """Give each layer's number and how many tokens of a sequence go through it."""
    seq_len = paper.plan.seq_len
    for layer, capacity in enumerate(paper.config.model.capacities):
        yield layer, seq_len if capacity is None else num_chosen(capacity, seq_len)


class _Rows(NamedTuple):
    """Pairs of a token and an expert that a rank sends: in theory, and at most."""

    even: float
    most: float


def _rows(paper: Paper, tokens: int) -> _Rows:
    """Return a rank's rows for the experts of a layer that ``tokens`` of a sequence go through."""
    experts, context = paper.config.model.experts, paper.sizes.get("context", 1)
    even = experts.computed_slots(tokens) / context
    slots = experts.slots(tokens)
    if slots is not None:
        return _Rows(even, float((experts.count or 0) * -(-slots // context)))
    # Without numbers it is not known how many go to no-ops: they count as if none did.
    return _Rows(even, float(local_length(tokens, context) * experts.top_k))


def sent_bytes(rows: float, d_model: int, itemsize: int, expert_size: int) -> float:
    """Bytes that a rank sends to others in a layer's training step, one rank's on average.

    Exact for static shapes; for dropless experts under an even load, where 8 bytes an expert of
    another rank come on top for the counts.

    rows: pairs of a token and a computing expert of one rank's micro-batch, slots that stay empty
    included (`ExpertsConfig.computed_slots` times sequences). itemsize: 2 under bf16 autocast, 4 in
    fp32. Full activation checkpointing sends half as much again: what went forward goes twice.
    Selective keeps what came, and sends nothing twice.
    """
    return 4 * rows * d_model * itemsize * (1 - 1 / expert_size)


def _exchanges(paper: Paper) -> Theory:
    """Rows to their experts and back, and their gradients; before, where dropless, their counts."""
    model, size = paper.config.model, paper.sizes["expert"]
    number, balanced, most = 0, 0.0, 0.0
    for layer, tokens in _tokens(paper):
        if not model.has_experts(layer):
            continue
        rows = _rows(paper, tokens)
        number += 4
        if model.experts.slots(tokens) is None:
            number += 1
            counts = sent("all-to-all", 8 * (model.experts.count or 0), size)
            balanced, most = balanced + counts, most + counts
        balanced += sent_bytes(rows.even, model.d_model, _width(paper), size)
        most += sent_bytes(rows.most, model.d_model, _width(paper), size)
    return Theory(number, balanced, most)


def _slices(paper: Paper) -> Iterator[_Exchange]:
    """Give what blocks of slices exchange; see `modtrain.parallel.tensor`.

    Each of a block's two parts gathers its tokens and scatters its sums, forward, and backward
    the other way round; the block gathers its update, and the gradient of what went in. A mixture
    has all tokens, and cannot tell no-ops from others: it sums all rows. Their gradients are as
    wide as what came: float32, but for rows that travelled.
    """
    model, width = paper.config.model, _width(paper)
    experts, context = model.experts, paper.sizes.get("context", 1)
    row_width = width if "expert" in paper.sizes else 4

    def of_tokens(kind: str, number: int, bytes_of_number: float, tokens: int) -> _Exchange:
        # Of a sequence's tokens a rank of a context group has some, and some that are padding.
        group = paper.sizes["tensor"] if kind != "all-reduce" else 1
        padded = -(-local_length(tokens, context) // group) * group
        features = bytes_of_number * model.d_model
        return kind, number, features * tokens / context, features * padded

    for layer, tokens in _tokens(paper):
        if not model.has_experts(layer):
            yield of_tokens("all-gather", 6, 5 * width + 4, tokens)
            yield of_tokens("reduce-scatter", 4, 4 * width, tokens)
            continue
        yield of_tokens("all-gather", 6, 2 * width + 4 * 4, tokens)
        yield of_tokens("reduce-scatter", 2, 2 * width, tokens)
        most = (width + row_width) * _rows(paper, tokens).most * model.d_model
        yield "all-reduce", 2, most, most
        if experts.shared:
            yield of_tokens("all-reduce", 2, width + 4, tokens)
    # The head: the gradient of what went in, and the loss.
    yield of_tokens("all-gather", 1, 4, paper.plan.seq_len)
    yield "all-reduce", 1, 4, 4


def _shares(paper: Paper) -> Iterator[_Exchange]:
    """Give what the ranks that share a sequence exchange; see `modtrain.parallel.context`.

    Keys and values are gathered; a routed block gathers its scores, sums the chosen tokens'
    features over the ranks, gathers their updates and sums its health. Experts gather the router's
    logits and, with limited room, tokens, whose updates are summed. Each but the health comes back.
    """
    model, width, size = paper.config.model, _width(paper), 2 * paper.sizes["context"]
    experts = model.experts

    def there_and_back(bytes_of_token: float, tokens: int) -> Iterator[_Exchange]:
        for kind in ("all-gather", "reduce-scatter"):
            yield kind, 1, bytes_of_token * tokens, bytes_of_token * -(-tokens // size) * size

    for layer, tokens in _tokens(paper):
        heads = model.kv_heads // paper.sizes.get("tensor", 1)
        yield from there_and_back(width * 2 * heads * model.head_width, tokens)
        if model.capacities[layer] is not None:
            scores = 1 + any(name.startswith(f"layers.{layer}.predictor.") for name in paper.shapes)
            for _ in range(scores):
                yield from there_and_back(4, paper.plan.seq_len)
            for _ in ("chosen", "updates"):
                yield from there_and_back(4 * model.d_model, tokens)
            # Four sums of the router's health, for its metrics.
            yield "all-reduce", 1, 4 * 4, 4 * 4
        if not model.has_experts(layer):
            continue
        choices = (experts.count or 0) + experts.noop
        yield from there_and_back(4 * choices, tokens)
        if experts.slots(tokens) is None:
            counts = 8 * (choices + (experts.count or 0))
            yield "all-reduce", 1, counts, counts
        else:
            for bytes_of_number in (width, 4):
                yield from there_and_back(bytes_of_number * model.d_model, tokens)
    yield "all-reduce", 1, 4, 4
