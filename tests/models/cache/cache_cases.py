"""Models, texts and ragged calls that the tests of the cache share.

Shapes: B sequences of the cache, N sequences of a call, S new tokens, L tokens of a text,
V vocabulary, R routers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from modtrain.models.cache.cache import Cache
from modtrain.models.cache.ragged_store import RaggedStore
from modtrain.models.config import ModelConfig
from modtrain.models.depth.config import ComputeBudget, RouterConfig, Selection
from modtrain.models.experts.config import ExpertsConfig
from modtrain.models.transformer import ModelOutput, Transformer
from tests.helpers.model_cases import (
    VOCAB,
    balance_predictors,
    configs,
    lively,
    normal,
    random_tokens,
    settle,
)
from tests.helpers.thresholds import MARGIN, require_margin

EXPERTS = {
    "moe": ExpertsConfig(count=4, top_k=2, dim=8),
    "integrated": ExpertsConfig(count=4, top_k=2, dim=8, noop=2),
    "expert_choice": ExpertsConfig(count=4, dim=8, noop=1, choice="expert"),
    "shared": ExpertsConfig(count=3, top_k=1, dim=8, shared=1, balance="bias"),
}
# Beside the learned scores under expert choice that `configs` draws.
OTHER_ROUTERS = (
    {"score": "random"},
    {"score": "fixed"},
    {"score": "attention"},
    {"score": "attention", "target": "mlp", "gate_scale": True},
    {"score": "oracle_norm", "gate": "none"},
    {"choice": "token"},
    {"keep_kv": True},
    {"keep_kv": True, "target": "both", "causal": ["threshold"]},
    {"keep_kv": True, "score": "fixed", "target": "attention"},
    {"choice": "token", "target": "both", "gate": "sigmoid"},
)


def ready(
    config: ModelConfig, length: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Transformer:
    """A model that chooses about half, by each of its decisions."""
    model = settle(lively(config, seed), length)
    if config.is_routed and "predictor" in config.router.causal_routers:
        balance_predictors(model, random_tokens(4, length, 50))
    return model.to(dtype).eval()


def pieces(draw: st.DrawFn, length: int) -> list[int]:
    cuts = draw(st.lists(st.integers(1, length), min_size=0, max_size=length, unique=True))
    ends = [*sorted({*cuts, length})]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


@st.composite
def cached_configs(draw: st.DrawFn) -> ModelConfig:
    """`configs` with other routers and experts too, all with a causal decision."""
    config = draw(configs())
    kind = draw(st.sampled_from([None, None, *EXPERTS]))
    if kind is not None:
        config.experts = EXPERTS[kind]
    if draw(st.integers(0, 2)) == 0:
        learned = config.router
        config.router = RouterConfig(**draw(st.sampled_from(OTHER_ROUTERS)))
        if config.problems():
            config.router = learned
    if not config.causal_selections:
        config.router.causal = ["predictor"]
    assert not config.problems()
    return config


@st.composite
def cases(draw: st.DrawFn) -> tuple[ModelConfig, int, int, list[int], int]:
    """Config, batch, length, the lengths of its pieces, and a seed."""
    config = draw(cached_configs())
    length = draw(st.integers(1, 24))
    batch = draw(st.integers(1, 4))
    return config, batch, length, pieces(draw, length), draw(st.integers(0, 99))


@st.composite
def budgets(draw: st.DrawFn, config: ModelConfig) -> ComputeBudget | None:
    """A budget with any of its three limits, each router's level its own."""
    if draw(st.booleans()):
        return None
    routers, free = len(config.routed_parts), not config.router.needs_causal
    thresholds = st.floats(0.1, 0.9) if free else st.floats(-1, 1)
    each = st.lists(thresholds, min_size=routers, max_size=routers).map(tuple)
    return ComputeBudget(
        draw(st.none() | each),
        draw(st.sampled_from([None, 0.0, 0.1, 0.3, 1 / 3, 0.6, 1.0])),
        draw(st.sampled_from([None, 0, 1, 2])),
    )


