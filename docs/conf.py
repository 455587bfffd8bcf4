"""The documentation site: ``make docs`` builds it, with every warning an error.

The source folder is the repository, not docs/, so that README.md and the like are pages and every relative link means
what it means on GitHub. The API reference names public import paths only.
"""

from __future__ import annotations

import sys
from pathlib import Path

import gf_tvm

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "gf_tvm"
version = release = gf_tvm.__version__
copyright = "the authors of gf_tvm; Apache License 2.0"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "command_help",
    "package_names",
    "repository_files",
]

root_doc = "docs/index"
include_patterns = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/**"]
exclude_patterns = [".*", "build", "dist", "**/__pycache__", "docs/_*", "docs/report/**"]

# Headings have the anchors that GitHub gives them.
myst_heading_anchors = 4
highlight_language = "none"
smartquotes_action = "D"  # dashes; what stands in quotes is often to be typed

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 90  # a line for each parameter of longer ones
napoleon_numpy_docstring = False
napoleon_use_ivar = True

nitpicky = True

html_theme = "furo"
html_title = f"gf_tvm {release}"
html_copy_source = False
html_show_sphinx = False
html_additional_pages = {"index": "start.html"}
templates_path = ["_templates"]
