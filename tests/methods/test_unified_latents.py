"""Unified Latents, both stages: noise of z_0, sums in nats, gradient routing, the second stage, ablations, sizes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from unilatent.conditions.class_label import ClassLabelConfig
from unilatent.config import ConfigError
from unilatent.loading import load
from unilatent.maths.streams import Streams
from unilatent.methods import latent_diffusion
from unilatent.methods.base import LatentModel, LossPart
from unilatent.methods.latent_diffusion import LatentDiffusion, LatentDiffusionConfig
from unilatent.methods.unified_latents import UnifiedLatents, UnifiedLatentsConfig, UnifiedLatentsDraws
from unilatent.methods.unite import UNITE, UNITEConfig
from unilatent.modalities.image import ImageConfig
from unilatent.model_config import ModelConfig, SamplingConfig
from unilatent.nets.backbones import ViTConfig
from unilatent.processes import Processes
from unilatent.sampling import sample_latents
from unilatent.training.measuring import Measurement
from unilatent.types import Batch, Tokens

B = 4
IMAGE = ImageConfig(size=4, patch_size=2, channels=1)  # 4 tokens of 4 values
NET = ViTConfig(width=16, depth=1, heads=2)
SIGMA = (1 + math.exp(5)) ** -0.5
ALPHA = (1 + math.exp(-5)) ** -0.5


def make(**fields: Any) -> UnifiedLatents:
    """A small model with changed fields, perturbed."""
    small: dict[str, Any] = {"latent_channels": 3, "encoder": NET, "prior": NET, "decoder": NET, "loss_factor": 1.6}
    torch.manual_seed(0)
    return perturbed(UnifiedLatents(ModelConfig(modality=IMAGE, method=UnifiedLatentsConfig(**{**small, **fields}))))


def perturbed(model: Any) -> Any:
    """Random trainable weights where initialisation has zeros; evaluation mode."""
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p) * p.requires_grad
    return model.eval()


def stage_two(tokenizer: UnifiedLatents | None = None) -> LatentDiffusion:
    """A perturbed base on that tokenizer and its weights."""
    tokenizer = tokenizer or make()
    torch.manual_seed(1)
    config = ModelConfig(
        modality=IMAGE,
        conditions={"class_label": ClassLabelConfig(num_classes=10)},
        method=LatentDiffusionConfig(base=NET, bias=-1.0, tokenizer_model=tokenizer.config.plain()),
    )
    model = LatentDiffusion(config)
    model.tokenizer.load_state_dict(tokenizer.state_dict())
    return perturbed(model)


def images(n: int = B) -> torch.Tensor:
    return torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def batch(n: int = B) -> Batch:
    return Batch(images(n), {"labels": torch.arange(n) % 10})


def streams(n: int = B, kind: str = "train") -> Streams:
    return Streams((kind, 0), range(n))


def parts_of(model: LatentModel, n: int = B) -> dict[str, LossPart]:
    return {part.title: part for part in model.loss(batch(n), streams(n))}


def nonzero_gradients(model: LatentModel, only: str) -> dict[str, torch.Tensor]:
    """Gradients of one part of the loss, where they are not exactly zero."""
    model.zero_grad(set_to_none=True)
    for part in model.loss(batch(), streams()):
        if part.title == only:
            part.value.backward()
            if part.junction is not None:
                part.junction.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def submodules(gradients: dict[str, torch.Tensor]) -> set[str]:
    """The first component of parameter names."""
    return {name.partition(".")[0] for name in gradients}


def drawn(model: UnifiedLatents) -> tuple[Tokens, UnifiedLatentsDraws, torch.Tensor]:
    """Tokens, random numbers and clean latents of one step of `loss`."""
    tokens = model._tokens(images())
    return tokens, model.draw(streams(), tokens), model.encoder(tokens.values, tokens.layout)


# ---- the noise of z_0 ------------------------------------------------------------------------------------------------


def test_z_0_has_the_noise_of_log_snr_5_in_the_prior_the_base_and_what_encode_adds():
    """sigma(0) = 0.0818."""
    prior, base = make(), stage_two()
    assert pytest.approx(0.0818, abs=2e-5) == SIGMA
    zero = torch.zeros(1, dtype=torch.float64)
    for path in (prior.path, prior.prior.path, base.path, base.base.path):
        assert path.sigma(zero).item() == pytest.approx(SIGMA, rel=1e-12)
    z, eps = torch.full((1, 4, 3), 2.0), torch.ones(1, 4, 3)
    torch.testing.assert_close(prior.add_encoder_noise(z, eps), ALPHA * z + SIGMA * eps)
    precise = make(latent_logsnr=10.0)  # ablation B
    assert precise.path.sigma(zero).item() == pytest.approx(0.00674, abs=1e-5)
    assert stage_two(precise).base.path == precise.path


@pytest.mark.parametrize("model", [make, stage_two], ids=["first stage", "second stage"])
def test_encode_adds_exactly_the_fixed_noise_to_the_clean_latents(model: Callable[[], Any]):
    network, data = model(), images(256)
    clean, noisy = network.encode_clean(data, streams(256)), network.encode(data, seed=3)
    eps = (noisy - ALPHA * clean) / SIGMA
    want = Streams(("encode", 3), range(256)).normal(network.max_latents, network.latent_channels)
    torch.testing.assert_close(eps, want, rtol=0, atol=1e-4)
    error = 1 / math.sqrt(2 * eps.numel())  # of a standard deviation
    assert abs(eps.std().item() - 1) < 4 * error
    assert torch.equal(network.encode_clean(data, streams(256, "other")), clean), "the encoder itself is deterministic"


@pytest.mark.parametrize("solver", ["ddim", "heun", "dpmpp_2m", "ancestral"])
@pytest.mark.parametrize("model", [make, stage_two], ids=["prior", "base"])
def test_what_a_perfect_denoiser_hands_to_the_decoder_has_that_noise(
    model: Callable[[], Any], solver: str, monkeypatch: pytest.MonkeyPatch
):
    """Data that encode to one point c: z_0 must be N(alpha_0 c, sigma_0^2), not c. Standard error of 6,144 values:
    0.9 % of a standard deviation; the ancestral solver's variance bound is wide by under 3 % in 256 steps."""
    network, n = model(), 512
    point = torch.linspace(-2, 2, 12).reshape(1, 4, 3)
    monkeypatch.setattr(network, "denoise", lambda z, t, cond, layout=None, finish=True: point.expand_as(z))
    layout = network.modality.sample_layout(streams(n))
    values = network.conditions.parse(n, {})
    settings = SamplingConfig(solver=solver, num_inference_steps=256)
    z_0, _ = sample_latents(network, values, layout, streams(n, "sample"), settings)
    noise = z_0 - ALPHA * point
    assert noise.std().item() == pytest.approx(SIGMA, rel=0.05)
    assert noise.mean((0,)).abs().max() < 5 * SIGMA / math.sqrt(n)


