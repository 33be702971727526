"""Wrong inputs in Python and on the command line: one line names the field, what was expected and what was given."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import QUICK, Command
from PIL import Image

import unilatent
from unilatent.methods.base import LatentModel

GOOD = torch.full((2, 1, 8, 8), 0.5)
LATENTS = torch.zeros(2, 4, 16)


@pytest.fixture(scope="module")
def model(run_folder: Path) -> LatentModel:
    return unilatent.load(run_folder, device="cpu")


def with_pixel(value: float) -> torch.Tensor:
    images = GOOD.clone()
    images[1, 0, 3, 3] = value
    return images


# What is given as images -> words of the refusal: what was expected, what it is.
PICTURES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "0-255 floats": (GOOD * 510, ("[0, 1]", "[255, 255]", "divide by 255")),
    "[-1, 1] floats": (GOOD * 3 - 2, ("[0, 1]", "[-0.5, -0.5]", "(images + 1) / 2")),
    "uint8": (GOOD.mul(255).byte(), ("floats in [0, 1]", "torch.uint8", "divide by 255")),
    "int64": (GOOD.long(), ("floats in [0, 1]", "torch.int64")),
    "bool": (GOOD > 0, ("floats in [0, 1]", "torch.bool")),
    "HWC": (torch.zeros(2, 8, 8, 1), ("(B, 1, 8, 8)", "(2, 8, 8, 1)")),
    "RGB for grey": (torch.zeros(2, 3, 8, 8), ("(B, 1, 8, 8)", "(2, 3, 8, 8)", "convert their channels")),
    "no batch axis": (torch.zeros(1, 8, 8), ("(B, 1, 8, 8)", "(1, 8, 8)", "images[None]")),
    "odd sizes": (torch.zeros(2, 1, 7, 9), ("(B, 1, 8, 8)", "(2, 1, 7, 9)")),
    "larger": (torch.zeros(2, 1, 16, 16), ("(B, 1, 8, 8)", "(2, 1, 16, 16)")),
    "NaN": (with_pixel(torch.nan), ("[0, 1]", "NaN")),
    "infinity": (with_pixel(torch.inf), ("[0, 1]", "inf")),
    "minus infinity": (with_pixel(-torch.inf), ("[0, 1]", "-inf")),
    "an empty batch": (torch.zeros(0, 1, 8, 8), ("at least one", "empty")),
    "a number": (torch.tensor(0.5), ("(B, 1, 8, 8)", "()")),
    "an array": (GOOD.numpy(), ("tensor", "ndarray")),
    "a list": ([GOOD[0]], ("tensor", "list")),
    "nothing": (None, ("tensor", "NoneType")),
    "a path": ("images", ("tensor", "str")),
}
INTO_LATENTS: dict[str, Callable[[LatentModel, Any], object]] = {
    "model.encode": lambda model, data: model.encode(data),
    "encode": unilatent.encode,
    "reconstruct": unilatent.reconstruct,
}


@pytest.mark.parametrize("verb", INTO_LATENTS)
@pytest.mark.parametrize("case", PICTURES)
def test_f31_wrong_images_are_refused(model: LatentModel, case: str, verb: str) -> None:
    """0-255 floats, uint8, HWC, colour for grey, NaN, odd sizes, empty batches: field, expected, actual are named."""
    data, words = PICTURES[case]
    with pytest.raises(ValueError, match=r"^images: expected") as refused:
        INTO_LATENTS[verb](model, data)
    message = str(refused.value)
    assert all(word in message for word in words) and "\n" not in message, message


WRONG_LATENTS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "another K": (torch.zeros(2, 5, 16), ("(B, 4, 16)", "(2, 5, 16)")),
    "another D": (torch.zeros(2, 4, 8), ("(B, 4, 16)", "(2, 4, 8)")),
    "no batch axis": (torch.zeros(4, 16), ("(B, K, D)", "(4, 16)")),
    "as an image": (torch.zeros(2, 16, 2, 2), ("(B, K, D)", "(2, 16, 2, 2)")),
    "an empty batch": (torch.zeros(0, 4, 16), ("B > 0", "(0, 4, 16)")),
    "a number": (torch.tensor(1.0), ("(B, K, D)", "()")),
    "whole numbers": (LATENTS.long(), ("floats", "torch.int64")),
    "NaN": (LATENTS * torch.nan, ("finite", "NaN")),
    "infinity": (LATENTS + torch.inf, ("finite", "infinity")),
    "an array": (LATENTS.numpy(), ("tensor", "ndarray")),
    "nothing": (None, ("tensor", "NoneType")),
}


@pytest.mark.parametrize("verb", ["model.decode", "decode"])
@pytest.mark.parametrize("case", WRONG_LATENTS)
def test_f31_wrong_latents_are_refused(model: LatentModel, case: str, verb: str) -> None:
    latents, words = WRONG_LATENTS[case]
    with pytest.raises(ValueError, match=r"^latents: expected") as refused:
        model.decode(latents) if verb == "model.decode" else unilatent.decode(model, latents)
    message = str(refused.value)
    assert all(word in message for word in words) and "\n" not in message, message


REQUESTS: list[tuple[dict[str, Any], str]] = [
    ({"num": 0}, "num: 0 must be at least 1"),
    ({"num": -1}, "num: -1 must be at least 1"),
    ({"num": 2.5}, "num: 2.5 is not a whole number"),
    ({"num": "3"}, "num: '3' is not a whole number"),
    ({"num": True}, "num: True must be at least 1"),
    ({"seed": -1}, "seed: -1 must be at least 0"),
    ({"seed": 0.5}, "seed: 0.5 is not a whole number"),
    ({"batch_size": 0}, "batch_size: 0 must be at least 1"),
    ({"labels": 10}, "labels: 10 is out of range; this model has classes 0 to 9"),
    ({"labels": [0, -1]}, "labels: -1 is out of range; this model has classes 0 to 9"),
    ({"labels": 3.0}, "labels: '3.0' is neither a class number"),
    ({"labels": torch.tensor([1.5])}, "labels: '1.5' is neither a class number"),
    ({"labels": torch.tensor([11])}, "labels: 11 is out of range"),
    ({"labels": np.array([True])}, "labels: 'True' is neither a class number"),
    ({"labels": [None]}, "labels: 'None' is neither a class number"),
    ({"labels": []}, "labels: empty"),
    ({"labels": "zebra"}, "labels: 'zebra' is neither a class number"),
    ({"labels": 10**30}, f"labels: {10**30} is out of range"),
    ({"prompt": "a three"}, "prompt: this model has no such condition; it takes labels"),
    ({"guidance_scale": float("nan")}, "guidance_scale: nan cannot be used"),
    ({"guidance_scale": "high"}, "guidance_scale: 'high' cannot be used"),
    ({"num_inference_steps": 0}, "num_inference_steps: 0 cannot be used"),
    ({"guidance_interval": (0.5, 0.5)}, "guidance_interval: (0.5, 0.5) cannot be used"),
    ({"solver": "rk4"}, "solver: 'rk4' cannot be used"),
]


@pytest.mark.parametrize(("request_", "words"), REQUESTS, ids=[words[:40] for _, words in REQUESTS])
def test_f31_wrong_requests_are_refused(model: LatentModel, request_: dict[str, Any], words: str) -> None:
    """Labels out of range, negative or fractional, num=0, settings that cannot be used."""
    with pytest.raises(ValueError) as refused:
        unilatent.sample(model, **{"num": 2, "num_inference_steps": 1, **request_})
    assert str(refused.value).startswith(words) and "\n" not in str(refused.value), refused.value


def test_f31_what_is_right_in_another_type_passes(model: LatentModel) -> None:
    """The counterpart: numpy's and torch's numbers, half precision, and pixels off by rounding."""
    want = unilatent.sample(model, num=2, labels=[3, 4], num_inference_steps=1, seed=7)
    for labels in (np.array([3, 4]), torch.tensor([3, 4]), "3-4", ["3", 4], (3, 4), range(3, 5)):
        samples = unilatent.sample(model, num=np.int64(2), labels=labels, num_inference_steps=1, seed=np.int64(7))
        assert torch.equal(samples, want), labels
    z = unilatent.encode(model, GOOD)
    torch.testing.assert_close(model.encode(GOOD.double()), z, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.decode(z.double()), model.decode(z), atol=1e-5, rtol=0)
    model.encode((GOOD + 0.5) * (1 + 1e-4))


def noise(path: Path, size: tuple[int, int] = (8, 8), mode: str = "L") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size).save(path)
    return path


FILES: list[tuple[Callable[[Path], Path], str]] = [
    (lambda folder: folder / "missing", "missing does not exist"),
    (lambda folder: noise(folder / "tiny.png", (1, 1)).parent, "tiny.png: 1 x 1"),
    (lambda folder: _written(folder / "x.png", b"<html>"), "x.png: cannot be decoded"),
    (lambda folder: _written(folder / "x.bin", b"???"), "neither a folder nor a .zip"),
    (lambda folder: _written(folder / "only" / "x.txt", b"???").parent, "holds no images"),
]


def _written(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("verb", ["encode", "reconstruct"])
@pytest.mark.parametrize(("make", "words"), FILES, ids=[words for _, words in FILES])
def test_f31_wrong_files_are_refused(
    cli: Command, run_folder: Path, tmp_path: Path, verb: str, make: Callable[[Path], Path], words: str
) -> None:
    refused = cli(verb, run_folder, make(tmp_path / "in"), "--out", tmp_path / "out")
    assert refused.code == 2 and words in refused.err and refused.err.count("\n") == 1, refused
    assert not (tmp_path / "out").exists()


def test_f31_odd_files_are_brought_to_the_model_s_size(cli: Command, run_folder: Path, tmp_path: Path) -> None:
    """Files, unlike tensors, are converted: colour, odd sizes and 16 bits come out as the model's images."""
    noise(tmp_path / "in" / "odd.png", (9, 13))
    noise(tmp_path / "in" / "colour.png", (30, 20), "RGB")
    noise(tmp_path / "in" / "deep.png", (8, 8), "I;16")
    done = cli("reconstruct", run_folder, tmp_path / "in", "--out", tmp_path / "out")
    assert done.code == 0, done
    assert [Image.open(path).size for path in sorted((tmp_path / "out").glob("0*.png"))] == [(8, 8)] * 3


def test_f31_another_number_of_classes_is_refused_on_resume(cli: Command, run_folder: Path, tmp_path: Path) -> None:
    """A run of ten classes goes on with images of two: both numbers are named, nothing is touched."""
    copy = tmp_path / "run"
    shutil.copytree(run_folder, copy)
    for label in "ab":
        noise(tmp_path / "data" / label / "x.png")
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    refused = cli(
        "train", "digits", *QUICK, f"data.path={tmp_path / 'data'}", "data.held_out=0", "--resume", "auto",
        "--out", copy,
    )  # fmt: skip
    assert refused.code == 2 and refused.err.count("\n") == 1, refused
    assert re.search(r"conditions\.class_label\.\w+: .* but the checkpoint has", refused.err), refused
    assert before == {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    refused = cli("train", "digits", *QUICK, "conditions.class_label.num_classes=7", "--out", tmp_path / "other")
    assert refused.code == 2 and "num_classes: 7, but the data has 10 classes" in refused.err, refused
