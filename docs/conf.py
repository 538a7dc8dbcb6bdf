"""The site: `python -m sphinx -W --keep-going -b html docs docs/_build/html`."""

import sys
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "extensions"))

project = "pyro_recursive"
author = "The pyro_recursive authors"
extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "myst_nb",
    "docstrings",
    "repository",
]
if find_spec("sphinx-mathjax-offline"):  # of the extra `docs`: formulas then need no network
    extensions.append("sphinx-mathjax-offline")
exclude_patterns = ["_build", "jupyter_execute"]

# Docstrings: `Arguments:` and `Raises:` sections in some, reST's :param: in others.
napoleon_numpy_docstring = False
autodoc_member_order = "bysource"
autodoc_default_options = {"show-inheritance": True}
autodoc_typehints = "signature"
autodoc_inherit_docstrings = False
python_maximum_signature_line_length = 88
python_display_short_literal_types = True
toc_object_entries_show_parents = "hide"

# Notebooks carry their outputs; a build runs none.
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
myst_links_external_new_tab = False

default_role = "name"

html_theme = "furo"
html_title = "pyro_recursive"
html_copy_source = False
html_show_copyright = False
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
