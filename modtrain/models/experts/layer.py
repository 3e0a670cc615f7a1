"""Mixtures of experts in place of an MLP, with no-op experts: integrated MoDE.

Rows, one for each pair of a token and an expert that takes it, are gathered by expert, go through
the experts' matrices together, and are added up by token. Nothing is read on the host.

Shapes: B batch, S sequence, T = B S tokens, D model, W width of an expert, K experts a token,
E experts that compute, R = E + no-ops what the router chooses from, C tokens that an expert takes
of a sequence, N pairs of token and choice, M rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modtrain.models.config import ModelConfig
from modtrain.models.depth.config import TRAINING_SELECTIONS
from modtrain.models.depth.selection import best_of_documents, first_places
from modtrain.models.experts.grouped import grouped_matmul
from modtrain.models.feed_forward import MLP
from modtrain.models.norm import RMSNorm
from modtrain.models.sequence import ExpertRecord, Output, SequenceContext


class ExpertRouter(nn.Module):
    """One logit a token and expert, no-op experts last."""

    def __init__(self, d_model: int, choices: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(choices, d_model))

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return the logits (T, R), in float32 or wider: in bfloat16 many would tie."""
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        with torch.autocast(x_TD.device.type, enabled=False):
            return x_TD.to(wide) @ self.weight.to(wide).t()


