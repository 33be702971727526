"""The CLIP score: both encoders of one network, published weights by name only, the chance baseline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from unilatent.modalities.base import Evidence
from unilatent.modalities.image import Image, ImageConfig
from unilatent.modalities.image.clip_score import ClipScore, score
from unilatent.modalities.image.spaces import CLIP
from unilatent.records import MemoryRows
from unilatent.types import encode_texts

TEXTS = ["a red dog", "two blue cats", "a green owl"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete CLIP with random weights and a tokenizer of letters."""
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("clip")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *[letter + "</w>" for letter in letters]]
    (path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(path / "vocab.json"), str(path / "merges.txt"))
    tokenizer.save_pretrained(path)
    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config={**sizes, "vocab_size": len(words), "max_position_embeddings": 20, "bos_token_id": 0,
                     "eos_token_id": 1, "pad_token_id": 1, "projection_dim": 12},
        vision_config={**sizes, "image_size": 32, "patch_size": 8, "projection_dim": 12}, projection_dim=12,
    )  # fmt: skip
    transformers.CLIPModel(config).save_pretrained(path)
    return path


def images(count: int) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_the_score_of_weights_in_a_folder_has_its_own_name(folder: Path):
    import transformers

    space = CLIP(str(folder))
    space.prepare(torch.device("cpu"))
    samples = MemoryRows({"prompts": encode_texts(TEXTS), **space(images(3))})
    real = MemoryRows({"prompts": encode_texts(TEXTS[:2]), **space(images(2))})
    metric = ClipScore(str(folder))
    (row,) = metric(Evidence(samples=samples, held_out=real))
    assert row.key == "clip_folder_score" and metric.gives == (row.key,) and "CLIP score" not in row.name
    whole = transformers.CLIPModel.from_pretrained(folder)
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        texts = whole.text_model(**tokens).pooler_output @ whole.text_projection.weight.T
    assert row.value == pytest.approx(score(samples["clip"], texts), abs=1e-3)
    assert row.beside["chance"] == pytest.approx(score(samples["clip"], texts.roll(1, 0)), abs=1e-3)
    assert row.beside["held-out real"] == pytest.approx(score(real["clip"], texts[:2]), abs=1e-3)
    assert metric(Evidence(samples=MemoryRows(space(images(3))))) == []


def test_the_score_is_a_cosine_that_is_never_negative():
    axes = torch.eye(4)
    assert score(3 * axes, axes) == 100 and score(axes, -axes) == 0
    assert score(axes, axes.roll(1, 0)) == 0


def test_only_the_published_network_gives_a_clip_score(folder: Path):
    keys = lambda clip: {key for metric in Image(ImageConfig(size=32, patch_size=4, clip=clip)).metrics()  # noqa: E731
                         for key in metric.gives}  # fmt: skip
    assert "clip_score" in keys(None) and "clip_folder_score" not in keys(None)
    assert "clip_score" not in keys(str(folder)) and "clip_folder_score" in keys(str(folder))


def test_a_folder_without_the_text_encoder_is_refused(folder: Path, tmp_path: Path):
    import transformers

    transformers.CLIPVisionModelWithProjection.from_pretrained(folder).save_pretrained(tmp_path)
    samples = MemoryRows({"prompts": encode_texts(TEXTS), "clip": torch.rand(3, 12)})
    with pytest.raises(ValueError, match=r"the text encoder of .*; give a folder or hub id of a complete CLIP"):
        ClipScore(str(tmp_path))(Evidence(samples=samples))
