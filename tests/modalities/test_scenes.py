"""Drawn scenes: what is never trained on, captions and their inverse, and a judge that can be wrong."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unilatent.modalities.base import Evidence
from unilatent.modalities.image import Image, ImageConfig, ImageData
from unilatent.modalities.image.obedience import Obedience, SceneSpace, rates, read, shapes, verdict
from unilatent.modalities.image.scenes import (
    COLOURS,
    NEVER_TRAINED,
    SHAPES,
    SIZES,
    Asked,
    Scene,
    Thing,
    captions,
    draw,
    parse,
    related,
    scene,
)  # fmt: skip
from unilatent.records import Held
from unilatent.training.batches import collate
from unilatent.types import decode_texts, encode_texts


def splits(size: int | list[int] = 32, **fields):
    modality = Image(ImageConfig.parse({"size": size, "patch_size": 4, "flip": False}))
    return modality.splits(ImageData.parse({"path": "scenes", "num_samples": 200, "held_out": 400} | fields))


def held_out(size: int = 32, count: int = 400) -> tuple[Tensor, list[Asked]]:
    dataset = splits(size).held_out
    samples = [dataset[i] for i in range(0, 400, 400 // count)]
    asked = [parse(values["prompts"]) for _, values in samples]
    assert all(asked)
    return torch.stack([picture for picture, _ in samples]), asked


def judged(pictures: Tensor, asked: list[Asked]) -> dict[str, float]:
    return rates([(shapes(row), said) for row, said in zip(read(pictures), asked, strict=True)])


def blurred(pictures: Tensor, sigma: float) -> Tensor:
    line = torch.exp(-(torch.arange(-3.0, 4.0) ** 2) / (2 * sigma**2))
    kernel = torch.outer(line, line) / line.sum() ** 2
    padded = F.pad(pictures, (3, 3, 3, 3), mode="replicate")
    return F.conv2d(padded, kernel.expand(3, 1, 7, 7), groups=3)


def drawn(*things: tuple[str, float, float]) -> Tensor:
    """One picture (1, 3, 64, 64) of things at (x, y)."""
    asked = Asked(tuple(Thing(*words.split()) for words, _, _ in things))
    places = tuple((x, y, SIZES[thing.size]) for thing, (_, x, y) in zip(asked.things, things, strict=True))
    return torch.from_numpy(draw(Scene(asked, places), 64, 64).copy()).permute(2, 0, 1)[None] / 255


# ---- the data ------------------------------------------------------------------------------------------------------


def test_a_scene_is_a_function_of_its_number():
    assert [scene.__wrapped__(i, False) for i in range(50)] == [scene(i, False) for i in range(50)]
    assert len({scene(i, False) for i in range(50)}) == 50
    a, b = splits().train, splits().train
    assert all(torch.equal(a[i][0], b[i][0]) and a[i][1] == b[i][1] for i in (0, 50, 199))


def test_some_pairs_are_never_trained_on_and_each_of_their_parts_is():
    trained = [scene(i, False).asked for i in range(2000)]
    pairs = {thing.pair for asked in trained for thing in asked.things}
    assert pairs == {(c, s) for c in COLOURS for s in SHAPES} - NEVER_TRAINED
    assert not any(asked.unseen for asked in trained) and all(scene(i, True).asked.unseen for i in range(300))
    dataset = splits().held_out
    said = [parse(dataset[i][1]["prompts"]).unseen for i in range(400)]
    assert said == [False] * 200 + [True] * 200


def test_scenes_are_of_one_to_three_shapes_in_every_relation():
    asked = [scene(i, False).asked for i in range(1000)]
    counts = Counter(len(a.things) for a in asked)
    assert [counts[n] / 1000 for n in (1, 2, 3)] == pytest.approx([0.4, 0.4, 0.2], abs=0.06)
    assert set(Counter(a.relation for a in asked if a.relation)) == {"left of", "right of", "above", "below"}
    assert all((a.relation is None) == (len(a.things) == 1) for a in asked)


@pytest.mark.parametrize("size", [16, 48, [32, 64]])
def test_shapes_lie_inside_at_every_size_and_relations_are_true(size):
    dataset = splits(size).train
    for i in range(60):
        found = dataset.collection.scene(i)
        wide, high = dataset.collection.aspect[1], dataset.collection.aspect[0]
        assert all(r <= x <= wide - r and r <= y <= high - r for x, y, r in found.places)
        if found.asked.relation:
            assert related(found.places[0], found.places[1]) == found.asked.relation
        picture = dataset[i][0]
        edges = torch.cat([picture[:, 0], picture[:, -1], picture[:, :, 0], picture[:, :, -1]], dim=1)
        assert edges.min() > 0.4 and picture.shape[1:] == ((size, size) if isinstance(size, int) else tuple(size))


def test_every_caption_is_understood_and_says_the_same():
    for i in range(300):
        asked = scene(i, i % 2 == 1).asked
        for caption in captions(asked):
            said = parse(caption)
            assert said is not None and Counter(said.things) == Counter(asked.things), caption
            if asked.relation:
                turned = said.things[:2] == asked.things[:2]
                assert said.relation == asked.relation if turned else said.things[:2] == asked.things[1::-1]
        assert len(set(captions(asked))) >= 3


@pytest.mark.parametrize(
    "text", ["", "a dog", "a red circle", "a small red circle and", "a small red hexagon", "small red circle " * 3]
)
def test_other_texts_are_none(text: str):
    assert parse(text) is None


def test_one_caption_is_chosen_by_position_alone():
    train = splits().train
    said = [train.view(3, position)[1]["prompts"] for position in range(40)]
    assert set(said) == set(captions(train.collection.scene(3).asked))
    assert said == [splits().train.view(3, position)[1]["prompts"] for position in range(40)]


def test_what_cannot_show_scenes_is_refused():
    with pytest.raises(ValueError, match=r"modality\.flip: true mirrors"):
        Image(ImageConfig(size=32, patch_size=4)).splits(ImageData(path="scenes"))
    for fields in ({"channels": 1, "size": 32}, {"size": 8}):
        modality = Image(ImageConfig.parse({"patch_size": 4, "flip": False, **fields}))
        with pytest.raises(ValueError, match=r"data\.path: 'scenes' are coloured pictures with sides of at least 16"):
            modality.splits(ImageData(path="scenes"))


def test_the_fingerprint_tells_sets_apart():
    prints = {splits().train.fingerprint, splits().held_out.fingerprint, splits(48).train.fingerprint}
    assert len(prints | {splits(num_samples=300).train.fingerprint}) == 4
    assert splits().train.fingerprint in prints


# ---- the judge -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 64])
def test_real_pictures_obey_their_captions(size: int):
    assert min(judged(*held_out(size, 200)).values()) >= 99


def test_blur_and_noise_do_not_mislead_the_judge():
    pictures, asked = held_out()
    noise = 0.03 * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    assert min(judged((blurred(pictures, 0.8) + noise).clamp(0, 1), asked).values()) >= 95


@pytest.mark.parametrize(
    ("caption", "wrong"),
    [
        ("a small red circle left of a large blue square", set()),
        ("a large blue square right of a small red circle", set()),
        ("a small red circle right of a large blue square", {"relation", "everything"}),
        ("a small red circle above a large blue square", {"relation", "everything"}),
        ("a large red circle left of a small blue square", {"everything"}),  # sizes are there, on the wrong things
        ("a large red circle left of a large blue square", {"sizes", "everything"}),
        ("a small blue circle left of a large red square", {"objects", "relation", "everything"}),
        ("a small red triangle left of a large blue square", {"shapes", "objects", "relation", "everything"}),
        ("a small green circle left of a large blue square", {"colours", "objects", "relation", "everything"}),
        ("a small red circle", {"count", "colours", "shapes", "sizes", "objects", "everything"}),
    ],
)
def test_every_kind_of_disobedience_is_told_apart(caption: str, wrong: set[str]):
    picture = drawn(("small red circle", 0.25, 0.4), ("large blue square", 0.7, 0.6))
    found = verdict(shapes(read(picture)[0]), parse(caption))
    assert {what for what, right in found.items() if not right} == wrong


def test_where_and_what_shapes_are():
    picture = drawn(("large yellow triangle", 0.3, 0.35), ("small black square", 0.8, 0.7))
    first, second = shapes(read(picture)[0])
    assert str(first.thing) == "a large yellow triangle" and str(second.thing) == "a small black square"
    assert first.place == pytest.approx((0.3, 0.35), abs=0.02) and second.place == pytest.approx((0.8, 0.7), abs=0.02)
    nothing = torch.ones(1, 3, 32, 32)
    assert shapes(read(nothing)[0]) == [] and (read(nothing) == -1).all()


def test_specks_are_no_shapes_and_halves_of_two_colours_are_two():
    picture = drawn(("large blue square", 0.5, 0.5))
    picture[0, :, 2:4, 2:4] = 0
    assert len(shapes(read(picture)[0])) == 1
    picture[0, :, :, 32:][picture[0, :, :, 32:] < 0.95] = 0.1
    assert Counter(shape.thing.colour for shape in shapes(read(picture)[0])) == {"blue": 1, "black": 1}


def evidence(pictures: Tensor, prompts: list[str], train: list[str] | None = None) -> Evidence:
    space = SceneSpace()
    space.fit(Held({"prompts": encode_texts(train or prompts)}))
    real = splits().held_out
    batch = collate([real[i] for i in range(0, 400, 4)], Image(ImageConfig(size=32, patch_size=4)))
    made = Held({"prompts": encode_texts(prompts), **space(pictures)})
    return Evidence(samples=made, held_out=Held({**batch.values, **space(batch.data)}))


def test_rows_stand_beside_chance_and_real_pictures():
    pictures, asked = held_out()
    prompts = [captions(said)[0] for said in asked]
    rows = {row.key: row for row in Obedience()(evidence(pictures, prompts))}
    assert set(rows) == set(Obedience.gives)
    for key, row in rows.items():
        assert row.value >= 99 and row.beside["held-out real"] >= 99 and row.unit == "%", key
        assert row.beside["chance"] < 60, key
    assert rows["scene_everything"].beside["chance"] < rows["scene_count"].beside["chance"]
    shuffled = prompts[2:] + prompts[:2]
    worse = {row.key: row.value for row in Obedience()(evidence(pictures, shuffled))}
    assert all(worse[key] < 60 for key in rows), "pictures that obey others' captions"


def test_it_speaks_only_of_scenes():
    pictures = held_out(32, 20)[0]
    other = ["a dog"] * 20
    space = SceneSpace()
    assert space(pictures) == {}
    space.fit(Held({"labels": torch.zeros(3)}))
    assert space(pictures) == {}
    assert Obedience()(evidence(pictures, other)) == [] and Obedience()(Evidence()) == []
    assert Obedience()(evidence(pictures, other, train=["a small red circle"])) == []


def test_batches_carry_captions_as_bytes():
    train = splits().train
    batch = collate([train[i] for i in range(5)], Image(ImageConfig(size=32, patch_size=4)))
    assert decode_texts(batch.values["prompts"]) == [train[i][1]["prompts"] for i in range(5)]
    assert len(train.facts["prompts"]["examples"]) > 1 and math.isclose(batch.data.max(), 1)
