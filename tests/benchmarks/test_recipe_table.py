"""docs/recipes.md: a row for each card, and the numbers that `unilatent plan` counts."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from recipe_table import HEAD, PAGE, RECIPE, table  # noqa: E402


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("| ").split("|")]


RECIPES = list(RECIPE.finditer(PAGE.read_text()))


def rows(recipe: re.Match[str]) -> list[str]:
    """Lines of the table of a recipe."""
    return recipe[0].removeprefix(recipe[1]).splitlines()


def test_every_recipe_has_a_row_for_each_card() -> None:
    assert len(RECIPES) >= 9 and PAGE.read_text().count("<!-- recipe:") == len(RECIPES)
    for recipe in RECIPES:
        head, _, *body = rows(recipe)
        stages = 1 + ("stage 2" in recipe[0])
        assert tuple(cells(head)) == HEAD
        assert len(body) == stages * len(recipe["cards"].split(", ")), recipe["command"]


def test_recipes_and_presets_agree() -> None:
    """Hours on as many H100 as the table of presets has, and memory where the micro-batches are equal."""
    presets = (ROOT / "docs" / "presets.md").read_text()
    compared, memories = 0, 0
    for recipe in RECIPES:
        name, *settings = recipe["command"].replace("\\\n", " ").split("--out")[0].split()
        known = re.search(rf"^\| `{name}` \|.*$", presets, flags=re.MULTILINE)
        if known is None or not all(setting.startswith("data.path=") for setting in settings):
            continue
        preset = cells(known[0])
        cards = f"{preset[2]} x " if preset[2] != "1" else ""
        ours = re.search(rf"^\| {cards}H100 SXM, 80 GB \|.*$", recipe[0], flags=re.MULTILINE)
        if ours is None:
            continue
        row = cells(ours[0])
        assert row[4] == preset[7], name
        compared += 1
        if row[1] == preset[3].rpartition(" ")[2]:
            assert row[2] == preset[4], name
            memories += 1
    assert compared >= 5 and memories >= 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, len(RECIPES) - 1])
def test_the_numbers_are_those_that_are_counted(number: int) -> None:
    assert list(table(RECIPES[number])) == rows(RECIPES[number])
