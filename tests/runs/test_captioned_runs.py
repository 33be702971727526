"""Runs on captions: which prompts an evaluation uses, and how it reports them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from unilatent.evaluation.evaluate import EvaluationRequest, Evaluator
from unilatent.methods.base import LatentModel
from unilatent.modalities._media.collection import CollectionDataset
from unilatent.modalities.base import Dataset, Splits
from unilatent.modalities.image.scenes import Scenes, parse
from unilatent.presets import preset
from unilatent.training.config import RunConfig
from unilatent.training.trainer import Trainer
from unilatent.types import decode_texts

SCENES = ("scenes-unite", "scenes-ul")


def small(name: str, **training: Any) -> RunConfig:
    """A preset with narrow networks and few scenes."""
    plain = preset(name).plain()
    shrink(plain)
    plain["training"] |= {
        "steps": 2,
        "batch_size": 8,
        "threads": 1,
        "sample_every": 0,
        "checkpoint_every": 0,
        **training,
    }
    return RunConfig.parse(plain)


def shrink(tree: dict[str, Any]) -> None:
    for key, value in tree.items():
        if isinstance(value, dict):
            shrink(value)
        elif key in ("width", "mlp_width", "stem_width") and value:
            tree[key] = 32
        elif key in ("depth", "heads", "num_inference_steps", "decoder_steps"):
            tree[key] = 2
        elif key == "path" and value == "scenes":
            tree |= {"num_samples": 60, "held_out": 24}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    trainer = Trainer(small("scenes-unite", evaluate_samples=12), tmp_path_factory.mktemp("run") / "out")
    trainer.fit()
    return trainer


def test_a_run_is_evaluated_on_held_out_captions(run: Trainer):
    (path,) = (run.out / "eval").glob("step_*.json")
    text = path.read_text()
    for key in ("scene_colours", "scene_everything", "scene_objects_unseen", "scene_count_unseen"):
        assert f'"{key}"' in text
    assert "held-out real" in text and "chance" in text and json.loads(text)


def test_prompts_come_evenly_from_held_out_samples(run: Trainer, tmp_path: Path):
    held_out = run.splits.held_out
    evaluator = Evaluator(run.model, run.splits, tmp_path, EvaluationRequest(num_samples=24, batch_size=5))
    asked = decode_texts(evaluator.settings["prompts"])
    assert asked == [held_out[i][1]["prompts"] for i in range(24)]
    assert [parse(text).unseen for text in asked] == [False] * 12 + [True] * 12
    few = Evaluator(run.model, run.splits, tmp_path, EvaluationRequest(num_samples=8, batch_size=64))
    assert decode_texts(few.settings["prompts"]) == asked[::3]
    given = Evaluator(run.model, run.splits, tmp_path, EvaluationRequest(num_samples=8), prompts="a small red circle")
    assert given.settings["prompts"] == "a small red circle"
    assert "prompts" not in Evaluator(run.model, run.splits, tmp_path, EvaluationRequest(num_samples=0)).settings


def test_no_image_is_opened_to_find_prompts(run: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Scenes, "load", None)
    looked: list[int] = []
    plain = CollectionDataset.values
    monkeypatch.setattr(CollectionDataset, "values", lambda self, index: looked.append(index) or plain(self, index))
    Evaluator(run.model, run.splits, tmp_path, EvaluationRequest(num_samples=100))
    assert looked == list(range(24)), "each of the 24 once"


@pytest.fixture(scope="module")
def classes_and_texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[LatentModel, Splits]:
    """A model with both conditions, and digits with a caption that names the class."""
    config = preset("scenes-unite").plain()
    shrink(config)
    config["conditions"] |= {"class_label": {"num_classes": 10}}
    config["modality"] |= {"channels": 1}
    config["data"] = {"path": "digits", "caption_template": ["the digit {}"], "held_out": 100}
    built = RunConfig.parse(config)
    model = LatentModel.build(built.model())
    return model, model.modality.splits(built.data)


def test_captions_of_the_data_agree_with_requested_labels(classes_and_texts, tmp_path: Path):
    model, splits = classes_and_texts
    evaluator = Evaluator(model, splits, tmp_path, EvaluationRequest(num_samples=6), labels=[3, 7])
    assert decode_texts(evaluator.settings["prompts"]) == ["the digit 3", "the digit 7"] * 3
    assert evaluator.settings["labels"] == [3, 7]
    nothing_of_labels, no_nine = Few(splits.held_out, "prompts"), Few(splits.held_out, "prompts", "labels")
    for data, problem in ((nothing_of_labels, "the data has none"), (no_nine, "no sample of the data has 9")):
        with pytest.raises(ValueError, match=rf"^labels: .*{problem}.*; give prompts as well") as told:
            Evaluator(model, Splits(data, data), tmp_path, EvaluationRequest(num_samples=6), labels=[9])
        assert "\n" not in str(told.value)


class Few(Dataset):
    """Prompts of another data set that has no nines."""

    fingerprint = "few"

    def __init__(self, other: Dataset, *facts: str):
        self.other, self.facts = other, {key: {} for key in facts}
        self.rows = [i for i in range(len(other)) if other.values(i)["labels"] != 9]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, dict[str, Any]]:
        return self.other[self.rows[index]]


def test_unified_latents_train_on_captions_too(tmp_path: Path):
    config = small("scenes-ul", evaluate_samples=0)
    first = config.tokenizer.model_copy(update={"training": config.training})
    Trainer(first, tmp_path / "first").fit()
    method = config.method.model_copy(update={"tokenizer": str(tmp_path / "first")})
    trainer = Trainer(config.model_copy(update={"method": method, "tokenizer": None}), tmp_path / "out")
    trainer.fit()
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values() if value.is_floating_point())


def test_presets_with_captions_build():
    with torch.device("meta"):
        for name in ("imagenet256-unite-b-text", "text256-unite-l"):
            assert len(LatentModel.build(preset(name).example().model()).conditions) == 1
    assert preset("imagenet256-unite-b-text").data.templates[0] == "a photo of a {}"
