"""`unilatent analyze` and `unilatent calibrate`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import Command

from unilatent.analysis.analyze import PARTS
from unilatent.methods.base import LatentModel
from unilatent.presets import preset

QUIET = [
    f"{stage}{setting}"
    for stage in ("", "tokenizer.")
    for setting in ("training.batch_size=16", "training.sample_every=0", "training.evaluate_samples=0",
                    "training.steps=3", "sampling.decoder_steps=2")
]  # fmt: skip


@pytest.fixture
def two_runs(cli: Command, tmp_path: Path) -> list[Path]:
    """A run of both stages with three steps each, and a folder of an untrained model with another loss factor."""
    runs = [tmp_path / "low", tmp_path / "high"]
    assert cli("train", "digits-ul", *QUIET, "tokenizer.method.loss_factor=1", "--out", runs[0]).code == 0
    first = preset("digits-ul").first
    assert first is not None
    LatentModel.build(first.override("method.loss_factor=30").model()).save_pretrained(runs[1])
    return runs


def test_an_analysis_and_a_comparison_of_runs(cli: Command, tmp_path: Path, two_runs: list[Path]) -> None:
    out = tmp_path / "analysis"
    done = cli("analyze", two_runs[0], "--num", 20, "--out", out)
    assert done.code == 0 and "bits per pixel" in done.out and "bits per pixel, base" in done.out
    assert "warning: low: collapse" in done.err, "three steps teach a decoder nothing"
    written = {path.name for path in out.glob("[!.]*")}
    pictures = ("latents", "noise_levels", "sensitivity", "alignment", "compression", "losses", "course",
                "interpolation", "nearest", "trajectory", "trajectory_curve")  # fmt: skip
    assert written == {"analysis.json", *(f"{name}.png" for name in pictures)}, "layers: too few samples"
    found = json.loads((out / "analysis.json").read_text())
    assert found["split"] == "held_out" and found["latents"]["samples"] == 20 and len(found["warnings"]) >= 1
    assert {"bits_per_pixel", "bits_per_subpixel", "bits_per_latent_dimension"} == found["rate"]["bits"].keys()
    bits = found["compression"]["latents"]
    assert bits["prior"]["bits_per_pixel"] == found["rate"]["bits"]["bits_per_pixel"] and bits["time"] == 0
    assert "bits of the latents, at most" in done.out and "bits of the latents, under the prior" in done.out

    both = tmp_path / "both"
    done = cli("analyze", "--compare", *two_runs, "--num", 20, "--data", "digits", "--out", both)
    assert done.code == 0 and (both / "rate_distortion.png").stat().st_size > 1000
    rows = json.loads((both / "comparison.json").read_text())["runs"]
    assert {row["run"]: row["method.loss_factor"] for row in rows} == {"low": 1.0, "high": 30.0}
    assert [row["bits_per_pixel"] for row in rows] == sorted(row["bits_per_pixel"] for row in rows)
    assert (both / "low" / "analysis.json").is_file() and "psnr" in rows[0]


def test_parts_of_an_analysis(cli: Command, tmp_path: Path, run_folder: Path) -> None:
    """Each part alone writes its files and numbers; layers need 50 samples."""
    files = {
        "latents": {"latents.png", "interpolation.png", "nearest.png"},
        "reconstruction": {"sensitivity.png"},
        "rate": set(),
        "alignment": {"alignment.png"},
        "compression": {"compression.png"},
        "layers": {"layers.png"},
        "trajectory": {"trajectory.png", "trajectory_curve.png"},
        "losses": {"losses.png", "course.png"},
    }
    assert set(files) == set(PARTS)
    for name, written in files.items():
        out = tmp_path / name
        done = cli("analyze", run_folder, "--only", name, "--num", 60, "--out", out)
        assert done.code == 0, done.err
        assert {path.name for path in out.glob("[!.]*")} == {"analysis.json", *written}, name
    both = json.loads((tmp_path / "alignment" / "analysis.json").read_text())
    assert both["alignment"]["shared"] and both["latents"] is None
    bits = json.loads((tmp_path / "compression" / "analysis.json").read_text())["compression"]["latents"]
    assert bits["time"] == 0.3 and bits["gaussian"]["bits_per_sample"] > 0 and bits["prior"] is None
    losses = json.loads((tmp_path / "losses" / "analysis.json").read_text())
    assert losses["gradients"][0]["parts"] == ["reconstruction", "flow"] and losses["course"]["losses"]["flow"][0]
    for only, words in (("alignement", "'alignement' is unknown; use latents"), ("", "'' is unknown")):
        refused = cli("analyze", run_folder, "--only", only or " ", "--out", tmp_path / "x")
        assert refused.code == 2 and words in refused.err.replace("\n", " "), refused.err
    refused = cli("analyze", "--compare", run_folder, run_folder / "model", "--only", "rate", "--out", tmp_path / "y")
    assert refused.code == 2 and "--compare needs latents, reconstruction, rate" in refused.err.replace("\n", " ")


def test_a_model_without_a_rate_says_so(cli: Command, tmp_path: Path, run_folder: Path) -> None:
    done = cli("analyze", run_folder, "--num", 8, "--out", tmp_path / "a")
    assert done.code == 0 and "no bitrate" in done.out and not (tmp_path / "a" / "noise_levels.png").exists()
    refused = cli("analyze", "--compare", run_folder, run_folder / "model", "--num", 8, "--data", "digits",
                  "--out", tmp_path / "b")  # fmt: skip
    assert refused.code == 2 and "no rate" in refused.err


def test_what_analyze_refuses(cli: Command, tmp_path: Path, run_folder: Path) -> None:
    for arguments, words in (
        ([run_folder, run_folder], "add --compare"),
        (["--compare", run_folder], "at least two"),
        ([run_folder / "model"], "--data"),
    ):
        refused = cli("analyze", *arguments, "--out", tmp_path / "x")
        assert refused.code == 2 and words in refused.err and refused.err.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_a_calibration_is_kept_resumed_and_ends_with_the_override(cli: Command, tmp_path: Path) -> None:
    out = tmp_path / "calibration"
    command = ["calibrate", "digits-ul", *QUIET, "--bits-per-pixel", 0.001, "--over", "latent_logsnr", "--steps", 2,
               "--trials", 2, "--num", 8, "--out", out]  # fmt: skip
    done = cli(*command)
    assert done.code == 0, done.err
    override = (out / "override.txt").read_text().strip()
    assert re.fullmatch(r"tokenizer\.method\.latent_logsnr=[-\d.]+", override)
    assert done.out.rstrip().endswith(f"train with: unilatent train digits-ul {override}")
    found = json.loads((out / "calibration.json").read_text())
    settings = [trial["setting"] for trial in found["trials"]]
    assert settings == [5.0, 4.0], "the rate falls with the log-SNR of z_0, and the target is below"
    values = [trial["value"] for trial in found["trials"]]
    assert values[1] < values[0] and not found["chosen"]["within_tolerance"] and found["chosen"]["setting"] == 4.0
    assert (out / "calibration.png").is_file()
    weights = out / "latent_logsnr_5" / "model" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    again = cli(*command)
    assert again.code == 0 and again.out.count("(stored)") == 2 and weights.stat().st_mtime_ns == before
    assert json.loads((out / "calibration.json").read_text()) == found
    fewer = cli(*[6 if word == 8 else word for word in command])
    assert fewer.code == 0 and "(stored)" not in fewer.out and weights.stat().st_mtime_ns == before
    anew = json.loads((out / "calibration.json").read_text())["trials"]
    assert [t["setting"] for t in anew] == settings and anew[0]["value"] != values[0], "measured on other samples"
    assert json.loads((out / "latent_logsnr_5" / "analysis.json").read_text())["num"] == 6
    other = cli(*command, "tokenizer.method.bias=3")
    assert other.code == 2 and "method.bias: 3.0" in other.err and "another --out" in other.err


def test_a_dial_of_whole_numbers_is_turned_by_whole_numbers(cli: Command, tmp_path: Path) -> None:
    """More channels give more bits: 4, 8, then a value between; each can be built."""
    out = tmp_path / "calibration"
    done = cli("calibrate", "digits-ul", *QUIET, "--bits-per-pixel", 0.02, "--over", "latent_channels", "--steps", 1,
               "--trials", 3, "--num", 4, "--tolerance", 0, "--out", out)  # fmt: skip
    assert done.code == 0, done.err
    settings = [trial["setting"] for trial in json.loads((out / "calibration.json").read_text())["trials"]]
    assert len(settings) >= 2 and all(type(n) is int and n >= 1 for n in settings), settings
    assert re.fullmatch(r"tokenizer\.method\.latent_channels=\d+\n", (out / "override.txt").read_text())


def test_what_calibrate_refuses(cli: Command, tmp_path: Path) -> None:
    for arguments, words in (
        (["digits-ul"], "give one of the two"),
        (["digits-ul", "--psnr", 20, "--bits-per-pixel", 1], "give one of the two"),
        (["digits-ul", "--psnr", 20, "--over", "path"], "is not a number"),
        (["digits", "--psnr", 20], "'loss_factor' is not a number of digits's method"),
    ):
        refused = cli("calibrate", *arguments, "--out", tmp_path / "x")
        assert refused.code == 2 and words in refused.err, refused.err
    assert not (tmp_path / "x").exists()
