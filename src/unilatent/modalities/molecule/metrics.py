"""How molecules are judged: by what chemistry sees in their atoms, beside real molecules and beside noise.

Every number of generation stands beside the same number of held-out real molecules (the ceiling) and of those with
0.05 and 1 Angstrom of Gaussian noise on every coordinate: a measure that noise passes says little.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...maths.geometry import rmsd as root_mean_square
from ...maths.geometry import superpose
from ...maths.streams import generator
from ...records import Held, Rows
from ..base import Evidence, Metric, Row, Space
from . import chemistry

CLOSE = 0.1
"""Angstrom that no atom of a close reconstruction is off."""
NOISES = (0.05, 1.0)
"""Angstrom, standard deviation of a coordinate in the control rows."""
CONTROLS = 1000
"""Most real molecules that noise is added to."""
MATCHED = 200
"""Most of them that are matched by InChI."""
BUSTED = 500
"""Samples, the first, whose energy PoseBusters looks at."""
BUSTED_CONTROLS = 50
"""Real molecules beside them."""
FEWEST_BONDS = 50
"""Bonds of a kind among real molecules for their lengths to be compared."""


# ---- what is kept of each molecule -----------------------------------------------------------------------------------


class Atoms(Space):
    """`types` (B, N) uint8 and `positions` (B, N, 3) float32 themselves."""

    name = "atoms"

    def __call__(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        positions = data["positions"].detach().float().cpu()
        if not positions.isfinite().all():
            raise ValueError("positions: NaN or infinity; the model that made them diverged")
        return {"types": data["types"].cpu().to(torch.uint8), "positions": positions}


class DistanceTables(Space):
    """EDM's view: `edm_atoms`, `edm_stable_atoms` (B,) counts, `edm_stable`, `edm_valid` (B,) 0 or 1, `edm_graph` (B,)
    the molecule as a number, 0 where it is not valid."""

    name = "edm"
    needs = ("atoms",)

    def prepare(self, device: torch.device) -> None:
        chemistry.rdkit()

    def __call__(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        found = chemistry.stability(data["types"], data["positions"])
        real = data["types"].cpu() > 0
        orders = found.orders.numpy()
        graphs = []
        with chemistry.rdkit().quiet():
            for i, (types, _) in enumerate(chemistry.each(data["types"], data["positions"])):
                at = real[i].numpy()
                graphs.append(chemistry.key(chemistry.graph_smiles(types, orders[i][at][:, at])))
        keys = torch.tensor(graphs, dtype=torch.int64)
        return {
            "edm_atoms": real.sum(1), "edm_stable_atoms": (found.stable & real).sum(1),
            "edm_stable": found.molecules.to(torch.uint8), "edm_valid": (keys != 0).to(torch.uint8), "edm_graph": keys,
        }  # fmt: skip


class Perceived(Space):
    """RDKit's view: `rdkit_valid`, `rdkit_connected` (B,) 0 or 1, `rdkit_graph` (B,) the molecule without
    stereochemistry as a number, 0 where it is not valid, `rdkit_rings` (B,), -1 there."""

    name = "rdkit"
    needs = ("atoms",)

    def prepare(self, device: torch.device) -> None:
        chemistry.rdkit()

    def __call__(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        rows = []
        with chemistry.rdkit().quiet():
            for types, positions in chemistry.each(data["types"], data["positions"]):
                mol = chemistry.perceive(types, positions)
                if mol is None:
                    rows.append((0, 0, 0, -1))
                else:
                    connected = int(chemistry.fragments(mol) == 1)
                    rows.append((1, connected, chemistry.key(chemistry.plain_smiles(mol)), chemistry.rings(mol)))
        return _columns("rdkit", ("valid", "connected", "graph", "rings"), rows)


class Babel(Space):
    """Open Babel's view, ADiT's and UNITE's protocol: `openbabel_valid`, `openbabel_connected` (B,) 0 or 1, and
    `openbabel_graph` (B,) the largest fragment as a number. Without the package it is left out unless asked for."""

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
    """Keeps nothing: PoseBusters looks at the atoms that are kept anyway. Slow, so only where it is asked for."""

    name = "posebusters"
    needs = ("atoms",)
    on_request = True

    def prepare(self, device: torch.device) -> None:
        chemistry.rdkit()
        chemistry.posebusters(False)

    def __call__(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        return {}


class Matched(Space):
    """`match_rmsd` (B,) Angstrom between reconstructions and originals whose InChIs are equal, infinite where they are
    not; 2 ms each. Without Open Babel or pymatgen it is left out unless asked for."""

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


# ---- beside what a number stands -------------------------------------------------------------------------------------


def with_noise(data: dict[str, Tensor], sigma: float) -> dict[str, Tensor]:
    """The same molecules with N(0, sigma^2) Angstrom on every coordinate, always the same noise."""
    noise = torch.randn(data["positions"].shape, generator=generator("control", str(sigma)))
    moved = data["positions"].float() + sigma * noise
    return {**data, "positions": moved * (data["types"] > 0)[..., None]}


def kept_atoms(rows: Rows, most: int) -> dict[str, Tensor]:
    """The first molecules of a set, as Data."""
    return {"types": rows.first("types", most).long(), "positions": rows.first("positions", most)}


def controls(evidence: Evidence, space: Space, like: Rows) -> dict[str, Rows]:
    """What a space keeps of as many held-out real molecules as there are samples, and of those with noise; without any
    held-out ones, the noise is added to training molecules."""
    found: dict[str, Rows] = {}
    real, names = evidence.held_out, _needed(space, like)
    if real is not None and len(real) and all(name in real for name in names):
        found["held-out real"] = Held({name: real.first(name, len(like)) for name in names})
    real = real if real is not None and len(real) else evidence.train
    if real is not None and "positions" in real:
        atoms = kept_atoms(real, min(CONTROLS, len(like)))
        for sigma in NOISES:
            noisy = with_noise(atoms, sigma)
            found[f"noise {sigma:g} A"] = Held({**Atoms()(noisy), **space(noisy)})
    return found


def beside(value: Callable[[Rows], float], of: dict[str, Rows]) -> dict[str, float]:
    """A number of each control."""
    return {name: value(rows) for name, rows in of.items()}


def _needed(space: Space, like: Rows) -> list[str]:
    return [name for name in like.names if name.startswith(space.name) or name in ("types", "positions")]


# ---- generation ------------------------------------------------------------------------------------------------------


class Validity(Metric):
    """Of new molecules by one protocol: valid, in one piece, distinct, not among the training molecules.

    unique: distinct of the valid ones. novel: those of them that no training molecule that was looked at equals, of
    the valid ones. valid_unique: distinct of all; the number that EDM's successors print as "unique".
    """

    def __init__(self, space: Space, title: str):
        self.view, self.space, self.title = space, space.name, title
        names = ["valid", "valid_connected", "unique", "novel", "valid_unique"]
        if isinstance(space, DistanceTables):
            names = ["atom_stable", "mol_stable", "valid", "unique", "novel", "valid_unique"]
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
        said = {
            "atom_stable": "atoms with a right valence", "mol_stable": "molecules of such atoms", "valid": "valid",
            "valid_connected": "valid and in one piece", "unique": "distinct of the valid",
            "novel": f"distinct of the valid, and not among {evidence.looked_at('molecules')}",
            "valid_unique": "distinct of all",
        }  # fmt: skip
        rows, others = [], controls(evidence, self.view, samples)
        for name in self.names:
            if name == "novel" and known is None:
                continue
            value = self.share(name, known)
            stand = beside(value, others)
            rows.append(Row(self._key(name), f"{said[name]} ({self.title})", value(samples), "%", "higher", stand))
        return rows

    def share(self, name: str, known: Tensor | None = None) -> Callable[[Rows], float]:
        """One of the shares, in percent, as a function of what the space kept; known: graphs that are not novel."""
        prefix = f"{self.space}_"

        def value(rows: Rows) -> float:
            if name == "atom_stable":
                return _percent(rows["edm_stable_atoms"].sum(), rows["edm_atoms"].sum())
            if name == "mol_stable":
                return _percent(rows["edm_stable"].sum(), len(rows))
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


class Distributions(Metric):
    """How far new molecules are from training ones in what can be counted and measured: Wasserstein-1 distances of
    the number of atoms, rings and bond lengths, and the total variation between shares of elements."""

    space = "rdkit"
    gives = ("atoms_w1", "elements_tv", "bond_lengths_w1", "rings_w1")

    def __call__(self, evidence: Evidence) -> list[Row]:
        train, samples = evidence.train, evidence.samples
        if train is None or samples is None or not len(samples) or "types" not in samples or "types" not in train:
            return []
        some = Held({name: train.first(name, 10 * CONTROLS) for name in ("types", "positions", "rdkit_rings")})
        real = {key: measure(some) for key, measure in MEASURES.items()}
        named = {
            "atoms_w1": ("number of atoms, W1 to training", "atoms"),
            "elements_tv": ("shares of elements, total variation to training", ""),
            "bond_lengths_w1": ("bond lengths, W1 to training, mean over pairs of elements", "A"),
            "rings_w1": ("rings of valid molecules, W1 to training", "rings"),
        }
        rows, others = [], controls(evidence, Perceived(), samples)
        for key, (name, unit) in named.items():

            def value(rows: Rows, key: str = key) -> float:
                return DISTANCES[key](MEASURES[key](rows), real[key])

            rows.append(Row(key, name, value(samples), unit, "lower", beside(value, others)))
        return rows


def wasserstein(a: Tensor, b: Tensor) -> float:
    """W1 between two sets of numbers; infinite where one is empty."""
    if not len(a) or not len(b):
        return float("inf")
    a, b = a.double().sort().values, b.double().sort().values
    places = torch.cat([a, b]).sort().values
    below = [torch.searchsorted(side, places[:-1], right=True) / len(side) for side in (a, b)]
    return float(((below[0] - below[1]).abs() * places.diff()).sum())


def _bond_lengths(rows: Rows) -> dict[int, Tensor]:
    """100 a + b -> Angstrom of every bond between elements a <= b by EDM's tables."""
    found: dict[int, list[Tensor]] = {}
    for types, positions in zip(rows["types"].long().split(512), rows["positions"].split(512), strict=True):
        bonded = chemistry.distance_orders(types, positions).triu() > 0
        i, a, b = bonded.nonzero(as_tuple=True)
        lengths = (positions[i, a] - positions[i, b]).norm(dim=-1)
        pairs = torch.minimum(types[i, a], types[i, b]) * 100 + torch.maximum(types[i, a], types[i, b])
        for pair in pairs.unique().tolist():
            found.setdefault(pair, []).append(lengths[pairs == pair])
    return {pair: torch.cat(parts) for pair, parts in found.items()}


