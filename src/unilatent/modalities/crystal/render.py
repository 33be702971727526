"""Crystals as .cif and .extxyz files, and as images: the edges of the cell and the atoms in it."""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from ...files import write_text
from .._atoms.elements import SYMBOLS
from .._atoms.systems import System
from .._atoms.viewer import AtomsView, ElementStyle
from .elements import formula
from .lattices import STEPS, cell_matrix

CELL = 192
"""Side in pixels of the image of a crystal."""
SMOOTH = 2
"""Supersampling factor of the drawing."""
LINE = 14
"""Height in pixels of the line with the formula."""
TURNS = (25.0, 12.0)
"""Rotation of the view in degrees: about the vertical axis, then towards the viewer."""
EDGE = 1e-2
"""Atoms within this fractional distance of a face of the cell are also drawn on the opposite face."""
RADIUS = 0.5
"""Radius in Angstrom of a ball in a scene."""
COLOURS = {
    1: "#f0f0f0", 3: "#b070e0", 5: "#f0a0a0", 6: "#505050", 7: "#3050f8", 8: "#e02010", 9: "#80d050", 11: "#a060f0",
    12: "#80c030", 13: "#b0a0a0", 14: "#e0c090", 15: "#f08000", 16: "#e0c030", 17: "#30c030", 19: "#8040c0",
    20: "#50b050", 22: "#b0b8c0", 26: "#d06030", 28: "#50c050", 29: "#c07030", 30: "#7880b0",
}  # fmt: skip
"""Colours of common elements by atomic number; `colour` computes those of the others."""


def to_system(data: dict[str, Tensor], index: int) -> System:
    """Return one crystal of a batch, without padding."""
    types, fractional, lattice = (data[key][index].detach().cpu().numpy() for key in ("types", "fractional", "lattice"))
    return System(types[types > 0].astype(np.uint8), fractional[types > 0].astype(np.float32), lattice)


def write(data: dict[str, Tensor], folder: Path, start: int = 0) -> list[Path]:
    """Write one .cif per crystal, numbered with six digits from `start`, and an .extxyz of the same name.

    Return the .cif files. `data.read_files` returns the same bits.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i in range(len(data["types"])):
        one, path = to_system(data, i), folder / f"{start + i:06d}.cif"
        write_text(path, cif(one))
        write_text(path.with_suffix(".extxyz"), frame(one))
        paths.append(path)
    return paths


def cif(one: System) -> str:
    """Return CIF text without symmetry, with nine significant digits, which float32 needs to be recovered exactly."""
    assert one.lattice is not None
    tags = ("length_a", "length_b", "length_c", "angle_alpha", "angle_beta", "angle_gamma")
    lines = [f"data_{formula(one.types) or 'empty'}", "_symmetry_space_group_name_H-M   'P 1'"]
    lines += [f"_cell_{tag}   {value:.9g}" for tag, value in zip(tags, one.lattice.tolist(), strict=True)]
    lines += ["_symmetry_Int_Tables_number   1", "loop_", " _symmetry_equiv_pos_site_id", " _symmetry_equiv_pos_as_xyz"]
    lines += ["  1  'x, y, z'", "loop_", " _atom_site_type_symbol", " _atom_site_label", " _atom_site_fract_x"]
    lines += [" _atom_site_fract_y", " _atom_site_fract_z", " _atom_site_occupancy"]
    for i, (z, place) in enumerate(zip(one.types.tolist(), one.coordinates.tolist(), strict=True)):
        lines.append(f"  {SYMBOLS[z]}  {SYMBOLS[z]}{i}  " + "  ".join(f"{x:.9g}" for x in place) + "  1")
    return "\n".join(lines) + "\n"


def frame(one: System) -> str:
    """Return extended XYZ text: lattice vectors and Cartesian coordinates in Angstrom."""
    assert one.lattice is not None
    matrix = cell_matrix(one.lattice)
    vectors = " ".join(f"{value:.9g}" for value in matrix.ravel())
    lines = [str(len(one.types)), f'Lattice="{vectors}" Properties=species:S:1:pos:R:3 pbc="T T T"']
    for z, place in zip(one.types.tolist(), (one.coordinates @ matrix).tolist(), strict=True):
        lines.append(f"{SYMBOLS[z]:<2} " + " ".join(f"{x:.9g}" for x in place))
    return "\n".join(lines) + "\n"


# ---- images ------------------------------------------------------------------------------------------------------


def cells(data: dict[str, Tensor]) -> list[Image.Image]:
    """Return an image per crystal: the edges of the cell, atoms coloured by element, and the formula."""
    images = []
    for system in (to_system(data, i) for i in range(len(data["types"]))):
        cell = Image.new("RGB", (CELL, CELL + LINE), "white")
        cell.paste(_image(system), (0, 0))
        ImageDraw.Draw(cell).text((4, CELL), formula(system.types), fill="black")
        images.append(cell)
    return images


def scenes(data: dict[str, Tensor], moving: bool = False) -> list[AtomsView]:
    """Return each crystal as its image shows it: its cell with c upwards, atoms on a face at all its images."""
    found = []
    for system in (to_system(data, i) for i in range(len(data["types"]))):
        assert system.lattice is not None
        with np.errstate(all="ignore"):
            cell = _rotated(cell_matrix(system.lattice))
        types, coordinates = _repeated(system)
        styles = {z: ElementStyle(colour(z), RADIUS) for z in set(types.tolist())}
        found.append(AtomsView(types, coordinates @ cell, styles, (), cell, formula(system.types)))
    return found


def colour(z: int) -> str:
    """Return the colour of an element as #rrggbb."""
    if z in COLOURS:
        return COLOURS[z]
    red, green, blue = colorsys.hsv_to_rgb(z * 0.618034 % 1, 0.45 + 0.1 * (z % 4), 0.85 - 0.1 * (z % 3))
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"


