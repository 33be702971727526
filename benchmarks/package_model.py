"""Put the model of a finished run into the package, as `unilatent.load(NAME)` finds it.

    python benchmarks/package_model.py runs/digits digits

Stores the EMA weights as float16, evaluates the stored model as the run evaluates its own, draws new samples and
held-out reconstructions with it, and writes its folder with card, numbers and images, and SHA256SUMS. Prints the
numbers of the run and of the stored model side by side.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import unilatent
from unilatent.batches import load_all
from unilatent.config import read_yaml
from unilatent.evaluation.reference import splits_of
from unilatent.model_card import CARD
from unilatent.packaged import FOLDER, SUMS

COPIED = ("config.yaml", "env.json", "metrics.jsonl", "latest.json")
DRAWN, SHOWN = 16, 100


def command(*words: object) -> str:
    """Run a command of the package and return its JSON."""
    line = [sys.executable, "-m", "unilatent", *map(str, words), "--json"]
    return subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout


def stored_run(run: Path, place: Path, dtype: str) -> Path:
    """Write a run whose finished model is that of `run`, with rounded weights, its numbers and its images."""
    place.mkdir()
    for name in COPIED:
        shutil.copyfile(run / name, place / name)
    for name in ("checkpoints", "samples", "recon"):
        (place / name).mkdir()
    unilatent.load(run, device="cpu").save_pretrained(place / "model", dtype=dtype)
    num = read_yaml(run / "config.yaml")["training"]["evaluate_samples"]
    command("evaluate", place, "--num", num, "--device", "cpu")
    command("sample", place, "--num", SHOWN, "--device", "cpu", "--out", place / "made")
    shutil.copyfile(place / "made" / "grid.png", place / "samples" / "step_99999999.png")
    model = unilatent.load(place, device="cpu")
    splits = splits_of(model.modality, place, None)
    assert splits is not None
    real = load_all(splits.held_out, model.modality, limit=DRAWN).data
    made = unilatent.reconstruct(model, real)
    model.modality.draw_grid([real, made], place / "recon" / "step_99999999.png")
    return place


def numbers(record: Path) -> dict[str, float]:
    """The numbers of an evaluation file, by key."""
    return {number["key"]: number["value"] for number in json.loads(record.read_text())["numbers"]}


def write_sums() -> None:
    """List all files of all models."""
    paths = sorted(path for path in FOLDER.rglob("*") if path.is_file() and path.parent != FOLDER)
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(FOLDER).as_posix()}" for path in paths
    ]
    (FOLDER / SUMS).write_text("".join(f"{line}\n" for line in lines if "__pycache__" not in line))


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--licence", default="apache-2.0")
    given = parser.parse_args()
    torch.set_num_threads(1)
    target = FOLDER / given.name
    with tempfile.TemporaryDirectory() as temporary:
        place = stored_run(given.run, Path(temporary) / "run", given.dtype)
        (target / CARD).unlink(missing_ok=True)
        model = unilatent.load(place, device="cpu")
        model.save_pretrained(target, dtype=given.dtype, licence=given.licence, name=given.name)
        (own,) = (place / "eval").glob("evaluation-*.json")
        before, after = numbers(max((given.run / "eval").glob("step_*.json"))), numbers(own)
    write_sums()
    for key in after:
        print(f"{key:60} {before.get(key, float('nan')):10.4g} {after[key]:10.4g}")
    print(f"{target}: {sum(path.stat().st_size for path in target.iterdir()) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
