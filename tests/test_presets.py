"""Presets say what they are: published numbers belong to exactly a preset's settings, and documents repeat them."""

from __future__ import annotations

import inspect
import re
from functools import partial
from pathlib import Path

import pytest

import unilatent
from unilatent.config import ConfigError
from unilatent.presets import preset, presets, summary
from unilatent.presets._shared import Published

ROOT = Path(unilatent.__file__).parents[2]
PAGE = ROOT / "docs" / "presets.md"
NUMBERS = {
    "imagenet256-unite-b": {"FID": 2.71, "rFID": 1.01, "IS": 282.2},
    "imagenet256-unite-b-14-draws": {"FID": 2.12},
    "imagenet256-unite-l-14-draws": {"FID": 1.73},
}
"""Table 7 of the paper, and the authors' README, by the number of flow draws."""
RECORDS = [(name, record) for name, entry in presets().items() for record in entry.published]


def fits(name: str, record: Published) -> bool:
    """Whether a preset has the settings that published numbers belong to."""
    return preset(name).override(*record.settings) == preset(name)


@pytest.mark.parametrize(("name", "record"), RECORDS, ids=[name for name, _ in RECORDS])
def test_published_numbers_belong_to_the_settings_of_their_preset(name: str, record: Published) -> None:
    assert fits(name, record), "a setting of the record is not that of the preset"
    assert record.numbers and record.settings and re.search(r"arXiv \d{4}\.\d{5}|README", record.source)


def test_a_number_beside_other_settings_is_noticed() -> None:
    (fourteen,) = presets()["imagenet256-unite-b-14-draws"].published
    assert not fits("imagenet256-unite-b", fourteen), "2.12 is of 14 draws, the preset has three"
    assert not fits("imagenet256-unite-l-14-draws", fourteen), "2.12 is of 240 epochs"


def test_numbers_of_three_and_of_fourteen_draws() -> None:
    for name, numbers in NUMBERS.items():
        (record,) = presets()[name].published
        assert record.numbers == numbers
        draws = preset(name).method.flow_draws
        assert draws == (14 if name.endswith("14-draws") else 3)
        assert f"method.flow_draws={draws}" in record.settings and any("epochs" in text for text in record.settings)
    sizes = [name for name in presets() if name.startswith("imagenet256-unite") and name not in NUMBERS]
    assert sizes and not any(presets()[name].published for name in sizes), "no number is published at these settings"


def test_fourteen_draws_are_taken_in_chunks() -> None:
    for name in presets():
        if name.endswith("-14-draws"):
            plain = preset(name.removesuffix("-14-draws"))
            method = preset(name).method
            assert method.flow_draws == 14 and 1 < method.flow_chunk < 14
            assert method.model_copy(update={"flow_draws": 3, "flow_chunk": None}) == plain.method


@pytest.mark.parametrize("name", sorted(presets()))
def test_every_preset_describes_itself(name: str) -> None:
    entry = presets()[name]
    make = entry.make.func if isinstance(entry.make, partial) else entry.make
    text = inspect.getdoc(make) or ""
    assert summary(name)
    for record in entry.published:  # a number stands in its record alone, with its settings
        for number in record.numbers.values():
            assert f"{number:g}" not in re.findall(r"\d+\.\d+", text)
    for link in re.findall(r"docs/[\w/]+\.md", text):
        assert (ROOT / link).is_file(), link
    stages = [stage for stage in (preset(name).first, preset(name)) if stage]
    if entry.gpus:
        for stage in stages:
            assert stage.training.batch_size % entry.gpus == 0
            micro = stage.training.micro_batch_size
            assert entry.gpus == 1 or stage.training.batch_size // entry.gpus % micro == 0, "equal micro-batches"


def test_documents_repeat_the_records() -> None:
    page = " ".join(PAGE.read_text().split())
    for name, record in RECORDS:
        assert f"`{name}`" in page, name
        for number in record.numbers.values():
            assert f"{number:g}" in page, (name, number)
    for name in presets():
        if presets()[name].gpus > 1:
            assert f"`{name}`" in page, name


def test_the_list_shows_numbers_with_their_settings(capsys: pytest.CaptureFixture[str]) -> None:
    (record,) = presets()["imagenet256-unite-b"].published
    assert str(record) == (
        "FID 2.71, rFID 1.01, IS 282.2 at method.flow_draws=3 training.epochs=120 training.batch_size=1024 "
        "(arXiv 2603.22283, Table 7)"
    )
    (unstated,) = presets()["imagenet512-ul"].published
    assert "not stated there: bias" in str(unstated)
    with pytest.raises(ConfigError, match="did you mean 'digits'"):
        preset("digitz")
