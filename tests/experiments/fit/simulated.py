"""Points of a law that is known, with noise or without."""

import numpy as np

from modtrain.experiments.fit.law import Law
from modtrain.experiments.fit.points import Points, make_points

LAW = Law(A=406.4, B=410.7, E=1.69, alpha=0.34, beta=0.28)
"""The published law of Chinchilla (arXiv 2203.15556, equation 10)."""


def simulated_values(
    noise=0.0, seed=0, law=LAW, num_budgets=5, num_sizes=7, width=4.0, centre=1.0
) -> dict[str, np.ndarray]:
    """Losses over sizes around the optimum at each budget; noise: of the loss, relatively."""
    rng = np.random.default_rng(seed)
    budgets = np.geomspace(6e18, 3e21, num_budgets)
    around = np.geomspace(1 / width, width, num_sizes)
    N = np.concatenate([centre * np.sqrt(C / 120) * around for C in budgets])
    C = np.repeat(budgets, num_sizes)
    loss = law.loss(N, C / 6 / N) * np.exp(noise * rng.standard_normal(len(N)))
    return {"loss": loss, "N": N, "C": C}


def simulated_points(**settings) -> Points:
    return make_points(**simulated_values(**settings))


def faster(law: Law, factor: float) -> Law:
    """The law of models that do with C FLOPs what those of ``law`` do with C * factor."""
    A, B = law.A * factor ** (-law.alpha / 2), law.B * factor ** (-law.beta / 2)
    return Law(A, B, law.E, law.alpha, law.beta)
