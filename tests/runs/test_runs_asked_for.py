"""A run conditioned on a property and a number of atoms, and its commands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import QUICK, Command

pytest.importorskip("rdkit")
SMALL = [
    f"method.{part}.{field}"
    for part in ("generative_encoder", "decoder") for field in ("width=32", "depth=1", "heads=2")
]  # fmt: skip


@pytest.fixture(scope="module")
def molecules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 molecules of 3 to 5 atoms; `gap` is the number of carbons plus noise, and unknown for every tenth."""
    rng, lines = np.random.default_rng(0), []
    for i in range(60):
        symbols = rng.choice(["H", "C", "O"], 3 + i % 3)
        gap = "" if i % 10 == 9 else f"gap={(symbols == 'C').sum() + 0.01 * i:.3f}"
        places = rng.normal(size=(len(symbols), 3)) * 2
        lines += [str(len(symbols)), f"{gap} weight={i}"]
        lines += [f"{symbol} {x:.3f} {y:.3f} {z:.3f}" for symbol, (x, y, z) in zip(symbols, places, strict=True)]
    path = tmp_path_factory.mktemp("data") / "molecules.xyz"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_property_from_a_file_to_samples_and_an_analysis(cli: Command, molecules: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    about = [f"data.path={molecules}", "data.held_out=24", "data.bad_share=0.5"]
    lacking = cli("train", "molecules", *QUICK, *SMALL, *about, "conditions.scalar.column=gap", "--out", run)
    assert lacking.code == 2 and "no properties (a column of numbers, named in data.property_column)" in lacking.err
    columns = ["data.property_column=gap", "conditions.scalar.column=gap"]
    unread = cli("train", "molecules", *QUICK, *SMALL, *about, columns[0], "--dry-run", "--out", tmp_path / "unread")
    assert "properties: the data have them, but no condition of this model reads them" in unread.out
    done = cli("train", "molecules", *QUICK, *SMALL, *about, *columns, "training.steps=2", "--out", run)
    assert done.code == 0, done.err
    scalar = json.loads((run / "model" / "config.json").read_text())["conditions"]["scalar"]
    assert scalar["column"] == "gap" and 0 < scalar["mean"] < 3 and len(scalar["quantiles"]) == 21

    samples = tmp_path / "made"
    sampled = cli(
        "sample", run, "--property", "1-2:3", "--num-atoms", "4,5", "--num", 6, "--steps", 2, "--out", samples
    )
    assert sampled.code == 0, sampled.err
    with np.load(samples / "samples.npz") as arrays:
        assert arrays["properties"].tolist() == [1, 1.5, 2] * 2 and (arrays["types"] > 0).sum(1).tolist() == [4, 5] * 3
    record = json.loads((samples / "sampling.json").read_text())
    assert (record["properties"], record["num_atoms"]) == ("1-2:3", "4,5")
    for arguments, words in (
        (["--num-atoms", 30], "num_atoms: 30 is out of range; this model makes 1 to 14"),
        (["--property", "high"], "properties: 'high' is neither a number"),
    ):
        refused = cli("sample", run, *arguments, "--out", tmp_path / "x")
        assert refused.code == 2 and words in refused.err and refused.err.count("\n") == 1
    with pytest.warns(UserWarning, match="50 is far outside"):
        assert cli("sample", run, "--property", 50, "--num", 1, "--steps", 1, "--out", samples).code == 0

    analysed = cli("analyze", run, "--out", tmp_path / "analysis")
    assert analysed.code == 0 and "probe gap" in analysed.out, analysed.err
    analysis = json.loads((tmp_path / "analysis" / "analysis.json").read_text())
    assert [(probe["name"], probe["samples"] < 24) for probe in analysis["probes"]] == [
        ("gap", True),
        ("weight", False),
    ]
    assert (tmp_path / "analysis" / "interpolation.png").is_file()


def test_images_have_no_number_of_atoms(cli: Command, run_folder: Path, tmp_path: Path) -> None:
    for arguments, words in (
        (["--num-atoms", 3], "--num-atoms: samples of this model have no number of atoms"),
        (["--property", 3], "properties: this model has no such condition; it takes labels"),
    ):
        refused = cli("sample", run_folder, *arguments, "--out", tmp_path / "x")
        assert refused.code == 2 and words in refused.err and not (tmp_path / "x").exists()
