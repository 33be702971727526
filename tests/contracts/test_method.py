"""The contract of every method on every modality; the slow test requires that it learns."""

from __future__ import annotations

import json

import pytest
import torch
from building import alike, batch_of, model_config, model_of, pick, rows, same, tensors
from toy import demand, judged, toy_of, train

from unilatent.maths.streams import Streams
from unilatent.methods.base import LatentModel
from unilatent.model_config import ModelConfig
from unilatent.registry import available, find
from unilatent.sampling import reconstruct, sample, sample_batches
from unilatent.types import Batch

every_pair = pytest.mark.parametrize(
    ("modality", "method"), [(a, b) for a in available("modalities") for b in available("methods")]
)
B = 6
FAST = {"num_inference_steps": 3, "decoder_steps": 3}


def streams(which: range) -> Streams:
    return Streams(("train", 0), which)


def gradients(model: LatentModel, batch: Batch, micro: list[range]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of a batch, part by part and micro-batch by micro-batch, as in the trainer."""
    model.zero_grad(set_to_none=True)
    value, count = 0.0, sum(map(len, micro))
    for which in micro:
        for part in model.loss(pick(batch, slice(which.start, which.stop)), streams(which)):
            share = len(which) / count
            (share * part.value).backward()
            part.close()
            value += share * part.value.item()
    return value, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float = 1e-6) -> None:
    assert a.keys() == b.keys()
    for name in a:
        least = atol * max(1.0, float(b[name].abs().max()))
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=least, msg=lambda m, n=name: f"{n}: {m}")


@every_pair
def test_shapes_of_the_core_methods(modality: str, method: str):
    model, batch = model_of(modality, method, awake=True).eval(), batch_of(modality, B)
    assert isinstance(model, LatentModel) and model.num_trainable > 0
    layout = model.modality.pack(batch.data).layout
    latent = model.latent_layout(layout)
    z = model.encode(batch.data)
    assert z.shape == (B, latent.num_tokens, model.latent_channels) and z.dtype == torch.float32
    assert z.isfinite().all() and not z.requires_grad
    decoded = model.decode(z, layout)
    assert [x.shape for x in tensors(decoded)] == [x.shape for x in tensors(batch.data)]
    model.modality.check(decoded)
    cond = model.conditions(batch.values) if len(model.conditions) else model.conditions.null(B)
    for t in (0.4, torch.tensor(0.4), torch.full((B,), 0.4)):
        estimate = model.denoise(z, t, cond, latent)
        assert estimate.shape == z.shape and estimate.isfinite().all()
        torch.testing.assert_close(estimate, model.denoise(z, 0.4, cond, latent))
    raw = model.denoise(z, 0.4, cond, latent, finish=False)
    torch.testing.assert_close(model.finish_latents(raw), model.denoise(z, 0.4, cond, latent))


@every_pair
def test_parts_of_the_loss(modality: str, method: str):
    model, batch = model_of(modality, method, awake=True), batch_of(modality, B)
    parts = list(model.loss(batch, streams(range(B))))
    assert parts
    for part in parts:
        assert part.value.shape == () and part.value.dtype == torch.float32 and part.value.isfinite()
        assert part.terms and all(term.isfinite() for term in part.terms.values())
        logs = part.logs()
        assert "loss/total" in logs and not any(value.requires_grad for value in logs.values())
        assert part.title and "/" not in part.title
    (z, mask), *others = [(part.latents, part.latent_mask) for part in parts if part.latents is not None]
    assert not others and not z.requires_grad  # the clean latents, once
    assert z.shape == (B, model.latent_layout(model.modality.pack(batch.data).layout).num_tokens, model.latent_channels)
    assert mask is None or mask.shape == z.shape[:2]
    again = list(model.loss(batch, streams(range(B))))
    assert [part.value.item() for part in parts] == [part.value.item() for part in again]
    other = list(model.loss(batch, streams(range(B, 2 * B))))
    assert sum(part.value.item() for part in parts) != sum(part.value.item() for part in other)


@every_pair
def test_every_trainable_weight_gets_a_gradient(modality: str, method: str):
    model = model_of(modality, method, awake=True)
    _, reached = gradients(model, batch_of(modality, 32), [range(32)])
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert not [n for n in trained if n not in reached or not reached[n].any()]


@every_pair
def test_micro_batches_change_nothing(modality: str, method: str):
    model, batch = model_of(modality, method, awake=True), batch_of(modality, B)
    value, whole = gradients(model, batch, [range(B)])
    for micro in ([range(3), range(3, 6)], [range(4), range(4, 6)], [range(i, i + 1) for i in range(B)]):
        other, parts = gradients(model, batch, micro)
        assert other == pytest.approx(value, rel=1e-5)
        close(parts, whole)


@every_pair
def test_encoding_in_batches_equals_encoding_whole_and_noise_comes_from_the_seed(modality: str, method: str):
    model, data = model_of(modality, method, awake=True).eval(), batch_of(modality, B).data
    whole = model.encode(data, seed=3)
    parts = [model.encode(rows(data, slice(a, b)), seed=3, start=a) for a, b in ((0, 1), (1, 5), (5, 6))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-5)
    assert torch.equal(model.encode(data, seed=3), whole)


@every_pair
def test_reconstructing_in_batches_equals_reconstructing_whole(modality: str, method: str):
    model, data = model_of(modality, method, awake=True).eval(), batch_of(modality, B).data
    whole, parts = (reconstruct(model, data, batch_size=size) for size in (B, 4))
    assert alike(model.modality, whole, parts, atol=1e-5)


@every_pair
def test_samples_repeat_and_do_not_depend_on_their_batch(modality: str, method: str):
    """Sample i is a function of (model, seed, i, its condition), not of the number of samples or the batch size."""
    model = model_of(modality, method, awake=True).eval()
    one = next(iter(sample_batches(model, 1, seed=5, **FAST)))
    many = sample(model, 64, seed=5, **FAST)
    assert alike(model.modality, rows(many, slice(0, 1)), one.data, atol=1e-5)
    assert same(sample(model, 64, seed=5, **FAST), many)
    for size in (7, 1):
        count = 64 if size == 7 else 5
        fewer = sample(model, count, seed=5, batch_size=size, **FAST)
        assert alike(model.modality, fewer, rows(many, slice(0, count)), atol=1e-5)
    late = torch.cat([part.latents for part in sample_batches(model, 64, seed=5, start=60, **FAST)])
    whole = next(iter(sample_batches(model, 64, seed=5, **FAST))).latents
    torch.testing.assert_close(late, whole[60:], rtol=0, atol=1e-5)
    assert not torch.equal(next(iter(sample_batches(model, 64, seed=6, **FAST))).latents, whole)
    model.modality.check(many)


@every_pair
def test_guided_samples_and_every_fixed_step_solver(modality: str, method: str):
    model = model_of(modality, method, awake=True).eval()
    for solver in ("euler", "heun", "ddim", "dpmpp_2m", "ancestral"):
        for norm in ("norm_first", "guidance_first"):
            model.modality.check(sample(model, 2, solver=solver, guidance_scale=2.0, guidance_norm=norm, **FAST))
    if len(model.conditions):
        plain, guided, none = (
            next(iter(sample_batches(model, 4, guidance_scale=scale, **FAST))).latents for scale in (1.0, 3.0, 0.0)
        )
        assert not torch.allclose(plain, guided, atol=1e-3) and not torch.allclose(plain, none, atol=1e-3)


@every_pair
def test_wrong_settings_of_a_sample_are_refused(modality: str, method: str):
    model = model_of(modality, method)
    for wrong in ({"solver": "magic"}, {"guidance_scale": -1}, {"num_inference_steps": 0}, {"colour": "red"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            sample(model, 2, **wrong)
    for wrong in ({"num": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            sample(model, **wrong)


@pytest.mark.covers("F39")
@every_pair
def test_a_saved_model_is_the_same_model(modality: str, method: str, tmp_path):
    """Saved and loaded, a model has equal weights, latents and samples."""
    model, data = model_of(modality, method, awake=True).eval(), batch_of(modality, B).data
    model.save_pretrained(tmp_path / "model")
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert names == {"config.json", "model.safetensors", "README.md"}
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"# {method} on {modality}" in card and "library_name: unilatent" in card
    cls = find("methods", method)
    again = cls.from_pretrained(tmp_path / "model")
    assert type(again) is cls and not again.training and again.config == model.config
    assert ModelConfig.parse({k: v for k, v in json.loads((tmp_path / "model" / "config.json").read_text()).items()
                              if k not in ("format_version", "precision")}) == model.config  # fmt: skip
    saved, loaded = model.state_dict(), again.state_dict()
    assert saved.keys() == loaded.keys() and all(torch.equal(saved[key], loaded[key]) for key in saved)
    assert torch.equal(model.encode(data), again.encode(data))
    assert same(sample(model, 3, **FAST), sample(again, 3, **FAST))
    assert model.fingerprint() == again.fingerprint() != model_of(modality, method, seed=1).fingerprint()


@every_pair
def test_building_is_a_function_of_the_seed_and_the_configuration_round_trips(modality: str, method: str):
    a, b = model_of(modality, method, seed=4).state_dict(), model_of(modality, method, seed=4).state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)
    config = model_config(modality, method)
    assert type(config).parse(config.plain()) == config


@pytest.mark.parametrize(
    ("modality", "method"),
    [
        pytest.param(a, b, marks=[] if (a, b) == ("image", "unite") else [pytest.mark.slow])  # a minute each
        for a in available("modalities")
        for b in available("methods")
    ],
)
def test_it_learns_to_reconstruct_and_to_generate(modality: str, method: str):
    """Sixteen samples of two kinds. A falling loss proves nothing: reconstructions and samples are measured."""
    data, argument = toy_of(modality)
    model = model_of(modality, method)
    with pytest.raises(AssertionError):
        demand(judged(model, data, argument))  # an untrained model fails
    train(model, data, steps=400)
    demand(judged(model, data, argument), model.generates)
