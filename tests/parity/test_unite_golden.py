"""UNITE compared with numbers recorded from the authors' network (items a to j of the golden data), in every branch.

Item k, LPIPS, has one branch (`test_lpips_golden.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from golden import FOLDER, golden, needs_golden, read_json
from torch import Tensor, nn

from unilatent.importers import unite_official as importer
from unilatent.maths import times, weightings
from unilatent.maths.denoising import denoising_loss
from unilatent.maths.guidance import classifier_free
from unilatent.maths.solvers import dopri5, euler
from unilatent.methods.unite import UNITE, UNITEDraws
from unilatent.nets import branches
from unilatent.nets.layers import Repeated
from unilatent.training.config import Decay, OptimizerConfig, ScheduleConfig
from unilatent.training.ema import EMA
from unilatent.training.optimizer import Optimizers, clip_gradients
from unilatent.training.schedule import factor
from unilatent.types import Batch, Conditioning, Tokens

pytestmark = needs_golden
CLOSE = {"atol": 2e-5, "rtol": 0}
NULL = 1000


BACKENDS = {"cpu": None, "gpu": None, "cpu-compiled": "eager", "gpu-compiled": "aot_eager"}
eager = pytest.mark.parametrize("branch", ["cpu", "gpu"], indirect=True, scope="module")
"""For tests that are long when compiled and call what others call."""


@pytest.fixture(scope="module", params=BACKENDS)
def branch(request: pytest.FixtureRequest) -> Iterator[str]:
    """All combinations of formulas that a device takes (`nets.branches`): those of an eager CPU or of a GPU, and with
    the repeated blocks compiled, as `training.compile` does. The kernels are the CPU's in each."""
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch, torch._dynamo.config.patch(recompile_limit=64):
        if request.param.startswith("gpu"):
            patch.setattr(branches, "on_cpu", lambda x: False)
        yield request.param


def in_branch(model: UNITE, branch: str) -> UNITE:
    """The model with its blocks compiled if the branch says so; a copy of a model is not compiled."""
    for module in model.modules():
        if isinstance(module, Repeated) and BACKENDS[branch]:
            nn.Module.compile(module, backend=BACKENDS[branch], fullgraph=True)
    return model


@pytest.fixture(scope="module")
def model(branch: str) -> UNITE:
    return in_branch(importer.convert(FOLDER / "tiny_ckpt.pt"), branch)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return golden()["imgs_u8"].float() / 255


def cond(model: UNITE, labels: Tensor) -> Conditioning:
    """Embed labels, of which 1000 is the authors' null index."""
    some = model.conditions({"labels": labels.clamp(max=NULL - 1)})
    return some.where(labels != NULL, model.conditions.null(len(labels)))


def official_time(t: Tensor) -> Tensor:
    return 1 - t


def test_a_encoded_patches(model: UNITE, images: Tensor) -> None:
    tokens = model.modality.pack(images[:1])
    torch.testing.assert_close(
        model.generative_encoder.data_in(tokens.values), golden()["encode.patch_tokens_img0"], **CLOSE
    )


def test_b_encode(model: UNITE, images: Tensor) -> None:
    g = golden()
    tokens = model.modality.pack(images)
    z = model.tokenize(tokens, g["encode.z_noise"], g["encode.flow_t_uniform"])
    torch.testing.assert_close(z, g["encode.z_normed"], **CLOSE)
    raw = model.generative_encoder(g["encode.z_noise"], 1 - g["encode.flow_t"], model.conditions.null(2), None, tokens)
    torch.testing.assert_close(raw, g["encode.z"], **CLOSE)


def test_b_live_weights_are_other_weights(branch: str, images: Tensor) -> None:
    g = golden()
    live = in_branch(importer.convert(FOLDER / "tiny_ckpt.pt", weights="model"), branch)
    z = live.tokenize(live.modality.pack(images), g["encode.z_noise"], g["encode.flow_t_uniform"])
    torch.testing.assert_close(z[:1], g["encode.z_normed_sample0_with_raw_model_weights"], **CLOSE)
    assert (z - g["encode.z_normed"]).abs().max() > 1e-2


