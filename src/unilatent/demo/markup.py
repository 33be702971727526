"""Results as HTML: grids of pictures, pairs, a player of moments, a map. Everything that is a text is escaped here."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from functools import cache
from html import escape
from pathlib import Path

from PIL import Image

from .workbench import Drawing, DrawnMap, Film, Pairs

Address = Callable[[Path], str]
"""Path of a picture -> where the browser finds it, or the picture itself as a data: address."""

PLAYER = Path(__file__).with_name("player.html")
SMALL = 160
"""Pictures with a smaller width or height in pixels are magnified without smoothing."""
COLUMNS = 8
"""Columns of a grid of small pictures, at most."""
SIDE, MARGIN = 1000, 40
"""Side and margin of a map in units of its drawing."""
COLOURS = (
    "#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#eeca3b", "#b279a2", "#ff9da6", "#9d755d", "#79706e",
    "#1f77b4", "#d67195", "#88d27a", "#b79a20", "#439894", "#83bcb6", "#f2cf5b", "#d6a5c9", "#fcbfd2", "#bab0ac",
)  # fmt: skip
TYPES = {".png": "image/png", ".webp": "image/webp"}


def embedded(path: Path) -> str:
    """Return a picture as a data: address."""
    return f"data:{TYPES[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def grid(drawing: Drawing, address: Address, columns: int, chosen: Sequence[int] = ()) -> str:
    """Return samples in rows of `columns`, with places for those that are still to come.

    Each has its number as `data-index`. chosen: numbers of samples that are marked.
    """
    cells = []
    known = list(zip(drawing.pictures, drawing.captions, strict=True))
    for i in range(max(drawing.total, len(known))):
        if i >= len(known):
            cells.append('<div class="cell waiting"></div>')
            continue
        path, caption = known[i]
        marked = " chosen" if i in chosen else ""
        cells.append(
            f'<button type="button" class="cell{marked}" data-index="{i}" title="{_title(i, caption)}">'
            f"{_image(path, caption or f'sample {i}', address)}<span>{escape(caption)}</span></button>"
        )
    width = _columns(drawing.pictures, columns)
    return f'<div class="grid{_kind(drawing.pictures)}" style="--columns: {width}">{"".join(cells)}</div>'


def pairs(made: Pairs, address: Address) -> str:
    """Return originals beside their reconstructions, with the errors under each."""
    items = []
    for i, name in enumerate(made.names):
        items.append(
            f'<figure class="pair"><div>{_image(made.originals[i], f"original: {name}", address)}'
            f"{_image(made.made[i], 'reconstruction', address)}</div>"
            f"<figcaption><b>{escape(name)}</b> · {escape(made.errors[i])}</figcaption></figure>"
        )
    note = f"<p>{escape(made.note)}</p>" if made.note else ""
    head = '<div class="heads"><span>original</span><span>reconstruction</span></div>'
    return f'{note}<div class="pairs{_kind(made.originals)}">{head}{"".join(items)}</div>'


def figures(film: Film, address: Address) -> str:
    """Return pictures side by side with their captions."""
    items = "".join(
        f"<figure>{_image(path, caption, address)}<figcaption>{escape(caption)}</figcaption></figure>"
        for path, caption in zip(film.pictures, film.captions, strict=True)
    )
    return f'<div class="figures{_kind(film.pictures)}">{items}</div>'


def player(film: Film) -> str:
    """Return moments one after the other, with a slider and a button: a document of its own, in a frame."""
    if film.viewer is not None:
        return frame(film.viewer)
    frames = [
        {"source": embedded(path), "caption": caption}
        for path, caption in zip(film.pictures, film.captions, strict=True)
    ]
    content = {"frames": frames, "small": bool(_kind(film.pictures))}
    encoded = json.dumps(content).replace("<", "\\u003c")
    return frame(_player().replace("@CONTENT@", encoded))


def frame(document: str, height: str = "34rem") -> str:
    """Return a document in a frame of its own, which has no rights to the page or to anything outside it."""
    return (
        f'<iframe class="viewer" title="viewer" sandbox="allow-scripts" style="height: {height}" '
        f'srcdoc="{escape(document)}"></iframe>'
    )


def scatter(drawn: DrawnMap, address: Address, pictures: bool = False) -> str:
    """Return a map as an SVG. Its `data-left`, `data-top` and `data-scale` say which place a click is, u units from the
    left and v from the top: x = left + scale u, y = top - scale v. pictures: draw samples instead of points."""
    points = drawn.map.points
    low, high = points.amin(0), points.amax(0)
    middle, reach = (low + high) / 2, max(float((high - low).max()), 1e-6)
    scale = reach / (SIDE - 2 * MARGIN)
    left, top = float(middle[0]) - scale * SIDE / 2, float(middle[1]) + scale * SIDE / 2
    size = 2.2 * SIDE / max(10, len(points)) ** 0.5 * 0.5
    marks = []
    for i, (x, y) in enumerate(points.tolist()):
        across, down = (x - left) / scale, (top - y) / scale
        title = f"<title>{_title(i, drawn.captions[i])}</title>"
        if pictures:
            place = f'x="{across - size / 2:.1f}" y="{down - size / 2:.1f}" width="{size:.1f}" height="{size:.1f}"'
            marks.append(f'<image href="{escape(address(drawn.pictures[i]))}" {place}>{title}</image>')
        else:
            colour = COLOURS[drawn.groups[i] % len(COLOURS)]
            marks.append(f'<circle cx="{across:.1f}" cy="{down:.1f}" r="9" fill="{colour}">{title}</circle>')
    shares = [f"{100 * share:.0f} %" for share in drawn.map.shares.tolist()]
    legend = "".join(
        f'<span><i style="background: {COLOURS[k % len(COLOURS)]}"></i>{escape(name)}</span>'
        for k, name in enumerate(drawn.group_names)
    )
    about = f"{len(points)} samples; across {shares[0]} and up {shares[1]} of the variance of their latents"
    return (
        f'<div class="map{_kind(drawn.pictures)}"><svg viewBox="0 0 {SIDE} {SIDE}" role="img" aria-label="{about}" '
        f'data-left="{left:.9g}" data-top="{top:.9g}" data-scale="{scale:.9g}">'
        f'<rect width="{SIDE}" height="{SIDE}" class="ground"/>{"".join(marks)}</svg>'
        f'<p>{about}. Click anywhere to decode that place.</p><p class="legend">{"" if pictures else legend}</p></div>'
    )


@cache
def _player() -> str:
    return PLAYER.read_text(encoding="utf-8")


def _title(index: int, caption: str) -> str:
    return escape(f"#{index} {caption}".strip())


def _image(path: Path, about: str, address: Address) -> str:
    return f'<img src="{escape(address(path))}" alt="{escape(about)}" loading="lazy">'


def _size(paths: Sequence[Path]) -> tuple[int, int]:
    """Width and height in pixels of the first picture."""
    if not paths:
        return SMALL, SMALL
    with Image.open(paths[0]) as image:
        return image.size


def _kind(paths: Sequence[Path]) -> str:
    """The class of pictures that are magnified without smoothing."""
    return " small" if min(_size(paths)) < SMALL else ""


def _columns(paths: Sequence[Path], wanted: int) -> int:
    """Fewer columns for larger pictures."""
    width, _ = _size(paths)
    return max(2, min(wanted, 2 * COLUMNS if width < 64 else COLUMNS if width < 2 * SMALL else COLUMNS // 2))
