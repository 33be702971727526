"""Every command on a real run, and every refusal: one line, exit code 2, nothing written."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUICK, Command
from PIL import Image

import unilatent
import unilatent.cli
from unilatent.outputs import RECORD
from unilatent.presets import preset
from unilatent.training.trainer import Trainer


def images(folder: Path, classes: int = 2, each: int = 3, size: int = 8) -> Path:
    """A folder of class folders of grey noise."""
    rng = np.random.default_rng(0)
    for c in range(classes):
        (folder / f"class{c}").mkdir(parents=True)
        for i in range(each):
            Image.fromarray(rng.integers(0, 256, (size, size), np.uint8)).save(folder / f"class{c}" / f"{i}.png")
    return folder


def test_sample(cli: Command, run_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "samples"
    done = cli("sample", run_folder, "--num", 5, "--labels", "3-4", "--steps", 2, "--solver", "euler", "--out", out)
    assert done.code == 0, done.err
    assert {p.name for p in out.iterdir()} == {
        RECORD, "grid.png", "samples.npz", "sampling.json", *(f"{i:06d}.png" for i in range(5)),
    }  # fmt: skip
    arrays = np.load(out / "samples.npz", allow_pickle=False)
    assert arrays["arr_0"].shape == (5, 8, 8, 1) and arrays["arr_0"].dtype == np.uint8
    assert arrays["labels"].tolist() == [3, 4, 3, 4, 3]
    np.testing.assert_array_equal(np.asarray(Image.open(out / "000002.png")), arrays["arr_0"][2, :, :, 0])
    assert json.loads((out / "sampling.json").read_text())["solver"] == "euler"


def test_sample_file_is_the_same_for_any_batch_size(cli: Command, run_folder: Path, tmp_path: Path) -> None:
    for size in (2, 64):
        assert (
            cli(
                "sample", run_folder, "--num", 5, "--steps", 2, "--batch-size", size, "--out", tmp_path / str(size)
            ).code
            == 0
        )
    a, b = (np.load(tmp_path / str(size) / "samples.npz")["arr_0"].astype(int) for size in (2, 64))
    assert np.abs(a - b).max() <= 1


def test_reconstruct(cli: Command, run_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = cli("reconstruct", run_folder, images(tmp_path / "in"), "--out", out)
    assert done.code == 0, done.err
    record = json.loads((out / "metrics.json").read_text())
    assert record["num"] == 6 and record["files"][0]["input"].endswith("class0/0.png")
    original = np.asarray(Image.open(tmp_path / "in" / "class0" / "0.png")) / 255
    again = np.asarray(Image.open(out / "000000.png")) / 255
    psnr = -10 * np.log10(((original - again) ** 2).mean())
    assert record["files"][0]["psnr"] == pytest.approx(psnr, abs=0.1)
    assert (out / "side_by_side.png").exists()


def test_encode_resumes_and_decodes(cli: Command, run_folder: Path, tmp_path: Path) -> None:
    source, latents = images(tmp_path / "in", each=5), tmp_path / "latents"
    run = ("encode", run_folder, source, "--out", latents, "--shard-size", 4, "--batch-size", 3)
    assert cli(*run).code == 0
    files = sorted(p.name for p in latents.iterdir())
    assert files == [RECORD, "index.json", *(f"latents_{i:05d}.safetensors" for i in range(3))]
    before = {p.name: p.read_bytes() for p in latents.glob("*.safetensors")}
    # As if the process had died after the first shard.
    index = json.loads((latents / "index.json").read_text())
    (latents / "latents_00002.safetensors").unlink()
    (latents / "latents_00001.safetensors").unlink()
    (latents / "index.json").write_text(
        json.dumps({**index, "shards": index["shards"][:1], "names": index["names"][:4]})
    )
    again = cli(*run)
    assert again.code == 0 and "4 of them already encoded" in again.out
    for path in latents.glob("*.safetensors"):
        assert path.read_bytes() == before[path.name]
    done = cli("decode", run_folder, latents, "--out", tmp_path / "decoded")
    assert done.code == 0 and len(list((tmp_path / "decoded").glob("*.png"))) == 10
    refused = cli("encode", run_folder, source, "--out", latents, "--shard-size", 4, "--seed", 1)
    assert refused.code == 2 and "another seed" in refused.err


@pytest.mark.covers("F31")
def test_decode_refuses_the_latents_of_another_model(cli: Command, run_folder: Path, tmp_path: Path) -> None:
    """Latents of other weights of the encoder: refused by fingerprint. Another decoder of the same latents decodes."""
    other, sharpened = tmp_path / "other", tmp_path / "sharpened"
    model = unilatent.load(run_folder, device="cpu")
    model.decoder.out.bias.data += 1
    model.save_pretrained(sharpened)
    model.generative_encoder.latent_in.weight.data += 1
    model.save_pretrained(other)
    assert cli("encode", run_folder, images(tmp_path / "in"), "--out", tmp_path / "latents").code == 0
    assert cli("decode", sharpened, tmp_path / "latents", "--out", tmp_path / "sharp").code == 0
    refused = cli("decode", other, tmp_path / "latents", "--out", tmp_path / "decoded")
    assert refused.code == 2 and "latents of another model" in refused.err and not (tmp_path / "decoded").exists()


def test_presets_config_and_doctor(cli: Command, tmp_path: Path) -> None:
    listed = cli("presets")
    assert listed.code == 0 and "imagenet256-unite-xl" in listed.out and "217.64 M" in listed.out
    assert "unilatent[text]" in listed.out.replace("\n", "")
    shown = cli("config", "show", "digits", "seed=5")
    assert shown.code == 0 and "seed: 5" in shown.out
    file = tmp_path / "run.yaml"
    file.write_text(shown.out)
    assert cli("config", "show", file).out == shown.out
    file.write_text("preset: digits\nmethod:\n  flow_draws: 5\n")
    assert "flow_draws: 5" in cli("config", "show", file).out
    doctor = cli("doctor")
    assert doctor.code == 0 and "torch" in doctor.out


def test_dry_run_writes_nothing(cli: Command, tmp_path: Path) -> None:
    done = cli("train", "digits", "--dry-run", "--out", tmp_path / "run")
    assert done.code == 0 and "parameters" in done.out and not (tmp_path / "run").exists()


def test_resume_with_the_option_names_of_other_trainers(cli: Command, run_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run_folder, copy)
    done = cli("train", "digits", *QUICK, "--output_dir", copy, "--resume_from_checkpoint", "latest")
    assert done.code == 0 and "resumed from" in done.err


TRAIN = [
    (("digitz",), "preset 'digitz' is unknown; did you mean 'digits'?"),
    (("digits", "training.stepz=3"), "training.stepz: unknown field; did you mean 'steps'?"),
    (("digits", "method.decoder.widht=3"), "method.decoder.widht: unknown field; did you mean 'width'?"),
    (("digits", "training.steps=lots"), "training.steps: 'lots' cannot be used"),
    (("digits", "training.steps"), "is not KEY=VALUE"),
    (("cifar10-unite-s",), "data.path: not set; give a folder or .zip of images"),
    (("digits", "modality.size=9"), "modality.size: 9 is not a multiple of patch_size 4; nearest that works: 8 or 12"),
    (("digits", "method.generative_encoder.heads=3"), "width 64 is not divisible by heads 3"),
    (("digits", "data.path={missing}"), "data.path: {missing} does not exist"),
    (("digits", "data.path={empty}"), "data.path: {empty} holds no images"),
    (("digits", "data.path={flat}", "data.held_out=0"), "no labels (for images: one folder per class)"),
    (("digits", "data.path={broken}", "data.held_out=0", "training.bad_samples=0"), "x.png: cannot be decoded"),
    (("digits", "data.path={tiny}", "data.held_out=0"), "is smaller than a patch (4)"),
    (("digits", "data.held_out=5000"), "held_out"),
    (("digits", "--resume", "{missing}"), "{missing}: no such checkpoint"),
]


@pytest.mark.parametrize(("arguments", "message"), TRAIN, ids=[message[:40] for _, message in TRAIN])
def test_train_refuses(cli: Command, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    places = {name: str(tmp_path / name) for name in ("missing", "empty", "flat", "broken", "tiny")}
    (tmp_path / "empty").mkdir()
    images(tmp_path / "c")
    shutil.copytree(tmp_path / "c" / "class0", tmp_path / "flat")
    (images(tmp_path / "broken", each=1) / "class0" / "x.png").write_text("<html>")
    images(tmp_path / "tiny", size=1)
    out = tmp_path / "run"
    refused = cli("train", *(a.format(**places) for a in arguments), "--out", out)
    assert refused.code == 2, refused
    assert message.format(**places) in refused.err and refused.err.count("\n") == 1, refused.err
    assert refused.err.startswith("error: ") and not out.exists()


SAMPLE = [
    (("--label", "12"), "labels: 12 is out of range; this model has classes 0 to 9"),
    (("--labels", "5-2"), "labels: 5-2 runs backwards"),
    (("--label", "zebra"), "labels: 'zebra' is neither a class number"),
    (("--labels", "0-99999999999"), "labels: 99999999999 is out of range"),
    (("--guidance-scale", "-1"), "guidance_scale: -1.0 cannot be used"),
    (("--guidance-interval", "0.9", "0.1"), "low and high must satisfy"),
    (("--steps", "0"), "num_inference_steps: 0 cannot be used"),
    (("--solver", "rk4"), "solver: 'rk4' cannot be used"),
    (("--num", "0"), "num: 0 must be at least 1"),
    (("--precision", "fp8"), "--precision: 'fp8' is unknown"),
    (("--nun", "3"), "No such option: --nun"),
]


@pytest.mark.parametrize(("arguments", "message"), SAMPLE, ids=[message[:40] for _, message in SAMPLE])
def test_sample_refuses(
    cli: Command, run_folder: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    refused = cli("sample", run_folder, *arguments, "--out", tmp_path / "out")
    assert refused.code == 2 and message in refused.err, refused
    assert refused.err.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.covers("F18")
def test_broken_models_are_named(cli: Command, run_folder: Path, tmp_path: Path) -> None:
    """Model folders without configuration, truncated, of other sizes, garbled: one line each."""

    def refusal(name: str) -> str:
        done = cli("sample", tmp_path / name, "--out", tmp_path / "out")
        assert done.code == 2 and done.err.count("\n") == 1 and not (tmp_path / "out").exists()
        return done.err

    for name in ("no_config", "truncated", "other", "garbled"):
        shutil.copytree(run_folder / "model", tmp_path / name)
    (tmp_path / "no_config" / "config.json").unlink()
    assert "no config.json" in refusal("no_config")
    weights = tmp_path / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    assert "model.safetensors: damaged" in refusal("truncated")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["method"]["generative_encoder"]["width"] = 32
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    assert "has other shapes" in refusal("other")
    (tmp_path / "garbled" / "config.json").write_text("{")
    assert "not a model configuration" in refusal("garbled")
    assert "no such folder; give" in refusal("nowhere/at/all")
    assert f"did you mean {tmp_path / 'garbled'}?" in refusal("garbeld"), "a letter's slip"


@pytest.mark.covers("F05")
def test_out_folders_are_protected(cli: Command, run_folder: Path, tmp_path: Path) -> None:
    """An output folder that cannot be written, or holds a run: refused before anything is written."""
    assert "holds a run already" in cli("train", "digits", *QUICK, "--out", run_folder).err
    (tmp_path / "file").write_text("")
    for verb in (("train", "digits", *QUICK), ("sample", run_folder, "--num", 1, "--steps", 1)):
        refused = cli(*verb, "--out", tmp_path / "file" / "sub")
        assert refused.code == 2 and "cannot be written" in refused.err, refused
    changed = cli("train", "digits", *QUICK, "--resume", "auto", "--out", run_folder, "method.decoder.width=32")
    assert changed.code == 2 and "method.decoder.width: 32, but the checkpoint has 64" in changed.err


@pytest.mark.covers("F39")
def test_load_takes_runs_models_and_checkpoints(run_folder: Path, tmp_path: Path) -> None:
    """A run, its model, its checkpoint and an unfinished run load as the same model."""
    whole = unilatent.load(run_folder, device="cpu")
    part = unilatent.load(run_folder / "checkpoints" / "step_00000012", device="cpu")
    assert whole.fingerprint() == part.fingerprint()
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run_folder, unfinished)
    shutil.rmtree(unfinished / "model")
    assert unilatent.load(unfinished, device="cpu").fingerprint() == whole.fingerprint()
    images = unilatent.sample(whole, num=3, labels=[3], num_inference_steps=2, seed=0)
    assert images.shape == (3, 1, 8, 8) and images.min() >= 0 and images.max() <= 1
    z = whole.encode(images)
    assert z.shape == (3, 4, 16) and whole.decode(z).shape == images.shape
    with pytest.raises(ValueError, match="no such condition; it takes labels"):
        unilatent.sample(whole, num=1, prompt="a three")
    torch.testing.assert_close(unilatent.reconstruct(whole, images), whole.decode(whole.encode(images)))


def test_push_to_hub_uploads_weights_and_configuration_alone(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded: dict[str, set[str]] = {}

    class Hub:
        def __init__(self, *args: object, **kwargs: object) -> None: ...

        def create_repo(self, repo_id: str, **kwargs: object) -> object:
            return type("Repo", (), {"repo_id": repo_id})()

        def upload_folder(self, repo_id: str, folder_path: Path, **kwargs: object) -> str:
            uploaded[repo_id] = {path.name for path in Path(folder_path).iterdir()}
            return "done"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Hub)
    unilatent.load(run_folder, device="cpu").push_to_hub("somebody/digits")
    assert {"config.json", "model.safetensors"} <= uploaded["somebody/digits"] <= {
        "config.json", "model.safetensors", "README.md", "record.json"
    }  # fmt: skip


def test_a_run_is_reproduced_by_its_own_config(cli: Command, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(cli("config", "show", "digits", "conditions={}").out)
    assert cli("config", "show", file).out == file.read_text()


def test_samples_of_an_earlier_command_are_removed(cli: Command, run_folder: Path, tmp_path: Path) -> None:
    for num in (4, 2):
        assert cli("sample", run_folder, "--num", num, "--steps", 1, "--out", tmp_path / "out").code == 0
    assert sorted(p.name for p in (tmp_path / "out").glob("0*.png")) == ["000000.png", "000001.png"]


def test_an_error_of_a_library_is_not_reported_as_bad_input(
    cli: Command, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ValueError out of a library is a failure with its traceback, not one line about the user's input."""
    monkeypatch.setattr("unilatent.sampling.times.grid", lambda *_: np.zeros(3).reshape(7))
    with pytest.raises(ValueError, match="reshape"):
        unilatent.cli.main(["sample", str(run_folder)])


