"""Files with damage at random places: each is read or refused within seconds, and records are counted right."""

from __future__ import annotations

import random
import re
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rdkit")
pytest.importorskip("pymatgen.core")

from test_atom_files import CUBE, GENERAL, POSCAR, SALT, cif, listed, mol2, named, sdf

from unilatent.modalities._atoms.reading import LoadedSystems
from unilatent.modalities._atoms.systems import System, Systems
from unilatent.modalities.crystal import data as crystals
from unilatent.modalities.molecule import data as molecules

FILES = 2000
SECONDS = 10
WORDS = (
    "nan", "inf", "-", "", "1e400", "1*^2", "9" * 30, "-1", "0", "Qq", "H", "\u2028", "\x00", "\ufeff", "'", '"', ";",
    "loop_", "data_x", "$$$$", "M  END", "?", ".", "1(2)", "(", "\u0661", "3", "99999", "Lattice=", "#",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNILATENT_CACHE", str(tmp_path_factory.mktemp("cache")))


# ---- mutations -------------------------------------------------------------------------------------------------------


def word(draw: random.Random, lines: list[bytes], at: int) -> list[bytes]:
    """Replace one word of a line."""
    words = re.split(rb"(\s+)", lines[at])
    words[draw.randrange(len(words))] = draw.choice(WORDS).encode()
    return [*lines[:at], b"".join(words), *lines[at + 1 :]]


def line(draw: random.Random, lines: list[bytes]) -> list[bytes]:
    """Leave out, repeat, move or insert a line, or change a word of it."""
    at, other = draw.randrange(len(lines)), draw.randrange(len(lines))
    ways: list[Callable[[], list[bytes]]] = [
        lambda: lines[:at] + lines[at + 1 :],
        lambda: [*lines[:at], lines[at], *lines[at:]],
        lambda: [*lines[:at], lines[other], *lines[at:]],
        lambda: [*lines[:at], draw.choice(WORDS).encode(), *lines[at:]],
        lambda: word(draw, lines, at),
        lambda: word(draw, lines, at),
    ]
    return draw.choice(ways)()


def damaged(draw: random.Random, content: bytes) -> bytes:
    """Change lines, bytes or ends of a file."""
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        at = draw.randrange(len(content) + 1)
        way = draw.randrange(8)
        if way < 4 and content:
            content = b"\n".join(line(draw, content.split(b"\n")))
        elif way == 4:
            content = content[:at]
        elif way == 5:
            content = content[:at] + bytes(draw.randrange(256) for _ in range(draw.randrange(1, 9))) + content[at:]
        elif way == 6:
            content = content[:at] + content[at + draw.randrange(1, 40) :]
        else:
            content = content.replace(b"\n", draw.choice((b"\r", b"\r\n", b"\n\n", b" ")))
    return content


# ---- readers ---------------------------------------------------------------------------------------------------------


def read_molecules(path: Path) -> LoadedSystems:
    return molecules.read(path, 64)


def read_crystals(path: Path) -> LoadedSystems:
    return crystals._parsed(path, 64, False, None)


def xyz(frames: int = 6) -> str:
    return "".join(f"3\nstep={i}\nO 0.0 0.0 0.1\nH 0.96{i} 0.0 0.0\nH -0.24 0.93{i} 0.0\n" for i in range(frames))


def table(rows: int = 4) -> str:
    return "material_id,gap,cif\n" + "".join(f'm-{i},{i}.5,"{cif(SALT, named("F m -3 m"))}"\n' for i in range(rows))


GROUP = listed("x,y,z", "-x,1/2+y,1/2-z", "-x,-y,-z", "x,1/2-y,1/2+z")
KINDS: dict[str, tuple[Callable[[Path], LoadedSystems], str, int]] = {
    "a.xyz": (read_molecules, xyz(), 6),
    "a.sdf": (read_molecules, sdf("CCO") + sdf("C[N+](=O)[O-]") + sdf("c1ccccc1"), 3),
    "a.mol2": (read_molecules, mol2("CCO") + mol2("C[N+](=O)[O-]") + mol2("c1ccccc1"), 3),
    "a.cif": (read_crystals, cif(GENERAL, named("P 21/c") + "\n" + GROUP, (6, 7, 8, 90, 95, 90)), 1),
    "named.cif": (read_crystals, cif(SALT, named("F m 3 m"), CUBE), 1),
    "POSCAR": (read_crystals, POSCAR.format(4), 1),
    "a.csv": (read_crystals, table(), 4),
}
"""File -> its reader, its content, and its number of records."""


def packed(folder: Path) -> dict[str, tuple[Callable[[Path], LoadedSystems], bytes]]:
    """Arrays: of this package, of another program, of crystals."""
    places = np.array([[0, 0, 0.1], [0.96, 0, 0], [-0.24, 0.93, 0]])
    Systems.of([System(np.array([8, 1, 1]), places, None, f"w{i}", {"gap": float(i)}) for i in range(4)]).save(
        folder / "m.npz"
    )
    cell = np.array([4, 4, 4, 90, 90, 90.0])
    Systems.of([System(np.array([55, 17]), np.eye(2, 3) / 2, cell, f"c{i}") for i in range(4)]).save(folder / "c.npz")
    np.savez(folder / "other.npz", R=np.tile(places, (4, 1, 1)), z=np.array([8, 1, 1]), E=np.arange(4.0))
    readers = {"m": read_molecules, "c": read_crystals, "other": read_molecules}
    return {f"{name}.npz": (reader, (folder / f"{name}.npz").read_bytes()) for name, reader in readers.items()}


class TooSlow(Exception):
    pass


def _too_slow(*_: object) -> None:
    raise TooSlow


@pytest.fixture
def limited() -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, _too_slow)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def counted(reader: Callable[[Path], LoadedSystems], path: Path, content: bytes) -> int | None:
    """The number of records, read or not; None if the file is refused. Any other error fails the test."""
    path.write_bytes(content)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = reader(path)
    except ValueError as error:
        assert type(error) is ValueError and "\n" not in str(error), content
        return None
    except BaseException:
        print(content)
        raise
    finally:
        signal.alarm(0)
    for one in found.systems:
        assert len(one.types) and np.isfinite(one.coordinates).all(), content
    assert all("\n" not in fault for fault in (*found.bad, *found.large)), content
    return len(found.systems) + len(found.bad) + len(found.large)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_damaged_text_is_read_or_refused(name: str, tmp_path: Path, limited: None) -> None:
    reader, text, records = KINDS[name]
    draw = random.Random(name)
    assert counted(reader, tmp_path / name, text.encode()) == records
    outcomes = [counted(reader, tmp_path / name, damaged(draw, text.encode())) for _ in range(FILES)]
    assert sum(outcome == records for outcome in outcomes) > FILES // 10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["m.npz", "c.npz", "other.npz"])
