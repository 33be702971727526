"""Alignment of the two passes, entropy of weights, what layers know, agreement of gradients: on small models, against
closed forms."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "contracts"))

from building import batch_of, model_of

from unilatent.analysis.alignment import alignment
from unilatent.analysis.compression import GROUPS, compression, group_of, latent_bits
from unilatent.analysis.decoding import NOISES, nearest_latents, sensitivity, trajectory
from unilatent.analysis.layers import knn_accuracy, layer_accuracy, linear_accuracy
from unilatent.analysis.losses import LEVELS, error_by_time, gradient_cosines
from unilatent.analysis.rates import rate_report
from unilatent.maths.streams import Streams
from unilatent.registry import available
from unilatent.types import Batch, take

every_method = pytest.mark.parametrize("method", available("methods"))


def batches(modality: str, sizes: tuple[int, ...]) -> list[Batch]:
    whole, start, parts = batch_of(modality, sum(sizes)), 0, []
    for size in sizes:
        rows = slice(start, start + size)
        parts.append(Batch(take(whole.data, rows), {key: value[rows] for key, value in whole.values.items()}))
        start += size
    return parts


# ---- alignment


@every_method
@pytest.mark.parametrize("modality", ["image", "molecule"])
def test_alignment_of_every_method_whose_passes_are_transformers(method: str, modality: str):
    model = model_of(modality, method, awake=True).eval()
    found = alignment(model, batches(modality, (16, 16)), levels=(0.1, 0.9))
    if model.passes(model.modality.pack(batch_of(modality, 2).data).layout) is None:
        assert found is None
        return
    assert found is not None and found.samples == 32 and len(found.cka) == len(found.cknna) == 2
    assert all(-0.2 < value <= 1 + 1e-9 for table in found.cka for row in table for value in row)
    assert found.shared == (method == "unite")


def test_a_pass_is_aligned_with_itself(monkeypatch: pytest.MonkeyPatch):
    """Both passes of the same tokens: CKA and CKNNA of block i with block i are 1."""
    model = model_of("image", "unite", awake=True).eval()
    made, _ = model.passes(model.modality.pack(batch_of("image", 2).data).layout)
    parts = batches("image", (20, 20))
    data = iter([part.data for part in parts for _ in range(2)])

    def tokenise(z, t, cond, layout=None, finish=True):
        return model.encode_clean(next(data), Streams(("alignment", 0), range(0), model.device))

    draws = {}

    def same_registers(streams, k):
        key = len(streams) if hasattr(streams, "__len__") else k
        return draws.setdefault(
            k, torch.randn(20, k, model.latent_channels, generator=torch.Generator().manual_seed(key))
        )

    monkeypatch.setattr(model, "passes", lambda layout: (made, made))
    monkeypatch.setattr(model, "latent_noise", lambda streams, k: same_registers([0] * 20, k))
    monkeypatch.setattr(model, "encode_clean", lambda data, streams: model.tokenize(
        model._tokens(data), same_registers([0] * 20, model.max_latents), torch.zeros(len(data))))  # fmt: skip
    monkeypatch.setattr(model, "denoise", tokenise)
    found = alignment(model, parts, levels=(0.1, 0.9))
    assert found is not None
    for table, near in zip(found.cka, found.cknna, strict=True):
        assert [row[i] for i, row in enumerate(table)] == pytest.approx([1] * len(table))
        assert near == pytest.approx([1] * len(near))


def test_latents_at_little_noise_are_more_like_their_data_than_noise_is():
    """Shared weights, untrained: alignment falls with the noise level."""
    model = model_of("image", "unite", awake=True).eval()
    found = alignment(model, batches("image", (64, 64)), levels=(0.05, 0.95))
    assert found is not None and found.mean_cka[0] > found.mean_cka[1] + 0.2


# ---- compression


def test_every_weight_is_in_one_group():
    model = model_of("image", "unite")
    assert group_of("generative_encoder.transformer.blocks.0.attn.qkv.weight") == GROUPS[0]
    assert group_of("decoder.transformer.blocks.1.up.weight") == GROUPS[0]
    assert group_of("generative_encoder.transformer.blocks.0.norm1.weight") == GROUPS[1]
    assert group_of("generative_encoder.transformer.blocks.0.modulation.weight") == GROUPS[1]
    assert group_of("generative_encoder.latent_in.weight") == GROUPS[2]
    found = compression(model)
    total = sum(sum(groups.values()) for groups in found.parameters.values())
    assert total == model.num_trainable
    assert found.trained.keys() == found.parameters.keys() >= {"generative_encoder", "decoder"}


def test_weights_of_few_values_take_few_bytes_and_initial_ones_those_of_their_distribution():
    model = model_of("image", "unite", awake=True)
    found, before = compression(model), torch.get_rng_state()
    for parameter in model.parameters():
        parameter.data = parameter.data.sign()
    coarse = compression(model)
    assert torch.equal(torch.get_rng_state(), before), "measuring draws no random number"
    network, group = "generative_encoder", GROUPS[0]
    count = coarse.parameters[network][group]
    assert coarse.trained[network][group] <= count / 8e6 + 1e-9, "at most one bit a weight"
    assert found.trained[network][group] > 8 * coarse.trained[network][group]
    assert coarse.initial == found.initial
    assert found.initial[network][GROUPS[1]] < found.trained[network][GROUPS[1]], "modulations begin as zeros"


def test_separate_weights_are_counted_apart():
    shared, separate = (compression(model_of("image", "unite", shared_weights=flag)) for flag in (True, False))
    assert "denoiser" in separate.trained and "denoiser" not in shared.trained
    assert separate.total(separate.trained) > 1.5 * shared.total(shared.trained)


# ---- bits of the latents


def normal_latents(model, stds: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the model encode anything to normal latents of these standard deviations (D,), around a mean of 3."""

    def encode_clean(data, streams):
        k = model.latent_layout(model.modality.pack(data).layout).num_tokens
        return 3 + stds * streams.normal(k, len(stds))

    monkeypatch.setattr(model, "encode_clean", encode_clean)


