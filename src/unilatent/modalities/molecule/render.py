"""Molecules as .xyz and .sdf files, and as images: balls and sticks above the structural formula."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ...files import write_text
from .._atoms.elements import SYMBOLS
from .._atoms.systems import System
from .._atoms.viewer import AtomsView, ElementStyle
from . import chemistry
from .chemistry import rdkit

COLOURS = {1: "#e8e8e8", 6: "#505050", 7: "#3050f8", 8: "#e02010", 9: "#60c040", 16: "#e0c030"}
RADII = {1: 0.24, 6: 0.40, 7: 0.40, 8: 0.40, 9: 0.36, 16: 0.50}
"""Radius of a ball in Angstrom, by atomic number."""
OTHER_COLOUR, OTHER_RADIUS = "#d060d0", 0.46
CELL = 160
"""Side in pixels of the image of a molecule, and of its formula below."""
SMOOTH = 2
"""Supersampling factor of balls and sticks."""
STRETCH = 1.25
REACH = 4.5
"""Angstrom from the centre of an image to its edge; more for larger molecules."""


def to_system(data: dict[str, Tensor], index: int) -> System:
    """Return one molecule of a batch, without padding."""
    types, positions = (data[name][index].detach().cpu().numpy() for name in ("types", "positions"))
    return System(types[types > 0].astype(np.uint8), positions[types > 0].astype(np.float32))


def _systems(data: dict[str, Tensor]) -> list[System]:
    """Return the molecules of a batch. Their long searches for bonds, if any, are done now, on all cores: `_perceived`
    remembers them."""
    systems = [to_system(data, i) for i in range(len(data["types"]))]
    with contextlib.suppress(ValueError), rdkit().quiet():  # without RDKit nothing is searched
        chemistry.perceptions([(s.types, s.coordinates) for s in systems if np.isfinite(s.coordinates).all()])
    return systems


def write(data: dict[str, Tensor], folder: Path, start: int = 0) -> list[Path]:
    """Write one .xyz per molecule, numbered with six digits from `start`; return these files.

    With RDKit installed it also writes an .sdf of the same name, with the bonds that RDKit finds. `data.read_files`
    returns the same atoms.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i, system in enumerate(_systems(data)):
        path = folder / f"{start + i:06d}.xyz"
        write_text(path, _xyz(system))
        if (block := _sdf(system)) is not None:
            write_text(path.with_suffix(".sdf"), block)
        paths.append(path)
    return paths


def _xyz(system: System) -> str:
    lines = [str(len(system.types)), system.name]
    for number, place in zip(system.types.tolist(), system.coordinates.tolist(), strict=True):
        lines.append(f"{SYMBOLS[number]:<2} " + " ".join(f"{x:14.8f}" for x in place))
    return "\n".join(lines) + "\n"


def _sdf(system: System) -> str | None:
    """Return .sdf text; None without RDKit, if RDKit fails, or if a coordinate does not fit the format."""
    try:
        kit = rdkit()
    except ValueError:
        return None
    if not np.isfinite(system.coordinates).all() or np.abs(system.coordinates).max(initial=0) >= 1e4:
        return None
    with_bonds = _perceived(system)
    with kit.quiet():
        for mol in (with_bonds, chemistry.atoms_only(system.types, system.coordinates)):
            if mol is not None:
                with contextlib.suppress(ValueError, RuntimeError):  # RDKit's Kekulize and invariant errors
                    return kit.Chem.MolToMolBlock(mol) + "$$$$\n"  # single and double bonds, never aromatic ones
    return None


def _perceived(system: System) -> Any | None:
    with rdkit().quiet():
        return chemistry.perceive(system.types, system.coordinates)


# ---- images --------------------------------------------------------------------------------------------------------


