"""How good crystals are, by rules that need no download: validity, matching, novelty.

Composition validity is a weak test and random coordinates mostly pass the structural one; therefore every share stands
beside that of real held-out crystals and of two kinds of noise. Nothing here knows an energy: stability above the
convex hull needs density functional theory, and is not measured.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...maths.streams import seed_of
from ...records import Rows
from ..base import Evidence, Metric, Row, Space
from . import matching
from .lattices import cell_matrix, require
from .validity import CLOSEST, Verdict, composition, judge, require_smact

CONTROLS = 2000
"""Held-out crystals, the first, that controls are made of."""
MATCHED_CONTROLS = 200
"""And those that are matched, at some 10 ms each."""
NOVEL_CONTROLS = 1000
OWN_IMAGE = 1.0
"""Angstrom; an atom nearer to its own image is private to this project: the literature's rule does not ask."""
REAL = "held-out real"
RANDOM_PLACES = "random coordinates in true cells"
RANDOM_ELEMENTS = "random elements on true sites"
NOISE = 0.1
"""Deviation of fractional coordinates, and relative one of lengths, of the mildest noise beside match rates."""
NOISY = f"Gaussian noise {NOISE:g} / {NOISE:g}"

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]
"""types (S, N), fractional (S, N, 3), lattice (S, 6)."""


def spaces() -> list[Space]:
    return [Structures()]


def metrics() -> list[Metric]:
    return [Validity(), Novelty(), Distributions(), Matches()]


def arrays_of(data: Any) -> Arrays:
    """Data as arrays; ValueError where they hold NaN or infinity."""
    fractional, lattice = (data[key].detach().cpu().double() for key in ("fractional", "lattice"))
    finite = fractional.isfinite().flatten(1).all(1) & lattice.isfinite().all(1)
    if not finite.all():
        bad = int((~finite).sum())
        raise ValueError(f"crystals: NaN or infinity in {bad} of {len(finite)}; the model that made them diverged")
    return data["types"].detach().cpu().numpy(), fractional.numpy(), lattice.numpy()


class Structures(Space):
    """The crystals themselves, `types` (B, N) uint8, `fractional` (B, N, 3), `lattice` (B, 6), and how they were
    judged: `constructed`, `struct_valid`, `comp_valid`, `valid` (B,) uint8, `own_image` (B,) Angstrom.

    Of reconstructions beside their originals: `match_rms` (B,), NaN where they do not match.
    """

    name = "structures"

    def prepare(self, device: torch.device) -> None:
        require()
        require_smact()

    def __call__(self, data: Any) -> dict[str, Tensor]:
        types, fractional, lattice = arrays_of(data)
        verdict = judge(types, fractional, lattice)
        return {
            "types": torch.from_numpy(types.astype(np.uint8)), "fractional": torch.from_numpy(fractional).float(),
            "lattice": torch.from_numpy(lattice).float(), "constructed": _bits(verdict.constructed),
            "struct_valid": _bits(verdict.structure), "comp_valid": _bits(verdict.composition),
            "valid": _bits(verdict.valid), "own_image": torch.from_numpy(verdict.own).float(),
        }  # fmt: skip

    def against(self, made: Any, data: Any) -> dict[str, Tensor]:
        return {"match_rms": torch.from_numpy(match(arrays_of(made), arrays_of(data))).float()}


class Validity(Metric):
    """Shares of samples that are crystals at all."""

    space = "structures"
    gives = ("valid", "struct_valid", "comp_valid", "constructed", "own_image")

    def __call__(self, evidence: Evidence) -> list[Row]:
        made, held_out = evidence.samples, evidence.held_out
        if not _has(made):
            return []
        assert made is not None
        beside = controls(_arrays(held_out, CONTROLS)) if held_out is not None and _has(held_out) else {}
        names = {
            "valid": "structure and composition valid", "struct_valid": f"structure valid (atoms {CLOSEST} A apart)",
            "comp_valid": "composition valid (SMACT, smact14)", "constructed": "cell can be built",
        }  # fmt: skip
        rows = [
            Row(key, name, 100 * float(made[key].double().mean()), "%", "higher", _column(beside, key))
            for key, name in names.items()
        ]
        close = 100 * float((made["own_image"] < OWN_IMAGE).double().mean())
        name = f"atoms within {OWN_IMAGE:g} A of their own image"
        return [*rows, Row("own_image", name, close, "%", "lower", _column(beside, "own_image"))]


