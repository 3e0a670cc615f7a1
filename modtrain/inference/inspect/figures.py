"""The figures of an inspection, each as SVG in a light and a dark theme.

Shapes: N all tokens of the text.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import colormaps
from matplotlib.colors import ListedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from numpy.typing import NDArray

from modtrain.inference.inspect.trace import RouterTrace, Trace

Numbers = NDArray[Any]
# Size of a figure in inches: a phone's width, so that its text is not scaled down there.
_WIDTH, _HEIGHT = 3.9, 2.6
# Tokens in a strip, strips in a figure.
_STRIP, _STRIPS = 128, 2


@dataclass(frozen=True)
class Theme:
    """Colours of a page.

    line: of curves. levels: for depth 1, 2, …; contrast with the background grows with depth.
    """

    name: str
    text: str
    ground: str
    faint: str
    line: str
    levels: list[str]


@dataclass(frozen=True)
class Drawing:
    """One figure: SVG data URIs for light and dark pages, size in CSS pixels, title, alt text."""

    light: str
    dark: str
    width: int
    height: int
    title: str
    alt: str


@dataclass(frozen=True)
class Bins:
    """Means of y in bins of x; error: the mean's standard error, NaN for a single point."""

    x: Numbers
    mean: Numbers
    error: Numbers
    count: Numbers


def themes(num_levels: int) -> list[Theme]:
    """The light and the dark theme, with ``num_levels`` colours of viridis each."""
    share = np.arange(1, num_levels + 1) / max(1, num_levels)
    # Start away from the background's end of the colour map: level 1 must differ from none.
    light, dark = (_viridis(values) for values in (1 - 0.85 * share, 0.15 + 0.85 * share))
    lines = _viridis([0.35, 0.7])
    return [
        Theme("light", "#1d2126", "#ffffff", "#d9dde2", lines[0], light),
        Theme("dark", "#e4e7eb", "#14171a", "#3a4048", lines[1], dark),
    ]


def ink_on(color: str) -> str:
    """Black or white, whichever contrasts more with ``color`` (WCAG 2.1): at least 4.5."""
    return "#000000" if luminance(color) > 0.179 else "#ffffff"


def luminance(color: str) -> float:
    """Relative luminance of a hexadecimal colour (WCAG 2.1)."""
    parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def even_edges(x_N: Numbers, most: int) -> Numbers:
    """Edges of bins of equal width: one per distinct value, at most ``most``."""
    low, high = float(x_N.min()), float(x_N.max())
    num_bins = max(1, min(most, len(np.unique(x_N))))
    return np.linspace(low, high if high > low else low + 1, num_bins + 1)


def quantile_edges(x_N: Numbers, most: int) -> Numbers:
    """Edges of bins with about equal counts; equal values share a bin."""
    edges = np.unique(np.quantile(x_N, np.linspace(0, 1, most + 1)))
    return edges if len(edges) > 1 else np.array([edges[0], edges[0] + 1])


def binned(x_N: Numbers, y_N: Numbers, edges: Numbers) -> Bins:
    """Mean of y by bin of x, without empty bins; bins include the lower edge, the last one both."""
    place_N = np.clip(np.searchsorted(edges, x_N, side="right") - 1, 0, len(edges) - 2)
    count = np.bincount(place_N, minlength=len(edges) - 1)
    filled = count > 0
    safe = np.maximum(count, 1)
    x, mean = (
        np.bincount(place_N, weights=v_N, minlength=len(count)) / safe
        for v_N in (x_N.astype(float), y_N.astype(float))
    )
    square = np.bincount(place_N, weights=(y_N - mean[place_N]) ** 2, minlength=len(count))
    error = np.sqrt(square / np.maximum(count - 1, 1) / safe)
    error = np.where(count > 1, error, np.nan)
    return Bins(x[filled], mean[filled], error[filled], count[filled])


def frequencies(token_N: Numbers) -> Numbers:
    """The number of occurrences of each token in the text (N,)."""
    _, inverse_N, count = np.unique(token_N, return_inverse=True, return_counts=True)
    count_N: Numbers = count[inverse_N]
    return count_N


