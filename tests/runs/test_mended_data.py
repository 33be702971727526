"""Regressions of data and listings in rare cases: other start methods of workers, damage, interruptions."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import Command
from test_cli import images
from test_memory import CPU, example_of

from unilatent.batches import _init_worker
from unilatent.methods.base import LatentModel
from unilatent.modalities._media import files as media_files
from unilatent.modalities.base import BadSample
from unilatent.modalities.image.data import KIND
from unilatent.nets.layers import Repeated
from unilatent.presets import preset
from unilatent.runs.listing import describe
from unilatent.shards.writing import check_all
from unilatent.training.memory import Memory, estimate


@pytest.fixture
def forkserver() -> Iterator[None]:
    """The way processes are started on Linux from Python 3.14 on: their parent is not the process they work for."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


class Numbers:
    """Samples of which every third is damaged."""

    names = tuple(str(i) for i in range(100))

    def check(self, number: int) -> str:
        if number % 3 == 0:
            raise ValueError("divided by three")
        return ""


def test_workers_stay_when_another_process_forked_them(forkserver: None) -> None:
    found = list(check_all(Numbers(), workers=2))  # type: ignore[arg-type]
    assert [bool(fault) for fault, _ in found] == [i % 3 == 0 for i in range(100)]


def test_data_workers_ignore_every_signal_that_is_the_run_s() -> None:
    before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    threads = torch.get_num_threads()
    try:
        _init_worker(0)
        assert all(signal.getsignal(name) == signal.SIG_IGN for name in before)
    finally:
        torch.set_num_threads(threads)
        for name, handler in before.items():
            signal.signal(name, handler)


def test_prepare_writes_damaged_shards_of_a_finished_folder_again(cli: Command, tmp_path: Path) -> None:
    """One bit flipped, one shard gone: both are made again, the same bytes; the third is not touched."""
    source, out = images(tmp_path / "in", each=6), tmp_path / "out"
    command = ("data", "prepare", source, "--out", out, "--format", "png", "--shard-size", 4, "--workers", 1)
    assert cli(*command).code == 0
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    untouched = (out / "shard-000000.tar").stat().st_mtime_ns
    raw = bytearray(whole["shard-000001.tar"])
    raw[700] ^= 4
    (out / "shard-000001.tar").write_bytes(raw)
    (out / "shard-000002.tar").unlink()
    again = cli(*command)
    assert again.code == 0 and "12 samples, 2 classes in 3 shards (1 of them already written)" in again.out, again
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole
    assert (out / "shard-000000.tar").stat().st_mtime_ns == untouched


