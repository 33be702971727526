"""A flowchart in which one box follows the other, as a stack of boxes. On GitHub, Mermaid draws it; here, no script."""

import re
from typing import Any

from docutils import nodes
from sphinx.util.docutils import SphinxDirective


class Stack(SphinxDirective):
    """The boxes of a Mermaid flowchart, in their order."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        boxes = re.findall(r'\w+\["(.*?)"\]', "\n".join(self.content))
        if not boxes or not re.search(rf"\w+( --> \w+){{{len(boxes) - 1}}}\s*$", "\n".join(self.content)):
            raise self.error("only flowcharts of one chain of boxes are drawn on the site")
        items = "".join(f"<li>{box}</li>" for box in boxes)
        return [nodes.raw("", f'<ol class="stack">{items}</ol>', format="html")]


def setup(app: Any) -> dict[str, bool]:
    app.add_directive("mermaid", Stack)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