def tracks_routed(budget: ComputeBudget | None) -> bool:
    return budget is not None and budget.layer_cap is not None


def alone(
    model: Transformer,
    tokens_L: Tensor,
    selection: Selection,
    documents_L: Tensor | None = None,
    budget: ComputeBudget | None = None,
) -> ModelOutput:
    """One sequence, all at once, without a cache."""
    documents = None if documents_L is None else documents_L[None]
    with torch.no_grad():
        return model(tokens_L[None], selection=selection, documents_BS=documents, budget=budget)


@dataclass
class TokenOutputs:
    """What calls returned of the tokens of one sequence, in order."""

    logits: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    chosen: list[Tensor] = field(default_factory=list)
    predicted: list[Tensor] = field(default_factory=list)

    def add(self, output: ModelOutput, number: int, own_S: Tensor) -> None:
        self.logits.append(output.logits_BSV[number, own_S])
        for name, into in (
            ("scores_BS", self.scores),
            ("chosen_BS", self.chosen),
            ("predictor_BS", self.predicted),
        ):
            values = [getattr(record, name) for record in output.routing]
            if values and values[0] is not None:
                into.append(torch.stack([x_NS[number, own_S] for x_NS in values]))

    def taking(self) -> Tensor:
        """Who took part in each router (R, L)."""
        return torch.cat(self.chosen, 1)

    def truncated(self, length: int) -> TokenOutputs:
        """The same of the first tokens alone."""
        logits, *others = (
            [torch.cat(xs, dim).narrow(dim, 0, length)] if xs else []
            for xs, dim in (
                (self.logits, 0),
                (self.scores, 1),
                (self.chosen, 1),
                (self.predicted, 1),
            )
        )
        return TokenOutputs(logits, *others)


def assert_equals_whole(
    output: TokenOutputs, whole: ModelOutput, atol: float = 1e-9, with_scores: bool = True
) -> None:
    """Outputs of a sequence's calls equal those of the sequence alone; atol: of their size."""
    size = max(1.0, whole.logits_BSV.abs().max().item())
    actual_LV = torch.cat(output.logits)
    torch.testing.assert_close(actual_LV, whole.logits_BSV[0], atol=atol * size, rtol=0)
    if not whole.routing:
        return
    assert torch.equal(output.taking(), torch.stack([r.chosen_BS[0] for r in whole.routing]))
    if output.predicted:
        expected_RL = torch.stack([r.predictor_BS[0] for r in whole.routing])
        torch.testing.assert_close(
            torch.cat(output.predicted, 1), expected_RL, atol=atol, rtol=atol
        )
    if with_scores:
        scores_RL = torch.stack([r.scores_BS[0] for r in whole.routing])
        size = max(1.0, scores_RL.abs().max().item())
        torch.testing.assert_close(torch.cat(output.scores, 1), scores_RL, atol=atol * size, rtol=0)


def padded(draw: st.DrawFn, counts: list[int]) -> Tensor:
    """Where the tokens of each sequence stand (N, S): padding before, behind or between them."""
    length = max(1, *counts) + draw(st.integers(0, 3))
    kind = draw(st.sampled_from(["left", "right", "between"]))
    valid_NS = torch.zeros(len(counts), length, dtype=torch.bool)
    for row_S, count in zip(valid_NS, counts, strict=True):
        if kind == "left":
            row_S[length - count :] = True
        elif kind == "right":
            row_S[:count] = True
        else:
            row_S[torch.tensor(draw(st.permutations(range(length)))[:count], dtype=int)] = True
    return valid_NS


def spread(texts: list[Tensor], valid_NS: Tensor, filler_NS: Tensor) -> Tensor:
    """The texts where ``valid_NS`` is true, ``filler_NS`` elsewhere."""
    spread_NS = filler_NS.clone()
    for row_S, own_S, text in zip(spread_NS, valid_NS, texts, strict=True):
        row_S[own_S] = text
    return spread_NS