def test_an_oversized_member_of_a_zip_is_a_bad_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is replaced, as a damaged one is, and does not end the run."""
    monkeypatch.setattr(media_files, "MEMBER_BYTES", 1000)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x.png", bytes(2000))
    with pytest.raises(BadSample, match=r"x\.png in .*: unpacks to"):
        media_files.ZipArchive(tmp_path / "a.zip", KIND).read("x.png")


def test_labels_of_a_hub_table_are_read_without_its_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    from unilatent.listings import ALONE
    from unilatent.modalities._media import hub

    rows = datasets.Dataset.from_dict(
        {"image": [{"bytes": b"no image", "path": None}] * 5, "label": [0, 1, 0, 2, 1]},
        features=datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("int64")}),
    )
    read: list[list[str]] = []
    original = datasets.Dataset.__getitem__

    def spy(table: object, key: object) -> object:
        read.append(table.column_names)  # type: ignore[attr-defined]
        return original(table, key)

    monkeypatch.setattr(datasets.Dataset, "__getitem__", spy)

    class Source:
        config, split, class_names, data, label, text = None, "train", ("a", "b", "c"), "image", "label", None

    Source.listings = ALONE  # type: ignore[attr-defined]
    Source.rows = rows  # type: ignore[attr-defined]
    table = hub.HubTable(Source(), hub.Frame(1, 8, 8, 1), cache=False)  # type: ignore[arg-type]
    assert table.labels == [0, 1, 0, 2, 1] and read == [["label"]]


# ---- memory --------------------------------------------------------------------------------------------------------


def needed(processes: int, *overrides: str) -> Memory:
    config, example = example_of(preset("digits").override("training.micro_batch_size=4", *overrides))
    return estimate(config, example, CPU, processes)


def test_shards_are_counted_as_what_a_process_holds() -> None:
    """Blocks are cut, the rest is whole, and the largest block is there once more while it is used."""
    config, _ = example_of(preset("digits"))
    model = LatentModel.build(config.model())
    blocks = [module for module in model.modules() if isinstance(module, Repeated)]
    cut = sum(p.nbytes for p in {p for block in blocks for p in block.parameters()})
    largest = max(sum(p.nbytes for p in block.parameters()) for block in blocks)
    one, two = needed(1), needed(2, "training.shard=true")
    assert cut > 0.5 * one.weights
    assert two.weights == pytest.approx(one.weights - cut / 2 + largest, rel=1e-3)
    assert two.average == pytest.approx(one.average - cut / 2, rel=1e-3)
    assert two.optimizer < one.optimizer - cut / 2 + 1e-3 * one.optimizer
    assert needed(1, "training.shard=true").weights == one.weights, "one process has nobody to share with"
    with_copies, without = (needed(2, "training.shard=true", f"training.log_gradients={on}") for on in (True, False))
    assert with_copies.gradients == without.gradients, "gradients of parts are not measured in shards"
    assert without.gradients > sum(p.nbytes for p in model.parameters() if p.requires_grad), "whole until they are sent"
    assert needed(2).gradients > 2 * needed(2, "training.log_gradients=false").gradients - 2**24


# ---- listings ------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path: Path, run_folder: Path) -> Path:
    shutil.copytree(run_folder, tmp_path / "runs" / "a")
    return tmp_path / "runs" / "a"


def test_a_listing_has_the_newest_value_of_each_key(copy: Path, cli: Command) -> None:
    """A line of an evaluation comes last and knows neither loss nor epoch."""
    loss = describe(copy).metrics["loss/total"]
    with (copy / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 12, "eval/psnr": 21.5}) + "\n")
    metrics = describe(copy).metrics
    assert (metrics["loss/total"], metrics["eval/psnr"]) == (loss, 21.5)
    assert f"{loss:.4g}" in cli("runs", copy.parent).out


def test_finished_means_all_steps_and_a_model(copy: Path, cli: Command) -> None:
    """A model of an earlier, shorter run does not make a longer one finished."""
    assert describe(copy).state == "finished" and cli("runs", copy, "--all-finished").code == 0
    text = (copy / "config.yaml").read_text()
    assert "steps: 12\n" in text
    (copy / "config.yaml").write_text(text.replace("steps: 12\n", "steps: 24\n"))
    assert describe(copy).state == "stopped" and cli("runs", copy, "--all-finished").code == 1


def test_finished_in_epochs(copy: Path) -> None:
    text = (copy / "config.yaml").read_text()
    lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    epochs = lines[-1]["epoch"]
    assert "epochs: null\n" in text
    for factor, state in ((1, "finished"), (2, "stopped")):
        changed = text.replace("steps: 12\n", "steps: null\n").replace("epochs: null\n", f"epochs: {factor * epochs}\n")
        (copy / "config.yaml").write_text(changed)
        assert (describe(copy).state, describe(copy).steps) == (state, 12 * factor)


@pytest.mark.parametrize("content", [b"{a: [", b"\xff\xfe\x00", b"[1, 2]"])
def test_an_unreadable_config_costs_no_listing(copy: Path, cli: Command, content: bytes) -> None:
    shutil.copytree(copy, copy.parent / "b")
    (copy / "config.yaml").write_bytes(content)
    assert describe(copy).state == "unreadable"
    listed = cli("runs", copy.parent)
    assert listed.code == 0 and "unreadable" in listed.out and "finished" in listed.out


def test_a_report_and_a_leftover_lock_are_a_crash(copy: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (copy / "lock.json").write_text(json.dumps({"pid": gone.pid, "host": socket.gethostname()}))
    assert describe(copy).state == "killed"
    (copy / "crash").mkdir()
    (copy / "crash" / "20260101-000000.rank1.txt").write_text("== traceback")
    assert describe(copy).state == "crashed"


# ---- stopping ------------------------------------------------------------------------------------------------------


@pytest.fixture
def stop_in_batch(monkeypatch: pytest.MonkeyPatch):
    """SIGTERM in the middle of the n-th call of a model's verb."""

    def arm(model: Path, verb: str, number: int) -> None:
        kind = type(__import__("unilatent").load(model))
        original, calls = getattr(kind, verb), []

        def signalled(*args: object, **kwargs: object) -> object:
            calls.append(1)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*args, **kwargs)

        monkeypatch.setattr(kind, verb, signalled)

    return arm


