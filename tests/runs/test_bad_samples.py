"""Images that cannot be used, data that change under a run, and data workers that die or hang."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUICK, Command
from PIL import Image as PIL
from test_processes import TORCHRUN, environment, port
from test_training import assert_same, state

import unilatent.faults as faults
from unilatent.batches import Plan, WorkerError, load_all, loader
from unilatent.config import ConfigError
from unilatent.modalities.image import Image, ImageConfig, ImageData
from unilatent.presets import preset
from unilatent.training.config import RunConfig
from unilatent.training.trainer import Trainer

GOOD, CLASSES = 294, ("a", "b")


def saved(image: PIL.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape or (8, 8), dtype=np.uint8)


def huge(side: int = 10_000) -> bytes:
    """A valid 1-bit PNG of 100 megapixels in 12 kB."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    lines = zlib.compress(bytes(side * (1 + side // 8)), 1)
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


def broken() -> dict[str, bytes]:
    """Return broken image files by name."""
    return {
        "truncated.jpg": saved(PIL.fromarray(noise(1, 64, 64, 3)), "JPEG")[:600],
        "page.jpg": b"<!DOCTYPE html><html><body>404</body></html>",
        "empty.png": b"",
        "huge.png": huge(),
    }


def odd() -> dict[str, bytes]:
    """Return unusual image files that can be converted, by name."""
    exif = PIL.Exif()
    exif[0x0112] = 6
    rgba = PIL.fromarray(noise(3, 8, 8, 4), "RGBA")
    frames = [PIL.fromarray(noise(10 + i, 8, 8)) for i in range(3)]
    return {
        "sixteen.png": saved(PIL.fromarray(noise(2).astype(np.uint16) * 257)),
        "cmyk.jpg": saved(PIL.fromarray(noise(4, 8, 8, 4), "CMYK"), "JPEG"),
        "palette.png": saved(rgba.quantize(16)),
        "rotated.jpg": saved(PIL.fromarray(noise(5, 8, 12)), "JPEG", exif=exif),
        "moving.gif": saved(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "narrow.png": saved(PIL.fromarray(noise(6, 200, 4))),
    }


def fill(folder: Path, good: int = GOOD, bad: dict[str, bytes] | None = None) -> Path:
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
    for i in range(good):
        (folder / CLASSES[i % 2] / f"{i:04d}.png").write_bytes(saved(PIL.fromarray(noise(i))))
    for name, content in {**odd(), **(broken() if bad is None else bad)}.items():
        (folder / "a" / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """294 good images, six odd and four broken ones."""
    return fill(tmp_path_factory.mktemp("images") / "set")


def settings(folder: Path, *overrides: str) -> tuple[str, ...]:
    """Forty steps of 16: more than two epochs, so that every image is read."""
    return (
        *QUICK, "training.steps=40", "training.checkpoint_every=10", f"data.path={folder}", "data.held_out=0",
        "data.cache=false", *overrides,
    )  # fmt: skip


def config(folder: Path, *overrides: str) -> RunConfig:
    return preset("digits").override(*settings(folder, *overrides))


def noted(run: Path) -> list[dict]:
    files = sorted(run.glob("bad_samples.rank*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def tolerant(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a budget of 2 %, and its log."""
    out = tmp_path_factory.mktemp("tolerant") / "run"
    Trainer(config(images, "training.bad_samples=0.02"), out).fit()
    return out


MODALITY = Image(ImageConfig.parse({"size": 8, "patch_size": 2, "channels": 1}))


def test_f21_every_odd_image_is_converted_and_every_broken_one_named(images: Path) -> None:
    data = MODALITY.splits(ImageData(path=str(images))).train
    names = [data.collection.names[i] for i in data.indices]
    found = list(loader(data, MODALITY, [range(i, i + 1) for i in range(len(data))], seed=0))
    bad = {names[each.index].removeprefix("a/"): each.message for _, some in found for each in some}
    assert bad.keys() == broken().keys()
    assert "truncated.jpg: cannot be decoded" in bad["truncated.jpg"]
    assert "unknown image format" in bad["page.jpg"] and "unknown image format" in bad["empty.png"]
    assert "10000 x 10000 pixels, more than the allowed 89,478,485" in bad["huge.png"]
    said: list[str] = []
    assert len(load_all(data, MODALITY, say=said.append).data) == 300
    assert said[0].startswith("left out 4 of 304 samples") and "huge.png" in said[0]


def test_f21_a_image_of_100_megapixels_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    fill(tmp_path / "set", 2, {"huge.png": huge()})
    data = MODALITY.splits(ImageData(path=str(tmp_path / "set"))).train
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    index = [data.collection.names[i] for i in data.indices].index("a/huge.png")
    with pytest.raises(ValueError, match="10000 x 10000 pixels"):
        data[index]
    assert not [w for w in recwarn if issubclass(w.category, PIL.DecompressionBombWarning)]


def test_f21_a_replacement_is_a_function_of_seed_and_position(images: Path) -> None:
    data = MODALITY.splits(ImageData(path=str(images))).train

    def read(plan: Plan, seed: int, workers: int = 0) -> tuple[list[torch.Tensor], list[tuple[int, int]]]:
        found = list(loader(data, MODALITY, plan, seed, workers))
        rows = [row for batch, _ in found for row in batch.data]
        return rows, [(each.position, each.index) for _, some in found for each in some]

    rows, bad = read(Plan(range(20), 16), 0)
    assert len(rows) == 320 and len({index for _, index in bad}) == 4
    for plan, workers in ((Plan(range(20), 16, 5), 2), (Plan(range(20), 16), 1)):
        again, same = read(plan, 0, workers)
        assert same == bad and all(map(torch.equal, again, rows))
    two = [read(Plan(range(20), 16, None, rank, 2), 0) for rank in range(2)]
    assert sorted(two[0][1] + two[1][1]) == bad
    assert all(torch.equal(two[p % 2][0][p // 2], rows[p]) for p in range(320))
    resumed, rest = read(Plan(range(7, 20), 16), 0)
    assert all(map(torch.equal, resumed, rows[7 * 16 :])) and rest == [b for b in bad if b[0] >= 7 * 16]
    assert read(Plan(range(20), 16), 1)[1] != bad


def test_f21_a_run_within_its_budget_trains_and_names_them(tolerant: Path, images: Path) -> None:
    lines = noted(tolerant)
    assert {Path(line["message"].split(": ")[0]).name for line in lines} == broken().keys()
    assert len(lines) == 4 and all(0 < line["step"] <= 40 and line["position"] < 640 for line in lines)
    log = (tolerant / "log.txt").read_text()
    assert log.count("replaced a bad sample: image") == 4
    assert f"4 bad samples were replaced; they are listed in {tolerant}" in log
    counts = [json.loads(line)["bad_samples"] for line in (tolerant / "metrics.jsonl").read_text().splitlines()]
    assert counts == sorted(counts) and counts[-1] == 4
    assert len(json.loads((tolerant / "checkpoints" / "step_00000040" / "state.json").read_text())["bad_samples"]) == 2


def test_f21_final_weights_do_not_depend_on_workers(tmp_path: Path, tolerant: Path, images: Path) -> None:
    Trainer(config(images, "training.bad_samples=0.02", "training.workers=2"), tmp_path / "run").fit()
    assert_same(state(tmp_path / "run", 40), state(tolerant, 40))
    assert noted(tmp_path / "run") == noted(tolerant)


def test_f21_a_resumed_run_keeps_counting(tmp_path: Path, tolerant: Path, images: Path) -> None:
    for name in ("run",):
        shutil.copytree(tolerant, tmp_path / name)
    run = tmp_path / "run"
    for step in (30, 40):
        shutil.rmtree(run / "checkpoints" / f"step_{step:08d}")
    trainer = Trainer(config(images, "training.bad_samples=0.02"), run, resume="auto")
    assert trainer.step == 20 and trainer.bad.indices
    assert trainer.bad.indices == {line["index"] for line in noted(tolerant) if line["step"] <= 20}
    trainer.fit()
    assert_same(state(run, 40), state(tolerant, 40))
    assert noted(run) == noted(tolerant)


def test_f21_the_default_budget_stops_a_run_that_can_go_on_with_a_larger_one(
    tmp_path: Path, tolerant: Path, images: Path, cli: Command
) -> None:
    run = tmp_path / "run"
    done = cli("train", "digits", *settings(images), "--out", run)
    assert done.code == 2
    message = done.err.strip().splitlines()[-1]
    assert "training.bad_samples: 0.001 allows 1 bad sample, but 2 cannot be used" in message
    assert f"{run}/bad_samples.rank*.jsonl" in message and "unilatent data verify" in message
    assert sum(name in message for name in broken()) == 2
    again = cli("train", "digits", *settings(images), "--out", run, "--resume", "auto")
    assert again.code == 2 and "allows 1 bad sample, but 2" in again.err
    assert (
        cli("train", "digits", *settings(images, "training.bad_samples=0.02"), "--out", run, "--resume", "auto").code
        == 0
    )
    assert_same(state(run, 40), state(tolerant, 40))


def test_f21_no_bad_sample_at_all_may_be_asked_for(tmp_path: Path) -> None:
    folder = fill(tmp_path / "set", 26, {"page.jpg": b"<html>"})
    strict = config(folder, "training.bad_samples=0", "training.steps=4")
    data = MODALITY.splits(ImageData(path=str(folder))).train
    names = [data.collection.names[i] for i in data.indices]
    seeds = {}  # where the broken one comes late, and where it is among the first eight
    for seed in range(100):
        seeds.setdefault(names.index("a/page.jpg") in [data.index_at(seed, position) for position in range(8)], seed)
    with pytest.raises(ConfigError, match="0 allows 0 bad samples, but 1"):
        Trainer(strict.override(f"seed={seeds[False]}"), tmp_path / "run").fit()
    with pytest.raises(ValueError, match=r"page\.jpg: cannot be decoded"):
        Trainer(strict.override(f"seed={seeds[True]}"), tmp_path / "early")
    assert not (tmp_path / "early").exists()
    Trainer(config(folder, "training.steps=4"), tmp_path / "one").fit()


def test_f21_bad_samples_at_the_start_refuse_nothing_unless_all_are(tmp_path: Path) -> None:
    folder = fill(tmp_path / "set", 8, {f"{i}.jpg": b"<html>" for i in range(8)})
    Trainer(config(folder, "training.steps=1", "training.bad_samples=0.5"), tmp_path / "run")
    for path in folder.glob("?/*.???"):
        path.write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"image .*: cannot be decoded \(unknown image format\)"):
        Trainer(config(folder), tmp_path / "none")
    assert not (tmp_path / "none").exists()


# ---- data that change ----------------------------------------------------------------------------------------------


def during(trainer: Trainer, monkeypatch: pytest.MonkeyPatch, step: int, work: Callable[[], object]) -> None:
    original = trainer._one_step

    def changed(micro: list) -> dict:
        if trainer.step == step:
            work()
        return original(micro)

    monkeypatch.setattr(trainer, "_one_step", changed)


def test_f22_a_file_deleted_and_one_spoilt_during_training_cost_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fill(tmp_path / "set", 58, {})
    trainer = Trainer(config(folder, "training.steps=16", "training.bad_samples=0.05"), tmp_path / "run")

    def work() -> None:
        (folder / "a" / "0000.png").unlink()
        (folder / "b" / "0001.png").write_bytes(b"\x89PNG spoilt")

    during(trainer, monkeypatch, 2, work)
    trainer.fit()
    messages = {line["message"] for line in noted(tmp_path / "run")}
    assert len(messages) == 2
    assert any("0000.png: No such file" in m for m in messages) and any(
        "0001.png: cannot be decoded" in m for m in messages
    )
    with pytest.raises(ConfigError, match=r"^data: .*--allow-data-change"):
        Trainer(config(folder, "training.steps=20", "training.bad_samples=0.05"), tmp_path / "run", resume="auto")


@pytest.mark.parametrize("workers", [0, 2])
def test_f22_a_renamed_folder_ends_the_run_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    folder = fill(tmp_path / "set", 58, {})
    trainer = Trainer(config(folder, f"training.workers={workers}", "training.bad_samples=1"), tmp_path / "run")
    during(trainer, monkeypatch, 2, lambda: folder.rename(tmp_path / "elsewhere"))
    with pytest.raises(ValueError, match=r"data\.path: 16 samples in a row cannot be used, .*No such file") as error:
        trainer.fit()
    assert "\n" not in str(error.value) and "--resume auto" in str(error.value)
    assert not multiprocessing.active_children()


def test_f23_added_files_are_refused_unless_allowed(tmp_path: Path, cli: Command) -> None:
    folder = fill(tmp_path / "set", 58, {})
    short = ("training.steps=4", "training.checkpoint_every=2")
    assert cli("train", "digits", *settings(folder, *short), "--out", tmp_path / "run").code == 0
    (folder / "a" / "new.png").write_bytes(saved(PIL.fromarray(noise(99))))
    more = (
        "train",
        "digits",
        *settings(folder, *short, "training.steps=8"),
        "--out",
        tmp_path / "run",
        "--resume",
        "auto",
    )
    refused = cli(*more)
    assert refused.code == 2 and refused.err.startswith("error: data: ") and "--allow-data-change" in refused.err
    allowed = cli(*more, "--allow-data-change")
    assert allowed.code == 0, allowed.err
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "the data are not those the checkpoint was" in log and "65 training samples" in log
    assert cli(*more).code == 0


def test_f23_a_share_that_is_held_out_is_named(tmp_path: Path, cli: Command) -> None:
    """The files are the same: what changed is the setting, and classes without a training sample are named."""
    folder = fill(tmp_path / "set", 58, {})
    run = ("train", "digits", *settings(folder, "training.checkpoint_every=2"), "--out", tmp_path / "run")
    first = cli(*run, "training.steps=4")
    assert first.code == 0 and "no training sample" not in first.err
    refused = cli(*run, "training.steps=8", "data.held_out=6", "--resume", "auto")
    words = "error: data.held_out: 6.0, but the run had 0.0, and other samples are trained on"
    assert refused.code == 2 and refused.err.startswith(words) and "--allow-data-change" in refused.err, refused.err
    for name in ("c", "d"):
        (folder / name).mkdir()
        (folder / name / "0.png").write_bytes((folder / "a" / "0000.png").read_bytes())
    few = cli("train", "digits", *settings(folder, "data.held_out=64"), "--dry-run")
    assert "2 classes have no training sample, all of theirs are held out (c, d)" in few.out + few.err, few


@pytest.mark.parametrize("preset", ["molecules", "joint"])
def test_f23_statistics_of_changed_data_are_no_other_model(tmp_path: Path, cli: Command, preset: str) -> None:
    """Sizes and elements come from the data, and a run keeps those that it began with: what differs are the data."""
    pytest.importorskip("rdkit")
    pytest.importorskip("pymatgen.core")
    water = "3\n\nO 0 0 0.12\nH 0 0.76 -0.48\nH 0 -0.76 -0.48\n"
    folder = tmp_path / "set"
    folder.mkdir()
    for i in range(12):
        (folder / f"{i}.xyz").write_text(water if i else "1\n\nC 0 0 0\n")
    short = ["data.path", "modality.elements=found"] if preset == "molecules" else ["data.parts.molecule.path"]
    path, *other = short
    model = ["method.generative_encoder.width=32", "method.decoder.width=32", "training.evaluate_samples=0"]
    if preset == "joint":
        model += ["data.parts.crystal.num=8", "data.parts.molecule.held_out=2", "data.parts.crystal.held_out=2"]
    run = [*model, *other, f"{path}={folder}", "training.batch_size=4", "training.checkpoint_every=2",
           "training.sample_every=0", "training.schedule.decays=[]", "--out", tmp_path / "run"]  # fmt: skip
    first = cli("train", preset, "training.steps=2", *run)
    assert first.code == 0, first.err
    (folder / "0.xyz").unlink()
    more = ("train", preset, "training.steps=4", *run, "--resume", "auto")
    refused = cli(*more)
    assert refused.code == 2 and refused.err.startswith("error: data: ") and "--allow-data-change" in refused.err
    if preset == "molecules":
        (folder / "9.xyz").write_text(water.replace("O", "S"))
        unknown = cli(*more, "--allow-data-change")
        assert unknown.code == 2 and "modality.elements: " in unknown.err, "the model has no class for sulphur"
        (folder / "9.xyz").write_text(water)
    allowed = cli(*more, "--allow-data-change")
    assert allowed.code == 0, allowed.err
    assert "the data are not those the checkpoint was" in (tmp_path / "run" / "log.txt").read_text()


# ---- workers and processes -----------------------------------------------------------------------------------------


@pytest.fixture
def armed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def arm(text: str) -> None:
        monkeypatch.setattr(faults, "ARMED", faults.Fault.parse(text))
        monkeypatch.setattr("unilatent.batches.reach", faults._act)

    return arm


@pytest.mark.parametrize("action", ["exit", "kill"])
def test_f33_a_dead_data_worker_ends_the_run_with_its_name(tmp_path: Path, armed, action: str) -> None:
    folder = fill(tmp_path / "set", 58, {})
    trainer = Trainer(config(folder, "training.workers=2"), tmp_path / "run")
    armed(f"data.read:{action}::100")
    with pytest.raises(
        WorkerError, match=r"training\.workers: a data worker died \(DataLoader worker \(pid.*fewer workers"
    ):
        trainer.fit()
    assert list((tmp_path / "run" / "crash").iterdir()) and not multiprocessing.active_children()


@pytest.mark.faults
def test_f33_a_hanging_data_worker_ends_the_run_and_leaves_no_process(tmp_path: Path) -> None:
    folder = fill(tmp_path / "set", 58, {})
    command = [sys.executable, "-m", "unilatent", "train", "digits", *settings(folder, "training.workers=2"),
               "training.worker_timeout=3", "--out", str(tmp_path / "run")]  # fmt: skip
    process = subprocess.Popen(
        command, env=environment(UNILATENT_FAULT="data.read:hang::100"), stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        _, err = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 1 and "training.worker_timeout: a data worker gave nothing for 3 seconds" in err, err
    for _ in range(40):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    pytest.fail("processes are left")


def torchrun(out: Path, *overrides: str) -> tuple[int, str]:
    command = [*TORCHRUN, "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", str(port()),
               "-m", "unilatent", "train", "digits", *overrides, "--out", str(out)]  # fmt: skip
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.faults
def test_f21_two_processes_stop_together(tmp_path: Path, images: Path) -> None:
    code, out = torchrun(tmp_path / "run", *settings(images))
    assert code != 0 and "allows 1 bad sample, but 2 cannot be used" in out, out[-3000:]
    assert "Connection" not in out
    saved_at = [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()]
    assert saved_at, "the step it stopped at is saved"


@pytest.mark.faults
def test_f21_two_processes_count_and_replace_like_one(tmp_path: Path, tolerant: Path, images: Path) -> None:
    code, out = torchrun(tmp_path / "run", *settings(images, "training.bad_samples=0.02"))
    assert code == 0, out[-3000:]
    keys = ("step", "index", "position")
    pick = lambda run: sorted(tuple(line[key] for key in keys) for line in noted(run))  # noqa: E731
    assert pick(tmp_path / "run") == pick(tolerant)
    read = lambda run: json.loads((run / "checkpoints" / "step_00000040" / "state.json").read_text())  # noqa: E731
    assert read(tmp_path / "run")["bad_samples"]["indices"] == read(tolerant)["bad_samples"]["indices"]


@pytest.mark.faults
def test_f30_fewer_samples_than_a_batch_or_than_processes_do_not_hang(tmp_path: Path) -> None:
    """Seven training images, one held out, batches of five in micro-batches of two over two processes."""
    folder = tmp_path / "set"
    folder.mkdir()
    for i in range(8):
        (folder / f"{i}.png").write_bytes(saved(PIL.fromarray(noise(i))))
    code, out = torchrun(
        tmp_path / "run", *settings(folder), "data.held_out=1", "training.steps=6", "training.batch_size=5",
        "training.micro_batch_size=2", "training.evaluate_samples=3", "training.sample_every=3", "conditions={}",
    )  # fmt: skip
    assert code == 0, out[-3000:]
    assert json.loads((tmp_path / "run" / "eval" / "step_00000006.json").read_text())["numbers"]
