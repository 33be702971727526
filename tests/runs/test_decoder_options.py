"""Options that choose solver and steps of a diffusion decoder when a trained model is used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Command
from PIL import Image

import unilatent
from unilatent.methods.base import LatentModel
from unilatent.presets import preset
from unilatent.sampling import decode, encode, reconstruct, sample


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an untrained joint stage of `digits-ul` whose configuration has 4 decoder steps."""
    folder = tmp_path_factory.mktemp("options") / "model"
    first = preset("digits-ul").first
    assert first is not None
    LatentModel.build(first.override("sampling.decoder_steps=4").model()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for i in range(2):
        levels = np.random.default_rng(i).integers(0, 256, (8, 8), np.uint8)
        Image.fromarray(levels).save(folder / f"{i}.png")
    return folder


def read(folder: Path) -> torch.Tensor:
    return torch.stack([torch.tensor(np.asarray(Image.open(path))) for path in sorted(folder.glob("0*.png"))])


def levels(data: torch.Tensor) -> torch.Tensor:
    return (data[:, 0] * 255).round().to(torch.uint8)


def test_python_surface(model: Path) -> None:
    """The keywords are those of SamplingConfig; defaults are the model's own."""
    network, data = unilatent.load(model, device="cpu"), torch.rand(2, 1, 8, 8)
    default = reconstruct(network, data)
    assert torch.equal(default, reconstruct(network, data, decoder_steps=4, decoder_solver="ddim"))
    assert not torch.equal(default, reconstruct(network, data, decoder_steps=2))
    assert not torch.equal(default, reconstruct(network, data, decoder_solver="heun"))
    latents = encode(network, data)
    assert torch.equal(default, decode(network, latents))
    assert torch.equal(reconstruct(network, data, decoder_steps=2), decode(network, latents, decoder_steps=2))
    for function, argument in ((reconstruct, data), (decode, latents)):
        with pytest.raises(ValueError, match="decoder_solver: 'rk4' cannot be used"):
            function(network, argument, decoder_solver="rk4")


def test_every_command_takes_them(cli: Command, model: Path, images: Path, tmp_path: Path) -> None:
    """Commands write the results of the Python functions with the same settings, and record these settings."""
    network = unilatent.load(model, device="cpu")
    options = ("--decoder-steps", 2, "--decoder-solver", "heun", "--device", "cpu")
    chosen: dict[str, Any] = {"decoder_steps": 2, "decoder_solver": "heun"}
    data = torch.from_numpy(np.stack([np.asarray(Image.open(images / f"{i}.png")) for i in range(2)]))[:, None] / 255

    done = cli("sample", model, "--num", 2, "--steps", 2, *options, "--out", tmp_path / "s")
    assert done.code == 0, done.err
    assert torch.equal(read(tmp_path / "s"), levels(sample(network, 2, num_inference_steps=2, **chosen)))
    assert json.loads((tmp_path / "s" / "sampling.json").read_text()).items() >= chosen.items()

    done = cli("reconstruct", model, images, *options, "--out", tmp_path / "r")
    assert done.code == 0, done.err
    want = levels(reconstruct(network, data, **chosen))
    assert torch.equal(read(tmp_path / "r"), want) and not torch.equal(want, levels(reconstruct(network, data)))
    assert json.loads((tmp_path / "r" / "metrics.json").read_text()).items() >= chosen.items()

    assert cli("encode", model, images, "--device", "cpu", "--out", tmp_path / "z").code == 0
    done = cli("decode", model, tmp_path / "z", *options, "--out", tmp_path / "d")
    assert done.code == 0 and torch.equal(read(tmp_path / "d"), want), done.err

    done = cli("evaluate", model, "--data", "digits", "--num", 0, "--num-held-out", 3, "--metrics", "psnr", *options,
               "--report", tmp_path / "card.md", "--out", tmp_path / "e")  # fmt: skip
    assert done.code == 0, done.err
    (path,) = (tmp_path / "e").glob("evaluation-*.json")
    assert json.loads(path.read_text())["numbers"][0]["key"] == "psnr3/adm/decoder-heun-2"


def test_a_search_over_decoder_steps(cli: Command, model: Path, images: Path, tmp_path: Path) -> None:
    """With a metric of reconstructions, which only these steps change; the output ends with the best command."""
    line = ("search", model, "--data", images, "--over", "decoder_steps", "--metric", "psnr", "--device", "cpu")
    done = cli(*line, "--values", "1,3", "--decoder-solver", "euler", "--out", tmp_path)
    assert done.code == 0, done.err
    (path,) = tmp_path.glob("search-*.json")
    content = json.loads(path.read_text())
    keys = [point["key"] for point in content["points"]]
    assert [key.split("/")[-1] for key in keys] == ["decoder-euler-1", "decoder-euler-3"]
    assert content["protocol"]["decoding"] == {"decoder_solver": "euler"}
    best = content["best"]["decoder_steps"]
    assert "--decoder-solver euler" in done.out and f"--decoder-steps {best:g}" in done.out
    refused = cli(*line, "--decoder-steps", 3, "--out", tmp_path)
    assert refused.code == 2 and "--decoder-steps: is the setting to search over" in refused.err


def test_a_decoder_in_one_pass_refuses_them(cli: Command, run_folder: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for words in (
        ("sample", run_folder, "--decoder-steps", 2), ("evaluate", run_folder, "--decoder-solver", "ddim"),
        ("reconstruct", run_folder, images, "--decoder-steps", 2), ("decode", run_folder, out, "--decoder-steps", 2),
        ("search", run_folder, "--over", "guidance_scale", "--decoder-steps", 2),
        ("search", run_folder, "--over", "decoder_steps"),
    ):  # fmt: skip
        refused = cli(*words, "--out", out)
        assert refused.code == 2 and "this model decodes in one pass" in refused.err, refused
        assert refused.err.count("\n") == 1 and not out.exists()
