"""Synthetic scenes with captions: one to three shapes; the caption gives their size, colour, shape and position.

A scene is a function of its number and is drawn at any resolution; nothing is stored or downloaded. Some pairs of
colour and shape never occur in training. They test whether a model combines what it learned separately.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ...maths.streams import seed_of
from .._media.captions import Captions
from .._media.collection import CachedCollection, CollectionDataset, held_out_count
from .._media.pixels import Frame
from ..base import Splits

SCENES = "scenes"
"""The value of `data.path` that selects this data."""
ORIGIN = "Drawn by this package from random numbers, with their captions; no data of others are in them."
COLOURS = {
    "red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 70, 225),
    "yellow": (245, 205, 20), "purple": (155, 50, 185), "black": (25, 25, 25),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle")
SIZES = {"small": 0.13, "large": 0.18}
"""Radius of the circle of equal area, as a fraction of the image's shorter side."""
JITTER = 0.05
"""Largest relative change of a radius."""
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
COUNTS = (0.4, 0.4, 0.2)
"""Fractions of scenes with one, two and three shapes."""
NEVER_TRAINED = frozenset({("red", "triangle"), ("blue", "circle"), ("yellow", "square")})
"""(colour, shape) pairs that are held out; each of these colours and shapes occurs in training in other pairs."""
GAP = 0.1
"""Smallest distance between shapes, as a fraction of the shorter side: slightly blurred shapes stay separate."""
DIAGONAL = 1.2
"""Smallest ratio of two shapes' distances along the axis of their relation and along the other axis."""
MARGIN = 0.03
"""Smallest distance from the image border, as a fraction of the shorter side."""
TRAINED = 20_000
"""Default number of training scenes."""
SIDE = 16
"""Smallest image side in pixels at which shapes are distinguishable."""
VERSION = 2
"""Version of the drawing. Part of the fingerprint: change it whenever images change."""


@dataclass(frozen=True)
class SceneObject:
    """A shape described by three words."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"

    @property
    def pair(self) -> tuple[str, str]:
        return self.colour, self.shape


@dataclass(frozen=True)
class SceneDescription:
    """The content of a caption. relation: of the first object to the second; None for a single object."""

    objects: tuple[SceneObject, ...]
    relation: str | None = None

    @property
    def unseen(self) -> bool:
        """Whether it has a (colour, shape) pair that never occurs in training."""
        return not NEVER_TRAINED.isdisjoint(item.pair for item in self.objects)


Placement = tuple[float, float, float]
"""Centre (x, y; y points down) and radius of an object, as fractions of the image's shorter side."""


@dataclass(frozen=True)
class Scene:
    """A description and the place of each of its objects."""

    description: SceneDescription
    places: tuple[Placement, ...]


# ---- scenes by number ----------------------------------------------------------------------------------------------


@lru_cache(maxsize=32768)
def scene(number: int, unseen: bool, aspect: tuple[float, float] = (1.0, 1.0)) -> Scene:
    """Return the scene with this number.

    unseen: True for at least one pair of NEVER_TRAINED, False for none. aspect: (height, width) in units of the shorter
    side.
    """
    draw = random.Random(seed_of("scene", number, int(unseen)))
    count = _count(draw)
    while True:
        description = _description(draw, unseen, count)
        if places := _places(draw, description, aspect):
            return Scene(description, places)


def _pick(draw: random.Random, options: Sequence[str]) -> str:
    """Choose by `random()`, the only method that is guaranteed to give equal numbers in every version of Python."""
    return options[int(draw.random() * len(options))]


def _description(draw: random.Random, unseen: bool, count: int) -> SceneDescription:
    """Draw objects with distinct (colour, shape) pairs until `unseen` holds."""
    objects: list[SceneObject] = []
    while len(objects) < count:
        drawn = SceneObject(_pick(draw, tuple(SIZES)), _pick(draw, tuple(COLOURS)), _pick(draw, SHAPES))
        if drawn.pair not in {other.pair for other in objects}:
            objects.append(drawn)
    description = SceneDescription(tuple(objects), _pick(draw, tuple(OPPOSITE)) if count > 1 else None)
    return description if description.unseen == unseen else _description(draw, unseen, count)


