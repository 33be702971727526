"""Sets from files: .npz of images and of statistics, externally generated samples, networks from local files."""

from __future__ import annotations

import hashlib
import io
import json
import math
import pickle
import resource
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Command, Outcome
from inception_state import seeded_state
from PIL import Image
from test_evaluate import by_metric, kept, numbers
from test_processes import environment
from test_training import digits

import unilatent
from unilatent.evaluation.reference import find_reference
from unilatent.maths.frechet import frechet_distance, moments
from unilatent.modalities.image import Image as Modality
from unilatent.modalities.image import ImageConfig, ImageData
from unilatent.nets.inception import InceptionV3
from unilatent.nets.lpips import vgg_features
from unilatent.training.trainer import Trainer


def levels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def modality(size: int = 8, channels: int = 1) -> Modality:
    return Modality(ImageConfig(size=size, patch_size=2, channels=channels))


# ---- .npz of images ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("labels", [None, "labels", "arr_1"])
def test_a_npz_is_data_like_any(tmp_path: Path, save, labels: str | None) -> None:
    """Its levels are unchanged, its labels have our name or ADM's, in this process and in a worker."""
    pixels, classes = levels(12, 8, 8, 1), np.arange(12) % 3
    save(tmp_path / "x.npz", arr_0=pixels, **({labels: classes} if labels else {}))
    splits = modality().splits(ImageData(path=str(tmp_path / "x.npz"), held_out=3))
    assert (len(splits.train), len(splits.held_out)) == (9, 3)
    everything = modality().splits(ImageData(path=str(tmp_path / "x.npz"))).train
    for dataset in (everything, pickle.loads(pickle.dumps(everything))):
        for i in (0, 11):
            image, values = dataset[i]
            assert torch.equal((image * 255).round().to(torch.uint8).permute(1, 2, 0), torch.from_numpy(pixels[i]))
            assert values == ({"labels": int(classes[i])} if labels else {})
    assert everything.facts == ({"labels": {"class_names": ("0", "1", "2")}} if labels else {})
    pixels[3, 4, 4] ^= 1
    save(tmp_path / "y.npz", arr_0=pixels, **({labels: classes} if labels else {}))
    other = modality().splits(ImageData(path=str(tmp_path / "y.npz"))).train
    assert other.fingerprint != everything.fingerprint


def test_a_large_npz_stays_on_disk(tmp_path: Path) -> None:
    """Images are memory-mapped; only the headers of the archive are read."""
    np.savez(tmp_path / "x.npz", arr_0=levels(5000, 32, 32, 3))
    dataset = modality(32, 3).splits(ImageData(path=str(tmp_path / "x.npz"))).train
    dataset[4999]
    assert isinstance(dataset.collection._mapped, np.memmap)
    assert b"memmap" not in pickle.dumps(dataset) and len(pickle.dumps(dataset)) < 200_000


