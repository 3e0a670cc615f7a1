"""Token after token: sequences that begin, go on and end in a running batch.

Shapes: N sequences of a step, S new tokens, T tokens of a step, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from modtrain.data.stream.documents import document_numbers
from modtrain.inference.generate.sampling import Dice, distribution
from modtrain.inference.generate.sampling_config import SamplingConfig
from modtrain.inference.generate.speculation import Drafter, Drafts, padded, verify
from modtrain.models.cache.cache import Cache
from modtrain.models.depth.compute_budget import ComputeBudget
from modtrain.models.depth.config import Selection
from modtrain.models.transformer import ModelOutput, Transformer

Finish = Literal["length", "end", "stop"]


class Token(NamedTuple):
    """A token of the text of sequence ``number``.

    depth: routed parts that it entered; None where that was not asked for. is_prompt: it was given,
    not made.
    """

    number: int
    id: int
    depth: int | None = None
    is_prompt: bool = False


class End(NamedTuple):
    """The end of sequence ``number``: by its length, the end of its document, or a stop."""

    number: int
    reason: Finish


@dataclass
class DecoderConfig:
    """How sequences are decoded.

    selection: the causal decision. dial: how much is computed. max_tokens: made of each sequence.
    batch_size: sequences at once. prefill_chunk: tokens of a prompt at once. end_id: the token that
    ends a document and is not given; None: none does. apart: documents do not see each other.
    with_depth: tell each token's depth, for which the last one is run as well. drafts: tokens that
    are drafted at once, at ``draft_budget``; 0: none.
    """

    selection: Selection
    max_tokens: int
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    budget: ComputeBudget | None = None
    batch_size: int = 1
    prefill_chunk: int = 2048
    end_id: int | None = None
    apart: bool = False
    with_depth: bool = False
    drafts: int = 0
    draft_budget: ComputeBudget | None = None


@dataclass
class Statistics:
    """What a job took.

    prompt_tokens, made_tokens: of all sequences. steps: how often a sequence went on by a pass of
    the whole model. drafted, accepted: tokens of self-speculation, and those of them that the text
    has. chosen_R: tokens of these passes that took part, by router, of ``stepped_tokens``, drafts
    that were dropped included. cache_bytes: the largest memory of the caches.
    """

    prompt_tokens: int = 0
    made_tokens: int = 0
    steps: int = 0
    stepped_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    chosen_R: list[int] = field(default_factory=list)
    cache_bytes: int = 0


@dataclass
class _Sequence:
    """A sequence in the batch.

    text: its tokens, the last of which is not in the cache yet. made: how many of them were made.
    is_last: the text is complete, and only the depth of its last token is missing.
    """

    number: int
    row: int
    text: list[int]
    made: int = 0
    is_last: bool = False


class Decoder:
    """Continues sequences. Each one comes out as it would alone, whatever runs beside it."""

    def __init__(
        self, model: Transformer, config: DecoderConfig, prompts: Sequence[Sequence[int]]
    ) -> None:
        """Take a model and the prompts' tokens, at least one token each.

        Raises:
            ValueError: a prompt is empty.
        """
        if not all(len(prompt) for prompt in prompts):
            raise ValueError("a prompt is empty: begin with the end of a document")
        self._model, self._config = model, config
        self._prompts = prompts
        self._waiting = deque(range(len(prompts)))
        batch = max(1, min(config.batch_size, len(prompts)))
        self._free = list(range(batch))
        self._active: dict[int, _Sequence] = {}
        self._dice = Dice.of(config.sampling.seed, len(prompts))
        self._device = next(model.parameters()).device
        self._cache = self._new_cache(batch, config.budget)
        self._drafter = self._new_drafter(batch) if config.drafts else None
        self._seen_RV: Tensor | None = None
        if config.sampling.repetition_penalty != 1:
            vocabulary = model.config.vocabulary
            shape = (batch, vocabulary)
            self._seen_RV = torch.zeros(shape, dtype=torch.bool, device=self._device)
        self._stopped: set[int] = set()
        self.statistics = Statistics(chosen_R=[0] * len(model.routers))

    def run(self) -> Iterator[Token | End]:
        """Yield the tokens of all sequences as they come, mixed, each sequence's in order."""
        while self._waiting or self._active:
            with torch.inference_mode():
                rows = self._admit()
                events = [*self._prefill(rows), *self._step(rows or list(self._active))]
            for event in events:
                # Whoever reads may stop a sequence of which more has come already.
                if event.number not in self._stopped:
                    yield event

    def stop(self, number: int) -> None:
        """End a sequence from outside, such as at a stop string; no more of it comes."""
        self._stopped.add(number)
        for row, sequence in list(self._active.items()):
            if sequence.number == number:
                self._release(row)

    def _new_cache(self, batch: int, budget: ComputeBudget | None) -> Cache:
        config = self._config
        return Cache(
            self._model.config,
            batch,
            # One more than the drafts: what was drawn last may be in the cache as well.
            margin=config.drafts + 1 if config.drafts else 0,
            tracks_routed=budget is not None and budget.layer_cap is not None,
        )

    def _new_drafter(self, batch: int) -> Drafter:
        config = self._config

        def extend(tokens_NS: Tensor, cache: Cache, **how: Any) -> ModelOutput:
            return self._extend(tokens_NS, cache, budget=config.draft_budget, **how)

        cache = self._new_cache(batch, config.draft_budget)
        return Drafter(extend, cache, self._device, config.drafts, config.sampling, self._dice)

    def _extend(
        self,
        tokens_NS: Tensor,
        cache: Cache,
        *,
        rows: list[int],
        budget: ComputeBudget | None,
        valid_NS: Tensor | None = None,
        last_only: bool = False,
    ) -> ModelOutput:
        documents_NS = None
        if self._config.apart and self._config.end_id is not None:
            documents_NS = self._document_numbers(tokens_NS, cache, rows, self._config.end_id)
        return self._model.extend(
            tokens_NS,
            cache,
            self._config.selection,
            rows=rows,
            budget=budget,
            documents_NS=documents_NS,
            valid_NS=valid_NS,
            last_only=last_only,
        )

    def _document_numbers(
        self, tokens_NS: Tensor, cache: Cache, rows: list[int], end_id: int
    ) -> Tensor:
        """Number documents by the ends before each token, those in the cache included."""
        texts = [self._active[row].text[: cache.seen[row]] for row in rows]
        before = [text.count(end_id) for text in texts]
        before_N1 = torch.tensor(before, device=tokens_NS.device).unsqueeze(1)
        return before_N1 + document_numbers(tokens_NS, end_id)

    def _admit(self) -> list[int]:
        """Give waiting sequences the rows that are free, and return these."""
        rows: list[int] = []
        while self._free and self._waiting:
            row, number = self._free.pop(0), self._waiting.popleft()
            self._active[row] = _Sequence(number, row, list(self._prompts[number]))
            self._cache.reset(row)
            if self._drafter is not None:
                self._drafter.reset(row)
            if self._seen_RV is not None:
                self._seen_RV[row] = False
                self._seen_RV[row, self._active[row].text] = True
            self.statistics.prompt_tokens += len(self._active[row].text)
            rows.append(row)
        return rows

    def _prefill(self, rows: list[int]) -> list[Token | End]:
        """Run all of new prompts but what their first step runs: the last chunk at most."""
        events: list[Token | End] = []
        chunk = self._config.prefill_chunk
        last = chunk if self._drafter is None else 1
        while left := [row for row in rows if len(self._unread(row)) > last]:
            parts = [self._unread(row)[: min(chunk, len(self._unread(row)) - last)] for row in left]
            tokens_NS, valid_NS = padded(parts, self._device)
            output = self._run(tokens_NS, left, valid_NS, last_only=True)
            if self._drafter is not None:
                self._drafter.feed(tokens_NS, left, valid_NS)
            if self._config.with_depth:
                depths = self._depths(output, tokens_NS)
                events += [
                    Token(self._active[row].number, token, depth, is_prompt=True)
                    for row, part, own in zip(left, parts, depths, strict=True)
                    for token, depth in zip(part, own, strict=False)
                ]
        return events

    def _unread(self, row: int) -> list[int]:
        """Return the tokens of a sequence that the cache lacks."""
        return self._active[row].text[self._cache.seen[row] :]

    def _step(self, rows: list[int]) -> list[Token | End]:
        """Run what is unread of these sequences, with drafts behind it, and draw what follows."""
        if not rows:
            return []
        sequences = [self._active[row] for row in rows]
        numbers = [s.number for s in sequences]
        seen_NV = None if self._seen_RV is None else self._seen_RV[rows]
        unread = [self._unread(row) for row in rows]
        tokens_NT, valid_NT = padded(unread, self._device)
        drafts = None
        if self._drafter is not None:
            drafts = self._drafter.propose([s.text for s in sequences], rows, numbers, seen_NV)
            tokens_NT = torch.cat([tokens_NT, drafts.tokens_NG], dim=1)
        output = self._run(tokens_NT, rows, valid_NT, last_only=drafts is None)
        probability_NTV = self._probabilities(output, drafts, seen_NV)
        if drafts is None and self._config.sampling.greedy:
            taken, next_N = [0] * len(rows), probability_NTV[:, 0].argmax(dim=-1)
        else:
            taken, next_N = verify(probability_NTV, drafts, self._dice, numbers)
        drafted: list[list[int]] = [[] for _ in rows]
        if drafts is not None:
            drafted = [
                own[:count] for own, count in zip(drafts.tokens_NG.tolist(), taken, strict=True)
            ]
        self._tally(output, tokens_NT, valid_NT)
        depths = self._depths(output, tokens_NT) if self._config.with_depth else [None] * len(rows)
        events = [
            event
            for i, token in enumerate(next_N.tolist())
            for event in self._go_on(sequences[i], unread[i], [*drafted[i], token], depths[i])
        ]
        self._settle(rows)
        return events

    def _run(
        self, tokens_NS: Tensor, rows: list[int], valid_NS: Tensor | None, last_only: bool
    ) -> ModelOutput:
        budget = self._config.budget
        return self._extend(
            tokens_NS, self._cache, rows=rows, budget=budget, valid_NS=valid_NS, last_only=last_only
        )

    def _go_on(
        self, sequence: _Sequence, unread: list[int], new: list[int], depths: list[int] | None
    ) -> Iterator[Token | End]:
        """Add new tokens. Run in this step were those unread, and all of ``new`` but the last."""
        number, text, counts = sequence.number, sequence.text, self.statistics
        if not sequence.is_last:
            counts.steps += 1
            counts.drafted += self._config.drafts
        if depths is not None:
            for token, depth in zip(unread, depths, strict=False):
                yield Token(number, token, depth, is_prompt=sequence.made == 0)
            depths = depths[len(unread) :]
        reason: Finish | None = "length" if sequence.is_last else None
        for place, token in enumerate(new, start=1):
            if reason is not None or sequence.is_last:
                break
            if token == self._config.end_id:
                reason = "end"
                break
            text.append(token)
            sequence.made += 1
            is_run = place < len(new)
            counts.made_tokens += 1
            counts.accepted += is_run
            if depths is None:
                yield Token(number, token)
            elif is_run:
                yield Token(number, token, depths[place - 1])
            if sequence.made == self._config.max_tokens:
                sequence.is_last = depths is not None and not is_run
                reason = None if sequence.is_last else "length"
        if reason is not None:
            self._release(sequence.row)
            yield End(number, reason)

    def _probabilities(
        self, output: ModelOutput, drafts: Drafts | None, seen_NV: Tensor | None
    ) -> Tensor:
        """Return the distribution behind each token of the step (N, T, V)."""
        found = []
        logits_NTV = output.require_logits()
        for place in range(logits_NTV.shape[1]):
            if place and drafts is not None and seen_NV is not None:
                token_N1 = drafts.tokens_NG[:, place - 1 : place]
                seen_NV = seen_NV.scatter(1, token_N1, True)
            found.append(distribution(logits_NTV[:, place], self._config.sampling, seen_NV))
        return torch.stack(found, dim=1)

    def _settle(self, rows: list[int]) -> None:
        """Forget what was run but not taken, and note what the texts have now."""
        left = [self._active[row] for row in rows if row in self._active]
        if self._drafter is not None and left:
            own, seen = [s.row for s in left], [len(s.text) - 1 for s in left]
            self._cache.truncate(seen, own)
            self._drafter.keep(own, seen)
        if self._seen_RV is not None:
            for s in left:
                self._seen_RV[s.row, s.text[-1 - self._config.drafts :]] = True

    @staticmethod
    def _depths(output: ModelOutput, tokens_NS: Tensor) -> list[list[int]]:
        """Return how many routed parts each token entered (N, S)."""
        depth_NS = torch.zeros_like(tokens_NS)
        for record in output.routing:
            depth_NS += record.chosen_BS
        found: list[list[int]] = depth_NS.tolist()
        return found

    def _tally(
        self,
        output: ModelOutput,
        tokens_NT: Tensor,
        valid_NT: Tensor | None,
    ) -> None:
        counts = self.statistics
        held = self._cache.allocated_bytes()
        if self._drafter is not None:
            held += self._drafter.allocated_bytes()
        counts.cache_bytes = max(counts.cache_bytes, held)
        counts.stepped_tokens += tokens_NT.numel() if valid_NT is None else int(valid_NT.sum())
        for place, record in enumerate(output.routing):
            counts.chosen_R[place] += int(record.chosen_BS.sum())

    def _release(self, row: int) -> None:
        self._active.pop(row)
        self._free.append(row)