def _bond_distance(made: dict[int, Tensor], real: dict[int, Tensor]) -> float:
    """Over the pairs of elements that real molecules join often and new ones join at all; infinite without one."""
    shared = [pair for pair, lengths in real.items() if len(lengths) >= FEWEST_BONDS and pair in made]
    return sum(wasserstein(made[p], real[p]) for p in shared) / len(shared) if shared else float("inf")


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


class PoseBusters(Metric):
    """Share of new molecules that pass PoseBusters' checks of bonds, angles, clashes and flatness; with `energy`,
    of the first 500, those that also have a usual energy. Molecules that RDKit does not see pass none."""

    space = "posebusters"

    def __init__(self, energy: bool):
        self.energy = energy
        self.gives = ("posebusters_energy" if energy else "posebusters",)
        self.most_samples = BUSTED if energy else None

    def __call__(self, evidence: Evidence) -> list[Row]:
        samples = evidence.samples
        if samples is None or not len(samples) or "positions" not in samples:
            return []

        def value(rows: Rows) -> float:
            return passing(kept_atoms(rows, min(len(rows), self.most_samples or len(rows))), self.energy)

        few = Held({name: samples.first(name, BUSTED_CONTROLS) for name in ("types", "positions")})
        stand = beside(value, controls(evidence, Busters(), few))
        name = "pass all of PoseBusters" if self.energy else "pass PoseBusters without its energy check"
        return [Row(self.gives[0], name, value(samples), "%", "higher", stand)]


