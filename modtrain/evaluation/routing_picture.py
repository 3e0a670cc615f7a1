"""A picture of what the routers did with one sequence: a heat map of layers and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from modtrain.models.sequence import RoutingRecord

_PASSES, _ROUTED = "#dfe5ec", "#1f5fa8"
# Scores beyond this share of them do not stretch the colours.
_SHOWN_SHARE = 0.98


def routing_picture(labels: Sequence[str], records: Sequence[RoutingRecord]) -> Tensor:
    """Draw which routed part took which token of the first sequence, and the scores below.

    labels: of the routed parts. Returns a picture of bytes (height, width, 3).
    """
    chosen_RS = torch.stack([record.chosen_BS[0] for record in records]).cpu().numpy()
    scores_RS = torch.stack([record.scores_BS[0].float() for record in records]).cpu().numpy()
    height = 1.5 + 0.4 * len(labels)
    figure = Figure(figsize=(6.4, height), dpi=100, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    cells = {"aspect": "auto", "interpolation": "nearest"}
    upper.imshow(chosen_RS, cmap=ListedColormap([_PASSES, _ROUTED]), vmin=0, vmax=1, **cells)
    limit = float(np.quantile(np.abs(scores_RS), _SHOWN_SHARE)) or 1.0
    heat = lower.imshow(scores_RS, cmap="coolwarm", vmin=-limit, vmax=limit, **cells)
    figure.colorbar(heat, ax=(upper, lower), label="score", extend="both", pad=0.01, aspect=15)
    for axes, title in ((upper, "routed tokens, top-k"), (lower, "router scores")):
        axes.set_yticks(range(len(labels)), labels)
        axes.set_title(title, fontsize=10, loc="left")
    lower.set_xlabel("token of the first held-out sequence")
    legend = [Patch(color=_ROUTED, label="routed"), Patch(color=_PASSES, label="passes by")]
    above = {"loc": "lower right", "bbox_to_anchor": (1, 0.97), "ncols": 2, "frameon": False}
    upper.legend(handles=legend, **above)
    # Its methods have no types.
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return torch.from_numpy(np.asarray(canvas.buffer_rgba())[..., :3].copy())
