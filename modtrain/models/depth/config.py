"""How depth routers score, weigh and choose, as typed configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from modtrain.common.errors import Problem
from modtrain.common.validation import above_zero, at_least, decays, one_of

Selection = Literal["top_k", "token", "auxiliary", "predictor", "threshold", "causal"]
"""Who takes part in what is routed, and by which experts.

Training: ``top_k`` takes the k largest scores of each sequence, and looks at its future; ``token``
is token choice with static shapes. Evaluation and sampling: ``auxiliary``, ``predictor`` and
``threshold`` are causal decisions that were trained alongside; ``causal`` is for models that need
none of these, because what they choose by holds nothing of the future.
"""

TRAINING_SELECTIONS: tuple[Selection, ...] = ("top_k", "token")

TARGETS = ("block", "attention", "mlp", "both")
LEARNED_SCORES = ("linear", "mlp")
CONTENT_FREE_SCORES = ("random", "fixed")
SCORES = (*LEARNED_SCORES, "attention", *CONTENT_FREE_SCORES, "oracle_norm")
GATES = ("raw", "sigmoid", "tanh", "none")
CHOICES = ("expert", "token")
CAUSAL_ROUTERS = ("auxiliary", "predictor", "threshold")


@dataclass
class RouterConfig:
    """How a routed layer chooses its tokens, and what their updates are multiplied by.

    target: what is routed: the ``block``, its ``attention`` (or other mixer) alone, its ``mlp``
        alone, or ``both``, each with a router of its own.
    score: ``linear``: w·x (arXiv 2404.02258, section 3.4). ``mlp``: two layers. ``attention``: what
        a token received in the layer before, without parameters (A-MoD, arXiv 2412.20875).
        Controls: ``random``: Gaussian, drawn anew each step; ``fixed``: evenly spaced positions;
        ``oracle_norm``: the size of the update that the whole sequence would get, which costs the
        whole module and is for analysis.
    hidden_dim: hidden width of the ``mlp`` router.
    gate: what the update is multiplied by. ``raw``: the score (eq. 1). ``sigmoid``: its sigmoid.
        ``tanh``: its tanh; that of a linear score over the root mean square of the token's
        features, since it grows with them. ``none``: nothing. null: raw for learned scores, none
        for the others.
    gate_scale: a learned factor on the gate, one a router, 1 at the start.
    choice: ``expert``: the k largest scores of a sequence take part. ``token``: each token whose
        score is above a running quantile takes part, which keeps the mean share at the capacity.
    room: with token choice, how many tokens a sequence may take, over k; those beyond, of the
        lowest scores, are left out, so that training has static shapes.
    causal: decisions trained beside top-k that need no later token, for evaluation and sampling;
        the first one is what losses are judged by. ``auxiliary``: the score's own sign, under a
        binary cross-entropy against top-k (section 3.5). ``predictor``: a small MLP on the
        stop-gradient input (section 3.5). ``threshold``: the score against a running quantile
        (arXiv 2603.11535). null: predictor where one is needed.
    auxiliary_weight: of the auxiliary loss in the objective; a tenth of it left the share of yes
        several points below the capacity in short runs (docs/reports/results.md).
    predictor_dim: hidden width of the predictor.
    threshold_decay: of the running quantile, a step.
    """

    target: str = "block"
    score: str = "linear"
    hidden_dim: int = 64
    gate: str | None = None
    gate_scale: bool = False
    choice: str = "expert"
    room: float = 1.25
    causal: list[str] | None = None
    auxiliary_weight: float = 0.1
    predictor_dim: int = 64
    threshold_decay: float = 0.99

    @property
    def gate_kind(self) -> str:
        """The gate, with null resolved."""
        if self.gate is not None:
            return self.gate
        return "raw" if self.score in LEARNED_SCORES else "none"

    @property
    def needs_causal(self) -> bool:
        """Whether training's choice looks at later tokens, so that sampling needs another one."""
        return self.score not in CONTENT_FREE_SCORES

    @property
    def causal_routers(self) -> list[str]:
        """The causal decisions, with null resolved."""
        if self.causal is not None:
            return self.causal
        if not self.needs_causal:
            return []
        return ["threshold"] if self.choice == "token" else ["predictor"]

    @property
    def keeps_threshold(self) -> bool:
        """Whether a running quantile of the scores is part of the model's state."""
        return "threshold" in self.causal_routers or self.choice == "token"

    def needs_scores(self, selection: Selection) -> bool:
        """Whether anything reads the scores; under a predictor without a gate nothing does."""
        trains = selection in TRAINING_SELECTIONS
        return trains or selection in ("threshold", "auxiliary") or self.gate_kind != "none"

    def places(self, count: int, seq_len: int) -> int:
        """How many tokens of a sequence token choice keeps room for, where ``count`` are wanted."""
        # A hair less: 1.1 x 10 may be more than 11 in floating point.
        return min(seq_len, math.ceil(self.room * count * (1 - 1e-12)))

    def problems(self, prefix: str) -> list[Problem]:
        """Everything wrong with the router's settings."""
        found = [
            *one_of(self, prefix, "target", TARGETS),
            *one_of(self, prefix, "score", SCORES),
            *(one_of(self, prefix, "gate", GATES) if self.gate is not None else []),
            *one_of(self, prefix, "choice", CHOICES),
            *(one_of(self, prefix, "causal", CAUSAL_ROUTERS) if self.causal is not None else []),
            *at_least(self, prefix, 1, "hidden_dim", "predictor_dim", "room"),
            *above_zero(self, prefix, "auxiliary_weight"),
            *decays(self, prefix, "threshold_decay"),
        ]
        if self.causal is not None and len(set(self.causal)) != len(self.causal):
            found.append(
                Problem(f"{prefix}.causal", self.causal, "names a router twice", "name each once")
            )
        return found or self._combination_problems(prefix)

    def _combination_problems(self, prefix: str) -> list[Problem]:
        found = []
        if not self.needs_causal and self.causal_routers:
            found.append(
                Problem(
                    f"{prefix}.causal",
                    self.causal,
                    f"is not needed: {prefix}.score={self.score} looks at no token at all",
                    "use [] or null; the choice is causal by itself",
                )
            )
        if self.score == "attention" and self.gate_kind != "none":
            found.append(
                Problem(
                    f"{prefix}.gate",
                    self.gate,
                    "would multiply by the attention that later tokens pay, also when sampling",
                    "use none, or a learned score",
                )
            )
        if self.score not in LEARNED_SCORES and "auxiliary" in self.causal_routers:
            found.append(
                Problem(
                    f"{prefix}.causal",
                    self.causal,
                    f"trains the score to be its own decision, but {prefix}.score={self.score}"
                    " has nothing to train",
                    "use predictor, or a learned score",
                )
            )
        if self.score == "attention" and "threshold" in self.causal_routers:
            found.append(
                Problem(
                    f"{prefix}.{'choice' if self.choice == 'token' else 'causal'}",
                    self.choice if self.choice == "token" else self.causal,
                    "compares a score that later tokens make, which sampling does not have yet",
                    "use expert choice with predictor, or a learned score",
                )
            )
        return found + self._token_choice_problems(prefix)

    def _token_choice_problems(self, prefix: str) -> list[Problem]:
        if self.choice != "token":
            return []
        if not self.needs_causal:
            reason = f"has no use for scores that say nothing of a token ({self.score})"
            return [Problem(f"{prefix}.choice", self.choice, reason, "use expert")]
        if self.causal_routers != ["threshold"]:
            return [
                Problem(
                    f"{prefix}.causal",
                    self.causal,
                    f"does not go with {prefix}.choice=token, which is evaluated by the threshold"
                    " that it was trained with and has no top-k to imitate",
                    "use [threshold] or null",
                )
            ]
        return []