def test_the_decoder_is_given_the_handed_over_latents_as_they_are(monkeypatch: pytest.MonkeyPatch):
    """The decoder's network receives exactly this z_0 in every step, with no noise added or removed."""
    model = stage_two()
    received: list[torch.Tensor] = []
    model.tokenizer.decoder.register_forward_pre_hook(lambda _, args: received.append(args[4]))
    z_0 = torch.randn(B, 4, 3)
    model.decode(z_0)
    assert len(received) == 51 and all(torch.equal(z, z_0) for z in received)


# ---- sums in nats ----------------------------------------------------------------------------------------------------


def test_the_rate_is_a_sum_in_nats_and_its_bits_are_that_sum():
    """Every monitor times its divisor is the same number of bits, and so is the loss times its constant."""
    model = make()
    part = parts_of(model)["prior"]
    counts = {"pixel": 16, "subpixel": 16, "latent_dimension": 12}
    assert part.monitors.keys() == {f"bits_per_{name}" for name in counts}
    nats = part.value.item() * 16  # 4 tokens of 4 values
    for name, count in counts.items():
        assert part.monitors[f"bits_per_{name}"].item() * count * math.log(2) == pytest.approx(nats, rel=1e-6)
    assert part.terms["prior"].item() * 16 == pytest.approx(nats, rel=1e-6)