def test_bits_of_latents_are_those_of_their_covariance_at_the_decoder_s_noise(monkeypatch: pytest.MonkeyPatch):
    """UNITE at t = 0.3: snr (0.7 / 0.3)^2. K latents of a sample count alike; a constant carries nothing."""
    model = model_of("image", "unite").eval()
    stds = torch.linspace(0, 2, model.latent_channels)
    normal_latents(model, stds, monkeypatch)
    found = latent_bits(model, batches("image", (300, 200)))
    snr = (0.7 / 0.3) ** 2
    want = sum(math.log2(1 + snr * s**2) / 2 for s in stds.tolist())
    assert found.samples == 500 and found.time == pytest.approx(0.3) and found.snr == pytest.approx(snr)
    assert found.gaussian["bits_per_latent_dimension"] == pytest.approx(want / model.latent_channels, rel=0.02)
    assert found.gaussian["bits_per_sample"] == pytest.approx(want * model.max_latents, rel=0.02)
    assert found.gaussian["bits_per_pixel"] == pytest.approx(want * model.max_latents / 64, rel=0.02)
    assert found.prior is None and found.by_time[found.times.index(0.3)] == pytest.approx(
        found.gaussian["bits_per_sample"]
    )
    assert list(found.by_time) == sorted(found.by_time, reverse=True), "finer differences are more bits"


def test_the_prior_s_bound_stands_beside_at_the_same_noise(monkeypatch: pytest.MonkeyPatch):
    model, batch = model_of("image", "unified_latents", awake=True).eval(), batch_of("image", 40)
    rate = rate_report(model, batch)
    found = latent_bits(model, [batch], rate)
    assert found.time == 0 and found.snr == pytest.approx(math.exp(5), rel=1e-4)
    assert found.prior["bits_per_pixel"] == rate.bits["bits_per_pixel"]
    assert found.prior["bits_per_sample"].mean == pytest.approx(rate.nats.mean / math.log(2))
    assert found.prior["bits_per_sample"].mean == pytest.approx(64 * found.prior["bits_per_pixel"].mean)
    normal_latents(model, torch.zeros(model.latent_channels), monkeypatch)
    assert latent_bits(model, [batch]).gaussian["bits_per_sample"] == pytest.approx(0, abs=1e-9)


