"""The fit of one family: the law, its check, its intervals, and what follows from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from modtrain.experiments.fit.bootstrap import Estimate, budget_groups, resample_weights
from modtrain.experiments.fit.frontier import FlopsRule, Frontier
from modtrain.experiments.fit.law import PARAMETERS, HuberRegression, Law, LawFit, fit_law
from modtrain.experiments.fit.parabolas import Parabola, fit_parabolas
from modtrain.experiments.fit.points import Array, Points
from modtrain.experiments.fit.projection import Projection
from modtrain.experiments.fit.results import FamilyFit, Fit, Optimum, Refusal
from modtrain.experiments.fit.sensitivity import Sensitivity, leave_one_out

# Relative difference of the two fits that is rounding, whatever the intervals are.
_ROUNDING = 1e-3
_LARGEST_FLOPS_ERROR = 0.05


class FamilyFitter:
    """Fits one family, and adds what it refuses or warns of to ``fit``."""

    def __init__(self, name: str, points: Points, num_left_out: int, fit: Fit) -> None:
        self.name, self.points, self.num_left_out = name, points, num_left_out
        self.result, self.config = fit, fit.config
        self.rng = np.random.default_rng([self.config.seed, *name.encode()])
        self.groups = budget_groups(points, self.config.budget_tolerance)
        self.regression = HuberRegression(points, self.config.huber_delta)
        self.weights_SP = resample_weights(
            len(points), list(self.groups.values()), self.config.bootstrap_samples, self.rng
        )

    def fit(self) -> FamilyFit:
        """Fit the law, check it, and derive the rest."""
        fitted = fit_law(self.regression, self.config, self.rng)
        start_K = fitted.minimum.theta_K
        minima = [self.regression.minimize(start_K, w).theta_K for w in self.weights_SP]
        laws = Law.stack([self.regression.law(theta_K) for theta_K in minima])
        rule = FlopsRule.of(self.points)
        frontier, frontiers = Frontier(fitted.law, rule), Frontier(laws, rule)
        law, check = self._estimates(fitted.law, laws), self._check()
        self._warn_of_law(fitted, [self.regression.undetermined(theta_K) for theta_K in minima])
        self._warn_of_check(law, check)
        self._warn_of_flops(rule)
        parabolas = self._parabolas()
        return FamilyFit(
            self.name,
            self.points,
            self.num_left_out,
            self.groups,
            fitted,
            law,
            check,
            frontier,
            frontiers,
            self._exponents(fitted, frontier, frontiers),
            self._optima(fitted, frontier, frontiers),
            parabolas,
            self._parabola_exponent(parabolas),
            self._sensitivity(start_K, rule),
        )

    def _estimate(self, value: Any, samples_S: Any) -> Estimate:
        return Estimate.of(value, samples_S, self.config.level)

    def _estimates(self, law: Law, laws: Law) -> dict[str, Estimate]:
        return {
            name: self._estimate(value, samples_S)
            for name, value, samples_S in zip(PARAMETERS, law, laws, strict=True)
        }

    def _check(self) -> dict[str, Estimate]:
        projection = Projection(self.points)
        weight_P = np.ones(len(self.points))
        law = projection.fit(projection.grid_start(weight_P), weight_P)
        start = np.array([law.alpha, law.beta])
        laws = Law.stack([projection.fit(start, weights) for weights in self.weights_SP])
        return self._estimates(law, laws)

    def _exponents(
        self, fitted: LawFit, frontier: Frontier, frontiers: Frontier
    ) -> dict[str, Estimate]:
        if self._refuses_optimum(fitted, "exponents"):
            return {}
        names: dict[str, Callable[[Frontier], Any]] = {
            "N": lambda f: f.parameter_exponent,
            "D": lambda f: f.token_exponent,
            "loss": lambda f: f.loss_exponent,
        }
        return {name: self._estimate(of(frontier), of(frontiers)) for name, of in names.items()}

    def _optima(self, fitted: LawFit, frontier: Frontier, frontiers: Frontier) -> list[Optimum]:
        if self._refuses_optimum(fitted, "optimum at each budget"):
            return []
        C_P = self.points.C_P
        sizes = {C: len(group) for C, group in self.groups.items()}
        # Points that share no budget: the range that they span.
        ends = [] if sizes else [C_P.min(), float(np.sqrt(C_P.min() * C_P.max())), C_P.max()]
        budgets = sorted({*sizes, *map(float, ends), *self.config.budgets})
        return [
            Optimum(
                C,
                sizes.get(C, 0),
                not C_P.min() * (1 - 1e-9) <= C <= C_P.max() * (1 + 1e-9),
                self._estimate(frontier.parameters(C), frontiers.parameters(C)),
                self._estimate(frontier.tokens(C), frontiers.tokens(C)),
                self._estimate(frontier.loss(C), frontiers.loss(C)),
            )
            for C in budgets
        ]

    def _refuses_optimum(self, fitted: LawFit, part: str) -> bool:
        if not fitted.undetermined:
            return False
        reason = f"the points do not determine {', '.join(fitted.undetermined)}"
        self._refuse(part, reason)
        return True

    def _parabolas(self) -> list[Parabola]:
        parabolas = []
        if not self.groups:
            self._refuse("parabolas", "no points share a budget")
        for outcome in fit_parabolas(self.points, self.groups, self.weights_SP, self.config):
            if isinstance(outcome, Parabola):
                parabolas.append(outcome)
                if outcome.N.low is None and self.config.bootstrap_samples:
                    reason = (
                        f"{outcome.share_interior:.0%} of the resamples have an interior minimum"
                    )
                    self._refuse("interval of the parabola", reason, outcome.C)
            else:
                self._refuse("parabola", outcome[1], outcome[0])
        return parabolas

    def _parabola_exponent(self, parabolas: list[Parabola]) -> Estimate | None:
        if len(parabolas) < 2:
            return None
        log_C = np.log([parabola.C for parabola in parabolas])
        value = np.polyfit(
            log_C, np.log(np.array([parabola.N.value for parabola in parabolas], float)), 1
        )[0]
        N_SB = np.stack([parabola.N_S for parabola in parabolas], 1)
        whole = N_SB[~np.isnan(N_SB).any(1)]
        if 2 * len(whole) < len(N_SB) or not len(whole):
            return self._estimate(value, [])
        return self._estimate(value, np.polyfit(log_C, np.log(whole).T, 1)[0])

    def _sensitivity(self, start_K: Array, rule: FlopsRule) -> Sensitivity:
        sensitivity, reasons = leave_one_out(
            self.points, self.regression, start_K, rule, self.groups, self.config
        )
        for part, reason in reasons.items():
            self._refuse(part, reason)
        return sensitivity

    def _refuse(self, part: str, reason: str, C: float | None = None) -> None:
        self.result.refusals.append(Refusal(self.name, part, reason, C))

    def _warn(self, text: str) -> None:
        self.result.warnings.append(f"{self.name}: {text}")

    def _warn_of_law(self, fitted: LawFit, resampled: list[list[str]]) -> None:
        if fitted.num_agreeing == 1 and fitted.num_starts > 1:
            self._warn("one start alone found the best fit: raise num_starts")
        for name in PARAMETERS:
            if name in fitted.undetermined:
                self._warn(f"{name} could be anything: the points do not determine it")
            elif num := sum(name in names for names in resampled):
                share = f"{num / len(resampled):.0%}"
                self._warn(f"{name} is not determined in {share} of the resamples")

    def _warn_of_check(self, law: dict[str, Estimate], check: dict[str, Estimate]) -> None:
        for name in PARAMETERS:
            one, other = law[name], check[name]
            if not (one.contains(other.value, _ROUNDING) and other.contains(one.value, _ROUNDING)):
                self._warn(
                    f"{name} is {one.value:.5g} by the Huber loss and {other.value:.5g} by variable"
                    " projection, outside of an interval: look for outliers in the residuals"
                )

    def _warn_of_flops(self, rule: FlopsRule) -> None:
        if rule.largest_error > _LARGEST_FLOPS_ERROR:
            self._warn(
                f"C differs by up to {rule.largest_error:.0%} from {rule.coefficient:.3g}"
                f" N^{1 + rule.growth:.3g} D, by which the optima are computed"
            )
