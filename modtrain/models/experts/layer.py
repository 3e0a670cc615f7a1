"""Mixtures of experts in place of an MLP, with no-op experts: integrated MoDE.

Rows, one for each pair of a token and an expert, are gathered by expert, multiplied by the experts'
matrices together, and summed by token. Nothing is read on the host.

Shapes: B batch, S sequence, T = B S tokens, D model, W width of an expert, K experts per token,
E computing experts, R = E + no-ops the router's choices, C capacity: tokens of a sequence per
expert, N pairs of token and choice, M rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modtrain.models.config import ModelConfig
from modtrain.models.depth.config import TRAINING_SELECTIONS
from modtrain.models.depth.router import to_fp32_or_wider
from modtrain.models.depth.selection import chosen_first, rounded_share, top_k_of_documents
from modtrain.models.experts.grouped import grouped_matmul
from modtrain.models.feed_forward import MLP
from modtrain.models.norm import RMSNorm
from modtrain.models.sequence import ExpertRecord, Output, SequenceContext


class ExpertRouter(nn.Module):
    """One logit per token and expert, no-op experts last."""

    def __init__(self, d_model: int, choices: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(choices, d_model))

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return the logits (T, R), in float32 or wider: in bfloat16 many would tie."""
        with torch.autocast(x_TD.device.type, enabled=False):
            return to_fp32_or_wider(x_TD) @ to_fp32_or_wider(self.weight).t()


