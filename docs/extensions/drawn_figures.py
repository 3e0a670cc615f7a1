"""A directive for pictures that come once for light and once for dark pages.

``{drawn} NAME`` shows ``NAME-light`` and ``NAME-dark`` of ``docs/images/``, SVG or PNG, whichever
there is, with the directive's text as caption. The schematic ones are drawn before the build, so
that they show the code as it is.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.util.docutils import SphinxDirective

if TYPE_CHECKING:
    from sphinx.application import Sphinx

DOCS = Path(__file__).parents[1]
SCHEMATICS = DOCS / "images/drawn"


class Drawn(SphinxDirective):
    """A figure of two images, of which furo shows the one that fits the page."""

    required_arguments = 1
    has_content = True
    option_spec: ClassVar[dict[str, Any]] = {"alt": directives.unchanged_required}

    def run(self) -> list[nodes.Node]:
        """Return the figure; a picture that is missing in either colour is an error."""
        name = self.arguments[0]
        figure = nodes.figure("")
        for mode in ("light", "dark"):
            paths = sorted(DOCS.glob(f"images/**/{name}-{mode}.*"))
            if not paths:
                raise self.error(f"no picture {name}-{mode} below docs/images: make figures")
            path = f"/{paths[0].relative_to(DOCS)}"
            image = nodes.image(uri=path, alt=self.options.get("alt", name))
            image["classes"] = [f"only-{mode}"]
            figure += image
        caption = nodes.caption()
        inline, messages = self.parse_inline(" ".join(self.content), lineno=self.content_offset)
        caption += inline
        figure += caption
        return [figure, *messages]


def _draw(_: Sphinx) -> None:
    sys.path.insert(0, str(DOCS / "figures"))
    from schematics import draw_all

    draw_all(SCHEMATICS)


def setup(app: Sphinx) -> dict[str, bool]:
    """Add the directive, and draw the schematics when the build begins."""
    app.add_directive("drawn", Drawn)
    app.connect("builder-inited", _draw)
    return {"parallel_read_safe": True}
