"""The public functions refuse wrong latents and wrong data, for every method and modality."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from building import apply, batch_of, model_of, rows
from torch import Tensor

from unilatent.registry import available
from unilatent.sampling import decode, encode, reconstruct

PAIRS = [(modality, method) for modality in available("modalities") for method in available("methods")]
WRONG: dict[str, Callable[[Tensor], Any]] = {
    "no samples": lambda z: z[:0],
    "a channel less": lambda z: z[..., :-1],
    "no batch axis": lambda z: z[0],
    "whole numbers": lambda z: z.long(),
    "not numbers": lambda z: z * float("nan"),
    "an array": lambda z: z.numpy(),
    "nothing": lambda z: None,
}


@pytest.mark.parametrize(("modality", "method"), PAIRS)
def test_f31_every_method_refuses_wrong_latents(modality: str, method: str) -> None:
    """Empty, of another shape, not floats, not finite: one line, `latents: expected ...`."""
    model = model_of(modality, method).eval()
    data = batch_of(modality, 3).data
    latents, layout = model.encode(data), model.modality.pack(data).layout
    model.decode(latents, layout)
    for name, wrong in WRONG.items():
        for refused in (lambda z: model.decode(z, layout), lambda z: decode(model, z)):
            with pytest.raises(ValueError, match=r"^latents: expected") as error:
                refused(wrong(latents))
            assert "\n" not in str(error.value), name


@pytest.mark.parametrize(("modality", "method"), PAIRS)
def test_f31_every_method_refuses_data_without_samples_or_numbers(modality: str, method: str) -> None:
    """An empty batch and NaN values: one line that names the data, before any network runs."""
    model = model_of(modality, method).eval()
    data = batch_of(modality, 3).data
    poisoned = apply(data, lambda t: t * float("nan") if t.is_floating_point() else t)
    for wrong in (rows(data, slice(0)), poisoned):
        for verb in (model.encode, lambda x: encode(model, x), lambda x: reconstruct(model, x)):
            with pytest.raises(ValueError) as error:
                verb(wrong)
            assert ": " in str(error.value) and "\n" not in str(error.value)
