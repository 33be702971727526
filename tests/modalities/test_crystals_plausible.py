"""What tells crystals from random coordinates: structure types, distances to neighbours, energies."""

from __future__ import annotations

import itertools
import time
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("pymatgen.core")
pytest.importorskip("smact.screening")

from pymatgen.analysis.structure_matcher import StructureMatcher

from unilatent.modalities.base import Evidence, Row
from unilatent.modalities.crystal import generator, metrics, pairs, plausibility, structure_types
from unilatent.modalities.crystal.baselines import RANDOM_COORDINATES, RANDOM_ELEMENTS, REAL, Arrays
from unilatent.modalities.crystal.lattices import cell_matrix
from unilatent.records import MemoryRows

CUBE = [90.0, 90.0, 90.0]


def crystal(elements: list[int], places: list[list[float]], side: float) -> Arrays:
    """One crystal in a cubic cell, padded to eight atoms."""
    types, fractional = np.zeros((1, 8), np.int64), np.zeros((1, 8, 3))
    types[0, : len(elements)], fractional[0, : len(elements)] = elements, places
    return types, fractional, np.array([[side, side, side, *CUBE]])


def together(*crystals: Arrays) -> Arrays:
    types, fractional, lattice = (np.concatenate(arrays) for arrays in zip(*crystals, strict=True))
    return types, fractional, lattice


def caesium_chloride(a: int, b: int, side: float) -> Arrays:
    return crystal([a, b], [[0, 0, 0], [0.5, 0.5, 0.5]], side)


def perovskite(a: int, b: int, x: int, side: float) -> Arrays:
    places = [[0.5, 0.5, 0.5], [0, 0, 0], [0.5, 0, 0], [0, 0.5, 0], [0, 0, 0.5]]
    return crystal([a, b, x, x, x], places, side)


def rutile_like(a: int, x: int, side: float) -> Arrays:
    """Of the formula of `perovskite`, with its atoms elsewhere: a tetrahedron of X around one of two others."""
    places = [[0.5, 0.5, 0.5], [0.1, 0.6, 0.2], [0.3, 0.3, 0.3], [0.7, 0.7, 0.3], [0.7, 0.3, 0.7]]
    return crystal([a, a + 1, x, x, x], places, side)


def stored(crystals: Arrays) -> MemoryRows:
    types, fractional, lattice = map(torch.from_numpy, crystals)
    return MemoryRows(metrics.Structures()({"types": types, "fractional": fractional, "lattice": lattice}))


def by_key(rows: list[Row]) -> dict[str, Row]:
    return {row.key: row for row in rows}


TRAIN = together(perovskite(56, 22, 8, 4.0), caesium_chloride(55, 17, 4.1), perovskite(38, 22, 8, 3.9))
MADE = together(
    perovskite(11, 73, 9, 8.0),  # other elements, in a cell of twice the side
    perovskite(8, 56, 22, 4.0),  # the same sites, otherwise filled
    rutile_like(56, 8, 4.0),
    caesium_chloride(3, 35, 3.0),
    crystal([12], [[0, 0, 0]], 3.0),  # of a formula that no training crystal has
    caesium_chloride(3, 35, 30.0),
)
OF_TRAIN = [1, 1, 0, 1, 0, 1]


def test_structure_types_do_not_depend_on_elements_and_scale() -> None:
    told: list[int] = []
    known = structure_types.KnownTypes(TRAIN, told.append)
    assert len(known) == 2 and known.undecided == 0 and sum(told) == 3
    assert known.among(MADE, told.append).tolist() == OF_TRAIN and sum(told) == 9
    thin = (MADE[0][:1], MADE[1][:1], np.array([[99999.0, 6, 7, *CUBE]]))
    assert known.among(thin).tolist() == [0], "pymatgen cannot reduce it"


def test_structure_types_in_processes_of_their_own_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structure_types, "FEW", 0)
    monkeypatch.setattr(structure_types, "AT_ONCE", 1)
    known = structure_types.KnownTypes(TRAIN)
    assert len(known) == 2 and known.among(MADE).tolist() == OF_TRAIN


