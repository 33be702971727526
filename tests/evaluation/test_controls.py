"""Metrics that compare with held-out real samples, and with real samples spoiled in a known way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from building import model_of, splits_of
from torch import Tensor

from unilatent.evaluation.evaluate import EvaluationRequest, Evaluator
from unilatent.modalities.base import Evidence, Metric, Row, Space
from unilatent.modalities.image import Image


class Brightness(Space):
    """The mean level; as a control, that of inverted images. Counts how many samples it has seen."""

    name = "brightness"
    on_request = True

    def __init__(self, seen: dict[str, int], version: str):
        self.seen, self.details = seen, {"brightness": version}

    def __call__(self, data: Tensor) -> dict[str, Tensor]:
        self.seen["plain"] = self.seen.get("plain", 0) + len(data)
        return {"brightness": data.mean((1, 2, 3))}

    def controls(self, data: Tensor) -> dict[str, Tensor]:
        self.seen["controls"] = self.seen.get("controls", 0) + len(data)
        return {"inverted_brightness": 1 - data.mean((1, 2, 3))}


class BrightnessMetric(Metric):
    space = "brightness"
    gives = ("brightness",)

    def __init__(self, needs_held_out: bool):
        self.needs_held_out, self.details = needs_held_out, {"of": "mean level"}

    def __call__(self, evidence: Evidence) -> list[Row]:
        names = ("brightness", "inverted_brightness")
        real = evidence.held_out
        beside = {} if real is None else {name: float(real[name].mean()) for name in names if name in real}
        assert evidence.train is not None and evidence.samples is not None
        assert "inverted_brightness" not in evidence.train and "inverted_brightness" not in evidence.samples
        return [Row("brightness", "mean level", float(evidence.samples["brightness"].mean()), beside=beside)]


class WithBrightness(Image):
    seen: dict[str, int]
    needs_held_out = True
    version = "v1"

    def spaces(self) -> list[Space]:
        return [Brightness(self.seen, self.version)]

    def metrics(self) -> list[Metric]:
        return [BrightnessMetric(self.needs_held_out)]


def evaluated(folder: Path, **settings: Any) -> tuple[Any, dict[str, int]]:
    model = model_of("image", "unite").eval()
    modality = WithBrightness(model.modality.config)
    modality.seen = {}
    for key, value in settings.items():
        setattr(modality, key, value)
    request = EvaluationRequest(metrics=("brightness",), num_samples=6, num_reference=10, num_held_out=8)
    splits = splits_of("image")
    found = Evaluator(model, splits, folder, request, modality=modality, num_inference_steps=1).run()
    return found.find("brightness"), modality.seen


def test_a_large_space_sees_held_out_samples_for_a_metric_that_needs_them(tmp_path: Path):
    result, seen = evaluated(tmp_path)
    beside = result.row.beside
    assert seen == {"plain": 10 + 8 + 6, "controls": 8}, "controls are of held-out samples only"
    assert abs(beside["brightness"] + beside["inverted_brightness"] - 1) < 1e-6 and 0 < beside["brightness"] < 0.5


def test_and_does_not_see_them_otherwise(tmp_path: Path):
    result, seen = evaluated(tmp_path, needs_held_out=False)
    assert result.row.beside == {} and seen == {"plain": 10 + 6}


def test_details_are_part_of_the_protocol_the_key_and_the_records(tmp_path: Path):
    """Features of other details are never taken from records."""
    first, _ = evaluated(tmp_path)
    assert first.protocol.details == {"brightness": "v1", "of": "mean level"}
    assert first.key == "brightness6/adm/v1/mean-level/heun-1/cfg1"
    _, again = evaluated(tmp_path)
    assert again == {}, "all features come from records"
    other, seen = evaluated(tmp_path, version="v2")
    assert seen == {"plain": 24, "controls": 8}
    assert ("details.brightness", "v1", "v2") in first.protocol.differences(other.protocol)
