"""Pictures that somebody made, to be judged: each exactly as it lies there, in a format that loses nothing."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..base import Dataset
from . import arrays
from .data import Frame, PictureFiles, View, is_npz, locate, open_picture, picture_names

FIELD = "--samples"
OWN = "samples.npz"
"""What `unilatent sample` writes beside its pictures: the same, with their labels."""
GREY = ("1", "L", "I", "I;16", "F")
"""Pillow's modes without colour."""
LOSSY = "which changes pixels, and with them every distance; save samples as PNG, or as .npz (arr_0, uint8)"


class _Made(PictureFiles):
    def __init__(self, source: Path, frame: Frame):
        super().__init__(locate(source, FIELD), frame, cache=False)
        for name in self.names:
            if not name.lower().endswith(".png"):
                suffix = name.rpartition(".")[2].upper()
                raise ValueError(f"{FIELD} {source}: {name} is a {suffix} file, {LOSSY}")

    def picture(self, index: int) -> Tensor:
        name = self.root + self.names[index]
        raw, where = self.source.read(name), self.source.where(name)
        picture = open_picture(raw, self.frame.channels, where)
        size, wanted = (picture.height, picture.width), (self.frame.height, self.frame.width)
        if size != wanted:
            raise ValueError(f"{FIELD}: {where} is {_written(size)}, not {_written(wanted)} (height x width)")
        if (kind := Image.open(io.BytesIO(raw)).format) != "PNG":
            raise ValueError(f"{FIELD}: {where} holds a {kind} picture, {LOSSY}")
        pixels = np.asarray(picture).reshape(*size, -1)  # (H, W, C)
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy()).float() / 255


def dataset(source: Path, frame: Frame) -> Dataset:
    """All pictures of a .npz, or of a folder or zip of PNG files, with labels where there are any."""
    source = _arrays_of(source.expanduser())
    made = arrays.Pictures(source, frame, FIELD) if is_npz(source) else _Made(source, frame)
    return View(made, range(len(made.names)))


def resolution_of(source: Path) -> tuple[int, int, int] | None:
    """(height, width, channels) of the first picture; None where there is none."""
    source = _arrays_of(source.expanduser())
    if is_npz(source):
        return arrays.resolution_of(source, FIELD)
    files = locate(source, FIELD)
    name = picture_names(files, FIELD)[0]
    opened = open_picture(files.read(name), 3, files.where(name))
    with Image.open(io.BytesIO(files.read(name))) as picture:
        channels = 1 if picture.mode in GREY else 3
    return opened.height, opened.width, channels


def _arrays_of(source: Path) -> Path:
    return source / OWN if (source / OWN).is_file() else source


def _written(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
