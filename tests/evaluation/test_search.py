"""Search methods: which values they evaluate, in which order, and that none is evaluated twice."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unilatent.evaluation.evaluate import EvaluatedMetric
from unilatent.evaluation.protocol import Protocol
from unilatent.evaluation.search import (
    AXES,
    INTERVAL,
    Axis,
    Search,
    SettingValue,
    draw_search,
    golden,
    grid,
    intervals,
    walk,
)
from unilatent.modalities.base import Row

SCALE = AXES["guidance_scale"]


class Valley:
    """A function with one minimum that records its calls."""

    def __init__(self, bottom: float, high_is_better: bool = False):
        self.bottom, self.sign, self.asked = bottom, -1 if high_is_better else 1, list[SettingValue]()

    def __call__(self, at: SettingValue) -> float:
        x = at if isinstance(at, float) else sum(at)
        return 10 + self.sign * abs(x - self.bottom) ** 1.5

    def measure(self, at: SettingValue) -> tuple[EvaluatedMetric, dict[str, Any]]:
        self.asked.append(at)
        better = "higher" if self.sign < 0 else "lower"
        sampling = {"solver": "heun", "num_inference_steps": 25, "guidance_scale": at, "guidance_interval": (0, 1)}
        protocol = Protocol(
            track="generation", num_samples=500, reference="training data", reference_data="d", num_reference=9,
            preprocessing="none", resolution=(8, 8), space="inception", sampling={**sampling, "guidance_scale": 2.0},
        )  # fmt: skip
        return EvaluatedMetric(Row("fid", "FID", self(at), "", better), protocol), {}


def search(folder: Path, valley: Valley, over: str = "guidance_scale", **about: Any) -> Search:
    return Search(over, "fid", about, folder, valley.measure, say=lambda line: None)


WALKS = [
    (2.0, [1.5, 1.7, 1.3, 1.9, 2.1]),  # right: on until it is worse
    (1.5, [1.5, 1.7, 1.3]),  # at the bottom already
    (0.75, [1.5, 1.7, 1.3, 1.1, 0.9, 0.7, 0.5]),  # left
    (-1.0, [1.5, 1.7, 1.3, 1.1, 0.9, 0.7, 0.5, 0.3, 0.1]),  # to the lowest allowed
]


@pytest.mark.parametrize("high_is_better", [False, True])
@pytest.mark.parametrize(("bottom", "order"), WALKS)
def test_a_walk(tmp_path: Path, bottom: float, order: list[float], high_is_better: bool) -> None:
    """The values it evaluates, in order and once each, and the best one."""
    valley = Valley(bottom, high_is_better)
    found = search(tmp_path, valley)
    walk(found, SCALE, 1.5, 0.2)
    assert valley.asked == order
    assert found.best.at == min(order, key=lambda x: abs(x - bottom))


def test_a_walk_stops_at_both_ends() -> None:
    asked: list[SettingValue] = []
    walk(lambda at: asked.append(at) or -float(at), Axis(0, 1, 0, 3), 0, 1)  # type: ignore[arg-type, func-returns-value]
    assert sorted(set(asked)) == [0, 1, 2, 3]


def test_a_walk_on_a_plain_stays() -> None:
    asked: list[SettingValue] = []
    walk(lambda at: asked.append(at) or 1.0, SCALE, 1.5, 0.2)  # type: ignore[func-returns-value]
    assert asked == [1.5, 1.7, 1.3]


@pytest.mark.parametrize("bottom", [1.0, 1.37, 2.2, 2.9])
@pytest.mark.parametrize("tolerance", [0.3, 0.01])
def test_golden_section(tmp_path: Path, bottom: float, tolerance: float) -> None:
    """It ends within the tolerance of the minimum, with two values and one more per step."""
    valley = Valley(bottom)
    found = search(tmp_path, valley)
    golden(found, 1.0, 3.0, tolerance)
    assert isinstance(found.best.at, float) and abs(found.best.at - bottom) <= tolerance
    cuts = next(n for n in range(100) if 2 * 0.6180339887**n <= tolerance)
    assert len(valley.asked) == cuts + 1


def test_points_are_kept_and_not_measured_again(tmp_path: Path) -> None:
    first = Valley(2.0)
    walk(search(tmp_path, first), SCALE, 1.5, 0.2)
    again = Valley(2.0)
    found = search(tmp_path, again)
    walk(found, SCALE, 1.5, 0.2)
    assert again.asked == [] and len(found.points) == 5
    grid(found, [1.7, 2.5])  # another method, the same numbers
    assert again.asked == [2.5]
    content = json.loads(found.path.read_text())
    assert {"over", "metric", "points", "best", "protocol", "seconds"} <= content.keys()
    assert [point["guidance_scale"] for point in content["points"]] == [1.5, 1.7, 1.3, 1.9, 2.1, 2.5]
    assert content["best"]["guidance_scale"] in (1.9, 2.1) and content["best"]["key"].startswith("fid500/none/heun-25")
    assert "guidance_scale" not in content["protocol"]["sampling"] and content["protocol"]["num_samples"] == 500
    assert content["cautions"][:2] == ["n = 500", "reference n = 9"] and "n = 500" in found.title
    assert len(list(tmp_path.glob("search-*.json"))) == 1


def test_interrupted_after_any_point_it_goes_on(tmp_path: Path) -> None:
    whole = Valley(0.75)
    walk(search(tmp_path / "whole", whole), SCALE, 1.5, 0.2)
    asked: list[SettingValue] = []
    for _ in whole.asked:
        valley, left = Valley(0.75), [1]

        def once(
            at: SettingValue, valley: Valley = valley, left: list[int] = left
        ) -> tuple[EvaluatedMetric, dict[str, Any]]:
            if not left:
                raise KeyboardInterrupt
            left.pop()
            return valley.measure(at)

        found = Search("guidance_scale", "fid", {}, tmp_path / "parts", once, say=lambda line: None)
        with contextlib.suppress(KeyboardInterrupt):
            walk(found, SCALE, 1.5, 0.2)
        asked += valley.asked
    assert asked == whole.asked
    parts, unbroken = (json.loads(next((tmp_path / n).glob("*.json")).read_text()) for n in ("parts", "whole"))
    assert [(p["guidance_scale"], p["value"]) for p in parts["points"]] == [
        (p["guidance_scale"], p["value"]) for p in unbroken["points"]
    ]
    assert parts["best"]["guidance_scale"] == unbroken["best"]["guidance_scale"]


def test_another_protocol_is_another_file(tmp_path: Path) -> None:
    for about in ({"num_samples": 500}, {"num_samples": 1000}):
        valley = Valley(2.0)
        grid(search(tmp_path, valley, **about), [1.0])
        assert valley.asked == [1.0]
    assert len(list(tmp_path.glob("search-*.json"))) == 2


@pytest.mark.parametrize(
    "damage", [lambda text: text[:40], lambda text: text.replace('"points"', '"p"'), lambda text: "[1]"]
)
def test_a_damaged_file_is_named(tmp_path: Path, damage: Callable[[str], str]) -> None:
    found = search(tmp_path, Valley(2.0))
    grid(found, [1.0])
    found.path.write_text(damage(found.path.read_text()))
    with pytest.raises(ValueError, match=f"{found.path.name}.*delete it to start the search again"):
        search(tmp_path, Valley(2.0))


def test_intervals_are_all_pairs_that_are_some(tmp_path: Path) -> None:
    pairs = intervals([0, 0.2, 0.9], [0.1, 0.8])
    assert pairs == [(0, 0.1), (0, 0.8), (0.2, 0.8)]
    with pytest.raises(ValueError, match="no interval"):
        intervals([0.9], [0.5])
    valley = Valley(0.8)
    grid(search(tmp_path, valley, INTERVAL), pairs)
    again = search(tmp_path, Valley(0.8), INTERVAL)
    assert again.best.at == (0, 0.8) and {point.at for point in again.points} == set(pairs)
    draw_search(again, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_best_at_an_end_is_told(tmp_path: Path) -> None:
    found = search(tmp_path, Valley(2.0))
    grid(found, [1.0, 1.5])
    assert found.at_the_end
    grid(found, [2.5, 2.0])
    assert not found.at_the_end


def test_a_number_that_is_none_is_refused(tmp_path: Path) -> None:
    def nothing(at: SettingValue) -> tuple[EvaluatedMetric, dict[str, Any]]:
        measured, about = Valley(2.0).measure(at)
        return EvaluatedMetric(Row("fid", "FID", float("nan"), "", "lower"), measured.protocol), about

    found = Search("guidance_scale", "fid", {}, tmp_path, nothing)
    with pytest.raises(ValueError, match="nan at guidance_scale 1"):
        grid(found, [1.0])
    assert not found.path.exists()


def measured_with(weights: str) -> Callable[[SettingValue], tuple[EvaluatedMetric, dict[str, Any]]]:
    def measure(at: SettingValue) -> tuple[EvaluatedMetric, dict[str, Any]]:
        result, about = Valley(2.0).measure(at)
        row = Row("fdr", "FDr", 3.0, "", "lower", parts={"Inception": 2.0, "CLIP": 4.0})
        return EvaluatedMetric(row, result.protocol.model_copy(update={"weights": weights})), about

    return measure


def test_what_a_number_is_the_mean_of_is_said_and_kept(tmp_path: Path) -> None:
    said: list[str] = []
    grid(Search("guidance_scale", "fdr", {}, tmp_path, measured_with("a"), say=said.append), [1.5])
    assert "fdr 3, mean of Inception 2, CLIP 4  (" in said[0]
    [again] = Search("guidance_scale", "fdr", {}, tmp_path, measured_with("a")).points
    assert again.parts == {"Inception": 2.0, "CLIP": 4.0} and again.about == {}


def test_points_of_other_weights_do_not_go_together(tmp_path: Path) -> None:
    grid(Search("guidance_scale", "fdr", {}, tmp_path, measured_with("a"), say=lambda line: None), [1.5])
    other = Search("guidance_scale", "fdr", {}, tmp_path, measured_with("b"), say=lambda line: None)
    grid(other, [1.5])
    with pytest.raises(
        ValueError, match=r"its points have weights 'a', this one 'b'; give what they were measured with"
    ):
        grid(other, [1.7])
    assert len(Search("guidance_scale", "fdr", {}, tmp_path, measured_with("a")).points) == 1
