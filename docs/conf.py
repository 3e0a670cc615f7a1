"""How Sphinx builds the site: ``make docs``."""

from modtrain import __version__

project = "modtrain"
author = "the modtrain authors"
copyright = f"2026, {author}"
release = __version__

extensions = ["myst_parser", "sphinx_copybutton", "sphinx_design"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["figures"]
myst_enable_extensions = ["attrs_block", "attrs_inline", "colon_fence"]
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
