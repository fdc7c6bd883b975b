"""How the site is built: `make docs`. Nothing is fetched while it is built or read."""

from __future__ import annotations

import os
import sys
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "ext"))
# Code cells run in processes of their own, which inherit these.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["PYTHONWARNINGS"] = "ignore"

project = "ppl_gen"
author = "the ppl_gen authors"
release = metadata.version("ppl_gen")
version = release

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "mathml",
    "reference",
    "tables",
    "gallery",
    "results",
    "bad_input",
]
exclude_patterns = ["_build", "ext", "_templates"]
templates_path = ["_templates"]
default_role = "py:obj"

html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
html_theme_options = {"navigation_with_keys": True}

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "fieldlist"]
myst_heading_anchors = 3

# A cell that raises fails the build. Files that cells write land in a folder that is thrown away.
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 900  # a busy machine may be ten times slower than an idle one
nb_output_stderr = "remove"
nb_merge_streams = True
nb_ipywidgets_js = {}

autosummary_generate = True
autosummary_imported_members = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
