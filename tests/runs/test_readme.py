"""What README.md and docs/ show a user works: every command line and Python block, page by page, in an empty folder."""

from __future__ import annotations

import re
import tomllib
from itertools import pairwise
from pathlib import Path

import documents
import pytest
import typer
from documents import PAGES, ROOT, RUN, SHOWN, Block, blocks
from workplace import Workplace

from unilatent.cli import app

RUNNING = [
    pytest.param(page, marks=() if page in ("README.md", "docs/quickstart.md") else pytest.mark.slow)
    for page in PAGES
    if any(block.runs for block in blocks(page))
]
"""The pages that a newcomer reads first are run in every test run, the others with the slow tests."""


@pytest.mark.parametrize("page", RUNNING)
def test_every_block_of_a_page(page: str, workplace: Workplace) -> None:
    workplace.page(page)


# ---- what can be checked of all blocks -------------------------------------------------------------------------------


def test_every_block_is_run_or_says_why_not() -> None:
    for page in PAGES:
        for block in blocks(page):
            assert block.language.split(" ")[0] in (*RUN, *SHOWN), (
                f"{block.place}: {block.language!r}; name one of {RUN + SHOWN}"
            )
            if block.language in SHOWN:
                assert block.reason is None, f"{block.place}: nothing of it could be run"
            elif block.reason is not None:
                assert len(block.reason.split()) >= 2, f"{block.place}: say why it is not run"


@pytest.mark.parametrize("page", PAGES)
def test_no_block_hides_in_an_indentation(page: str) -> None:
    """A block without a fence would not be run."""
    lines = documents.outside(page).splitlines()
    for above, line in pairwise(lines):
        assert above.strip() or not re.match(r" {4,}\S", line), f"{page}: fence the block with {line.strip()!r}"


def test_commands_exist_with_their_options() -> None:
    for page in PAGES:
        for block in blocks(page):
            for words in block.commands:
                check(block, words)


def check(block: Block, words: list[str]) -> None:
    """Check a command line without running it."""
    arguments = documents.unilatent(words)
    if arguments is not None:
        if words[0] == "torchrun":
            assert words[words.index("unilatent") - 2 : words.index("unilatent")] == ["-m", "--"], block.place
        parse(block, arguments)
        return
    words = [word for word in words if not re.match(r"[A-Z_]+=", word)]
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert re.search(rf"^{words[1]}:", makefile, flags=re.MULTILINE), f"{block.place}: make {words[1]}"
    elif words[0] == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for word in words:
            if named := re.search(r"\[(.*)\]", word):
                assert set(named[1].split(",")) <= extras.keys(), f"{block.place}: {word}"
    elif words[0] == "python" and words[1] != "-m":
        source = (ROOT / words[1]).read_text()
        for option in (word for word in words if word.startswith("--")):
            assert f'"{option}"' in source, f"{block.place}: {words[1]} has no {option}"


def parse(block: Block, arguments: list[str]) -> None:
    """Parse the arguments of `unilatent`."""
    command = typer.main.get_command(app)
    context = command.context_class(command, info_name="unilatent")
    rest = [documents.filled(word) for word in arguments]
    while hasattr(command, "commands"):
        assert rest[0] in command.commands, f"{block.place}: there is no command {rest[0]!r}"
        command = command.commands[rest[0]]
        context = command.context_class(command, info_name=rest.pop(0), parent=context)
    try:
        command.parse_args(context, rest)
    except Exception as error:
        raise AssertionError(f"{block.place}: unilatent {' '.join(arguments)}: {error}") from None


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for page in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\bmake ([a-z-]+)`", PAGES[page].read_text()):
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"{page}: make {target}"


def test_faulty_pages_are_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    monkeypatch.setitem(PAGES, "page.md", page)
    page.write_text("<!-- not run: needs a GPU -->\n```bash\nunilatent sample runs/digits --nmu 4\n```\n")
    (block,) = blocks("page.md")
    assert (block.line, block.runs, block.reason) == (2, False, "needs a GPU")
    with pytest.raises(AssertionError, match=r"page.md:2: unilatent sample runs/digits --nmu 4: .*--nmu"):
        check(block, block.commands[0])
    page.write_text("```bash\ntorchrun --nproc-per-node 8 -m unilatent runs\n```\n")
    with pytest.raises(AssertionError):
        check(blocks("page.md")[0], blocks("page.md")[0].commands[0])
