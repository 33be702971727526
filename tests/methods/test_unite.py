"""UNITE: gradient routing, the loss against its formulas, ablations, padding, sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from unilatent.conditions.class_label import ClassLabelConfig
from unilatent.config import ConfigError
from unilatent.maths import weightings
from unilatent.maths.streams import Streams
from unilatent.methods.base import LatentModel
from unilatent.methods.unite import MIN_TIME, REGISTER_TIME, UNITE, UNITEConfig
from unilatent.modalities.crystal import CrystalConfig
from unilatent.modalities.image import ImageConfig
from unilatent.modalities.molecule import MoleculeConfig
from unilatent.model_config import ModelConfig
from unilatent.model_folder import refuse_other_tokens
from unilatent.nets.layers import muon_parameters
from unilatent.presets.image import imagenet256_unite
from unilatent.sampling import sample
from unilatent.types import Batch, Conditioning, Layout, Tokens

B = 4


def make(image: dict[str, Any] | None = None, perturb: bool = True, **fields: Any) -> UNITE:
    """A small model with changed fields; perturb: random trainable weights where initialisation has zeros."""
    plain = UNITEConfig.small().plain()
    for key, value in fields.items():
        plain[key] = {**plain[key], **value} if isinstance(value, dict) else value
    config = ModelConfig(
        modality=ImageConfig.parse({**ImageConfig.small().plain(), **(image or {})}),
        conditions={"class_label": ClassLabelConfig(num_classes=10)},
        method=UNITEConfig.parse(plain),
    )
    torch.manual_seed(0)
    model = UNITE(config)
    if perturb:
        for p in model.parameters():
            p.data += 0.05 * torch.randn_like(p) * p.requires_grad
    return model


def batch_for(model: UNITE, n: int = B) -> Batch:
    c = model.config.modality
    stream = torch.Generator().manual_seed(0)
    data = torch.rand(n, c.channels, c.height, c.width, generator=stream)
    return Batch(data, {"labels": torch.arange(n) % 10})


def streams(n: int = B) -> Streams:
    return Streams(("train", 0), range(n))


def gradients(model: UNITE, only: str | None = None) -> dict[str, torch.Tensor]:
    """Nonzero gradients, accumulated over the parts of the loss, or over those with a term called `only`."""
    model.zero_grad(set_to_none=True)
    for part in model.loss(batch_for(model), streams()):
        if only is None or only in part.terms:
            part.value.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def total(model: UNITE) -> float:
    return sum(part.value.item() for part in model.loss(batch_for(model), streams()))


# ---- gradients -------------------------------------------------------------------------------------------------------


def test_the_flow_term_gives_nothing_to_the_data_embedding_nor_to_the_decoder():
    flow = gradients(make(), only="flow")
    assert not [name for name in flow if name.startswith(("decoder.", "generative_encoder.data_in"))]
    assert "generative_encoder.latent_in.weight" in flow and "conditions.class_label.table.weight" in flow


def test_the_reconstruction_term_trains_encoder_and_decoder():
    trained = {"generative_encoder.data_in.weight", "decoder.out.weight", "generative_encoder.latent_in.weight"}
    assert trained <= gradients(make(), only="l1").keys()


def test_without_the_stop_the_flow_term_shapes_the_encoder():
    """Table 7's ablation. The loss is one part, so a reconstruction weight of 0 isolates the flow term."""
    free = gradients(make(stop_gradient=False, reconstruction_weight=0.0))
    assert "generative_encoder.data_in.weight" in free
    assert not [name for name in free if name.startswith("decoder.")]
    assert "generative_encoder.data_in.weight" not in gradients(make(reconstruction_weight=0.0))


def test_stopping_changes_gradients_not_the_loss():
    parts = list(make(stop_gradient=False).loss(batch_for(make()), streams()))
    assert len(parts) == 1 and parts[0].terms.keys() == {"l1", "squared", "flow"}
    assert parts[0].value.item() == pytest.approx(total(make()), rel=1e-6)