def test_f08_encoding_stops_after_a_batch_and_goes_on(
    tmp_path: Path, run_folder: Path, cli: Command, stop_in_batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM in the second of four batches: both are on disk, and the rest makes what one go would have made."""
    source = images(tmp_path / "in", each=5, size=8)

    def encode(out: str):
        return cli("encode", run_folder, source, "--out", tmp_path / out, "--batch-size", 3, "--shard-size", 4)

    assert encode("whole").code == 0
    stop_in_batch(run_folder, "encode", 2)
    stopped = encode("parts")
    assert stopped.code == 143 and "6 latents are in" in stopped.err and "resumes from there" in stopped.err, stopped
    assert len(json.loads((tmp_path / "parts" / "index.json").read_text())["names"]) == 6
    monkeypatch.undo()
    assert "10 latents" in (on := encode("parts").out) and "6 of them already encoded" in on
    from safetensors.torch import load_file

    names = sorted(path.name for path in (tmp_path / "whole").glob("[!.]*"))
    assert sorted(path.name for path in (tmp_path / "parts").glob("[!.]*")) == names and len(names) == 4
    for name in names:
        a, b = tmp_path / "whole" / name, tmp_path / "parts" / name
        if name.endswith(".json"):
            assert json.loads(a.read_text()) == json.loads(b.read_text())
        else:
            torch.testing.assert_close(load_file(a)["latents"], load_file(b)["latents"])


@pytest.mark.parametrize("verb", ["sample", "reconstruct", "decode"])
def test_f08_verbs_stop_after_a_batch_and_keep_it(
    tmp_path: Path, run_folder: Path, cli: Command, stop_in_batch, verb: str
) -> None:
    """SIGTERM in the second batch of five: two batches are there whole, exit code 143."""
    source, out = images(tmp_path / "in", each=5, size=8), tmp_path / "out"
    if verb == "decode":
        assert cli("encode", run_folder, source, "--out", tmp_path / "latents").code == 0
    arguments = {
        "sample": ("--num", 10, "--steps", 2), "reconstruct": (source,), "decode": (tmp_path / "latents",)
    }[verb]  # fmt: skip
    stop_in_batch(run_folder, "decode", 2)
    done = cli(verb, run_folder, *arguments, "--batch-size", 2, "--out", out)
    assert done.code == 143 and "stopped: 4" in done.err and "the same command" in done.err, done
    assert len(list(out.glob("00000?.png"))) == 4
    if verb == "sample":
        import numpy as np

        assert all(len(array) == 4 for array in np.load(out / "samples.npz").values())
        assert json.loads((out / "sampling.json").read_text())["made"] == 4
    if verb == "reconstruct":
        assert json.loads((out / "metrics.json").read_text())["num"] == 4