def cells(data: dict[str, Tensor]) -> list[Image.Image]:
    """Return an image per molecule: balls and sticks, seen from the widest side, above the structural formula.

    Where RDKit finds no molecule, the number of atoms of each element replaces the structural formula.
    """
    images = []
    for system in _systems(data):
        cell = Image.new("RGB", (CELL, 2 * CELL), "white")
        cell.paste(_balls(system), (0, 0))
        if (formula := _formula(system)) is not None:
            cell.paste(formula, (0, CELL))
        else:
            ImageDraw.Draw(cell).text((CELL // 2, CELL + CELL // 4), sum_formula(system), fill="#909090", anchor="mm")
        images.append(cell)
    return images


def sum_formula(system: System) -> str:
    """Return the number of atoms of each element, carbon and hydrogen first: C2H6O."""
    symbols = Counter(SYMBOLS[number] for number in system.types.tolist())
    order = sorted(symbols, key=lambda symbol: (symbol != "C", symbol != "H", symbol))
    return "".join(f"{symbol}{symbols[symbol] if symbols[symbol] > 1 else ''}" for symbol in order)


def _balls(system: System) -> Image.Image:
    """Draw balls and sticks, viewed along the axis of least extent, from back to front."""
    side = CELL * SMOOTH
    image = Image.new("RGB", (side, side), "white")
    positions = np.nan_to_num(system.coordinates.astype(np.float64), posinf=0, neginf=0)
    if not len(positions):
        return image.resize((CELL, CELL))
    positions = positions - positions.mean(0)
    positions = positions @ _widest_first(positions)
    scale = side / 2 / max(REACH, float(np.abs(positions[:, :2]).max()) + 0.5)
    flat = side / 2 + scale * positions[:, :2]  # (n, 2) pixels
    draw = ImageDraw.Draw(image)
    parts: list[tuple[float, Callable[[], None]]] = []
    for a, b, _ in _bonds(system):
        ends = [tuple(flat[a]), tuple(flat[b])]
        stick = partial(draw.line, ends, fill="#909090", width=round(0.16 * scale))
        parts.append((float(positions[[a, b], 2].mean()), stick))
    for number, (x, y), depth in zip(system.types.tolist(), flat, positions[:, 2], strict=True):
        radius = RADII.get(number, OTHER_RADIUS) * scale
        box, colour = (x - radius, y - radius, x + radius, y + radius), COLOURS.get(number, OTHER_COLOUR)
        parts.append((float(depth) + 0.01, partial(draw.ellipse, box, fill=colour, outline="#202020", width=SMOOTH)))
    for _, part in sorted(parts, key=lambda item: item[0]):
        part()
    return image.resize((CELL, CELL), Image.Resampling.BOX)


def _widest_first(positions: np.ndarray) -> np.ndarray:
    """The rotation (3, 3) of row vectors after which their widest axis comes first, the one of least extent last."""
    axes = np.linalg.svd(positions, full_matrices=True)[2].T
    return axes * [1, 1, np.sign(np.linalg.det(axes))]  # no mirror image


def _bonds(system: System) -> list[tuple[int, int, int]]:
    """Pairs of atoms with their bond orders, by EDM's distance tables. Elements that these lack, such as chlorine, have
    single bonds where two atoms are nearer than STRETCH times the sum of their covalent radii."""
    types, places = (torch.from_numpy(part)[None] for part in (system.types.astype(np.int64), system.coordinates))
    orders = chemistry.distance_orders(types, places)[0]
    known = torch.isin(types[0], torch.tensor(list(chemistry.VALENCES)))
    with contextlib.suppress(ValueError):  # without RDKit, they have none
        table = rdkit().Chem.GetPeriodicTable()
        radii = torch.tensor([table.GetRcovalent(z) for z in system.types.tolist()])
        near = torch.cdist(places[0].float(), places[0].float()) < STRETCH * (radii[:, None] + radii)
        orders = torch.where(known[:, None] & known, orders, near.long())
    return [(a, b, int(orders[a, b])) for a, b in orders.triu(1).nonzero().tolist()]


def scenes(data: dict[str, Tensor], moving: bool = False) -> list[AtomsView]:
    """Return each molecule from its widest side; if they are moments of one (`moving`), from the last one's."""
    found = []
    systems = [to_system(data, i) for i in range(len(data["types"]))]
    views = [_widest_first(np.nan_to_num(one.coordinates - one.coordinates.mean(0))) for one in systems]
    for system, view in zip(systems, views, strict=True):
        numbers = set(system.types.tolist())
        styles = {z: ElementStyle(COLOURS.get(z, OTHER_COLOUR), RADII.get(z, OTHER_RADIUS)) for z in numbers}
        positions = system.coordinates.astype(np.float64) @ (views[-1] if moving else view)
        found.append(AtomsView(system.types, positions, styles, _bonds(system), None, sum_formula(system)))
    return found


def _formula(system: System) -> Image.Image | None:
    try:
        kit = rdkit()
    except ValueError:
        return None
    mol = _perceived(system)
    if mol is None:
        return None
    with kit.quiet(), contextlib.suppress(ValueError, RuntimeError):
        flat = kit.Chem.RemoveHs(mol, sanitize=False)
        kit.Depictor.Compute2DCoords(flat)
        return kit.Draw.MolToImage(flat, size=(CELL, CELL))
    return None
