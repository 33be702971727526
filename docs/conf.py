"""Settings of the site that `make docs` builds with Sphinx. The pages are the Markdown files beside this one."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "extensions"))
from unilatent import __version__

project = "unilatent"
author = "the unilatent contributors"
version = release = __version__
extensions = [
    "myst_parser", "sphinx.ext.autodoc", "docstrings", "generated", "mathml", "notebook_pages", "page_links", "stack",
]  # fmt: skip
exclude_patterns = ["extensions"]
nitpicky = True  # a reference that leads nowhere is a warning, and `make docs` makes warnings errors

myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math", "mermaid"]
myst_heading_anchors = 4
suppress_warnings = ["myst.strikethrough"]

autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
nitpick_ignore_regex = [(r"py:\w+", r"(torch|numpy|pathlib|collections|huggingface_hub|nn|Tensor)\b.*")]
maximum_signature_line_length = 100
python_use_unqualified_type_names = True
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"unilatent {version}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_last_updated_fmt = None
html_math_renderer = "mathml"
html_theme_options = {"navigation_with_keys": True}
