"""Configuration of depth routers: scores, gates, selection of tokens, limits at inference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

from modtrain.common.errors import Problem
from modtrain.common.validation import above_zero, at_least, broken_rules, decays, one_of

Selection = Literal["top_k", "token", "auxiliary", "predictor", "threshold", "causal"]
"""How routers, and experts that choose, select tokens.

Training: ``top_k`` takes the k largest scores of each sequence, which is not causal; ``token`` is
token choice with static shapes. Evaluation and sampling: ``auxiliary``, ``predictor`` and
``threshold`` are causal decisions that were trained alongside; ``causal`` is for models whose
training selection depends on no later token, and which need none of these.
"""

TRAINING_SELECTIONS: tuple[Selection, ...] = ("top_k", "token")

TARGETS = ("block", "attention", "mlp", "both")
LEARNED_SCORES = ("linear", "mlp")
CONTENT_FREE_SCORES = ("random", "fixed")
SCORES = (*LEARNED_SCORES, "attention", *CONTENT_FREE_SCORES, "oracle_norm")
GATES = ("raw", "sigmoid", "tanh", "none", "near_one")
CHOICES = ("expert", "token")
SWAPPED_CHOICES = ("zero", "random", "even", "shuffled", "lowest", "predictor", "update_norm")
CAUSAL_ROUTERS = ("auxiliary", "predictor", "threshold")


@dataclass
class RouterConfig:
    """How a routed layer selects tokens, and the gate on their updates.

    target: which part is routed: the ``block``, its ``attention`` (or other mixer) only, its
        ``mlp`` only, or ``both``, each with a router of its own.
    score: ``linear``: w·x (arXiv 2404.02258, section 3.4). ``mlp``: two layers. ``attention``: the
        attention that a token received in the layer before, without parameters (A-MoD, arXiv
        2412.20875). Controls: ``random``: Gaussian, drawn anew each step; ``fixed``: evenly spaced
        positions; ``oracle_norm``: the norm of the update that the whole sequence would get, which
        costs the whole module and is for analysis.
    keep_kv: compute keys and values of all tokens, from the residual stream before the layer, so
        that a chosen token attends to every earlier one; queries, their output and the MLP remain
        those of the chosen tokens alone (arXiv 2503.23798). For routed attention.
    hidden_dim: hidden width of the ``mlp`` router.
    input_norm: scale the input of a ``linear`` router to root mean square 1. Without it scores
        follow the residual stream, which is small at first and grows with depth and training; an
        ``mlp`` router always does.
    gate: factor on the update. ``raw``: the score (eq. 1). ``sigmoid``: its sigmoid. ``tanh``: its
        tanh; a linear score, which grows with the features, is first divided by their root mean
        square. ``none``: 1. ``near_one``: for learned scores twice the sigmoid of the score of an
        input of root mean square 1, so that the updates start unscaled; 1 for the others.
        null: raw for learned scores, none for the others.
    gate_multiplier, gate_offset: the gate is multiplied by the one and the other is added: with 1
        and 1 a raw score starts near 1. For the gates that are named by their function alone.
    gate_scale: a learned factor on the result, one per router, initially 1.
    choice: ``expert``: the k largest scores of a sequence are routed. ``token``: each token whose
        score exceeds a running quantile is routed, which keeps the mean share at the capacity.
    capacity_factor: with token choice, the maximum number of routed tokens of a sequence, over k;
        tokens beyond it, those with the lowest scores, are dropped, so that training has static
        shapes.
    causal: decisions trained beside top-k that need no later token, for evaluation and sampling;
        reported losses use the first one. ``auxiliary``: the score's own sign, trained by a binary
        cross-entropy against top-k (section 3.5). ``predictor``: a small MLP on the stop-gradient
        input (section 3.5). ``threshold``: the score against a running quantile (arXiv
        2603.11535). null: predictor if one is needed.
    auxiliary_weight: of the auxiliary loss in the objective; a tenth of the default left the share
        of routed tokens several points below the capacity in short runs (docs/reports/results.md).
    predictor_dim: hidden width of the predictor.
    threshold_decay: of the running quantile, per step.
    """

    target: str = "block"
    score: str = "linear"
    keep_kv: bool = False
    hidden_dim: int = 64
    input_norm: bool = False
    gate: str | None = None
    gate_multiplier: float = 1.0
    gate_offset: float = 0.0
    gate_scale: bool = False
    choice: str = "expert"
    capacity_factor: float = 1.25
    causal: list[str] | None = None
    auxiliary_weight: float = 0.1
    predictor_dim: int = 64
    threshold_decay: float = 0.99

    @property
    def gate_kind(self) -> str:
        """The gate's function, null and ``near_one`` resolved."""
        if self.gate not in (None, "near_one"):
            return self.gate
        if self.score not in LEARNED_SCORES:
            return "none"
        return "sigmoid" if self.gate == "near_one" else "raw"

    @property
    def gate_factor(self) -> float:
        """What the gate's function is multiplied by."""
        return 2.0 if self._is_near_one else self.gate_multiplier

    @property
    def gate_formula(self) -> str:
        """The gate for a reader: ``2 x sigmoid``, ``raw + 1``."""
        factor = "" if self.gate_factor == 1 else f"{self.gate_factor:g} x "
        offset = f" + {self.gate_offset:g}" if self.gate_offset else ""
        return f"{factor}{self.gate_kind}{offset}"

    @property
    def norms_input(self) -> bool:
        """Whether a ``linear`` router's input is scaled to root mean square 1."""
        return self.input_norm or (self._is_near_one and self.score == "linear")

    @property
    def _is_near_one(self) -> bool:
        return self.gate == "near_one" and self.score in LEARNED_SCORES

    @property
    def needs_causal(self) -> bool:
        """Whether training selects by later tokens: False for scores that ignore content."""
        return self.score not in CONTENT_FREE_SCORES

    @property
    def causal_routers(self) -> list[Selection]:
        """The causal decisions, null resolved."""
        if self.causal is not None:
            # OmegaConf has no literals for a field; `problems` checks the values.
            return cast("list[Selection]", self.causal)
        if not self.needs_causal:
            return []
        return ["threshold"] if self.choice == "token" else ["predictor"]

    @property
    def has_threshold(self) -> bool:
        """Whether a running quantile of the scores is part of the model's state."""
        return "threshold" in self.causal_routers or self.choice == "token"

    def needs_scores(self, selection: Selection) -> bool:
        """Whether the scores are used; with a predictor and no gate they are not."""
        trains = selection in TRAINING_SELECTIONS
        return trains or selection in ("threshold", "auxiliary") or self.gate_kind != "none"

    def num_slots(self, count: int, seq_len: int) -> int:
        """Slots per sequence under token choice at a capacity of ``count`` tokens."""
        # Slightly less: 1.1 x 10 may exceed 11 in floating point.
        return min(seq_len, math.ceil(self.capacity_factor * count * (1 - 1e-12)))

    def problems(self, prefix: str) -> list[Problem]:
        """Everything wrong with the router's settings."""
        problems = [
            *one_of(self, prefix, "target", TARGETS),
            *one_of(self, prefix, "score", SCORES),
            *(one_of(self, prefix, "gate", GATES) if self.gate is not None else []),
            *one_of(self, prefix, "choice", CHOICES),
            *(one_of(self, prefix, "causal", CAUSAL_ROUTERS) if self.causal is not None else []),
            *at_least(self, prefix, 1, "hidden_dim", "predictor_dim", "capacity_factor"),
            *above_zero(self, prefix, "auxiliary_weight", "gate_multiplier"),
            *decays(self, prefix, "threshold_decay"),
        ]
        is_repeated = len(set(self.causal or [])) != len(self.causal or [])
        problems += broken_rules(
            self, prefix, (is_repeated, "causal", "names a router twice", "name each once")
        )
        return problems or self._combination_problems(prefix)

    def _combination_problems(self, prefix: str) -> list[Problem]:
        by_token, causal = self.choice == "token", self.causal_routers
        shifts_gate = (self.gate_multiplier, self.gate_offset) != (1, 0)
        return broken_rules(
            self,
            prefix,
            (
                self.keep_kv and self.target == "mlp",
                "keep_kv",
                f"has no effect with {prefix}.target=mlp, whose attention every token enters",
                "leave it out, or route the block, the attention, or both",
            ),
            (
                self.input_norm and self.score != "linear",
                "input_norm",
                f"has no effect with {prefix}.score={self.score}",
                "leave it out, or use linear scores",
            ),
            (
                shifts_gate and self._is_near_one,
                "gate_offset" if self.gate_offset else "gate_multiplier",
                f"would shift {prefix}.gate=near_one, which is 2 x sigmoid",
                f"leave it out, or set {prefix}.gate to raw, sigmoid or tanh",
            ),
            (
                shifts_gate and self.gate_kind == "none",
                "gate_offset" if self.gate_offset else "gate_multiplier",
                "has no effect without a gate",
                f"leave it out, or set {prefix}.gate to raw, sigmoid or tanh",
            ),
            (
                not self.needs_causal and bool(causal),
                "causal",
                f"is not needed: {prefix}.score={self.score} ignores the tokens' content",
                "use [] or null; the choice is causal by itself",
            ),
            (
                self.score == "attention" and self.gate_kind != "none",
                "gate",
                "would multiply by attention from later tokens, which sampling does not have",
                "use none, or a learned score",
            ),
            (
                self.score not in LEARNED_SCORES and "auxiliary" in causal,
                "causal",
                f"trains the score to be the decision, but {prefix}.score={self.score}"
                " has no parameters",
                "use predictor, or a learned score",
            ),
            (
                self.score == "attention" and "threshold" in causal,
                "choice" if by_token else "causal",
                "compares a score that depends on later tokens, which sampling does not have",
                "use expert choice with predictor, or a learned score",
            ),
            (
                by_token and not self.needs_causal,
                "choice",
                f"needs scores that depend on the token, not {prefix}.score={self.score}",
                "use expert",
            ),
            (
                by_token and self.needs_causal and causal != ["threshold"],
                "causal",
                f"cannot be combined with {prefix}.choice=token, which is evaluated by its own"
                " training threshold and has no top-k to predict",
                "use [threshold] or null",
            ),
        )