def passing(data: dict[str, Tensor], energy: bool) -> float:
    """Percent of molecules that pass PoseBusters."""
    with chemistry.rdkit().quiet():
        seen = [chemistry.perceive(*molecule) for molecule in _molecules(data)]
    verdicts = chemistry.bust(seen, energy)
    return _percent(sum(verdicts), len(verdicts))


# ---- reconstruction --------------------------------------------------------------------------------------------------


def errors(made: dict[str, Tensor], data: dict[str, Tensor]) -> dict[str, list[float]]:
    """Of each reconstruction: percent of atoms of the right element (`type_accuracy`), 100 where all are
    (`types_right`), root mean squared and largest distance in Angstrom of atoms after turning the whole molecule onto
    its original (`rmsd`, `max_error`: atom by atom, no mirror image), and 100 where also none is off by 0.1 A
    (`close`)."""
    types, mask = data["types"].cpu(), data["types"].cpu() > 0
    right = ((made["types"].cpu() == types) & mask).sum(1) / mask.sum(1)
    whole = (made["types"].cpu() == types).all(1)
    original = data["positions"].detach().cpu().double()
    turned = superpose(made["positions"].detach().cpu().double(), original, mask)
    furthest = ((turned - original).norm(dim=-1) * mask).amax(1)
    return {
        "type_accuracy": (100 * right.double()).tolist(), "types_right": (100 * whole.double()).tolist(),
        "rmsd": root_mean_square(turned, original, mask).tolist(), "max_error": furthest.tolist(),
        "close": (100 * (whole & (furthest < CLOSE)).double()).tolist(),
    }  # fmt: skip


