"""Drawn scenes with captions: one to three shapes, and a caption that says which, how large, and where.

A scene is a function of its number alone and is drawn at any size, so nothing is stored or downloaded. Some pairs of
colour and shape are never trained on: a model that draws them has put together what it only saw apart.
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
from ..base import Splits
from .captions import Captions
from .data import CACHE_BYTES, SCENES, Collection, Frame, View, held_out_count

COLOURS = {
    "red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 70, 225),
    "yellow": (245, 205, 20), "purple": (155, 50, 185), "black": (25, 25, 25),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle")
SIZES = {"small": 0.13, "large": 0.18}
"""Radius of a circle of the same area, as a share of the picture's shorter side."""
JITTER = 0.05
"""By which share a radius is larger or smaller."""
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
COUNTS = (0.4, 0.4, 0.2)
"""Shares of scenes with one, two and three shapes."""
NEVER_TRAINED = frozenset({("red", "triangle"), ("blue", "circle"), ("yellow", "square")})
"""(colour, shape): each colour and each shape is trained on, these pairs are not."""
GAP = 0.1
"""Between shapes, as a share of the shorter side: they stay apart after some blur."""
DIAGONAL = 1.2
"""How many times farther apart two shapes are along the axis of their relation than along the other, at least."""
MARGIN = 0.03
"""Around the picture, as a share of the shorter side."""
TRAINED = 20_000
SIDE = 16
"""Pixels below which shapes cannot be told apart."""
VERSION = 2
"""Of the drawing: changes with it, and the fingerprint too."""


