"""`unilatent doctor`: what a report of a problem needs, and nothing secret. And ~ in every path."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import QUICK, Command
from test_cli import images

import unilatent
from unilatent import devices
from unilatent.cli import doctor
from unilatent.version import __version__

OPTIONAL = ("datasets", "s3fs", "gcsfs", "transformers", "sentencepiece", "rdkit", "pymatgen", "SMACT",
            "openbabel-wheel", "posebusters", "tensorboard", "wandb", "accelerate")  # fmt: skip


def test_doctor_says_what_is_asked_first(cli: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("UNILATENT_CACHE", str(tmp_path))
    (tmp_path / "weights.bin").write_bytes(bytes(3 * 2**20))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = cli("doctor")
    assert done.code == 0 and done.err == ""
    lines = done.out.splitlines()
    assert lines[0] == f"unilatent   {__version__} in {Path(unilatent.__file__).parent}"
    for name in OPTIONAL:
        assert re.search(rf"^.{{12}}{name} +(\d+\.\S+|not installed)$", done.out, re.M), name
    assert re.search(r"^cpu +\S.*: \d+ cores.*, torch uses \d+ threads$", done.out, re.M)
    assert re.search(r"^ +instructions: \S+", done.out, re.M)
    assert re.search(r"^memory +[\d.]+ GiB, [\d.]+ GiB available$", done.out, re.M)
    assert f"cache       {tmp_path}: 3 MiB in 1 file" in lines
    assert any(line.startswith("hub         offline, by HF_HUB_OFFLINE; token ") for line in lines)
    assert "variable    OMP_NUM_THREADS=3" in lines and "mps" not in done.out


def test_doctor_prints_no_secret(cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in doctor.SECRETS:
        monkeypatch.setenv(name, "a-secret")
    for name in ("HF_ENDPOINT", "PYTHONPATH"):
        monkeypatch.setenv(name, "https://user:a-secret@host/x")
    done = cli("doctor")
    assert done.code == 0 and "a-secret" not in done.out + done.err
    assert all(f"variable    {name} is set" in done.out for name in doctor.SECRETS)
    assert "variable    HF_ENDPOINT=https://...@host/x" in done.out and "token set" in done.out


def test_instruction_sets_are_those_of_the_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(devices, "CPUINFO", cpuinfo)
    assert doctor._instructions() == [] and doctor._processor()
    first = "model name\t: A\nflags\t\t: fpu avx2 avx512f amx_bf16 amx_tile\n"
    cpuinfo.write_text(f"{first}\nmodel name\t: B\nflags\t: bf16\n")
    assert doctor._instructions() == ["avx2", "avx512f", "amx_bf16"] and doctor._processor() == "A"


def test_doctor_measures_products_and_says_what_auto_is(
    cli: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(devices, "CPUINFO", cpuinfo)
    for flags, emulated, chosen in (("amx_bf16", "", "bf16"), ("avx2", "(emulated) ", "fp32")):
        cpuinfo.write_text(f"flags : {flags}\n")
        found = re.search(
            r"^ +matrix products, GFLOP/s of one core: fp32 ([\d.e+]+), bf16 (\D*)([\d.e+]+); precision=auto is (\w+) "
                r"\(presets that name their own: digits, digits-ul\)$",
            cli("doctor").out, re.M,
        )  # fmt: skip
        assert found and (found[2], found[4]) == (emulated, chosen)
        assert all(0.001 < float(found[i]) < 1e5 for i in (1, 3))


def test_products_are_measured_in_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """At sizes that a processor with instructions for them manages; only at the smallest where they are emulated."""
    speed = {"fp32": 1e11, "bf16": 5e8}
    spent, sizes = dict.fromkeys(speed, 0.0), dict[str, list[int]]()

    def measured(device: str, precisions: tuple[str], size: int, seconds: float) -> dict[str, float]:
        (name,) = precisions
        taken = 2 * size**3 / speed[name]
        spent[name] += max(taken, seconds)
        sizes.setdefault(name, []).append(size)
        return {name: taken}

    monkeypatch.setattr(devices, "matmul_seconds", measured)
    assert devices.matmul_rates("cpu") == pytest.approx(speed)
    assert sizes == {"fp32": [256, 512, 1024], "bf16": [256]} and max(spent.values()) < 0.3


def test_a_missing_library_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._version("no-such-library") == "not installed"
    assert doctor._version("torch")[0].isdigit()


# ---- paths -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with a run and images; the working folder is elsewhere."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    shutil.copytree(run_folder, tmp_path / "home" / "run")
    images(tmp_path / "home" / "images", each=4)
    (tmp_path / "home" / "empty.txt").write_text("\n")
    return tmp_path / "home"


LINES = [
    "sample ~/run --num 2 --steps 1 --out ~/out",
    "reconstruct ~/run ~/images --out ~/out",
    "encode ~/run ~/images --out ~/out",
    "evaluate ~/run/model --num 8 --steps 1 --metrics psnr --data ~/images --out ~/out",
    "analyze ~/run/model --num 8 --data ~/images --out ~/out",
    "data prepare ~/images --out ~/out",
    "train digits data.path=~/images data.held_out=2 --out ~/out",
    "train digits --resume ~/run/checkpoints/step_00000008 --out ~/out",
    "ckpt verify ~/run",
    "runs ~/run --plot",
]


@pytest.mark.parametrize("line", LINES)
def test_the_home_folder_is_meant_by_a_tilde(cli: Command, home: Path, line: str) -> None:
    done = cli(*line.split(), *(QUICK if line.startswith("train") else ()))
    assert done.code == 0, done.err
    assert (home / "out").is_dir() or "--out" not in line
    assert list(Path.cwd().iterdir()) == []


def test_a_tilde_in_files_and_from_python(cli: Command, home: Path) -> None:
    (home / "run.yaml").write_text("preset: digits\ndata:\n  path: ~/images\n  held_out: 2\n")
    done = cli("train", "~/run.yaml", *QUICK, "--out", "~/trained")
    assert done.code == 0 and (home / "trained" / "model").is_dir(), done.err
    model = unilatent.load("~/run", device="cpu")
    model.save_pretrained("~/saved")
    again = unilatent.UNITE.from_pretrained("~/saved")
    assert again.fingerprint() == model.fingerprint() and json.loads((home / "saved" / "config.json").read_text())
    assert list(Path.cwd().iterdir()) == []


def test_a_text_may_begin_with_a_tilde(cli: Command, home: Path) -> None:
    """A prompt is no path; an unknown user's home is not there."""
    refused = cli("sample", "~/run", "--prompt", "~/x", "--out", "~/out")
    assert refused.code == 2 and "prompt" in refused.err and str(home) not in refused.err
    refused = cli("sample", "~no-such-user/run", "--out", "~/out")
    assert refused.code == 2 and "~no-such-user/run: no such folder" in refused.err


@pytest.mark.skipif(sys.platform != "linux", reason="torch uses GNU's OpenMP library on Linux")
@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, "0")],
)
def test_threads_of_a_command_wait_briefly_unless_told_otherwise(given: dict[str, str], spins: str):
    clean = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [sys.executable, "-m", "unilatent", "presets"]  # the library says on loading what it read
    ran = subprocess.run(
        command, capture_output=True, text=True, check=True, env=clean | given | {"OMP_DISPLAY_ENV": "verbose"}
    )
    assert re.findall(r"GOMP_SPINCOUNT = '(\d+)'", ran.stderr) == [spins]
