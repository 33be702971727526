"""Variants of the authors' checkpoint files: key prefixes from compilation and wrappers, and other float types."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from golden import FOLDER, needs_golden

import unilatent
from unilatent.importers.unite_official import convert
from unilatent.model_folder import read_model

pytestmark = needs_golden


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_f39_prefixes_are_stripped_and_a_model_folder_is_the_same_model(tmp_path: Path, prefix: str) -> None:
    """From `.pt` to model to folder to model: all weights are equal for every key prefix."""
    content = torch.load(FOLDER / "tiny_ckpt.pt", weights_only=True)
    renamed = {name: {prefix + key: value for key, value in content[name].items()} for name in ("ema", "model")}
    torch.save(renamed, tmp_path / "x.pt")
    want = convert(FOLDER / "tiny_ckpt.pt").state_dict()
    model = convert(tmp_path / "x.pt")
    model.save_pretrained(tmp_path / "folder")
    for found in (model, read_model(tmp_path / "folder", unilatent.UNITE)):
        assert all(torch.equal(value, want[key]) for key, value in found.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_f39_other_float_widths_become_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    content = torch.load(FOLDER / "tiny_ckpt.pt", weights_only=True)
    torch.save({"ema": {key: value.to(dtype) for key, value in content["ema"].items()}}, tmp_path / "x.pt")
    want = convert(FOLDER / "tiny_ckpt.pt").state_dict()
    for key, value in convert(tmp_path / "x.pt").state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, want[key].to(dtype).float()), key