class Reconstruction(Metric):
    """Elements and places of held-out molecules through the tokenizer, atom by atom."""

    track = "reconstruction"
    gives = ("type_accuracy", "types_right", "rmsd", "close")

    def __call__(self, evidence: Evidence) -> list[Row]:
        made = evidence.reconstructions
        if made is None or not len(made) or "rmsd" not in made:
            return []
        others: dict[str, dict[str, list[float]]] = {}
        if evidence.held_out is not None and "positions" in evidence.held_out:
            atoms = kept_atoms(evidence.held_out, CONTROLS)
            others = {f"noise {sigma:g} A": errors(with_noise(atoms, sigma), atoms) for sigma in NOISES}
            commonest = atoms["types"][atoms["types"] > 0].mode().values
            one_element = {**atoms, "types": torch.where(atoms["types"] > 0, commonest, 0)}
            others["one element"] = errors(one_element, atoms)

        def row(key: str, name: str, unit: str, better: str) -> Row:
            of_types = key.startswith("type")  # noise leaves elements right, one element leaves places right
            said = {control: found[key] for control, found in others.items() if of_types == (control == "one element")}
            stand = {control: sum(values) / len(values) for control, values in said.items()}
            return Row(key, name, float(made[key].double().mean()), unit, better, stand)

        return [
            row("type_accuracy", "atoms reconstructed as the right element, mean over molecules", "%", "higher"),
            row("types_right", "molecules with every element right", "%", "higher"),
            row("rmsd", "index-aligned RMSD of reconstructions", "A", "lower"),
            row("close", "molecules with every element right and no atom off by 0.1 A", "%", "higher"),
        ]