def test_a_second_stage_has_the_bits_of_its_tokenizer():
    tokenizer = model_of("image", "unite", awake=True).eval()
    own = model_of("image", "latent_diffusion", tokenizer_model=tokenizer.config.plain()).eval()
    own.tokenizer.load_state_dict(tokenizer.state_dict())
    parts = batches("image", (30,))
    assert latent_bits(own, parts) == latent_bits(tokenizer, parts)


@pytest.mark.parametrize(
    ("noise", "words"), [(0, "without noise on them: no resolution"), (1, "at t = 1, .* nothing of them is left")]
)
def test_without_a_resolution_there_is_no_number_of_bits_but_a_reason(noise: float, words: str):
    found = latent_bits(model_of("image", "unite", reconstruction_noise=noise).eval(), batches("image", (8,)))
    assert isinstance(found, str) and re.search(words, found)


def test_padding_carries_nothing(monkeypatch: pytest.MonkeyPatch):
    """Samples of few and of many latents: bits of a sample follow their number."""
    model = model_of("molecule", "unite", num_latents=None).eval()
    normal_latents(model, torch.ones(model.latent_channels), monkeypatch)
    parts = batches("molecule", (40,))
    found = latent_bits(model, parts)
    real = float(model.modality.pack(parts[0].data).layout.real_tokens.double().mean())
    each = math.log2(1 + found.snr) / 2
    assert found.gaussian["bits_per_latent_dimension"] == pytest.approx(each, rel=0.05)
    assert found.gaussian["bits_per_sample"] == pytest.approx(each * model.latent_channels * real, rel=0.05)


# ---- layers


def test_neighbours_and_probes_of_clusters():
    y = torch.arange(200) % 4
    centres = 5 * torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    x = centres[y] + torch.randn(200, 8, generator=torch.Generator().manual_seed(1))
    assert knn_accuracy(x, y) == 1 and linear_accuracy(x, y) == 1
    noise = torch.randn(200, 8, generator=torch.Generator().manual_seed(2))
    assert abs(knn_accuracy(noise, y) - 0.25) < 0.13 and abs(linear_accuracy(noise, y) - 0.25) < 0.13


def test_layers_of_a_model_are_probed():
    """An encoder that reads its tokens directly: random features of digits are nearly as good as the digits."""
    model = model_of("image", "unified_latents", awake=True).eval()
    found = layer_accuracy(model, batches("image", (100, 100)))
    assert found is not None and found.name == "labels" and found.samples == 200
    for values in (*found.knn.values(), *found.linear.values()):
        assert len(values) in (2, 3) and all(0 <= value <= 1 for value in values)
    assert max(found.linear["tokenise"]) > 0.4 > found.constant
    assert layer_accuracy(model, batches("image", (20,))) is None


# ---- decoding


def test_noise_on_latents_costs_more_the_more_there_is():
    model = model_of("image", "unite", awake=True).eval()
    data = batch_of("image", 20).data
    found = sensitivity(model, data, batch_size=8)
    whole = sensitivity(model, data, batch_size=20)
    assert found.noises == NOISES and found.errors.keys() == whole.errors.keys()
    assert found.errors["psnr"][0] == pytest.approx(whole.errors["psnr"][0], rel=1e-4)
    decoded = model.decode(model.encode(data))
    mean = sum(model.modality.errors(decoded, data)["l1"]) / 20
    assert found.errors["l1"][0] == pytest.approx(mean, rel=1e-4), "without noise, the reconstruction"


def test_a_trajectory_ends_at_the_sample():
    from unilatent.sampling import sample

    model = model_of("image", "unite", awake=True).eval()
    model.config = model.config.model_copy(update={"sampling": replace_steps(model, 6)})
    found, columns = trajectory(model, 3)
    assert found.times[0] == 1 and len(found.times) == len(found.distance) == len(found.moved)
    assert found.moved[0] == 0 and found.distance[-1] < found.distance[0]
    assert len(columns) == 8 and columns[0].shape[0] == 3
    exact = model.config.sampling.model_copy(update={"denoise_to_zero": True})
    made = sample(model, 3, **{key: getattr(exact, key) for key in ("num_inference_steps", "solver", "time_shift")})
    assert (columns[-1] - made).abs().mean() < (columns[0] - made).abs().mean()


