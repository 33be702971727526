"""What commands write: nothing of a user is removed or replaced, and a full disk is one line."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import QUICK, Command
from PIL import Image

from unilatent import outputs as outputs_module
from unilatent.files import DiskError, disk_error, room, size_text, write_text
from unilatent.methods.base import LatentModel
from unilatent.outputs import RECORD, Outputs, in_shared_folder, refuse_overlap, single_file
from unilatent.runs import checkpoint as ckpt
from unilatent.runs.snapshots import trim_snapshots
from unilatent.shards.writing import MANIFEST
from unilatent.training.trainer import Trainer

VERBS = ("sample", "reconstruct", "encode", "decode", "evaluate", "train")


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, without records."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*")) if path.is_file() and path.name != RECORD
    }  # fmt: skip


def names(folder: Path) -> set[str]:
    return set(tree(folder))


# ---- the folder of a command -----------------------------------------------------------------------------------------


def put(outputs: Outputs, **files: str) -> None:
    with outputs.writing() as new:
        for name, text in files.items():
            (new / f"{name}.txt").write_text(text)


def test_a_second_set_takes_the_place_of_the_first(tmp_path: Path) -> None:
    put(Outputs(tmp_path, "sample"), a="1", b="2", c="3")
    second = Outputs(tmp_path, "sample")
    assert names(tmp_path) == {"a.txt", "b.txt", "c.txt"}, "nothing is removed before the first file is ready"
    put(second, a="4")
    assert tree(tmp_path) == {"a.txt": b"4"}
    lines = [json.loads(line) for line in (tmp_path / RECORD).read_text().splitlines()]
    assert [(line["command"], line["file"], line["bytes"]) for line in lines] == [("sample", "a.txt", 1)]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("a new file", lambda folder: (folder / "mine.txt").write_text("x")),
        ("a file in a subfolder", lambda folder: ((folder / "sub").mkdir(), (folder / "sub" / "mine").write_text("x"))),
        ("a file edited to another size", lambda folder: (folder / "a.txt").write_text("edited")),
        ("a file edited to the same size", lambda folder: (folder / "a.txt").write_text("9")),
        ("a link", lambda folder: ((folder / "a.txt").unlink(), (folder / "a.txt").symlink_to("b.txt"))),
        ("a link to a folder", lambda folder: (folder / "elsewhere").symlink_to("/tmp")),
        ("a lost record", lambda folder: (folder / RECORD).unlink()),
        ("a damaged record", lambda folder: (folder / RECORD).write_bytes(b'\xff{"c"\n[1]\n{"command": "sample"}\n')),
        ("a record of names outside", lambda folder: (folder / RECORD).write_text(
            json.dumps({"command": "sample", "file": "../b", "bytes": 1, "sha256": ""}) + "\n")),
    ],
)  # fmt: skip
def test_files_of_others_are_refused_by_name(tmp_path: Path, name: str, change: Callable[[Path], object]) -> None:
    put(Outputs(tmp_path, "sample"), a="1", b="2")
    change(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=r"holds files that `unilatent sample` did not write there \(\w"):
        Outputs(tmp_path, "sample")
    assert tree(tmp_path) == before


def test_files_of_another_command_are_files_of_others(tmp_path: Path) -> None:
    put(Outputs(tmp_path, "sample"), a="1")
    with pytest.raises(ValueError, match=r"`unilatent decode` did not write there \(a.txt\)"):
        Outputs(tmp_path, "decode")
    assert tree(tmp_path) == {"a.txt": b"1"}


def test_hidden_files_and_those_of_file_managers_do_not_matter_and_stay(tmp_path: Path) -> None:
    put(Outputs(tmp_path, "sample"), a="1")
    for name in (".DS_Store", "Thumbs.db", ".git/config"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    put(Outputs(tmp_path, "sample"), b="2")
    assert names(tmp_path) == {".DS_Store", "Thumbs.db", ".git/config", "b.txt"}


def test_a_file_that_comes_while_the_command_works_is_not_replaced(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path, "sample")
    put(outputs, a="1")
    (tmp_path / "b.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"b\.txt: is there, and `unilatent sample` did not write it"):
        put(outputs, b="2")
    assert tree(tmp_path) == {"a.txt": b"1", "b.txt": b"mine"}


def test_a_record_with_names_outside_removes_nothing(tmp_path: Path) -> None:
    """Even where size and hash are those of the file that the name leads to."""
    out, other = tmp_path / "out", tmp_path / "mine.txt"
    put(Outputs(out, "sample"), a="1")
    other.write_text("1")
    line = json.loads((out / RECORD).read_text())
    (out / "link").symlink_to(tmp_path)
    with (out / RECORD).open("a") as file:
        for name in ("../mine.txt", str(other), "link/mine.txt"):
            file.write(json.dumps({**line, "file": name}) + "\n")
    with pytest.raises(ValueError, match="link"):
        Outputs(out, "sample").begin()
    (out / "link").unlink()
    Outputs(out, "sample").begin()
    assert other.read_text() == "1" and names(out) == set()


@pytest.mark.parametrize("point", ["staged", "noted", "moved"])
def test_killed_at_any_point_the_same_command_works_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """Before a file is noted, between that and its move, and after it: the record is true, nothing is in the way."""

    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        raise Killed

    put(Outputs(tmp_path, "sample"), a="1")
    outputs = Outputs(tmp_path, "sample")
    outputs.begin()
    with pytest.raises(Killed), monkeypatch.context() as patch:
        if point == "staged":
            patch.setattr(outputs_module, "_append", die)
        if point == "noted":
            patch.setattr(Path, "replace", die)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # a killed process does not tidy up
        put(outputs, b="2")
        die()
    [left] = tmp_path.glob(f".unilatent-partial-{os.getpid()}@*")
    assert left.is_dir()
    dead = subprocess.Popen(["true"])
    dead.wait()
    left.rename(tmp_path / left.name.replace(str(os.getpid()), str(dead.pid)))
    put(Outputs(tmp_path, "sample"), c="3")
    assert tree(tmp_path) == {"c.txt": b"3"} and not list(tmp_path.glob(".unilatent-partial-*"))


@pytest.mark.parametrize("host", ["node-07.cluster", "", None])
@pytest.mark.parametrize("hours", [0.0, 23.0, 25.0, 1000.0])
def test_unfinished_files_of_another_machine_are_removed_when_they_are_old(
    tmp_path: Path, host: str | None, hours: float
) -> None:
    """Of whose processes nothing is known here: its number may be that of a living one of this machine, or of none.
    host: "" for this machine, None for older versions, which left the name out."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    parent = os.getppid()
    for pid in (dead.pid, parent):
        machine = "" if host is None else f"@{host or outputs_module._host()}"
        left = tmp_path / f".unilatent-partial-{pid}{machine}" / "1"
        left.mkdir(parents=True)
        (left / "a.txt").write_text("x")
        when = time.time() - 3600 * hours
        for path in (left / "a.txt", left, left.parent):
            os.utime(path, (when, when))
    (tmp_path / ".unilatent-partial-mine").mkdir()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        put(Outputs(tmp_path, "sample"), a="1")
    left_over = {path.name.partition("@")[0].rpartition("-")[2] for path in tmp_path.glob(".unilatent-partial-*")}
    young = host == "node-07.cluster" and hours < 24
    expected = {str(dead.pid), str(parent)} if young else set() if host else {str(parent)}
    assert left_over == expected | {"mine"}
    words = sorted(str(one.message) for one in told)
    assert len(words) == (2 if young else 0)
    for text in words:
        assert f" on node-07.cluster, last changed {hours:.1f} hours ago; they are removed 24 hours after" in text
    assert tree(tmp_path)["a.txt"] == b"1"