def test_runs_and_checkpoints_are_listed_verified_and_pruned(cli: Command, run_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "runs" / "digits"
    shutil.copytree(run_folder, copy)
    listed = cli("runs", tmp_path / "runs")
    assert listed.code == 0 and "finished" in listed.out and "12" in listed.out
    shutil.rmtree(copy / "model")
    assert "stopped" in cli("runs", tmp_path / "runs").out
    assert cli("runs", tmp_path / "nothing").code == 2
    names = [line.split()[0] for line in cli("ckpt", "ls", copy).out.splitlines()]
    assert names == ["step_00000004", "step_00000008", "step_00000012"]
    assert cli("ckpt", "verify", copy).code == 0
    (copy / "checkpoints" / "step_00000012" / "state.json").write_text("{}")
    damaged = cli("ckpt", "verify", copy)
    assert damaged.code == 1 and "step_00000012  DAMAGED" in damaged.out and "state.json" in damaged.out
    pruned = cli("ckpt", "prune", copy, "--keep", 2)
    assert pruned.code == 0 and sorted(p.name for p in (copy / "checkpoints").iterdir()) == names[:2]


def test_f34_a_second_run_in_the_same_folder_is_refused(cli: Command, run_folder: Path, tmp_path: Path) -> None:
    """A second process in a run's folder is refused by name; a lock whose owner is gone is not."""
    copy = tmp_path / "run"
    shutil.copytree(run_folder, copy)
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    (copy / "lock.json").write_text(json.dumps({"pid": other.pid, "host": socket.gethostname()}))
    assert "running" in cli("runs", copy).out
    refused = cli("train", "digits", *QUICK, "--resume", "auto", "--out", copy)
    assert refused.code == 2 and f"process {other.pid} on" in refused.err
    other.communicate()
    again = cli("train", "digits", *QUICK, "--resume", "auto", "--out", copy)
    assert again.code == 0 and not (copy / "lock.json").exists()


def test_f42_a_crash_leaves_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unhandled error leaves a report with traceback, configuration and environment."""
    trainer = Trainer(preset("digits").override(*QUICK), tmp_path / "run")
    monkeypatch.setattr(trainer.state.optimizers, "step", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.fit()
    (report,) = (tmp_path / "run" / "crash").iterdir()
    text = report.read_text()
    assert report.name.endswith(".rank0.txt") and "ZeroDivisionError" in text
    assert "preset: digits" in text and "torch" in text
