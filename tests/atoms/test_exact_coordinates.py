"""Coordinates keep their precision in bfloat16, the last step of sampling leaves no noise, padding changes no rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hand_made import MOST, data_of, modality_of
from torch import Tensor, nn

from unilatent.analysis.rates import rate_report
from unilatent.config import ConfigError
from unilatent.evaluation.protocol import Protocol
from unilatent.maths.streams import Streams
from unilatent.methods.base import LatentModel
from unilatent.model_config import ModelConfig, SamplingConfig
from unilatent.nets.layers import ExactLinear
from unilatent.presets import preset, presets
from unilatent.sampling import sample
from unilatent.types import Batch

NET = {"kind": "vit", "width": 32, "depth": 1, "heads": 2}
SMALL = {"width": 32, "depth": 1, "heads": 2}
METHODS: dict[str, dict[str, Any]] = {
    "unite": {
        "latent_channels": 4, "generative_encoder": {**SMALL, "in_context_tokens": 0},
        "decoder": {**SMALL, "mlp_width": 64},
    },
    "unified_latents": {"latent_channels": 4, "encoder": NET, "prior": NET, "decoder": NET},
}  # fmt: skip
SYSTEMS = {"molecule": "free", "crystal": "bound", "joint": "both"}


def config_of(method: str, modality: dict[str, Any], sampling: SamplingConfig | None = None) -> ModelConfig:
    return ModelConfig.parse({
        "modality": modality, "method": {"name": method, **METHODS[method]},
        "sampling": (sampling or SamplingConfig()).plain(),
    })  # fmt: skip


def model_of(method: str, kind: str = "molecule", max_atoms: int = MOST) -> Any:
    torch.manual_seed(0)
    model = LatentModel.build(config_of(method, {"name": kind, "max_atoms": max_atoms, "elements": list(range(1, 10))}))
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model.eval()


def in_bfloat16(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return function(*arguments)


def exact_layers(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, ExactLinear)}


def test_where_coordinates_enter_and_leave() -> None:
    """Every method, its tokenizers included; no layer of a model of images."""
    entry = {"fields.1.hidden", "fields.1.out"}
    unite, unified = model_of("unite"), model_of("unified_latents")
    assert exact_layers(unite) == {f"generative_encoder.data_in.{name}" for name in entry} | {"decoder.out"}
    decoder = {"decoder.backbone.values_in", "decoder.backbone.transformer.out"}
    assert exact_layers(unified) == {f"encoder.vit.values_in.{name}" for name in entry} | decoder
    second = ModelConfig.parse({
        "modality": unite.config.modality.plain(),
        "method": {"name": "latent_diffusion", "base": NET, "tokenizer_model": unite.config.plain()},
    })  # fmt: skip
    assert exact_layers(LatentModel.build(second)) == {f"tokenizer.{name}" for name in exact_layers(unite)}
    image = {"name": "image", "size": 4, "patch_size": 2, "channels": 1}
    for method in METHODS:
        assert not exact_layers(LatentModel.build(config_of(method, image)))


@pytest.mark.parametrize("form", ["autocast", "bfloat16"])
def test_a_decoder_s_coordinates_are_not_rounded(form: str) -> None:
    """They are products of the hidden values, to float32's precision. bfloat16 rounds numbers near 5 by up to 0.016."""
    model, data = model_of("unite"), data_of("free")
    model.decoder.out.bias.data[-3:] = 5.0
    if form == "bfloat16":
        model.bfloat16()
    hidden: list[Tensor] = []
    model.decoder.transformer.register_forward_hook(lambda _, __, out: hidden.append(out))
    z, layout = torch.randn(5, MOST, 4), model.modality.pack(data).layout
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=form == "autocast"):
        made = model.decoder(z, layout)
    out = model.decoder.out
    want = hidden[0].double() @ out.weight.double().T + out.bias.double()
    assert made.dtype == torch.float32 and hidden[0].dtype == torch.bfloat16
    torch.testing.assert_close(made.double(), want, rtol=0, atol=1e-5)
    rounded = (want.bfloat16().double() - want)[..., -3:].square().mean().sqrt()
    assert rounded > 0.004, "what a bfloat16 output would lose, in Angstrom"


@pytest.mark.parametrize("kind", SYSTEMS)
def test_the_data_s_tokens_know_no_autocast(kind: str) -> None:
    """Cartesian coordinates of a crystal are a product of fractions and cell, which autocast would round."""
    modality, data = modality_of(SYSTEMS[kind]), data_of(SYSTEMS[kind])
    plain = modality.pack(data).values
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(modality.pack(data).values, plain)


