"""Accuracy of generated scenes: whether an image shows what its caption describes. A program reads the image.

Shapes are detected as connected pixels of one colour, classified by the moments of their area, and compared with the
parsed caption (`scenes`). No network is involved.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...records import Rows
from ...types import decode_texts
from .._media.captions import ARGUMENT
from ..base import Evidence, Metric, Row, Space
from .scenes import COLOURS, SHAPES, SIZES, SceneDescription, SceneObject, parse, related
from .spaces import colours, levels

MAX_SHAPES = 6
"""Largest number of shapes reported per image: more than any caption describes."""
MIN_AREA = 0.3
"""Smallest area of a shape, as a fraction of a small circle's area; smaller components are ignored."""
MIN_SHARE = 0.5
"""Share of a colour over white above which a pixel belongs to a shape."""
BACKGROUND_INK = 0.1
"""Largest ink (1 - value) of a background pixel."""
TRIANGLE_SKEWNESS = 0.28
"""Vertical skewness above which a shape is a triangle: 0.57 for an equilateral triangle, 0 for the other shapes."""
CIRCLE_MOMENT = -0.3
"""Re E[(x + i y)^4] / E[x^2 + y^2]^2 above which a shape is a circle: 0 for a circle, -0.6 for a square. Isotropic blur
does not change the numerator."""
CHUNK_VALUES = 2**22
"""Largest number of pixels times colours that are processed at once."""
CHANCE_SHIFTS = 5
"""Number of other captions that each image is compared with for the chance rate."""
MIN_PARSED = 0.9
"""Smallest fraction of training captions that must describe scenes."""

COLOUR_INK = np.array([[1 - part / 255 for part in rgb] for rgb in COLOURS.values()], dtype=np.float32)  # (6, 3)
RADIUS_THRESHOLD = float(np.sqrt(np.prod(list(SIZES.values()))))
"""Radius that separates small from large shapes."""
_SMALL, _LARGE = (list(SIZES).index(name) for name in ("small", "large"))
_CIRCLE, _SQUARE, _TRIANGLE = (SHAPES.index(name) for name in ("circle", "square", "triangle"))


# ---- detection -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DetectedShape:
    """A shape in an image and its centroid (x, y; y points down)."""

    item: SceneObject
    place: tuple[float, float]