def replace_steps(model, steps: int):
    return model.config.sampling.model_copy(update={"num_inference_steps": steps})


def test_the_nearest_latents_of_a_copy_are_the_copy():
    model = model_of("image", "unite", awake=True).eval()
    batch = batch_of("image", 12)
    doubled = Batch(torch.cat([batch.data, batch.data]), {})
    registers = torch.randn(12, model.max_latents, model.latent_channels)
    model.encode_clean = lambda data, streams: model.tokenize(
        model._tokens(data), torch.cat([registers, registers]), torch.zeros(24)
    )
    rows = nearest_latents(model, doubled, 4)
    assert len(rows) == 4 and all(torch.equal(row[0], row[1]) for row in rows)


# ---- losses


@every_method
def test_cosines_of_gradients_leave_the_model_alone(method: str):
    model = model_of("image", method, awake=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = gradient_cosines(model, batches("image", (8, 8)))
    assert all(parameter.grad is None for parameter in model.parameters()) and model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    titles = {
        "unite": {("reconstruction", "flow")},
        "unified_latents": {("prior", "decoder")},
        "latent_diffusion": set(),
    }
    assert {cosine.parts for cosine in found} == titles[method]
    for cosine in found:
        assert -1 <= cosine.mean <= 1 and cosine.error is not None and min(cosine.norms) > 0


def test_cosines_against_autograd():
    model = model_of("image", "unite", awake=True)
    [batch] = batches("image", (8,))
    [found] = gradient_cosines(model, [batch])
    grads = []
    for title in found.parts:
        model.zero_grad()
        for part in model.loss(batch, Streams(("gradients", 0), range(8), model.device)):
            if part.title == title:
                part.value.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    shared = [name for name in grads[0] if name in grads[1]]
    a, b = (torch.cat([grad[name].flatten() for name in shared]).double() for grad in grads)
    assert found.mean == pytest.approx(float(a @ b / (a.norm() * b.norm())), rel=1e-6)
    assert found.norms == pytest.approx((float(a.norm()), float(b.norm())), rel=1e-6) and found.error is None


def test_a_flow_that_repeats_the_reconstruction_agrees_with_it(monkeypatch: pytest.MonkeyPatch):
    model = model_of("image", "unite", awake=True)
    [batch] = batches("image", (8,))
    whole = model.loss

    def doubled(batch, streams):
        first = next(iter(whole(batch, streams)))
        yield first
        again = next(iter(whole(batch, streams)))
        yield replace(again, value=-2 * again.value, name="flow", latents=None, latent_mask=None)

    monkeypatch.setattr(model, "loss", doubled)
    monkeypatch.setattr(Streams, "normal", lambda self, *shape: torch.zeros(8, *shape))
    monkeypatch.setattr(Streams, "uniform", lambda self, *shape: torch.full((8, *shape), 0.5))
    [found] = gradient_cosines(model, [batch])
    assert found.mean == pytest.approx(-1, abs=1e-6) and found.norms[1] == pytest.approx(2 * found.norms[0], rel=1e-5)


@every_method
def test_the_error_of_estimates_is_that_of_the_denoiser(method: str, monkeypatch: pytest.MonkeyPatch):
    model = model_of("image", method, awake=True).eval()
    parts = batches("image", (12, 12))
    perfect = iter([part for part in parts for _ in range(2 * len(LEVELS))])

    def truth(z, t, cond, layout=None, finish=True):
        return model.encode_clean(next(perfect).data, Streams(("none",), range(12), model.device))

    found = error_by_time(model, parts)
    assert found.times == LEVELS and found.conditional is not None
    assert all(value > 0 and math.isfinite(value) for value in (*found.unconditional, *found.conditional))
    if method == "unite":
        return  # its registers are drawn anew
    monkeypatch.setattr(model, "denoise", truth)
    exact = error_by_time(model, parts)
    assert exact.unconditional == pytest.approx([0] * len(LEVELS), abs=1e-9)