def test_separate_weights_share_nothing():
    model = make(shared_weights=False)
    flow, reconstruction = gradients(model, only="flow"), gradients(model, only="l1")
    assert any(name.startswith("denoiser.") for name in flow)
    assert not [name for name in flow if name.startswith(("generative_encoder.", "decoder."))]
    assert not [name for name in reconstruction if name.startswith("denoiser.")]
    assert not model.denoiser.data_in.weight.requires_grad
    shared = make()
    assert shared.denoiser is None and model.num_trainable > 1.3 * shared.num_trainable


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_chunks_of_the_flow_draws_change_nothing(chunk: int):
    whole, chunked = make(flow_draws=3), make(flow_draws=3, flow_chunk=chunk)
    parts = list(chunked.loss(batch_for(chunked), streams()))
    assert len(parts) == 1 + -(-3 // chunk)
    assert total(chunked) == pytest.approx(total(whole), rel=1e-6)
    a, b = gradients(whole), gradients(chunked)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-4, atol=1e-6)


def test_chunks_need_the_stop():
    with pytest.raises(ConfigError, match="flow_chunk must be null when stop_gradient is false"):
        UNITEConfig.parse({"stop_gradient": False, "flow_chunk": 1})


# ---- the loss against its formulas -----------------------------------------------------------------------------------


def test_a_local_start_needs_registers_with_a_token_of_their_own():
    encoder = {"width": 32, "depth": 1, "heads": 2, "in_context_tokens": 0, "local_start": True}
    with pytest.raises(ValueError, match="num_latents is 4"):
        UNITEConfig(num_latents=4, generative_encoder=encoder)
    assert UNITEConfig(generative_encoder=encoder).generative_encoder.local_start


def test_the_flow_loss_is_the_weighted_error_of_the_clean_estimate_over_each_draw():
    model = make(flow_draws=2)
    batch = batch_for(model)
    draws = model.draw(streams(), 4)
    z = model.tokenize(model.modality.pack(batch.data), draws.registers, draws.register_time).detach()
    want = 0.0
    for draw in range(2):
        for row in range(B):
            u = torch.sigmoid(draws.flow_time[row, draw])
            t = 2 * u / (1 + u)
            noisy = (1 - t) * z[row] + t * draws.flow_noise[row, draw]
            dropped = draws.drop[row, draw, 0] < 0.1
            cond = (
                model.conditions.null(1)
                if dropped
                else model.conditions({"labels": batch.values["labels"][row : row + 1]})
            )
            estimate = model.denoise(noisy[None], t, cond)[0]
            want += weightings.velocity(t, MIN_TIME) * (z[row] - estimate).square().mean() / B
    parts = list(model.loss(batch, streams()))
    torch.testing.assert_close(parts[1].terms["flow"], want, rtol=1e-4, atol=0)
    torch.testing.assert_close(parts[1].value, 0.1 * want, rtol=1e-4, atol=0)


def test_reconstruction_noise_reaches_half_of_the_samples_up_to_its_largest_time():
    model = make()
    n = 2000
    draws = model.draw(streams(n), 4)
    z = torch.full((n, 4, 16), 2.0)
    noisy = model.add_reconstruction_noise(z, draws)
    touched = (noisy != z).flatten(1).any(1)
    assert abs(touched.float().mean() - 0.5) < 4 * 0.5 / n**0.5
    t = ((noisy - draws.noise * 0.3 - 0.7 * z).abs().flatten(1).amax(1)[touched], draws.noise_time[touched])
    assert t[0][t[1] > 0.999].numel() == 0 or t[0][t[1] > 0.999].max() < 0.05
    expected = z + 0.3 * draws.noise_time[:, None, None] * (draws.noise - z)
    torch.testing.assert_close(noisy[touched], expected[touched])
    assert not any((model.add_reconstruction_noise(z, draws._replace(noisy=torch.ones(n))) != z).flatten())


def test_registers_lie_in_the_last_hundredth_of_time():
    model = make()
    times: list[torch.Tensor] = []
    model.generative_encoder.register_forward_pre_hook(lambda _, args: times.append(args[1]))
    model.encode(batch_for(model, 8).data)
    assert REGISTER_TIME == 0.01 and times[0].min() >= 0.99 and times[0].max() <= 1 and times[0].std() > 0


