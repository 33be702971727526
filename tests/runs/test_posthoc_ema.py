"""EMA weights of several lengths from one run: tracked, stored, resumed bitwise, and turned into models."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import Command
from safetensors.torch import load_file, save_file
from test_processes import TORCHRUN, environment, port, train
from test_training import assert_same, digits, state
from torch import Tensor

import unilatent
from unilatent.config import ConfigError
from unilatent.maths.ema_profiles import PowerProfile, gamma_of
from unilatent.runs.snapshots import EMASnapshots, snapshot_path
from unilatent.training.ema import PowerEMAs
from unilatent.training.trainer import Trainer

PROFILES = ("training.ema_profiles=[0.05,0.1]",)


def averages(run: Path, step: int) -> dict[str, Tensor]:
    return load_file(run / "checkpoints" / f"step_{step:08d}" / "ema_profiles.safetensors")


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quick run, with two profiles and a snapshot every second step."""
    folder = tmp_path_factory.mktemp("averaged") / "run"
    Trainer(digits(*PROFILES, "training.ema_snapshot_every=2"), folder).fit()
    return folder


def test_ema_profiles_change_nothing_else(averaged: Path, run_folder: Path) -> None:
    assert_same(state(averaged, 12), state(run_folder, 12))
    assert not (run_folder / "ema").exists() and not list(run_folder.rglob("ema_profiles*"))
    assert sorted(path.name for path in (averaged / "ema").iterdir()) == [
        f"step_{step:08d}.safetensors" for step in range(2, 13, 2)
    ]
    assert_same(load_file(snapshot_path(averaged, 8)), averages(averaged, 8))


def test_tracked_weights_follow_the_profile(tmp_path: Path) -> None:
    """Compared with the sum over the weights of all steps, in float64."""
    trainer = Trainer(digits(*PROFILES, "training.steps=6"), tmp_path / "run")
    seen: list[dict[str, Tensor]] = []
    update = PowerEMAs.update

    def watched(self: PowerEMAs, model: torch.nn.Module, step: int) -> None:
        update(self, model, step)
        seen.append({name: p.detach().double().clone() for name, p in model.named_parameters()})

    trainer.state.power_emas.update = watched.__get__(trainer.state.power_emas)  # type: ignore[method-assign]
    trainer.fit()
    for length, average in trainer.state.power_emas.averages.items():
        share = ((torch.arange(7).double() / 6) ** (gamma_of(length) + 1)).diff()
        for name, tensor in average.weights.items():
            direct = sum(s * weights[name] for s, weights in zip(share, seen, strict=True))
            assert torch.allclose(tensor.double(), direct, rtol=1e-5, atol=1e-6)


@pytest.mark.covers("F24")
def test_resume_is_bitwise(tmp_path: Path, averaged: Path) -> None:
    """Killed after step 10 with checkpoint 4 the newest: later snapshots are removed and made again, the same."""
    parts = tmp_path / "parts"
    shutil.copytree(averaged, parts)
    for step in (8, 12):
        shutil.rmtree(parts / "checkpoints" / f"step_{step:08d}")
    shutil.rmtree(parts / "model")
    damaged = snapshot_path(parts, 10)
    save_file({"of": torch.zeros(1)}, damaged)
    (parts / "ema" / "step_00000012.safetensors.tmp-1").write_bytes(b"half")
    trainer = Trainer(digits(*PROFILES, "training.ema_snapshot_every=2"), parts, resume="auto")
    trainer._open_folder()
    assert sorted(path.name for path in (parts / "ema").iterdir()) == [
        "step_00000002.safetensors", "step_00000004.safetensors",
    ]  # fmt: skip
    trainer.fit()
    assert_same(state(averaged, 12), state(parts, 12))
    assert_same(averages(averaged, 12), averages(parts, 12))
    for step in range(2, 13, 2):
        assert_same(load_file(snapshot_path(averaged, step)), load_file(snapshot_path(parts, step)))


def test_a_run_with_other_profiles_cannot_be_resumed(averaged: Path, run_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"training\.ema_profiles: \[\], but .* \[0\.05, 0\.1\]; keep it"):
        Trainer(digits(), averaged, resume="auto")
    with pytest.raises(ConfigError, match=r"training\.ema_profiles: \[0\.05, 0\.1\], but .* \[\]; keep it"):
        Trainer(digits(*PROFILES), run_folder, resume="auto")


@pytest.mark.parametrize("lengths", ["[0.05,0.05]", "[0]", "[0.3]"])
def test_invalid_lengths_are_refused(lengths: str) -> None:
    with pytest.raises(ConfigError, match=r"training\.ema_profiles.*0\.2887"):
        digits(f"training.ema_profiles={lengths}")