def test_a_diffusion_decoder_reads_noised_coordinates_in_full() -> None:
    """A shift of 0.001 at 5, which bfloat16 cannot represent, moves what the network reads as in float32."""
    read = model_of("unified_latents").decoder.backbone.values_in
    x = torch.full((1, 3, 13), 5.0)
    moved = x.clone()
    moved[..., -1] += 1e-3
    want = read(moved) - read(x)
    torch.testing.assert_close(in_bfloat16(read, moved) - in_bfloat16(read, x), want, rtol=0, atol=1e-6)
    assert want.abs().max() > 1e-5


@pytest.mark.parametrize("kind", ["molecule", "crystal"])
def test_padding_changes_no_rate(kind: str) -> None:
    """Bits per atom and per latent dimension, in training and in the analysis, with four slots more per sample."""
    found: list[dict[str, float]] = []
    few = model_of("unified_latents", kind)
    many = model_of("unified_latents", kind, max_atoms=MOST + 4)
    many.load_state_dict(few.state_dict())
    for model in (few, many):
        data = model.modality.check(data_of(SYSTEMS[kind], 6))
        with torch.no_grad():
            part = next(iter(model.loss(Batch(data, {}), Streams(("test",), range(6)))))
        report = rate_report(model, Batch(data, {}), draws=2)
        assert report is not None
        atoms = (data["types"] > 0).sum().item()
        bits = report.bits["bits_per_atom"]
        assert bits.mean == pytest.approx(6 * report.nats.mean / math.log(2) / atoms, rel=1e-6)
        found.append({
            **{name: value.item() for name, value in part.monitors.items()},
            **{f"report/{name}": bits.mean for name, bits in report.bits.items()}, "error": bits.error,
        })  # fmt: skip
    assert found[0].keys() >= {"bits_per_atom", "bits_per_latent_dimension"}
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.parametrize("solver", ["euler", "heun", "dopri5"])
def test_an_oracle_s_samples_have_no_noise_left(solver: str) -> None:
    """By default, the clamped velocity leaves up to 2.4 % (root mean square) of unit noise in the latents."""
    model, data = model_of("unite"), data_of("free", 4)
    z, layout = model.encode(data), model.modality.pack(data).layout
    model.denoise = lambda noisy, t, cond, of=None, finish=True: z
    model.modality.sample_layout = lambda streams, values=None: layout
    truth = model.decode(z, layout)
    clean = sample(model, 4, solver=solver, denoise_to_zero=True)
    assert all(torch.equal(clean[key], truth[key]) for key in truth)
    assert not torch.equal(sample(model, 4, solver=solver)["positions"], truth["positions"])


def test_atoms_end_clean_and_images_as_published() -> None:
    ends = {name: preset(name).sampling.denoise_to_zero for name in presets()}
    atoms = {
        "molecules",
        "molecules-qm9-like",
        "molecules-two-stage",
        "crystals",
        "crystals-prototypes",
        "joint",
        "qm9-unite-s",
        "qm9-unite-s-1h",
        "mp20-unite-s",
        "joint-unite-s",
    }
    assert {name for name, clean in ends.items() if clean} == atoms
    assert not SamplingConfig.parse({}).denoise_to_zero, "models that were saved without the field"


def test_latents_that_keep_noise_cannot_end_clean() -> None:
    modality = {"name": "molecule", "max_atoms": MOST, "elements": [1, 6]}
    with pytest.raises(ConfigError, match=r"^sampling\.denoise_to_zero: true, but the latents of unified_latents keep"):
        LatentModel.build(config_of("unified_latents", modality, SamplingConfig(denoise_to_zero=True)))
    with pytest.raises(ValueError, match=r"^denoise_to_zero: true, but this model's latents keep noise at t = 0"):
        sample(model_of("unified_latents"), 2, denoise_to_zero=True)


def test_the_end_is_part_of_a_number_s_protocol() -> None:
    """Numbers of different ends are not comparable; files from before the setting are of its default."""
    settings = SamplingConfig().plain()

    def protocol(**sampling: Any) -> Protocol:
        return Protocol(
            track="generation", num_samples=4, reference="training data", reference_data="", num_reference=8,
            preprocessing="centred atoms", resolution=(MOST,), sampling=sampling,
        )  # fmt: skip

    before = protocol(**{key: value for key, value in settings.items() if key != "denoise_to_zero"})
    assert before.differences(protocol(**settings)) == []
    clean = protocol(**{**settings, "denoise_to_zero": True})
    assert before.differences(clean) == [("sampling.denoise_to_zero", False, True)]