@pytest.mark.parametrize("change", ["recorded", "unrecorded", "edited", "of the user", "an image of the user"])
def test_a_file_in_a_shared_folder_is_replaced_only_if_it_is_the_command_s(tmp_path: Path, change: str) -> None:
    """As in RUN/eval. unrecorded: by an earlier version."""

    def write() -> None:
        outputs = in_shared_folder(tmp_path, "search")
        outputs.check("search-1.json", "search-1.png")
        with outputs.writing() as new:
            (new / "search-1.json").write_text('{"format_version": 1}')
            (new / "search-1.png").write_text("new")

    (tmp_path / "records").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    if change in ("recorded", "edited"):
        write()
    if change == "edited":
        (tmp_path / "search-1.json").write_text('{"format_version": 1, "my note": 2}')
    if change == "unrecorded":
        (tmp_path / "search-1.json").write_text('{"format_version": 1, "points": []}')
        (tmp_path / "search-1.png").write_text("old")
    if change == "of the user":
        (tmp_path / "search-1.json").write_text('{"my": 1}')
    if change == "an image of the user":
        (tmp_path / "search-1.png").write_text("mine")
    before = tree(tmp_path)
    if change in ("recorded", "unrecorded"):
        write()
        assert (tmp_path / "search-1.png").read_text() == "new"
    else:
        with pytest.raises(ValueError, match=r"search-1\.\w+: is there, and `unilatent search` did not write it, or"):
            write()
        assert tree(tmp_path) == before
    assert (tmp_path / "notes.txt").read_text() == "mine"


