"""Systems of atoms in three dimensions, as one HTML page that needs no network and no library: it can be opened from a
disk, mailed, and put into a report. The page draws on a two-dimensional canvas, so it needs no WebGL either."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path

import numpy as np

from .elements import SYMBOLS

TEMPLATE = Path(__file__).with_name("viewer.html")
DECIMALS = 4
"""Of coordinates in Angstrom."""
SMALLEST = 1.5
"""Angstrom from the centre to the edge of a view, at least."""
FARTHEST = 1e3
"""Angstrom from the centre up to which a system is drawn; nothing is drawn of one that reaches further."""


@dataclass(frozen=True)
class ElementStyle:
    """How atoms of an element are drawn. colour: #rrggbb; radius: in Angstrom."""

    colour: str
    radius: float


@dataclass(frozen=True)
class AtomsView:
    """One system as it is first seen: x to the right, y down, z towards the viewer, in Angstrom.

    types: (n,) atomic numbers. positions: (n, 3). styles: of every element in it. bonds: (atom, atom, order 1 to 3).
    cell: lattice vectors (3, 3), whose parallelepiped is drawn from the origin; None for a free system. formula: what
    it is made of, for the caption.
    """

    types: np.ndarray
    positions: np.ndarray
    styles: dict[int, ElementStyle]
    bonds: Sequence[tuple[int, int, int]] = ()
    cell: np.ndarray | None = None
    formula: str = ""

    @property
    def is_finite(self) -> bool:
        """Whether the system can be drawn."""
        parts = [self.positions] if self.cell is None else [self.positions, self.cell]
        return all(np.isfinite(part).all() and np.abs(part).max(initial=0) < FARTHEST for part in parts)


def page(
    scenes: Sequence[AtomsView], captions: Sequence[str] | None = None, title: str = "", moving: bool = False
) -> str:  # fmt: skip
    """Return the HTML document.

    captions: one text per scene. moving: the scenes are moments of one system, shown one after the other in one view.
    """
    texts = list(captions) if captions is not None else [""] * len(scenes)
    reach = max((_reach(scene) for scene in scenes), default=SMALLEST) if moving else None
    styles: dict[tuple[str, str, float], int] = {}
    plain = [_plain(scene, text, reach, styles) for scene, text in zip(scenes, texts, strict=True)]
    content = {"title": title, "moving": moving, "elements": [list(style) for style in styles], "scenes": plain}
    encoded = json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")  # no end of the script inside it
    return _template().replace("@TITLE@", escape(title or "Systems of atoms")).replace("@CONTENT@", encoded)


@cache
def _template() -> str:
    return TEMPLATE.read_text(encoding="utf-8")


def _plain(
    scene: AtomsView, caption: str, reach: float | None, styles: dict[tuple[str, str, float], int]
) -> dict[str, object]:  # fmt: skip
    """Return a scene as JSON. styles: those met so far and their numbers; those of the scene are added."""
    if not scene.is_finite:
        empty: list[object] = []
        caption = f"{caption} (not finite)".strip()
        return {"types": empty, "positions": empty, "bonds": empty, "lines": empty, "centre": [0, 0, 0], "reach": 1,
                "formula": scene.formula, "caption": caption}  # fmt: skip
    drawn = [(int(z), scene.styles[int(z)]) for z in scene.types]
    kinds = [(SYMBOLS[z], style.colour, style.radius) for z, style in drawn]
    return {
        "types": [styles.setdefault(kind, len(styles)) for kind in kinds],
        "positions": _rounded(scene.positions),
        "bonds": [list(bond) for bond in scene.bonds],
        "lines": [] if scene.cell is None else [[_rounded(a), _rounded(b)] for a, b in _edges(scene.cell)],
        "centre": _rounded(_centre(scene)),
        "reach": round(_reach(scene) if reach is None else reach, 3),
        "formula": scene.formula,
        "caption": caption,
    }


def _rounded(values: np.ndarray) -> list[object]:
    return np.asarray(values, np.float64).round(DECIMALS).tolist()


def _centre(scene: AtomsView) -> np.ndarray:
    """The middle of the cell, or the mean of the atoms."""
    if scene.cell is not None:
        return scene.cell.sum(0) / 2
    return scene.positions.mean(0) if len(scene.positions) else np.zeros(3)


def _reach(scene: AtomsView) -> float:
    """Angstrom from the centre to what is farthest from it, with room for its ball."""
    if not scene.is_finite:
        return SMALLEST
    points = scene.positions if scene.cell is None else np.concatenate([scene.positions, *_edges(scene.cell)])
    return max(SMALLEST, float(np.linalg.norm(points - _centre(scene), axis=1).max(initial=0)) + 0.5)


def _edges(cell: np.ndarray) -> list[np.ndarray]:
    """The twelve edges (2, 3) of the parallelepiped that three vectors span from the origin."""
    corners = [np.array([i >> axis & 1 for axis in range(3)]) @ cell for i in range(8)]
    return [np.stack([corners[i], corners[i ^ bit]]) for i in range(8) for bit in (1, 2, 4) if i < i ^ bit]