def test_c_decode(model: UNITE) -> None:
    g = golden()
    layout = model.modality.pack(torch.zeros(2, 3, 256, 256)).layout
    out = model.modality.unpack(Tokens(model.decoder(g["encode.z_normed"], layout), layout))
    torch.testing.assert_close(out[:1], g["decode.img_sample0"], **CLOSE)
    torch.testing.assert_close(torch.stack([out.mean((1, 2, 3)), out.std((1, 2, 3))], 1),
                               g["decode.img_mean_std_per_sample"], atol=1e-4, rtol=0)  # fmt: skip
    crop = g["decode.img_sample1_crop64"]
    assert any(
        torch.allclose(out[1:, :, i : i + 64, j : j + 64], crop, atol=2e-5)
        for i in range(0, 193, 32)
        for j in range(0, 193, 32)
    )
    torch.testing.assert_close(model.decode(g["encode.z_normed"])[:1], g["decode.img_sample0"].clamp(0, 1), **CLOSE)


def test_d_denoise(model: UNITE) -> None:
    g = golden()
    c = cond(model, g["denoise.y"])
    t = official_time(g["denoise.t"])
    time = model.generative_encoder.transformer.time(g["denoise.t"])
    torch.testing.assert_close(time, g["denoise.t_emb"], **CLOSE)
    torch.testing.assert_close(time + c.vector, g["denoise.c"], **CLOSE)
    torch.testing.assert_close(model.denoise(g["denoise.x_t"], t, c, finish=False), g["denoise.out"], **CLOSE)
    torch.testing.assert_close(model.denoise(g["denoise.x_t"], t, c), g["denoise.out_normed"], **CLOSE)


def guided(model: UNITE, labels: Tensor, scale: float, interval: tuple[float, float], raw: bool = False):
    """Our guidance; `raw`: no norm on the combined estimate, as in the authors' "cfg_first"."""
    null = model.conditions.null(len(labels))
    return classifier_free(
        lambda z, t, c: model.denoise(z, t, c, finish=not raw), cond(model, labels), null, scale, interval,
        (lambda estimate: estimate) if raw else None,
    )  # fmt: skip


def test_e_guidance(model: UNITE) -> None:
    g = golden()
    x, labels = g["cfg.x"], g["cfg.y"][:2]
    with torch.no_grad():
        for row, official in enumerate(g["cfg.t"]):
            out = guided(model, labels, 4.0, (0.0, 0.9))(x, float(1 - official))
            torch.testing.assert_close(out[0], g["cfg.norm_first.int_0.1_1.0.sample0"][row], **CLOSE)
        half = guided(model, labels, 4.0, (0.0, 0.9))(x, 0.5)
        torch.testing.assert_close(half[1], g["cfg.norm_first.int_0.1_1.0.t0.5.sample1"], **CLOSE)
        start = guided(model, labels, 4.0, (0.0, 1.0))(x, 1.0)
        torch.testing.assert_close(start[0], g["cfg.norm_first.int_0.0_1.0.t0.sample0"], **CLOSE)
        raw = guided(model, labels, 4.0, (0.0, 1.0), raw=True)(x, 0.5)
        torch.testing.assert_close(raw[0], g["cfg.cfg_first.t0.5.sample0"], **CLOSE)
        both = guided(model, labels, 4.0, (0.0, 1.0))(x, 0.5)
        torch.testing.assert_close(both[0], g["cfg.both.t0.5.sample0"], **CLOSE)


def test_f_flow_loss(model: UNITE) -> None:
    g = golden()
    t = official_time(g["flow.t"])
    z_t = model.path.add_noise(g["flow.z"], g["flow.noise"], t)
    torch.testing.assert_close(z_t, g["flow.xt"], **CLOSE)
    estimate = model.denoise(z_t, t, cond(model, g["flow.y"]))
    torch.testing.assert_close(estimate, g["flow.x_pred_normed"], **CLOSE)
    loss = denoising_loss(g["flow.z"], estimate, weightings.velocity(t))
    torch.testing.assert_close(loss, g["flow.loss"], atol=0, rtol=1e-4)


@pytest.mark.parametrize("chunk", [1, 2, None])
def test_f_flow_in_training(model: UNITE, branch: str, chunk: int | None) -> None:
    """For three draws in chunks of any size, the loss is the sum over draws."""
    g = golden()
    eps = torch.cat([g["flowtrain.chunk0.noise"], g["flowtrain.chunk1.noise"]]).unflatten(0, (3, 2)).transpose(0, 1)
    drop = torch.cat([g["flowtrain.chunk0.label_drop_uniform"], g["flowtrain.chunk1.label_drop_uniform"]])
    ours = in_branch(copy.deepcopy(model), branch)
    ours.method = model.method.model_copy(update={"flow_chunk": chunk})
    batch = Batch(torch.zeros(2, 3, 256, 256), {"labels": torch.tensor([3, 7])})
    draws = draws_of(flow_time=-g["flowtrain.normals_3x2"].T, flow_noise=eps, drop=drop.view(3, 2).T[..., None])
    layout = ours.modality.pack(batch.data).layout
    size = chunk or 3
    parts = [ours._flow(g["flow.z"][:2], batch, layout, draws, slice(i, i + size)) for i in range(0, 3, size)]
    torch.testing.assert_close(sum(part.value for part in parts), g["flowtrain.loss"], atol=0, rtol=1e-5)