def _image(one: System) -> Image.Image:
    """Draw the cell from back to front; a blank image if the cell is degenerate or not finite."""
    side = CELL * SMOOTH
    image = Image.new("RGB", (side, side), "white")
    assert one.lattice is not None
    with np.errstate(all="ignore"):
        matrix = cell_matrix(one.lattice)
    if not np.isfinite(matrix).all() or not np.isfinite(one.coordinates).all() or not np.abs(matrix).max() > 0:
        return image.resize((CELL, CELL))
    rotated = _rotated(matrix)
    corners = (STEPS[(STEPS >= 0).all(1)] - 0.5) @ rotated  # (8, 3): x to the right, y down, z to the viewer
    types, coordinates = _repeated(one)
    coordinates = (coordinates - 0.5) @ rotated
    reach = np.abs(corners[:, :2]).max()
    scale = side / 2 / (1.25 * reach)
    radius = scale * min(0.7, 0.16 * abs(np.linalg.det(matrix)) ** (1 / 3))
    draw = ImageDraw.Draw(image)
    parts: list[tuple[float, Callable[[], Any]]] = []
    for i, a in enumerate(corners):
        for j in (i ^ 1, i ^ 2, i ^ 4):  # corners whose numbers differ in one bit share an edge
            if i < j:
                ends = [tuple(side / 2 + scale * a[:2]), tuple(side / 2 + scale * corners[j][:2])]
                depth = float(min(a[2], corners[j][2]))
                parts.append((depth, partial(draw.line, ends, fill="#909090", width=SMOOTH)))
    for z, (x, y, depth) in zip(types.tolist(), coordinates, strict=True):
        x, y = side / 2 + scale * x, side / 2 + scale * y
        box = (x - radius, y - radius, x + radius, y + radius)
        parts.append((float(depth), partial(draw.ellipse, box, fill=colour(z), outline="#202020", width=SMOOTH)))
    for _, part in sorted(parts, key=lambda item: item[0]):
        part()
    return image.resize((CELL, CELL), Image.Resampling.BOX)


def _rotated(matrix: np.ndarray) -> np.ndarray:
    """Return lattice vectors (3, 3) in view coordinates: c upwards, seen slightly from the side and from above."""
    about, towards = np.radians(TURNS)
    upright = matrix[:, [1, 2, 0]] * [1, -1, 1]  # y to the right, z up (images count downwards), x to the viewer
    spin = np.array([[np.cos(about), 0, -np.sin(about)], [0, 1, 0], [np.sin(about), 0, np.cos(about)]])
    tilt = np.array([[1, 0, 0], [0, np.cos(towards), -np.sin(towards)], [0, np.sin(towards), np.cos(towards)]])
    return upright @ spin @ tilt


def _repeated(one: System) -> tuple[np.ndarray, np.ndarray]:
    """Return types (m,) and fractional coordinates (m, 3); atoms on the boundary of the cell appear at all images."""
    coordinates = one.coordinates.astype(np.float64)
    types, images = [], []
    for step in STEPS:
        moved = coordinates + step
        inside = ((moved > -EDGE) & (moved < 1 + EDGE)).all(1)
        types.append(one.types[inside])
        images.append(moved[inside])
    return np.concatenate(types), np.concatenate(images)
