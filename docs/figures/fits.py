"""The picture of a fit, and the simulated points that it and the how-to page are of.

``python docs/figures/fits.py`` writes the points anew; the picture is drawn when the site is built.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from charts import THEMES
from matplotlib import rc_context

POINTS = Path(__file__).with_name("simulated-points.csv")
# The published law of Chinchilla (arXiv 2203.15556, equation 10), and models that need 1/1.3 of
# its compute.
_FAMILIES = {"dense": 1.0, "routed": 1.3}
_NOISE = 0.003


def write_points() -> None:
    """Write losses of the two laws, with noise, at five budgets and seven sizes each."""
    from modtrain.experiments.fit.law import Law

    rng = np.random.default_rng(0)
    with POINTS.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["family", "N", "D", "C", "loss"])
        for family, factor in _FAMILIES.items():
            A, B = 406.4 * factor ** (-0.34 / 2), 410.7 * factor ** (-0.28 / 2)
            law = Law(A, B, 1.69, 0.34, 0.28)
            for C in np.geomspace(6e18, 3e21, 5):
                for N in np.sqrt(C / 200) * np.geomspace(0.2, 5, 7):
                    loss = law.loss(N, C / 6 / N) * np.exp(_NOISE * rng.standard_normal())
                    sizes = f"{N:.6g}", f"{C / 6 / N:.6g}", f"{C:.6g}"
                    writer.writerow([family, *sizes, f"{loss:.5f}"])


def fit_chart(folder: Path) -> None:
    """Draw what `modtrain fit` does: the loss over N at each budget, of the dense points."""
    from modtrain.experiments.fit.config import FitConfig
    from modtrain.experiments.fit.figures import loss_figure
    from modtrain.experiments.fit.fit import fit_points
    from modtrain.experiments.fit.points import read_points

    config = FitConfig(families=["dense"], bootstrap_samples=60, parameters="all")
    report = fit_points(read_points(POINTS, config), config)
    for mode, theme in THEMES.items():
        with rc_context(theme):
            path = folder / f"fit-{mode}.svg"
            loss_figure(report).savefig(path, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    write_points()