def test_structure_types_that_take_too_long_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that is given up is tried again one by one: of these only the third crystal is given up."""
    asked: list[int] = []

    def slow(_: str, requests: list[Any], seconds: float, at_once: int, done: Any) -> list[Any]:
        answers: list[Any] = []
        for request in requests:
            crystals = request["structures"][1]
            asked.append(len(crystals))
            late = request["operation"] == "of_known_type" and any(one["types"][:2] == [56, 57] for one in crystals)
            answers.append(None if late else structure_types.pairs.answer(request))
            done(1)
        return answers

    monkeypatch.setattr(structure_types, "FEW", 0)
    monkeypatch.setattr(structure_types, "ask_all", slow)
    [all_, larger] = plausibility.KnownTypeShare()(Evidence(stored(TRAIN), None, stored(MADE)))
    assert asked == [2, 1, 3, 2, 1, 1, 1]
    assert "; 1 new ones took longer than 10 s, counted as of no known type" in all_.name
    assert all_.value == pytest.approx(100 * 4 / 6) and larger.value == pytest.approx(100 * 2 / 3)


@pytest.mark.parametrize(("again", "undecided"), [(100, 0), (1, 1)])
def test_training_crystals_of_a_request_that_took_too_long_are_asked_for_once_more(
    again: int, undecided: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float] = []

    def slow(_: str, requests: list[Any], seconds: float, at_once: int, done: Any) -> list[Any]:
        limits.append(seconds)
        late = [len(request["structures"][1]) > 1 for request in requests]
        return [None if one else structure_types.pairs.answer(asked) for one, asked in zip(late, requests, strict=True)]

    monkeypatch.setattr(structure_types, "FEW", 0)
    monkeypatch.setattr(structure_types, "AGAIN", again)
    monkeypatch.setattr(structure_types, "ask_all", slow)
    known = structure_types.KnownTypes(TRAIN)
    assert known.undecided == undecided and limits == [10, 3]


def test_known_types_stand_beside_random_coordinates() -> None:
    rows = by_key(plausibility.KnownTypeShare()(Evidence(stored(TRAIN), stored(TRAIN), stored(MADE), train_total=3)))
    assert rows["known_type"].value == pytest.approx(100 * 4 / 6)
    assert rows["known_type"].name == "of a structure type of the 3 training crystals"
    assert rows["known_type_of_more"].value == pytest.approx(100 * 2 / 3), "three cells have five atoms"
    for row in rows.values():
        assert row.beside[REAL] == row.beside[RANDOM_ELEMENTS] == 100
    assert rows["known_type_of_more"].beside[RANDOM_COORDINATES] == 0
    assert [key for key, row in rows.items() if row.headline] == ["known_type_of_more"]


def test_a_metric_of_training_crystals_is_silent_without_them() -> None:
    for metric in (plausibility.KnownTypeShare(), plausibility.Neighbours()):
        assert metric(Evidence(None, None, stored(MADE))) == metric(Evidence(stored(TRAIN))) == []


def test_distances_to_neighbours_in_closed_form() -> None:
    """CsCl: half a space diagonal; a cube of one atom: its side; perovskite: half a side, but of A to X more."""
    apart, shares = plausibility.nearest(together(caesium_chloride(55, 17, 4.0), crystal([12], [[0, 0, 0]], 3.0)))
    assert apart.tolist() == pytest.approx([2 * 3**0.5] * 2 + [3.0])
    assert shares.tolist() == pytest.approx([2 * 3**0.5 / (2.6 + 1.0)] * 2 + [3.0 / (2 * 1.5)])
    apart, _ = plausibility.nearest(perovskite(56, 22, 8, 4.0))
    assert apart.tolist() == pytest.approx([2 * 2**0.5, 2, 2, 2, 2])
    broken = together(
        perovskite(56, 22, 8, 4.0), (*perovskite(56, 22, 8, 4.0)[:2], np.array([[4.0, 4, 4, 30, 90, 90]]))
    )
    assert len(plausibility.nearest(broken)[0]) == 5, "a cell that cannot be built is left out"
    neon = plausibility.nearest(crystal([10], [[0, 0, 0]], 3.0))
    assert len(neon[0]) == 1 and not len(neon[1]), "it has no radius"


def test_distances_are_those_of_pymatgen() -> None:
    from unilatent.modalities.crystal import matching

    rng = np.random.default_rng(0)
    types = rng.integers(1, 90, (20, 6)) * (np.arange(6) < rng.integers(1, 7, (20, 1)))
    lattice = np.concatenate([rng.uniform(3, 6, (20, 3)), rng.uniform(60, 120, (20, 3))], 1)
    places = rng.random((20, 6, 3))
    for row in range(20):
        one = types[row : row + 1], places[row : row + 1], lattice[row : row + 1]
        built = plausibility.validity.structure_checks(*one)[0][0]
        apart, _ = plausibility.nearest(one)
        assert len(apart) == (types[row] > 0).sum() * built
        if built:
            structure = matching.structure(*(array[0] for array in one))
            wanted = [min(near.nn_distance for near in structure.get_neighbors(site, 7)) for site in structure]
            assert apart.tolist() == pytest.approx(wanted, abs=1e-6)


def test_distances_move_with_the_crystals() -> None:
    wider = (TRAIN[0], TRAIN[1], TRAIN[2] + np.array([0.2, 0.2, 0.2, 0, 0, 0]))
    rows = by_key(plausibility.Neighbours()(Evidence(stored(TRAIN), stored(TRAIN), stored(wider))))
    shift = (2 * (0.1 * 4 + 0.1 * 2**0.5) + 2 * 0.1 * 3**0.5) / 12
    assert rows["neighbours_w1"].value == pytest.approx(shift, abs=1e-5)
    assert rows["neighbours_w1"].beside[REAL] == rows["contacts_w1"].beside[REAL] == 0
    assert rows["neighbours_w1"].beside[RANDOM_ELEMENTS] == 0 < rows["contacts_w1"].beside[RANDOM_ELEMENTS]
    assert rows["neighbours_w1"].beside[RANDOM_COORDINATES] > shift


# ---- energies --------------------------------------------------------------------------------------------------------


def test_energies_are_medians_and_impossible_crystals_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that gives the side of a cell as energy and its half as force, and does not come back for one."""

    def answered(_: str, requests: list[Any], seconds: float, at_once: int, done: Any) -> list[Any]:
        sides = [request["matrix"][2][2] for request in requests]
        for _side in sides:
            done(1)
        return [None if side == 7 else "no neighbours" if side > 90 else [side, side / 2] for side in sides]

    monkeypatch.setattr(plausibility, "ask_all", answered)
    sides = [3.0, 4.0, 5.0, 99.0, 7.0, 1.2, 0.5]
    crystals = together(*(caesium_chloride(3, 9, side) for side in sides), caesium_chloride(96, 9, 4.0))
    told: list[int] = []
    found = plausibility.energies(crystals, lambda what, more, total: told.append(more))
    assert found[:3].tolist() == [[3, 1.5], [4, 2], [5, 2.5]] and np.isinf(found[3:]).all()
    assert sum(told) == len(sides) + 1
    few = together(*(caesium_chloride(3, 9, side) for side in (3.0, 4.0, 5.0, 6.0, 99.0)))
    force, energy = plausibility.PotentialEnergy()(Evidence(None, stored(few), stored(few)))
    assert (force.value, energy.value) == (2.5, 5) and force.beside[REAL] == 2.5
    assert set(force.beside) == {REAL, RANDOM_COORDINATES, RANDOM_ELEMENTS}
    assert force.name.endswith("; 1 of 5 have none, counted as infinite")