@pytest.mark.parametrize("path", ["cosine", "linear"])
def test_the_loss_is_algorithm_1_written_out_sample_by_sample(path: str):
    """L_z: unweighted nats of the noise's error, and the terminal KL. L_x: nats of the noise's error times loss factor
    and sigmoid(b - logsnr). Both are sums over all values, divided by the number of values in a sample."""
    model = make(path=path, bias=0.7, loss_factor=1.9)
    tokens, draws, z = drawn(model)
    cond = model._no_condition(1)
    want_z, want_x = 0.0, 0.0
    one = torch.tensor(1.0, dtype=torch.float64)
    for i in range(B):
        t, eps = draws.prior_time[i : i + 1], draws.prior_noise[i : i + 1]
        z_t = model.path.alpha(t) * z[i : i + 1] + model.path.sigma(t) * eps
        eps_hat = model.path.noise_of(z_t, model.prior(z_t, t, cond, tokens.layout), t)
        want_z += (-model.path.dlogsnr(t) / 2 * (eps - eps_hat).square().sum()).item()
        at_end = Normal(model.path.alpha(one) * z[i].double(), model.path.sigma(one))
        want_z += kl_divergence(at_end, Normal(0.0, 1.0)).sum().item()
        t, eps = draws.data_time[i : i + 1], draws.data_noise[i : i + 1]
        x_t = model.data_path.alpha(t) * tokens.values[i : i + 1] + model.data_path.sigma(t) * eps
        z_0 = ALPHA * z[i : i + 1] + SIGMA * draws.latent_noise[i : i + 1]
        eps_hat = model.data_path.noise_of(x_t, model.decoder(x_t, t, cond, tokens.layout, z_0), t)
        weight = 1.9 * torch.sigmoid(0.7 - model.data_path.logsnr(t)) * -model.data_path.dlogsnr(t) / 2
        want_x += (weight * (eps - eps_hat).square().sum()).item()
    parts = parts_of(model)
    assert parts["prior"].value.item() == pytest.approx(want_z / B / 16, rel=1e-4)
    assert parts["decoder"].value.item() == pytest.approx(want_x / B / 16, rel=1e-4)


def test_the_noises_and_times_of_prior_and_decoder_are_not_the_same():
    model = make()
    _, draws, _ = drawn(model)
    noises = (draws.prior_noise, draws.latent_noise, draws.encoder_noise)
    for i, a in enumerate(noises):
        for b in noises[i + 1 :]:
            assert not torch.equal(a, b)
    assert not torch.equal(draws.prior_time, draws.data_time)


def test_the_decoder_s_loss_is_positive_and_its_weight_falls_with_log_snr():
    """Eq. 4 as printed would be negative, with a weight that rises."""
    model = make()
    for name, part in parts_of(model).items():
        assert part.value.item() > 0, name
    z, tokens = torch.zeros(1, 4, 3), model._tokens(images(1))
    errors = []
    for time in (0.02, 0.5, 0.8, 0.95):
        draws = model.draw(streams(1), tokens)._replace(data_time=torch.tensor([time]))
        nats = model.decoder_nats(z, tokens, draws)
        t = draws.data_time
        x_t = model.data_path.add_noise(tokens.values, draws.data_noise, t)
        estimate = model.decoder(x_t, t, model._no_condition(1), tokens.layout, z * 0 + SIGMA * draws.latent_noise)
        eps_error = (draws.data_noise - model.data_path.noise_of(x_t, estimate, t)).square().sum()
        errors.append((nats / eps_error / (-model.data_path.dlogsnr(t) / 2)).item())
    assert errors == sorted(errors) and errors[0] < 0.05 and errors[-1] == pytest.approx(1, abs=0.01)