def test_g_times(model: UNITE) -> None:
    g = golden()
    unshifted = 1 - times.logit_normal(-g["tsample.normal"])
    torch.testing.assert_close(unshifted, g["tsample.t_unshifted"], atol=1e-6, rtol=0)
    t = times.shift(1 - g["tsample.t_unshifted"], 2.0)
    torch.testing.assert_close(1 - t, g["tsample.t_shifted_alpha0.5"], atol=1e-6, rtol=0)
    torch.testing.assert_close((1 - times.grid(49, 2.0)).float(), g["ode.grid50_shift0.5"], atol=1e-6, rtol=0)


@torch.no_grad()
def test_h_euler(model: UNITE) -> None:
    g = golden()
    evaluations, states = 0, []
    denoise = guided(model, g["gen.y"], 4.0, (0.0, 0.9))

    def counted(z: Tensor, t: float) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        states.append(z[0])
        return denoise(z, t)

    z = euler(counted, g["gen.noise"], times.grid(49, 2.0), model.path)
    assert evaluations == 49
    torch.testing.assert_close(z, g["gen.euler.z"], atol=1e-3, rtol=0)
    states.append(z[0])
    for index, state in zip(g["gen.euler.traj_idx"], g["gen.euler.traj_sample0"], strict=True):
        torch.testing.assert_close(states[int(index)], state, atol=1e-3, rtol=0)
    images = model.decode(z)
    crop = g["gen.euler.img0_crop96"].clamp(0, 1)
    gap = min(
        float((images[:1, :, i : i + 96, j : j + 96] - crop).abs().max())
        for i in range(0, 161, 16)
        for j in range(0, 161, 16)
    )
    assert gap < 2e-3


@eager
@torch.no_grad()
def test_h_scale_one_is_normalised(model: UNITE) -> None:
    g = golden()
    z = euler(guided(model, g["gen.y"], 1.0, (0.0, 0.9)), g["gen.noise"], times.grid(49, 2.0), model.path)
    torch.testing.assert_close(z[:1], g["gen.euler_cfg1_normalised.z_sample0"], atol=1e-3, rtol=0)


@eager
@torch.no_grad()
def test_h_guidance_before_norm(model: UNITE) -> None:
    g = golden()
    denoise = guided(model, g["gen.y"], 4.0, (0.0, 0.9), raw=True)
    z = euler(denoise, g["gen.noise"], times.grid(49, 2.0), model.path)
    torch.testing.assert_close(z[:1], g["gen.euler_cfg_first.z_sample0"], atol=2e-3, rtol=0)


@eager
@torch.no_grad()
def test_h_dopri5(model: UNITE) -> None:
    """Adaptive steps amplify the last bit; the authors' own noise floor is 8e-3."""
    g = golden()
    z = dopri5(guided(model, g["gen.y"], 4.0, (0.0, 0.9)), g["gen.noise"], times.grid(49, 2.0), model.path)
    torch.testing.assert_close(z[:1], g["gen.dopri5.z_sample0"], atol=5e-2, rtol=0)


def test_i_reconstruction_noise(model: UNITE) -> None:
    g = golden()
    # The authors draw t in [0.7, 1] as 0.7 + 0.3 u; our time runs the other way.
    draws = draws_of(noise=g["noising.x0"], noisy=g["noising.mask_uniform"], noise_time=1 - g["noising.t_uniform"])
    torch.testing.assert_close(model.add_reconstruction_noise(g["noising.x"], draws), g["noising.out"], **CLOSE)


def draws_of(**given: Tensor) -> UNITEDraws:
    empty = torch.zeros(0)
    return UNITEDraws(**{name: given.get(name, empty) for name in UNITEDraws._fields})


