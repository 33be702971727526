"""Arrays of molecules in .npz files of other programs, such as those of MD17: coordinates and atomic numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .systems import FIELDS, Systems, load_arrays

COORDINATES = ("R", "coords", "coordinates", "positions", "pos", "xyz")
"""Names of the coordinates in Angstrom: (T, N, 3) of T frames, or (N, 3) of one."""
NUMBERS = ("z", "Z", "nuclear_charges", "atomic_numbers", "numbers", "charges", "species", "atom_types")
"""Names of the atomic numbers: (N,), or (T, N) with 0 at padding."""
OTHER_UNITS = ("bohr", "a.u", "au", "nm", "nanomet", "pm", "picomet")


def load(path: Path) -> Systems:
    """Read an .npz file of this program, or a plain one of another; ValueError names the file and what is wrong."""
    arrays = load_arrays(path)
    if arrays.keys() >= FIELDS:
        return Systems.of_arrays(arrays, path)
    coordinates = next((arrays[name] for name in COORDINATES if name in arrays), None)
    numbers = next((arrays[name] for name in NUMBERS if name in arrays), None)
    if coordinates is None or numbers is None:
        what = "coordinates" if coordinates is None else "atomic numbers"
        known: tuple[str, ...] = COORDINATES if coordinates is None else NUMBERS
        raise ValueError(
            f"{path}: it has no array of {what} ({', '.join(known)}), but {', '.join(sorted(arrays)) or 'no array'}; "
            "rename it, or convert the file to .xyz"
        )
    unit = str(arrays["r_unit"].reshape(-1)[0]).strip("b'\"").lower() if arrays.get("r_unit", np.zeros(0)).size else ""
    if unit.startswith(OTHER_UNITS):
        raise ValueError(f"{path}: its coordinates are in {unit} (r_unit), not in Angstrom; convert them")
    if coordinates.ndim == 2:
        coordinates = coordinates[None]
    if coordinates.ndim != 3 or coordinates.shape[-1] != 3 or coordinates.dtype.kind not in "iuf":
        raise ValueError(
            f"{path}: coordinates of shape {coordinates.shape} are not (T, N, 3); convert the file to .xyz"
        )
    frames, atoms = coordinates.shape[:2]
    if numbers.dtype.kind not in "iuf" or numbers.shape not in ((atoms,), (frames, atoms)) or _broken(numbers):
        raise ValueError(
            f"{path}: atomic numbers of shape {numbers.shape} and type {numbers.dtype} do not fit {frames} frames of "
            f"{atoms} atoms; give whole numbers (N,) or (T, N)"
        )
    types = np.broadcast_to(numbers, (frames, atoms)).astype(np.int64)
    real = types > 0
    columns = {
        name: values.reshape(frames).astype(np.float64)
        for name, values in arrays.items()
        if values.dtype.kind in "iuf" and values.shape in ((frames,), (frames, 1)) and name not in NUMBERS
    }
    with np.errstate(over="ignore"):  # too large for float32: a coordinate that is not a number
        flat = coordinates[real].astype(np.float32)
    names = tuple(f"{path.stem}:{i + 1}" for i in range(frames))
    return Systems(real.sum(1), np.minimum(types[real], 255).astype(np.uint8), flat, None, names, columns)


def _broken(numbers: np.ndarray) -> bool:
    return bool((numbers != np.round(numbers)).any() or (numbers < 0).any())
