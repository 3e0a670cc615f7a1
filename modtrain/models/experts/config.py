"""Configuration of mixtures of experts."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from modtrain.common.errors import Problem
from modtrain.common.validation import above_zero, at_least, broken_rules, decays, one_of

EXPERT_CHOICES = ("token", "expert")
BALANCES = ("loss", "bias", "none")


@dataclass
class ExpertsConfig:
    """A mixture of experts in place of a block's MLP.

    count: number of computing experts; null: a plain MLP.
    top_k: experts per token, no-op experts included; under expert choice the average per token.
    dim: hidden width of an expert; null: ``d_ff / (top_k + shared)``, so that a token costs as many
        multiplications as in the MLP. More and narrower experts are called fine-grained.
    shared: experts of the same width that process every token (arXiv 2401.06066).
    noop: no-op experts, which compute nothing and are sent nothing (integrated MoDE,
        arXiv 2404.02258, section 3.6; for token choice arXiv 2601.15370).
    choice: ``token``: a token chooses its experts. ``expert``: an expert chooses its tokens of each
        sequence (arXiv 2202.09368), which is not causal; sampling uses running quantiles.
    capacity_factor: tokens of a sequence that an expert takes, over its even share. Token choice:
        null is dropless; else the later tokens of the sequence are dropped, only in training.
        Expert choice: null is 1; of a sequence with padding an expert takes proportionally fewer.
    balance: load balancing of token choice. ``loss``: an auxiliary loss (arXiv 2101.03961, section
        2.2). ``bias``: a bias on the choice that follows the load (arXiv 2408.15664). ``none``.
        null: loss for token choice, none for expert choice, whose load is even by construction.
    balance_weight: of that loss in the objective.
    bias_rate: change of the bias per step.
    z_loss_weight: of the router's z-loss (arXiv 2202.08906, section 3.3); 0 for none.
    every: every ``every``-th block has experts, the last one included.
    threshold_decay: of expert choice's running quantiles, per step.
    """

    count: int | None = None
    top_k: int = 2
    dim: int | None = None
    shared: int = 0
    noop: int = 0
    choice: str = "token"
    capacity_factor: float | None = None
    balance: str | None = None
    balance_weight: float = 0.01
    bias_rate: float = 0.001
    z_loss_weight: float = 0.001
    every: int = 1
    threshold_decay: float = 0.99

    @property
    def balance_kind(self) -> str:
        """The load balancing, null resolved."""
        if self.balance is not None:
            return self.balance
        return "loss" if self.choice == "token" else "none"

    def width(self, ff_width: int) -> int:
        """Hidden width of one expert, if the MLP's is ``ff_width``."""
        return ff_width // (self.top_k + self.shared) if self.dim is None else self.dim

    def slots(self, tokens: int) -> int | None:
        """Tokens that an expert computes of a training sequence of ``tokens``; None: unlimited.

        No token goes to an expert twice, so the capacity is at most ``tokens``.
        """
        if self.count is None:
            raise ValueError("there are no experts: experts.count is null")
        if self.choice == "token" and self.capacity_factor is None:
            return None
        factor = 1.0 if self.capacity_factor is None else self.capacity_factor
        even = factor * self.top_k * tokens / (self.count + self.noop)
        capacity = round(even) if self.choice == "expert" else math.ceil(even)
        return min(tokens, max(1, capacity))

    def computed_slots(self, tokens: int) -> float:
        """Pairs of an expert and a token computed for one training sequence of ``tokens``.

        Exact if experts have a capacity, padding slots included; without one it assumes an even
        load over all experts, no-op experts included. Shared experts are not counted.
        """
        slots = self.slots(tokens)
        count = self.count or 0
        if slots is None:
            return tokens * self.top_k * count / (count + self.noop)
        return float(count * slots)

    def problems(self, prefix: str, ff_width: int, num_layers: int) -> list[Problem]:
        """Everything wrong with the experts; ``ff_width`` is the hidden width of the MLP."""
        problems = [
            *at_least(self, prefix, 1, "count", "top_k", "dim", "every"),
            *at_least(self, prefix, 0, "shared", "noop", "balance_weight", "z_loss_weight"),
            *one_of(self, prefix, "choice", EXPERT_CHOICES),
            *(one_of(self, prefix, "balance", BALANCES) if self.balance is not None else []),
            *above_zero(self, prefix, "capacity_factor", "bias_rate"),
            *decays(self, prefix, "threshold_decay"),
        ]
        if problems:
            return problems
        if self.count is None:
            # Without experts no setting of theirs has an effect.
            reason = f"has no effect: {prefix}.count is null, so there are no experts"
            rules = (
                (getattr(self, f.name) != f.default, f.name, reason, f"set {prefix}.count")
                for f in fields(self)
            )
            return broken_rules(self, prefix, *rules)
        choices, parts = self.count + self.noop, self.top_k + self.shared
        return broken_rules(
            self,
            prefix,
            (
                self.every > num_layers,
                "every",
                f"leaves none of the {num_layers} blocks with experts",
                f"use {num_layers} at most",
            ),
            (
                self.top_k > choices,
                "top_k",
                f"is more than the {choices} experts, no-op ones included",
                f"use {choices} at most",
            ),
            (
                self.dim is None and ff_width % parts != 0,
                "dim",
                f"is derived from the MLP's width {ff_width}, which {parts} = top_k + shared"
                " does not divide",
                f"set {prefix}.dim, or a d_ff that is a multiple of {parts}",
            ),
            (
                self.choice == "token" and choices == 1,
                "count",
                "leaves a token no choice",
                "use 2 or more, or a no-op",
            ),
            (
                self.choice == "expert" and self.balance_kind != "none",
                "balance",
                "has no effect: under expert choice the load is even by construction",
                "use none or null",
            ),
        )
