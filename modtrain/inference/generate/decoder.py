"""Decoding token by token, with continuous batching: sequences join and leave a running batch.

Shapes: N sequences of a step, S new tokens, T tokens of a step, G drafts, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from modtrain.data.stream.batch import document_numbers
from modtrain.inference.config import SamplingConfig
from modtrain.inference.generate.counts import SequenceCount, Statistics
from modtrain.inference.generate.sampling import Drafts, PerSequenceRNG, distribution, draw, verify
from modtrain.models.cache.cache import Cache
from modtrain.models.depth.config import ComputeBudget, Selection
from modtrain.models.transformer import ModelOutput, Transformer

Finish = Literal["length", "end", "stop"]


class Token(NamedTuple):
    """A token of the text of sequence ``number``.

    depth: routed parts that it entered; None if not requested. is_prompt: whether it is part of the
    prompt.
    """

    number: int
    id: int
    depth: int | None = None
    is_prompt: bool = False


class End(NamedTuple):
    """The end of sequence ``number``: by length, by the end of its document, or stopped."""

    number: int
    reason: Finish


@dataclass
class DecoderConfig:
    """Settings of a decoder.

    selection: the causal decision. max_tokens: maximum of generated tokens per sequence. budget:
    the compute budget; None: as trained. batch_size: sequences at once. prefill_chunk: tokens of a
    prompt at once. end_id: the end-of-document token, which is not returned; None: none.
    more_end_ids: further tokens that end a text, and are not returned.
    mask_documents: documents do not attend to each other. with_depth: return each token's depth,
    for which the last token is run as well. drafts: number of tokens to draft at once, at
    ``draft_budget``; 0: no speculation. capacities: one per layer, for a checkpoint from the middle
    of a capacity schedule; None: the configuration's.
    """

    selection: Selection
    max_tokens: int
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    budget: ComputeBudget | None = None
    batch_size: int = 1
    prefill_chunk: int = 2048
    end_id: int | None = None
    more_end_ids: tuple[int, ...] = ()
    mask_documents: bool = False
    with_depth: bool = False
    drafts: int = 0
    draft_budget: ComputeBudget | None = None
    capacities: Sequence[float | None] | None = None


@dataclass
class _Sequence:
    """A sequence in the batch.

    text: its tokens, the last of which is not in the cache yet. num_generated: how many of them
    were generated. is_complete: only the depth of the last token is missing.
    """

    number: int
    row: int
    text: list[int]
    num_generated: int = 0
    is_complete: bool = False


class Decoder:
    """Continues sequences. The result of each does not depend on the others in the batch."""

    def __init__(
        self, model: Transformer, config: DecoderConfig, prompts: Sequence[Sequence[int]]
    ) -> None:
        """Prepare to continue the prompts, which have at least one token each.

        Raises:
            ValueError: a prompt is empty.
        """
        if not all(len(prompt) for prompt in prompts):
            raise ValueError("a prompt is empty: begin with the end-of-document token")
        self._model, self._config, self._prompts = model, config, prompts
        self._waiting = deque(range(len(prompts)))
        batch = max(1, min(config.batch_size, len(prompts)))
        self._free = list(range(batch))
        self._active: dict[int, _Sequence] = {}
        self._rng = PerSequenceRNG(config.sampling.seed, len(prompts))
        self._device = next(model.parameters()).device
        self._cache = self._new_cache(batch, config.budget)
        self._draft_cache = self._new_cache(batch, config.draft_budget) if config.drafts else None
        self._caches = [c for c in (self._cache, self._draft_cache) if c is not None]
        self._seen_RV: Tensor | None = None
        if config.sampling.repetition_penalty != 1:
            shape = (batch, model.config.vocabulary)
            self._seen_RV = torch.zeros(shape, dtype=torch.bool, device=self._device)
        self._stopped: set[int] = set()
        zeros = [0] * len(model.routers)
        self.statistics = Statistics(
            chosen_R=[*zeros], by_sequence=[SequenceCount(0, [*zeros]) for _ in prompts]
        )

    def run(self) -> Iterator[Token | End]:
        """Yield the tokens of all sequences as they are generated, each sequence's in order."""
        while self._waiting or self._active:
            with torch.inference_mode():
                rows = self._admit()
                events = [*self._prefill(rows), *self._step(rows or list(self._active))]
            for event in events:
                # The caller may stop a sequence with more events in this step.
                if event.number not in self._stopped:
                    yield event

    def stop(self, number: int) -> None:
        """End a sequence from outside, such as at a stop string; it yields no more events."""
        self._stopped.add(number)
        for row, sequence in list(self._active.items()):
            if sequence.number == number:
                self._release(row)

    def _new_cache(self, batch: int, budget: ComputeBudget | None) -> Cache:
        config = self._config
        return Cache(
            self._model.config,
            batch,
            # One more than the drafts: the last drawn token may be in the cache as well.
            margin=config.drafts + 1 if config.drafts else 0,
            tracks_routed=budget is not None and budget.layer_cap is not None,
        )

    def _extend(
        self,
        cache: Cache,
        tokens_NS: Tensor,
        rows: list[int],
        valid_NS: Tensor | None,
        last_only: bool = True,
    ) -> ModelOutput:
        """Run the next tokens of these rows with one of the caches, at its compute budget."""
        config, documents_NS = self._config, None
        if config.mask_documents and config.end_id is not None:
            # Numbered by the end tokens before each token, those in the cache included.
            texts = [self._active[row].text[: cache.seen[row]] for row in rows]
            before = [text.count(config.end_id) for text in texts]
            before_N1 = torch.tensor(before, device=tokens_NS.device).unsqueeze(1)
            documents_NS = before_N1 + document_numbers(tokens_NS, config.end_id)
        return self._model.extend(
            tokens_NS,
            cache,
            config.selection,
            rows=rows,
            budget=config.budget if cache is self._cache else config.draft_budget,
            capacities=config.capacities,
            documents_NS=documents_NS,
            valid_NS=valid_NS,
            last_only=last_only,
        )

    def _admit(self) -> list[int]:
        """Assign free rows to waiting sequences, and return these rows."""
        rows: list[int] = []
        while self._free and self._waiting:
            row, number = self._free.pop(0), self._waiting.popleft()
            self._active[row] = _Sequence(number, row, list(self._prompts[number]))
            for cache in self._caches:
                cache.reset(row)
            if self._seen_RV is not None:
                self._seen_RV[row] = False
                self._seen_RV[row, self._active[row].text] = True
            self.statistics.prompt_tokens += len(self._active[row].text)
            rows.append(row)
        return rows

    def _prefill(self, rows: list[int]) -> list[Token | End]:
        """Run new prompts except for the part that their first step runs: the last chunk."""
        events: list[Token | End] = []
        chunk = self._config.prefill_chunk
        last = chunk if self._draft_cache is None else 1
        while unfinished := [row for row in rows if len(self._uncached(self._cache, row)) > last]:
            uncached = [self._uncached(self._cache, row) for row in unfinished]
            parts = [tokens[: min(chunk, len(tokens) - last)] for tokens in uncached]
            tokens_NS, valid_NS = pad_texts(parts, self._device)
            output, *_ = [self._extend(c, tokens_NS, unfinished, valid_NS) for c in self._caches]
            if self._config.with_depth:
                depths = self._depths(output, tokens_NS)
                events += [
                    Token(self._active[row].number, token, depth, is_prompt=True)
                    for row, part, row_depths in zip(unfinished, parts, depths, strict=True)
                    for token, depth in zip(part, row_depths, strict=False)
                ]
        return events

    def _uncached(self, cache: Cache, row: int) -> list[int]:
        """Return the tokens of a sequence that are not in the cache."""
        return self._active[row].text[cache.seen[row] :]

    def _step(self, rows: list[int]) -> list[Token | End]:
        """Run the uncached tokens of these sequences and drafts after them; sample what follows."""
        if not rows:
            return []
        sequences = [self._active[row] for row in rows]
        numbers = [s.number for s in sequences]
        seen_NV = None if self._seen_RV is None else self._seen_RV[rows]
        uncached = [self._uncached(self._cache, row) for row in rows]
        tokens_NT, valid_NT = pad_texts(uncached, self._device)
        drafts = None
        if self._draft_cache is not None:
            drafts = self._draft(self._draft_cache, rows, numbers, seen_NV)
            tokens_NT = torch.cat([tokens_NT, drafts.tokens_NG], dim=1)
        output = self._extend(self._cache, tokens_NT, rows, valid_NT, last_only=drafts is None)
        probability_NTV = self._probabilities(output, drafts, seen_NV)
        drafted: list[list[int]] = [[] for _ in rows]
        if drafts is not None:
            accepted, next_N = verify(probability_NTV, drafts, self._rng, numbers)
            tokens = drafts.tokens_NG.tolist()
            drafted = [row[:count] for row, count in zip(tokens, accepted, strict=True)]
        elif self._config.sampling.greedy:
            next_N = probability_NTV[:, 0].argmax(dim=-1)
        else:
            next_N = draw(probability_NTV[:, 0], self._rng.uniform(numbers))
        self._update_statistics(output, tokens_NT, valid_NT, numbers)
        depths = self._depths(output, tokens_NT) if self._config.with_depth else [None] * len(rows)
        events = [
            event
            for i, token in enumerate(next_N.tolist())
            for event in self._append(sequences[i], uncached[i], [*drafted[i], token], depths[i])
        ]
        self._roll_back_drafts(rows)
        return events

    def _draft(
        self, cache: Cache, rows: list[int], numbers: list[int], seen_NV: Tensor | None
    ) -> Drafts:
        """Draft what follows the texts of these rows, whose newest tokens may not be cached yet."""
        uncached = [self._uncached(cache, row) for row in rows]
        tokens_NS, valid_NS = pad_texts(uncached, self._device)
        tokens, probabilities = [], []
        for _ in range(self._config.drafts):
            output = self._extend(cache, tokens_NS, rows, valid_NS)
            logits_NV = output.require_logits()[:, -1]
            probability_NV = distribution(logits_NV, self._config.sampling, seen_NV)
            token_N = draw(probability_NV, self._rng.uniform(numbers))
            if seen_NV is not None:
                seen_NV = seen_NV.scatter(1, token_N.unsqueeze(1), True)
            tokens.append(token_N)
            probabilities.append(probability_NV)
            tokens_NS, valid_NS = token_N.unsqueeze(1), None
        return Drafts(torch.stack(tokens, dim=1), torch.stack(probabilities, dim=1))

    def _append(
        self, sequence: _Sequence, uncached: list[int], new: list[int], depths: list[int] | None
    ) -> Iterator[Token | End]:
        """Append ``new`` tokens; this step ran the ``uncached`` ones and all new but the last."""
        number, text, counts = sequence.number, sequence.text, self.statistics
        if not sequence.is_complete:
            counts.steps += 1
            counts.drafted += self._config.drafts
        if depths is not None:
            for token, depth in zip(uncached, depths, strict=False):
                yield Token(number, token, depth, is_prompt=sequence.num_generated == 0)
            depths = depths[len(uncached) :]
        reason: Finish | None = "length" if sequence.is_complete else None
        for count, token in enumerate(new, start=1):
            if reason is not None or sequence.is_complete:
                break
            if token == self._config.end_id or token in self._config.more_end_ids:
                reason = "end"
                break
            text.append(token)
            sequence.num_generated += 1
            is_draft = count < len(new)
            counts.generated_tokens += 1
            counts.accepted += is_draft
            if depths is None:
                yield Token(number, token)
            elif is_draft:
                yield Token(number, token, depths[count - 1])
            if sequence.num_generated == self._config.max_tokens:
                sequence.is_complete = depths is not None and not is_draft
                reason = None if sequence.is_complete else "length"
        if reason is not None:
            self._release(sequence.row)
            yield End(number, reason)

    def _probabilities(
        self, output: ModelOutput, drafts: Drafts | None, seen_NV: Tensor | None
    ) -> Tensor:
        """Return the distribution after each token of the step (N, T, V)."""
        distributions = []
        logits_NTV = output.require_logits()
        for index in range(logits_NTV.shape[1]):
            if index and drafts is not None and seen_NV is not None:
                token_N1 = drafts.tokens_NG[:, index - 1 : index]
                seen_NV = seen_NV.scatter(1, token_N1, True)
            distributions.append(distribution(logits_NTV[:, index], self._config.sampling, seen_NV))
        return torch.stack(distributions, dim=1)

    def _roll_back_drafts(self, rows: list[int]) -> None:
        """Remove rejected drafts from the caches, and record the tokens that the texts have now."""
        active = [self._active[row] for row in rows if row in self._active]
        for cache in self._caches if self._config.drafts and active else []:
            seen = [min(cache.seen[s.row], len(s.text) - 1) for s in active]
            cache.truncate(seen, [s.row for s in active])
        if self._seen_RV is not None:
            for s in active:
                self._seen_RV[s.row, s.text[-1 - self._config.drafts :]] = True

    @staticmethod
    def _depths(output: ModelOutput, tokens_NS: Tensor) -> list[list[int]]:
        """Return how many routed parts each token entered (N, S)."""
        depth_NS = torch.zeros_like(tokens_NS)
        for record in output.routing:
            depth_NS += record.chosen_BS
        depths: list[list[int]] = depth_NS.tolist()
        return depths

    def _update_statistics(
        self,
        output: ModelOutput,
        tokens_NT: Tensor,
        valid_NT: Tensor | None,
        numbers: list[int],
    ) -> None:
        whole = [tokens_NT.shape[1]] * len(numbers)
        lengths = whole if valid_NT is None else valid_NT.sum(dim=1).tolist()
        allocated = sum(cache.allocated_bytes() for cache in self._caches)
        self.statistics.add_step(output.routing, lengths, numbers, allocated)

    def _release(self, row: int) -> None:
        self._active.pop(row)
        self._free.append(row)


def pad_texts(texts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return texts as one tensor (N, S), padded at the end, and False for padding (None: none)."""
    lengths = [len(text) for text in texts]
    longest = max(lengths)
    rows = [[*text, *[0] * (longest - len(text))] for text in texts]
    tokens_NS = torch.tensor(rows, dtype=torch.long, device=device)
    if min(lengths) == longest:
        return tokens_NS, None
    length_N1 = torch.tensor(lengths, device=device).unsqueeze(1)
    return tokens_NS, torch.arange(longest, device=device) < length_N1