class Novelty(Metric):
    """Valid samples that are different from each other, and from the training crystals."""

    space = "structures"
    gives = ("unique", "novel", "valid_unique_novel")

    def __call__(self, evidence: Evidence) -> list[Row]:
        made, train, held_out = evidence.samples, evidence.train, evidence.held_out
        if not _has(made):
            return []
        assert made is not None
        known = matching.Known(*_arrays(train)) if train is not None and _has(train) else None
        found = novelty(_arrays(made), made["valid"].numpy() > 0, known)
        beside: dict[str, dict[str, float]] = {}
        if held_out is not None and _has(held_out):
            real = held_out.first("valid", NOVEL_CONTROLS).numpy() > 0
            beside = {REAL: novelty(_arrays(held_out, NOVEL_CONTROLS), real, known)}
        names = {
            "unique": "distinct of the valid",
            "novel": f"distinct of the valid, and not among {evidence.looked_at('crystals')}",
            "valid_unique_novel": "valid, distinct and novel, of all",
        }  # fmt: skip
        return [
            Row(key, names[key], value, "%", "higher", _column(beside, key)) for key, value in found.items()
        ]  # fmt: skip


class Distributions(Metric):
    """Wasserstein distances between samples and training crystals: of density, elements and atoms of a crystal."""

    space = "structures"
    gives = ("density_distance", "elements_distance", "atoms_distance")

    def __call__(self, evidence: Evidence) -> list[Row]:
        made, train, held_out = evidence.samples, evidence.train, evidence.held_out
        if not _has(made) or not _has(train):
            return []
        assert made is not None and train is not None
        real = quantities(_arrays(train))
        found = _distances(quantities(_arrays(made), made["constructed"].numpy() > 0), real)
        others = {REAL: _distances(quantities(_arrays(held_out)), real)} if held_out and _has(held_out) else {}
        units = {"density_distance": "g/cm3", "elements_distance": "", "atoms_distance": ""}
        return [
            Row(key, f"Wasserstein distance of {key.partition('_')[0]}", value, units[key], "lower",
                _column(others, key))
            for key, value in found.items()
        ]  # fmt: skip


class Matches(Metric):
    """Held-out crystals through the tokenizer: do they come back."""

    space = "structures"
    track = "reconstruction"
    gives = ("match_rate", "match_rate_any", "match_rms", "type_accuracy", "lengths_mae", "angles_mae", "frac_rms")

    def __call__(self, evidence: Evidence) -> list[Row]:
        made, truth = evidence.reconstructions, evidence.held_out
        if made is None or truth is None or not len(made) or "match_rms" not in made or not _has(truth):
            return []
        rms = made["match_rms"].double()
        matched = rms.isfinite()
        both = matched & (made["valid"] > 0) & (truth["valid"][: len(made)] > 0)
        real, valid = _arrays(truth, MATCHED_CONTROLS), truth.first("valid", MATCHED_CONTROLS).numpy() > 0
        noise = {
            RANDOM_PLACES: match_rates((real[0], random_places(real[1]), real[2]), real, valid),
            NOISY: match_rates(with_noise(real, NOISE, NOISE), real, valid),
        }
        ceiling = {"originals that are valid": 100 * float(truth["valid"].double().mean())}
        rows = [
            Row("match_rate", "matches its original, both valid", 100 * float(both.double().mean()), "%", "higher",
                {**ceiling, **_column(noise, "match_rate")}),
            Row("match_rate_any", "matches its original", 100 * float(matched.double().mean()), "%", "higher",
                _column(noise, "match_rate_any")),
        ]  # fmt: skip
        if matched.any():
            of = "displacement of matches (of the cube root of an atom's volume)"
            rows.append(Row("match_rms", of, float(rms[matched].mean()), "", "lower"))
        measured = (
            ("type_accuracy", "atoms of the right element", "%", "higher"),
            ("lengths_mae", "error of cell lengths", "A", "lower"),
            ("angles_mae", "error of angles", "degrees", "lower"),
            ("frac_rms", "error of fractional coordinates, wrapped", "", "lower"),
        )  # fmt: skip
        random = {"frac_rms": {"random coordinates": 12**-0.5}}
        return rows + [
            Row(key, name, float(made[key].double().mean()), unit, better, random.get(key, {}))
            for key, name, unit, better in measured
            if key in made
        ]


