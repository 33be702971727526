"""Checks a built site: every link, image, script and style leads to a file of it, every anchor exists, and nothing is
fetched from elsewhere when a page is viewed.

python docs/extensions/check_site.py FOLDER
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

FETCHED = {
    "img": ("src", "srcset"), "script": ("src",), "iframe": ("src",), "source": ("src", "srcset"),
    "video": ("src", "poster"), "audio": ("src",), "embed": ("src",), "object": ("data",), "use": ("href",),
}  # fmt: skip
"""Attributes with what a browser fetches to show a page. `link` is added where it is a style, an icon or a font."""
LOADED = re.compile(r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)")
SHOWN_BY = {"stylesheet", "icon", "preload", "modulepreload", "shortcut"}


class Page(HTMLParser):
    """What a page links to, what it fetches, and its anchors."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.anchors = {"", "top"}
        self._styles = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        self._styles = tag == "style"
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag == "link" and set(given.get("rel", "").split()) & SHOWN_BY:
            self.fetched.append(given["href"])
        for name in FETCHED.get(tag, ()):
            if given.get(name):
                self.fetched += (
                    [part.split()[0] for part in given[name].split(",")] if name == "srcset" else [given[name]]
                )

    def handle_data(self, data: str) -> None:
        if self._styles:
            self.fetched += loaded(data)


def loaded(style: str) -> list[str]:
    """Return the addresses that a style sheet loads."""
    return [first or second for first, second in LOADED.findall(style)]


def faults(folder: Path) -> list[str]:
    """Return what is wrong with a site, one line each."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        where = path.relative_to(folder)
        found += [f"{where}: fetches {link} from elsewhere" for link in page.fetched if is_foreign(link)]
        for link in (*page.links, *page.fetched):
            if not is_foreign(link) and (fault := broken(link, path, pages, folder)):
                found.append(f"{where}: {link}: {fault}")
    for path in sorted(folder.rglob("*.css")):
        for link in loaded(path.read_text(encoding="utf-8")):
            if is_foreign(link):
                found.append(f"{path.relative_to(folder)}: fetches {link} from elsewhere")
            elif not link.startswith("data:") and not (path.parent / urlsplit(link).path).exists():
                found.append(f"{path.relative_to(folder)}: {link}: there is no such file")
    return found


def is_foreign(link: str) -> bool:
    return bool(urlsplit(link).netloc)


def broken(link: str, path: Path, pages: dict[Path, Page], folder: Path) -> str | None:
    """Return what is wrong with a link within the site; None if it leads somewhere."""
    parts = urlsplit(link)
    if parts.scheme:  # mailto:, data:
        return None
    target = path if not parts.path else (path.parent / unquote(parts.path)).resolve()
    if not target.is_relative_to(folder.resolve()):
        return "leads out of the site"
    if target.is_dir():
        target /= "index.html"
    if not target.exists():
        return "there is no such file"
    if parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
        return "there is no such anchor"
    return None


def main(folder: Path) -> int:
    folder = folder.resolve()
    found = faults(folder)
    print("\n".join(found))
    pages = list(folder.rglob("*.html"))
    links = sum(len(Page(path.read_text(encoding="utf-8")).links) for path in pages)
    print(f"{len(pages)} pages, {links:,} links, {len(found)} faults")
    return 1 if found or not pages else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