def _count(draw: random.Random) -> int:
    at = draw.random()
    return 1 + (at >= COUNTS[0]) + (at >= COUNTS[0] + COUNTS[1])


def _places(draw: random.Random, description: SceneDescription, aspect: tuple[float, float]) -> tuple[Placement, ...]:
    """Draw places inside the image, without overlap and in the relation; empty after 30 failed attempts."""
    height, width = aspect
    shapes = [(SIZES[item.size], _REACH[item.shape]) for item in description.objects]
    for _ in range(30):
        places: list[Placement] = []
        for size, reach in shapes:
            radius = size * (1 + JITTER * (2 * draw.random() - 1))
            edge = MARGIN + reach * radius
            places.append(
                (edge + draw.random() * (width - 2 * edge), edge + draw.random() * (height - 2 * edge), radius)
            )
        if description.relation is not None and not _clearly(places[0], places[1], description.relation):
            continue
        reaches = [reach * radius for (_, reach), (*_, radius) in zip(shapes, places, strict=True)]
        if all(
            math.dist(a[:2], b[:2]) >= GAP + reaches[i] + reaches[j]
            for i, a in enumerate(places)
            for j, b in enumerate(places[:i])
        ):
            return tuple(places)
    return ()


def _clearly(a: Sequence[float], b: Sequence[float], relation: str) -> bool:
    """Whether a is in that relation to b and clearly off the diagonal."""
    near, far = sorted((abs(a[0] - b[0]), abs(a[1] - b[1])))
    return related(a, b) == relation and far >= DIAGONAL * near


_TRIANGLE = math.sqrt(4 * math.pi / (3 * math.sqrt(3)))
"""Circumradius of an equilateral triangle / radius of the circle of equal area."""
_REACH = {"circle": 1.0, "square": math.sqrt(math.pi / 2), "triangle": _TRIANGLE}
"""Distance from the centroid to the farthest point / radius of the circle of equal area."""


def related(a: Sequence[float], b: Sequence[float]) -> str:
    """Return the relation of point a (x, y) to point b, along the axis on which they are farther apart."""
    across, down = a[0] - b[0], a[1] - b[1]
    if abs(across) >= abs(down):
        return "left of" if across < 0 else "right of"
    return "above" if down < 0 else "below"


# ---- captions ------------------------------------------------------------------------------------------------------


def captions(description: SceneDescription) -> tuple[str, ...]:
    """Return all captions of a scene: the canonical one first, then paraphrases."""
    objects, relation = description.objects, description.relation
    if len(objects) == 1:
        return str(objects[0]), f"there is {objects[0]}", f"a picture of {objects[0]}"
    assert relation is not None
    a, b, *third = objects
    pairs = [f"{a} {relation} {b}", f"{b} {OPPOSITE[relation]} {a}", f"{a} {_long(relation)} {b}"]
    if not third:
        return *pairs, f"there is {pairs[0]}"
    return *(f"{pair}, and {third[0]}" for pair in pairs), f"{third[0]}, and {pairs[0]}"


def _long(relation: str) -> str:
    return f"to the {relation}" if relation.endswith("of") else relation


_THING = rf"(?:an?|one|the)?\s*({'|'.join(SIZES)})\s+({'|'.join(COLOURS)})\s+({'|'.join(SHAPES)})"
_RELATION = rf"(?:is\s+)?(?:to\s+the\s+)?({'|'.join(OPPOSITE)})"
_PAIR = rf"{_THING}\s+{_RELATION}\s+{_THING}"
_OPENING = r"(?:there\s+is\s+|a\s+picture\s+of\s+)?"
_FORMS = [
    re.compile(rf"{_OPENING}{form}\.?", re.IGNORECASE)
    for form in (_THING, _PAIR, rf"{_PAIR},?\s+and\s+{_THING}", rf"{_THING},?\s+and\s+{_PAIR}")
]