def depth_figures(trace: Trace, both: Sequence[Theme]) -> list[Drawing]:
    """Mean depth against position, frequency, loss and entropy."""
    depth_N, known_N = trace.depths, ~np.isnan(trace.loss_N)
    count_N = frequencies(trace.token_N)
    figures = [
        _depth_against("position in the window", trace.position_N, depth_N, even_edges, both),
        _depth_against("occurrences in the text", count_N, depth_N, quantile_edges, both, log=True),
        _depth_against("entropy (nats)", trace.entropy_N, depth_N, quantile_edges, both),
    ]
    if known_N.any():
        loss = (trace.loss_N[known_N], depth_N[known_N])
        figures.insert(2, _depth_against("loss (nats)", *loss, quantile_edges, both))
    return figures


def _depth_against(
    name: str,
    x_N: Numbers,
    depth_N: Numbers,
    edges: Callable[[Numbers, int], Numbers],
    both: Sequence[Theme],
    *,
    log: bool = False,
) -> Drawing:
    bins = binned(x_N, depth_N, edges(x_N, 12))

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        axes.axhline(float(depth_N.mean()), color=theme.text, lw=0.8, ls=":")
        error = np.nan_to_num(bins.error)
        axes.errorbar(bins.x, bins.mean, error, marker="o", ms=4, capsize=2, color=theme.line)
        if log:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(bottom=0)
        axes.set(xlabel=name, ylabel="routed parts entered")

    points = "; ".join(
        f"{x:.3g}: {mean:.3f}" + ("" if np.isnan(error) else f" ± {error:.3f}")
        for x, mean, error in zip(bins.x, bins.mean, bins.error, strict=True)
    )
    alt = f"Mean number of routed parts entered, by {name}, with standard errors: {points}."
    return drawing(draw, both, f"Depth by {name}", alt)


def strips_figures(
    trace: Trace, names: Sequence[str], both: Sequence[Theme], most: int
) -> list[Drawing]:
    """Which routed part (down) each of the first ``most`` tokens (across) entered, in strips."""
    count = min(most, len(trace.token_N))
    chosen_RN = np.stack([router.chosen_N[:count] for router in trace.routers])
    # A token's colour is its depth, as in the text; parts that it skipped have none.
    level_RN = chosen_RN * trace.depths[:count]
    size = _STRIP * _STRIPS
    return [
        _strips(level_RN[:, start : start + size], start, names, both)
        for start in range(0, count, size)
    ]


