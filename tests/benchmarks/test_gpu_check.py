"""The GPU check itself, at tiny sizes on the CPU, with no other packages than it says that it needs."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement

from unilatent.modalities.molecule import chemistry

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "numpy", "pydantic", "pyyaml", "safetensors", "huggingface_hub", "rich", "pillow")
"""What the check says it needs."""


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with links to those packages and to what they require, and to no others."""
    folder, names, known = tmp_path_factory.mktemp("bare"), list(PACKAGES), set()
    while names:
        name = names.pop()
        with contextlib.suppress(metadata.PackageNotFoundError):  # of other systems
            distribution = metadata.distribution(name)
            if distribution.name not in known:
                known.add(distribution.name)
                wanted = map(Requirement, distribution.requires or ())
                names += [r.name for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
                for top in {path.parts[0] for path in distribution.files or ()} - {"..", "__pycache__"}:
                    if not (folder / top).exists():
                        (folder / top).symlink_to(Path(str(distribution.locate_file(top))))
    return folder


def check(bare: Path, out: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Exit status, content of the JSON file, and what was printed."""
    done = subprocess.run(
        [sys.executable, "-S", "benchmarks/gpu_check.py", "--tiny", "--device", "cpu", "--out", str(out), *arguments],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{bare}"},
        capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    path = out / "gpu_check.json"
    return done.returncode, json.loads(path.read_text()) if path.is_file() else {}, done.stdout + done.stderr


def lines(content: dict[str, Any], part: str) -> dict[str, Any]:
    return {line["name"]: line for line in content["lines"] if line["part"] == part}


def test_bits_without_other_packages(bare: Path, tmp_path: Path) -> None:
    code, content, printed = check(bare, tmp_path, "--only", "bits", "digits")
    assert code == 0, printed
    found = lines(content, "bits")
    assert found["run twice, as trained"]["value"] == found["stopped, resumed, as trained"]["value"] == 0
    assert found["stopped, resumed, as trained"]["passed"] is True
    assert any(note.startswith("digits: left out: sklearn") for note in content["notes"]), content["notes"]
    assert all(len(line) <= 80 for line in printed[printed.rindex("environment ---") :].splitlines()[:-1])


def test_a_part_that_fails_does_not_lose_the_others(bare: Path, tmp_path: Path) -> None:
    code, content, printed = check(
        bare, tmp_path, "--only", "sampling", "pictures", "--pictures", str(tmp_path / "none")
    )
    assert code == 1, printed
    assert [line["value"] for line in content["lines"] if line["passed"] is False] == ["error"]
    assert any("no such" in note or "none" in note for note in content["notes"] if note.startswith("pictures"))
    assert len(lines(content, "sampling")) == 2 and "Traceback" in (tmp_path / "errors.log").read_text()


def test_molecules_without_rings_are_whole_and_differ() -> None:
    """The molecules of the part `molecules`: a function of the seed, stable by EDM's tables, and as RDKit sees them."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import saturated
    finally:
        sys.path.pop(0)
    made, again, other = saturated.make(40), saturated.make(20), saturated.make(20, seed=1)
    assert (made.coordinates[: len(again.coordinates)] == again.coordinates).all()
    assert again.coordinates.shape != other.coordinates.shape or not (again.coordinates == other.coordinates).all()
    types, positions = torch.zeros(40, 29, dtype=torch.int64), torch.zeros(40, 29, 3)
    for row, one in enumerate(made):
        types[row, : len(one.types)] = torch.from_numpy(one.types.astype("int64"))
        positions[row, : len(one.types)] = torch.from_numpy(one.coordinates)
    assert saturated.stability(types, positions).molecules.all() and saturated.in_one_piece(types, positions).all()
    apart = positions.clone()
    apart[:, 0] += 9  # the first atom leaves
    assert not saturated.in_one_piece(types, apart).any()
    pytest.importorskip("rdkit")
    with chemistry.rdkit().quiet():
        found = [chemistry.perceive(one.types, one.coordinates) for one in made]
    assert all(mol is not None and chemistry.fragments(mol) == 1 and chemistry.rings(mol) == 0 for mol in found)
    assert len({chemistry.plain_smiles(mol) for mol in found}) > 25


def test_the_molecules_part_needs_no_other_packages(bare: Path, tmp_path: Path) -> None:
    code, content, printed = check(bare, tmp_path, "--only", "molecules")
    assert code == 0, printed
    found = lines(content, "molecules")
    assert found["held-out: stable atoms (EDM)"]["value"] == found["held-out: stable, in one piece"]["value"] == 100
    assert found["held-out, 0.05 A of noise: stable, in one piece"]["value"] < 60
    assert found["new: stable, in one piece"]["value"] < 60 and found["steps"]["value"] >= 1
    assert (tmp_path / "molecules" / "samples.png").stat().st_size > 1000


@pytest.mark.slow
def test_all_parts(bare: Path, tmp_path: Path) -> None:
    code, content, printed = check(bare, tmp_path)
    assert code == 0, printed
    parity = lines(content, "parity").values()
    assert len(parity) == 16 and all(line["passed"] for line in parity)
    steps = content["facts"]["steps"]
    assert {title.removesuffix(", compiled") for title in steps} == {
        "imagenet256-unite-b, LPIPS", "imagenet256-unite-b", "imagenet256-unite-l", "imagenet512-ul, stage 1",
        "imagenet512-ul, stage 2", "qm9-unite-s",
    }  # fmt: skip
    assert any(title.endswith("compiled") for title in steps)
    assert all(row["rate"] > 0 and row["share"] > 0 and row["predicted"] > 0 for row in steps.values())
    for name in ("samples.png", "reconstructions.png"):
        assert (tmp_path / "pictures" / name).stat().st_size > 1000
    assert content["facts"]["flop"]["imagenet256-unite-b True"] > content["facts"]["flop"]["imagenet256-unite-b False"]
