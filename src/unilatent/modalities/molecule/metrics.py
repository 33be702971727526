"""Metrics of molecules: validity by several protocols, distributions, and reconstruction.

Every number for generated molecules comes with baselines: the same number for held-out real molecules, and for these
with Gaussian noise of 0.05 and 1 Angstrom on every coordinate. A metric on which the noised molecules score well says
little.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...maths.geometry import rmsd as root_mean_square
from ...maths.geometry import superpose
from ...maths.streams import generator
from ...plain_text import count_of
from ...progress import Progress, no_progress
from ...records import MemoryRows, Rows
from .._atoms.metrics import type_accuracy, wasserstein
from ..base import Evidence, Metric, Row, Space
from . import chemistry

CLOSE = 0.1
"""Largest error in Angstrom of an atom in a close reconstruction."""
NOISES = (0.05, 1.0)
"""Standard deviations in Angstrom of the noise on coordinates in the noise baselines."""
CONTROLS = 1000
"""Largest number of real molecules in a noise baseline."""
MATCHED = 200
"""Largest number of real molecules in a baseline of the match rate."""
BUSTED = 500
"""Number of samples whose energy PoseBusters checks; the first ones."""
BUSTED_CONTROLS = 50
"""Largest number of molecules in a baseline of PoseBusters."""
NEAREST, OTHERS = 500, 200
"""Most molecules whose nearest training molecule is looked for, and most training molecules that each is compared with,
spread evenly: a few seconds."""
FEWEST_BONDS = 50
"""Smallest number of bonds between two elements in real molecules for a comparison of their lengths."""
TABLES = 4
"""A further value of `chemistry.Perception.judged`: an element is not in EDM's tables."""
REASONS = {
    chemistry.GAVE_UP: "whose search for bond orders was given up",
    chemistry.CHARGES: "whose charges RDKit does not place so that they add up to 0",
    chemistry.BONDS: "with an element that has more bonds than RDKit's tables allow",
    TABLES: "with an element that has no table",
}
"""Why a protocol does not judge a molecule, for messages."""
LONG = "long searches for bonds"
"""What progress shows of them."""
MEASURED: dict[str, Callable[[Any], float]] = {
    "heavy_atoms": chemistry.heavy_atoms, "logp": chemistry.logp, "tpsa": chemistry.tpsa,
}  # fmt: skip
"""Numbers of a molecule that `Perceived` stores, besides its rings."""


# ---- what is stored of each molecule ---------------------------------------------------------------------------------


