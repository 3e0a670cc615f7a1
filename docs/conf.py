"""How Sphinx builds the site: ``make docs``."""

import sys
from pathlib import Path

from modtrain import __version__

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

project = "modtrain"
author = "the modtrain authors"
copyright = f"2026, {author}"
release = __version__

extensions = [
    "myst_parser",
    "sphinx_copybutton",
    "sphinx_design",
    "config_reference",
    "drawn_figures",
]
source_suffix = {".md": "markdown"}
exclude_patterns = ["figures", "extensions"]
myst_enable_extensions = ["attrs_block", "attrs_inline", "colon_fence", "deflist"]
# A link to a heading that does not exist is a warning, and a warning fails the build.
myst_heading_anchors = 4
highlight_language = "none"

html_theme = "furo"
html_title = "modtrain"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"top_of_page_buttons": []}
