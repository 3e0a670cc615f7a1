"""Context parallelism: long sequences whose tokens lie on several ranks, in layers that route them.

The ranks of a group read the same token ids and each keep a share of the tokens: their stream,
norms, products and loss. What goes by the whole sequence is gathered:

- Attention: keys and values, against which each rank computes its own queries (Llama 3, arXiv
  2407.21783, section 3.3.2). A convolution's values likewise.
- Depth routing: scores. All ranks choose alike over the whole sequence; the K chosen tokens are
  shared out anew, so that all compute as much, and their updates go back to who holds them.
- Experts with limited room: the router's logits. All choose alike; each rank computes its part of
  every expert's slots, for which all tokens' normed features are gathered and the updates summed.
  Without a limit each rank sends its own tokens to experts.

A sequence of S tokens is split into 2 n pieces of h = ceil(S / 2n), zeros standing behind the last
token, and rank r has the pieces r and 2 n - 1 - r: an early and a late one, whose queries together
see as many keys on every rank. The context of a module is that of its whole sequence; only its
features, and the rows of `attention_mask_BSS`, are of the share. Those are L S numbers for each
sequence that differs in documents or padding, once for all layers that every token enters.

What is gathered may be used by each rank in another way, so its gradients are summed. The token
loss is a sum over the ranks' tokens, and its gradient counts n times, for the mean over all ranks
that FSDP takes. The auxiliary losses are made by all ranks alike of what was gathered: summed,
their gradients count n times by themselves.

Every exchange has to be on the way to the loss on all ranks or on none, or backward would wait for
ever: no rank leaves out what is but padding.

Costs of a block in forward, for a rank: its tokens' keys and values to all; routed, S scores, a
reduce-scatter of the K chosen tokens' features and a gather of their updates; backward as many.

Shapes: B batch, S sequence, D model, n ranks of the group, L = 2 h tokens of a share, H heads, G
heads of keys and values, W width of a head (convolution: its taps), K chosen of the sequence, J of
them here, T tokens, R choices among experts, E experts, C slots of an expert, M rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from modtrain.common.errors import raise_if_any
from modtrain.common.ignored_target import IGNORED
from modtrain.distributed.collectives import Group, cast_for_autocast, pad_to_multiple
from modtrain.models.attention import Attention, attend
from modtrain.models.block import Block, Residual
from modtrain.models.convolution import Convolution, LeftContext, apply_taps
from modtrain.models.depth.config import TRAINING_SELECTIONS, Selection
from modtrain.models.depth.layer import MixtureOfDepths
from modtrain.models.depth.selection import TokenSlots
from modtrain.models.experts.layer import Experts, Rows
from modtrain.models.feed_forward import FeedForward
from modtrain.models.sequence import Output, SequenceContext, attention_mask
from modtrain.models.transformer import ModelOutput, Transformer
from modtrain.parallel.swap import swap_class
from modtrain.parallel.validation import context_problems


def apply_context_parallel(model: Transformer, mesh: DeviceMesh) -> None:
    """Let each rank of a group keep its share of every sequence. The parameters stay as they are.

    The model is still called with whole sequences, the same on all ranks of the group, and returns
    records, losses and logits of whole sequences. Its gradients are then to be averaged over this
    group's ranks as over all others.

    mesh: the group's, 1-D. All of its ranks have to hold equal weights and draw the same random
    numbers.

    Raises:
        ConfigError: the model cannot be computed so.
        TypeError: a module is of a type that context parallelism does not support.
    """
    raise_if_any(context_problems(model.config, mesh.size()))
    if mesh.size() == 1:
        return
    chunks = SequenceChunks(Group.of(mesh))
    for part in _parts(model):
        if not isinstance(part, (*_KINDS, FeedForward)):
            raise TypeError(f"context parallelism does not support {type(part).__name__}")
    for module in model.modules():
        for base, kind in _KINDS.items():
            if isinstance(module, base):
                swap_class(module, kind, chunks=chunks)


def local_length(length: int, context_size: int) -> int:
    """Return how many tokens of a sequence each of ``context_size`` ranks has, with padding."""
    return length if context_size == 1 else 2 * -(-length // (2 * context_size))


def _parts(model: Transformer) -> Iterator[nn.Module]:
    for layer in model.modules():
        if isinstance(layer, Residual | MixtureOfDepths):
            block = layer.module
            yield from (block.attention, block.mlp) if isinstance(block, Block) else (block,)


class SequenceChunks(NamedTuple):
    """Which tokens of a sequence each rank of a group has, and how they get together."""

    group: Group

    def chunk_offsets(self, length: int) -> tuple[int, int, int]:
        """Return where this rank's two pieces begin, and h."""
        size, rank = self.group.size, self.group.rank
        piece = -(-length // (2 * size))
        return rank * piece, (2 * size - 1 - rank) * piece, piece

    def local_positions(self, length: int, device: torch.device) -> Tensor:
        """Return the positions (L) of this rank's tokens; padding has the last token's."""
        early, late, piece = self.chunk_offsets(length)
        position_L = torch.cat(
            [torch.arange(first, first + piece, device=device) for first in (early, late)]
        )
        return position_L.clamp(max=length - 1)

    def local_index_and_mask(self, index_BK: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Say where in this rank's share the tokens ``index_BK`` are, and which it has at all."""
        _, _, piece = self.chunk_offsets(length)
        size = self.group.size
        piece_BK = index_BK // piece
        is_late_BK = piece_BK >= size
        owner_BK = torch.where(is_late_BK, 2 * size - 1 - piece_BK, piece_BK)
        return index_BK % piece + piece * is_late_BK, owner_BK == self.group.rank

    def local_chunk(self, x_BSD: Tensor, fill: float = 0) -> Tensor:
        """Take this rank's share (B, L, ...) of what all ranks have; ``fill`` is its padding."""
        early, late, piece = self.chunk_offsets(x_BSD.shape[1])
        x_BSD = pad_to_multiple(x_BSD, 2 * self.group.size, fill)
        return torch.cat([x_BSD.narrow(1, first, piece) for first in (early, late)], dim=1)

    def gather(self, x_BLD: Tensor, length: int) -> Tensor:
        """Gather the shares in the tokens' order (B, S, ...); the ranks' gradients are summed."""
        return self.gather_padded(x_BLD).narrow(1, 0, length)

    def gather_padded(self, x_BLD: Tensor) -> Tensor:
        """Return the same with the padding behind (B, 2 n h, ...)."""
        size = self.group.size
        x = self.group.gather_seq_sum_grad(x_BLD, size * x_BLD.shape[1])
        # They come by rank: 0, 2n - 1, 1, 2n - 2, ...
        early = range(0, 2 * size, 2)
        return _pieces(x, [*early, *(place + 1 for place in reversed(early))])

    def reduce_scatter(self, x_BSD: Tensor) -> Tensor:
        """Return this rank's share (B, L, ...) of the sum over ranks; its gradient is gathered."""
        size = self.group.size
        order = [piece for rank in range(size) for piece in (rank, 2 * size - 1 - rank)]
        return self.group.reduce_scatter_seq(_pieces(pad_to_multiple(x_BSD, 2 * size), order))


def _pieces(x_BSD: Tensor, order: list[int]) -> Tensor:
    """Put the equal pieces of a sequence into another order."""
    pieces = x_BSD.chunk(len(order), dim=1)
    return torch.cat([pieces[number] for number in order], dim=1)


class CPTransformer(Transformer):
    """A model that is given whole sequences and has a share of their tokens."""

    chunks: SequenceChunks

    def forward(
        self,
        tokens_BS: Tensor,
        targets_BS: Tensor | None = None,
        selection: Selection | None = None,
        **others: Any,
    ) -> ModelOutput:
        """See `Transformer.forward`."""
        output = super().forward(tokens_BS, targets_BS, selection, **others)
        if output.logits_BSV is None:
            return output
        return output._replace(logits_BSV=self.chunks.gather(output.logits_BSV, tokens_BS.shape[1]))

    def _attention_mask(self, context: SequenceContext) -> Tensor | None:
        positions_BS, documents_BS = context.positions_BS, context.documents_BS
        index_L = self.chunks.local_positions(positions_BS.shape[1], positions_BS.device)
        sees_BLS = attention_mask(
            positions_BS, context.window, documents_BS, context.valid_BS, index_L.unsqueeze(0)
        )
        if sees_BLS is None:
            return None
        # What is added to attention's scores: of a mask each layer would make, and keep, its own.
        bias = cast_for_autocast(self.embedding.weight.new_zeros(()))
        return torch.where(sees_BLS, bias, float("-inf"))

    def extend(self, *_args: Any, **_others: Any) -> ModelOutput:
        """Refuse: what a cache holds is of whole sequences. Raises TypeError."""
        raise TypeError("a model whose sequences are shared out over ranks has no cache")

    def token_loss(self, x_BSD: Tensor, weight_VD: Tensor, targets_BS: Tensor) -> Tensor:
        """Return the mean over the whole sequences' tokens, of the share (B, L, D) of them."""
        group = self.chunks.group
        own_BL = self.chunks.local_chunk(targets_BS, IGNORED)
        loss = super().token_loss(x_BSD, weight_VD, own_BL)
        own, all_of_them = ((t != IGNORED).sum().to(loss.dtype) for t in (own_BL, targets_BS))
        return group.scale_grad(group.sum_copy_grad(loss * (own / all_of_them.clamp(min=1))))


class CPEmbedding(nn.Embedding):
    """Embeds this rank's share of the tokens."""

    chunks: SequenceChunks

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Return their features (B, L, D)."""
        return super().forward(self.chunks.local_chunk(tokens_BS))


class CPAttention(Attention):
    """Attention of this rank's queries to all keys before them."""

    chunks: SequenceChunks

    def forward(self, x_BSD: Tensor, context: SequenceContext) -> Tensor | Output:
        """Return the update of the share (B, L, D)."""
        return super().forward(x_BSD, self._with_local_angles(context))

    def keys_values(self, x_BSD: Tensor, context: SequenceContext) -> tuple[Tensor, Tensor]:
        """Return keys and values (B, S, G, W) of whole sequences, given the share (B, L, D)."""
        k_BLGW, v_BLGW = super().keys_values(x_BSD, self._with_local_angles(context))
        both = self._gather_padded(k_BLGW, v_BLGW).narrow(1, 0, context.positions_BS.shape[1])
        k, v = both.chunk(2, dim=2)
        return k, v

    def _with_local_angles(self, context: SequenceContext) -> SequenceContext:
        cos_BLW, sin_BLW = map(self.chunks.local_chunk, (context.cos_BSW, context.sin_BSW))
        return context._replace(cos_BSW=cos_BLW, sin_BSW=sin_BLW)

    def _gather_padded(self, k_BLGW: Tensor, v_BLGW: Tensor) -> Tensor:
        both = torch.cat([cast_for_autocast(k_BLGW), cast_for_autocast(v_BLGW)], dim=2)
        return self.chunks.gather_padded(both)

    def mix(
        self, q_BSHW: Tensor, k_BSGW: Tensor, v_BSGW: Tensor, context: SequenceContext
    ) -> Tensor:
        """Return what each query of the share attends to (B, L, H, W)."""
        q_BLHW = cast_for_autocast(q_BSHW)
        length, sees_BLS = context.positions_BS.shape[1], context.attention_mask_BSS
        if sees_BLS is None:
            raise ValueError("the context lacks what the queries of this share see")
        if context.keys_values is not None:
            return attend(q_BLHW, k_BSGW, v_BSGW, sees_BLS, is_causal=False)
        k, v = self._gather_padded(k_BSGW, v_BSGW).chunk(2, dim=2)
        early, late, piece = self.chunks.chunk_offsets(length)
        attended = []
        for own, first in ((slice(0, piece), early), (slice(piece, None), late)):
            # What stands behind a piece none of its queries sees: there the balance is.
            before = slice(0, min(first + piece, length))
            sees = sees_BLS[:, own, before]
            attended.append(
                attend(q_BLHW[:, own], k[:, before], v[:, before], sees, is_causal=False)
            )
        return torch.cat(attended, dim=1)


class CPConvolution(Convolution):
    """A convolution over this rank's tokens and those that stand before them."""

    chunks: SequenceChunks

    def mix(self, value_BSD: Tensor, taps_WD: Tensor, context: SequenceContext) -> Tensor:
        """Return the apply_taps values of the share (B, L, D)."""
        length, batch = context.positions_BS.shape[1], len(value_BSD)
        early, late, piece = self.chunks.chunk_offsets(length)
        reach = len(taps_WD) - 1

        def windows(x_BTD: Tensor, fill: float) -> Tensor:
            # The pieces as two batches, each with its own tokens before it.
            behind = 2 * self.chunks.group.size * piece - x_BTD.shape[1]
            sides = (0, 0) * (x_BTD.ndim - 2) + (reach, behind)
            x_BTD = F.pad(x_BTD.expand(batch, *x_BTD.shape[1:]), sides, value=fill)
            return torch.cat([x_BTD.narrow(1, first, reach + piece) for first in (early, late)])

        before = LeftContext(
            windows(self.chunks.gather_padded(value_BSD), 0),
            None if context.documents_BS is None else windows(context.documents_BS, -1),
            None if context.valid_BS is None else windows(context.valid_BS, False),
        )
        return torch.cat(apply_taps(before, taps_WD).chunk(2), dim=1)


class CPMixtureOfDepths(MixtureOfDepths):
    """Chooses over the whole sequence, and computes a share of the chosen."""

    chunks: SequenceChunks

    def _scores(self, x_BSD: Tensor, context: SequenceContext, count: int) -> Tensor:
        length = context.positions_BS.shape[1]
        if self.config.score in ("random", "fixed"):
            # They go by the shape alone, and are the same on all ranks of the group.
            shape_BS0 = x_BSD.new_empty(x_BSD.shape[0], length, 0)
            return super()._scores(shape_BS0, context, count)
        return self.chunks.gather(super()._scores(x_BSD, context, count), length)

    def _predicted(self, x_BSD: Tensor, context: SequenceContext) -> Tensor | None:
        predicted_BL = super()._predicted(x_BSD, context)
        length = context.positions_BS.shape[1]
        return None if predicted_BL is None else self.chunks.gather(predicted_BL, length)

    def _route(
        self, x_BSD: Tensor, context: SequenceContext, scores_BS: Tensor, slots: TokenSlots
    ) -> Output:
        chunks, index_BK, slot_mask_BK = self.chunks, slots.index_BK, slots.slot_mask_BK
        (batch, share, dim), count = x_BSD.shape, index_BK.shape[1]
        local_index_BK, is_local_BK = chunks.local_index_and_mask(index_BK, scores_BS.shape[1])
        is_local_BK1 = is_local_BK.unsqueeze(-1)
        number_B1 = torch.arange(batch, device=x_BSD.device).unsqueeze(1)
        row_N = (local_index_BK + number_B1 * share).flatten()
        x_ND = x_BSD.reshape(-1, dim)
        # One rank has the token, the others add zero.
        local_BKD = x_ND.index_select(0, row_N).view(batch, count, dim).where(is_local_BK1, 0)
        chosen_BJD = chunks.reduce_scatter(local_BKD)
        query_index_J = chunks.local_positions(count, x_BSD.device)
        if slot_mask_BK is None:
            # The shares are padded to one length, which statistics have to leave out.
            slot_mask_BJ = chunks.local_chunk(torch.ones_like(index_BK, dtype=torch.bool), False)
        else:
            slot_mask_BJ = chunks.local_chunk(slot_mask_BK, False)
        output = self._update(
            chosen_BJD,
            context.gather(index_BK, slot_mask_BK, query_index_J),
            scores_BS.gather(1, chunks.local_chunk(index_BK)),
            slot_mask_BJ,
        )
        # Minus zero for who is not here: it changes no bit.
        update_BKD = chunks.gather(output.value_BSD, count).where(is_local_BK1, -0.0)
        out_ND = x_ND.index_add(0, row_N, update_BKD.reshape(-1, dim))
        return output.with_value(out_ND.view_as(x_BSD))

    def _total(self, sums_4: Tensor) -> Tensor:
        return self.chunks.group.all_reduce(sums_4)


class CPExperts(Experts):
    """A mixture that is given a share of the tokens and chooses as if it had all of them."""

    chunks: SequenceChunks

    def mix(self, x_BSD: Tensor, context: SequenceContext) -> Output:
        """Return the update of the share (B, L, D) and the record of the whole sequences."""
        batch, length = len(x_BSD), context.positions_BS.shape[1]
        valid_BS = context.valid_BS
        if valid_BS is None:
            valid_BS = torch.ones(batch, length, dtype=torch.bool, device=x_BSD.device)
        own_BL = self.chunks.local_chunk(valid_BS, False)
        # What padding holds may be anything, and NaN times zero is NaN.
        x_BSD = torch.where(own_BL.unsqueeze(-1), x_BSD, 0)
        normed_BLD = self.norm(x_BSD)
        logits_BLR = self.expert_router(normed_BLD.flatten(0, 1)).view(batch, -1, self.choices)
        logits_TR = self.chunks.gather(logits_BLR, length).flatten(0, 1)
        normaliser_T1 = logits_TR.logsumexp(-1, keepdim=True)
        trains = context.selection in TRAINING_SELECTIONS
        slots = self.config.slots(length) if trains else None
        if slots is None:
            own_TR = logits_BLR.flatten(0, 1)
            normaliser = own_TR.logsumexp(-1, keepdim=True)
            rows = self._rows(own_TR, normaliser, own_BL.shape, own_BL, None, None)
            update_BLD = self._update(rows, normed_BLD.flatten(0, 1), x_BSD.dtype).view_as(x_BSD)
            # Counted over all ranks.
            counts = self.chunks.group.all_reduce(torch.cat([rows.choices_R, rows.executed_E]))
            choices_R, executed_E = torch.split(counts, [len(rows.choices_R), len(rows.executed_E)])
            rows = rows._replace(choices_R=choices_R, executed_E=executed_E)
        else:
            documents_BS = context.documents_BS
            rows = self._rows(
                logits_TR, normaliser_T1, valid_BS.shape, valid_BS, documents_BS, slots
            )
            update_BLD = self._update_by_slots(rows, normed_BLD, length, x_BSD.dtype)
        if self.shared is not None:
            update_BLD = update_BLD + self.shared(normed_BLD)
        record = self._record(rows, logits_TR, normaliser_T1, valid_BS)
        return Output(update_BLD, experts=(record,))

    def _update_by_slots(
        self, rows: Rows, normed_BLD: Tensor, length: int, dtype: torch.dtype
    ) -> Tensor:
        """Compute some of each expert's slots, of whichever tokens; all have the same number."""
        group, num_slots = self.chunks.group, len(rows.token_M) // (self.count * len(normed_BLD))
        token_XJ, weight_XJ = (
            group.local_seq_chunk(x_M.view(-1, num_slots)) for x_M in (rows.token_M, rows.weight_M)
        )
        own = rows._replace(token_M=token_XJ.flatten(), weight_M=weight_XJ.flatten())
        normed_BSD = self.chunks.gather(cast_for_autocast(normed_BLD), length)
        update_TD = self._update(own, normed_BSD.flatten(0, 1), dtype)
        return self.chunks.reduce_scatter(update_TD.view(normed_BSD.shape))


_KINDS: dict[type[nn.Module], type[nn.Module]] = {
    Attention: CPAttention,
    Convolution: CPConvolution,
    MixtureOfDepths: CPMixtureOfDepths,
    Experts: CPExperts,
    nn.Embedding: CPEmbedding,
    Transformer: CPTransformer,
}