INSIDE = {
    "equal": ("in", "in"), "output inside": ("in", "in/out"), "input inside": ("out/in", "out"),
    "a file of the output": ("out/file.png", "out"), "through a link": ("in", "link/out"), "dots": ("in", "o/../in"),
}  # fmt: skip


@pytest.mark.parametrize("case", INSIDE)
def test_outputs_and_inputs_do_not_overlap(tmp_path: Path, case: str) -> None:
    source, out = (tmp_path / name for name in INSIDE[case])
    for folder in ("in", "out/in", "o"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    (tmp_path / "out" / "file.png").touch()
    (tmp_path / "link").symlink_to("in")
    with pytest.raises(ValueError, match=r"--out .*(is the input itself|lies in)"):
        refuse_overlap(out, [None, source], around=True)
    refuse_overlap(tmp_path / "elsewhere", [None, source, "https://host/data", "no/such/folder"], around=True)


def test_one_file_is_replaced_only_if_the_command_wrote_it(tmp_path: Path) -> None:
    for text in ("1", "2"):
        with single_file(tmp_path / "a.npz", "reference").writing() as new:
            (new / "a.npz").write_text(text)
    assert tree(tmp_path) == {"a.npz": b"2"}
    (tmp_path / "b.npz").write_text("mine")
    for name in ("b.npz", ""):
        with pytest.raises(ValueError, match=r"did not write it|is a folder"):
            single_file(tmp_path / name, "reference")


# ---- every verb ------------------------------------------------------------------------------------------------------


def line_of(verb: str, run: Path, sources: dict[str, Path], out: Path) -> list[object]:
    """A command line of each verb that writes to `out`."""
    lines: dict[str, list[object]] = {
        "sample": [run, "--num", 6, "--steps", 1, "--batch-size", 2],
        "reconstruct": [run, sources["images"], "--batch-size", 2],
        "encode": [run, sources["images"], "--batch-size", 2, "--shard-size", 2],
        "decode": [run, sources["latents"], "--batch-size", 2],
        "evaluate": [run, "--num", 64, "--num-held-out", 8, "--steps", 1, "--metrics", "frechet_pixels,psnr"],
        "train": ["digits", *QUICK],
        "analyze": [run, "--num", 16],
        "ema": [run, "--sigma-rel", "0.1"],
        "prepare": [sources["images"]],
    }
    start = ["data", "prepare"] if verb == "prepare" else [verb]
    return [*start, *lines[verb], "--out", out]


PRODUCTS = {
    "sample": {"grid.png", "samples.npz", "sampling.json", *(f"{i:06d}.png" for i in range(6))},
    "reconstruct": {"side_by_side.png", "metrics.json", *(f"{i:06d}.png" for i in range(8))},
    "encode": {"index.json", *(f"latents_{i:05d}.safetensors" for i in range(4))},
    "decode": {f"{i:06d}.png" for i in range(8)},
}


@pytest.mark.parametrize("verb", ["sample", "reconstruct", "encode", "decode", "analyze", "ema", "prepare"])
def test_a_folder_of_the_user_s_files_is_refused(
    cli: Command, run_folder: Path, sources: dict[str, Path], tmp_path: Path, verb: str
) -> None:
    """Files with the very names that the command would write, or remove, and others."""
    out = tmp_path / "photos"
    out.mkdir()
    for name in (
        "000001.png",
        "000001.txt",
        "index.json",
        "config.json",
        "shard-000000.tar.tmp-1",
        "x.tmp-1",
        "a.done",
    ):
        (out / name).write_text("mine")
    before = tree(out)
    refused = cli(*line_of(verb, run_folder, sources, out))
    assert refused.code == 2 and refused.err.count("\n") == 1, refused
    assert "did not write there (000001.png, 000001.txt, a.done, ...)" in refused.err, refused
    assert tree(out) == before and not (out / RECORD).exists()


@pytest.mark.parametrize("verb", PRODUCTS)
def test_a_verb_replaces_its_own_files_and_no_others(
    cli: Command, run_folder: Path, sources: dict[str, Path], tmp_path: Path, verb: str
) -> None:
    """Three times: the second time all is its own, the third time one file has been edited."""
    out = tmp_path / "out"
    line = line_of(verb, run_folder, sources, out)
    for number in range(2):
        done = cli(*line)
        assert done.code == 0 and names(out) == PRODUCTS[verb], done
        replaces = number == 1 and verb != "encode"  # which goes on with what is there
        assert ("wrote there before" in done.err) == replaces, done.err
    edited = sorted(PRODUCTS[verb])[0]
    (out / edited).write_text("[]")
    before = tree(out)
    refused = cli(*line)
    if verb == "encode":  # an index that is none
        assert refused.code == 2 and edited in refused.err
    else:
        assert refused.code == 2 and f"did not write there ({edited})" in refused.err, refused
    assert tree(out) == before


@pytest.mark.parametrize("verb", ["reconstruct", "encode", "decode", "prepare", "train"])
@pytest.mark.parametrize("place", ["", "sub/out"])
def test_an_output_in_the_input_is_refused(
    cli: Command, run_folder: Path, sources: dict[str, Path], tmp_path: Path, verb: str, place: str
) -> None:
    own = {key: shutil.copytree(path, tmp_path / key) for key, path in sources.items()}
    source = own["latents" if verb == "decode" else "images"]
    before = tree(tmp_path)
    extra = [f"data.path={source}", "data.held_out=2"] if verb == "train" else []
    refused = cli(*line_of(verb, run_folder, own, source / place), *extra)
    assert refused.code == 2 and re.search("is the input itself|lies in the input", refused.err), refused
    assert tree(tmp_path) == before


def test_an_analysis_replaces_its_own_files_and_no_others(cli: Command, run_folder: Path, tmp_path: Path) -> None:
    line = line_of("analyze", run_folder, {"images": tmp_path, "latents": tmp_path}, tmp_path / "out")
    for _ in range(2):
        done = cli(*line)
        assert done.code == 0 and {"analysis.json", "latents.png"} <= names(tmp_path / "out"), done.err
    (tmp_path / "out" / "latents.png").write_text("mine")
    refused = cli(*line)
    assert refused.code == 2 and "did not write there (latents.png)" in refused.err
    assert (tmp_path / "out" / "latents.png").read_text() == "mine"


@pytest.mark.parametrize("verb", ["evaluate", "search", "train", "calibrate"])
@pytest.mark.parametrize("name", ["cats/1.png", "model.safetensors", "table.csv"])
def test_what_keeps_several_files_in_a_folder_refuses_a_folder_of_others(
    cli: Command, run_folder: Path, tmp_path: Path, verb: str, name: str
) -> None:
    """Beside notes and logs they start; the files of an earlier evaluation are no files of others."""
    out, line = tmp_path / "out", {
        "evaluate": [run_folder, "--num", 4, "--num-held-out", 4, "--steps", 1, "--metrics", "psnr"],
        "search": [run_folder, "--over", "guidance_scale", "--metric", "frechet_pixels", "--values", "1,2", "--num", 64,
                   "--steps", 1],
        "train": ["digits", *QUICK],
        "calibrate": ["digits-ul", "--psnr", 20],
    }[verb]  # fmt: skip
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("mine")
    (out / "notes.txt").write_text("mine")
    before = tree(out)
    refused = cli(verb, *line, "--out", out)
    assert refused.code == 2 and refused.err.count("\n") == 1 and name in refused.err, refused
    assert tree(out) == before
    (out / name).unlink()
    if verb != "calibrate":
        done = cli(verb, *line, "--out", out)
        assert done.code == 0, done.err
        if verb != "train":
            assert cli(verb, *line, "--out", out).code == 0
        assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("verb", ["sample", "reconstruct", "encode", "decode", "evaluate", "analyze", "ema"])
def test_no_verb_writes_into_the_data_of_its_run(
    cli: Command, run_folder: Path, sources: dict[str, Path], tmp_path: Path, verb: str
) -> None:
    run, data = shutil.copytree(run_folder, tmp_path / "run"), tmp_path / "photos"
    data.mkdir()
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("path: digits", f"path: {data}"))
    refused = cli(*line_of(verb, run, sources, data / "new"))
    assert refused.code == 2 and "new: lies in the input" in refused.err, refused
    assert not list(data.iterdir())


