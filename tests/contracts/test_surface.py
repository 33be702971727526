"""The public functions for every method and modality: wrong latents and data, types of weights, gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from building import apply, batch_of, model_of, rows, tensors
from torch import Tensor

from unilatent.registry import available
from unilatent.sampling import decode, encode, reconstruct, sample_batches

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


@pytest.mark.parametrize(("modality", "method"), PAIRS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_method_computes_in_the_type_of_its_weights(modality: str, method: str, dtype: torch.dtype) -> None:
    """Latents near those of float32; samples and reconstructions are data of the modality."""
    model, data = model_of(modality, method, awake=True).eval(), batch_of(modality, 3).data
    want = model.encode(data)
    model.to(dtype)
    latents = model.encode(data)
    assert latents.dtype == torch.float32
    tolerance = {torch.float64: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    assert float((latents - want).abs().mean()) < tolerance * float(want.abs().mean())
    model.modality.check(reconstruct(model, data, decoder_steps=2))
    for norm in ("norm_first", "guidance_first"):
        settings = {"num_inference_steps": 2, "decoder_steps": 2, "guidance_scale": 2.0, "guidance_norm": norm}
        made = next(iter(sample_batches(model, 2, **settings)))
        model.modality.check(made.data)
        assert made.latents.dtype == torch.float32 and made.latents.isfinite().all()


@pytest.mark.parametrize(("modality", "method"), PAIRS)
def test_every_method_gives_gradients_on_request(modality: str, method: str) -> None:
    """Of decoded data by latents, and of estimates by noised latents; none where nothing requires them."""
    model, data = model_of(modality, method).eval(), batch_of(modality, 3).data
    stream = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # of a frozen tokenizer too
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=stream)
    layout = model.modality.pack(data).layout
    latents = model.encode(data)
    settings = model.config.sampling.model_copy(update={"decoder_steps": 2})
    assert not any(x.requires_grad for x in tensors(model.decode(latents, layout, settings=settings)))
    z = latents.clone().requires_grad_()
    numbers = [x for x in tensors(model.decode(z, layout, settings=settings)) if x.requires_grad]
    assert numbers, "no data depend smoothly on the latents"
    torch.stack([x.square().sum() for x in numbers]).sum().backward()
    assert z.grad is not None and z.grad.isfinite().all() and z.grad.any()
    noised = torch.randn(latents.shape, generator=stream).requires_grad_()
    estimate = model.denoise(noised, 0.5, model.conditions.null(3), model.latent_layout(layout))
    estimate.square().sum().backward()
    assert noised.grad is not None and noised.grad.isfinite().all() and noised.grad.any()
