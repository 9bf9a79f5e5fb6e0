"""Sphinx: Markdown pages, and the docstrings of what is public."""

import fastkd

project = "fastkd"
author = "the authors of fastkd"
version = release = fastkd.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",  # formulas need no other host
]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
napoleon_custom_sections = ["Shape"]

autodoc_default_options = {"members": True, "inherited-members": "Module", "exclude-members": "extra_repr, training"}

# A reference that leads nowhere is an error; what Python and torch document is not here.
nitpicky = True
nitpick_ignore_regex = [("py:exc", r"\w+Error"), ("py:.*", r"(torch\.|collections\.abc\.|str|None|optional).*")]

html_theme = "furo"
html_title = f"fastkd {release}"
html_show_sphinx = False
html_copy_source = False