def ragged(*counts: int) -> Tensor:
    """So many tokens of each sequence, padding behind (N, S)."""
    return torch.arange(max(counts)) < torch.tensor(counts)[:, None]


@dataclass
class Run:
    """Sequences of different lengths on their way through a cache."""

    model: Transformer
    texts: list[Tensor]
    documents: list[Tensor] | None
    cache: Cache
    settings: dict[str, Any]
    outputs: list[TokenOutputs]
    reports: list[ModelOutput] = field(default_factory=list)

    def extend(self, rows: list[int], valid_NS: Tensor, filler_NS: Tensor) -> None:
        """Run the next tokens of ``rows``, as many as there are places for, where they are."""
        starts, counts = [self.cache.seen[row] for row in rows], valid_NS.sum(1).tolist()

        def next_of(texts: list[Tensor]) -> Tensor:
            parts = zip(rows, starts, counts, strict=True)
            own = [texts[row][start : start + count] for row, start, count in parts]
            return spread(own, valid_NS, filler_NS)

        output = self.model.extend(
            next_of(self.texts),
            self.cache,
            rows=rows,
            valid_NS=valid_NS,
            documents_NS=None if self.documents is None else next_of(self.documents),
            **self.settings,
        )
        self.reports.append(output)
        for number, row in enumerate(rows):
            self.outputs[row].add(output, number, valid_NS[number])
        for x in (output.logits_BSV, *(r.chosen_BS for r in output.routing)):
            assert x.shape[:2] == valid_NS.shape
        assert not any((record.chosen_BS & ~valid_NS).any() for record in output.routing)
        assert all(record.valid_BS is valid_NS for record in output.routing)

    def step(self, *counts: int, rows: list[int] | None = None) -> None:
        """Run so many more tokens of each sequence, padding behind."""
        rows = list(range(self.cache.batch)) if rows is None else rows
        valid_NS = ragged(*counts)
        self.extend(rows, valid_NS, torch.zeros(valid_NS.shape, dtype=torch.long))

    def run_and_truncate(self, draw: st.DrawFn, margin: int) -> None:
        """Run other tokens of some sequences, and go back."""
        before = list(self.cache.seen)
        rows = draw(subsets(self.cache.batch))
        other_NS = random_tokens(len(rows), draw(st.integers(1, margin)), draw(st.integers(0, 9)))
        documents_NS = torch.full_like(other_NS, 99) if self.documents is not None else None
        self.model.extend(
            other_NS, self.cache, rows=rows, documents_NS=documents_NS, **self.settings
        )
        if draw(st.booleans()):
            self.cache.truncate([before[row] for row in rows], rows)
        else:
            self.cache.truncate(before)
        assert self.cache.seen == before

    def finish(self, draw: st.DrawFn, margin: int) -> None:
        """Run all texts to their ends in a few calls, then each by what is left."""
        for _ in range(draw(st.integers(0, 6))):
            rows = draw(subsets(self.cache.batch))
            if margin and draw(st.booleans()):
                self.run_and_truncate(draw, margin)
            left = [len(self.texts[row]) - self.cache.seen[row] for row in rows]
            few = draw(st.sampled_from([1, 3, 24]))
            valid_NS = padded(draw, [draw(st.integers(0, min(few, n))) for n in left])
            self.extend(rows, valid_NS, random_tokens(*valid_NS.shape, draw(st.integers(0, 9))))
        seen = enumerate(self.cache.seen)
        valid_NS = padded(draw, [len(self.texts[row]) - start for row, start in seen])
        self.extend(list(range(self.cache.batch)), valid_NS, random_tokens(*valid_NS.shape))


def run_of(model: Transformer, *lengths: int, margin: int = 0, **settings: Any) -> Run:
    """A run of random texts of these lengths, at its start."""
    texts = [random_tokens(1, length, i)[0] for i, length in enumerate(lengths)]
    settings = {"selection": model.config.causal_selections[0], "budget": None} | settings
    cache = Cache(model.config, len(texts), margin, tracks_routed(settings["budget"]))
    return Run(model, texts, None, cache, settings, [TokenOutputs() for _ in texts])