class ExpertMLPs(nn.Module):
    """The experts' weights: E MLPs of one shape, each applied to its own rows."""

    def __init__(self, count: int, d_model: int, width: int, activation: str) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(count, d_model, width))
        self.gate = None
        if activation == "swiglu":
            self.gate = nn.Parameter(torch.zeros(count, d_model, width))
        self.down = nn.Parameter(torch.zeros(count, width, d_model))

    def forward(self, x_MD: Tensor, offsets_E: Tensor | None) -> Tensor:
        """Apply its expert to each row (M, D); rows after the last offset become zero.

        offsets_E: cumulative ends of the experts' rows; None: all have the same number.
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
        """Return up (E, D, W), gate (E, D, W) or None, down (E, W, D); parallelism overrides it."""
        return self.up, self.gate, self.down


class Rows(NamedTuple):
    """The rows that experts compute, sorted by expert, and statistics of the choice.

    token_M: the token of each row. weight_M: factor on the row's result; 0 for padding rows.
    offsets_E: cumulative ends of the experts' rows, after which nothing is computed; None: all
    have the same number. choices_R: number of choices of each expert. executed_E: number of rows
    that each expert computes. quantile_E: see `ExpertRecord`.
    """

    token_M: Tensor
    weight_M: Tensor
    offsets_E: Tensor | None
    choices_R: Tensor
    executed_E: Tensor
    quantile_E: Tensor | None = None


class Experts(nn.Module):
    """A mixture of SwiGLU or GELU MLPs as a sequence module, its norm included.

    Token choice: a token goes to the K experts with the largest logits. Their outputs are weighted
    by a softmax over these K; with K = 1 over all R, because otherwise the weight would be 1 and
    the router would not learn. No-op experts are part of choice and softmax, and output zero.

    Expert choice (arXiv 2202.09368): in training an expert takes the C tokens of a sequence with
    the largest softmax over all R, which is also its weight; causally, the tokens above its running
    quantile. No-op experts are part of the softmax and of the even share that defines C.

    Padding goes to no expert, uses no capacity, is not counted, and gets no update from the routed
    experts. Of a sequence with V valid tokens of S, expert choice takes C V / S, at least one, so
    that the share agrees with the quantile. Token choice's capacity stays C.

    With ``balance: bias`` the buffer ``bias`` is added for the choice, not for the weights
    (arXiv 2408.15664). Bias and quantiles change in `update_running_stats` only, because a forward
    pass may run twice.
    """

    bias: Tensor
    quantile_sum: Tensor
    quantile_weight: Tensor

    def __init__(self, config: ModelConfig) -> None:
        """Build the experts of one layer. Raises ValueError if ``config`` has none."""
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
        return self.mix(x_BSD, context)

    def mix(self, x_BSD: Tensor, context: SequenceContext) -> Output:
        """See `forward`; context parallelism overrides it, to choose over whole sequences."""
        valid_BS = context.valid_BS
        if valid_BS is not None:
            valid_BS = valid_BS.expand(x_BSD.shape[:2])
            # Padding may have any values, and NaN times zero is NaN.
            x_BSD = torch.where(valid_BS.unsqueeze(-1), x_BSD, 0)
        normed_BSD = self.norm(x_BSD)
        normed_TD = normed_BSD.flatten(0, 1)
        logits_TR = self.expert_router(normed_TD)
        # One logsumexp for every use of the softmax: torch 2.13's inductor computes a wrong
        # gradient on the CPU for a softmax beside a logsumexp.
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
    def has_running_stats(self) -> bool:
        """Whether `batch_stats` and `update_running_stats` have anything to do."""
        return self.config.choice == "expert" or self.config.balance_kind == "bias"

    def batch_stats(self, record: ExpertRecord) -> Tensor | None:
        """Return the record's quantiles or load for `update_running_stats`; None if unused."""
        if self.config.choice == "expert":
            return record.quantile_E
        return record.load if self.config.balance_kind == "bias" else None

    @torch.no_grad()
    def update_running_stats(self, stats: Tensor) -> None:
        """Move the bias against the load, or the running quantiles towards the batch's."""
        if self.config.choice == "expert":
            rate = 1 - self.config.threshold_decay
            self.quantile_sum.lerp_(stats.to(self.quantile_sum.dtype), rate)
            self.quantile_weight.lerp_(torch.ones_like(self.quantile_weight), rate)
        elif self.config.balance_kind == "bias":
            below_mean_R = stats.mean() - stats
            self.bias.add_(below_mean_R.sign().to(self.bias.dtype), alpha=self.config.bias_rate)

    def quantile(self) -> Tensor:
        """Return the running quantile of each expert (E); before the first one, an even share."""
        is_known = self.quantile_weight > 0
        quantile_E = self.quantile_sum / torch.where(is_known, self.quantile_weight, 1)
        return torch.where(is_known, quantile_E, 1 / self.choices)

    def _rows(
        self,
        logits_TR: Tensor,
        normaliser_T1: Tensor,
        shape: torch.Size,
        valid_BS: Tensor | None,
        documents_BS: Tensor | None,
        slots: int | None,
    ) -> Rows:
        """Assign tokens to experts; ``slots``: the capacity of an expert, None: unlimited."""
        batch, length = shape
        if valid_BS is None:
            valid_BS = torch.ones(batch, length, dtype=torch.bool, device=logits_TR.device)
        if self.config.choice == "expert":
            probability_TE = (logits_TR - normaliser_T1).exp()[:, : self.count]
            if slots is None:
                return self._above_quantile(probability_TE, valid_BS.flatten())
            probability_BSE = probability_TE.view(batch, length, -1)
            return expert_choice_rows(probability_BSE, valid_BS, documents_BS, self.choices, slots)
        choice_TK, weight_TK = self._choose(logits_TR, normaliser_T1)
        choice_TK = torch.where(valid_BS.view(-1, 1), choice_TK, self.choices)
        if slots is None:
            return dropless_rows(choice_TK, weight_TK, self.count, self.choices)
        return capacity_rows(choice_TK, weight_TK, self.count, self.choices, batch, slots)

    def _update(self, rows: Rows, normed_TD: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the experts' update of each token (T, D)."""
        y_MD = self.inner(normed_TD.index_select(0, rows.token_M), rows.offsets_E)
        y_MD = y_MD.to(dtype) * rows.weight_M.to(dtype).unsqueeze(-1)
        return torch.zeros_like(normed_TD, dtype=dtype).index_add_(0, rows.token_M, y_MD)

    def _choose(self, logits_TR: Tensor, normaliser_T1: Tensor) -> tuple[Tensor, Tensor]:
        """Return the K choices of each token and their weights."""
        biased_TR = logits_TR.detach()
        if self.config.balance_kind == "bias":
            biased_TR = biased_TR + self.bias
        choice_TK = biased_TR.topk(self.config.top_k, dim=-1).indices
        if self.config.top_k == 1:
            return choice_TK, (logits_TR.gather(1, choice_TK) - normaliser_T1).exp()
        # Equals the probabilities over their sum, without 0 / 0 if the bias chose experts whose
        # probabilities underflow.
        return choice_TK, logits_TR.gather(1, choice_TK).softmax(-1)

    def _above_quantile(self, probability_TE: Tensor, valid_T: Tensor) -> Rows:
        """Causal expert choice."""
        chosen_TE = (probability_TE > self.quantile()) & valid_T.unsqueeze(-1)
        expert_E = torch.arange(self.count, device=valid_T.device)
        choice_TE = torch.where(chosen_TE, expert_E, self.choices)
        return dropless_rows(choice_TE, probability_TE, self.count, self.choices)

    def _record(
        self, rows: Rows, logits_TR: Tensor, normaliser_T1: Tensor, valid_BS: Tensor | None
    ) -> ExpertRecord:
        wide = logits_TR.dtype
        counts = rows.choices_R.to(wide), rows.executed_E.to(wide)
        valid_T = None if valid_BS is None else valid_BS.flatten().to(wide)
        balance_loss = z_loss = None
        if self.config.balance_kind == "loss":
            mean_R = _mean((logits_TR - normaliser_T1).exp(), valid_T)
            balance_loss = self.choices * (ExpertRecord(*counts).load * mean_R).sum()
        if self.config.z_loss_weight > 0:
            z_loss = _mean(normaliser_T1.square(), valid_T).squeeze(0)
        return ExpertRecord(*counts, rows.quantile_E, balance_loss, z_loss)


def dropless_rows(choice_TK: Tensor, weight_TK: Tensor, experts: int, choices: int) -> Rows:
    """One row for every pair; those of no-op experts and padding (``choices``) come last."""
    choice_N, order_N = choice_TK.flatten().sort(stable=True)
    number_R = torch.arange(choices, device=choice_N.device)
    ends_R = torch.searchsorted(choice_N, number_R, right=True)
    choices_R = ends_R.diff(prepend=ends_R.new_zeros(1))
    token_N = order_N // choice_TK.shape[1]
    weight_N = weight_TK.flatten().index_select(0, order_N)
    return Rows(token_N, weight_N, ends_R[:experts].int(), choices_R, choices_R[:experts])


def capacity_rows(
    choice_TK: Tensor, weight_TK: Tensor, experts: int, choices: int, batch: int, slots: int
) -> Rows:
    """C rows for each expert and sequence, earlier tokens first; the rest are dropped."""
    tokens, top_k = choice_TK.shape
    device = choice_TK.device
    sequence_N = torch.arange(batch, device=device).repeat_interleave(tokens // batch * top_k)
    key_N, order_N = (choice_TK.flatten() * batch + sequence_N).sort(stable=True)
    rank_N = torch.arange(tokens * top_k, device=device) - torch.searchsorted(key_N, key_N)
    fits_N = (rank_N < slots) & (key_N < experts * batch)
    # Keys and slots are ordered by expert, then by sequence.
    end = experts * batch * slots
    slot_N = torch.where(fits_N, key_N * slots + rank_N, end)
    token_M = slot_N.new_zeros(end + 1).scatter(0, slot_N, order_N // top_k)
    weight_N = weight_TK.flatten().index_select(0, order_N)
    weight_M = weight_N.new_zeros(end + 1).scatter(0, slot_N, weight_N)
    number_R = torch.arange(choices, device=device)
    ends_R = torch.searchsorted(key_N, (number_R + 1) * batch)
    expert_N = torch.where(fits_N, key_N // batch, experts)
    executed_E = (expert_N == number_R[:experts, None]).sum(1)
    choices_R = ends_R.diff(prepend=ends_R.new_zeros(1))
    return Rows(token_M[:end], weight_M[:end], None, choices_R, executed_E)


def expert_choice_rows(
    probability_BSE: Tensor, valid_BS: Tensor, documents_BS: Tensor | None, choices: int, slots: int
) -> Rows:
    """C rows for each expert and sequence, with its largest probabilities, and their quantile.

    With documents, each document has its share of C, and an expert chooses within it.

    The quantile is the midpoint between the smallest probability that would be chosen if the whole
    batch were one sequence, and the largest that would not.
    """
    batch, length, experts = probability_BSE.shape
    device = valid_BS.device
    valid_BS1 = valid_BS.unsqueeze(-1)
    valid_B = valid_BS.sum(1)
    capacity_B = torch.minimum(rounded_share(slots, valid_B, length), valid_B)
    if documents_BS is None:
        score_BSE = torch.where(valid_BS1, probability_BSE, -1)
        weight_BCE, index_BCE = score_BSE.topk(slots, dim=1)
        is_filled_BC = torch.arange(slots, device=device) < capacity_B.unsqueeze(-1)
        is_filled_BCE = is_filled_BC.unsqueeze(-1)
    else:
        # X: every pair of a sequence and an expert, which chooses like a depth router.
        score_XS = probability_BSE.transpose(1, 2).flatten(0, 1)
        documents_XS, valid_XS = (
            x_BS.expand(batch, length).repeat_interleave(experts, dim=0)
            for x_BS in (documents_BS, valid_BS)
        )
        chosen_XS = top_k_of_documents(score_XS, slots, documents_XS, valid_XS)
        index_XC = chosen_first(chosen_XS, slots)
        index_BCE = index_XC.view(batch, experts, slots).transpose(1, 2)
        is_filled_BCE = chosen_XS.gather(1, index_XC).view(batch, experts, slots).transpose(1, 2)
        weight_BCE = probability_BSE.gather(1, index_BCE)
    weight_BCE = torch.where(is_filled_BCE, weight_BCE, 0)
    token_BCE = index_BCE + torch.arange(0, batch * length, length, device=device)[:, None, None]
    num_chosen = capacity_B.sum()
    choices_R = torch.cat([num_chosen.expand(experts), num_chosen.new_zeros(choices - experts)])

    score_TE = torch.where(valid_BS1, probability_BSE.detach(), 0).flatten(0, 1)
    ranked_TE = F.pad(score_TE.sort(dim=0, descending=True).values, (0, 0, 0, 1))
    edge = torch.stack([(num_chosen - 1).clamp(min=0), num_chosen])
    quantile_E = ranked_TE.index_select(0, edge).mean(0)
    return Rows(
        token_BCE.permute(2, 0, 1).flatten(),
        weight_BCE.permute(2, 0, 1).flatten(),
        None,
        choices_R,
        choices_R[:experts],
        quantile_E,
    )


def _mean(values_TX: Tensor, valid_T: Tensor | None) -> Tensor:
    """Mean over the valid tokens."""
    if valid_T is None:
        return values_TX.mean(0)
    return (values_TX * valid_T.unsqueeze(-1)).sum(0) / valid_T.sum().clamp(min=1)