def test_draws_depend_on_their_sample_alone_and_differ_in_kind():
    model = make()
    whole, alone = model.draw(streams(5), 4), model.draw(Streams(("train", 0), [3]), 4)
    assert all(torch.equal(a[3:4], b) for a, b in zip(whole, alone, strict=True))
    assert not torch.equal(whole.registers, whole.noise) and not torch.equal(whole.noise, whole.flow_noise[:, 0])
    assert not torch.equal(whole.noisy, whole.noise_time) and not torch.equal(whole.noisy, whole.register_time)


# ---- shapes, norms, ablations ----------------------------------------------------------------------------------------

VARIANTS = {
    "a latent for each token": {"num_latents": None},
    "more latents than tokens": {"num_latents": 20},
    "one latent": {"num_latents": 1},
    "separate weights": {"shared_weights": False},
    "gradient through the latents": {"stop_gradient": False},
    "fixed layer norm": {"latent_norm": "layer_fixed"},
    "rms norm": {"latent_norm": "rms"},
    "no block norm": {"generative_encoder": {"block_norm": False}},
    "no in-context tokens": {"generative_encoder": {"in_context_tokens": 0}},
    "no reconstruction noise": {"reconstruction_noise": 0.0},
    "a stem": {"decoder": {"stem_width": 24}},
    "other widths": {
        "latent_channels": 6,
        "generative_encoder": {"width": 24, "heads": 2},
        "decoder": {"width": 36, "heads": 3},
    },
}
IMAGES = {
    "wide": {"size": [4, 12]},
    "tall": {"size": [12, 4], "patch_size": 4},
    "colour": {"channels": 3},
    "one patch": {"patch_size": 8},
    "single pixels": {"size": [2, 3], "patch_size": 1},
}


def steps_and_samples(model: UNITE) -> None:
    batch = batch_for(model)
    before = model.encode(batch.data)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for part in model.loss(batch, streams()):
        part.value.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    optimizer.step()
    assert not torch.equal(model.encode(batch.data), before)
    k = model.method.num_latents or model.modality.max_tokens
    assert before.shape == (B, k, model.latent_channels)
    samples = sample(model, 3, num_inference_steps=2)
    assert samples.shape == (3, *batch.data.shape[1:]) and samples.min() >= 0 and samples.max() <= 1


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_variant_builds_steps_and_samples(fields: dict[str, Any]):
    steps_and_samples(make(**fields))


@pytest.mark.parametrize("num_latents", [None, 5])
@pytest.mark.parametrize("image", IMAGES.values(), ids=IMAGES.keys())
def test_other_images(image: dict[str, Any], num_latents: int | None):
    steps_and_samples(make(image, num_latents=num_latents))


@pytest.mark.parametrize("norm", ["layer", "layer_fixed", "rms"])
def test_every_latent_and_every_estimate_is_normalised(norm: str):
    model = make(perturb=False, latent_norm=norm)
    torch.nn.init.normal_(model.generative_encoder.transformer.out.weight)
    z = model.encode(batch_for(model).data)
    estimate = model.denoise(torch.randn(B, 4, 16), 0.5, model.conditions.null(B)).detach()
    for latents in (z, estimate):
        torch.testing.assert_close(latents.square().mean(-1), torch.ones(B, 4), rtol=1e-3, atol=1e-3)
        if norm != "rms":
            torch.testing.assert_close(latents.mean(-1), torch.zeros(B, 4), rtol=0, atol=1e-5)
    assert bool(list(model.latent_norm.parameters())) == (norm != "layer_fixed")


def test_the_block_norm_ablation_drops_its_weights_alone():
    full, without = make(), make(generative_encoder={"block_norm": False})
    removed = full.state_dict().keys() - without.state_dict().keys()
    assert removed == {f"generative_encoder.transformer.blocks.{i}.norm3.weight" for i in range(3)}


def test_muon_trains_neither_embedding_of_data_nor_outputs_nor_tables_of_positions():
    model = make()
    by_muon = {id(p) for p in muon_parameters(model)}
    other_matrices = {name for name, p in model.named_parameters() if p.ndim == 2 and id(p) not in by_muon}
    assert other_matrices == {
        "generative_encoder.data_in.weight", "generative_encoder.latent_positions",
        "generative_encoder.transformer.out.weight", "generative_encoder.transformer.out_modulation.weight",
    }  # fmt: skip