class Atoms(Space):
    """The atoms: `types` (B, N) uint8 and `positions` (B, N, 3) float32."""

    name = "atoms"

    def __call__(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        positions = data["positions"].detach().float().cpu()
        if not positions.isfinite().all():
            raise ValueError("positions: NaN or infinity; the model that made them diverged")
        return {"types": data["types"].cpu().to(torch.uint8), "positions": positions}


class DistanceTables(Space):
    """Bonds by EDM's distance tables.

    `edm_atoms`, `edm_stable_atoms` (B,): numbers of atoms. `edm_stable`, `edm_valid` (B,): 0 or 1. `edm_graph` (B,): a
    hash of the molecule, 0 if it is not valid.
    """

    name = "edm"
    needs = ("atoms",)

    def prepare(self, device: torch.device) -> None:
        chemistry.rdkit()

    def __call__(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        stability = chemistry.stability(data["types"], data["positions"])
        real = data["types"].cpu() > 0
        orders = stability.orders.numpy()
        graphs = []
        with chemistry.rdkit().quiet():
            for i, (types, _) in enumerate(chemistry.each(data["types"], data["positions"])):
                at = real[i].numpy()
                graphs.append(chemistry.key(chemistry.graph_smiles(types, orders[i][at][:, at])))
        keys = torch.tensor(graphs, dtype=torch.int64)
        return {
            "edm_atoms": real.sum(1), "edm_stable_atoms": (stability.stable & real).sum(1),
            "edm_stable": stability.molecules.to(torch.uint8),
            "edm_valid": (keys != 0).to(torch.uint8), "edm_graph": keys,
        }  # fmt: skip


class Perceived(Space):
    """Bonds by RDKit.

    `rdkit_valid`, `rdkit_connected` (B,): 0 or 1. `rdkit_graph` (B,): a hash of the molecule without stereochemistry, 0
    if it is not valid. `rdkit_rings` (B,): number of rings; if it is not valid, -1, or -1 - `Perception.judged` if the
    protocol does not judge it. `rdkit_heavy_atoms`, `rdkit_logp`, `rdkit_tpsa` (B,) float32: as in `PROPERTIES`, NaN if
    it is not valid or has several fragments.
    """

    name = "rdkit"
    needs = ("atoms",)

    def prepare(self, device: torch.device) -> None:
        chemistry.rdkit()

    def __call__(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        rows: list[tuple[int, ...]] = []
        numbers: list[list[float]] = []
        with chemistry.rdkit().quiet():
            for found in chemistry.perceptions(_molecules(data), lambda more: self.progress(LONG, more, 0)):
                mol, connected = found.mol, False
                if mol is None:
                    rows.append((0, 0, 0, -1 - found.judged))
                else:
                    connected = chemistry.fragments(mol) == 1
                    graph = chemistry.key(chemistry.plain_smiles(mol))
                    rows.append((1, int(connected), graph, chemistry.rings(mol)))
                measured = [float(measure(mol)) if connected else float("nan") for measure in MEASURED.values()]
                numbers.append(measured)
        table = torch.tensor(numbers, dtype=torch.float32).reshape(-1, len(MEASURED))
        properties = {f"rdkit_{name}": table[:, i] for i, name in enumerate(MEASURED)}
        return _columns("rdkit", ("valid", "connected", "graph", "rings"), rows) | properties


class Babel(Space):
    """Bonds by Open Babel, the protocol of ADiT and UNITE.

    `openbabel_valid`, `openbabel_connected` (B,): 0 or 1. `openbabel_graph` (B,): a hash of the largest fragment.
    By default it is left out if the package is missing.
    """

    name = "openbabel"
    needs = ("atoms",)
    on_request: ClassVar[bool] = find_spec("openbabel") is None

    def prepare(self, device: torch.device) -> None:
        chemistry.rdkit()
        chemistry.openbabel()

    def __call__(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        rows = []
        with chemistry.rdkit().quiet():
            for types, positions in chemistry.each(data["types"], data["positions"]):
                mol = chemistry.babel_perceive(types, positions) if len(types) else None
                smiles = None if mol is None else chemistry.fragment_smiles(mol)
                connected = smiles is not None and chemistry.fragments(mol) == 1
                rows.append((int(smiles is not None), int(connected), chemistry.key(smiles)))
        return _columns("openbabel", ("valid", "connected", "graph"), rows)


class Busters(Space):
    """Stores nothing: PoseBusters reads the atoms, which are stored anyway. Slow, so it runs only on request."""

    name = "posebusters"
    needs = ("atoms",)
    on_request = True

    def prepare(self, device: torch.device) -> None:
        chemistry.rdkit()
        chemistry.posebusters()

    def __call__(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        return {}


class Matched(Space):
    """`match_rmsd` (B,): RMSD in Angstrom between reconstruction and original, infinite if their InChIs differ.

    It takes 2 ms per molecule. By default it is left out if Open Babel or pymatgen is missing.
    """

    name = "match"
    needs = ("atoms",)
    on_request: ClassVar[bool] = any(find_spec(package) is None for package in ("openbabel", "pymatgen"))
    compares = True

    def prepare(self, device: torch.device) -> None:
        chemistry.matcher()

    def __call__(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        return {}

    def against(self, made: dict[str, Tensor], data: dict[str, Tensor]) -> dict[str, Tensor]:
        pairs = zip(_molecules(made), _molecules(data), strict=True)
        return {"match_rmsd": torch.tensor([chemistry.match(a, b) for a, b in pairs], dtype=torch.float32)}


def _columns(prefix: str, names: tuple[str, ...], rows: Sequence[tuple[int, ...]]) -> dict[str, Tensor]:
    table = torch.tensor(rows, dtype=torch.int64).reshape(-1, len(names))
    kinds = {name: torch.int64 if name == "graph" else torch.int8 for name in names}
    return {f"{prefix}_{name}": table[:, i].to(kinds[name]) for i, name in enumerate(names)}


def _molecules(data: dict[str, Tensor]) -> list[Any]:
    return list(chemistry.each(data["types"], data["positions"]))


# ---- baselines -------------------------------------------------------------------------------------------------------


def with_noise(data: dict[str, Tensor], sigma: float) -> dict[str, Tensor]:
    """Add N(0, sigma^2) in Angstrom to every coordinate. The noise is the same in every call."""
    noise = torch.randn(data["positions"].shape, generator=generator("control", str(sigma)))
    moved = data["positions"].float() + sigma * noise
    return {**data, "positions": moved * (data["types"] > 0)[..., None]}


def noised(data: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the molecules with each noise of NOISES, by the name of the baseline."""
    return {f"noise {sigma:g} A": with_noise(data, sigma) for sigma in NOISES}


def first_molecules(rows: Rows, most: int) -> dict[str, Tensor]:
    """Return the first molecules of stored rows, as Data."""
    return {"types": rows.first("types", most).long(), "positions": rows.first("positions", most)}


def controls(evidence: Evidence, space: Space, like: Rows) -> dict[str, Rows]:
    """Return the rows of a space for the baselines, by name: held-out real molecules, and noised ones.

    like: rows of the samples. A baseline has at most as many molecules. Without held-out molecules, noise is added to
    training molecules.
    """
    baselines: dict[str, Rows] = {}
    real, names = evidence.held_out, _needed(space, like)
    if real is not None and len(real) and all(name in real for name in names):
        baselines["held-out real"] = MemoryRows({name: real.first(name, len(like)) for name in names})
    real = real if real is not None and len(real) else evidence.train
    if real is not None and "positions" in real:
        noised_sets = noised(first_molecules(real, min(CONTROLS, len(like))))
        baselines |= {name: MemoryRows({**Atoms()(noisy), **space(noisy)}) for name, noisy in noised_sets.items()}
    return baselines


def baseline_values(value: Callable[[Rows], float], baselines: dict[str, Rows]) -> dict[str, float]:
    """Return a number for each baseline."""
    return {name: value(rows) for name, rows in baselines.items()}


def _needed(space: Space, like: Rows) -> list[str]:
    return [name for name in like.names if name.startswith(space.name) or name in ("types", "positions")]


# ---- generation ------------------------------------------------------------------------------------------------------


HEADLINES = ("mol_stable", "valid_connected", "novel", "valid_unique")
"""Shares that the short table has."""


class MoleculeValidity(Metric):
    """Shares of generated molecules that are valid, connected, distinct and novel, by one protocol.

    unique: distinct molecules, divided by valid ones. novel: distinct molecules that equal none of the training
    molecules compared, divided by valid ones. valid_unique: distinct molecules, divided by all samples; EDM's
    successors report this number as "unique". not_judged: molecules that the protocol counts as invalid although it
    cannot judge them.
    """

    def __init__(self, space: Space, title: str):
        self.view, self.space, self.title = space, space.name, title
        names = ["valid", "valid_connected", "unique", "novel", "valid_unique"]
        if isinstance(space, DistanceTables):
            names = ["atom_stable", "mol_stable", "valid", "unique", "novel", "valid_unique"]
        if not isinstance(space, Babel):
            names.append("not_judged")
        self.names = names
        self.gives = tuple(self._key(name) for name in names)

    def _key(self, name: str) -> str:
        return name if name.endswith("_stable") else f"{name}_{self.space}"

    def __call__(self, evidence: Evidence) -> list[Row]:
        samples, prefix = evidence.samples, f"{self.space}_"
        if samples is None or not len(samples) or f"{prefix}valid" not in samples:
            return []
        train = evidence.train
        known = None if train is None or f"{prefix}graph" not in train else train[f"{prefix}graph"].unique()
        titles = {
            "atom_stable": "atoms with a right valence",
            "mol_stable": "molecules whose atoms all have one",
            "valid": "valid",
            "valid_connected": "valid and in one piece", "unique": "distinct of the valid",
            "novel": f"distinct of the valid, and not among {evidence.describe_train('molecules')}",
            "valid_unique": "distinct of all", "not_judged": f"not judged by this protocol{self._reasons(samples)}",
        }  # fmt: skip
        rows, baselines = [], controls(evidence, self.view, samples)
        for name in self.names:
            if name == "novel" and known is None:
                continue
            value = self.share(name, known)
            title = f"{titles[name]} ({self.title})"
            better = "same" if name == "not_judged" else "higher"
            number, beside = value(samples), baseline_values(value, baselines)
            headline = name in HEADLINES or (name == "not_judged" and number > 0)
            rows.append(Row(self._key(name), title, number, "%", better, beside, headline=headline))
        return rows

    def _reasons(self, samples: Rows) -> str:
        """Return why samples are not judged, with their numbers; empty if all are."""
        counts = {words: int((self._unjudged(samples) == code).sum()) for code, words in REASONS.items()}
        found = [f"{count} {words}" for words, count in counts.items() if count]
        return f": {', '.join(found)}, all counted as not valid" if found else ""

    def _unjudged(self, rows: Rows) -> Tensor:
        """(B,) why a molecule is not judged, one of REASONS; 0 if it is."""
        if isinstance(self.view, Perceived):
            return (-1 - rows["rdkit_rings"].long()).clamp(min=0)
        known = torch.tensor([0, *chemistry.VALENCES])
        return TABLES * (~torch.isin(rows["types"].long(), known)).any(1).long()

    def share(self, name: str, known: Tensor | None = None) -> Callable[[Rows], float]:
        """Return a function from rows of the space to a share in percent. known: graphs that are not novel."""
        prefix = f"{self.space}_"

        def value(rows: Rows) -> float:
            if name == "atom_stable":
                return _percent(rows["edm_stable_atoms"].sum(), rows["edm_atoms"].sum())
            if name == "mol_stable":
                return _percent(rows["edm_stable"].sum(), len(rows))
            if name == "not_judged":
                return _percent((self._unjudged(rows) > 0).sum(), len(rows))
            valid = rows[f"{prefix}valid"].bool()
            if name == "valid":
                return _percent(valid.sum(), len(rows))
            if name == "valid_connected":
                return _percent((valid & rows[f"{prefix}connected"].bool()).sum(), len(rows))
            graphs = rows[f"{prefix}graph"][valid].unique()
            if name == "novel" and known is not None:
                graphs = graphs[~torch.isin(graphs, known)]
            return _percent(len(graphs), len(rows) if name == "valid_unique" else valid.sum())

        return value


def _percent(part: Tensor | float, whole: Tensor | float) -> float:
    return 100 * float(part) / float(whole) if float(whole) else 0.0


class MoleculeDistributions(Metric):
    """Distances between the distributions of generated and training molecules.

    Wasserstein-1 distances of the numbers of atoms and rings and of bond lengths; total variation distance of the
    shares of elements.
    """

    space = "rdkit"
    gives = ("atoms_w1", "elements_tv", "bond_lengths_w1", "rings_w1")

    def __call__(self, evidence: Evidence) -> list[Row]:
        train, samples = evidence.train, evidence.samples
        if train is None or samples is None or not len(samples) or "types" not in samples or "types" not in train:
            return []
        reference = MemoryRows(
            {name: train.first(name, 10 * CONTROLS) for name in ("types", "positions", "rdkit_rings")}
        )
        real = {key: measure(reference) for key, measure in MEASURES.items()}
        titles = {
            "atoms_w1": ("number of atoms, W1 to training", "atoms"),
            "elements_tv": ("shares of elements, total variation to training", ""),
            "bond_lengths_w1": ("bond lengths, W1 to training, mean over pairs of elements", "A"),
            "rings_w1": ("rings of valid molecules, W1 to training", "rings"),
        }
        rows, baselines = [], controls(evidence, Perceived(), samples)
        for key, (title, unit) in titles.items():

            def value(rows: Rows, key: str = key) -> float:
                return DISTANCES[key](MEASURES[key](rows), real[key])

            beside = baseline_values(value, baselines)
            rows.append(Row(key, title, value(samples), unit, "lower", beside, headline=key == "bond_lengths_w1"))
        return rows


def _bond_lengths(rows: Rows) -> dict[int, Tensor]:
    """Return 100 a + b -> lengths in Angstrom of all bonds between elements a <= b, by EDM's tables."""
    lengths_of: dict[int, list[Tensor]] = {}
    for types, positions in zip(rows["types"].long().split(512), rows["positions"].split(512), strict=True):
        bonded = chemistry.distance_orders(types, positions).triu() > 0
        i, a, b = bonded.nonzero(as_tuple=True)
        lengths = (positions[i, a] - positions[i, b]).norm(dim=-1)
        pairs = torch.minimum(types[i, a], types[i, b]) * 100 + torch.maximum(types[i, a], types[i, b])
        for pair in pairs.unique().tolist():
            lengths_of.setdefault(pair, []).append(lengths[pairs == pair])
    return {pair: torch.cat(parts) for pair, parts in lengths_of.items()}


def _bond_distance(generated: dict[int, Tensor], real: dict[int, Tensor]) -> float:
    """Return the mean distance over pairs of elements with FEWEST_BONDS real bonds and any generated one.

    Infinity if there is no such pair.
    """
    shared = [pair for pair, lengths in real.items() if len(lengths) >= FEWEST_BONDS and pair in generated]
    return sum(wasserstein(generated[p], real[p]) for p in shared) / len(shared) if shared else float("inf")


def _element_shares(rows: Rows) -> Tensor:
    counts = torch.bincount(rows["types"].flatten().long(), minlength=100)[:100].double()
    counts[0] = 0
    return counts / counts.sum().clamp(min=1)


MEASURES: dict[str, Callable[[Rows], Any]] = {
    "atoms_w1": lambda rows: (rows["types"] > 0).sum(1),
    "elements_tv": _element_shares,
    "bond_lengths_w1": _bond_lengths,
    "rings_w1": lambda rows: rows["rdkit_rings"][rows["rdkit_rings"] >= 0],
}
DISTANCES: dict[str, Callable[[Any, Any], float]] = {
    "atoms_w1": wasserstein,
    "elements_tv": lambda a, b: float((a - b).abs().sum() / 2),
    "bond_lengths_w1": _bond_distance,
    "rings_w1": wasserstein,
}


class NearestConformer(Metric):
    """How far new molecules, valid and in one piece, are from the nearest training molecule with the same elements in
    the same order.

    That is the root mean square distance of their atoms, compared by index after superposition, of the first
    NEAREST molecules that have such a training molecule, each compared with at most OTHERS of them: their median.
    Copies are far nearer than held-out real molecules are. It tells conformers of few molecules from copies; where
    molecules are many, `novel` does.
    """

    space = "rdkit"
    gives = ("nearest_rmsd",)

    def __call__(self, evidence: Evidence) -> list[Row]:
        samples, train, held_out = evidence.samples, evidence.train, evidence.held_out
        if samples is None or train is None or not all(_has_valid(rows) for rows in (samples, train)):
            return []
        known: dict[bytes, list[int]] = {}
        for row, types in enumerate(train["types"].numpy()):
            known.setdefault(types.tobytes(), []).append(row)
        known = {types: found[:: -(-len(found) // OTHERS)] for types, found in known.items()}
        places = train["positions"]
        found = _nearest(samples, known, places)
        if not len(found):
            return []
        beside = {}
        if held_out is not None and _has_valid(held_out) and len(real := _nearest(held_out, known, places)):
            beside["held-out real"] = float(real.median())
        title = (
            "RMSD to the nearest training molecule of the same elements, median of "
            f"{count_of(len(found), 'molecule')} in one piece that {'have' if len(found) > 1 else 'has'} one"
        )
        return [Row("nearest_rmsd", title, float(found.median()), "A", "same", beside)]


def _has_valid(rows: Rows) -> bool:
    return len(rows) > 0 and all(name in rows for name in ("types", "positions", "rdkit_connected"))


def _nearest(rows: Rows, known: Mapping[bytes, Sequence[int]], places: Tensor) -> Tensor:
    """Return the distance (S,) in Angstrom of the first NEAREST whole molecules to the nearest of the known ones with
    their types. known: types -> rows of places (T, N, 3)."""
    distances: list[Tensor] = []
    all_types, positions, connected = (rows[name] for name in ("types", "positions", "rdkit_connected"))
    for row in (connected > 0).nonzero().flatten().tolist():
        types = all_types[row]
        others = known.get(types.numpy().tobytes(), [])
        if not others:
            continue
        if len(distances) == NEAREST:
            break
        mask, there = (types > 0).expand(len(others), -1), places[list(others)].double()
        here = positions[row].double().expand_as(there)
        distances.append(root_mean_square(superpose(here, there, mask), there, mask).min())
    return torch.stack(distances) if distances else torch.zeros(0)


class PoseBusters(Metric):
    """Share of generated molecules that pass PoseBusters' checks of bonds, angles, clashes and flatness.

    energy: also check the energy, of the first 500 samples only. Molecules that RDKit does not perceive fail.
    """

    space = "posebusters"

    def __init__(self, energy: bool):
        self.energy = energy
        self.gives = ("posebusters_energy" if energy else "posebusters",)
        self.most_samples = BUSTED if energy else None

    def __call__(self, evidence: Evidence) -> list[Row]:
        samples = evidence.samples
        if samples is None or not len(samples) or "positions" not in samples:
            return []

        stopped: list[int] = []

        def value(rows: Rows) -> float:
            few = first_molecules(rows, min(len(rows), self.most_samples or len(rows)))
            share, given_up = passing(few, self.energy, evidence.progress)
            stopped.append(given_up)
            return share

        few = MemoryRows({name: samples.first(name, BUSTED_CONTROLS) for name in ("types", "positions")})
        baselines = baseline_values(value, controls(evidence, Busters(), few))
        name = "pass all of PoseBusters" if self.energy else "pass PoseBusters without its energy check"
        share = value(samples)
        if stopped[-1]:
            limit = f"took longer than {chemistry.BUST_SECONDS:g} s, counted as not passing"
            name = f"{name}; {stopped[-1]} {limit}"
        return [Row(self.gives[0], name, share, "%", "higher", baselines)]


def passing(data: dict[str, Tensor], energy: bool, progress: Progress = no_progress) -> tuple[float, int]:
    """Return the percentage of molecules that pass PoseBusters, and how many were given up, which count as not."""
    molecules = _molecules(data)
    with chemistry.rdkit().quiet():
        perceived = [found.mol for found in chemistry.perceptions(molecules, lambda more: progress(LONG, more, 0))]
    present = sum(mol is not None for mol in perceived)
    verdicts = chemistry.bust(perceived, energy, lambda more: progress("molecules by PoseBusters", more, present))
    return _percent(verdicts.count(True), len(verdicts)), verdicts.count(None)


@dataclass(frozen=True)
class Computable:
    """A property that RDKit computes. column: the tensor of `Perceived` that holds it. names: of columns of data that
    mean it, in lower case and without anything but letters and digits."""

    title: str
    unit: str
    column: str
    names: frozenset[str]


PROPERTIES = (
    Computable("logP (Crippen)", "", "rdkit_logp", frozenset(("logp", "clogp", "mollogp", "crippenlogp", "alogp"))),
    Computable("polar surface (TPSA)", "A^2", "rdkit_tpsa", frozenset(("tpsa", "polarsurface", "polarsurfacearea"))),
    Computable("number of rings", "", "rdkit_rings", frozenset(("rings", "numrings", "nrings", "ringcount"))),
    Computable("number of heavy atoms", "", "rdkit_heavy_atoms",
               frozenset(("heavyatoms", "numheavyatoms", "nheavyatoms", "heavyatomcount", "nheavy", "numheavy"))),
)  # fmt: skip


def computable(columns: Mapping[str, str]) -> tuple[str, Computable] | None:
    """Return the first condition (its argument) whose column is a property that RDKit computes, and that property."""
    for argument, column in columns.items():
        name = "".join(filter(str.isalnum, column.lower()))
        for known in PROPERTIES:
            if name in known.names:
                return argument, known
    return None


class PropertyError(Metric):
    """How far a property of new molecules, computed by RDKit, is from the value that was asked for.

    Only molecules that are valid and in one piece have one. Baselines: samples without any condition against the same
    values, each with each; and the data's own values of held-out molecules against RDKit's, which is not zero where the
    column is computed in another way.
    """

    space = "rdkit"
    gives = ("property_mae", "property_correlation")

    def needs_unconditional(self, columns: Mapping[str, str]) -> bool:
        return computable(columns) is not None

    def __call__(self, evidence: Evidence) -> list[Row]:
        samples, found = evidence.samples, computable(evidence.columns)
        if found is None or samples is None or not _has_property(samples, *found):
            return []
        argument, known = found
        asked, made = _asked_and_made(samples, argument, known)
        if not len(made):
            return []
        real: tuple[Tensor, Tensor] | None = None
        if evidence.held_out is not None and _has_property(evidence.held_out, argument, known):
            real = _asked_and_made(evidence.held_out, argument, known)
        errors: dict[str, float] = {}
        if evidence.unconditional is not None and known.column in evidence.unconditional:
            free = _property(evidence.unconditional, known)
            every = samples[argument].double()
            every = every[every.isfinite()]
            if len(free := free[free.isfinite()]):
                errors["unconditional"] = float((free[:, None] - every).abs().mean())
        if real is not None and len(real[0]):
            errors["held-out real"] = float((real[0] - real[1]).abs().mean())
        of = f"of the {len(made):,} of {len(samples):,} samples that are valid and in one piece"
        rows = [
            Row("property_mae", f"{known.title}: mean error against what was asked, {of}",
                float((asked - made).abs().mean()), known.unit, "lower", errors)
        ]  # fmt: skip
        correlation = _correlation(asked, made)
        if math.isfinite(correlation):
            beside = {} if real is None else {"held-out real": _correlation(*real)}
            beside = {name: value for name, value in beside.items() if math.isfinite(value)}
            name = f"{known.title}: correlation with what was asked (0 if it is ignored)"
            rows.append(Row("property_correlation", name, correlation, "", "higher", beside))
        return rows


def _has_property(rows: Rows, argument: str, known: Computable) -> bool:
    return len(rows) > 0 and argument in rows and known.column in rows and "rdkit_connected" in rows


def _property(rows: Rows, known: Computable) -> Tensor:
    """(B,) float64, NaN where a molecule is not valid or has several fragments."""
    whole = (rows["rdkit_valid"] > 0) & (rows["rdkit_connected"] > 0)
    return torch.where(whole, rows[known.column].double(), torch.nan)


def _asked_and_made(rows: Rows, argument: str, known: Computable) -> tuple[Tensor, Tensor]:
    """Return the values asked for and RDKit's, float64, where both are known."""
    asked, made = rows[argument].double(), _property(rows, known)
    both = asked.isfinite() & made.isfinite()
    return asked[both], made[both]


def _correlation(a: Tensor, b: Tensor) -> float:
    """Return Pearson's correlation; NaN if one of the two is constant."""
    a, b = a - a.mean(), b - b.mean()
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if len(a) > 1 and scale > 0 else math.nan


# ---- reconstruction --------------------------------------------------------------------------------------------------


def errors(made: dict[str, Tensor], data: dict[str, Tensor]) -> dict[str, list[float]]:
    """Return the errors of each reconstruction.

    `type_accuracy`: percentage of atoms with the right element. `types_right`: 100 if all are right, else 0. `rmsd`,
    `max_error`: root mean square and maximum over atoms of the distance in Angstrom to the original, after
    superposition (atoms compared by index, no mirror image). `close`: 100 if all elements are right and no atom is off
    by 0.1 A.
    """
    types, mask = data["types"].cpu(), data["types"].cpu() > 0
    all_right = (made["types"].cpu() == types).all(1)
    original = data["positions"].detach().cpu().double()
    superposed = superpose(made["positions"].detach().cpu().double(), original, mask)
    max_error = ((superposed - original).norm(dim=-1) * mask).amax(1)
    return {
        "type_accuracy": type_accuracy(made, data).tolist(), "types_right": (100 * all_right.double()).tolist(),
        "rmsd": root_mean_square(superposed, original, mask).tolist(), "max_error": max_error.tolist(),
        "close": (100 * (all_right & (max_error < CLOSE)).double()).tolist(),
    }  # fmt: skip


class MoleculeReconstruction(Metric):
    """Errors of the elements and positions of reconstructed held-out molecules, atom by atom."""

    track = "reconstruction"
    gives = ("type_accuracy", "types_right", "rmsd", "close")

    def __call__(self, evidence: Evidence) -> list[Row]:
        reconstructions = evidence.reconstructions
        if reconstructions is None or not len(reconstructions) or "rmsd" not in reconstructions:
            return []
        baseline_errors: dict[str, dict[str, list[float]]] = {}
        if evidence.held_out is not None and "positions" in evidence.held_out:
            atoms = first_molecules(evidence.held_out, CONTROLS)
            baseline_errors = {name: errors(noisy, atoms) for name, noisy in noised(atoms).items()}
            commonest = atoms["types"][atoms["types"] > 0].mode().values
            one_element = {**atoms, "types": torch.where(atoms["types"] > 0, commonest, 0)}
            baseline_errors["one element"] = errors(one_element, atoms)

        def row(key: str, name: str, unit: str, better: str) -> Row:
            of_types = key.startswith("type")  # noise does not change elements, "one element" does not move atoms
            baselines = {
                baseline: sum(values[key]) / len(values[key])
                for baseline, values in baseline_errors.items()
                if of_types == (baseline == "one element")
            }
            return Row(key, name, float(reconstructions[key].double().mean()), unit, better, baselines)

        return [
            row("type_accuracy", "atoms reconstructed as the right element, mean over molecules", "%", "higher"),
            row("types_right", "molecules with every element right", "%", "higher"),
            row("rmsd", "index-aligned RMSD of reconstructions", "A", "lower"),
            row("close", "molecules with every element right and no atom off by 0.1 A", "%", "higher"),
        ]


class SameGraph(Metric):
    """Share of reconstructions in which RDKit perceives the same molecule as in the original."""

    space = "rdkit"
    track = "reconstruction"
    gives = ("same_graph",)

    def __call__(self, evidence: Evidence) -> list[Row]:
        reconstructions, real = _reconstructions(evidence, "rdkit_graph")
        if reconstructions is None or real is None:
            return []
        graphs = real["rdkit_graph"][: len(reconstructions)]

        def same(others: Tensor) -> float:
            equal = (others == graphs[: len(others)]) & (others != 0)
            return _percent(equal.sum(), len(equal))

        baselines = {"held-out real": same(graphs)}
        if "positions" in real:
            noised_sets = noised(first_molecules(real, min(CONTROLS, len(reconstructions))))
            baselines |= {name: same(Perceived()(noisy)["rdkit_graph"]) for name, noisy in noised_sets.items()}
        name = "reconstructions in which RDKit sees the same molecule"
        return [Row("same_graph", name, same(reconstructions["rdkit_graph"]), "%", "higher", baselines)]


class ReconstructedStability(Metric):
    """EDM's molecule stability of reconstructions. It is sensitive: noise of 0.03 A already lowers it."""

    space = "edm"
    track = "reconstruction"
    gives = ("reconstruction_stable",)

    def __call__(self, evidence: Evidence) -> list[Row]:
        reconstructions, real = _reconstructions(evidence, "edm_stable")
        if reconstructions is None or real is None:
            return []

        def share(stable: Tensor) -> float:
            return _percent(stable.sum(), len(stable))

        baselines = {"held-out real": share(real["edm_stable"])}
        if "positions" in real:
            noised_sets = noised(first_molecules(real, min(CONTROLS, len(reconstructions))))
            baselines |= {name: share(chemistry.stability(**noisy).molecules) for name, noisy in noised_sets.items()}
        name = "stable molecules among reconstructions (EDM)"
        return [Row("reconstruction_stable", name, share(reconstructions["edm_stable"]), "%", "higher", baselines)]


def _reconstructions(evidence: Evidence, key: str) -> tuple[Rows | None, Rows | None]:
    """Return reconstructions and held-out molecules if both have this tensor, else (None, None)."""
    reconstructions, real = evidence.reconstructions, evidence.held_out
    if (
        reconstructions is None
        or real is None
        or not len(reconstructions)
        or key not in reconstructions
        or key not in real
    ):
        return None, None
    return reconstructions, real


class MatchRate(Metric):
    """Match rate and RMSD as in ADiT and UNITE: two molecules match if Open Babel gives them equal InChIs, with
    stereochemistry."""

    space = "match"
    track = "reconstruction"
    gives = ("match_rate", "match_rmsd")

    def __call__(self, evidence: Evidence) -> list[Row]:
        reconstructions = evidence.reconstructions
        if reconstructions is None or not len(reconstructions) or "match_rmsd" not in reconstructions:
            return []
        rmsds = {"": reconstructions["match_rmsd"]}  # "": the reconstructions; then the baselines
        if evidence.held_out is not None and "positions" in evidence.held_out:
            atoms = first_molecules(evidence.held_out, MATCHED)
            for name, data in {"held-out real": atoms, **noised(atoms)}.items():
                rmsds[name] = Matched().against(data, atoms)["match_rmsd"]
        rates = {name: _percent(values.isfinite().sum(), len(values)) for name, values in rmsds.items()}
        means = {name: float(v[v.isfinite()].double().mean()) for name, v in rmsds.items() if v.isfinite().any()}
        rows = [Row("match_rate", "reconstructions of equal InChI", rates.pop(""), "%", "higher", rates)]
        if "" in means:
            rows.append(Row("match_rmsd", "RMSD of those", means.pop(""), "A", "lower", means))
        return rows


# ---- lists for the modality ------------------------------------------------------------------------------------------


def spaces() -> list[Space]:
    """Return every feature extractor of molecules, in order of dependence."""
    return [Atoms(), DistanceTables(), Perceived(), Babel(), Busters(), Matched()]


def metrics() -> list[Metric]:
    """Return every metric. By default PoseBusters' do not run, nor Open Babel's if that package is missing."""
    return [
        MoleculeReconstruction(), SameGraph(), ReconstructedStability(), MatchRate(),
        MoleculeValidity(Perceived(), "RDKit"), MoleculeValidity(DistanceTables(), "EDM's distance tables"),
        MoleculeValidity(Babel(), "Open Babel, as ADiT and UNITE"), MoleculeDistributions(), NearestConformer(),
        PropertyError(), PoseBusters(False), PoseBusters(True),
    ]  # fmt: skip