# ---- where gradients go ----------------------------------------------------------------------------------------------


def test_each_loss_alone_reaches_the_encoder():
    model = make()
    assert submodules(nonzero_gradients(model, "prior")) == {"encoder", "prior"}
    assert submodules(nonzero_gradients(model, "decoder")) == {"encoder", "decoder"}


def test_without_the_prior_s_gradient_the_rate_gives_the_encoder_exactly_nothing():
    """Ablation A with a KL weight of 0; with another weight the encoder gets the gradient of the KL alone."""
    assert submodules(nonzero_gradients(make(prior_gradient=False, kl_weight=0.0), "prior")) == {"prior"}
    model = make(prior_gradient=False, kl_weight=0.05)
    gradients = nonzero_gradients(model, "prior")
    assert submodules(gradients) == {"encoder", "prior"}
    model.zero_grad(set_to_none=True)
    _, _, z = drawn(model)
    (0.05 / 16 * kl_divergence(Normal(ALPHA * z, SIGMA), Normal(0.0, 1.0)).sum((1, 2)).mean()).backward()
    for name, p in model.encoder.named_parameters():
        if p.grad is not None and f"encoder.{name}" in gradients:
            torch.testing.assert_close(gradients[f"encoder.{name}"], p.grad, rtol=1e-4, atol=1e-6)
    assert submodules(nonzero_gradients(make(prior_gradient=False), "decoder")) == {"encoder", "decoder"}


def test_stopping_the_gradient_does_not_change_the_rate():
    free, stopped = parts_of(make())["prior"], parts_of(make(prior_gradient=False, kl_weight=0.0))["prior"]
    assert free.value.item() == stopped.value.item()
    assert free.monitors["bits_per_pixel"].item() == stopped.monitors["bits_per_pixel"].item()


# ---- the second stage ------------------------------------------------------------------------------------------------


def test_nothing_of_the_second_stage_reaches_the_tokenizer():
    model = stage_two().train()
    assert not model.tokenizer.training and model.base.training
    before = {key: value.clone() for key, value in model.tokenizer.state_dict().items()}
    assert submodules(nonzero_gradients(model, "base")) == {"base", "conditions"}
    assert all(p.grad is None and not p.requires_grad for p in model.tokenizer.parameters())
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert all(torch.equal(value, before[key]) for key, value in model.tokenizer.state_dict().items())
    assert model.num_trainable == sum(p.numel() for part in (model.base, model.conditions) for p in part.parameters())


def test_the_base_learns_clean_latents_which_are_noised_once(monkeypatch: pytest.MonkeyPatch):
    """Its target is the encoder's output, and its input is that output with the base's noise alone."""
    model = stage_two()
    targets, inputs = [], []
    original = latent_diffusion.denoising_nats

    def spy(clean: torch.Tensor, *rest: Any) -> torch.Tensor:
        targets.append(clean)
        return original(clean, *rest)

    monkeypatch.setattr(latent_diffusion, "denoising_nats", spy)
    model.base.register_forward_pre_hook(lambda _, args: inputs.append(args))
    part = parts_of(model)["base"]
    tokens = model.tokenizer._tokens(images())
    clean = model.tokenizer.encoder(tokens.values, tokens.layout).detach()
    assert torch.equal(targets[0], clean) and torch.equal(part.latents, clean)
    (z_t, t, *_), again = inputs[0], streams()
    assert torch.equal(t, again.stratified())
    want = model.path.add_noise(clean, again.normal(4, 3), t)
    torch.testing.assert_close(z_t, want, rtol=0, atol=0)