# ---- padding ---------------------------------------------------------------------------------------------------------


def ragged(model: UNITE, sizes: list[int], width: int) -> Tokens:
    """Tokens of samples of several sizes; padding holds noise."""
    stream = torch.Generator().manual_seed(1)
    mask = torch.arange(width) < torch.tensor(sizes)[:, None]
    rows = [torch.randn(n, model.modality.channels, generator=torch.Generator().manual_seed(n)) for n in sizes]
    values = 30 * torch.randn(len(sizes), width, model.modality.channels, generator=stream)
    for padded, row in zip(values, rows, strict=True):
        padded[: len(row)] = row
    return Tokens(values, Layout(torch.arange(width).float()[None, :, None].expand(-1, -1, 2), mask))


@pytest.mark.parametrize("num_latents", [None, 4])
def test_padding_is_invisible_to_the_tokenizer_the_denoiser_and_the_decoder(num_latents: int | None):
    model = make(num_latents=num_latents).eval()
    sizes, width = [16, 3, 9], 16
    whole = ragged(model, sizes, width)
    latent = model.latent_layout(whole.layout)
    k = latent.num_tokens
    registers = torch.randn(3, k, 16, generator=torch.Generator().manual_seed(2))
    times = torch.tensor([0.1, 0.5, 0.9])
    labels = torch.tensor([1, 2, 3])
    cond = model.conditions({"labels": labels})
    with torch.no_grad():
        z = model.tokenize(whole, registers, times)
        estimate = model.denoise(registers, 0.4, cond, latent)
        decoded = model.decoder(registers, whole.layout)
        for i, n in enumerate(sizes):
            m = n if num_latents is None else k
            layout = Layout(whole.layout.positions[:, :n])
            alone = Tokens(whole.values[i : i + 1, :n], layout)
            noise, one = registers[i : i + 1, :m], Conditioning(cond.vector[i : i + 1])
            torch.testing.assert_close(model.tokenize(alone, noise, times[i : i + 1])[0], z[i, :m], rtol=0, atol=1e-5)
            torch.testing.assert_close(model.denoise(noise, 0.4, one)[0], estimate[i, :m], rtol=0, atol=1e-5)
            torch.testing.assert_close(model.decoder(noise, layout)[0], decoded[i, :n], rtol=0, atol=1e-5)


# ---- sizes -----------------------------------------------------------------------------------------------------------

SIZES = {
    ("b", "b"): 217_643_616, ("m", "b"): 318_821_456, ("l", "b"): 545_528_384, ("xl", "b"): 762_776_352,
    ("xl", "l"): 980_425_504, ("b", "s"): 153_291_360, ("b", "l"): 435_292_768, ("l", "l"): 763_177_536,
}  # fmt: skip


@pytest.mark.parametrize(("sizes", "count"), SIZES.items(), ids=str)
def test_parameter_counts_of_the_authors_models(sizes: tuple[str, str], count: int):
    with torch.device("meta"):
        model = LatentModel.build(imagenet256_unite(*sizes).model())
    assert sum(p.numel() for p in model.parameters()) == model.num_trainable == count


def test_models_that_read_other_tokens_have_other_fingerprints_and_are_refused() -> None:
    """Frames of molecules and origins of crystals change tokens, not their shape."""
    pairs = [
        (MoleculeConfig(max_atoms=4), {"frame": "first"}), (CrystalConfig(max_atoms=4), {"origin": "rarest"}),
    ]  # fmt: skip
    encoder = {"width": 16, "depth": 1, "heads": 2, "in_context_tokens": 0}
    for plain, settings in pairs:
        configs = [plain, plain.model_copy(update=settings)]
        found = []
        for modality in configs:
            torch.manual_seed(0)
            method = UNITEConfig.parse(
                {"generative_encoder": encoder, "decoder": {"width": 16, "depth": 1, "heads": 2}}
            )
            found.append(UNITE(ModelConfig(modality=modality, method=method)).fingerprint())
        assert len(set(found)) == 2
        refuse_other_tokens(plain, plain, "method.encoder_run")
        with pytest.raises(ConfigError, match="token settings"):
            refuse_other_tokens(*configs, "method.encoder_run")