def _strips(level_RN: Numbers, start: int, names: Sequence[str], both: Sequence[Theme]) -> Drawing:
    rows, count = level_RN.shape
    # Strips of equal length, which a short text fills.
    num_strips = -(-count // _STRIP)
    length = -(-count // num_strips)
    padded = np.zeros((rows, num_strips * length))
    padded[:, :count] = level_RN

    def draw(figure: Figure, theme: Theme) -> None:
        colours = ListedColormap([theme.ground, *theme.levels])
        for strip, axes in enumerate(figure.subplots(num_strips, squeeze=False)[:, 0]):
            first = start + strip * length + 1
            axes.imshow(
                padded[:, strip * length : (strip + 1) * length],
                cmap=colours,
                vmin=-0.5,
                vmax=len(theme.levels) + 0.5,
                aspect="auto",
                interpolation="nearest",
                extent=(first - 0.5, first + length - 0.5, rows - 0.5, -0.5),
            )
            axes.set_yticks(_some(rows), [names[row] for row in _some(rows)])
            axes.set_yticks(np.arange(rows - 1) + 0.5, minor=True)
            axes.grid(which="minor", axis="y", color=theme.faint, lw=0.5)
            axes.tick_params(which="minor", length=0)
        axes.set_xlabel("token")

    shares = ", ".join(
        f"{name} {share:.1%}" for name, share in zip(names, (level_RN > 0).mean(1), strict=True)
    )
    title = f"Tokens {start + 1:,} to {start + count:,}"
    alt = f"{title}: the routed parts that each one entered. Shares: {shares}."
    left = 0.15 + 0.075 * max(map(len, names))
    return drawing(draw, both, title, alt, 0.55 + num_strips * (0.3 + 0.13 * rows), left)


def router_figure(
    name: str, router: RouterTrace, value_N: Numbers, both: Sequence[Theme]
) -> Drawing:
    """Histograms of the router's decision values for chosen and skipped tokens, and threshold."""
    chosen_N = router.chosen_N
    edges, chosen, skipped = histograms(value_N, chosen_N, router.threshold)

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        axes.stairs(skipped, edges, color=theme.text, hatch="////", alpha=0.65, label="skipped")
        axes.stairs(chosen, edges, fill=True, color=theme.line, label="chosen")
        if router.threshold is not None:
            axes.axvline(router.threshold, color=theme.text, lw=1.4, ls="--", label="threshold")
        axes.set(xlabel=router.decides_by, ylabel="tokens")
        axes.legend(frameon=False)

    bar = "no threshold" if router.threshold is None else f"threshold {router.threshold:.3g}"
    alt = (
        f"{name}: {router.decides_by} of {int(chosen_N.sum()):,} chosen tokens"
        f"{_spread(value_N[chosen_N])} and {int((~chosen_N).sum()):,} skipped ones"
        f"{_spread(value_N[~chosen_N])}; {bar}."
    )
    return drawing(draw, both, f"Part {name}", alt, 2.3)


def histograms(
    value_N: Numbers, chosen_N: Numbers, threshold: float | None
) -> tuple[Numbers, Numbers, Numbers]:
    """Return edges and the counts of chosen and skipped tokens; the threshold is an edge."""
    low, high = np.quantile(value_N, [0.001, 0.999])
    fixed = low if threshold is None else threshold
    low, high = min(low, fixed), max(high, fixed)
    step = (high - low) / 40 or 1.0
    # Slightly less: rounding must not add a bin. At least one on either side, for outliers.
    below, above = (max(1, math.ceil(w / step - 1e-6)) for w in (fixed - low, high - fixed))
    edges = fixed + step * np.arange(0 if threshold is None else -below, above + 1)
    # Outliers are counted in the outermost bins.
    clipped_N = np.clip(value_N, edges[0], edges[-1])
    chosen, skipped = (np.histogram(clipped_N[side], edges)[0] for side in (chosen_N, ~chosen_N))
    return edges, chosen, skipped


def drawing(
    draw: Callable[[Figure, Theme], None],
    both: Sequence[Theme],
    title: str,
    alt: str,
    height: float = _HEIGHT,
    left: float = 0.58,
) -> Drawing:
    """Draw in both themes. height, and left margin for labels, in inches."""
    first, second = both
    light = _svg(draw, first, height, left)
    if "<image" in light:
        dark = _svg(draw, second, height, left)
    else:
        # Drawing is slow, and only the colours differ.
        colors = {first.text: second.text, first.faint: second.faint, first.line: second.line}
        dark = re.sub("|".join(colors), lambda match: colors[match[0]], light)
    return Drawing(_uri(light), _uri(dark), round(_WIDTH * 96), round(height * 96), title, alt)


def _svg(draw: Callable[[Figure, Theme], None], theme: Theme, height: float, left: float) -> str:
    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    style: Any = dict.fromkeys(names, theme.text)
    style |= {"font.size": 8.5, "svg.hashsalt": "modtrain", "hatch.linewidth": 0.5}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6}
    with mpl.rc_context(style):
        figure = Figure(figsize=(_WIDTH, height))
        figure.subplots_adjust(
            left / _WIDTH, 0.45 / height, 1 - 0.16 / _WIDTH, 1 - 0.1 / height, hspace=0.5
        )
        draw(figure, theme)
        content = io.StringIO()
        # Without the time, two pages of the same run are equal.
        figure.savefig(content, format="svg", transparent=True, dpi=200, metadata={"Date": None})
    return content.getvalue()


def _uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _some(rows: int) -> list[int]:
    """Rows to label, at most 12."""
    return list(range(0, rows, -(-rows // 12)))


def _spread(values: Numbers) -> str:
    if not len(values):
        return ""
    return f" (median {np.median(values):.3g}, from {values.min():.3g} to {values.max():.3g})"


def _viridis(values: Any) -> list[str]:
    return [to_hex(color) for color in colormaps["viridis"](values)]
