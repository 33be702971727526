"""Feature extractors of images: 8-bit inputs, pretrained weights or an error, independence of the batch."""

from __future__ import annotations

import builtins
import hashlib
from pathlib import Path

import pytest
import torch
from inception_state import images as colour_images
from inception_state import seeded_state
from torch import Tensor

from unilatent.modalities.image.spaces import CLIP, ClassifierSpace, DINOv2, Inception, Pixels, levels
from unilatent.records import MemoryRows

CPU = torch.device("cpu")


def images(batch: int = 3, channels: int = 3, side: int = 20, seed: int = 0) -> Tensor:
    return torch.rand(batch, channels, side, side, generator=torch.Generator().manual_seed(seed))


def striped(count: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noisy 8 x 8 images; the class is the row that is bright."""
    labels = torch.arange(count) % classes
    data = 0.3 * images(count, 1, 8, seed)
    data[torch.arange(count), 0, labels] += 0.6
    return data, labels


# Pixels -------------------------------------------------------------------------------------------------------------


def test_levels_are_rounded_not_truncated():
    data = torch.tensor([0.0, 0.4 / 255, 0.6 / 255, 254.6 / 255, 1.0, 1.7, -2]).view(1, 1, 1, 7)
    assert levels(data).flatten().tolist() == [0, 0, 1, 255, 255, 255, 0]


def test_pixels_are_exact_levels_in_order():
    pixels = Pixels()(images())["pixels"]
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 1200)
    assert torch.equal(pixels.view(3, 3, 20, 20), (images() * 255).round().to(torch.uint8))
    assert Pixels().weights is None and Pixels().prepare(CPU) is None


def test_large_images_have_no_pixel_output():
    assert Pixels()(images(1, 3, 32))["pixels"].shape == (1, 3072)
    assert Pixels()(images(1, 3, 33)) == {}


def test_diverged_images_are_refused():
    data = images()
    data[1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity in 1 of 3"):
        Pixels()(data)


# Inception ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(seeded_state(), path)
    return path


def test_inception_receives_8_bit_images(weights: Path):
    space = Inception(str(weights))
    space.prepare(CPU)
    image = colour_images()["small"]
    features = space(image / 255 + 0.4 / 255)  # equal to the image only after rounding
    assert {name: tuple(value.shape) for name, value in features.items()} == {
        "pool": (1, 2048),
        "spatial": (1, 2023),
        "logits_unbiased": (1, 1008),
    }
    assert torch.equal(features["pool"], space.network(image).pool)
    assert space.weights == hashlib.sha256(weights.read_bytes()).hexdigest()
    grey = space(image[:, :1] / 255)["pool"]
    assert torch.equal(grey, space(image[:, :1].expand(-1, 3, -1, -1) / 255)["pool"])
    with pytest.raises(ValueError, match="1 or 3 channels, got 4"):
        space(torch.zeros(1, 4, 8, 8))


def test_inception_without_weights_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"InceptionV3 weights for FID: .* does not exist"):
        Inception(str(tmp_path / "none.pth")).prepare(CPU)


# Classifier ---------------------------------------------------------------------------------------------------------


def fitted(data: Tensor, labels: Tensor | None = None) -> ClassifierSpace:
    space = ClassifierSpace()
    space.fit(MemoryRows({**Pixels()(data), **({} if labels is None else {"labels": labels})}))
    return space


@pytest.mark.parametrize("classes", [2, 5])
def test_the_classifier_equals_the_fitted_one_of_scikit_learn(classes: int):
    from sklearn.neural_network import MLPClassifier

    train, labels = striped(300, classes)
    space = fitted(train, labels)
    data, requested = striped(50, classes, seed=1)
    features = space(data)
    assert features["hidden"].shape == (50, 64) and features["probabilities"].shape == (50, classes)
    torch.testing.assert_close(features["probabilities"].sum(1), torch.ones(50))
    assert (space.classes[features["probabilities"].argmax(1)] == requested).float().mean() > 0.95
    assert features["hidden"].min() == 0 and features["hidden"].std(0).mean() > 0.01
    again = fitted(train, labels)
    assert again.weights == space.weights and len(space.weights) == 64
    other = fitted(*striped(300, classes, seed=2))
    assert other.weights != space.weights
    for key, value in space(data[7:8]).items():
        torch.testing.assert_close(value, features[key][7:8])
    with pytest.warns(match="Maximum iterations"):
        sklearns = MLPClassifier((64,), random_state=0, max_iter=1).fit(train.flatten(1).numpy(), labels.numpy())
    sklearns.coefs_ = [layer.weight.numpy(force=True).T for layer in (space.hidden, space.output)]
    sklearns.intercepts_ = [layer.bias.numpy(force=True) for layer in (space.hidden, space.output)]
    theirs = sklearns.predict_proba(levels(data).flatten(1).double().numpy() / 255)
    torch.testing.assert_close(features["probabilities"].double(), torch.from_numpy(theirs), rtol=1e-5, atol=1e-6)


def test_classifier_needs_labelled_small_images():
    """For other data it has no output and no weights."""
    data, labels = striped(20, 2)
    for silent in (
        fitted(data, 0 * labels),
        fitted(data),
        fitted(torch.zeros(20, 3, 33, 33), labels),
        ClassifierSpace(),
    ):
        assert silent.weights is None and silent(data) == {}


# Transformers -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=42)
    path = tmp_path_factory.mktemp("dinov2")
    transformers.Dinov2Model(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=24, intermediate_size=48, projection_dim=12, num_hidden_layers=2, num_attention_heads=2,
        image_size=32, patch_size=8,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("clip")
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(path)
    return path


def test_dinov2_returns_the_class_token_at_224(dinov2: Path):
    space = DINOv2(str(dinov2))
    space.prepare(CPU)
    data = levels(images(2, 3, 224)).float() / 255
    token = space(data)["dinov2"]
    mean, deviation = torch.tensor(space.mean).view(3, 1, 1), torch.tensor(space.deviation).view(3, 1, 1)
    with torch.no_grad():
        hidden = space.network(pixel_values=(data - mean) / deviation).last_hidden_state
    torch.testing.assert_close(token, hidden[:, 0])
    assert token.shape == (2, 24) and token.dtype == torch.float32 and not torch.allclose(token[0], token[1], atol=1e-3)
    torch.testing.assert_close(space(data[1:])["dinov2"], token[1:], rtol=1e-4, atol=1e-5)
    assert space(images(1, 1, 20))["dinov2"].shape == (1, 24)


def test_clip_returns_the_projected_embedding_at_its_own_size(clip: Path):
    space = CLIP(str(clip))
    space.prepare(CPU)
    data = levels(images(2, 3, 32)).float() / 255
    mean, deviation = torch.tensor(space.mean).view(3, 1, 1), torch.tensor(space.deviation).view(3, 1, 1)
    with torch.no_grad():
        want = space.network(pixel_values=(data - mean) / deviation).image_embeds
    torch.testing.assert_close(space(data)["clip"], want)
    assert want.shape == (2, 12) and space(images(1, 3, 50))["clip"].isfinite().all()


def test_the_fingerprint_follows_the_weights_and_not_the_files(dinov2: Path, tmp_path: Path):
    spaces = [DINOv2(str(dinov2)), DINOv2(str(tmp_path / "shards")), DINOv2(str(tmp_path / "changed"))]
    spaces[0].prepare(CPU)
    spaces[0].network.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    spaces[1].prepare(CPU)
    spaces[1].network.layernorm.bias.data += 1e-3
    spaces[1].network.save_pretrained(tmp_path / "changed")
    spaces[2].prepare(CPU)
    assert spaces[0].weights == spaces[1].weights != spaces[2].weights


def test_another_network_is_refused_where_transformers_would_fill_in_random_weights(clip: Path, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    broken = load_file(clip / "model.safetensors")
    del broken["visual_projection.weight"]
    save_file(broken, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((clip / "config.json").read_text())
    with pytest.raises(
        ValueError, match=r"the feature extractor clip: .* lacks 1 tensor, for example visual_projection.weight"
    ):
        CLIP(str(tmp_path)).prepare(CPU)
    with pytest.raises(ValueError, match=r"the feature extractor dinov2: .*give a folder or hub id of a Dinov2Model"):
        DINOv2(str(clip)).prepare(CPU)


def test_a_missing_folder_is_refused_by_name(tmp_path: Path):
    pytest.importorskip("transformers")
    with pytest.raises(
        ValueError, match=r"the feature extractor dinov2: .*nowhere cannot be loaded \([^\n]*\); give a folder"
    ):
        DINOv2(str(tmp_path / "nowhere")).prepare(CPU)


def test_without_the_extra_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    imported = builtins.__import__

    def without(name: str, *args, **kwargs):
        if name == "transformers":
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        ValueError, match=r"the feature extractor clip needs the package transformers: pip install 'unilatent\["
    ):
        CLIP().prepare(CPU)