@dataclass(frozen=True)
class Thing:
    """A shape by its words."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"

    @property
    def pair(self) -> tuple[str, str]:
        return self.colour, self.shape


@dataclass(frozen=True)
class Asked:
    """What a caption says. relation: of the first thing to the second, where it says one."""

    things: tuple[Thing, ...]
    relation: str | None = None

    @property
    def unseen(self) -> bool:
        """Whether it asks for a pair that is never trained on."""
        return not NEVER_TRAINED.isdisjoint(thing.pair for thing in self.things)


@dataclass(frozen=True)
class Scene:
    """places: centre (x, y, y downwards) and radius of each thing, as shares of the shorter side."""

    asked: Asked
    places: tuple[tuple[float, float, float], ...]


# ---- scenes by number ----------------------------------------------------------------------------------------------


@lru_cache(maxsize=32768)
def scene(number: int, unseen: bool, aspect: tuple[float, float] = (1.0, 1.0)) -> Scene:
    """unseen: with a pair that is never trained on, else without any. aspect: (height, width) of the picture, the
    shorter side being 1."""
    draw = random.Random(seed_of("scene", number, int(unseen)))
    count = _count(draw)
    while True:
        asked = _asked(draw, unseen, count)
        if places := _places(draw, asked, aspect):
            return Scene(asked, places)


def _pick(draw: random.Random, options: Sequence[str]) -> str:
    """By `random()`, the only method that promises the same numbers in every version of Python."""
    return options[int(draw.random() * len(options))]


def _asked(draw: random.Random, unseen: bool, count: int) -> Asked:
    things: list[Thing] = []
    while len(things) < count:
        thing = Thing(_pick(draw, tuple(SIZES)), _pick(draw, tuple(COLOURS)), _pick(draw, SHAPES))
        if thing.pair not in {other.pair for other in things}:
            things.append(thing)
    found = Asked(tuple(things), _pick(draw, tuple(OPPOSITE)) if count > 1 else None)
    return found if found.unseen == unseen else _asked(draw, unseen, count)


def _count(draw: random.Random) -> int:
    at = draw.random()
    return 1 + (at >= COUNTS[0]) + (at >= COUNTS[0] + COUNTS[1])


def _places(draw: random.Random, asked: Asked, aspect: tuple[float, float]) -> tuple[tuple[float, float, float], ...]:
    """None of them touching, inside the picture, and in the relation; empty when a few attempts found no room."""
    height, width = aspect
    shapes = [(SIZES[thing.size], _REACH[thing.shape]) for thing in asked.things]
    for _ in range(30):
        found: list[tuple[float, float, float]] = []
        for size, reach in shapes:
            radius = size * (1 + JITTER * (2 * draw.random() - 1))
            edge = MARGIN + reach * radius
            found.append(
                (edge + draw.random() * (width - 2 * edge), edge + draw.random() * (height - 2 * edge), radius)
            )
        if asked.relation is not None and not _clearly(found[0], found[1], asked.relation):
            continue
        reaches = [reach * radius for (_, reach), (*_, radius) in zip(shapes, found, strict=True)]
        if all(
            math.dist(a[:2], b[:2]) >= GAP + reaches[i] + reaches[j]
            for i, a in enumerate(found)
            for j, b in enumerate(found[:i])
        ):
            return tuple(found)
    return ()


def _clearly(a: Sequence[float], b: Sequence[float], relation: str) -> bool:
    """In that relation, and not nearly on a diagonal."""
    near, far = sorted((abs(a[0] - b[0]), abs(a[1] - b[1])))
    return related(a, b) == relation and far >= DIAGONAL * near


_TRIANGLE = math.sqrt(4 * math.pi / (3 * math.sqrt(3)))
"""Circumradius of an equilateral triangle over the radius of a circle of its area."""
_REACH = {"circle": 1.0, "square": math.sqrt(math.pi / 2), "triangle": _TRIANGLE}
"""From the centre of gravity to the farthest point, over the radius of a circle of its area."""


def related(a: Sequence[float], b: Sequence[float]) -> str:
    """How (x, y) lies to another: along the axis on which they are farther apart."""
    across, down = a[0] - b[0], a[1] - b[1]
    if abs(across) >= abs(down):
        return "left of" if across < 0 else "right of"
    return "above" if down < 0 else "below"


# ---- captions ------------------------------------------------------------------------------------------------------


def captions(asked: Asked) -> tuple[str, ...]:
    """The plain one first, then other ways to say the same."""
    if len(asked.things) == 1:
        return str(asked.things[0]), f"there is {asked.things[0]}", f"a picture of {asked.things[0]}"
    assert asked.relation is not None
    a, b, *others = asked.things
    said = [f"{a} {asked.relation} {b}", f"{b} {OPPOSITE[asked.relation]} {a}", f"{a} {_long(asked.relation)} {b}"]
    if not others:
        return *said, f"there is {said[0]}"
    return *(f"{pair}, and {others[0]}" for pair in said), f"{others[0]}, and {said[0]}"


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
def parse(caption: str) -> Asked | None:
    """What a caption says, None if it is not about such a scene. The inverse of every one of `captions`."""
    for form in _FORMS:
        if match := form.fullmatch(caption.strip()):
            words = [word.lower() for word in match.groups()]
            relation = next((word for word in words if word in OPPOSITE), None)
            rest = [word for word in words if word not in OPPOSITE]
            things = [Thing(*rest[i : i + 3]) for i in range(0, len(rest), 3)]
            if form is _FORMS[3]:
                things = [*things[1:], things[0]]
            return Asked(tuple(things), relation)
    return None


# ---- drawing -------------------------------------------------------------------------------------------------------


def draw(drawn: Scene, height: int, width: int) -> np.ndarray:
    """(height, width, 3) uint8 on white, with smooth edges: drawn larger, and averaged."""
    factor = max(2, min(8, 256 // min(height, width)))
    unit = min(height, width) * factor
    canvas = Image.new("RGB", (width * factor, height * factor), "white")
    pen = ImageDraw.Draw(canvas)
    for thing, (x, y, radius) in zip(drawn.asked.things, drawn.places, strict=True):
        x, y, r = x * unit, y * unit, radius * unit
        colour = COLOURS[thing.colour]
        if thing.shape == "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
        elif thing.shape == "square":
            half = r * math.sqrt(math.pi) / 2
            pen.rectangle((x - half, y - half, x + half, y + half), fill=colour)
        else:
            r *= _TRIANGLE
            turns = (0, 2 * math.pi / 3, -2 * math.pi / 3)
            corners = [(x + r * math.sin(turn), y - r * math.cos(turn)) for turn in turns]
            pen.polygon(corners, fill=colour)
    return np.asarray(canvas.resize((width, height), Image.Resampling.BOX))


# ---- as data -------------------------------------------------------------------------------------------------------


class _Captions(Captions):
    def __init__(self, scenes: Scenes):
        self.scenes = scenes

    def __getitem__(self, index: int) -> tuple[str, ...]:
        return captions(self.scenes.scene(index).asked)

    def stamp(self, index: int) -> str:
        return ""


class Scenes(Collection):
    """`trained` scenes without a pair that is never trained on; then `held_out` others, the second half with one."""

    labels = None
    class_names = ()

    def __init__(self, frame: Frame, trained: int, held_out: int):
        self.frame, self.trained, self.seen = frame, trained, trained + (held_out + 1) // 2
        self.names = [str(number) for number in range(trained + held_out)]
        self.captions = _Captions(self)
        shorter = min(frame.height, frame.width)
        self.aspect = frame.height / shorter, frame.width / shorter
        self.keep = len(self.names) * 3 * frame.height * frame.width <= CACHE_BYTES
        self.kept: dict[int, Tensor] = {}

    def scene(self, index: int) -> Scene:
        return scene(index, index >= self.seen, self.aspect)

    def picture(self, index: int) -> Tensor:
        pixels = self.kept.get(index)
        if pixels is None:
            drawn = draw(self.scene(index), self.frame.height, self.frame.width)
            pixels = torch.from_numpy(drawn.transpose(2, 0, 1).copy())
            if self.keep:
                self.kept[index] = pixels
        return pixels.float() / 255

    def stamp(self, index: int) -> str:
        return ""


class _View(View):
    @cached_property
    def fingerprint(self) -> str:
        """Of how many there are and how they are drawn; no scene is made for it."""
        assert isinstance(self.collection, Scenes)
        parts = (VERSION, self.collection.frame, self.collection.seen, self.indices)
        return hashlib.sha256(repr(parts).encode()).hexdigest()


def splits(frame: Frame, num_samples: int | None, held_out: float) -> Splits:
    """Scenes to train on, and held-out ones beyond them; ValueError where the pictures cannot show any."""
    if frame.channels != 3 or min(frame.height, frame.width) < SIDE:
        raise ValueError(
            f"data.path: {SCENES!r} are coloured pictures with sides of at least {SIDE}, not {frame.height} x "
            f"{frame.width} with {frame.channels} channels; set modality.channels=3 and a larger modality.size"
        )
    trained = TRAINED if num_samples is None else num_samples
    others = held_out_count(held_out, max(trained, int(held_out) + 1))
    collection = Scenes(frame, trained, others)
    return Splits(_View(collection, range(trained)), _View(collection, range(trained, trained + others)))
