"""What a new user meets: settings without effect, stops, samples that cannot be read, messages with what to type."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUICK, Command
from test_cli import images

import unilatent
from unilatent.plain_text import count_of
from unilatent.signals import StopRequest
from unilatent.training.trainer import Trainer

# ---- settings of a complete run --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("setting", "words"), [
    ("training.ema_decay=0.5", "training.ema_decay: 0.99 in the run, 0.5 now: no effect, since the run is complete"),
    ("training.log_every=7", "training.log_every: 4 in the run, 7 now: no effect, since the run is complete"),
    ("training.optimizer.learning_rate=0.5", "now: no effect, since the run is complete"),
    ("sampling.guidance_scale=3", "sampling.guidance_scale: 1.0 in the run, 3.0 now: used from now on"),
])  # fmt: skip
def test_a_complete_run_keeps_its_configuration(
    cli: Command, run_folder: Path, tmp_path: Path, setting: str, words: str
) -> None:
    run = shutil.copytree(run_folder, tmp_path / "run")
    before = (run / "config.yaml").read_bytes(), (run / "env.json").read_bytes()
    done = cli("train", "digits", *QUICK, setting, "--out", run, "--resume", "auto")
    assert done.code == 0 and words in " ".join(done.err.split()), done.err
    assert ((run / "config.yaml").read_bytes(), (run / "env.json").read_bytes()) == before


def test_a_run_that_goes_on_has_its_new_settings(cli: Command, run_folder: Path, tmp_path: Path) -> None:
    run = shutil.copytree(run_folder, tmp_path / "run")
    more = ("training.steps=13", "training.ema_decay=0.5")
    done = cli("train", "digits", *QUICK, *more, "--out", run, "--resume", "auto")
    assert done.code == 0 and "no effect" not in done.err
    assert "ema_decay: 0.5" in (run / "config.yaml").read_text()


# ---- stops -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_run_that_is_stopped_ends_with_the_code_of_the_signal(
    cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    original = Trainer._one_step

    def stopping(self: Trainer, micro: list) -> dict:
        if self.step == 2:
            os.kill(os.getpid(), getattr(signal, name))
        return original(self, micro)

    line = ("train", "digits", *QUICK, "--out", tmp_path / "run", "--resume", "auto")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_one_step", stopping)
        stopped = cli(*line)
    assert stopped.code == code and f"{name}: saved step 3" in stopped.err
    assert cli(*line).code == 0 and cli(*line).code == 0


def test_torchrun_takes_a_stop_for_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
    assert stop.exit_code == 143
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert stop.exit_code == 0


# ---- samples that cannot be read -------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [b"", b"no picture", b"\x89PNG\r\n\x1a\n"])
@pytest.mark.parametrize("verb", ["reconstruct", "encode"])
def test_a_picture_that_cannot_be_read_is_left_out_and_named(
    cli: Command, run_folder: Path, tmp_path: Path, verb: str, damage: bytes
) -> None:
    source = images(tmp_path / "in", each=3, size=8)
    victim = sorted(source.rglob("*.png"))[2]
    victim.write_bytes(damage)
    total = len(list(source.rglob("*.png")))
    done = cli(verb, run_folder, source, "--out", tmp_path / "out", "--batch-size", 2)
    assert done.code == 0 and f"left out: image {victim}" in done.err and done.out.endswith("; 1 sample left out\n"), (
        done
    )
    if verb == "reconstruct":
        record = json.loads((tmp_path / "out" / "metrics.json").read_text())
        assert record["num"] == total - 1 and len(record["left_out"]) == 1 and str(victim) in record["left_out"][0]
    else:
        assert len(json.loads((tmp_path / "out" / "index.json").read_text())["names"]) == total - 1


def test_a_folder_without_a_usable_picture_is_refused(cli: Command, run_folder: Path, tmp_path: Path) -> None:
    source = images(tmp_path / "in", each=1, size=8)
    for path in source.rglob("*.png"):
        path.write_bytes(b"no")
    for verb, words in (
        ("reconstruct", "cannot be used, the first: image"),
        ("encode", "no sample that can be encoded"),
    ):
        refused = cli(verb, run_folder, source, "--out", tmp_path / verb)
        assert refused.code == 2 and words in refused.err and not (tmp_path / verb).exists(), refused


# ---- captions and labels under other names ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["captions.csv", "Captions.CSV", "labels.csv", "captions.jsonl", "captions.txt"])
def test_a_table_under_another_name_is_named(cli: Command, tmp_path: Path, name: str) -> None:
    source = images(tmp_path / "in", each=3, size=8)
    (source / name).write_text("file_name,text\n")
    refused = cli("train", "scenes-unite", f"data.path={source}", "--out", tmp_path / "run")
    assert refused.code == 2 and refused.err.count("\n") == 1, refused
    assert f"{source / name} is not read: call it metadata.csv" in refused.err, refused
    refused = cli("train", "digits", f"data.path={source}", "data.caption_column=text", "--out", tmp_path / "run")
    assert f"{source / name} is not read" in refused.err, refused


# ---- data verify -----------------------------------------------------------------------------------------------------

WATER = "3\nwater\nO 0 0 0.117\nH 0 0.757 -0.469\nH 0 -0.757 -0.469\n"
CELL = "1.0\n4 0 0\n0 4 0\n0 0 4\nNa Cl\n1 1\nDirect\n0 0 0\n0.5 0.5 0.5\n"


@pytest.mark.parametrize(("name", "good", "bad"), [
    ("a.xyz", WATER, "3\nwater\nO 0 0\n"), ("POSCAR", f"salt\n{CELL}", "salt\n"), ("b.cif", None, "data_x\n"),
])  # fmt: skip
def test_molecules_and_crystals_are_verified(
    cli: Command, tmp_path: Path, name: str, good: str | None, bad: str
) -> None:
    (tmp_path / "x.pdb").write_text("")
    if good is not None:
        (tmp_path / name).write_text(good)
        done = cli("data", "verify", tmp_path)
        assert done.code == 0 and "1 sample checked, all valid" in done.out, done
        assert "note: 1 file not read: x.pdb" in done.out
        assert "all valid" in cli("data", "verify", tmp_path / name).out
    (tmp_path / name).write_text(bad)
    done = cli("data", "verify", tmp_path)
    assert done.code == 1 and str(tmp_path / name) in done.out and "1 sample checked, 1 bad" in done.out, done
    refused = cli("data", "prepare", tmp_path, "--out", tmp_path.with_name("shards"))
    assert refused.code == 2 and f"data.path={tmp_path}" in refused.err, refused


def test_molecules_beside_crystals_and_arrays_are_verified(cli: Command, tmp_path: Path) -> None:
    folder = tmp_path / "both"
    folder.mkdir()
    (folder / "a.xyz").write_text(WATER)
    (folder / "POSCAR").write_text(f"salt\n{CELL}")
    (folder / "numbers.csv").write_text("name,gap\na,1\n")
    done = cli("data", "verify", folder)
    assert done.code == 0 and done.out.endswith("2 samples checked, all valid\n"), done
    assert "note: 3 atoms each (modality.max_atoms), of H, O\n" in done.out, "what a model has to hold"
    refused = cli("data", "verify", tmp_path / "nowhere")
    assert refused.code == 2 and "of crystals, images, molecules or videos" in refused.err
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    assert cli("data", "verify", tmp_path / "images.npz").out == "2 samples checked, all valid\n"
    np.savez(tmp_path / "other.npz", numbers=np.zeros(3))
    for name in ("other.npz", "nothing"):
        refused = cli("data", "verify", tmp_path / name)
        assert refused.code == 2 and refused.err.count("\n") == 1, refused


def test_files_of_crystals_beside_molecules_are_counted(cli: Command, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for i in range(6):
        (data / f"{i}.xyz").write_text(WATER)
    (data / "x.cif").write_text("data_x\n")
    (data / "POSCAR").write_text(f"salt\n{CELL}")
    with pytest.warns(UserWarning, match=r"not read: 1 POSCAR, 1 \.cif$"):
        done = cli("train", "molecules", f"data.path={data}", "--dry-run", "--out", tmp_path / "run")
    assert done.code == 0, done
    assert f"`unilatent data verify {data}` checks all" in done.out


def test_a_damaged_tar_points_to_verify(cli: Command, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w"):
        pass
    (tmp_path / "a.tar").write_bytes(b"damaged" * 300)
    refused = cli("train", "digits", f"data.path={tmp_path}", "--out", tmp_path.with_name("run"))
    assert refused.code == 2 and "`unilatent data verify`" in refused.err, refused


# ---- Python ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keyword", "right"), [
    ("steps", "num_inference_steps"), ("guidance", "guidance_scale"), ("n", "num"), ("label", "labels"),
    ("cfg_scale", "guidance_scale"), ("guidence_scale", "guidance_scale"), ("solvr", "solver"),
])  # fmt: skip
def test_keywords_of_others_are_answered(run_folder: Path, keyword: str, right: str) -> None:
    with pytest.raises(ValueError, match=rf"^{keyword}: is no keyword of sample; did you mean {right}\?$"):
        unilatent.sample(unilatent.load(run_folder), **{keyword: 2})


@pytest.mark.parametrize(
    "settings", [{"labels": [0, 1, 2]}, {"labels": "0-9"}, {"labels": [3], "negative_labels": "1,2"}]
)
def test_more_values_than_samples_are_refused(cli: Command, run_folder: Path, tmp_path: Path, settings: dict) -> None:
    model = unilatent.load(run_folder)
    with pytest.raises(
        ValueError, match=r"labels: \d+ values are given, but num is 1, so \d would not be used; give num="
    ):
        unilatent.sample(model, num=1, **settings)
    assert len(unilatent.sample(model, num=4, labels=[0, 1, 2], num_inference_steps=1)) == 4
    refused = cli("sample", run_folder, "--num", 2, "--labels", "0-2", "--out", tmp_path / "out")
    assert refused.code == 2 and "labels: 3 values are given, but num is 2" in refused.err
    refused = cli("evaluate", run_folder, "--num", 2, "--labels", "0-2", "--out", tmp_path / "out")
    assert refused.code == 2 and "give num=3 (--num 3)" in refused.err


def test_labels_out_of_range_list_the_classes(cli: Command, run_folder: Path, tmp_path: Path) -> None:
    refused = cli("sample", run_folder, "--labels", 13, "--out", tmp_path / "out")
    assert refused.code == 2 and refused.err.count("\n") == 1
    assert "classes 0 to 9, called 0, 1, 2, 3, 4, 5, 6, 7, 8, 9; what equals a class name is that class" in refused.err


def test_what_samples_are_conditioned_on_is_stored(cli: Command, run_folder: Path, tmp_path: Path) -> None:
    line = (
        "sample",
        run_folder,
        "--labels",
        "2,7",
        "--num",
        3,
        "--steps",
        1,
        "--batch-size",
        2,
        "--out",
        tmp_path / "o",
    )
    assert cli(*line).code == 0
    record = json.loads((tmp_path / "o" / "sampling.json").read_text())
    assert record["labels"] == "2,7"
    assert record["resolved"] == {"labels": {"names": ["2", "7", "2"], "indices": [2, 7, 2]}}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "photo.png", "sub/a.bin"])
def test_a_model_is_not_saved_over_files_of_others(run_folder: Path, tmp_path: Path, name: str) -> None:
    model, folder = unilatent.load(run_folder), tmp_path / "model"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=rf"holds files that are not of a model of this package \({name}\)"):
        model.save_pretrained(folder)
    assert [path.name for path in folder.rglob("*") if path.is_file()] == [Path(name).name]
    (folder / name).unlink()
    (folder / "README.md").write_text("mine")
    for _ in range(2):
        model.save_pretrained(folder)
    assert (folder / "README.md").read_text() == "mine"
    again = unilatent.UNITE.from_pretrained(folder)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


def test_a_model_is_not_saved_over_a_checkpoint_or_a_file(run_folder: Path, tmp_path: Path) -> None:
    model = unilatent.load(run_folder)
    checkpoint = shutil.copytree(run_folder / "checkpoints" / "step_00000012", tmp_path / "step_00000012")
    with pytest.raises(ValueError, match="is a checkpoint of a run"):
        model.save_pretrained(checkpoint)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        model.save_pretrained(tmp_path / "file")


def test_every_method_is_a_public_name() -> None:
    for name in ("UNITE", "UnifiedLatents", "LatentDiffusion"):
        assert getattr(unilatent, name).__name__ == name


# ---- comparisons, disks, presets, counts -----------------------------------------------------------------------------


def test_a_comparison_without_rates_is_refused_before_anything_is_written(
    cli: Command, run_folder: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(run_folder, tmp_path / "other")
    refused = cli("analyze", run_folder, other, "--compare", "--out", tmp_path / "out")
    assert refused.code == 2 and "its latents have no rate" in refused.err and not (tmp_path / "out").exists(), refused


@pytest.mark.parametrize(("keep", "every", "checkpoints"), [(2, 4, 3), (3, 2, 4), (3, 0, 1)])
def test_a_disk_that_is_too_small_is_named_at_the_start(
    cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int, every: int, checkpoints: int
) -> None:
    settings = (f"training.keep_checkpoints={keep}", f"training.checkpoint_every={every}")
    line = ("train", "digits", *QUICK, *settings, "--dry-run", "--out", tmp_path / "run")
    assert "the run will need" not in cli(*line).out
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**30, 2**30 - 2**20, 2**20))
    told = cli(*line)
    words = "1 checkpoint of" if checkpoints == 1 else f"{checkpoints} checkpoints of"
    assert told.code == 0 and words in told.out and "1 MiB are free there" in told.out, told


def test_a_checkpoint_takes_what_was_estimated(run_folder: Path) -> None:
    from unilatent.presets import preset

    trainer = Trainer(preset("digits").override(*QUICK), run_folder.parent / "estimate")
    files = (run_folder / "checkpoints" / "step_00000012").glob("*.safetensors")
    assert sum(path.stat().st_size for path in files) == pytest.approx(trainer.state.checkpoint_bytes, rel=0.05)


def test_presets_show_both_stages(cli: Command) -> None:
    printed = cli("presets").out
    assert "0.74 + 0.35 M" in printed and "2.32 + 2.11 M" in printed and "10.65 M" in printed


@pytest.mark.parametrize("held_out", [77, 360, 10_000])
def test_too_many_held_out_samples_come_with_what_to_type(cli: Command, tmp_path: Path, held_out: int) -> None:
    source = images(tmp_path / "in", each=10, size=8)
    refused = cli("train", "digits", f"data.path={source}", f"data.held_out={held_out}", "--out", tmp_path / "run")
    assert refused.code == 2 and "hold out fewer: data.held_out=0.1" in refused.err, refused


def test_counts_in_words() -> None:
    assert [count_of(n, "shard") for n in (0, 1, 1200)] == ["0 shards", "1 shard", "1,200 shards"]
    assert count_of(1, "class") == "1 class" and count_of(2, "class") == "2 classes"
    assert count_of(1, "sample has", "samples have") == "1 sample has"


@pytest.mark.parametrize("damaged", [0, 1, 2])
def test_prepare_and_verify_count_in_words(cli: Command, tmp_path: Path, damaged: int) -> None:
    source = images(tmp_path / "in", each=3, size=8)
    files = sorted(source.rglob("*.png"))
    for path in files[:damaged]:
        path.write_bytes(b"no")
    for _ in range(2):
        done = cli("data", "prepare", source, "--out", tmp_path / "shards")
        assert done.code == 0 and f"{count_of(len(files) - damaged, 'sample')}, " in done.out, done
        assert " in 1 shard" in done.out
    assert ("bad sample" in done.out) == (damaged > 0) and "1 bad samples" not in done.out
    assert cli("data", "verify", tmp_path / "shards").out.endswith("1 shard checked, all valid\n")


@pytest.mark.parametrize(("steps", "decay", "words"), [
    (400, 0.995, "after 400 steps 13% of the average are untrained weights, which shows as noise; shorter: "
                 "training.ema_decay=0.97"),
    (3000, 0.999, "shorter: training.ema_decay=0.997"),
    (100, 0.995, "averages over more steps than the run has"),
    (2000, 0.995, None),
])  # fmt: skip
def test_an_average_that_is_too_long_for_the_run_is_named(
    cli: Command, tmp_path: Path, steps: int, decay: float, words: str | None
) -> None:
    settings = ("training.schedule.decays=[]", f"training.steps={steps}", f"training.ema_decay={decay}")
    done = cli("train", "digits", *settings, "--dry-run", "--out", tmp_path / "run")
    said = " ".join(done.out.split())
    assert done.code == 0 and (words in said if words else "note: training.ema_decay" not in said), said


def test_a_share_of_held_out_samples_that_is_none_is_named(cli: Command, tmp_path: Path) -> None:
    data = images(tmp_path / "photos", classes=1, each=4)
    line = ("train", "digits", "conditions={}", f"data.path={data}", "training.evaluate_samples=0", "--dry-run")
    done = cli(*line, "data.held_out=0.1", "--out", tmp_path / "run")
    words = "data.held_out: 0.1 of 4 samples is none, nothing is held out; set data.held_out=1 or more"
    assert words in " ".join(done.out.split()), done.out
    assert "is none" not in cli(*line, "data.held_out=0", "--out", tmp_path / "run").out
