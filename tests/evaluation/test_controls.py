"""Metrics that compare with held-out real samples, and with real samples spoiled in a known way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from building import model_of, splits_of
from safetensors.torch import load_file
from torch import Tensor

from unilatent.evaluation.evaluate import EvaluationRequest, Evaluator
from unilatent.modalities.base import Dataset, Evidence, Metric, Row, Space, Splits
from unilatent.modalities.image import Image
from unilatent.records import Rows


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


class Contrast(Brightness):
    """Another feature of the same samples, fitted to an earlier one."""

    name = "contrast"
    needs = ("brightness",)

    def fit(self, train: Rows) -> None:
        self.seen["fits"] = self.seen.get("fits", 0) + 1

    def __call__(self, data: Tensor) -> dict[str, Tensor]:
        self.seen["contrast"] = self.seen.get("contrast", 0) + len(data)
        return {"contrast": data.std((1, 2, 3))}

    def controls(self, data: Tensor) -> dict[str, Tensor]:
        return {"inverted_contrast": data.std((1, 2, 3))}


class Darkness(Brightness):
    name = "darkness"

    def __call__(self, data: Tensor) -> dict[str, Tensor]:
        self.seen["darkness"] = self.seen.get("darkness", 0) + len(data)
        return {"darkness": 1 - data.mean((1, 2, 3))}

    def controls(self, data: Tensor) -> dict[str, Tensor]:
        return {}


class OfThree(BrightnessMetric):
    spaces = ("contrast", "brightness", "darkness")


class WithThree(WithBrightness):
    def spaces(self) -> list[Space]:
        return [kind(self.seen, self.version) for kind in (Brightness, Contrast, Darkness)]

    def metrics(self) -> list[Metric]:
        return [OfThree(True)]


class Counted(Dataset):
    """A data set that counts how often a sample is read."""

    def __init__(self, inner: Dataset):
        self.inner, self.reads = inner, 0

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        return self.inner[index]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    @property
    def fingerprint(self) -> str:
        return self.inner.fingerprint


def test_extractors_share_a_pass_and_each_completes_what_it_lacks(tmp_path: Path) -> None:
    model = model_of("image", "unite").eval()
    request = EvaluationRequest(metrics=("brightness",), num_samples=6, num_reference=40, num_held_out=8)
    plain = splits_of("image")

    def run() -> tuple[Evidence, dict[str, int], int]:
        modality = WithThree(model.modality.config)
        modality.seen = {}
        splits = Splits(Counted(plain.train), plain.held_out)
        evaluator = Evaluator(model, splits, tmp_path, request, modality=modality, num_inference_steps=1)
        return evaluator.run().evidence, modality.seen, splits.train.reads

    first, seen, reads = run()
    assert seen["fits"] == 1 and reads == 2 * 40, "one pass for both that need no fit, one for the fitted one"
    assert seen["plain"] == seen["darkness"] == seen["contrast"] == 40 + 8 + 6
    train = [first.train[name].clone() for name in ("contrast", "brightness", "darkness")]
    of_darkness = [p for p in tmp_path.glob("real-*/rows_*") if "darkness" in load_file(p) and len(load_file(p)) < 5]
    chunk = sorted(path for path in of_darkness if len(load_file(path)["darkness"]) > 1)[0]
    missing = len(load_file(chunk)["darkness"])
    chunk.unlink()
    again, seen, reads = run()
    assert reads == missing and seen == {"fits": 1, "darkness": missing}
    for before, name in zip(train, ("contrast", "brightness", "darkness"), strict=True):
        assert torch.equal(before, again.train[name])