@pytest.mark.parametrize(("report", "victim"), [
    ("page.html", "page.html"), ("README.html", "README.md"), ("card.md", "card.md"), ("card.md", "card-samples.png"),
])  # fmt: skip
def test_a_report_replaces_no_file_of_the_user(
    cli: Command, run_folder: Path, tmp_path: Path, report: str, victim: str
) -> None:
    """Neither the page nor what is written beside it; refused before the evaluation."""
    (tmp_path / victim).write_text("mine")
    refused = cli("evaluate", run_folder, "--out", tmp_path / "eval", "--report", tmp_path / report)
    assert refused.code == 2 and f"--report {tmp_path / victim}: is there" in refused.err, refused
    assert tree(tmp_path) == {victim: b"mine"}


def test_a_report_is_written_again(cli: Command, run_folder: Path, sources: dict[str, Path], tmp_path: Path) -> None:
    line = [*line_of("evaluate", run_folder, sources, tmp_path / "eval"), "--report", tmp_path / "page.html"]
    for _ in range(2):
        done = cli(*line)
        assert done.code == 0 and {"page.html", "page.md"} <= names(tmp_path), done.err


@pytest.mark.parametrize(
    "name", ["config.yaml", "metrics.jsonl", "model/weights.bin", "samples/a.png", "eval/step_1.json"]
)
def test_training_does_not_start_among_files_that_it_would_replace(cli: Command, tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine: 1\n")
    for resume in ([], ["--resume", "auto"]):
        refused = cli("train", "digits", *QUICK, "--out", tmp_path, *resume)
        assert refused.code == 2 and refused.err.count("\n") == 1, refused
        assert tree(tmp_path) == {name: b"mine: 1\n"}


def test_files_beside_a_run_s_own_stay(cli: Command, run_folder: Path, tmp_path: Path) -> None:
    """In the folder of checkpoints, in a checkpoint, among the EMA snapshots and the records of an evaluation."""
    copy = tmp_path / "run"
    shutil.copytree(run_folder, copy)
    mine = ["checkpoints/step_00000004.keep/a", "checkpoints/old.tmp-1", "checkpoints/step_00000004/notes.txt",
            "ema/step_best.safetensors", "ema/step_1.txt", "log.txt.old"]  # fmt: skip
    for name in mine:
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text("mine")
    pruned = cli("ckpt", "prune", copy, "--keep", 2)
    assert pruned.code == 0 and "left step_00000004: notes.txt" in pruned.out, pruned
    ckpt.clean(copy / "checkpoints", 4)
    trim_snapshots(copy, 0)
    ckpt.save(copy / "checkpoints", 5, lambda at: (at / "model.safetensors").write_bytes(b"x"), keep=1)  # type: ignore[arg-type]
    assert {name for name in mine if (copy / name).is_file()} == set(mine)
    ckpt.verify(copy / "checkpoints" / "step_00000004")


def test_leftovers_of_shards_are_removed_and_nothing_else(
    cli: Command, sources: dict[str, Path], tmp_path: Path
) -> None:
    """In a folder that holds finished shards, which is checked again."""
    line = line_of("prepare", tmp_path, sources, tmp_path)
    assert cli(*line).code == 0
    for name in ("mine.tmp-1", "shard-mine.done", "notes.txt", "shard-000000.tar.tmp-1"):
        (tmp_path / name).write_text("mine")
    assert cli(*line).code == 0
    assert names(tmp_path) == {MANIFEST, "shard-000000.tar", "mine.tmp-1", "shard-mine.done", "notes.txt"}


# ---- disks -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[bool]:
    """A file system in memory, if this process may have one."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
    try:
        yield done.returncode == 0
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def small_files(most: int) -> Iterator[None]:
    """No file of this process grows beyond this size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def whole(folder: Path) -> None:
    """Assert that every file is complete, and that nothing is left of what was not finished."""
    for path in folder.rglob("*"):
        assert ".tmp" not in path.name and "partial" not in path.name, path
        if path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
        if path.suffix == ".npz":
            with np.load(path) as file:
                assert all(len(file[name]) for name in file.files)
        if path.suffix in (".json", ".jsonl"):
            for line in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
                json.loads(line)
    for path in (folder / "checkpoints").glob("step_*"):
        ckpt.verify(path)


@pytest.mark.faults
@pytest.mark.parametrize("left", [0, 16])
@pytest.mark.parametrize("verb", VERBS)
def test_f43_a_full_disk_is_one_line(
    cli: Command, run_folder: Path, sources: dict[str, Path], tmp_path: Path, verb: str, left: int
) -> None:
    """Six verbs on a disk of 2 MB that is full, or nearly: folder, needed and free in one line, nothing by halves,
    nothing of the user lost; with space, the same command works."""
    disk = tmp_path / "disk"
    line = line_of(verb, run_folder, sources, disk / "out")
    with mounted(disk, "size=2m") as real:
        mine = disk / "mine.bin"
        mine.write_bytes(bytes((2**21 - left * 1024) if real else 100))
        with contextlib.nullcontext() if real else small_files(200):
            failed = cli(*line)
        last = failed.err.strip().splitlines()[-1]
        assert failed.code == 1 and "Traceback" not in failed.err, failed
        assert re.match(rf"error: .*{disk / 'out'}.*: (No space left.*|File too large) \(.* needed, .* free", last)
        whole(disk)
        assert mine.stat().st_size > 99 and not mine.read_bytes().strip(b"\0")
        mine.unlink()
        if real:
            subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        again = cli(*line, *(["--resume", "auto"] if verb == "train" else []))
        assert again.code == 0, again.err
        whole(disk)
        assert names(disk / "out") == PRODUCTS[verb] if verb in PRODUCTS else names(disk / "out")


@pytest.mark.faults
@pytest.mark.parametrize("verb", VERBS)
def test_f44_a_folder_that_is_read_only_is_one_line(
    cli: Command, run_folder: Path, sources: dict[str, Path], tmp_path: Path, verb: str
) -> None:
    """Six verbs with the output on a read-only disk: refused before any work, and nothing there changes."""
    disk = tmp_path / "disk"
    with mounted(disk, "size=2m") as real:
        (disk / "mine.txt").write_text("mine")
        if real:
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        else:
            disk.chmod(0o555)
        refused = cli(*line_of(verb, run_folder, sources, disk / "out"))
        assert refused.code == 2, refused
        last = refused.err.strip().splitlines()[-1]
        assert re.match(rf"error: --out {disk / 'out'}: cannot be written \((Read-only|Permission)", last), refused
        assert tree(disk) == {"mine.txt": b"mine"}
        if not real:
            disk.chmod(0o755)


@pytest.mark.faults
@pytest.mark.parametrize("verb", VERBS)
def test_f46_a_closed_terminal_stops_after_a_batch(
    cli: Command, run_folder: Path, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """SIGHUP, twice, in the second batch or step: what is done is there whole, and the same command works; ignored as
    by nohup, it changes nothing."""
    kind, method = {
        "encode": (LatentModel, "encode"), "train": (Trainer, "_one_step"),
        "evaluate": (LatentModel, "sample_layout"),
    }.get(verb, (LatentModel, "decode"))  # fmt: skip
    if verb != "train":
        from unilatent.loading import load

        network = load(run_folder, device="cpu")
        kind, method = type(network), "encode" if verb == "encode" else "decode"
    original, calls = getattr(kind, method), []

    def closing(*arguments: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            for _ in range(2):
                signal.raise_signal(signal.SIGHUP)
        return original(*arguments, **options)

    out = tmp_path / "out"
    line = line_of(verb, run_folder, sources, out)
    with monkeypatch.context() as patch:
        patch.setattr(kind, method, closing)
        stopped = cli(*line)
    assert stopped.code == 129, stopped
    assert ("SIGHUP: saved step 2" if verb == "train" else "stopped: ") in stopped.err
    whole(out)
    if verb in ("sample", "reconstruct", "decode"):
        assert {"000000.png", "000003.png"} <= names(out) and "000004.png" not in names(out)
    again = cli(*line, *(["--resume", "auto"] if verb == "train" else []))
    assert again.code == 0, again.err

    calls.clear()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(kind, method, closing)
            ignored = cli(*line_of(verb, run_folder, sources, tmp_path / "nohup"))
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert ignored.code == 0 and len(calls) >= 2, ignored


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_disk_errors_have_folder_needed_and_free(tmp_path: Path, number: int) -> None:
    with pytest.raises(DiskError, match=rf"{tmp_path}/no: .* \(3 MiB needed, [\d.e+]+ \w+ free there\); free"), \
            room(tmp_path / "no", lambda: 3 * 2**20):  # fmt: skip
        raise OSError(number, os.strerror(number))


def test_errors_about_other_places_and_of_other_kinds_are_not_about_the_disk(tmp_path: Path) -> None:
    for error in (PermissionError(errno.EACCES, "no", "/elsewhere/input"), ConnectionError(errno.ECONNREFUSED, "no"),
                  ValueError("x"), OSError("no number")):  # fmt: skip
        with pytest.raises(type(error)) as raised, room(tmp_path, 1):
            raise error
        assert raised.value is error


def test_an_error_of_safetensors_is_understood(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    with pytest.raises(DiskError, match="File too large"), small_files(1000), room(tmp_path, 1):
        save_file({"a": torch.zeros(10_000)}, tmp_path / "a.safetensors")


def test_a_text_that_does_not_fit_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_text(path, "old")
    with pytest.raises(DiskError), small_files(1000):
        write_text(path, "x" * 10_000)
    assert tree(tmp_path) == {"a.json": b"old"}


def test_sizes_in_words() -> None:
    assert [size_text(count) for count in (0, 1023, 1024, 1536, 2**20, 3 * 2**30)] == [
        "0 bytes", "1023 bytes", "1 KiB", "1.5 KiB", "1 MiB", "3 GiB"
    ]  # fmt: skip
    error = disk_error(Path("/no/such"), (errno.EROFS, "Read-only file system"), 1)
    assert str(error.strerror) == "/no/such: cannot be written (Read-only file system); give another folder"
