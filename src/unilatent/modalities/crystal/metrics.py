"""Metrics of crystals: validity, novelty, distributions, and matching of reconstructions.

Composition validity is a weak test, and random coordinates mostly pass structure validity. Every share therefore comes
with baselines: real held-out crystals and two kinds of noise. What tells a crystal from random coordinates is in
`plausibility`. Stability above the convex hull needs density functional theory and is not measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...maths.geometry import nearest_image
from .._atoms.metrics import type_accuracy, wasserstein
from ..base import Evidence, Metric, Row, Space
from . import matching, plausibility
from .baselines import (
    RANDOM_COORDINATES,
    RANDOM_ELEMENTS,
    REAL,
    Arrays,
    arrays_in,
    has,
    of_key,
    random_coordinates,
    random_elements,
    with_noise,
)
from .lattices import cell_matrix, require
from .validity import CLOSEST, ValidityResult, composition, require_smact, validate

CONTROLS = 2000
"""Largest number of held-out crystals in a baseline of validity."""
MATCHED_CONTROLS = 200
"""Largest number in a baseline of match rates; matching takes about 10 ms each."""
NOVEL_CONTROLS = 1000
"""Largest number in the baseline of novelty."""
OWN_IMAGE = 1.0
"""Distance in Angstrom below which an atom is too close to its own image. Specific to this project: the rules of the
literature do not check it."""
NOISE = 0.1
"""Noise of the baseline of match rates: standard deviation of fractional coordinates, and relative one of lengths."""
NOISY = f"Gaussian noise {NOISE:g} / {NOISE:g}"


def spaces() -> list[Space]:
    return [Structures(), plausibility.Potential()]


def metrics() -> list[Metric]:
    return [
        CrystalValidity(), plausibility.KnownTypeShare(), plausibility.Neighbours(), Novelty(), CrystalDistributions(),
        Matches(), plausibility.PotentialEnergy(),
    ]  # fmt: skip


def arrays_of(data: Any) -> Arrays:
    """Return data as arrays; ValueError if they hold NaN or infinity."""
    fractional, lattice = (data[key].detach().cpu().double() for key in ("fractional", "lattice"))
    finite = fractional.isfinite().flatten(1).all(1) & lattice.isfinite().all(1)
    if not finite.all():
        bad = int((~finite).sum())
        raise ValueError(f"crystals: NaN or infinity in {bad} of {len(finite)}; the model that made them diverged")
    return data["types"].detach().cpu().numpy(), fractional.numpy(), lattice.numpy()


class Structures(Space):
    """The crystals and their validity.

    `types` (B, N) uint8, `fractional` (B, N, 3), `lattice` (B, 6); `constructed`, `struct_valid`, `comp_valid`, `valid`
    (B,) uint8; `own_image` (B,), the distance in Angstrom from an atom to its own image. For reconstructions also
    `match_rms` (B,), NaN where they do not match the original, infinite where the comparison was given up.
    """

    name = "structures"

    def prepare(self, device: torch.device) -> None:
        require()
        require_smact()

    def __call__(self, data: Any) -> dict[str, Tensor]:
        types, fractional, lattice = arrays_of(data)
        result = validate(types, fractional, lattice)
        return {
            "types": torch.from_numpy(types.astype(np.uint8)), "fractional": torch.from_numpy(fractional).float(),
            "lattice": torch.from_numpy(lattice).float(), "constructed": _bits(result.constructed),
            "struct_valid": _bits(result.structure), "comp_valid": _bits(result.composition),
            "valid": _bits(result.valid), "own_image": torch.from_numpy(result.own_image).float(),
        }  # fmt: skip

    def against(self, made: Any, data: Any) -> dict[str, Tensor]:
        return {"match_rms": torch.from_numpy(match(arrays_of(made), arrays_of(data))).float()}


class CrystalValidity(Metric):
    """Shares of generated crystals that are valid."""

    space = "structures"
    gives = ("valid", "struct_valid", "comp_valid", "constructed", "own_image")

    def __call__(self, evidence: Evidence) -> list[Row]:
        samples, held_out = evidence.samples, evidence.held_out
        if not has(samples):
            return []
        assert samples is not None
        baselines = controls(arrays_in(held_out, CONTROLS)) if held_out is not None and has(held_out) else {}
        names = {
            "valid": "structure and composition valid", "struct_valid": f"structure valid (atoms {CLOSEST} A apart)",
            "comp_valid": "composition valid (SMACT, smact14)", "constructed": "cell can be built",
        }  # fmt: skip
        rows = [
            Row(key, name, 100 * float(samples[key].double().mean()), "%", "higher", of_key(baselines, key))
            for key, name in names.items()
        ]
        close = 100 * float((samples["own_image"] < OWN_IMAGE).double().mean())
        name = f"atoms within {OWN_IMAGE:g} A of their own image"
        return [*rows, Row("own_image", name, close, "%", "lower", of_key(baselines, "own_image"))]


class Novelty(Metric):
    """Shares of valid generated crystals that differ from each other, and from the training crystals."""

    space = "structures"
    gives = ("unique", "novel", "valid_unique_novel")

    def __call__(self, evidence: Evidence) -> list[Row]:
        samples, train, held_out = evidence.samples, evidence.train, evidence.held_out
        if not has(samples):
            return []
        assert samples is not None
        known = matching.KnownCrystals(*arrays_in(train)) if train is not None and has(train) else None
        undecided: list[int] = []
        compared = partial(evidence.progress, "crystals compared with each other and with training crystals")
        shares = novelty(arrays_in(samples), samples["valid"].numpy() > 0, known, undecided, compared)
        baselines: dict[str, dict[str, float]] = {}
        if held_out is not None and has(held_out):
            valid = held_out.first("valid", NOVEL_CONTROLS).numpy() > 0
            baselines = {REAL: novelty(arrays_in(held_out, NOVEL_CONTROLS), valid, known)}
        names = {
            "unique": "distinct of the valid",
            "novel": f"distinct of the valid, and not among {evidence.describe_train('crystals')}",
            "valid_unique_novel": "valid, distinct and novel, of all",
        }  # fmt: skip
        if undecided:
            names = {key: f"{name}; {given_up(len(undecided))} as neither" for key, name in names.items()}
        return [
            Row(key, names[key], value, "%", "higher", of_key(baselines, key)) for key, value in shares.items()
        ]  # fmt: skip


class CrystalDistributions(Metric):
    """Wasserstein distances between generated and training crystals: density, number of elements, number of atoms."""

    space = "structures"
    gives = ("density_distance", "elements_distance", "atoms_distance")

    def __call__(self, evidence: Evidence) -> list[Row]:
        samples, train, held_out = evidence.samples, evidence.train, evidence.held_out
        if not has(samples) or not has(train):
            return []
        assert samples is not None and train is not None
        real = quantities(arrays_in(train))
        distances = _distances(quantities(arrays_in(samples), samples["constructed"].numpy() > 0), real)
        baselines = {REAL: _distances(quantities(arrays_in(held_out)), real)} if held_out and has(held_out) else {}
        units = {"density_distance": "g/cm3", "elements_distance": "", "atoms_distance": ""}
        return [
            Row(key, f"Wasserstein distance of {key.partition('_')[0]}", value, units[key], "lower",
                of_key(baselines, key), headline=key == "density_distance")
            for key, value in distances.items()
        ]  # fmt: skip


class Matches(Metric):
    """How well reconstructions of held-out crystals match their originals."""

    space = "structures"
    track = "reconstruction"
    gives = ("match_rate", "match_rate_any", "match_rms", "type_accuracy", "lengths_mae", "angles_mae", "frac_rms")

    def __call__(self, evidence: Evidence) -> list[Row]:
        reconstructions, originals = evidence.reconstructions, evidence.held_out
        if (
            reconstructions is None
            or originals is None
            or not len(reconstructions)
            or "match_rms" not in reconstructions
            or not has(originals)
        ):
            return []
        rms = reconstructions["match_rms"].double()
        matched = rms.isfinite()
        both_valid = matched & (reconstructions["valid"] > 0) & (originals["valid"][: len(reconstructions)] > 0)
        real, valid = arrays_in(originals, MATCHED_CONTROLS), originals.first("valid", MATCHED_CONTROLS).numpy() > 0
        baselines = {
            RANDOM_COORDINATES: match_rates((real[0], random_coordinates(real[1]), real[2]), real, valid),
            NOISY: match_rates(with_noise(real, NOISE, NOISE), real, valid),
        }
        reference = {"originals that are valid": 100 * float(originals["valid"].double().mean())}
        stopped = int(rms.isinf().sum())
        remark = f"; {given_up(stopped)} as no match" if stopped else ""
        rows = [
            Row("match_rate", f"matches its original, both valid{remark}", 100 * float(both_valid.double().mean()), "%",
                "higher", {**reference, **of_key(baselines, "match_rate")}),
            Row("match_rate_any", f"matches its original{remark}", 100 * float(matched.double().mean()), "%", "higher",
                of_key(baselines, "match_rate_any")),
        ]  # fmt: skip
        if matched.any():
            name = "displacement of matches (of the cube root of an atom's volume)"
            rows.append(Row("match_rms", name, float(rms[matched].mean()), "", "lower"))
        measured = (
            ("type_accuracy", "atoms of the right element", "%", "higher"),
            ("lengths_mae", "error of cell lengths", "A", "lower"),
            ("angles_mae", "error of angles", "degrees", "lower"),
            ("frac_rms", "error of fractional coordinates, wrapped, apart from a shift", "", "lower"),
        )  # fmt: skip
        truth = {key: torch.from_numpy(array) for key, array in zip(ARRAYS, real, strict=True)}
        anywhere = {**truth, "fractional": torch.from_numpy(random_coordinates(real[1]))}
        random = {"frac_rms": {"random coordinates": float(np.mean(errors(anywhere, truth)["frac_rms"]))}}
        return rows + [
            Row(key, name, float(reconstructions[key].double().mean()), unit, better, random.get(key, {}))
            for key, name, unit, better in measured
            if key in reconstructions
        ]


# ---- measures ------------------------------------------------------------------------------------------------------


ARRAYS = ("types", "fractional", "lattice")
"""Keys of Data, in the order of `Arrays`."""


def errors(made: Any, data: Any) -> dict[str, list[float]]:
    """Return the errors of each reconstruction, with atoms compared by index.

    `type_accuracy`: percentage of atoms with the right element. `lengths_mae` in Angstrom and `angles_mae` in degrees:
    mean absolute errors of the lattice. `frac_rms`: root mean square over atoms and axes of the difference of
    fractional coordinates to the nearest image, apart from a shift that all atoms share, since an origin is arbitrary.
    """
    atoms = data["types"] > 0  # (B, N)
    count = atoms.sum(1).clamp(min=1)
    difference = made["fractional"].double() - data["fractional"].double()
    turns = torch.polar(atoms.double()[..., None].expand_as(difference), 2 * torch.pi * difference)
    shift = turns.sum(1, keepdim=True).angle() / (2 * torch.pi)  # (B, 1, 3), their mean on the circle
    squares = nearest_image(difference - shift).square().mean(-1)  # (B, N)
    lattice_error = (made["lattice"].double() - data["lattice"].double()).abs()
    return {
        "type_accuracy": type_accuracy(made, data).tolist(), "lengths_mae": lattice_error[:, :3].mean(1).tolist(),
        "angles_mae": lattice_error[:, 3:].mean(1).tolist(),
        "frac_rms": ((squares * atoms).sum(1) / count).sqrt().tolist(),
    }  # fmt: skip


def match(made: Arrays, truth: Arrays) -> np.ndarray:
    """Return `matching.distance` (S,) of each pair.

    NaN where they do not match or a cell cannot be built, infinity where the comparison was given up.
    """
    distances = np.full(len(made[0]), np.nan)
    built = validate(*made).constructed
    for row in np.flatnonzero(built):
        if composition(made[0][row]) == composition(truth[0][row]):
            pair = [matching.structure(*(array[row] for array in side)) for side in (made, truth)]
            try:
                distances[row] = matching.distance(*pair)
            except matching.GaveUpError:
                distances[row] = np.inf
    return distances


def given_up(count: int) -> str:
    """Return how many crystals were given up, for the name of a number; what they count as follows."""
    crystals = "crystal whose comparison" if count == 1 else "crystals whose comparisons"
    return f"{count:,} {crystals} took longer than {matching.SECONDS:g} s counted"


def novelty(
    samples: Arrays, valid: np.ndarray, known: matching.KnownCrystals | None, undecided: list[int] | None = None,
    done: Callable[[int, int], object] = lambda more, total: None,
) -> dict[str, float]:  # fmt: skip
    """Return shares of distinct and novel crystals in percent; {} without a valid sample.

    `unique`: distinct crystals, divided by valid ones. `novel`: distinct crystals that are not known, divided by valid
    ones. `valid_unique_novel`: the same, divided by all samples. The last two need `known`. Only crystals whose
    composition occurs twice or is known are matched; the others are distinct and novel.
    undecided: the rows whose comparison was given up are appended; they count as neither distinct nor novel. done:
    called with how many more crystals are compared, and how many there are to compare.
    """
    rows = np.flatnonzero(valid).tolist()
    if not len(rows):
        return {}
    compositions = {row: composition(samples[0][row]) for row in rows}
    count = Counter(compositions.values())
    ambiguous = [
        row
        for row, its_composition in compositions.items()
        if count[its_composition] > 1 or (known is not None and its_composition in known.rows)
    ]
    undecided = [] if undecided is None else undecided
    structures: dict[int, Any] = {}
    for row in ambiguous:
        try:
            structures[row] = matching.reduced(*(array[row] for array in samples))
        except matching.GaveUpError:
            undecided.append(row)
        done(0, len(ambiguous))
    usable = [row for row, one in structures.items() if one is not None]
    firsts, stopped = matching.distinct([structures[row] for row in usable], [compositions[row] for row in usable])
    undecided += [usable[place] for place in stopped]
    unambiguous = len(rows) - len(ambiguous)
    shares = {"unique": 100 * (unambiguous + len(firsts)) / len(rows)}
    if known is not None:
        novel = unambiguous
        for row in (usable[first] for first in firsts):
            try:
                novel += not known.has(structures[row], compositions[row])
            except matching.GaveUpError:
                undecided.append(row)
            done(1, len(ambiguous))
        shares |= {"novel": 100 * novel / len(rows), "valid_unique_novel": 100 * novel / len(valid)}
    return shares


def controls(real: Arrays) -> dict[str, dict[str, float]]:
    """Return the shares of CrystalValidity in percent for the baselines, by name.

    Real crystals; the same with random coordinates; the same with random elements.
    """
    types, fractional, lattice = real
    coordinates = random_coordinates(fractional)
    return {
        REAL: _shares(validate(types, fractional, lattice)),
        RANDOM_COORDINATES: _shares(validate(types, coordinates, lattice)),
        RANDOM_ELEMENTS: _shares(validate(random_elements(types), fractional, lattice)),
    }


def match_rates(made: Arrays, real: Arrays, valid: np.ndarray) -> dict[str, float]:
    """Return match rates in percent. valid: (S,) bool, which originals are valid."""
    matched = np.isfinite(match(made, real))
    both_valid = matched & validate(*made).valid & valid
    return {"match_rate": 100 * float(both_valid.mean()), "match_rate_any": 100 * float(matched.mean())}


def quantities(crystals: Arrays, chosen: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Return density in g/cm3, number of elements and number of atoms of each crystal. chosen: (S,) bool selection."""
    types, _, lattice = crystals if chosen is None else (array[chosen] for array in crystals)
    volumes = abs(np.linalg.det(cell_matrix(lattice)))
    return {
        "density_distance": _masses()[types].sum(1) / volumes / 0.602214076,
        "elements_distance": np.array([len(np.unique(row[row > 0])) for row in types], np.float64),
        "atoms_distance": (types > 0).sum(1).astype(np.float64),
    }


def _masses() -> np.ndarray:
    from pymatgen.core import Element

    return np.array([0.0] + [float(Element.from_Z(z).atomic_mass) for z in range(1, 100)])


def _distances(generated: dict[str, np.ndarray], real: dict[str, np.ndarray]) -> dict[str, float]:
    return {key: wasserstein(generated[key], real[key]) for key in real if len(generated[key])}


def _shares(result: ValidityResult) -> dict[str, float]:
    shares = {
        "valid": result.valid, "struct_valid": result.structure, "comp_valid": result.composition,
        "constructed": result.constructed, "own_image": result.own_image < OWN_IMAGE,
    }  # fmt: skip
    return {key: 100 * float(share.mean()) for key, share in shares.items()}


def _bits(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.uint8))
