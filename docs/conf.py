"""Settings of the documentation site: `sphinx-build -W --keep-going -n docs build/docs`, warnings are errors.

The pages are ordinary Markdown that is also read in the repository; links from them to files beside docs/ lead, in the
site, to the pages of docs/project, which include those files.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

project = "feedfast"
author = "the authors of feedfast"
copyright = "the authors of feedfast, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["recipes"]

html_theme = "furo"
html_title = "feedfast"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False

smartquotes = False  # "--option" stays what is typed
myst_enable_extensions = ["attrs_inline"]
myst_heading_anchors = 4
default_role = "code"  # in docstrings, as in Markdown: `name`
napoleon_use_ivar = True
autodoc_typehints = "none"  # the signature as it is written says them; shapes and units are in the docstring
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
# Names of Python that our own pages do not hold: torch's, numpy's and the language's, whose inventories are elsewhere.
nitpick_ignore_regex = [("py:.*", r"(?!feedfast).*")]

INCLUDED = {
    "CONTRIBUTING.md": "contributing", "SECURITY.md": "security", "CHANGELOG.md": "changes",
    "kernels/README.md": "kernels",
}  # fmt: skip


def follow(app: Sphinx, page: str, source: list[str]) -> None:
    """Point links to the files of INCLUDED at the pages that include them."""
    for name, target in INCLUDED.items():
        source[0] = re.sub(rf"\]\((?:\.\./)+{re.escape(name)}(?=[)#])", f"](/project/{target}.md", source[0])


def setup(app: Sphinx) -> None:
    """Sphinx calls this."""
    app.connect("source-read", follow)