def test_j_two_training_steps(model: UNITE, branch: str, images: Tensor) -> None:
    g, recorded = golden(), read_json("train_two_steps.json")
    ours = in_branch(copy.deepcopy(model).train(), branch)
    draws = UNITEDraws(
        registers=g["train.encode_z_noise"],
        register_time=g["train.encode_flow_t_uniform"],
        noisy=g["train.noising_mask_uniform"],
        noise_time=1 - g["train.noising_t_uniform"],
        noise=g["train.noising_x0"],
        flow_time=-g["train.t_normals_3x2"].T,  # their time is our 1 - t
        flow_noise=g["train.flow_noise"].unflatten(0, (3, 2)).transpose(0, 1),
        drop=g["train.label_drop_uniform"].view(3, 2).T[..., None],
    )
    ours.modality = type(ours.modality)(ours.modality.config.model_copy(update={"perceptual_weight": 0.0}))
    batch = Batch(images, {"labels": torch.tensor([3, 7])})
    optimizers = Optimizers(ours, OptimizerConfig(learning_rate=1e-3))
    ema = EMA(ours, 0.9978)
    for step in recorded:
        parts = []
        for part in ours.loss_from(batch, ours._tokens(images), draws):
            part.value.backward()
            parts.append(part)
        torch.testing.assert_close(parts[0].value.item(), step["rec_l1"], rtol=1e-4, atol=0)
        torch.testing.assert_close(sum(p.value.item() for p in parts), step["total"], rtol=1e-4, atol=0)
        norm = clip_gradients(ours, None)
        torch.testing.assert_close(float(norm), step["grad_norm_before_clip"], rtol=1e-3, atol=0)
        compare(
            step["grads_norm_sum_first"],
            {n: p.grad for n, p in ours.named_parameters()},
            1e-4 if step is recorded[0] else 2e-3,
        )
        clip_gradients(ours, 3.0)
        optimizers.step()
        optimizers.zero_grad()
        ema.update(ours)
    compare(recorded[-1]["params_after_norm_sum_first"], dict(ours.named_parameters()), 1e-2)
    for name in ("attn.qkv.bias", ):  # fmt: skip
        key = f"train.after2steps.encoder.blocks.0.{name}"
        parameter = dict(ours.named_parameters())[importer._rename(f"encoder.blocks.0.{name}")]
        torch.testing.assert_close(parameter.detach(), g[key], rtol=1e-2, atol=2e-4)
    for official in ("encoder.up_sample.weight", "encoder.final_layer.linear.bias", "decoder.decoder_embed.bias",
                     "encoder_layer_norm.weight"):  # fmt: skip
        name = importer._rename(official)
        torch.testing.assert_close(
            dict(ours.named_parameters())[name].detach(), g[f"train.after2steps.{official}"], rtol=1e-2, atol=3e-4
        )
        torch.testing.assert_close(ema.weights[name], g[f"train.ema_after2steps.{official}"], rtol=1e-4, atol=1e-5)


def compare(recorded: dict, ours: dict, rtol: float) -> None:
    """Compare [norm, sum, first element] of every official tensor with ours; no layout moves the first element.

    Tolerances of sum and element are relative to the typical size that the norm implies.
    """
    seen = 0
    for official, (norm, total, first) in recorded.items():
        if official.startswith(importer.DERIVED) or official in (importer.PATCH_POSITIONS, importer.SPECIAL_TIME):
            continue
        if official == "encoder.t_embedder.W":
            continue
        name = "conditions.class_label.table.weight" if official == importer.TABLE else importer._rename(official)
        tensor = ours[name].detach()
        near = {"rtol": rtol, "msg": lambda m, o=official: f"{o}: {m}"}
        torch.testing.assert_close(tensor.norm().item(), norm, atol=1e-6, **near)
        torch.testing.assert_close(tensor.sum().item(), total, atol=rtol * norm * tensor.numel() ** 0.5, **near)
        torch.testing.assert_close(
            tensor.flatten()[0].item(), first, atol=4 * rtol * norm / tensor.numel() ** 0.5, **near
        )
        seen += 1
    assert seen > 120


def test_default_schedule() -> None:
    """Two-stage cosine; the second decay of the authors' default has no length: a jump at epoch 3,000."""
    recorded = read_json("schedule_default.json")
    second = Decay(start=300_000, end=300_000, factor=0.1)
    schedule = ScheduleConfig(warmup=2000, decays=(Decay(start=3000, end=5000, factor=0.5), second))
    for step, rate in recorded["lr_at_step"].items():
        assert factor(schedule, int(step), 100) * 1e-4 * 1024 / 384 == pytest.approx(rate, rel=1e-9, abs=1e-15)
    epochs = ScheduleConfig(unit="epochs", warmup=20, decays=(Decay(start=30, end=50, factor=0.5),))
    for step in (10, 2500, 3500, 20_000):
        assert factor(epochs, step, 100) == pytest.approx(factor(schedule, step, 100), rel=1e-12)
