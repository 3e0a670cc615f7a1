"""Log probabilities of continuations after contexts, through the cache of each layer.

Shapes: N rows of a batch, S new tokens, V vocabulary, R routers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from modtrain.data.stream.batch import document_numbers
from modtrain.inference.generate.decoder import pad_texts
from modtrain.inference.tasks.cost import ForwardCost
from modtrain.models.cache.cache import Cache
from modtrain.models.depth.config import ComputeBudget, Selection
from modtrain.models.transformer import ModelOutput, Transformer

# Logits of a step of at most so many numbers: 256 MB in fp32.
_MAX_LOGITS = 1 << 26
# Tokens of a context at once.
_CHUNK = 2048


class Score(NamedTuple):
    """Of a continuation: its log probability in nats, and whether greedy decoding would give it."""

    log_probability: float
    is_greedy: bool


@dataclass(frozen=True)
class ScoringConfig:
    """How a model computes texts.

    selection: the causal decision. budget: the compute budget; None: as trained. batch_size:
    contexts at once. max_length: tokens that the model reads at most. capacities: one per layer,
    for a checkpoint from the middle of a capacity schedule; None: the configuration's. end_id: the
    end-of-document token where documents are masked; None: they are not.
    """

    selection: Selection
    max_length: int
    budget: ComputeBudget | None = None
    batch_size: int = 16
    capacities: Sequence[float | None] | None = None
    end_id: int | None = None


@dataclass
class _Branch:
    """The tokens that are read after a shared context, and what is scored on them.

    targets: of each request, by its number, the token to predict after each of ``inputs``.
    """

    inputs: tuple[int, ...]
    targets: dict[int, tuple[int, ...]] = field(default_factory=dict)


@dataclass
class _Group:
    """A context and all that follows it."""

    context: tuple[int, ...]
    branches: dict[tuple[int, ...], _Branch] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return len(self.context) + max(map(len, self.branches))


class _Row(NamedTuple):
    """A part of a text: the ``tokens``, after ``before`` others that are in row ``row``."""

    row: int
    before: tuple[int, ...]
    tokens: tuple[int, ...]


def score(
    model: Transformer,
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    config: ScoringConfig,
    cost: ForwardCost | None = None,
    progress: Callable[[int], object] | None = None,
) -> list[Score]:
    """Return the score of each pair of a context and its continuation, in their order.

    A text of more than ``max_length`` tokens loses the beginning of its context, as in lm-eval's
    model for Hugging Face. Contexts are sorted by length. What several requests have in common
    is computed once: the context, and the whole text where they differ in the last token alone.

    cost: counts what is computed. progress: called with the number of requests that are done.

    Raises:
        ValueError: a context or a continuation is empty, or the latter is longer than the model
        reads.
    """
    scorer = _Scorer(model, config, cost)
    handles = [] if cost is None else cost.watch_experts(model)
    scores: dict[int, Score] = {}
    try:
        groups = _group(requests, config.max_length)
        for start in range(0, len(groups), config.batch_size):
            new = scorer.score(groups[start : start + config.batch_size])
            scores |= new
            if progress is not None:
                progress(len(new))
    finally:
        for handle in handles:
            handle.remove()
    return [scores[number] for number in range(len(requests))]


def _group(
    requests: Sequence[tuple[Sequence[int], Sequence[int]]], max_length: int
) -> list[_Group]:
    """Return the requests by shared context, the longest texts first."""
    groups: dict[tuple[int, ...], _Group] = {}
    for number, (context, continuation) in enumerate(requests):
        count = len(continuation)
        if not context or not 0 < count <= max_length:
            raise ValueError(
                f"a context of {len(context)} tokens and a continuation of {count}: there has to be"
                f" one of each, and no more than {max_length} of a continuation"
            )
        # The last token is predicted, and not read.
        read = tuple([*context, *continuation][-(max_length + 1) :][:-1])
        shared, inputs = read[: len(read) - count], read[len(read) - count :]
        group = groups.setdefault(shared, _Group(shared))
        branch = group.branches.setdefault(inputs, _Branch(inputs))
        branch.targets[number] = tuple(continuation)
    return sorted(groups.values(), key=lambda group: -group.length)


class _Scorer:
    """Computes batches of groups."""

    def __init__(self, model: Transformer, config: ScoringConfig, cost: ForwardCost | None) -> None:
        self._model, self._config, self._cost = model, config, cost
        self._device = next(model.parameters()).device
        self._num_routers = len(model.routers)

    def score(self, groups: Sequence[_Group]) -> dict[int, Score]:
        """Return the scores of all requests of these groups, by number."""
        budget = self._config.budget
        longest = max(len(inputs) for group in groups for inputs in group.branches)
        cache = Cache(
            self._model.config,
            len(groups),
            margin=longest,
            tracks_routed=budget is not None and budget.layer_cap is not None,
        )
        with torch.inference_mode():
            contexts = [_Row(row, (), group.context) for row, group in enumerate(groups)]
            shared = [[0] * self._num_routers for _ in groups]
            for part, output in self._extend(cache, contexts, last_only=True):
                self._count(shared, part, output)
            return self._score_branches(cache, groups, shared)

    def _score_branches(
        self, cache: Cache, groups: Sequence[_Group], shared: list[list[int]]
    ) -> dict[int, Score]:
        scores: dict[int, Score] = {}
        branches = [list(group.branches.values()) for group in groups]
        for turn in range(max(map(len, branches))):
            rows = [row for row in range(len(groups)) if len(branches[row]) > turn]
            if turn:
                cache.truncate([len(groups[row].context) for row in rows], rows)
            active = {row: branches[row][turn] for row in rows}
            chosen = [[*counts] for counts in shared]
            texts = [_Row(row, groups[row].context, active[row].inputs) for row in rows]
            sums = {number: Score(0.0, True) for b in active.values() for number in b.targets}
            for part, output in self._extend(cache, texts, last_only=False):
                self._count(chosen, part, output)
                self._add(sums, part, output.require_logits(), groups, active)
            scores |= sums
            if self._cost is not None:
                for row in rows:
                    length = len(groups[row].context)
                    self._cost.add(length + len(active[row].inputs), chosen[row])
                    if turn and length:
                        self._cost.add(length, shared[row], cached=True)
        return scores

    def _extend(
        self, cache: Cache, texts: Sequence[_Row], last_only: bool
    ) -> Iterator[tuple[list[_Row], ModelOutput]]:
        """Run texts chunk by chunk; yield each chunk's parts and what the model returned."""
        vocabulary = 1 if last_only else self._model.config.vocabulary
        chunk = min(_CHUNK, max(1, _MAX_LOGITS // (vocabulary * max(1, len(texts)))))
        start = 0
        while remaining := [text for text in texts if len(text.tokens) > start]:
            parts = [
                _Row(t.row, t.before + t.tokens[:start], t.tokens[start : start + chunk])
                for t in remaining
            ]
            tokens_NS, valid_NS = pad_texts([part.tokens for part in parts], self._device)
            output = self._model.extend(
                tokens_NS,
                cache,
                self._config.selection,
                rows=[part.row for part in parts],
                budget=self._config.budget,
                capacities=self._config.capacities,
                documents_NS=self._documents(parts, tokens_NS),
                valid_NS=valid_NS,
                last_only=last_only,
            )
            yield parts, output
            start += chunk

    def _documents(self, parts: Sequence[_Row], tokens_NS: Tensor) -> Tensor | None:
        """Number the documents of the parts, those before them included."""
        end_id = self._config.end_id
        if end_id is None:
            return None
        before = [part.before.count(end_id) for part in parts]
        before_N1 = torch.tensor(before, device=tokens_NS.device).unsqueeze(1)
        return before_N1 + document_numbers(tokens_NS, end_id)

    def _count(self, chosen: list[list[int]], parts: Sequence[_Row], output: ModelOutput) -> None:
        """Add the tokens that each router took, by row."""
        if self._cost is None:
            return
        for router, record in enumerate(output.routing):
            counts = record.chosen_BS.sum(dim=1).tolist()
            for part, count in zip(parts, counts, strict=True):
                chosen[part.row][router] += int(count)

    def _add(
        self,
        sums: dict[int, Score],
        parts: Sequence[_Row],
        logits_NSV: Tensor,
        groups: Sequence[_Group],
        active: dict[int, _Branch],
    ) -> None:
        """Add the scores of the tokens after those of ``parts``."""
        log_probability_NSV = logits_NSV.float().log_softmax(dim=-1)
        likeliest_NS = logits_NSV.argmax(dim=-1)
        for index, part in enumerate(parts):
            start, count = len(part.before) - len(groups[part.row].context), len(part.tokens)
            for number, targets in active[part.row].targets.items():
                target_S = torch.tensor(targets[start : start + count], device=self._device)
                scores_S = log_probability_NSV[index, :count].gather(1, target_S.unsqueeze(1))
                is_greedy = bool((likeliest_NS[index, :count] == target_S).all())
                so_far = sums[number]
                sums[number] = Score(
                    so_far.log_probability + float(scores_S.sum()), so_far.is_greedy and is_greedy
                )