def test_damaged_arrays_are_read_or_refused(name: str, tmp_path: Path, limited: None) -> None:
    reader, content = packed(tmp_path)[name]
    draw = random.Random(name)
    assert counted(reader, tmp_path / name, content) == 4
    for _ in range(FILES // 2):
        counted(reader, tmp_path / name, damaged(draw, content))
    for _ in range(FILES // 2):  # a whole archive of arrays that do not fit
        with np.load(tmp_path / name) if counted(reader, tmp_path / name, content) else pytest.fail() as file:
            arrays = {key: odd(draw, array) for key, array in file.items()}
        np.savez(tmp_path / "odd.npz", **arrays)
        counted(reader, tmp_path / "odd.npz", (tmp_path / "odd.npz").read_bytes())


def odd(draw: random.Random, array: np.ndarray) -> np.ndarray:
    """An array of another type, shape or value, or the same."""
    flat = array.reshape(-1).copy()
    if len(flat) and flat.dtype.kind in "iuf" and draw.random() < 0.3:
        flat[draw.randrange(len(flat))] = draw.choice(
            (0, 1, 2, 255) if flat.dtype.kind != "f" else (np.nan, np.inf, 1e30, -1)
        )
    changed = [flat.reshape(array.shape)] * 8 + [array[:-1] if array.ndim else array, flat, array[None]]
    if array.dtype.kind != "U":
        changed += [array.astype(draw.choice((float, int, str)))] if np.isfinite(array).all() else []
    return draw.choice(changed)


@pytest.mark.slow
def test_a_word_or_a_line_of_one_frame_costs_at_most_that_frame(tmp_path: Path, limited: None) -> None:
    """Damage to the atoms of one frame: six records stay six, and at least five are read."""
    draw = random.Random(0)
    for _ in range(FILES):
        lines = xyz().encode().split(b"\n")
        at = 5 * draw.randrange(6) + draw.randrange(2, 5)
        way = draw.randrange(3)
        if way == 0:
            lines = lines[:at] + lines[at + 1 :]
        elif way == 1:
            lines = [*lines[:at], lines[at], *lines[at:]]
        else:
            words = lines[at].split()
            words[draw.randrange(4)] = draw.choice(("nan", "Qq", "1e400", "x", "0.1.2", "1*^2")).encode()
            lines = [*lines[:at], b" ".join(words), *lines[at + 1 :]]
        content = b"\n".join(lines)
        assert counted(read_molecules, tmp_path / "a.xyz", content) == 6, content
        assert len(read_molecules(tmp_path / "a.xyz").systems) >= 5, content


@pytest.mark.slow
@pytest.mark.parametrize(("name", "records"), [("a.sdf", 3), ("a.csv", 4)])
def test_a_word_of_one_record_costs_at_most_that_record(name: str, records: int, tmp_path: Path, limited: None) -> None:
    draw = random.Random(name)
    reader, text, _ = KINDS[name]
    lines = text.encode().split(b"\n")
    inside = [i for i, row in enumerate(lines) if re.match(rb" +-?\d+\.\d{4} |[A-Z][a-z]?\d [A-Z]|_cell_", row)]
    assert len(inside) >= 20
    for _ in range(FILES // records):
        words = re.split(rb"(\s+)", lines[at := draw.choice(inside)])
        place = draw.choice([i for i, part in enumerate(words) if part.strip()])
        words[place] = draw.choice(("nan", "Qq", "1e400", "x", "0.1.2")).rjust(len(words[place])).encode()
        content = b"\n".join([*lines[:at], b"".join(words), *lines[at + 1 :]])
        assert counted(reader, tmp_path / name, content) == records, content
        assert len(reader(tmp_path / name).systems) >= records - 1, content