def test_the_base_s_weight_is_the_sigmoid_on_the_noise_s_error():
    model, t = stage_two(), torch.linspace(0.01, 0.99, 20, dtype=torch.float64)
    logsnr = model.path.logsnr(t)
    want = -model.path.dlogsnr(t) / 2 * logsnr.exp() * torch.sigmoid(-1.0 - logsnr)
    torch.testing.assert_close(model.weight(t), want, rtol=1e-12, atol=0)


def test_a_saved_second_stage_holds_its_tokenizer_and_needs_no_run(tmp_path: Path):
    tokenizer = make()
    tokenizer.save_pretrained(tmp_path / "first" / "model")
    plain = LatentDiffusionConfig(base=NET, tokenizer=str(tmp_path / "first"))
    filled = plain.with_sources()
    assert filled.tokenizer is None and ModelConfig.parse(filled.tokenizer_model) == tokenizer.config
    assert LatentDiffusionConfig.parse(filled.plain()) == filled and filled.with_sources() is filled
    model = LatentDiffusion(ModelConfig(modality=IMAGE, method=filled))
    model.load_sources(plain)
    model.eval()
    model.save_pretrained(tmp_path / "second")
    (tmp_path / "first").rename(tmp_path / "gone")
    again = load(tmp_path / "second", device="cpu")
    assert type(again) is LatentDiffusion and again.config == model.config
    data = images()
    assert torch.equal(again.encode(data), tokenizer.encode(data))
    assert torch.equal(again.decode(again.encode(data)), tokenizer.decode(tokenizer.encode(data)))


@pytest.mark.parametrize(("state", "words"), [
    ("missing", "first: no such folder; give a finished run"),
    ("unfinished", "first holds no finished model; train it"),
])  # fmt: skip
def test_a_tokenizer_that_is_missing_or_unfinished_is_named(state: str, words: str, tmp_path: Path):
    folder = tmp_path / "first"
    if state == "unfinished":
        (folder / "checkpoints" / "step_00000004").mkdir(parents=True)
    with pytest.raises(ConfigError, match=rf"method\.tokenizer: .*{words}"):
        LatentDiffusionConfig(tokenizer=str(folder)).with_sources()
    with pytest.raises(ConfigError, match=r"method\.tokenizer: not set; give a finished run"):
        LatentDiffusionConfig().with_sources()


def test_a_tokenizer_of_other_images_is_refused():
    config = LatentDiffusionConfig(base=NET, tokenizer_model=make().config.plain())
    with pytest.raises(ConfigError, match=r"resolution \(8, 8, 1\), but method.tokenizer was trained with \(4, 4, 1\)"):
        LatentDiffusion(ModelConfig(modality=ImageConfig(size=8, patch_size=2, channels=1), method=config))


def test_noise_is_added_to_pixels_between_minus_one_and_one():
    """The noise paths of both papers assume this range; half of it would move every log-SNR by 2 log 2."""
    model = make()
    black = torch.zeros(1, 1, 4, 4)
    assert (model._tokens(black).values == -1).all() and (model._tokens(black + 1).values == 1).all()


def test_what_is_sampled_from_is_the_estimate_that_was_trained(monkeypatch: pytest.MonkeyPatch):
    """Also for latents with an output norm: the clean estimate is a mean of possible latents, and shorter than each."""
    first = UNITE(ModelConfig(modality=IMAGE, method=UNITEConfig.small()))
    config = LatentDiffusionConfig(base=NET, tokenizer_model=first.config.plain())
    model = perturbed(LatentDiffusion(ModelConfig(modality=IMAGE, method=config)))
    calls: list[tuple[torch.Tensor, ...]] = []
    forward = model.base.forward
    monkeypatch.setattr(model.base, "forward", lambda z, t, *rest: calls.append((z, t, y := forward(z, t, *rest))) or y)
    next(iter(model.loss(batch(), streams())))
    ((z, t, trained),) = calls
    torch.testing.assert_close(model.denoise(z, t, model.conditions.null(B)), trained)
    assert trained.square().mean().sqrt() < 0.9


