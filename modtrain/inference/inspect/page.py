"""An inspection as one self-contained HTML page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

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


@dataclass(frozen=True)
class Subject:
    """The inspected run, checkpoint and text, and the decision.

    budget: the compute budget's settings; empty: as trained.
    capacities: share of the tokens that each router was trained to take, in forward order.
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


class TokenRow(NamedTuple):
    """One token of the text as displayed."""

    number: int
    token: int
    shown: str
    part_of: str
    position: int
    depth: int
    parts: str
    loss: str
    entropy: str


class Share(NamedTuple):
    """A share and its colour level, 0 for none."""

    level: int
    share: float


def render(subject: Subject, trace: Trace, pieces: Sequence[Piece], tokens_shown: int) -> str:
    """Return the page. pieces: one per token; the first ``tokens_shown`` are shown one by one."""
    names = [short_name(router.label) for router in trace.routers]
    both = themes(len(names))
    routed = bool(names)
    noops = max((mixture.noop for mixture in trace.experts), default=0)
    return (
        _environment()
        .get_template(_TEMPLATE)
        .render(
            subject=subject,
            trace=trace,
            num_tokens=len(trace.token_N),
            rows=token_rows(trace, pieces, names, tokens_shown),
            routers=list(zip(names, trace.routers, subject.capacities, strict=True)),
            depths=depth_shares(trace) if routed else [],
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
    )


def token_rows(
    trace: Trace, pieces: Sequence[Piece], names: Sequence[str], most: int
) -> list[TokenRow]:
    """Return the first ``most`` tokens as displayed."""
    depth_N = trace.depths
    return [
        TokenRow(
            place + 1,
            int(trace.token_N[place]),
            piece.shown,
            piece.characters,
            int(trace.position_N[place]),
            int(depth_N[place]),
            ", ".join(
                name
                for name, router in zip(names, trace.routers, strict=True)
                if router.chosen_N[place]
            ),
            _nats(trace.loss_N[place]),
            _nats(trace.entropy_N[place]),
        )
        for place, piece in enumerate(pieces[:most])
    ]


def depth_shares(trace: Trace) -> list[tuple[int, float]]:
    """Return the number and share of tokens at each depth from 0."""
    count = np.bincount(trace.depths, minlength=len(trace.routers) + 1)
    return [(int(number), float(number / count.sum())) for number in count]


def expert_shares(mixture: ExpertTrace) -> list[Share]:
    """Return each expert's share with a colour level relative to the layer's largest."""
    most = float(mixture.share_E.max())
    return [
        Share(math.ceil(_EXPERT_LEVELS * share / most) if share > 0 else 0, share)
        for share in mixture.share_E.tolist()
    ]


def short_name(label: str) -> str:
    """``layer_03_mlp`` → ``03 mlp``."""
    return label.removeprefix("layer_").replace("_", " ")


def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _nats(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"
