"""Whether a picture of shapes obeys its caption, judged by a program that reads the picture: no network.

Shapes are found as connected pixels of one colour, named by the moments of their area, and held against what the
caption says (`scenes`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...records import Rows
from ...types import decode_texts
from ..base import Evidence, Metric, Row, Space
from .captions import ARGUMENT
from .scenes import COLOURS, SHAPES, SIZES, Asked, Thing, parse, related
from .spaces import colours, levels

MOST = 6
"""Shapes of a picture that are kept: more than any caption asks for."""
SPECK = 0.3
"""A shape below this share of a small one's area is none."""
SOLID = 0.5
"""From this share of its colour on a pixel belongs to a shape."""
FAINT = 0.1
"""Ink up to which a pixel is white."""
LEANING = 0.28
"""Skewness of a column's ink above which a shape is a triangle: 0.57 for an equilateral one, 0 for the others."""
ROUND = -0.3
"""Re E[(x + i y)^4] / E[x^2 + y^2]^2 above which a shape is a circle: 0 for one, -0.6 for a square. Blur that is the
same in all directions leaves the numerator as it is."""
VALUES = 2**22
"""Pixels times colours that are looked at together."""
SHIFTS = 5
"""How many captions of other samples each picture is held against for the chance rate."""
ENOUGH = 0.9
"""Share of captions that must be about scenes."""

LEVEL = np.array([[1 - part / 255 for part in rgb] for rgb in COLOURS.values()], dtype=np.float32)  # (6, 3), on white
BETWEEN = float(np.sqrt(np.prod(list(SIZES.values()))))
"""The radius that parts small from large."""


@dataclass(frozen=True)
class Found:
    """A shape in a picture: what it is, and its centre of gravity (x, y, y downwards)."""

    thing: Thing
    place: tuple[float, float]


def read(pictures: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] to (B, 6, 5) float32: of each shape colour, form, size (indices), x and y, the largest
    first; rows of -1 where there are no more."""
    ink = 1 - levels(pictures).numpy().astype(np.float32) / 255
    step = max(1, VALUES // (len(LEVEL) * ink.shape[2] * ink.shape[3]))
    parts = [_read(ink[i : i + step]) for i in range(0, len(ink), step)]
    return torch.from_numpy(np.concatenate(parts)) if parts else torch.zeros(0, MOST, 5)


def _read(ink: np.ndarray) -> np.ndarray:
    """ink: (B, 3, H, W), 0 on white."""
    from scipy import ndimage

    b, _, height, width = ink.shape
    unit = min(height, width)
    where, y, x = np.nonzero(ink.max(1) > FAINT)  # all others are white
    share, own = _shares(ink[where, :, y, x])  # (M, 6), (M, 6)
    inside = np.zeros((b, len(LEVEL), height, width), dtype=bool)
    inside[where, :, y, x] = own
    across = np.zeros((3, 3, 3, 3), dtype=bool)
    across[1, 1] = True  # neighbours within a picture and a colour
    labels, count = ndimage.label(inside, across)
    found = np.full((b, MOST, 5), -1, dtype=np.float32)
    if not count:
        return found
    labels = ndimage.maximum_filter(labels, size=(1, 1, 3, 3))[where, :, y, x]  # (M, 6), with the soft edge around
    pixel, colour_of = np.nonzero(labels)
    which = labels[pixel, colour_of] - 1
    weight = share[pixel, colour_of].clip(0, 1).astype(np.float64)
    x, y = x[pixel].astype(np.float64), y[pixel].astype(np.float64)

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(which, weight * values, minlength=count)

    area = total(np.ones_like(x)) + 1e-9
    centre_x, centre_y = total(x) / area, total(y) / area
    dx, dy = x - centre_x[which], y - centre_y[which]
    xx, yy = total(dx**2) / area + 1e-9, total(dy**2) / area + 1e-9
    skewness = np.abs(total(dy**3) / area) / yy**1.5
    fourfold = total(dx**4 + dy**4 - 6 * dx**2 * dy**2) / area / (xx + yy) ** 2
    circle, square, triangle = (SHAPES.index(name) for name in ("circle", "square", "triangle"))
    form = np.where(skewness > LEANING, triangle, np.where(fourfold > ROUND, circle, square))
    size = np.where(np.sqrt(area / np.pi) / unit > BETWEEN, _LARGE, _SMALL)
    owner, colour = np.zeros(count, dtype=int), np.zeros(count, dtype=int)
    owner[which], colour[which] = where[pixel], colour_of
    smallest = SPECK * np.pi * (SIZES["small"] * unit) ** 2
    taken: Counter[int] = Counter()
    for i in np.argsort(-area, kind="stable"):
        if area[i] >= smallest and taken[owner[i]] < MOST:
            found[owner[i], taken[owner[i]]] = colour[i], form[i], size[i], centre_x[i] / unit, centre_y[i] / unit
            taken[owner[i]] += 1
    return found


_SMALL, _LARGE = (list(SIZES).index(name) for name in ("small", "large"))


def _shares(ink: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (M, 3) to how much of each colour over white comes nearest to them (M, 6), and where that is more than
    half and no other colour comes nearer."""
    length = np.square(LEVEL).sum(1)
    share = ink @ LEVEL.T / length
    near = share.clip(0, 1)
    away = (near**2 - 2 * near * share) * length  # squared distance, less what all colours have in common
    return share, (away.argmin(1)[:, None] == np.arange(len(LEVEL))) & (share > SOLID)


