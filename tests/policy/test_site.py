"""The site: what is generated for it, and the check of its links."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs" / "extensions"))
import check_site  # noqa: E402
import command_reference  # noqa: E402
import docstrings  # noqa: E402
import page_links  # noqa: E402

from unilatent.cli import app  # noqa: E402

PAGE = '<link rel="stylesheet" href="style.css"><h1 id="top-of-it">A</h1><a href="{}">x</a>'


def site(folder: Path, link: str, style: str = "p { color: red }") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "index.html").write_text(PAGE.format(link))
    (folder / "other.html").write_text(PAGE.format("index.html#top-of-it"))
    (folder / "style.css").write_text(style)
    return folder


@pytest.mark.parametrize(
    "link", ["other.html", "other.html#top-of-it", "#top-of-it", "https://arxiv.org", "mailto:a@b"]
)
def test_links_that_lead_somewhere_pass(tmp_path: Path, link: str) -> None:
    assert check_site.faults(site(tmp_path, link)) == []


@pytest.mark.parametrize(
    ("link", "words"),
    [
        ("gone.html", "there is no such file"),
        ("other.html#gone", "there is no such anchor"),
        ("#gone", "there is no such anchor"),
        ("../secret.html", "leads out of the site"),
    ],
)
def test_broken_links_are_noticed(tmp_path: Path, link: str, words: str) -> None:
    (fault,) = check_site.faults(site(tmp_path / "site", link))
    assert fault == f"index.html: {link}: {words}"


@pytest.mark.parametrize(
    "page",
    [
        '<script src="https://cdn.example/x.js"></script>',
        '<img src="//images.example/x.png">',
        '<link rel="preload stylesheet" href="https://fonts.example/css">',
        "<style>@import 'https://fonts.example/css';</style>",
    ],
)
def test_what_a_page_fetches_from_elsewhere_is_noticed(tmp_path: Path, page: str) -> None:
    folder = site(tmp_path, "other.html")
    (folder / "index.html").write_text(page + PAGE.format("other.html"))
    assert ["from elsewhere" in fault for fault in check_site.faults(folder)] == [True]


def test_what_a_style_fetches_is_noticed(tmp_path: Path) -> None:
    folder = site(tmp_path, "other.html", "@font-face { src: url(https://fonts.example/a.woff2), url(gone.woff) }")
    assert check_site.faults(folder) == [
        "style.css: fetches https://fonts.example/a.woff2 from elsewhere",
        "style.css: gone.woff: there is no such file",
    ]  # fmt: skip


def test_docstrings_become_restructured_text() -> None:
    text = """Return `z`s of data_x, and *no* more.

    data, size: what it is, in
        pixels.
    **more: others.

        a = b * c

    - one item
      of two lines
    """
    assert docstrings.restructured(text).split("\n\n") == [
        "Return ``z``\\ s of data\\_x, and \\*no\\* more.",
        "``data``, ``size``\n    what it is, in pixels.\n``**more``\n    others.",
        "::",
        "    a = b * c",
        "- one item\n  of two lines",
    ]


def test_every_command_is_in_the_reference() -> None:
    names = {name for name, _, _ in command_reference.commands()}
    groups = {group.name: group.typer_instance for group in app.registered_groups}
    wanted = {command.name or "" for command in app.registered_commands}
    for group, inner in groups.items():
        wanted |= {f"{group} {command.name or command.callback.__name__}" for command in inner.registered_commands}
    assert names == {name.replace("_", "-") for name in wanted} and len(names) > 20
    text = command_reference.markdown()
    assert "| `--guidance-interval LOW HIGH` |" in text and "\\[default: 50000" in text


def test_a_bar_in_a_help_text_does_not_end_a_cell() -> None:
    assert command_reference.escaped("a|b `c|d` <e> [f]") == "a\\|b `c\\|d` \\<e\\> \\[f\\]"


def test_links_to_the_top_of_the_repository_are_pages_of_the_site() -> None:
    assert page_links.moved("[a](../CONTRIBUTING.md#style), [b](../../README.md), [c](unite.md)") == (
        "[a](/contributing.md#style), [b](/index.md), [c](unite.md)"
    )


def test_no_page_has_a_placeholder() -> None:
    """Numbers that were to be measured were measured."""
    for page in (*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CHANGELOG.md"):
        left = re.findall(r"@@\w+@@|\| [A-Z]+_[A-Z_]+ \|", page.read_text(encoding="utf-8"))
        assert left == [], page.name


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="the tools of the site are missing: pip install 'unilatent[docs]'")
    build = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", tmp_path / "cache"]
    done = subprocess.run([*build, ROOT / "docs", tmp_path / "site"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert check_site.faults(tmp_path / "site") == []
