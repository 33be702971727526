"""The built-in digits: scikit-learn's 1,797 handwritten digits of 8 x 8 pixels (UCI Optical Recognition)."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .._media.collection import Collection
from .._media.pixels import Frame, fit

DIGITS = "digits"
"""The value of `data.path` that selects this data."""
ORIGIN = (
    "Optical Recognition of Handwritten Digits by E. Alpaydin and C. Kaynak (UCI Machine Learning Repository, 1998, "
    "doi:10.24432/C50P49, CC BY 4.0), the 1,797 images of 8 x 8 pixels that scikit-learn contains."
)


class Digits(Collection):
    """All digits, resized to the frame."""

    numbers_are_names = True

    def __init__(self, frame: Frame):
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.frame = frame
        self.levels = digits.images.astype(np.float32)  # (1797, 8, 8), whole numbers 0 to 16
        self.labels = digits.target.tolist()
        self.names = [str(i) for i in range(len(self.levels))]
        self.class_names = tuple(str(i) for i in range(10))

    def load(self, index: int) -> Tensor:
        grey = self.levels[index] / 16
        if (self.frame.height, self.frame.width) != grey.shape:
            eight_bits = Image.fromarray(np.rint(grey * 255).astype(np.uint8))
            grey = np.asarray(fit(eight_bits, self.frame.height, self.frame.width)).astype(np.float32) / 255
        return torch.from_numpy(grey).repeat(self.frame.channels, 1, 1)

    def stamp(self, index: int) -> str:
        return hashlib.sha256(self.levels[index].tobytes()).hexdigest()
