"""What a run asks of network and file system: as one of 512 ranks of `imagenet256-unite-b`, and in real processes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import ranks
from ranks import Counts, Simulation

FILES, CLASSES = 2000, 1000
PARAMETERS = 217_641_000
"""About; `unilatent presets` says 217.64 M."""
WEIGHTS = 4 * PARAMETERS
CHECKPOINT = 2_621_000_000
"""Bytes: weights, EMA weights, and the state of Muon and AdamW."""
SMALL = 64 * 2**10
"""Bytes of plain data that grow with the number of ranks: a few hundred a rank."""

Found = list[dict[str, Counts]]
"""Counts of each phase, of ranks 0 and 1."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    ranks.make_images(folder / "images", FILES, CLASSES)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> Found:
    simulation = Simulation(folder / "run", folder / "images", 512)
    return [simulation.counts(0), simulation.counts(1)]


def test_bytes_are_those_of_the_weights(found: Found) -> None:
    for of in found:
        assert WEIGHTS <= of["start"].bytes < 1.01 * WEIGHTS
        assert CHECKPOINT <= of["resume"].bytes < 1.01 * CHECKPOINT
        assert of["save"].bytes < SMALL
        # float32 gradients once, and the results of Muon in bfloat16
        assert WEIGHTS <= of["step"].bytes < 1.55 * WEIGHTS
        assert of["step"].sent < 2.6 * WEIGHTS


def test_all_ranks_call_the_same_collectives(found: Found) -> None:
    for phase in ranks.PHASES:
        first, other = found[0][phase], found[1][phase]
        assert first.collectives == other.collectives and first.objects == other.objects


def test_one_rank_reads_for_all(found: Found) -> None:
    first, other = found
    assert first["start"].stats > FILES and first["start"].listed >= CLASSES
    assert first["resume"].listed < 10, "no folder is listed again"
    assert first["resume"].read == pytest.approx(CHECKPOINT, rel=1e-3)
    assert first["resume"].hashed == pytest.approx(CHECKPOINT, rel=1e-3), "each byte is hashed once"
    for phase in ("start", "resume"):
        assert other[phase].stats < 10 and other[phase].listed == 0
        assert other[phase].read == other[phase].hashed == 0
    assert other["start"].opened == []
    assert {Path(name).name for name in other["resume"].opened} == {"MANIFEST.json"}, "is it the same checkpoint?"
    assert other["save"].written == 0 and other["save"].opened == []
    assert len([name for name in other["step"].opened if name.endswith(".png")]) == 1024 // 512


@pytest.mark.slow
def test_the_number_of_collectives_does_not_grow_with_ranks(folder: Path, found: Found) -> None:
    """Except that results of Muon are broadcast by each process that has some: at most one for each stack."""
    fewer = Simulation(folder / "run8", folder / "images", 8).counts(0)
    for phase in ranks.PHASES:
        few, many = fewer[phase], found[0][phase]
        assert few.objects == many.objects
        if phase != "step":
            assert few.collectives == many.collectives
            continue
        others = [{k: n for k, n in counts.collectives.items() if k != "broadcast_"} for counts in (few, many)]
        assert others[0] == others[1]
        assert few.collectives["broadcast_"] <= 8 and many.collectives["broadcast_"] <= 32


def of_other_ranks(found: list[dict[str, Any]], phase: str, what: str) -> int:
    return max(counts[phase][what] for counts in found[1:])


@pytest.mark.faults
def test_real_processes_do_not_look_at_the_files_of_the_data(tmp_path: Path) -> None:
    found = ranks.measure_files(tmp_path, 300, 10, 2)
    assert found[0]["start"]["stats"] > 300 and found[0]["start"]["listed"] > 10
    assert found[0]["resume"]["listed"] < 10
    for phase in ("start", "resume"):
        assert of_other_ranks(found, phase, "stats") < 30 and of_other_ranks(found, phase, "listed") == 0


@pytest.mark.faults
def test_real_processes_do_not_read_the_checkpoint(tmp_path: Path) -> None:
    """The first one reads it twice: to check its hashes, and to load it."""
    size, found = ranks.measure_checkpoint(tmp_path, 128, 4, 2)
    assert size > 5_000_000
    assert 2 * size <= found[0]["resume"]["bytes"] < 2.2 * size
    assert of_other_ranks(found, "resume", "bytes") < 0.05 * size


@pytest.mark.faults
def test_one_process_reads_model_and_reference_of_evaluations_and_searches(tmp_path: Path) -> None:
    """The others only read images of the reference. All together they open each image once, for all extractors, and
    at most once more for the classifier, which one process fits: what a process has opened, it remembers."""
    images, found = 60, ranks.measure_commands(tmp_path, 60, 2)
    for name, (first, other) in found.items():
        assert first["model"]["opened"].keys() >= {"config.json", "model.safetensors"}, name
        assert first["reference"]["stats"] > images and first["reference"]["listed"] > 10, name
        assert first["fits"] == (1 if name == "evaluate" else 0), name
        assert other["model"] == {"stats": 0, "listed": 0, "images": 0, "opened": {}}, name
        assert other["reference"]["stats"] == other["reference"]["listed"] == other["fits"] == 0, name
        assert other["reference"]["opened"] == {}, name
        opened = first["reference"]["images"] + other["reference"]["images"]
        assert images <= opened <= (1 + first["fits"]) * images, name
