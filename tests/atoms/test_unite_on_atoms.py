"""UNITE on systems of atoms of different sizes: padding, gradients, published model sizes, sampling."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hand_made import MOST, data_of

from unilatent.conditions.class_label import ClassLabelConfig
from unilatent.maths.streams import Streams
from unilatent.methods.unite import UNITE, UNITEDraws
from unilatent.model_config import ModelConfig
from unilatent.presets import preset
from unilatent.registry import available, find
from unilatent.sampling import sample, sample_batches
from unilatent.types import Batch, Layout, Tokens

KINDS = {"molecule": "free", "crystal": "bound"}
kinds = pytest.mark.parametrize("kind", [kind for kind in KINDS if kind in available("modalities")])
SMALL = {"width": 32, "depth": 2, "heads": 2}


def model_of(kind: str, classes: int = 0, awake: bool = True) -> UNITE:
    torch.manual_seed(0)
    encoder = {**SMALL, "in_context_tokens": 0}
    config = ModelConfig.parse({
        "modality": {"name": kind, "max_atoms": MOST, "elements": list(range(1, 10))},
        "conditions": {"class_label": ClassLabelConfig(num_classes=classes).plain()} if classes else {},
        "method": {
            "name": "unite", "latent_channels": 8, "generative_encoder": encoder, "decoder": {**SMALL, "mlp_width": 64},
            "time_shift": 1.0, "reconstruction_noise": 0.1,
        },
    })  # fmt: skip
    model = UNITE(config)
    for p in model.parameters():
        if awake:
            p.data += 0.05 * torch.randn_like(p)
    return model


def batch_of(kind: str, n: int = 5) -> Batch:
    return Batch(data_of(KINDS[kind], n), {})


def streams(n: int) -> Streams:
    return Streams(("test",), range(n))


def shortened(model: UNITE, batch: Batch, atoms: int) -> Batch:
    """The same systems with fewer padding slots."""
    shorter = {
        key: value[:, :atoms] if value.ndim > 1 and key != "lattice" else value for key, value in batch.data.items()
    }
    return Batch(shorter, batch.values)


@kinds
def test_padding_slots_change_nothing(kind: str) -> None:
    """Latents, reconstruction, loss terms and gradients do not change with three padding slots fewer."""
    model, batch = model_of(kind), batch_of(kind)
    short = shortened(model, batch, 6)
    wide, narrow = model.modality.pack(batch.data), model.modality.pack(short.data)
    k = narrow.layout.num_tokens
    assert k == wide.layout.num_tokens - 3
    found = []
    for data, tokens in ((batch, wide), (short, narrow)):
        model.zero_grad()
        draws = model.draw(streams(5), tokens.layout.num_tokens)
        parts = list(model.loss_from(data, tokens, draws))
        for part in parts:
            part.value.backward()
        terms = {key: value.detach() for part in parts for key, value in part.terms.items()}
        z = model.tokenize(tokens, draws.registers, draws.register_time)
        made = model.decoder(z, tokens.layout) * tokens.layout.mask[..., None]
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((terms, z.detach(), made.detach(), grads))
    (terms, z, made, grads), (terms2, z2, made2, grads2) = found
    for a, b in ((z[:, :k], z2), (made[:, :k], made2), (terms, terms2)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert not z[:, k:].any() and not made[:, k:].any()
    for name in grads2:
        torch.testing.assert_close(grads[name], grads2[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@kinds
def test_what_padded_slots_hold_changes_nothing(kind: str) -> None:
    model, batch = model_of(kind).eval(), batch_of(kind)
    tokens = model.modality.pack(batch.data)
    mask = tokens.layout.mask
    junk = Tokens(torch.where(mask[..., None], tokens.values, 50.0), tokens.layout)
    draws = model.draw(streams(5), tokens.layout.num_tokens)
    registers = torch.where(mask[..., None], draws.registers, -30.0)
    with torch.no_grad():
        a = model.tokenize(tokens, draws.registers, draws.register_time)
        b = model.tokenize(junk, registers, draws.register_time)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@kinds
def test_latents_determine_their_layout(kind: str) -> None:
    """Decoding latents without a layout gives the same atoms as with the layout of the data."""
    model, batch = model_of(kind).eval(), batch_of(kind)
    layout = model.modality.pack(batch.data).layout
    z = model.encode(batch.data)
    assert torch.equal((z != 0).any(-1), layout.mask)
    inferred, expected = model.decode(z), model.decode(z, layout)
    assert all(torch.equal(inferred[key], expected[key]) for key in expected)
    assert torch.equal(inferred["types"] > 0, batch.data["types"] > 0)
    parts = next(iter(sample_batches(model, 6, seed=1, num_inference_steps=3)))
    again = model.decode(parts.latents)
    assert torch.equal(again["types"], parts.data["types"])
    for wrong in (z.flip(1), torch.zeros_like(z)):
        with pytest.raises(ValueError, match=r"^latents: expected zeros at padding"):
            model.decode(wrong)


@kinds
def test_the_flow_leaves_the_latents_alone_and_reaches_the_shared_weights(kind: str) -> None:
    model, batch = model_of(kind), batch_of(kind)
    tokens = model.modality.pack(batch.data)
    draws = model.draw(streams(5), tokens.layout.num_tokens)
    latents: list[torch.Tensor] = []

    def watched(t: Tokens, registers: torch.Tensor, time: torch.Tensor, of: Callable = model.tokenize) -> torch.Tensor:
        z = of(t, registers, time)
        z.retain_grad()
        latents.append(z)
        return z

    model.tokenize = watched  # type: ignore[method-assign]
    reconstruction, flow = list(model.loss_from(batch, tokens, draws))
    flow.value.backward()
    assert latents[0].grad is None
    assert model.generative_encoder.transformer.blocks[0].mlp.w12.weight.grad.any()
    assert all(p.grad is None for p in model.generative_encoder.data_in.parameters())
    reconstruction.value.backward()
    assert latents[0].grad[tokens.layout.mask].any() and not latents[0].grad[~tokens.layout.mask].any()


@kinds
def test_latents_and_estimates_are_normalised(kind: str) -> None:
    """Each token has mean 0 and variance 1 over channels before the norm's scale and shift."""
    model, batch = model_of(kind), batch_of(kind)
    mask = model.modality.pack(batch.data).layout.mask
    norm = model.latent_norm
    z = model.encode(batch.data)
    layout = Layout(torch.arange(z.shape[1], dtype=torch.float32)[None, :, None], mask)
    estimate = model.denoise(torch.randn_like(z), 0.7, model.conditions.null(len(z)), layout)
    for latents in (z, estimate):
        plain = ((latents - norm.bias) / norm.weight)[mask]
        assert plain.mean(-1).abs().max() < 1e-5
        torch.testing.assert_close(plain.var(-1, unbiased=False), torch.ones(len(plain)), atol=1e-3, rtol=0)