def test_their_memory_is_counted(tmp_path: Path) -> None:
    trainer = Trainer(digits(*PROFILES), tmp_path / "run")
    tensors = [*trainer.state.ema.weights.values(), *trainer.state.power_emas.weights.values()]
    assert trainer.memory.average == sum(tensor.nbytes for tensor in tensors)


def test_a_stored_length_is_returned_as_it_was_stored(averaged: Path) -> None:
    for length in (0.05, 0.1):
        weights, error = EMASnapshots(averaged, 8).make(PowerProfile(gamma_of(length), 8))
        stored = averages(averaged, 8)
        assert error == 0
        assert_same(weights, {name: stored[f"{length}/{name}"] for name in weights})


def test_other_lengths_are_near_directly_tracked_ones(tmp_path: Path, averaged: Path) -> None:
    """A run that tracks 0.07 itself; relative to the distance between the EMA weights."""
    direct = tmp_path / "direct"
    Trainer(digits("training.ema_profiles=[0.07]"), direct).fit()
    truth = {name.partition("/")[2]: tensor for name, tensor in averages(direct, 12).items()}
    weights, error = EMASnapshots(averaged).make(PowerProfile(gamma_of(0.07), 12))
    short, _ = EMASnapshots(averaged).make(PowerProfile(gamma_of(0.05), 12))

    def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
        return float(sum((a[name] - b[name]).square().sum() for name in truth)) ** 0.5

    size = sum(tensor.square().sum() for tensor in truth.values()) ** 0.5
    assert 0 < error < 0.1 and distance(weights, truth) < 0.01 * size
    assert distance(weights, truth) < 0.2 * distance(short, truth)


def test_the_command_writes_a_model(tmp_path: Path, averaged: Path, cli: Command) -> None:
    out = tmp_path / "model"
    done = cli("ema", averaged, "--sigma-rel", "0.08", "--out", out)
    assert done.code == 0 and "step 12, sigma_rel 0.08, from 6 snapshots; profile error" in done.out, done.err
    model = unilatent.load(out)
    weights, _ = EMASnapshots(averaged).make(PowerProfile(gamma_of(0.08), 12))
    assert_same({name: p.data for name, p in model.named_parameters()}, weights)
    assert model.fingerprint() != unilatent.load(averaged).fingerprint()
    assert unilatent.sample(model, num=2, num_inference_steps=2).shape == (2, 1, 8, 8)


BAD = [
    (("--sigma-rel", "0.5"), "sigma_rel: 0.5 is no"),
    (("--sigma-rel", "0.1", "--step", "7"), "--step: 7 has no snapshot; there are 2, 4"),
]


@pytest.mark.parametrize(("options", "words"), BAD)
def test_the_command_refuses(tmp_path: Path, averaged: Path, cli: Command, options: tuple, words: str) -> None:
    done = cli("ema", averaged, *options, "--out", tmp_path / "model")
    assert done.code == 2 and words in done.err and not (tmp_path / "model").exists()


def test_a_run_without_snapshots_is_refused_with_the_fix(tmp_path: Path, run_folder: Path, cli: Command) -> None:
    done = cli("ema", run_folder, "--sigma-rel", "0.1", "--out", tmp_path / "model")
    assert done.code == 2 and "training.ema_profiles=[0.05,0.1]" in done.err


def test_a_damaged_snapshot_is_named(tmp_path: Path, averaged: Path, cli: Command) -> None:
    run = tmp_path / "run"
    shutil.copytree(averaged, run)
    snapshot_path(run, 6).write_bytes(b"not this")
    done = cli("ema", run, "--sigma-rel", "0.08", "--out", tmp_path / "model")
    assert done.code == 2 and "step_00000006.safetensors: damaged" in done.err


SEARCH = ("--metric", "frechet_pixels", "--num", "20", "--steps", "2")


def test_search_over_ema_lengths(averaged: Path, tmp_path: Path, cli: Command) -> None:
    """Each length is evaluated once, as the model that `unilatent ema` writes."""
    line = ("search", averaged, "--over", "ema", "--values", "0.05,0.08", *SEARCH, "--out", tmp_path / "eval")
    done = cli(*line)
    assert done.code == 0 and f"unilatent ema {averaged} --sigma-rel 0.0" in done.out, done.err
    path = next((tmp_path / "eval").glob("search-*.json"))
    content = json.loads(path.read_text())
    assert [point["ema"] for point in content["points"]] == [0.05, 0.08]
    assert content["points"][0]["profile_error"] == 0 < content["points"][1]["profile_error"]
    assert path.with_suffix(".png").is_file()
    cli("ema", averaged, "--sigma-rel", "0.08", "--out", tmp_path / "model")
    from unilatent.evaluation.evaluate import EvaluationRequest, Evaluator
    from unilatent.evaluation.reference import splits_of

    model = unilatent.load(tmp_path / "model")
    request = EvaluationRequest(metrics=("frechet_pixels",), num_samples=20)
    evaluator = Evaluator(
        model, splits_of(model.modality, averaged, None), tmp_path / "r", request, num_inference_steps=2
    )
    again = evaluator.run().find("frechet_pixels")
    assert again.row.value == pytest.approx(content["points"][1]["value"], rel=1e-5)
    before = path.read_text()
    assert cli(*line).code == 0 and path.read_text() == before