@lru_cache(maxsize=65536)
def parse(caption: str) -> SceneDescription | None:
    """Parse a caption; None if it does not describe such a scene. Inverts every caption of `captions`."""
    for form in _FORMS:
        if match := form.fullmatch(caption.strip()):
            words = [word.lower() for word in match.groups()]
            relation = next((word for word in words if word in OPPOSITE), None)
            attributes = [word for word in words if word not in OPPOSITE]
            objects = [SceneObject(*attributes[i : i + 3]) for i in range(0, len(attributes), 3)]
            if form is _FORMS[3]:
                objects = [*objects[1:], objects[0]]
            return SceneDescription(tuple(objects), relation)
    return None


# ---- drawing -------------------------------------------------------------------------------------------------------


def draw(drawn: Scene, height: int, width: int) -> np.ndarray:
    """Draw a scene on white: (height, width, 3) uint8, antialiased by drawing it larger and averaging."""
    factor = max(2, min(8, 256 // min(height, width)))
    unit = min(height, width) * factor
    canvas = Image.new("RGB", (width * factor, height * factor), "white")
    pen = ImageDraw.Draw(canvas)
    for item, (x, y, radius) in zip(drawn.description.objects, drawn.places, strict=True):
        x, y, r = x * unit, y * unit, radius * unit
        colour = COLOURS[item.colour]
        if item.shape == "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
        elif item.shape == "square":
            half = r * math.sqrt(math.pi) / 2
            pen.rectangle((x - half, y - half, x + half, y + half), fill=colour)
        else:
            r *= _TRIANGLE
            turns = (0, 2 * math.pi / 3, -2 * math.pi / 3)
            corners = [(x + r * math.sin(turn), y - r * math.cos(turn)) for turn in turns]
            pen.polygon(corners, fill=colour)
    return np.asarray(canvas.resize((width, height), Image.Resampling.BOX))


# ---- data set ------------------------------------------------------------------------------------------------------


class SceneCaptions(Captions):
    """All captions of each scene."""

    def __init__(self, scenes: Scenes):
        self.scenes = scenes

    def __getitem__(self, index: int) -> tuple[str, ...]:
        return captions(self.scenes.scene(index).description)

    def stamp(self, index: int) -> str:
        return ""


class Scenes(CachedCollection):
    """`trained` scenes, then `held_out` others.

    The second half of the held-out scenes have pairs of NEVER_TRAINED, all other scenes have none.
    """

    labels = None
    class_names = ()

    def __init__(self, frame: Frame, trained: int, held_out: int):
        super().__init__(trained + held_out, frame, cache=True)
        self.trained, self.seen = trained, trained + (held_out + 1) // 2
        self.names = [str(number) for number in range(trained + held_out)]
        self.captions = SceneCaptions(self)
        shorter = min(frame.height, frame.width)
        self.aspect = frame.height / shorter, frame.width / shorter

    def scene(self, index: int) -> Scene:
        return scene(index, index >= self.seen, self.aspect)

    def decode(self, index: int) -> Tensor:
        drawn = draw(self.scene(index), self.frame.height, self.frame.width)
        return torch.from_numpy(drawn.transpose(2, 0, 1).copy())

    def stamp(self, index: int) -> str:
        return ""


class SceneDataset(CollectionDataset):
    """A subset of the scenes."""

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the number of scenes and of how they are drawn; no scene is drawn to compute it."""
        assert isinstance(self.collection, Scenes)
        parts = (VERSION, self.collection.frame, self.collection.seen, self.indices)
        return hashlib.sha256(repr(parts).encode()).hexdigest()


def splits(frame: Frame, num_samples: int | None, held_out: float) -> Splits:
    """Return training scenes and held-out scenes; ValueError if the images are too small or not in colour."""
    if frame.channels != 3 or min(frame.height, frame.width) < SIDE:
        raise ValueError(
            f"data.path: {SCENES!r} are RGB images with sides of at least {SIDE} pixels, not {frame.height} x "
            f"{frame.width} with {frame.channels} channels; set modality.channels=3 and a larger modality.size"
        )
    trained = TRAINED if num_samples is None else num_samples
    count = held_out_count(held_out, max(trained, int(held_out) + 1))
    collection = Scenes(frame, trained, count)
    return Splits(SceneDataset(collection, range(trained)), SceneDataset(collection, range(trained, trained + count)))
