"""The picture of a search over patterns: how a candidate continues, and what is drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from charts import THEMES, save_chart
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Steps of three rungs, and the size of the search on the right.
_STEPS = (100, 400, 1000)
_NUM_DRAWN, _NUM_LAYERS, _SEQ_LEN = 24, 12, 256


def search_chart(folder: Path) -> None:
    """Draw the learning rate of a candidate that reaches the last rung, and drawn candidates."""
    for mode, theme in THEMES.items():
        with rc_context(theme):
            figure = Figure(figsize=(8.4, 3.4))
            rates, patterns = figure.subplots(1, 2, width_ratios=[1.15, 1])
            _draw_rates(rates)
            _draw_candidates(patterns)
            save_chart(figure, folder / f"pattern-search-{mode}.svg")


def _draw_rates(axes: Axes) -> None:
    from modtrain.training.schedule_config import ScheduleConfig
    from modtrain.training.schedules import decay_start, lr_factor

    schedule = ScheduleConfig("wsd", warmup_steps=20, final=0.0)
    trunk = decay_start(schedule, _STEPS[-1])
    constant = ScheduleConfig("constant", warmup_steps=20)
    axes.plot([lr_factor(constant, step, trunk) for step in range(trunk)], lw=2, label="trunk")
    for rung, steps in enumerate(_STEPS):
        start = decay_start(schedule, steps)
        span = range(start - 1, steps)
        label = "decays" if rung == 0 else None
        axes.plot(span, [lr_factor(schedule, s, steps) for s in span], "C1", lw=2, label=label)
        axes.annotate(f"rung {rung}", (start, 1), (0, 5), textcoords="offset points", ha="center")
    axes.set_ylim(0, 1.4)
    axes.set_xlim(0, 1.05 * _STEPS[-1])
    axes.set_xlabel("steps")
    axes.set_ylabel("learning rate over the highest")
    axes.legend(loc="upper right", ncols=2, frameon=False)


def _draw_candidates(axes: Axes) -> None:
    from modtrain.experiments.pattern_search.candidates import PatternSpace, find_candidates
    from modtrain.experiments.pattern_search.config import PatternSearchConfig
    from modtrain.models.config import ModelConfig

    config = PatternSearchConfig(patterns=[], num_drawn=_NUM_DRAWN)
    model = ModelConfig(num_layers=_NUM_LAYERS, vocab_size=2048)
    candidates, _ = find_candidates(config, PatternSpace(model, _SEQ_LEN))
    candidates.sort(key=lambda candidate: candidate.flops_over_dense)
    capacities = np.array([candidate.capacities for candidate in candidates]).T
    image = axes.imshow(capacities, origin="lower", aspect="auto", cmap="viridis", vmin=0, vmax=1)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xticks([])
    axes.set_xlabel("candidates, cheap ones first")
    axes.set_ylabel("layer")
    axes.figure.colorbar(image, ax=axes, label="capacity")