class Reread(Metric):
    """Whether chemistry sees the same molecule in a reconstruction."""

    space = "rdkit"
    track = "reconstruction"
    gives = ("same_graph",)

    def __call__(self, evidence: Evidence) -> list[Row]:
        made, real = evidence.reconstructions, evidence.held_out
        if made is None or real is None or not len(made) or "rdkit_graph" not in made or "rdkit_graph" not in real:
            return []
        graphs = real["rdkit_graph"][: len(made)]
        stand = {"held-out real": _percent((graphs != 0).sum(), len(graphs))}
        if "positions" in real:
            atoms = kept_atoms(real, min(CONTROLS, len(made)))
            for sigma in NOISES:
                again = Perceived()(with_noise(atoms, sigma))["rdkit_graph"]
                same = (again == graphs[: len(again)]) & (again != 0)
                stand[f"noise {sigma:g} A"] = _percent(same.sum(), len(same))
        same = (made["rdkit_graph"] == graphs) & (graphs != 0)
        name = "reconstructions in which RDKit sees the same molecule"
        return [Row("same_graph", name, _percent(same.sum(), len(same)), "%", "higher", stand)]


class ReconstructedStability(Metric):
    """EDM's stability of reconstructions, which 0.03 A of noise already harms."""

    space = "edm"
    track = "reconstruction"
    gives = ("reconstruction_stable",)

    def __call__(self, evidence: Evidence) -> list[Row]:
        made, real = evidence.reconstructions, evidence.held_out
        if made is None or real is None or not len(made) or "edm_stable" not in made or "edm_stable" not in real:
            return []
        stand = {"held-out real": _percent(real["edm_stable"].sum(), len(real))}
        if "positions" in real:
            atoms = kept_atoms(real, min(CONTROLS, len(made)))
            for sigma in NOISES:
                stable = chemistry.stability(**with_noise(atoms, sigma)).molecules
                stand[f"noise {sigma:g} A"] = _percent(stable.sum(), len(stable))
        value = _percent(made["edm_stable"].sum(), len(made))
        name = "stable molecules among reconstructions (EDM)"
        return [Row("reconstruction_stable", name, value, "%", "higher", stand)]


class MatchRate(Metric):
    """ADiT's and UNITE's match rate and RMSD: equal InChIs by Open Babel, stereochemistry included."""

    space = "match"
    track = "reconstruction"
    gives = ("match_rate", "match_rmsd")

    def __call__(self, evidence: Evidence) -> list[Row]:
        made = evidence.reconstructions
        if made is None or not len(made) or "match_rmsd" not in made:
            return []
        found = {"": made["match_rmsd"]}
        if evidence.held_out is not None and "positions" in evidence.held_out:
            atoms = kept_atoms(evidence.held_out, MATCHED)
            found["held-out real"] = Matched().against(atoms, atoms)["match_rmsd"]
            for sigma in NOISES:
                found[f"noise {sigma:g} A"] = Matched().against(with_noise(atoms, sigma), atoms)["match_rmsd"]
        rates = {name: _percent(values.isfinite().sum(), len(values)) for name, values in found.items()}
        means = {name: float(v[v.isfinite()].double().mean()) for name, v in found.items() if v.isfinite().any()}
        rows = [Row("match_rate", "reconstructions of equal InChI", rates.pop(""), "%", "higher", rates)]
        if "" in means:
            rows.append(Row("match_rmsd", "RMSD of those", means.pop(""), "A", "lower", means))
        return rows


# ---- what a modality gives to evaluation -----------------------------------------------------------------------------


def spaces() -> list[Space]:
    """Every view of molecules, the atoms first."""
    return [Atoms(), DistanceTables(), Perceived(), Babel(), Busters(), Matched()]


def metrics() -> list[Metric]:
    """Every metric. Open Babel's are left out by default where the package is missing, PoseBusters' always."""
    return [
        Reconstruction(), Reread(), ReconstructedStability(), MatchRate(),
        Validity(Perceived(), "RDKit"), Validity(DistanceTables(), "EDM's distance tables"),
        Validity(Babel(), "Open Babel, as ADiT and UNITE"), Distributions(), PoseBusters(False), PoseBusters(True),
    ]  # fmt: skip