@kinds
def test_an_oracle_s_samples_are_its_truth(kind: str) -> None:
    """With a denoiser that returns the true latents, every solver ends at them, and decoding gives the data."""
    model, batch = model_of(kind).eval(), batch_of(kind, 4)
    z, layout = model.encode(batch.data), model.modality.pack(batch.data).layout
    model.denoise = lambda noisy, t, cond, of=None, finish=True: z  # type: ignore[method-assign, assignment]
    model.modality.sample_layout = lambda streams, values=None: layout  # type: ignore[method-assign]
    truth = model.decode(z, layout)
    for solver, least in (("ddim", 1e-5), ("euler", 0.1), ("heun", 0.1)):  # velocities divide by at least t = 0.05
        part = next(iter(sample_batches(model, 4, solver=solver, num_inference_steps=50)))
        torch.testing.assert_close(part.latents, z, rtol=0, atol=least)
    part = next(iter(sample_batches(model, 4, solver="ddim", num_inference_steps=50)))
    for key, value in truth.items():
        torch.testing.assert_close(part.data[key], value, rtol=0, atol=1e-3)


@kinds
def test_guidance_of_one_is_the_conditional_estimate(kind: str) -> None:
    model = model_of(kind, classes=3).eval()
    plain = sample(model, 4, labels=[1], guidance_scale=1.0, num_inference_steps=4)
    calls = []
    denoise = model.denoise
    model.denoise = lambda z, t, cond, *rest, **kw: calls.append(len(z)) or denoise(z, t, cond, *rest, **kw)  # type: ignore
    again = sample(model, 4, labels=[1], guidance_scale=1.0, num_inference_steps=4)
    assert all(torch.equal(plain[key], again[key]) for key in plain) and set(calls) == {4}
    guided = next(iter(sample_batches(model, 4, labels=[1], guidance_scale=3.0, num_inference_steps=4)))
    one = next(iter(sample_batches(model, 4, labels=[1], guidance_scale=1.0, num_inference_steps=4)))
    assert not torch.allclose(guided.latents, one.latents, atol=1e-3)


@kinds
def test_draws_do_not_know_about_padding(kind: str) -> None:
    model = model_of(kind)
    wide: UNITEDraws = model.draw(streams(3), model.max_latents)
    narrow = model.draw(streams(3), model.max_latents - 4)
    assert torch.equal(wide.registers[:, :-4], narrow.registers)
    assert torch.equal(wide.flow_noise[:, :, :-4], narrow.flow_noise)


SIZES = [("qm9-unite-s", 32.70), ("mp20-unite-s", 33.00), ("joint-unite-s", 33.00)]


@pytest.mark.parametrize(("name", "millions"), SIZES)
def test_published_sizes(name: str, millions: float) -> None:
    """The paper's 33.00 M parameters are those of the Generative Encoder only, including inputs for fractional
    coordinates and lattices, which molecules lack; the decoder has 21.3 M."""
    run = preset(name).example()
    with torch.device("meta"):
        model = find("methods", run.method.name).build(run.model())
    encoder = sum(p.numel() for p in model.generative_encoder.parameters())
    decoder = sum(p.numel() for p in model.decoder.parameters())
    unused = 0 if name != "qm9-unite-s" else (24 + 384 + 1 + 6 + 384 + 1 + 21 - 29) * 384
    assert encoder / 1e6 == pytest.approx(millions, abs=0.005)
    assert (encoder + unused) / 1e6 == pytest.approx(33.00, abs=0.005)
    assert decoder / 1e6 == pytest.approx(21.35, abs=0.05)