@st.composite
def subsets(draw: st.DrawFn, batch: int) -> list[int]:
    """Some rows, in any order."""
    return list(draw(st.permutations(range(batch))))[: draw(st.integers(1, batch))]


@st.composite
def runs(draw: st.DrawFn, dtype: torch.dtype = torch.float64) -> Run:
    """A ragged run over any model, with documents, budgets and truncations, at its end."""
    config = draw(cached_configs())
    seed, batch = draw(st.integers(0, 99)), draw(st.integers(1, 4))
    model = ready(config, 24, seed, dtype)
    lengths = [draw(st.integers(1, 20)) for _ in range(batch)]
    texts = [random_tokens(1, length, seed + i)[0] for i, length in enumerate(lengths)]
    documents = None
    if draw(st.booleans()):
        documents = [(text < VOCAB // 6).long().cumsum(0) for text in texts]
    budget, margin = draw(budgets(config)), draw(st.sampled_from([0, 4]))
    settings = {"selection": draw(st.sampled_from(config.causal_selections)), "budget": budget}
    cache = Cache(config, batch, margin, tracks_routed(budget))
    run = Run(model, texts, documents, cache, settings, [TokenOutputs() for _ in texts])
    run.finish(draw, margin)
    return run


def assert_each_alone(run: Run, atol: float = 1e-9) -> None:
    """Each sequence of the run equals itself run alone, all at once."""
    # What no decision goes by may be drawn anew each time.
    with_scores = run.model.config.router.needs_causal
    for row, (text, output) in enumerate(zip(run.texts, run.outputs, strict=True)):
        documents = None if run.documents is None else run.documents[row]
        whole = alone(run.model, text, documents_L=documents, **run.settings)
        require_margin(run.model, whole, **run.settings, least=max(MARGIN, atol))
        assert_equals_whole(output, whole, atol, with_scores)


class SlowStore:
    """Lists of (position, document, field) that forget nothing."""

    def __init__(self, batch: int) -> None:
        self.rows: list[list[tuple[int, int, float]]] = [[] for _ in range(batch)]

    def seen_by(self, row: int, window: int | None, last: int | None, next_position: int):
        """What the next token looks at."""
        entries = self.rows[row]
        if last is not None:
            return entries[len(entries) - min(last, len(entries)) :]
        return [e for e in entries if window is None or next_position - e[0] < window]


def append(store: RaggedStore, slow: SlowStore, rows, counts, seen, width: int, data) -> None:
    """Some of the next ``width`` tokens of each row take part, the counts say how many."""
    positions_NK = torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        later = torch.arange(seen[row], seen[row] + 2 * width)
        allocated_length = sorted(data.draw(st.permutations(range(2 * width)))[:width])
        positions_NK[number] = later[torch.tensor(allocated_length, dtype=torch.long)]
    documents_NK = positions_NK // 7 if data.draw(st.booleans()) else None
    field_NK = normal(len(rows), width, seed=len(slow.rows[0]))
    # Behind the counts is padding.
    for number, count in enumerate(counts):
        field_NK[number, count:] = float("nan")
    store.append(rows, counts, (field_NK[..., None],), positions_NK, documents_NK)
    for number, (row, count) in enumerate(zip(rows, counts, strict=True)):
        for place in range(count):
            position = int(positions_NK[number, place])
            document = 0 if documents_NK is None else int(documents_NK[number, place])
            slow.rows[row].append((position, document, float(field_NK[number, place])))
        seen[row] += 2 * width


def kept(store: RaggedStore, row: int) -> list[tuple[int, int, float]]:
    if not store.lengths[row]:
        return []
    (field_NL1,), length = store.fields([row]), store.lengths[row]
    columns = (store.positions([row]), store.documents([row]), field_NL1[..., 0])
    return list(zip(*(column[0, :length].tolist() for column in columns), strict=True))