# ---- what they are made of -----------------------------------------------------------------------------------------


def errors(made: Any, data: Any) -> dict[str, list[float]]:
    """How far each crystal is from its original, atom by atom: `type_accuracy` in percent; `lengths_mae` in Angstrom
    and `angles_mae` in degrees, means over three; `frac_rms`, the root mean square over atoms and axes of differences
    of fractional coordinates to the nearest image."""
    atoms = data["types"] > 0  # (B, N)
    count = atoms.sum(1).clamp(min=1)
    right = ((made["types"] == data["types"]) & atoms).sum(1) / count
    apart = made["fractional"].double() - data["fractional"].double()
    squares = (apart - apart.round()).square().mean(-1)  # (B, N)
    off = (made["lattice"].double() - data["lattice"].double()).abs()
    return {
        "type_accuracy": (100 * right.double()).tolist(), "lengths_mae": off[:, :3].mean(1).tolist(),
        "angles_mae": off[:, 3:].mean(1).tolist(), "frac_rms": ((squares * atoms).sum(1) / count).sqrt().tolist(),
    }  # fmt: skip


def match(made: Arrays, truth: Arrays) -> np.ndarray:
    """`matching.distance` of each pair, (S,); NaN where they do not match or a cell cannot be built."""
    found = np.full(len(made[0]), np.nan)
    built = judge(*made).constructed
    for row in np.flatnonzero(built):
        if composition(made[0][row]) == composition(truth[0][row]):
            pair = [matching.structure(*(array[row] for array in side)) for side in (made, truth)]
            found[row] = matching.distance(*pair)
    return found


def novelty(made: Arrays, valid: np.ndarray, known: matching.Known | None) -> dict[str, float]:
    """Percent: `unique`, distinct ones of the valid; `novel`, distinct ones that are not known, of the valid;
    `valid_unique_novel`, the same of all. The last two only where training crystals are known, none without a valid
    one. Only crystals whose composition occurs twice, or is known, are matched: the others are distinct and new."""
    rows = np.flatnonzero(valid)
    if not len(rows):
        return {}
    of = {row: composition(made[0][row]) for row in rows}
    count = Counter(of.values())
    rivalled = [row for row in rows if count[of[row]] > 1 or (known is not None and of[row] in known.rows)]
    structures = {row: matching.reduced(*(array[row] for array in made)) for row in rivalled}
    usable = [row for row in rivalled if structures[row] is not None]
    firsts = matching.groups([structures[row] for row in usable], [of[row] for row in usable])
    alone = len(rows) - len(rivalled)
    found = {"unique": 100 * (alone + len(firsts)) / len(rows)}
    if known is not None:
        new = alone + sum(not known.has(structures[row], of[row]) for row in (usable[first] for first in firsts))
        found |= {"novel": 100 * new / len(rows), "valid_unique_novel": 100 * new / len(valid)}
    return found


def controls(real: Arrays) -> dict[str, dict[str, float]]:
    """Percent of each key of Validity: of real crystals, of atoms thrown at random into their cells, and of elements
    drawn at random in place of theirs."""
    types, fractional, lattice = real
    places = random_places(fractional)
    return {
        REAL: _shares(judge(types, fractional, lattice)),
        RANDOM_PLACES: _shares(judge(types, places, lattice)),
        RANDOM_ELEMENTS: _shares(judge(random_elements(types), fractional, lattice)),
    }