# ---- ablations -------------------------------------------------------------------------------------------------------


def test_a_learned_variance_takes_the_difference_of_entropies_off_the_rate():
    """Eq. 5: L_e = H(z_0 | z_clean) - H(z_0 | x) = -1/2 sum log(s^2 exp(logsnr_0) + 1), never positive."""
    model = make(learned_variance=True)
    tokens = model._tokens(images())
    _, log_std, layout = model._encoded(tokens)
    s = log_std.detach().exp()
    given_x, given_clean = Normal(0.0, (ALPHA**2 * s**2 + SIGMA**2).sqrt()), Normal(0.0, SIGMA)
    want = (given_clean.entropy() - given_x.entropy()).sum((1, 2))
    variance = model.variance_nats(log_std, layout)
    torch.testing.assert_close(variance, want, rtol=1e-4, atol=1e-4)
    assert (variance < 0).all()
    free = log_std.detach().requires_grad_()
    model.variance_nats(free, layout).sum().backward()
    precision = s**2 * math.exp(5)
    torch.testing.assert_close(free.grad, -precision / (precision + 1), rtol=1e-4, atol=1e-5)


def test_the_rate_of_a_learned_variance_is_monitored_with_its_entropy():
    """Otherwise it would be larger than the bound: the loss, the monitors and Eq. 5 agree."""
    model = make(learned_variance=True)
    part = parts_of(model)["prior"]
    tokens, draws, _ = drawn(model)
    z, log_std, layout = model._encoded(tokens)
    z = z + log_std.exp() * draws.encoder_noise
    without = model.rate_nats(z, batch(), layout, draws).mean()
    nats = without + model.variance_nats(log_std, layout).mean()
    assert part.value.item() * 16 == pytest.approx(nats.item(), rel=1e-5)
    assert part.monitors["bits_per_pixel"].item() * 16 * math.log(2) == pytest.approx(nats.item(), rel=1e-5)
    assert part.terms["prior"].item() * 16 == pytest.approx(without.item(), rel=1e-5)


def test_a_learned_variance_is_part_of_what_the_second_stage_learns():
    """The decoder was trained on that variance, so the base must reproduce it: mean + s eps, eps from the stream."""
    model, n = make(learned_variance=True), 64
    data = images(1).expand(n, 1, 4, 4)
    z, log_std, _ = model._encoded(model._tokens(images(1)))
    eps = (model.encode_clean(data, streams(n)) - z) / log_std.exp()
    torch.testing.assert_close(eps, streams(n).normal(4, 3), rtol=1e-4, atol=1e-4)


def test_a_decoder_in_one_pass_has_the_squared_error_for_a_loss_and_no_noise():
    model = make(decoder_loss="mse")
    tokens, draws, z = drawn(model)
    z_0 = ALPHA * z + SIGMA * draws.latent_noise
    zeros = torch.zeros_like(tokens.values)
    estimate = model.decoder(zeros, 1.0, model._no_condition(B), tokens.layout, z_0)
    want = (tokens.values - estimate).square().sum((1, 2)).mean() / 16
    assert parts_of(model)["decoder"].value.item() == pytest.approx(1.6 * want.item(), rel=1e-5)
    assert submodules(nonzero_gradients(model, "decoder")) == {"encoder", "decoder"}
    latents = torch.randn(B, 4, 3)
    assert torch.equal(model.decode(latents, seed=0), model.decode(latents, seed=9))
    diffusion = make()
    assert not torch.equal(diffusion.decode(latents, seed=0), diffusion.decode(latents, seed=9))


