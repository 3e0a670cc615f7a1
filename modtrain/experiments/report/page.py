"""The report as one HTML page that needs nothing from outside."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from plotly.offline import get_plotlyjs

from modtrain.common.page_template import page_template
from modtrain.experiments.report.collect import Collection
from modtrain.experiments.report.comparisons import sentences
from modtrain.experiments.report.interactive.figures import interactive_figures
from modtrain.experiments.report.interactive.specs import Interactive
from modtrain.experiments.report.tables import Table

_TEMPLATE, _SCRIPT = "page.html.jinja", "page.js"


@dataclass(frozen=True)
class Section:
    """What the page shows of runs on the same data."""

    title: str
    figures: list[Interactive]
    sentences: Mapping[str, list[str]]


def sections(collection: Collection, margin: float) -> list[Section]:
    """Return the figures and sentences of each group. margin: of equivalence."""
    return [
        Section(
            group.title,
            interactive_figures(group, f"data-{place}-"),
            {
                name: lines
                for name, arms in group.comparisons.items()
                if (lines := sentences(arms, margin))
            },
        )
        for place, group in enumerate(collection.groups, 1)
    ]


def render(
    collection: Collection,
    tables: Sequence[Table],
    directories: Mapping[str, str],
    files: Sequence[str],
    margin: float,
) -> str:
    """Return the page.

    directories: of each run, by its name, relative to the page. files: beside the page.
    margin: of equivalence, as a share of the loss.
    """
    sources = [get_plotlyjs(), (Path(__file__).parent / _SCRIPT).read_text()]
    # What would end the element, or begin a comment, may stand in a string.
    scripts = [text.replace("</script", r"<\/script").replace("<!--", r"<\!--") for text in sources]
    page_sections = sections(collection, margin)
    return page_template(Path(__file__).with_name(_TEMPLATE)).render(
        collection=collection,
        sections=page_sections,
        specs={figure.key: figure.spec for section in page_sections for figure in section.figures},
        tables=tables,
        links={name: link(directory) for name, directory in directories.items()},
        commands={run.name: run.command for run in collection.runs},
        files=[(name, link(name)) for name in files],
        scripts=scripts,
        # The page's own scripts run by their hashes, and no other one.
        hashes=" ".join(f"'sha256-{_sha256(script)}'" for script in scripts),
    )


def relative_directories(collection: Collection, output: Path) -> dict[str, str]:
    """Return the directory of each run relative to ``output``, by the run's name."""
    start = output.resolve()
    return {run.name: os.path.relpath(run.path.resolve(), start) for run in collection.runs}


def link(path: str) -> str:
    """Return a relative path as an address; of whatever bytes, it is no other one."""
    return quote(os.fsencode(path), safe="/")


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