REFUSED = {
    "size": ({"arr_0": levels(3, 16, 8, 1)}, "images of 16 x 8 x 1, not 8 x 8 x 1"),
    "channels": ({"arr_0": levels(3, 8, 8, 3)}, "images of 8 x 8 x 3, not 8 x 8 x 1"),
    "float": ({"arr_0": np.zeros((3, 8, 8, 1))}, "arr_0 is float64 (3, 8, 8, 1), not uint8 (N, H, W, C)"),
    "empty": ({"arr_0": levels(0, 8, 8, 1)}, "with N >= 1"),
    "name": ({"images": levels(3, 8, 8, 1)}, "holds images; save images under arr_0"),
    "objects": ({"arr_0": np.array([{}], dtype=object)}, "Python objects, which would have to be unpickled"),
    "labels": ({"arr_0": levels(3, 8, 8, 1), "labels": np.arange(4)}, "labels is int64 (4,), not one class number"),
    "negative": ({"arr_0": levels(3, 8, 8, 1), "labels": np.array([0, -1, 2])}, "not one class number from 0 up"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_other_arrays_are_refused_by_name(cli: Command, run_folder: Path, tmp_path: Path, case: str) -> None:
    arrays, words = REFUSED[case]
    np.savez(tmp_path / "x.npz", **arrays)
    for field, verb in (
        ("data.path", ("train", "digits", f"data.path={tmp_path / 'x.npz'}", "--out", tmp_path / "out")),
        ("input", ("reconstruct", run_folder, tmp_path / "x.npz", "--out", tmp_path / "out")),
        ("--samples", ("evaluate", run_folder, "--samples", tmp_path / "x.npz", "--out", tmp_path / "out")),
    ):
        refused = cli(*verb)
        assert refused.code == 2 and words in refused.err and refused.err.count("\n") == 1, refused
        assert f"{field}: {tmp_path / 'x.npz'}" in refused.err and not (tmp_path / "out").exists()


def test_damaged_archives_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", arr_0=levels(3, 8, 8, 1))
    content = (tmp_path / "x.npz").read_bytes()
    for broken in (b"", content[:100], content[:-30]):
        (tmp_path / "x.npz").write_bytes(broken)
        with pytest.raises(ValueError, match=r"data.path: .*x.npz: not a .npz of numeric arrays"):
            modality().splits(ImageData(path=str(tmp_path / "x.npz")))
    promised = io.BytesIO()  # a header that promises what is not there
    np.lib.format.write_array_header_1_0(promised, {"descr": "|u1", "fortran_order": False, "shape": (10**12, 8, 8, 1)})
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("arr_0.npy", promised.getvalue())
    with pytest.raises(ValueError, match="arr_0 is not a complete array"):
        modality().splits(ImageData(path=str(tmp_path / "x.npz")))


def test_a_npz_is_reconstructed_and_encoded(cli: Command, run_folder: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", arr_0=levels(5, 8, 8, 1))
    done = cli("reconstruct", run_folder, tmp_path / "x.npz", "--batch-size", 2, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    files = json.loads((tmp_path / "out" / "metrics.json").read_text())["files"]
    assert [file["input"] for file in files] == [f"{i:06d}" for i in range(5)]
    assert cli("encode", run_folder, tmp_path / "x.npz", "--out", tmp_path / "latents").code == 0


# ---- external samples ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sampled(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of `unilatent sample`: 40 images, their labels, and a grid."""
    out = tmp_path_factory.mktemp("sampled")
    command = [sys.executable, "-m", "unilatent", "sample", str(run_folder), "--num", "40", "--steps", "2"]
    done = subprocess.run([*command, "--out", str(out)], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def test_our_samples_are_their_own_reference(cli: Command, run_folder: Path, sampled: Path, tmp_path: Path) -> None:
    """Samples, written and read back as reference and as samples: the distance of a set to itself is 0."""
    npz = sampled / "samples.npz"
    done = cli("evaluate", run_folder, "--num", 40, "--steps", 2, "--reference", npz, "--metrics", "frechet_classifier",
               "--out", tmp_path / "a")  # fmt: skip
    assert done.code == 0, done.err
    assert by_metric(numbers(tmp_path / "a"))["frechet_classifier"]["value"] < 1e-6
    assert "reference preprocessing unknown" in " ".join(done.out.replace("│", " ").split())
    done = cli("evaluate", "--samples", sampled, "--reference", npz, "--metrics", "frechet_classifier,classified",
               "--out", tmp_path / "b")  # fmt: skip
    assert done.code == 0, done.err
    found = by_metric(numbers(tmp_path / "b"))
    assert found["frechet_classifier"]["value"] < 1e-6
    assert found["frechet_classifier"]["key"] == "frechet_classifier40/adm/made-elsewhere"
    assert "generated elsewhere, settings unknown" in found["classified"]["cautions"]
    assert found["classified"]["protocol"]["balance"]["labels"]["smallest"] == 4


def test_made_samples_are_judged_as_the_model_s_own_would_be(
    cli: Command, run_folder: Path, sampled: Path, tmp_path: Path
) -> None:
    """As .npz and as a folder of PNG, with the run's data as reference: the same numbers as those of the model."""
    own = cli("evaluate", run_folder, "--num", 40, "--steps", 2, "--out", tmp_path / "own")
    assert own.code == 0, own.err
    want = {key: one["value"] for key, one in by_metric(numbers(tmp_path / "own")).items()}
    folder = tmp_path / "png"
    arrays = np.load(sampled / "samples.npz", allow_pickle=False)
    for i, label in enumerate(arrays["labels"].tolist()):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        (folder / str(label) / f"{i}.png").write_bytes((sampled / f"{i:06d}.png").read_bytes())
    for name, source in (("npz", sampled / "samples.npz"), ("folder", folder)):
        done = cli("evaluate", run_folder, "--samples", source, "--out", tmp_path / name)
        assert done.code == 0, done.err
        assert {key: one["value"] for key, one in by_metric(numbers(tmp_path / name)).items()} == pytest.approx(want)


def test_samples_of_another_size_are_refused(cli: Command, run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for i, side in enumerate((8, 9)):
        Image.fromarray(levels(side, side)).save(tmp_path / "set" / f"{i}.png")
    for model in ((run_folder,), ()):
        refused = cli("evaluate", *model, "--samples", tmp_path / "set", "--reference", "digits", "--metrics",
                      "frechet_pixels,frechet_classifier", "--out", tmp_path / "out")  # fmt: skip
        assert refused.code == 2 and "1.png is 9 x 9, not 8 x 8 (height x width)" in refused.err, refused
    assert "give --reference" in cli("evaluate", "--samples", tmp_path / "set", "--out", tmp_path / "out").err


# ---- networks from local files, and their statistics -----------------------------------------------------------------


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Seeded weights in the published layouts."""
    folder = tmp_path_factory.mktemp("networks")
    torch.save(seeded_state(), folder / "inception.pth")
    generator = torch.Generator().manual_seed(0)
    vgg = {}
    for key, value in vgg_features().state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        vgg[f"features.{key}"] = noise * (math.sqrt(2 / value[0].numel()) if value.ndim == 4 else 0.01)
    torch.save(vgg, folder / "vgg.pth")
    return {"inception": folder / "inception.pth", "lpips": folder / "vgg.pth"}


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step on digits of 32 x 32 in colour."""
    out = tmp_path_factory.mktemp("coloured") / "run"
    sizes = ("modality.size=32", "modality.patch_size=8", "modality.channels=3")
    Trainer(digits("training.steps=1", *sizes), out).fit()
    return out


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, without network access."""
    monkeypatch.setenv("UNILATENT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("UNILATENT_OFFLINE", "1")
    return tmp_path / "cache"


EVERYTHING = "fid,sfid,kid,is,precision,recall,density,coverage,rfid,lpips,psnr"


def judged(cli: Command, run: Path, networks: dict[str, Path], out: Path, metrics: str, *more: object) -> Outcome:
    """Evaluate with ten samples, two reconstructions and six real samples: the minimum for every metric."""
    return cli("evaluate", run, "--num", 10, "--steps", 1, "--num-held-out", 2, "--num-reference", 6, "--metrics",
               metrics, "--inception-weights", networks["inception"], "--lpips-weights", networks["lpips"],
               "--out", out, *more)  # fmt: skip


def test_the_inception_path_from_end_to_end(
    cli: Command, coloured: Path, networks: dict[str, Path], cached: Path, tmp_path: Path
) -> None:
    """With seeded weights: FID is the distance of features of the rounded images; features of real images
    are cached under the weights' hash, and without weights there is no number."""
    done = judged(cli, coloured, networks, tmp_path / "out", EVERYTHING)
    assert done.code == 0, done.err
    found = by_metric(numbers(tmp_path / "out"))
    assert found.keys() == set(EVERYTHING.split(","))
    assert found["fid"]["key"] == "fid10/adm/heun-1/cfg1"
    assert found["fid"]["cautions"] == ["n = 10", "reference n = 6"]
    network = InceptionV3.load(str(networks["inception"]))
    made = unilatent.sample(unilatent.load(coloured, device="cpu"), num=10, num_inference_steps=1)
    features = network((made * 255).round().to(torch.uint8)).pool
    torch.testing.assert_close(kept(tmp_path / "out", "samples")["pool"], features, rtol=1e-3, atol=1e-3)
    (records,) = [path for path in (cached / "references").iterdir() if _rows(path) == 6]
    want = frechet_distance(moments(kept_in(records)["pool"]), moments(features))
    assert found["fid"]["value"] == pytest.approx(want, rel=1e-3)
    assert found["fid"]["protocol"]["weights"] == hashlib.sha256(networks["inception"].read_bytes()).hexdigest()
    assert found["lpips"]["protocol"]["space"] == "lpips" and found["lpips"]["value"] > 0
    missing = cli("evaluate", coloured, "--metrics", "fid", "--out", tmp_path / "none")
    assert missing.code == 2 and "InceptionV3 weights for FID: not found at" in missing.err
    assert "--inception-weights PATH takes a local file" in missing.err and not (tmp_path / "none").exists()


def vision_networks(folder: Path) -> list[object]:
    """Options that name a small DINOv2 and CLIP with seeded weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28}
    transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).save_pretrained(folder / "dinov2")
    config = transformers.CLIPVisionConfig(**sizes, intermediate_size=48, projection_dim=12, patch_size=7)
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(folder / "clip")
    return ["--dinov2", folder / "dinov2", "--clip", folder / "clip"]


def test_distances_in_three_networks_relative_to_real_images(
    cli: Command, coloured: Path, networks: dict[str, Path], cached: Path, tmp_path: Path
) -> None:
    """`fdr` in the table, the file, a report and a search, with the ratio of each network beside the mean."""
    options = [*vision_networks(tmp_path), "--inception-weights", networks["inception"], "--num-reference", 12]
    done = cli("evaluate", coloured, "--num", 8, "--steps", 1, "--num-held-out", 6, "--metrics", "fdr", *options,
               "--out", tmp_path / "out", "--report", tmp_path / "report.md")  # fmt: skip
    assert done.code == 0, done.err
    [found] = numbers(tmp_path / "out")["numbers"]
    assert found["key"] == "fdr6/adm/heun-1/cfg1" and found["beside"] == {"real": 1.0}
    assert list(found["parts"]) == ["Inception", "DINOv2", "CLIP"] and min(found["parts"].values()) > 0
    assert found["value"] == pytest.approx(sum(found["parts"].values()) / 3)
    protocol = found["protocol"]
    assert protocol["space"] == "inception, dinov2, clip" and len(set(protocol["weights"].split(", "))) == 3
    for text in (done.out, (tmp_path / "report.md").read_text()):
        assert "mean of Inception" in " ".join(text.split())
    assert f"--dinov2 {tmp_path / 'dinov2'}" in (tmp_path / "report.md").read_text()
    searched = cli("search", coloured, "--over", "num_inference_steps", "--values", "1,2", "--metric", "fdr",
                   "--num", 8, *options, "--out", tmp_path / "search")  # fmt: skip
    assert searched.code == 0, searched.err
    assert searched.out.count("mean of Inception") == 4, "each value when it is measured, and in the table"
    (path,) = (tmp_path / "search").glob("search-*.json")
    assert all(list(point["parts"]) == list(found["parts"]) for point in json.loads(path.read_text())["points"])


def _rows(folder: Path) -> int:
    return int(json.loads((folder / "header.json").read_text())["rows"])


def kept_in(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    pieces = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


@pytest.mark.slow
def test_statistics_of_a_data_set_stand_for_it(
    cli: Command, coloured: Path, networks: dict[str, Path], cached: Path, tmp_path: Path
) -> None:
    """`unilatent reference` writes ADM's names. FID and sFID equal those computed from the images; other metrics are
    reported missing; another size gives a caution; features of real images are computed once."""
    np.savez(tmp_path / "set.npz", arr_0=levels(6, 32, 32, 3))
    (tmp_path / "pngs").mkdir()
    for i in range(3):
        Image.fromarray(levels(40, 32, 3, seed=i)).save(tmp_path / "pngs" / f"{i}.png")
    for source, size in (("set.npz", "32"), ("pngs", "16")):
        done = cli("reference", tmp_path / source, "--size", size, "--out", tmp_path / f"ref{size}.npz",
                   "--batch-size", 4, "--inception-weights", networks["inception"])  # fmt: skip
        assert done.code == 0 and "statistics of" in done.out, done
    with np.load(tmp_path / "ref32.npz", allow_pickle=False) as file:
        assert {name: file[name].shape for name in file.files if name != "provenance"} == {
            "mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023),
        }  # fmt: skip
        assert json.loads(str(file["provenance"]))["num_samples"] == 6

    def against(name: str, metrics: str) -> dict[str, Any]:
        out = tmp_path / f"against {name}"
        done = judged(cli, coloured, networks, out, metrics, "--reference", tmp_path / name)
        assert done.code == 0, done.err
        missing = "not measured, the data do not allow it: kid" in done.err
        assert missing == name.startswith("ref"), done.err
        return by_metric(numbers(out))

    a, b = (against(name, "fid,sfid,kid") for name in ("set.npz", "ref32.npz"))
    for key in ("fid", "sfid"):
        assert a[key]["value"] == pytest.approx(b[key]["value"], rel=1e-4)
    assert b["fid"]["protocol"]["num_reference"] == 6 and b["fid"]["cautions"] == ["n = 10", "reference n = 6"]
    caution = against("ref16.npz", "fid,kid")["fid"]["cautions"][-1]
    assert caution == "reference of another size (16 x 16 x 3)"
    files = {path: path.stat().st_mtime_ns for path in (cached / "references").rglob("*.safetensors")}
    against("set.npz", "fid,sfid,kid")
    assert files == {path: path.stat().st_mtime_ns for path in (cached / "references").rglob("*.safetensors")}


def test_images_and_statistics_of_one_file_go_together(tmp_path: Path) -> None:
    """ADM's references hold 10,000 images and the moments of all images: distances use these moments."""
    mu, sigma = np.ones(2048), np.eye(2048)
    np.savez(tmp_path / "ref.npz", arr_0=levels(4, 8, 8, 1), mu=mu, sigma=sigma)
    found = find_reference(modality(), str(tmp_path / "ref.npz"))
    assert found.dataset is not None and len(found.dataset) == 4 and list(found.moments) == ["pool"]
    assert found.resolution == (8, 8, 1) and found.preprocessing is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--size", "big", "--out", "r.npz"), "--size: 'big' is not a size"),
     (("--size", "8", "--out", "r.txt"), "ends in .txt; name a .npz file"),
     (("--size", "8", "--out", "r.npz", "--inception-weights", "/nowhere"), "/nowhere")],
)  # fmt: skip
def test_reference_refuses(cli: Command, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    np.savez(tmp_path / "x.npz", arr_0=levels(4, 8, 8, 3))
    refused = cli("reference", tmp_path / "x.npz", *arguments)
    assert refused.code == 2 and message in refused.err and refused.err.count("\n") == 1, refused


# ---- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_samples(run_folder: Path, tmp_path: Path) -> None:
    """20,000 samples need less than 10 % more memory than 1,000 (docs/benchmarks.md)."""
    code = (
        "import resource, sys; from unilatent.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)\n"
    )
    peaks = []
    for num in ("1000", "20000"):
        arguments = ["evaluate", str(run_folder), "--num", num, "--steps", "1", "--solver", "euler", "--device", "cpu"]
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments, "--out", str(tmp_path / num)], env=environment(),
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        peaks.append(int(done.stderr.split()[-1]))
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss and peaks[1] < 1.1 * peaks[0], peaks