class ExpertMLPs(nn.Module):
    """The experts' matrices: E MLPs of one shape, each for its own rows."""

    def __init__(self, count: int, d_model: int, width: int, activation: str) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(count, d_model, width))
        self.gate = None
        if activation == "swiglu":
            self.gate = nn.Parameter(torch.zeros(count, d_model, width))
        self.down = nn.Parameter(torch.zeros(count, width, d_model))

    def forward(self, x_MD: Tensor, offsets_E: Tensor | None) -> Tensor:
        """Send each row (M, D) through its expert; rows behind the last offset come back zero.

        offsets_E: cumulative ends of the experts' rows; None where all have the same number.
        """

        def multiply(rows: Tensor, weight: Tensor) -> Tensor:
            if offsets_E is not None:
                return grouped_matmul(rows, weight, offsets_E)
            count = weight.shape[0]
            return torch.bmm(rows.view(count, -1, rows.shape[-1]), weight).flatten(0, 1)

        up, gate, down = self.weights()
        up_MW = multiply(x_MD, up)
        hidden_MW = F.gelu(up_MW) if gate is None else F.silu(multiply(x_MD, gate)) * up_MW
        return multiply(hidden_MW, down)

    def weights(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return up (E, D, W), gate (E, D, W) or None, and down (E, W, D), to compute with."""
        return self.up, self.gate, self.down


class Rows(NamedTuple):
    """What the experts compute, sorted by expert, and what was decided.

    token_M: the token of each row. weight_M: what the row's result is multiplied by; 0 where the
    row holds nobody. offsets_E: cumulative ends of the experts' rows, behind which nothing is
    computed; None where all have the same number. load_R, taken_E: choices of each expert, rows
    that each one computes, in numbers. quantile_E: see `ExpertRecord`.
    """

    token_M: Tensor
    weight_M: Tensor
    offsets_E: Tensor | None
    load_R: Tensor
    taken_E: Tensor
    quantile_E: Tensor | None = None


class Experts(nn.Module):
    """A mixture of SwiGLU or GELU MLPs as a sequence module, its norm included.

    Token choice: a token goes to the K experts with the largest logits. Their softmax over the K
    weighs what they give; with K = 1 it is the softmax over all R, for it would be 1 otherwise
    and the router would learn nothing. No-op experts take part in choice and softmax and give zero.

    Expert choice (arXiv 2202.09368): in training an expert takes the C tokens of a sequence with
    the largest softmax over all R, which weighs what it gives; causally, those above its running
    quantile. No-op experts take part in the softmax and in the even share that C is made of.

    Padding goes nowhere, uses no room, counts nowhere and gets no update from the routed experts.
    Of a sequence with V valid tokens of S, expert choice takes C V / S, at least one, so that the
    share is everywhere the one that the quantile is of. Token choice's capacity stays C.

    With ``balance: bias`` the buffer ``bias`` steers token choice alone, never the weights
    (arXiv 2408.15664). It and the quantiles move in `absorb` only: forward may run twice.
    """

    bias: Tensor
    quantile_sum: Tensor
    quantile_weight: Tensor

    def __init__(self, config: ModelConfig) -> None:
        """Make the experts of one layer. Raises ValueError where ``config`` has none."""
        super().__init__()
        experts = config.experts
        if experts.count is None:
            raise ValueError("there are no experts: experts.count is null")
        self.config, self.count, self.choices = experts, experts.count, experts.count + experts.noop
        dim, width = config.d_model, experts.width(config.ff_width)
        self.norm = RMSNorm(dim, config.norm_eps)
        self.expert_router = ExpertRouter(dim, self.choices)
        self.inner = ExpertMLPs(self.count, dim, width, config.activation)
        self.shared = None
        if experts.shared:
            self.shared = MLP(dim, experts.shared * width, config.activation)
        if experts.balance_kind == "bias":
            self.register_buffer("bias", torch.zeros(self.choices))
        if experts.choice == "expert":
            self.register_buffer("quantile_sum", torch.zeros(self.count))
            self.register_buffer("quantile_weight", torch.zeros(()))

    def forward(self, x_BSD: Tensor, context: SequenceContext) -> Output:
        """Return the update (B, S, D) and one `ExpertRecord`."""
        valid_BS = context.valid_BS
        if valid_BS is not None:
            valid_BS = valid_BS.expand(x_BSD.shape[:2])
            # What padding holds may be anything, and NaN times zero is NaN.
            x_BSD = torch.where(valid_BS.unsqueeze(-1), x_BSD, 0)
        normed_BSD = self.norm(x_BSD)
        normed_TD = normed_BSD.flatten(0, 1)
        logits_TR = self.expert_router(normed_TD)
        # One reduction for all that is made of the softmax: of a softmax beside a logsumexp torch
        # 2.13's inductor makes a wrong gradient on the CPU.
        normaliser_T1 = logits_TR.logsumexp(-1, keepdim=True)
        slots = (
            self.config.slots(x_BSD.shape[1]) if context.selection in TRAINING_SELECTIONS else None
        )
        rows = self._rows(
            logits_TR, normaliser_T1, x_BSD.shape[:2], valid_BS, context.documents_BS, slots
        )
        update_BSD = self._update(rows, normed_TD, x_BSD.dtype).view_as(x_BSD)
        if self.shared is not None:
            update_BSD = update_BSD + self.shared(normed_BSD)
        record = self._record(rows, logits_TR, normaliser_T1, valid_BS)
        return Output(update_BSD, experts=(record,))

    @property
    def keeps_state(self) -> bool:
        """Whether `observe` and `absorb` have anything to do."""
        return self.config.choice == "expert" or self.config.balance_kind == "bias"

    def observe(self, record: ExpertRecord) -> Tensor | None:
        """Return what of a record `absorb` learns from; to be averaged over a step's batches."""
        if self.config.choice == "expert":
            return record.quantile_E
        return record.load_E if self.config.balance_kind == "bias" else None

    @torch.no_grad()
    def absorb(self, observed: Tensor) -> None:
        """Move the bias against the load, or the running quantiles towards the batch's."""
        if self.config.choice == "expert":
            rate = 1 - self.config.threshold_decay
            self.quantile_sum.lerp_(observed.to(self.quantile_sum.dtype), rate)
            self.quantile_weight.lerp_(torch.ones_like(self.quantile_weight), rate)
        elif self.config.balance_kind == "bias":
            above_R = observed.mean() - observed
            self.bias.add_(above_R.sign().to(self.bias.dtype), alpha=self.config.bias_rate)

    def _rows(
        self,
        logits_TR: Tensor,
        normaliser_T1: Tensor,
        shape: torch.Size,
        valid_BS: Tensor | None,
        documents_BS: Tensor | None,
        slots: int | None,
    ) -> Rows:
        """Send the tokens to experts; ``slots``: how many an expert takes, None: any number."""
        batch, length = shape
        if valid_BS is None:
            valid_BS = torch.ones(batch, length, dtype=torch.bool, device=logits_TR.device)
        if self.config.choice == "expert":
            probability_TE = (logits_TR - normaliser_T1).exp()[:, : self.count]
            if slots is None:
                return self._above_quantile(probability_TE, valid_BS.flatten())
            probability_BSE = probability_TE.view(batch, length, -1)
            return largest_rows(probability_BSE, valid_BS, documents_BS, self.choices, slots)
        choice_TK, weight_TK = self._choose(logits_TR, normaliser_T1)
        choice_TK = torch.where(valid_BS.view(-1, 1), choice_TK, self.choices)
        if slots is None:
            return sorted_rows(choice_TK, weight_TK, self.count, self.choices)
        return limited_rows(choice_TK, weight_TK, self.count, self.choices, batch, slots)

    def _update(self, rows: Rows, normed_TD: Tensor, dtype: torch.dtype) -> Tensor:
        """Return what the experts add to each token (T, D)."""
        y_MD = self.inner(normed_TD.index_select(0, rows.token_M), rows.offsets_E)
        y_MD = y_MD.to(dtype) * rows.weight_M.to(dtype).unsqueeze(-1)
        return torch.zeros_like(normed_TD, dtype=dtype).index_add_(0, rows.token_M, y_MD)

    def _choose(self, logits_TR: Tensor, normaliser_T1: Tensor) -> tuple[Tensor, Tensor]:
        """Return the K choices of each token and their weights."""
        steer_TR = logits_TR.detach()
        if self.config.balance_kind == "bias":
            steer_TR = steer_TR + self.bias
        choice_TK = steer_TR.topk(self.config.top_k, dim=-1).indices
        if self.config.top_k == 1:
            return choice_TK, (logits_TR.gather(1, choice_TK) - normaliser_T1).exp()
        # Probabilities over their sum are the softmax of these logits alone, without the 0 / 0 of
        # choices that the bias made against all odds.
        return choice_TK, logits_TR.gather(1, choice_TK).softmax(-1)

    def _above_quantile(self, probability_TE: Tensor, valid_T: Tensor) -> Rows:
        """Expert choice without the future; before the first quantile, above an even share."""
        observed = self.quantile_weight > 0
        quantile_E = self.quantile_sum / torch.where(observed, self.quantile_weight, 1)
        quantile_E = torch.where(observed, quantile_E, 1 / self.choices)
        taken_TE = (probability_TE > quantile_E) & valid_T.unsqueeze(-1)
        expert_E = torch.arange(self.count, device=valid_T.device)
        choice_TE = torch.where(taken_TE, expert_E, self.choices)
        return sorted_rows(choice_TE, probability_TE, self.count, self.choices)

    def _record(
        self, rows: Rows, logits_TR: Tensor, normaliser_T1: Tensor, valid_BS: Tensor | None
    ) -> ExpertRecord:
        wide = logits_TR.dtype
        load_R = rows.load_R.to(wide)
        load_R = load_R / load_R.sum().clamp(min=1)
        computing = rows.load_R[: self.count].sum()
        dropped = (computing - rows.taken_E.sum()).to(wide) / computing.clamp(min=1)
        valid_T = None if valid_BS is None else valid_BS.flatten().to(wide)
        balance_loss = z_loss = None
        if self.config.balance_kind == "loss":
            mean_R = _mean((logits_TR - normaliser_T1).exp(), valid_T)
            balance_loss = self.choices * (load_R * mean_R).sum()
        if self.config.z_loss_weight > 0:
            z_loss = _mean(normaliser_T1.square(), valid_T).squeeze(0)
        return ExpertRecord(
            load_R, rows.taken_E.to(wide), dropped, rows.quantile_E, balance_loss, z_loss
        )


def sorted_rows(choice_TK: Tensor, weight_TK: Tensor, experts: int, choices: int) -> Rows:
    """A row for every pair; those of no-ops and of nobody (``choices``) stand behind the others."""
    choice_N, order_N = choice_TK.flatten().sort(stable=True)
    number_R = torch.arange(choices, device=choice_N.device)
    ends_R = torch.searchsorted(choice_N, number_R, right=True)
    load_R = ends_R.diff(prepend=ends_R.new_zeros(1))
    token_N = order_N // choice_TK.shape[1]
    weight_N = weight_TK.flatten().index_select(0, order_N)
    return Rows(token_N, weight_N, ends_R[:experts].int(), load_R, load_R[:experts])


def limited_rows(
    choice_TK: Tensor, weight_TK: Tensor, experts: int, choices: int, batch: int, slots: int
) -> Rows:
    """C rows for each expert and sequence, the earlier tokens first; the rest is dropped."""
    tokens, top_k = choice_TK.shape
    device = choice_TK.device
    sequence_N = torch.arange(batch, device=device).repeat_interleave(tokens // batch * top_k)
    key_N, order_N = (choice_TK.flatten() * batch + sequence_N).sort(stable=True)
    rank_N = torch.arange(tokens * top_k, device=device) - torch.searchsorted(key_N, key_N)
    fits_N = (rank_N < slots) & (key_N < experts * batch)
    # Keys run over experts and, within them, sequences, as the slots do.
    end = experts * batch * slots
    slot_N = torch.where(fits_N, key_N * slots + rank_N, end)
    token_M = slot_N.new_zeros(end + 1).scatter(0, slot_N, order_N // top_k)
    weight_N = weight_TK.flatten().index_select(0, order_N)
    weight_M = weight_N.new_zeros(end + 1).scatter(0, slot_N, weight_N)
    number_R = torch.arange(choices, device=device)
    ends_R = torch.searchsorted(key_N, (number_R + 1) * batch)
    expert_N = torch.where(fits_N, key_N // batch, experts)
    taken_E = (expert_N == number_R[:experts, None]).sum(1)
    load_R = ends_R.diff(prepend=ends_R.new_zeros(1))
    return Rows(token_M[:end], weight_M[:end], None, load_R, taken_E)


def largest_rows(
    probability_BSE: Tensor,
    valid_BS: Tensor,
    documents_BS: Tensor | None,
    choices: int,
    slots: int,
) -> Rows:
    """C rows for each expert and sequence, with its largest probabilities, and their quantile.

    With documents each has its share of the C, and an expert chooses within them one by one.

    The quantile lies midway between the smallest probability that would be taken, were the whole
    batch one sequence, and the largest that would not be.
    """
    batch, length, experts = probability_BSE.shape
    device = valid_BS.device
    valid_BS1 = valid_BS.unsqueeze(-1)
    valid_B = valid_BS.sum(1)
    # C V / S rounded in integers: halves upwards.
    room_B = (2 * slots * valid_B + length) // (2 * length)
    room_B = torch.minimum(room_B.clamp(min=1), valid_B)
    if documents_BS is None:
        score_BSE = torch.where(valid_BS1, probability_BSE, -1)
        weight_BCE, index_BCE = score_BSE.topk(slots, dim=1)
        holds_BC = torch.arange(slots, device=device) < room_B.unsqueeze(-1)
        holds_BCE = holds_BC.unsqueeze(-1)
    else:
        # An expert of a sequence is like a router of a sequence.
        each_XS = probability_BSE.transpose(1, 2).flatten(0, 1)
        own_XS, known_XS = (
            mask_BS.expand(batch, length).repeat_interleave(experts, dim=0)
            for mask_BS in (documents_BS, valid_BS)
        )
        chosen_XS = best_of_documents(each_XS, slots, own_XS, known_XS)
        index_XC = first_places(chosen_XS, slots)
        index_BCE = index_XC.view(batch, experts, slots).transpose(1, 2)
        holds_BCE = chosen_XS.gather(1, index_XC).view(batch, experts, slots).transpose(1, 2)
        weight_BCE = probability_BSE.gather(1, index_BCE)
    weight_BCE = torch.where(holds_BCE, weight_BCE, 0)
    token_BCE = index_BCE + torch.arange(0, batch * length, length, device=device)[:, None, None]
    taken = room_B.sum()
    load_R = torch.cat([taken.expand(experts), taken.new_zeros(choices - experts)])

    score_TE = torch.where(valid_BS1, probability_BSE.detach(), 0).flatten(0, 1)
    ranked_TE = F.pad(score_TE.sort(dim=0, descending=True).values, (0, 0, 0, 1))
    edge = torch.stack([(taken - 1).clamp(min=0), taken])
    quantile_E = ranked_TE.index_select(0, edge).mean(0)
    return Rows(
        token_BCE.permute(2, 0, 1).flatten(),
        weight_BCE.permute(2, 0, 1).flatten(),
        None,
        load_R,
        load_R[:experts],
        quantile_E,
    )


def _mean(values_TX: Tensor, valid_T: Tensor | None) -> Tensor:
    """Mean over the tokens that are valid."""
    if valid_T is None:
        return values_TX.mean(0)
    return (values_TX * valid_T.unsqueeze(-1)).sum(0) / valid_T.sum().clamp(min=1)