def test_energies_are_computed_on_request_only_and_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import util

    from unilatent.evaluation.evaluate import choose_metrics
    from unilatent.modalities.crystal import Crystal, CrystalConfig

    modality = Crystal(CrystalConfig.small())
    keys = {key for metric in choose_metrics(modality, ()) for key in metric.gives}
    assert {"known_type", "neighbours_w1"} <= keys and "chgnet_energy" not in keys
    assert [type(m) for m in choose_metrics(modality, ("chgnet_energy",))] == [plausibility.PotentialEnergy]
    monkeypatch.setattr(util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"chgnet: pip install 'unilatent\[atoms-eval\]'"):
        plausibility.Potential().prepare(torch.device("cpu"))


def test_chgnet_finds_rocksalt_at_rest_and_moved_atoms_pulled_back() -> None:
    pytest.importorskip("chgnet")
    places = [[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0],
              [0.5, 0.5, 0.5], [0.5, 0, 0], [0, 0.5, 0], [0, 0, 0.5]]  # fmt: skip
    rest = crystal([11] * 4 + [17] * 4, places, 5.64)
    moved = rest[0], rest[1] + np.array([[0.04, 0, 0]] + [[0, 0, 0]] * 7), rest[2]
    (still, no_force), (pulled, force) = plausibility.energies(together(rest, moved)).tolist()
    assert no_force < 1e-3 and force > 0.1 and pulled > still
    assert still == pytest.approx(-3.6664 + 2.8101, abs=2e-3)


def test_places_alone_never_rule_out_a_pair_of_one_type() -> None:
    """What is compared first, without elements, is true of every pair that is of one type."""
    made = generator.make(60, seed=3)
    cells = [pairs.structure(one.types.tolist(), one.coordinates, cell_matrix(one.lattice)) for one in made]
    reduced = [found for cell in cells if (found := pairs.reduced(cell)) is not None]
    matcher = StructureMatcher(stol=pairs.TYPE_SITES, angle_tol=pairs.TYPE_ANGLES, ltol=pairs.TYPE_LENGTHS)
    verdicts = set()
    for one, other in itertools.combinations(reduced, 2):
        if len(one) == len(other) <= 6:
            plain = bool(matcher.fit_anonymous(one, other, skip_structure_reduction=True))
            assert pairs.same_type(one, other) == plain
            verdicts.add(plain)
    assert verdicts == {True, False}


def test_cells_that_cannot_be_built_or_are_thin_are_of_no_known_type_at_once() -> None:
    """Reducing these takes pymatgen minutes: angles of 1 degree, and a needle of 1.2 x 1.2 x 400 A."""
    salt = crystal([11, 17], [[0, 0, 0], [0.5, 0.5, 0.5]], 4.0)
    flat = (salt[0], salt[1], np.array([[0.1, 0.1, 0.1, 1.0, 1.0, 1.0]]))
    needle = (salt[0], salt[1], np.array([[1.2, 1.2, 400.0, 90.0, 90.0, 90.0]]))
    began = time.monotonic()
    known = structure_types.KnownTypes(together(salt, flat, needle))
    assert len(known) == 1 and known.undecided == 0
    assert known.among(together(salt, flat, needle)).tolist() == [1, 0, 0]
    assert time.monotonic() - began < 10
