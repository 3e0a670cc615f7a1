"""An inspection as one self-contained HTML page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from modtrain.common.page_template import page_template
from modtrain.inference.inspect.figures import (
    depth_figures,
    ink_on,
    router_figure,
    strips_figures,
    themes,
)
from modtrain.inference.inspect.trace import ExpertTrace, Trace
from modtrain.inference.token_text import Piece

_TEMPLATE = "page.html.jinja"
_EXPERT_LEVELS = 8
_TOKENS_IN_STRIPS = 768
# Below it a mean in a bin is one of a few tokens.
_FEW_TOKENS = 200
_KINDS_SHOWN = 12


@dataclass(frozen=True)
class Subject:
    """The inspected run, checkpoint and text, and the decision.

    budget: the compute budget's settings; empty: as trained.
    capacities: share of the tokens that each router was trained to take, in forward order.
    model: its configuration as YAML.
    """

    run: str
    step: int
    source: str
    seq_len: int
    selection: str
    budget: str
    is_causal: bool
    num_layers: int
    capacities: list[float]
    model: str = ""


def render(subject: Subject, trace: Trace, pieces: Sequence[Piece], tokens_shown: int) -> str:
    """Return the page. pieces: one per token; the first ``tokens_shown`` are shown one by one."""
    names = [short_name(router.label) for router in trace.routers]
    both = themes(len(names))
    routed = bool(names)
    noops = max((mixture.noop for mixture in trace.experts), default=0)
    return page_template(Path(__file__).with_name(_TEMPLATE)).render(
        subject=subject,
        trace=trace,
        num_tokens=len(trace.token_N),
        rows=token_rows(trace, pieces, names, tokens_shown),
        routers=list(zip(names, trace.routers, subject.capacities, strict=True)),
        depths=depth_shares(trace) if routed else [],
        most_and_least=most_and_least_routed(trace, pieces) if routed else None,
        has_agreement=any(router.agreement is not None for router in trace.routers),
        is_short=len(trace.token_N) < _FEW_TOKENS,
        strips=strips_figures(trace, names, both, _TOKENS_IN_STRIPS) if routed else [],
        in_strips=min(_TOKENS_IN_STRIPS, len(trace.token_N)),
        depth_drawings=depth_figures(trace, both) if routed else [],
        router_drawings=[
            router_figure(name, router, router.value_N, both)
            for name, router in zip(names, trace.routers, strict=True)
            if router.value_N is not None
        ],
        experts=[(short_name(m.label), expert_shares(m)) for m in trace.experts],
        computing=max((len(m.share_E) - m.noop for m in trace.experts), default=0),
        noops=noops,
        themes=both,
        expert_themes=themes(_EXPERT_LEVELS),
        ink_on=ink_on,
    )


def token_rows(
    trace: Trace, pieces: Sequence[Piece], names: Sequence[str], most: int
) -> list[dict[str, object]]:
    """Return the first ``most`` tokens as displayed."""
    depth_N = trace.depths
    rows: list[dict[str, object]] = []
    for place, piece in enumerate(pieces[:most]):
        routers = zip(names, trace.routers, strict=True)
        rows.append(
            {
                "number": place + 1,
                "token": int(trace.token_N[place]),
                "shown": piece.shown,
                "part_of": piece.characters,
                "position": int(trace.position_N[place]),
                "depth": int(depth_N[place]),
                "parts": ", ".join(name for name, router in routers if router.chosen_N[place]),
                "loss": _nats(trace.loss_N[place]),
                "entropy": _nats(trace.entropy_N[place]),
            }
        )
    return rows


def most_and_least_routed(
    trace: Trace, pieces: Sequence[Piece]
) -> tuple[int, list[dict[str, object]], list[dict[str, object]]]:
    """Return the tokens of the vocabulary with the highest and the lowest mean depth in the text.

    Before them, how often each has to occur: twice, where any does.
    """
    kinds, first, inverse_N, count = np.unique(
        trace.token_N, return_index=True, return_inverse=True, return_counts=True
    )
    mean = np.bincount(inverse_N, weights=trace.depths) / count
    least_count = min(2, int(count.max()))
    frequent = np.flatnonzero(count >= least_count)
    # No token is in both, and where means tie the more frequent ones come first.
    shown = min(_KINDS_SHOWN, -(-len(frequent) // 2))
    chosen_most = frequent[np.lexsort((-count[frequent], -mean[frequent]))][:shown]
    left = np.setdiff1d(frequent, chosen_most)
    chosen_least = left[np.lexsort((-count[left], mean[left]))][:shown]
    most, least = (
        [
            {
                "shown": pieces[first[kind]].shown,
                "token": int(kinds[kind]),
                "count": int(count[kind]),
                "depth": float(mean[kind]),
            }
            for kind in chosen
        ]
        for chosen in (chosen_most, chosen_least)
    )
    return least_count, most, least


def depth_shares(trace: Trace) -> list[tuple[int, float]]:
    """Return the number and share of tokens at each depth from 0."""
    count = np.bincount(trace.depths, minlength=len(trace.routers) + 1)
    return [(int(number), float(number / count.sum())) for number in count]


def expert_shares(mixture: ExpertTrace) -> list[dict[str, float]]:
    """Return each expert's share with a colour level, 0 for none, relative to the largest."""
    most = float(mixture.share_E.max())
    return [
        {"level": math.ceil(_EXPERT_LEVELS * share / most) if share > 0 else 0, "share": share}
        for share in mixture.share_E.tolist()
    ]


def short_name(label: str) -> str:
    """``layer_03_mlp`` → ``03 mlp``."""
    return label.removeprefix("layer_").replace("_", " ")


def _nats(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"
