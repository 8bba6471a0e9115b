"""How Sphinx builds these pages: python -m sphinx -W --keep-going docs docs/_build.

Nothing is downloaded, neither while building nor while reading: fonts are the reader's own, mathematics is MathML.
Notebooks are executed, and kept in a cache by their code; DOCS_NOTEBOOKS=off shows them without their outputs.
"""

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")  # half of a notebook is compiling
os.environ["PYTHONPATH"] = str(HERE.parent)  # of the notebooks' kernels
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

from fipa_jax import __version__ as release  # noqa: E402

project, author = "fipa_jax", "the fipa_jax authors"
copyright = author
version = release
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "plain_docstrings",  # before napoleon, which takes what it leaves
    "sphinx.ext.napoleon",
    "written_at_build",
    "mathml",
]
exclude_patterns = ["_build", "requirements.txt"]
templates_path = []
nitpicky = True  # a reference that leads nowhere is a warning, and a warning an error
# Types of other packages: their pages are not looked up, so that a build needs no network.
# Types that a package's `__all__` leaves out have no page.
nitpick_ignore_regex = [("py:.*", r"(?!fipa_jax\.).*"), ("py:class", r"fipa_jax\.(aggregate|curvature)\.\w+\.\w+")]
default_role = "code"
smartquotes = False

myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
myst_update_mathjax = False
nb_execution_mode = os.environ.get("DOCS_NOTEBOOKS", "cache")
nb_execution_timeout = 600
nb_execution_raise_on_error = True

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
toc_object_entries_show_parents = "hide"

html_theme = "furo"
pygments_dark_style = "github-dark"
html_title = f"fipa_jax {release}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}
