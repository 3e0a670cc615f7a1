"""How much a trained model is to compute at inference."""

from __future__ import annotations

from typing import NamedTuple


class Dial(NamedTuple):
    """Moves and caps what routers take part in; for causal decisions alone.

    levels: one a router, what the value that it decides by has to exceed, in place of the trained
        level (see `MixtureOfDepths.level`). A router whose choice does not go by content takes this
        share of the tokens. None: as trained.
    layer_cap: a hard cap on each router: of the first n tokens of a sequence it takes at most
        floor(layer_cap x n), the earlier ones that it wants. That goes over the whole sequence,
        also where documents are kept apart.
    step_cap: a hard cap on each token: at most so many routed parts, the first ones that want it.
    """

    levels: tuple[float, ...] | None = None
    layer_cap: float | None = None
    step_cap: int | None = None