def test_search_over_guidance(run_folder: Path, tmp_path: Path, cli: Command) -> None:
    out = tmp_path / "eval"
    done = cli("search", run_folder, "--over", "guidance_scale", "--values", "1,3", *SEARCH, "--out", out)
    assert done.code == 0, done.err
    content = json.loads(next(out.glob("search-*.json")).read_text())
    best = content["best"]["guidance_scale"]
    assert {point["guidance_scale"] for point in content["points"]} == {1.0, 3.0}
    assert content["points"][0]["key"].endswith("cfg1") and content["points"][1]["key"].endswith("cfg3")
    line = done.out.strip().splitlines()[-1]
    assert line.startswith(f"unilatent sample {run_folder} ") and f"--guidance-scale {best:g}" in line
    assert cli(*line.split()[1:], "--num", "2", "--out", tmp_path / "samples").code == 0


REFUSED = [
    (("--over", "seed"), "--over: 'seed' is unknown"),
    (("--over", "guidance_scale", "--metric", "psnr"), "--metric psnr: measures reconstructions"),
    (("--over", "guidance_scale", "--metric", "fidd"), "metrics: 'fidd' is unknown"),
    (("--over", "guidance_scale", "--metric", "spread"), "--metric spread: has no better direction"),
    (("--over", "guidance_scale", "--guidance-scale", "2"), "--guidance-scale: is the setting to search over"),
    (("--over", "guidance_interval"), "give --guidance-scale 2"),
    (("--over", "guidance_scale", "--method", "golden"), "golden needs both ends"),
    (("--over", "guidance_scale", "--values", "1,x"), "--values: '1,x' is not a list of numbers"),
    (("--over", "num_inference_steps", "--values", "2.5"), "2.5 is not a valid num_inference_steps"),
    (("--over", "ema", "--values", "0.1"), "no snapshots in ema/"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED)
def test_search_refuses(run_folder: Path, tmp_path: Path, cli: Command, options: tuple, words: str) -> None:
    rest = [] if "--metric" in options else ["--metric", "frechet_pixels"]
    rest += [] if "num_inference_steps" in options else ["--steps", "2"]
    done = cli("search", run_folder, "--num", "20", *rest, *options, "--out", tmp_path / "eval")
    assert done.code == 2 and words in done.err, done.err
    assert not list(tmp_path.rglob("search-*.json"))


@pytest.mark.faults
def test_two_processes_search_as_one_does(averaged: Path, tmp_path: Path) -> None:
    line = ["search", str(averaged), "--over", "ema", "--start", "0.08", "--num", "600", *SEARCH[:2], *SEARCH[4:]]
    alone = [sys.executable, "-m", "unilatent"]
    launcher = [*TORCHRUN, "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", str(port())]
    both = [*launcher, "-m", "--", "unilatent"]  # else torchrun takes --num for an abbreviation of its own options
    curves = []
    for name, command in (("one", alone), ("two", both)):
        out = ["--out", str(tmp_path / name)]
        done = subprocess.run([*command, *line, *out], env=environment(), capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
        content = json.loads(next((tmp_path / name).glob("search-*.json")).read_text())
        curves.append([(point["ema"], point["value"]) for point in content["points"]])
        assert done.stdout.count("unilatent sample model") == 1
    assert [at for at, _ in curves[0]] == [at for at, _ in curves[1]] and len(curves[0]) >= 3
    assert [value for _, value in curves[1]] == pytest.approx([value for _, value in curves[0]], rel=1e-6)


@pytest.mark.faults
def test_sharded_processes_track_the_same(tmp_path: Path, averaged: Path) -> None:
    settings = (*PROFILES, "training.ema_snapshot_every=2", "training.optimizer.muon=false")
    done = train(tmp_path / "two", "training.shard=true", *settings, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    Trainer(digits(*settings), tmp_path / "one").fit()
    one, two = averages(tmp_path / "one", 12), averages(tmp_path / "two", 12)
    assert one.keys() == two.keys() and max(float((one[key] - two[key]).abs().max()) for key in one) < 1e-5
    assert_same(two, load_file(snapshot_path(tmp_path / "two", 12)))