def shapes(rows: Tensor) -> list[Found]:
    """What `read` keeps of one picture, in words."""
    sizes, names = list(SIZES), list(COLOURS)
    kept = [row for row in rows.tolist() if row[0] >= 0]
    return [Found(Thing(sizes[int(s)], names[int(c)], SHAPES[int(f)]), (x, y)) for c, f, s, x, y in kept]


# ---- verdicts ------------------------------------------------------------------------------------------------------


def verdict(found: Sequence[Found], asked: Asked) -> dict[str, bool]:
    """What is right of a picture.

    count, colours, shapes, sizes: of all that was asked for and of nothing else, whichever is which; objects: colours
    and shapes go together as asked; relation: between the two things meant, along the axis on which they are farther
    apart (only where one was asked for); everything: objects with their sizes, and the relation.
    """
    things, want = [shape.thing for shape in found], asked.things
    right = {
        "count": len(things) == len(want),
        "colours": Counter(t.colour for t in things) == Counter(t.colour for t in want),
        "shapes": Counter(t.shape for t in things) == Counter(t.shape for t in want),
        "sizes": Counter(t.size for t in things) == Counter(t.size for t in want),
        "objects": Counter(t.pair for t in things) == Counter(t.pair for t in want),
    }
    everything = Counter(things) == Counter(want)
    if asked.relation is not None:
        meant = [[shape for shape in found if shape.thing.pair == thing.pair] for thing in want[:2]]
        known = all(len(shapes) == 1 for shapes in meant)
        right["relation"] = known and related(meant[0][0].place, meant[1][0].place) == asked.relation
        everything = everything and right["relation"]
    return {**right, "everything": everything}


class SceneSpace(Space):
    """`scene` (B, 6, 5): the shapes of a picture, as `read` gives them. It stays silent unless the captions of real
    training pictures are about scenes."""

    name = "scene"
    needs = ("pixels",)

    def __init__(self) -> None:
        self.silent = True

    def fit(self, train: Rows) -> None:
        """Looks at the first captions."""
        if ARGUMENT in train and len(train):
            said = [parse(text) is not None for text in decode_texts(train.first(ARGUMENT, 64))]
            self.silent = sum(said) < ENOUGH * len(said)

    def __call__(self, data: Tensor) -> dict[str, Tensor]:
        return {} if self.silent else {"scene": read(colours(data))}


NAMES = {
    "count": "number of shapes", "colours": "colours", "shapes": "shapes", "sizes": "sizes",
    "objects": "colours and shapes together, and their number", "relation": "relation of the first two",
    "everything": "the whole caption",
}  # fmt: skip
GROUPS = {"": "seen pairs", "_unseen": "pairs never trained on"}


class Obedience(Metric):
    """Percent of samples in which what the caption asks for is there, of captions whose pairs of colour and shape were
    trained on and of others; beside it the same pictures held against captions of others ("chance"), and held-out real
    pictures against their own ("held-out real")."""

    space = "scene"
    gives = tuple(f"scene_{what}{group}" for group in GROUPS for what in NAMES)

    def __call__(self, evidence: Evidence) -> list[Row]:
        made, real = _judged(evidence.samples), _judged(evidence.held_out)
        rows = []
        for group, of in GROUPS.items():
            some, originals = ([pair for pair in pairs if pair[1].unseen == bool(group)] for pairs in (made, real))
            if len(some) < 2:
                continue
            values, chance, ceiling = rates(some), _chance(some), rates(originals)
            for what, value in values.items():
                beside = {"chance": chance[what]} if what in chance else {}
                beside |= {"held-out real": ceiling[what]} if what in ceiling else {}
                rows.append(Row(f"scene_{what}{group}", f"{NAMES[what]} right, {of}", value, "%", "higher", beside))
        return rows


Judged = tuple[list[Found], Asked]


def _judged(rows: Rows | None) -> list[Judged]:
    """Pictures with what was asked for, where that can be understood."""
    if rows is None or not len(rows) or ARGUMENT not in rows or "scene" not in rows:
        return []
    asked = map(parse, decode_texts(rows[ARGUMENT]))
    return [(shapes(row), said) for row, said in zip(rows["scene"], asked, strict=True) if said is not None]


def rates(judged: Sequence[Judged]) -> dict[str, float]:
    """Percent right of each kind, over the pictures of which it can be said."""
    verdicts = [verdict(found, asked) for found, asked in judged]
    said = {what: [v[what] for v in verdicts if what in v] for what in NAMES}
    return {what: 100 * sum(right) / len(right) for what, right in said.items() if right}


def _chance(judged: Sequence[Judged]) -> dict[str, float]:
    """Every picture against the captions of its next neighbours."""
    shifts = range(1, min(SHIFTS + 1, len(judged)))
    return rates([(judged[i][0], judged[(i + by) % len(judged)][1]) for by in shifts for i in range(len(judged))])
