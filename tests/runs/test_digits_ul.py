"""The whole of `digits-ul`, both stages: what it must reach on held-out digits and on new ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Command

from unilatent.analysis.comparison import last_evaluation


@pytest.mark.slow
def test_digits_ul_reconstructs_generates_and_uses_its_latents(cli: Command, tmp_path: Path) -> None:
    """Seed 0: PSNR of at least 18 dB, 85 % of new digits recognised as the class asked for, and a decoder that loses
    at least 1.2 times as much with another digit's latents; bits are printed."""
    run, out = tmp_path / "run", tmp_path / "analysis"
    assert cli("train", "digits-ul", "seed=0", "--out", run).code == 0
    numbers = {measured.row.key: measured.row.value for measured in last_evaluation(run)}
    assert cli("analyze", run, "--out", out).code == 0
    found = json.loads((out / "analysis.json").read_text())
    bits = ", ".join(f"{value['mean']:.3g} {name.replace('_', ' ')}" for name, value in found["rate"]["bits"].items())
    psnr, recognised, use = numbers["psnr"], numbers["recognised"], found["rate"]["use"]
    print(f"PSNR {psnr:.2f} dB, recognised {recognised:.1f} %, use {use:.3g}; {bits}")
    assert psnr >= 18 and recognised >= 85 and use >= 1.2
    assert not [line for line in found["warnings"] if line.startswith("collapse")]