def random_places(fractional: np.ndarray) -> np.ndarray:
    return np.random.default_rng(seed_of("crystal controls", "places")).random(fractional.shape)


def random_elements(types: np.ndarray) -> np.ndarray:
    """Each crystal's elements replaced by as many different ones, of those that occur in any."""
    rng = np.random.default_rng(seed_of("crystal controls", "elements"))
    pool = np.unique(types[types > 0])
    drawn = np.zeros_like(types)
    for row, kinds in enumerate(types):
        own = np.unique(kinds[kinds > 0])
        for old, new in zip(own, rng.choice(pool, len(own), replace=len(pool) < len(own)), strict=True):
            drawn[row][kinds == old] = new
    return drawn


def with_noise(real: Arrays, lengths: float, places: float) -> Arrays:
    """Gaussian noise, always the same: lengths, relative deviation of a, b and c; places, of fractional coordinates."""
    rng = np.random.default_rng(seed_of("crystal controls", "noise"))
    types, fractional, lattice = real
    scale = np.ones_like(lattice)
    scale[:, :3] += lengths * rng.standard_normal((len(lattice), 3))
    return types, (fractional + places * rng.standard_normal(fractional.shape)) % 1, lattice * scale


def match_rates(made: Arrays, real: Arrays, valid: np.ndarray) -> dict[str, float]:
    """In percent, of crystals with their originals; valid: which of these are."""
    matched = np.isfinite(match(made, real))
    both = matched & judge(*made).valid & valid
    return {"match_rate": 100 * float(both.mean()), "match_rate_any": 100 * float(matched.mean())}


def quantities(of: Arrays, chosen: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Density in g/cm3, number of different elements, number of atoms, of each (chosen) crystal."""
    types, _, lattice = of if chosen is None else (array[chosen] for array in of)
    volumes = abs(np.linalg.det(cell_matrix(lattice)))
    return {
        "density_distance": _masses()[types].sum(1) / volumes / 0.602214076,
        "elements_distance": np.array([len(np.unique(kinds[kinds > 0])) for kinds in types], np.float64),
        "atoms_distance": (types > 0).sum(1).astype(np.float64),
    }


def _masses() -> np.ndarray:
    from pymatgen.core import Element

    return np.array([0.0] + [float(Element.from_Z(z).atomic_mass) for z in range(1, 100)])


def _distances(made: dict[str, np.ndarray], real: dict[str, np.ndarray]) -> dict[str, float]:
    return {key: wasserstein(made[key], real[key]) for key in real if len(made[key])}


def wasserstein(some: np.ndarray, others: np.ndarray) -> float:
    """The 1-Wasserstein distance of two samples: the area between their distribution functions."""
    places = np.sort(np.concatenate([some, others]))
    shares = [np.searchsorted(np.sort(of), places[:-1], side="right") / len(of) for of in (some, others)]
    return float((abs(shares[0] - shares[1]) * np.diff(places)).sum())


def _shares(verdict: Verdict) -> dict[str, float]:
    shares = {
        "valid": verdict.valid, "struct_valid": verdict.structure, "comp_valid": verdict.composition,
        "constructed": verdict.constructed, "own_image": verdict.own < OWN_IMAGE,
    }  # fmt: skip
    return {key: 100 * float(share.mean()) for key, share in shares.items()}


def _column(beside: dict[str, dict[str, float]], key: str) -> dict[str, float]:
    return {name: numbers[key] for name, numbers in beside.items() if key in numbers}


def _has(rows: Rows | None) -> bool:
    return rows is not None and len(rows) > 0 and "valid" in rows


def _arrays(rows: Rows | None, limit: int | None = None) -> Arrays:
    assert rows is not None
    count = len(rows) if limit is None else limit
    types, fractional, lattice = (rows.first(key, count).numpy() for key in ("types", "fractional", "lattice"))
    return types, fractional, lattice


def _bits(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.uint8))
