"""Molecules to .xyz and .sdf files and to pictures: the formula where RDKit sees bonds, and balls and sticks."""

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

from ...atoms.elements import SYMBOLS
from ...atoms.systems import System
from ...files import write_text
from . import chemistry
from .chemistry import rdkit

COLOURS = {1: "#e8e8e8", 6: "#505050", 7: "#3050f8", 8: "#e02010", 9: "#60c040", 16: "#e0c030"}
RADII = {1: 0.24, 6: 0.40, 7: 0.40, 8: 0.40, 9: 0.36, 16: 0.50}
"""Angstrom of a ball."""
OTHER_COLOUR, OTHER_RADIUS = "#d060d0", 0.46
CELL = 160
"""Pixels a side of a molecule, and of its formula below."""
SMOOTH = 2
"""Times larger that balls are drawn, to be averaged."""
REACH = 4.5
"""Angstrom from the middle of a cell to its edge, or more where a molecule is larger."""


def to_system(data: dict[str, Tensor], index: int) -> System:
    """One molecule of a batch, without its padding."""
    types, positions = (data[name][index].detach().cpu().numpy() for name in ("types", "positions"))
    return System(types[types > 0].astype(np.uint8), positions[types > 0].astype(np.float32))


def write(data: dict[str, Tensor], folder: Path, start: int = 0) -> list[Path]:
    """One .xyz a molecule, numbered in six digits from `start`, and where RDKit is there an .sdf beside it, with bonds
    where it sees them. Returns the .xyz files; `data.read_files` gives the same atoms back."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i in range(len(data["types"])):
        system = to_system(data, i)
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
    """None without RDKit, of a place that no .sdf can hold, and where RDKit fails."""
    try:
        kit = rdkit()
    except ValueError:
        return None
    if not np.isfinite(system.coordinates).all() or np.abs(system.coordinates).max(initial=0) >= 1e4:
        return None
    mol = _seen(system)
    with kit.quiet():
        for shown in (mol, chemistry.atoms_only(system.types, system.coordinates)):
            if shown is not None:
                with contextlib.suppress(ValueError, RuntimeError):  # what it calls Kekulize and invariant errors
                    return kit.Chem.MolToMolBlock(shown) + "$$$$\n"  # single and double bonds, never aromatic ones
    return None


def _seen(system: System) -> Any | None:
    with rdkit().quiet():
        return chemistry.perceive(system.types, system.coordinates)


# ---- pictures --------------------------------------------------------------------------------------------------------


def cells(data: dict[str, Tensor]) -> list[Image.Image]:
    """A picture of each molecule: balls and sticks, turned to show its widest side, above its structural formula, or
    the bare count of its atoms where RDKit sees no molecule."""
    made = []
    for system in (to_system(data, i) for i in range(len(data["types"]))):
        cell = Image.new("RGB", (CELL, 2 * CELL), "white")
        cell.paste(_balls(system), (0, 0))
        if (formula := _formula(system)) is not None:
            cell.paste(formula, (0, CELL))
        else:
            ImageDraw.Draw(cell).text((CELL // 2, CELL + CELL // 4), counted(system), fill="#909090", anchor="mm")
        made.append(cell)
    return made


def counted(system: System) -> str:
    """How many atoms of each element, carbon and hydrogen first: C2H6O."""
    symbols = Counter(SYMBOLS[number] for number in system.types.tolist())
    order = sorted(symbols, key=lambda symbol: (symbol != "C", symbol != "H", symbol))
    return "".join(f"{symbol}{symbols[symbol] if symbols[symbol] > 1 else ''}" for symbol in order)


def _balls(system: System) -> Image.Image:
    """Seen along the axis of least extent, what is nearest drawn last."""
    side = CELL * SMOOTH
    picture = Image.new("RGB", (side, side), "white")
    places = np.nan_to_num(system.coordinates.astype(np.float64), posinf=0, neginf=0)
    if not len(places):
        return picture.resize((CELL, CELL))
    places = places - places.mean(0)
    places = places @ np.linalg.svd(places, full_matrices=True)[2].T  # widest first, towards the eye last
    scale = side / 2 / max(REACH, float(np.abs(places[:, :2]).max()) + 0.5)
    flat = side / 2 + scale * places[:, :2]  # (n, 2) pixels
    draw = ImageDraw.Draw(picture)
    parts: list[tuple[float, Callable[[], None]]] = []
    types = torch.from_numpy(system.types.astype(np.int64))
    bonds = chemistry.distance_orders(types[None], torch.from_numpy(places)[None])[0].triu().nonzero().tolist()
    for a, b in bonds:
        ends = [tuple(flat[a]), tuple(flat[b])]
        stick = partial(draw.line, ends, fill="#909090", width=round(0.16 * scale))
        parts.append((float(places[[a, b], 2].mean()), stick))
    for number, (x, y), depth in zip(system.types.tolist(), flat, places[:, 2], strict=True):
        radius = RADII.get(number, OTHER_RADIUS) * scale
        box, colour = (x - radius, y - radius, x + radius, y + radius), COLOURS.get(number, OTHER_COLOUR)
        parts.append((float(depth) + 0.01, partial(draw.ellipse, box, fill=colour, outline="#202020", width=SMOOTH)))
    for _, part in sorted(parts, key=lambda item: item[0]):
        part()
    return picture.resize((CELL, CELL), Image.Resampling.BOX)


def _formula(system: System) -> Image.Image | None:
    try:
        kit = rdkit()
    except ValueError:
        return None
    mol = _seen(system)
    if mol is None:
        return None
    with kit.quiet(), contextlib.suppress(ValueError, RuntimeError):
        flat = kit.Chem.RemoveHs(mol, sanitize=False)
        kit.Depictor.Compute2DCoords(flat)
        return kit.Draw.MolToImage(flat, size=(CELL, CELL))
    return None