def read(images: Tensor) -> Tensor:
    """Detect the shapes of images (B, 3, H, W) in [0, 1]: (B, 6, 5) float32.

    Per shape: colour, form, size (indices), x and y, in order of decreasing area; rows of -1 after the last one.
    """
    ink = 1 - levels(images).cpu().numpy().astype(np.float32) / 255
    step = max(1, CHUNK_VALUES // (len(COLOUR_INK) * ink.shape[2] * ink.shape[3]))
    chunks = [_read(ink[i : i + step]) for i in range(0, len(ink), step)]
    return torch.from_numpy(np.concatenate(chunks)) if chunks else torch.zeros(0, MAX_SHAPES, 5)


def _read(ink: np.ndarray) -> np.ndarray:
    """`read` for ink (B, 3, H, W), 0 on white."""
    rows = np.full((len(ink), MAX_SHAPES, 5), -1, dtype=np.float32)
    components = _components(ink)
    if components is None:
        return rows
    unit = min(ink.shape[2:])
    image, colour = components.image, components.colour
    area, centre_x, centre_y, skewness, fourfold = _moments(components)
    form = np.where(skewness > TRIANGLE_SKEWNESS, _TRIANGLE, np.where(fourfold > CIRCLE_MOMENT, _CIRCLE, _SQUARE))
    size = np.where(np.sqrt(area / np.pi) / unit > RADIUS_THRESHOLD, _LARGE, _SMALL)
    smallest = MIN_AREA * np.pi * (SIZES["small"] * unit) ** 2
    count: Counter[int] = Counter()
    for i in np.argsort(-area, kind="stable"):
        if area[i] >= smallest and count[image[i]] < MAX_SHAPES:
            rows[image[i], count[image[i]]] = colour[i], form[i], size[i], centre_x[i] / unit, centre_y[i] / unit
            count[image[i]] += 1
    return rows


class _Components(NamedTuple):
    """S connected components of one colour, and their P pixels, including soft edges."""

    image: np.ndarray  # (S,)
    colour: np.ndarray  # (S,)
    component: np.ndarray  # (P,), the component of each pixel
    weight: np.ndarray  # (P,), the share of the component's colour in the pixel
    x: np.ndarray  # (P,)
    y: np.ndarray  # (P,)


def _components(ink: np.ndarray) -> _Components | None:
    """Find the components of ink (B, 3, H, W); None without any."""
    from scipy import ndimage

    b, _, height, width = ink.shape
    where, y, x = np.nonzero(ink.max(1) > BACKGROUND_INK)  # M pixels that are not background
    share, inside = _shares(ink[where, :, y, x])  # (M, 6), (M, 6)
    masks = np.zeros((b, len(COLOUR_INK), height, width), dtype=bool)
    masks[where, :, y, x] = inside
    neighbours = np.zeros((3, 3, 3, 3), dtype=bool)
    neighbours[1, 1] = True  # within an image and a colour
    labels, count = ndimage.label(masks, neighbours)
    if not count:
        return None
    labels = ndimage.maximum_filter(labels, size=(1, 1, 3, 3))[where, :, y, x]  # (M, 6), dilated by the soft edge
    pixel, pixel_colour = np.nonzero(labels)
    component = labels[pixel, pixel_colour] - 1
    image, colour = np.zeros(count, dtype=int), np.zeros(count, dtype=int)
    image[component], colour[component] = where[pixel], pixel_colour
    weight = share[pixel, pixel_colour].clip(0, 1).astype(np.float64)
    return _Components(image, colour, component, weight, x[pixel].astype(np.float64), y[pixel].astype(np.float64))


def _shares(ink: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each colour's share over white that best fits each pixel (M, 3): (M, 6), and whether it is more than
    MIN_SHARE and no other colour fits better: (M, 6)."""
    length = np.square(COLOUR_INK).sum(1)
    share = ink @ COLOUR_INK.T / length
    clipped = share.clip(0, 1)
    distance = (clipped**2 - 2 * clipped * share) * length  # squared, up to a term that is equal for all colours
    return share, (distance.argmin(1)[:, None] == np.arange(len(COLOUR_INK))) & (share > MIN_SHARE)


def _moments(components: _Components) -> tuple[np.ndarray, ...]:
    """Return area, centroid x and y, vertical skewness and fourfold moment (see CIRCLE_MOMENT), each (S,)."""
    component, x, y = components.component, components.x, components.y

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(component, components.weight * values, minlength=len(components.image))

    area = total(np.ones_like(x)) + 1e-9
    centre_x, centre_y = total(x) / area, total(y) / area
    dx, dy = x - centre_x[component], y - centre_y[component]
    xx, yy = total(dx**2) / area + 1e-9, total(dy**2) / area + 1e-9
    skewness = np.abs(total(dy**3) / area) / yy**1.5
    fourfold = total(dx**4 + dy**4 - 6 * dx**2 * dy**2) / area / (xx + yy) ** 2
    return area, centre_x, centre_y, skewness, fourfold


def shapes(rows: Tensor) -> list[DetectedShape]:
    """Convert the rows (6, 5) that `read` returns for one image."""
    sizes, names = list(SIZES), list(COLOURS)
    valid = [row for row in rows.tolist() if row[0] >= 0]
    return [DetectedShape(SceneObject(sizes[int(s)], names[int(c)], SHAPES[int(f)]), (x, y)) for c, f, s, x, y in valid]


class SceneSpace(Space):
    """`scene` (B, 6, 5): the shapes of an image, as returned by `read`.

    Has output only if the captions of real training images describe scenes.
    """

    name = "scene"
    needs = ("pixels",)

    def __init__(self) -> None:
        self.silent = True

    def fit(self, train: Rows) -> None:
        """Parse the first 64 captions."""
        if ARGUMENT in train and len(train):
            parsed = [parse(text) is not None for text in decode_texts(train.first(ARGUMENT, 64))]
            self.silent = sum(parsed) < MIN_PARSED * len(parsed)

    def __call__(self, data: Tensor) -> dict[str, Tensor]:
        return {} if self.silent else {"scene": read(colours(data))}


# ---- metric --------------------------------------------------------------------------------------------------------

NAMES = {
    "count": "number of shapes", "colours": "colours", "shapes": "shapes", "sizes": "sizes",
    "objects": "colours and shapes together, and their number", "relation": "relation of the first two",
    "everything": "the whole caption",
}  # fmt: skip
RELATION = ("relation",)
"""What only captions of several objects say."""
ALWAYS = tuple(name for name in NAMES if name not in RELATION)
GROUPS = {"": "seen pairs", "_unseen": "pairs never trained on"}

Pair = tuple[list[DetectedShape], SceneDescription]
"""The shapes of an image and its parsed caption."""


def verdict(detected: Sequence[DetectedShape], description: SceneDescription) -> dict[str, bool]:
    """Return which properties of an image agree with its caption.

    count, colours, shapes, sizes: as multisets over all shapes; objects: the (colour, shape) pairs; relation: of the
    first two objects, along the axis on which they are farther apart (absent for a single object); everything: objects
    with their sizes, and the relation.
    """
    objects, expected = [shape.item for shape in detected], description.objects
    correct = {
        "count": len(objects) == len(expected),
        "colours": Counter(o.colour for o in objects) == Counter(o.colour for o in expected),
        "shapes": Counter(o.shape for o in objects) == Counter(o.shape for o in expected),
        "sizes": Counter(o.size for o in objects) == Counter(o.size for o in expected),
        "objects": Counter(o.pair for o in objects) == Counter(o.pair for o in expected),
    }
    everything = Counter(objects) == Counter(expected)
    if description.relation is not None:
        matches = [[shape for shape in detected if shape.item.pair == o.pair] for o in expected[:2]]
        unique = all(len(candidates) == 1 for candidates in matches)
        correct["relation"] = unique and related(matches[0][0].place, matches[1][0].place) == description.relation
        everything = everything and correct["relation"]
    return {**correct, "everything": everything}


class SceneAccuracy(Metric):
    """Percent of samples that agree with their captions in some properties (`NAMES`), of the captions of one group.

    group: of `GROUPS`: captions whose pairs of colour and shape were trained on, or that have one that was not.
    Baselines: the same images with captions of other samples ("chance"), and held-out real images with their own
    ("held-out real").
    """

    space = "scene"

    def __init__(self, group: str, names: Sequence[str]):
        self.group, self.names = group, names
        self.gives = tuple(f"scene_{what}{group}" for what in names)

    def used(self, evidence: Evidence) -> tuple[int, int]:
        """The samples that have the properties, which are fewer than all."""
        captions = [caption for _, caption in self._of_group(evidence.samples)]
        if self.names == RELATION:
            captions = [caption for caption in captions if caption.relation is not None]
        return len(captions), super().used(evidence)[1]

    def __call__(self, evidence: Evidence) -> list[Row]:
        samples = self._of_group(evidence.samples)
        if len(samples) < 2:
            return []
        values, chance, reference = rates(samples), _chance(samples), rates(self._of_group(evidence.held_out))
        rows = []
        for what in (what for what in self.names if what in values):
            baselines = {"chance": chance[what]} if what in chance else {}
            baselines |= {"held-out real": reference[what]} if what in reference else {}
            name = f"{NAMES[what]} right, {GROUPS[self.group]}"
            rows.append(Row(f"scene_{what}{self.group}", name, values[what], "%", "higher", baselines))
        return rows

    def _of_group(self, rows: Rows | None) -> list[Pair]:
        return [pair for pair in _pairs(rows) if pair[1].unseen == bool(self.group)]


def scene_accuracies() -> list[SceneAccuracy]:
    """Return the metrics of scenes: one for each group of captions and number of samples that it is computed from."""
    return [SceneAccuracy(group, names) for group in GROUPS for names in (ALWAYS, RELATION)]


def _pairs(rows: Rows | None) -> list[Pair]:
    """Return the shapes and parsed captions of all images whose caption can be parsed."""
    if rows is None or not len(rows) or ARGUMENT not in rows or "scene" not in rows:
        return []
    parsed = map(parse, decode_texts(rows[ARGUMENT]))
    return [(shapes(row), caption) for row, caption in zip(rows["scene"], parsed, strict=True) if caption is not None]


def rates(pairs: Sequence[Pair]) -> dict[str, float]:
    """Return the percentage of images that are correct in each property, of those that have the property."""
    verdicts = [verdict(detected, description) for detected, description in pairs]
    correct = {what: [v[what] for v in verdicts if what in v] for what in NAMES}
    return {what: 100 * sum(values) / len(values) for what, values in correct.items() if values}


def _chance(pairs: Sequence[Pair]) -> dict[str, float]:
    """Return `rates` of each image with the captions of the next CHANCE_SHIFTS samples."""
    shifts = range(1, min(CHANCE_SHIFTS + 1, len(pairs)))
    return rates([(pairs[i][0], pairs[(i + by) % len(pairs)][1]) for by in shifts for i in range(len(pairs))])