def test_a_decoder_that_predicts_clean_data_makes_its_estimate_of_the_network_alone():
    """The estimate of a velocity contains x_t; that of clean data is what the network returns."""
    for prediction in ("velocity", "clean"):
        model = make(decoder_prediction=prediction)
        tokens, draws, z = drawn(model)
        z_0 = ALPHA * z + SIGMA * draws.latent_noise
        t, cond = torch.full((B,), 0.3), model._no_condition(B)
        x_t = model.data_path.add_noise(tokens.values, draws.data_noise, t)
        raw = model.decoder.backbone(x_t, tokens.layout, model.data_path.feature(t), cond, z_0)
        alpha, sigma = (float(f(torch.tensor(0.3))) for f in (model.data_path.alpha, model.data_path.sigma))
        want = raw if prediction == "clean" else alpha * x_t - sigma * raw
        torch.testing.assert_close(model.decoder(x_t, t, cond, tokens.layout, z_0), want)
        assert submodules(nonzero_gradients(model, "decoder")) == {"encoder", "decoder"}


def test_a_decoder_on_another_run_s_encoder_is_all_that_is_trained(tmp_path: Path):
    """Table 5: encoder and prior trained under a decoder in one pass, then a diffusion decoder on those latents."""
    first = make(decoder_loss="mse", prior=ViTConfig(width=16, depth=1, heads=2, dropout=0.5))
    first.save_pretrained(tmp_path / "model")
    networks = {"latent_channels": 3, "encoder": NET, "prior": first.method.prior, "decoder": NET}
    unresolved = UnifiedLatentsConfig(**networks, loss_factor=2.0, encoder_run=str(tmp_path))
    with pytest.raises(ConfigError, match=r"method\.latent_channels: 5, but .* has 3"):
        unresolved.model_copy(update={"latent_channels": 5}).with_sources()
    method = unresolved.with_sources()
    assert method.encoder_run is None and not method.train_encoder
    model = UnifiedLatents(ModelConfig(modality=IMAGE, method=method))
    model.load_sources(unresolved)
    perturbed(model).train()
    assert torch.equal(model.encode(images()), first.encode(images()))
    (part,) = model.loss(batch(), streams())
    part.value.backward()
    assert {n.partition(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {"decoder"}
    assert all(p.grad is None for n, p in model.named_parameters() if not n.startswith("decoder"))
    assert any(p.grad is not None and p.grad.any() for p in model.decoder.parameters())
    assert part.monitors["bits_per_pixel"] == parts_of(first)["prior"].monitors["bits_per_pixel"]  # no dropout either
    assert part.latents is not None and not part.latents.requires_grad


def test_an_encoder_that_cannot_be_taken_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"method\.encoder_run: .* holds no finished model"):
        UnifiedLatentsConfig(encoder_run=str(tmp_path)).with_sources()
    stage_two().save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="holds a latent_diffusion"):
        UnifiedLatentsConfig(encoder_run=str(tmp_path)).with_sources()
    model = make(train_encoder=False)
    with pytest.raises(ConfigError, match="names no run"):
        model.load_sources(model.method)
    make().save_pretrained(tmp_path / "other" / "model")
    networks = {"latent_channels": 3, "encoder": NET, "prior": NET, "decoder": NET}
    unresolved = UnifiedLatentsConfig(**networks, encoder_run=str(tmp_path / "other"))
    larger = IMAGE.model_copy(update={"size": 8})
    with pytest.raises(ConfigError, match=r"resolution \(8, 8, 1\), but .* was trained with \(4, 4, 1\)"):
        UnifiedLatents(ModelConfig(modality=larger, method=unresolved.with_sources())).load_sources(unresolved)


def test_a_normal_prior_has_no_network_and_costs_its_kl():
    model = make(prior="normal")
    assert model.prior is None and submodules(nonzero_gradients(model, "prior")) == {"encoder"}
    _, _, z = drawn(model)
    want = kl_divergence(Normal(ALPHA * z, SIGMA), Normal(0.0, 1.0)).sum((1, 2)).mean()
    assert parts_of(model)["prior"].value.item() * 16 == pytest.approx(want.item(), rel=1e-5)
    n = 512
    settings = SamplingConfig(solver="heun", num_inference_steps=50)
    z_0, _ = sample_latents(model, {}, model.modality.sample_layout(streams(n)), streams(n), settings)
    assert z_0.std().item() == pytest.approx(1, abs=4 / math.sqrt(2 * z_0.numel()))


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ConfigError, match="must be below latent_logsnr"):
        UnifiedLatentsConfig.parse({"latent_min_logsnr": 6.0})
    with pytest.raises(ConfigError, match="data_logsnr"):
        UnifiedLatentsConfig.parse({"data_logsnr": [10, -10]})
    with pytest.raises(ConfigError, match="loss_factor"):
        UnifiedLatentsConfig.parse({"loss_factor": 0})


