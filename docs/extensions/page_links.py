"""Links that are right on GitHub, made right on the site: files at the top of the repository are pages here."""

import re
from typing import Any

PAGES = {"CONTRIBUTING.md": "/contributing.md", "README.md": "/index.md", "CHANGELOG.md": "/changelog.md"}
LINK = re.compile(r"\]\((?:\.\./)+(" + "|".join(map(re.escape, PAGES)) + r")(#[\w-]+)?\)")


def moved(text: str) -> str:
    """Return Markdown with those links replaced."""
    return LINK.sub(lambda link: f"]({PAGES[link[1]]}{link[2] or ''})", text)


def on_read(app: Any, page: str, source: list[str]) -> None:
    source[0] = moved(source[0])


def setup(app: Any) -> dict[str, bool]:
    app.connect("source-read", on_read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
