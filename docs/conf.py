"""The site: `make docs`, from Markdown as it also reads in the repository."""

import re
from importlib import metadata
from typing import Any

from sphinx.application import Sphinx

project = "fedlora"
release = metadata.version("fedlora")
project_copyright = "The fedlora authors"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"fedlora {release}"

myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]
suppress_warnings = ["myst.xref_missing"]  # links to code: right in the repository, no page of the site

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_default_options = {"members": True}

SECTION = re.compile(r"(Args|Returns|Yields|Raises):$")
FIELD = re.compile(r"\w+(, \w+)*: ")


def as_restructured_text(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]
) -> None:
    """Docstrings are plain text with Google's sections: a line that begins `name: ` is a paragraph, a bar is a bar."""
    found: list[str] = []
    in_section = False
    for line in lines:
        if line and not line.startswith(" "):
            in_section = SECTION.match(line) is not None
        if not in_section and FIELD.match(line):
            found.append("")
        found.append((line if in_section else line.lstrip()).replace("|", r"\|"))
    lines[:] = found


def setup(app: Sphinx) -> None:
    """Before napoleon, which makes reStructuredText of the sections."""
    app.connect("autodoc-process-docstring", as_restructured_text, priority=400)
