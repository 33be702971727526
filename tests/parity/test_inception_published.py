"""The FID InceptionV3 compared with torch-fidelity's recorded numbers, and with its network where it is installed."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from inception_state import images, seeded_state
from PIL import Image
from published import published
from torch import Tensor

from unilatent.maths.frechet import frechet_distance_of
from unilatent.nets.inception import RESIZES, SPATIAL_CHANNELS, Features, InceptionV3

GOLDEN = Path(__file__).with_name("inception_golden.json")
PHOTOGRAPHS = Path(__file__).parents[3] / "shared" / "data" / "imagenet_sample_256.zip"
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return seeded_state()


@pytest.fixture(scope="module")
def ours(state: dict[str, Tensor]) -> InceptionV3:
    return InceptionV3(state)


class Theirs:
    """torch-fidelity's network with our weights; sFID's features are read from its block 6d."""

    def __init__(self, state: dict[str, Tensor], folder: Path):
        module = published("torch_fidelity.feature_extractor_inceptionv3")
        file = folder / "weights.pth"
        torch.save(state, file)
        names = ["2048", "logits_unbiased"]
        self.network = module.FeatureExtractorInceptionV3("x", names, feature_extractor_weights_path=str(file))
        file.unlink()
        self.network.Mixed_6d.register_forward_hook(lambda _, __, out: setattr(self, "mixed", out))

    def __call__(self, pixels: Tensor) -> Features:
        with torch.no_grad():
            pool, logits = self.network(pixels)
        spatial = self.mixed[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return Features(pool, spatial, logits)


@pytest.fixture(scope="module")
def theirs(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Theirs:
    return Theirs(state, tmp_path_factory.mktemp("inception"))


def digest(features: Features) -> dict[str, dict[str, list[float] | float]]:
    """Return the first eight values, the sum and the sum of squares of each feature."""
    return {
        name: {
            "first": value[0, :8].tolist(),
            "sum": float(value.double().sum()),
            "squares": float(value.double().square().sum()),
        }
        for name, value in features._asdict().items()
    }


@pytest.mark.parametrize("name", list(images()))
def test_recorded_numbers(ours: InceptionV3, name: str):
    """Recorded from torch-fidelity 0.4.0 by running this file."""
    wanted, found = json.loads(GOLDEN.read_text())[name], digest(ours(images()[name]))
    for feature, numbers in wanted.items():
        assert found[feature]["first"] == pytest.approx(numbers["first"], abs=TOLERANCE)
        assert found[feature]["sum"] == pytest.approx(numbers["sum"], rel=TOLERANCE, abs=TOLERANCE)
        assert found[feature]["squares"] == pytest.approx(numbers["squares"], rel=TOLERANCE)


def test_recorded_numbers_differ_between_images():
    """Weights with equal features for all images would pass any comparison."""
    firsts = torch.tensor([image["pool"]["first"] for image in json.loads(GOLDEN.read_text()).values()])
    assert (firsts.std(0) > 100 * TOLERANCE).sum() >= 5


def test_every_feature(ours: InceptionV3, theirs: Theirs):
    for name, image in images().items():
        for feature, a, b in zip(Features._fields, ours(image), theirs(image), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE, msg=lambda m, f=feature, n=name: f"{n} {f}: {m}")


@pytest.mark.parametrize("size", [(8, 8), (32, 48), (256, 256), (299, 299), (400, 313)])
def test_resizing(size: tuple[int, int]):
    reference = published("torch_fidelity.interpolate_compat_tensorflow").interpolate_bilinear_2d_like_tensorflow1x
    levels = torch.randint(0, 256, (2, 3, *size), generator=torch.Generator().manual_seed(0)).float()
    want = (reference(levels, size=(299, 299), align_corners=False) - 128) / 128
    assert torch.equal(RESIZES["tf1"](levels), want)


@pytest.mark.slow
@pytest.mark.skipif(not PHOTOGRAPHS.is_file(), reason=f"no images at {PHOTOGRAPHS}")
def test_64_photographs(ours: InceptionV3, theirs: Theirs, capsys: pytest.CaptureFixture[str]):
    with zipfile.ZipFile(PHOTOGRAPHS) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))[:64]
        rgb = [np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB")) for name in names]
    photographs = torch.from_numpy(np.stack(rgb)).permute(0, 3, 1, 2)
    assert photographs.shape == (64, 3, 256, 256)
    found = [torch.cat(parts) for parts in zip(*map(ours, photographs.split(16)), strict=True)]
    wanted = [torch.cat(parts) for parts in zip(*map(theirs, photographs.split(16)), strict=True)]
    for feature, a, b in zip(Features._fields, found, wanted, strict=True):
        assert b.std(0).mean() > 5e-3
        torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE)
        with capsys.disabled():
            print(f"\n{feature}: largest difference {float((a - b).abs().max()):.1e}", end="")
    ours_fid, their_fid = (frechet_distance_of(x[0][:32], x[0][32:]) for x in (found, wanted))
    assert ours_fid == pytest.approx(their_fid, rel=TOLERANCE) and ours_fid > 0.1


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        recorded = {name: digest(Theirs(seeded_state(), Path(folder))(image)) for name, image in images().items()}
    GOLDEN.write_text(json.dumps(recorded, indent=1) + "\n")