class ComputeBudget(NamedTuple):
    """Limits on what a trained model computes at inference; for causal decisions only.

    thresholds: one per router, in place of the trained threshold that its decision value has to
        exceed (see `MixtureOfDepths.decision_threshold`). For a router that ignores content
        (random, fixed) it is the share of tokens to route. None: as trained.
    layer_cap: hard cap per router: of the first n tokens of a sequence it routes at most
        floor(layer_cap x n), earlier tokens first. It counts over the whole sequence, also with
        document masking.
    step_cap: hard cap per token: the number of routed parts that it may enter, earlier layers
        first.
    """

    thresholds: tuple[float, ...] | None = None
    layer_cap: float | None = None
    step_cap: int | None = None


class RouterSwap(NamedTuple):
    """Another choice of tokens in place of a trained router's, to measure what it is worth.

    Each sequence keeps its number of routed tokens. For whole sequences without padding or cache.

    choice: ``zero``: the same tokens, but their updates are 0: what the routed part is worth at
        all, a limit for any routing. ``random``. ``even``: evenly spaced. ``shuffled``: the scores
        permuted among the tokens of a sequence, gates with them. ``lowest``: the lowest scores.
        ``predictor``: the highest logits of the predictor. ``update_norm``: the largest updates, if
        the part were computed for all tokens, before the gate.
    mean_gate: the gate of every chosen token is the mean over the router's own choice in its
        sequence, so that a change of the loss is due to the selection alone.
    routers: numbers of the routers to swap; None: all.
    """

    choice: str
    mean_gate: bool = False
    routers: tuple[int, ...] | None = None