# ---- sizes -----------------------------------------------------------------------------------------------------------


def test_parameter_counts_at_the_paper_s_sizes():
    """512 x 512 images, 32 x 32 latents of 32 channels; millions of parameters of each network."""
    image = ImageConfig(size=512, patch_size=1)
    first = ModelConfig(modality=image, method=UnifiedLatentsConfig())
    second = ModelConfig(modality=image, method=LatentDiffusionConfig(tokenizer_model=first.plain()))
    with torch.device("meta"):
        model = LatentModel.build(second)

    def millions(module: torch.nn.Module) -> float:
        return round(sum(p.numel() for p in module.parameters()) / 1e6, 1)

    tokenizer = model.tokenizer
    assert model.max_latents == 32 * 32 and model.latent_channels == 32
    counts = {name: millions(getattr(tokenizer, name)) for name in ("encoder", "decoder", "prior")}
    assert {**counts, "base": millions(model.base)} == {
        "encoder": 30.6, "decoder": 197.7, "prior": 154.9, "base": 363.7,
    }  # fmt: skip
    assert model.num_trainable == sum(p.numel() for p in model.base.parameters())


# ---- one backward pass through the encoder ---------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"learned_variance": True}, {"prior_gradient": False}, {"prior": "normal"}])
def test_the_encoder_is_differentiated_once_and_gets_the_gradient_of_the_whole_loss(fields: dict[str, Any]):
    model = make(**fields)
    parameters = list(model.parameters())
    tokens = model._tokens(images())
    draws = model.draw(streams(), tokens)
    # The whole loss in one graph: Algorithm 1.
    z, log_std, layout = model._encoded(tokens)
    z = model._sampled(z, log_std, draws.encoder_noise)
    values = model.modality.max_tokens * model.modality.channels
    rate = model.rate_nats(z, batch(), layout, draws)
    rate = rate if log_std is None else rate + model.variance_nats(log_std, layout)
    whole = rate.mean() + model.method.loss_factor * model.decoder_nats(z, tokens, draws).mean()
    if not model.method.prior_gradient:
        whole = whole + model.method.kl_weight * model._normal_nats(z, layout).mean()
    want = torch.autograd.grad(whole / values, parameters, allow_unused=True)

    passes = []
    model.encoder.register_full_backward_hook(lambda *_: passes.append(1))
    for part in model.loss(batch(), streams()):
        part.value.backward()
        part.close()
    assert len(passes) == 1
    for parameter, gradient in zip(parameters, want, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_gradient_norms_of_parts_include_what_lies_before_the_junction():
    """Measured beside each part differentiated alone; measuring changes no bit of the gradients."""
    alone = {}
    for only in ("prior", "decoder"):
        alone[only] = torch.cat([g.flatten() for g in nonzero_gradients(make(), only).values()]).norm()
    gradients = []
    for wanted in (True, False):
        model = make()
        measurement = Measurement(model, wanted)
        for part in model.loss(batch(), streams()):
            with measurement.of(part):
                part.value.backward()
            part.close()
        gradients.append([p.grad for p in model.parameters()])
        norms = measurement.numbers(Processes("cpu"))
        if wanted:
            for name, norm in alone.items():
                torch.testing.assert_close(norms[f"grad_norm/{name}"], norm, rtol=1e-4, atol=0)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*gradients, strict=True))
