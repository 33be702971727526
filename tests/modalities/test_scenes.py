"""Synthetic scenes: held-out pairs, captions and their parser, and the accuracy metric."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unilatent.batches import collate
from unilatent.modalities.base import Evidence, Row
from unilatent.modalities.image import Image, ImageConfig, ImageData
from unilatent.modalities.image.scene_metrics import SceneSpace, rates, read, scene_accuracies, shapes, verdict
from unilatent.modalities.image.scenes import (  # fmt: skip
    COLOURS,
    NEVER_TRAINED,
    SHAPES,
    SIZES,
    Scene,
    SceneDescription,
    SceneObject,
    captions,
    draw,
    parse,
    related,
    scene,
)
from unilatent.records import MemoryRows
from unilatent.types import decode_texts, encode_texts


def splits(size: int | list[int] = 32, **fields):
    modality = Image(ImageConfig.parse({"size": size, "patch_size": 4, "flip": False}))
    return modality.splits(ImageData.parse({"path": "scenes", "num_samples": 200, "held_out": 400} | fields))


def held_out(size: int = 32, count: int = 400) -> tuple[Tensor, list[SceneDescription]]:
    dataset = splits(size).held_out
    samples = [dataset[i] for i in range(0, 400, 400 // count)]
    descriptions = [parse(values["prompts"]) for _, values in samples]
    assert all(descriptions)
    return torch.stack([image for image, _ in samples]), descriptions


def accuracy(images: Tensor, descriptions: list[SceneDescription]) -> dict[str, float]:
    return rates([(shapes(row), text) for row, text in zip(read(images), descriptions, strict=True)])


def blurred(images: Tensor, sigma: float) -> Tensor:
    line = torch.exp(-(torch.arange(-3.0, 4.0) ** 2) / (2 * sigma**2))
    kernel = torch.outer(line, line) / line.sum() ** 2
    padded = F.pad(images, (3, 3, 3, 3), mode="replicate")
    return F.conv2d(padded, kernel.expand(3, 1, 7, 7), groups=3)


def drawn(*objects: tuple[str, float, float]) -> Tensor:
    """One image (1, 3, 64, 64) of objects at (x, y)."""
    description = SceneDescription(tuple(SceneObject(*words.split()) for words, _, _ in objects))
    places = tuple((x, y, SIZES[item.size]) for item, (_, x, y) in zip(description.objects, objects, strict=True))
    return torch.from_numpy(draw(Scene(description, places), 64, 64).copy()).permute(2, 0, 1)[None] / 255


# ---- the data ------------------------------------------------------------------------------------------------------


def test_a_scene_is_a_function_of_its_number():
    assert [scene.__wrapped__(i, False) for i in range(50)] == [scene(i, False) for i in range(50)]
    assert len({scene(i, False) for i in range(50)}) == 50
    a, b = splits().train, splits().train
    assert all(torch.equal(a[i][0], b[i][0]) and a[i][1] == b[i][1] for i in (0, 50, 199))


def test_some_pairs_never_occur_in_training_but_their_colours_and_shapes_do():
    trained = [scene(i, False).description for i in range(2000)]
    pairs = {item.pair for text in trained for item in text.objects}
    assert pairs == {(c, s) for c in COLOURS for s in SHAPES} - NEVER_TRAINED
    assert not any(text.unseen for text in trained) and all(scene(i, True).description.unseen for i in range(300))
    dataset = splits().held_out
    unseen = [parse(dataset[i][1]["prompts"]).unseen for i in range(400)]
    assert unseen == [False] * 200 + [True] * 200


def test_scenes_have_one_to_three_shapes_in_each_relation():
    descriptions = [scene(i, False).description for i in range(1000)]
    counts = Counter(len(a.objects) for a in descriptions)
    assert [counts[n] / 1000 for n in (1, 2, 3)] == pytest.approx([0.4, 0.4, 0.2], abs=0.06)
    assert set(Counter(a.relation for a in descriptions if a.relation)) == {"left of", "right of", "above", "below"}
    assert all((a.relation is None) == (len(a.objects) == 1) for a in descriptions)


@pytest.mark.parametrize("size", [16, 48, [32, 64]])
def test_shapes_are_inside_at_each_size_and_relations_are_true(size):
    dataset = splits(size).train
    for i in range(60):
        drawn_scene = dataset.collection.scene(i)
        wide, high = dataset.collection.aspect[1], dataset.collection.aspect[0]
        assert all(r <= x <= wide - r and r <= y <= high - r for x, y, r in drawn_scene.places)
        if drawn_scene.description.relation:
            assert related(drawn_scene.places[0], drawn_scene.places[1]) == drawn_scene.description.relation
        image = dataset[i][0]
        edges = torch.cat([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], dim=1)
        assert edges.min() > 0.4 and image.shape[1:] == ((size, size) if isinstance(size, int) else tuple(size))


def test_every_caption_parses_to_the_same_description():
    for i in range(300):
        description = scene(i, i % 2 == 1).description
        for caption in captions(description):
            parsed = parse(caption)
            assert parsed is not None and Counter(parsed.objects) == Counter(description.objects), caption
            if description.relation:
                same_order = parsed.objects[:2] == description.objects[:2]
                reversed_pair = description.objects[1::-1]
                assert parsed.relation == description.relation if same_order else parsed.objects[:2] == reversed_pair
        assert len(set(captions(description))) >= 3


@pytest.mark.parametrize(
    "text", ["", "a dog", "a red circle", "a small red circle and", "a small red hexagon", "small red circle " * 3]
)
def test_other_texts_do_not_parse(text: str):
    assert parse(text) is None


def test_one_caption_is_chosen_by_position_alone():
    train = splits().train
    chosen = [train.view(3, position)[1]["prompts"] for position in range(40)]
    assert set(chosen) == set(captions(train.collection.scene(3).description))
    assert chosen == [splits().train.view(3, position)[1]["prompts"] for position in range(40)]


def test_unsuitable_image_settings_are_refused():
    with pytest.raises(ValueError, match=r"modality\.flip: true mirrors"):
        Image(ImageConfig(size=32, patch_size=4)).splits(ImageData(path="scenes"))
    for fields in ({"channels": 1, "size": 32}, {"size": 8}):
        modality = Image(ImageConfig.parse({"patch_size": 4, "flip": False, **fields}))
        with pytest.raises(ValueError, match=r"data\.path: 'scenes' are RGB images with sides of at least 16"):
            modality.splits(ImageData(path="scenes"))


def test_different_sets_have_different_fingerprints():
    prints = {splits().train.fingerprint, splits().held_out.fingerprint, splits(48).train.fingerprint}
    assert len(prints | {splits(num_samples=300).train.fingerprint}) == 4
    assert splits().train.fingerprint in prints


# ---- accuracy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 64])
def test_real_images_agree_with_their_captions(size: int):
    assert min(accuracy(*held_out(size, 200)).values()) >= 99


def test_blur_and_noise_do_not_change_the_accuracy():
    images, descriptions = held_out()
    noise = 0.03 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    assert min(accuracy((blurred(images, 0.8) + noise).clamp(0, 1), descriptions).values()) >= 95


@pytest.mark.parametrize(
    ("caption", "wrong"),
    [
        ("a small red circle left of a large blue square", set()),
        ("a large blue square right of a small red circle", set()),
        ("a small red circle right of a large blue square", {"relation", "everything"}),
        ("a small red circle above a large blue square", {"relation", "everything"}),
        ("a large red circle left of a small blue square", {"everything"}),  # right sizes on the wrong objects
        ("a large red circle left of a large blue square", {"sizes", "everything"}),
        ("a small blue circle left of a large red square", {"objects", "relation", "everything"}),
        ("a small red triangle left of a large blue square", {"shapes", "objects", "relation", "everything"}),
        ("a small green circle left of a large blue square", {"colours", "objects", "relation", "everything"}),
        ("a small red circle", {"count", "colours", "shapes", "sizes", "objects", "everything"}),
    ],
)
def test_each_kind_of_error_is_distinguished(caption: str, wrong: set[str]):
    image = drawn(("small red circle", 0.25, 0.4), ("large blue square", 0.7, 0.6))
    result = verdict(shapes(read(image)[0]), parse(caption))
    assert {what for what, right in result.items() if not right} == wrong


def test_shapes_and_their_positions_are_detected():
    image = drawn(("large yellow triangle", 0.3, 0.35), ("small black square", 0.8, 0.7))
    first, second = shapes(read(image)[0])
    assert str(first.item) == "a large yellow triangle" and str(second.item) == "a small black square"
    assert first.place == pytest.approx((0.3, 0.35), abs=0.02) and second.place == pytest.approx((0.8, 0.7), abs=0.02)
    empty = torch.ones(1, 3, 32, 32)
    assert shapes(read(empty)[0]) == [] and (read(empty) == -1).all()


def test_specks_are_ignored_and_halves_of_two_colours_are_two_shapes():
    image = drawn(("large blue square", 0.5, 0.5))
    image[0, :, 2:4, 2:4] = 0
    assert len(shapes(read(image)[0])) == 1
    image[0, :, :, 32:][image[0, :, :, 32:] < 0.95] = 0.1
    assert Counter(shape.item.colour for shape in shapes(read(image)[0])) == {"blue": 1, "black": 1}


def evidence(images: Tensor, prompts: list[str], train: list[str] | None = None) -> Evidence:
    space = SceneSpace()
    space.fit(MemoryRows({"prompts": encode_texts(train or prompts)}))
    real = splits().held_out
    batch = collate([real[i] for i in range(0, 400, 4)], Image(ImageConfig(size=32, patch_size=4)))
    samples = MemoryRows({"prompts": encode_texts(prompts), **space(images)})
    return Evidence(samples=samples, held_out=MemoryRows({**batch.values, **space(batch.data)}))


def accuracies(evidence: Evidence) -> list[Row]:
    return [row for metric in scene_accuracies() for row in metric(evidence)]


def test_a_number_says_how_many_samples_it_is_of():
    """Of each group of captions its own, and of relations those that have one: together all samples."""
    images, descriptions = held_out()
    given = evidence(images, [captions(description)[0] for description in descriptions])
    used = {metric.gives: metric.used(given)[0] for metric in scene_accuracies()}
    for metric in scene_accuracies():
        of_group = [d for d in descriptions if d.unseen == bool(metric.group)]
        related = [d for d in of_group if d.relation is not None]
        assert used[metric.gives] == len(related if len(metric.gives) == 1 else of_group)
    assert sum(number for gives, number in used.items() if len(gives) > 1) == len(images)


def test_rows_have_chance_and_real_images_as_baselines():
    images, descriptions = held_out()
    prompts = [captions(description)[0] for description in descriptions]
    rows = {row.key: row for row in accuracies(evidence(images, prompts))}
    assert set(rows) == {key for metric in scene_accuracies() for key in metric.gives}
    for key, row in rows.items():
        assert row.value >= 99 and row.beside["held-out real"] >= 99 and row.unit == "%", key
        assert row.beside["chance"] < 60, key
    assert rows["scene_everything"].beside["chance"] < rows["scene_count"].beside["chance"]
    shuffled = prompts[2:] + prompts[:2]
    worse = {row.key: row.value for row in accuracies(evidence(images, shuffled))}
    assert all(worse[key] < 60 for key in rows), "images that agree with others' captions"


def test_there_is_no_output_for_data_other_than_scenes():
    images = held_out(32, 20)[0]
    other = ["a dog"] * 20
    space = SceneSpace()
    assert space(images) == {}
    space.fit(MemoryRows({"labels": torch.zeros(3)}))
    assert space(images) == {}
    assert accuracies(evidence(images, other)) == [] and accuracies(Evidence()) == []
    assert accuracies(evidence(images, other, train=["a small red circle"])) == []


def test_batches_carry_captions_as_bytes():
    train = splits().train
    batch = collate([train[i] for i in range(5)], Image(ImageConfig(size=32, patch_size=4)))
    assert decode_texts(batch.values["prompts"]) == [train[i][1]["prompts"] for i in range(5)]
    assert len(train.facts["prompts"]["examples"]) > 1 and math.isclose(batch.data.max(), 1)
