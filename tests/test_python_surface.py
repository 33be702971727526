"""What users of PyTorch expect in Python: names, types of weights, folders, gradients, export, copies."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unilatent
from unilatent.methods.base import LatentModel
from unilatent.presets import preset
from unilatent.sampling import sample_batches
from unilatent.training.trainer import Trainer

QUICK = (
    "training.steps=4", "training.sample_every=0", "training.evaluate_samples=0", "training.checkpoint_every=2",
    "training.log_every=2", "training.batch_size=8",
)  # fmt: skip
FAST = {"num_inference_steps": 3, "seed": 0}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four steps with checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("surface") / "run"
    Trainer(preset("digits").override(*QUICK), folder).fit()
    return folder


@pytest.fixture
def model(run: Path) -> LatentModel:
    """Its model, with random weights where initialisation has zeros."""
    loaded = unilatent.load(run, device="cpu")
    stream = torch.Generator().manual_seed(0)
    for parameter in loaded.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=stream)
    return loaded


def images(n: int = 3) -> Tensor:
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))


# Names.


def test_the_public_names_are_listed_and_importing_stays_light() -> None:
    """Before any is used, and without importing torch."""
    code = (
        "import sys, unilatent; names = dir(unilatent); assert 'torch' not in sys.modules; print(*names);"
        "assert all(hasattr(unilatent, name) for name in names)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    public = [name for name in done.stdout.split() if not name.startswith("_")]
    assert public == [
        "Given", "LatentDiffusion", "UNITE", "UnifiedLatents", "decode", "encode", "load", "reconstruct", "record",
        "sample",
    ]  # fmt: skip
    assert set(unilatent.__all__) <= set(done.stdout.split())
    with pytest.raises(AttributeError, match="no attribute 'smaple'"):
        _ = unilatent.smaple  # type: ignore[attr-defined]


# Folders.


def test_from_pretrained_takes_a_run_its_model_and_a_checkpoint(run: Path) -> None:
    """All are the EMA weights; a checkpoint's own weights are those that training continues with."""
    finished = unilatent.UNITE.from_pretrained(run).state_dict()
    for source in (run / "model", run / "checkpoints" / "step_00000004", str(run)):
        again = unilatent.UNITE.from_pretrained(source).state_dict()
        assert all(torch.equal(finished[name], again[name]) for name in finished)
    older = unilatent.UNITE.from_pretrained(run / "checkpoints" / "step_00000002").state_dict()
    assert not all(torch.equal(finished[name], older[name]) for name in finished)


def test_from_pretrained_says_what_a_folder_is(run: Path, tmp_path: Path) -> None:
    (tmp_path / "unfinished" / "checkpoints").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    weights = run / "model" / "model.safetensors"
    for source, message in (
        (tmp_path / "unfinished", r"a run that is not finished; unilatent\.load takes its newest checkpoint"),
        (tmp_path / "other", "neither a run nor a model folder"),
        (tmp_path / "not" / "there", "no such folder; give a run, a model folder or a hub id"),
        (weights, f"is a file, .* give its folder, {weights.parent}"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            unilatent.UNITE.from_pretrained(source)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="give its folder"):
        unilatent.load(weights)


# Types and devices.


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-4), (torch.bfloat16, 0.1), (torch.float16, 0.02), (torch.float32, 0)]
)
def test_a_cast_model_computes_in_its_type(model: LatentModel, dtype: torch.dtype, tolerance: float) -> None:
    """Latents, reconstructions and guided samples are float32 and those of the float32 model, up to its rounding."""
    data = images()
    want = [unilatent.encode(model, data), unilatent.reconstruct(model, data)]
    want += [unilatent.sample(model, 3, guidance_scale=s, guidance_norm=n, **FAST)
             for s, n in ((1.0, "norm_first"), (2.0, "norm_first"), (2.0, "guidance_first"))]  # fmt: skip
    seen: set[torch.dtype] = set()
    cast = copy.deepcopy(model).to(dtype)
    linear = next(module for module in cast.modules() if isinstance(module, nn.Linear))
    linear.register_forward_hook(lambda _, __, output: seen.add(output.dtype))
    found = [unilatent.encode(cast, data), unilatent.reconstruct(cast, data)]
    found += [unilatent.sample(cast, 3, guidance_scale=s, guidance_norm=n, **FAST)
              for s, n in ((1.0, "norm_first"), (2.0, "norm_first"), (2.0, "guidance_first"))]  # fmt: skip
    assert seen == {dtype} and cast.dtype == dtype
    for a, b in zip(found, want, strict=True):
        assert a.dtype == torch.float32 and float((a - b).abs().mean()) <= tolerance
    assert tolerance == 0 or not torch.equal(found[0], want[0])


@pytest.mark.parametrize("how", [lambda m: m.half(), lambda m: m.double(), lambda m: m.bfloat16()])
def test_half_and_double_sample(model: LatentModel, how: Any) -> None:
    assert unilatent.sample(how(model), 2, labels=[3], **FAST).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("name", "settings"),
    [("scenes-unite", ()), ("scenes-ul", ()),
     ("molecules", ("conditions.scalar={mean: 1, std: 1, quantiles: [0.0, 1.0, 2.0]}",))],
)  # fmt: skip
def test_texts_and_numbers_condition_a_cast_model(name: str, settings: tuple[str, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    cast = LatentModel.build(preset(name).override(*settings).example().model()).eval().to(dtype)
    parts = sample_batches(cast, 2, num_inference_steps=2, decoder_steps=2, guidance_scale=2.0)
    latents = next(iter(parts)).latents
    assert latents.dtype == torch.float32 and latents.isfinite().all()


def test_one_cast_part_is_enough(model: LatentModel) -> None:
    """Also where only a part was cast, and inputs of another type."""
    model.decoder.half()
    assert model.decode(model.encode(images()).double()).dtype == torch.float32
    assert model.encode(images().half()).dtype == torch.float32


def test_weights_that_nothing_computes_in_are_refused_in_one_line(model: LatentModel) -> None:
    for cast, message in (
        (copy.deepcopy(model).to(torch.float8_e4m3fn), "its weights are torch.float8_e4m3fn, .*call model.float"),
        (copy.deepcopy(model).to("meta"), "it is on the meta device, where it has no weights"),
    ):
        calls = (
            lambda m=cast: unilatent.sample(m, 2),
            lambda m=cast: unilatent.encode(m, images()),
            lambda m=cast: unilatent.reconstruct(m, images()),
            lambda m=cast: unilatent.decode(m, torch.zeros(1, 16, 8)),
        )
        for call in calls:
            with pytest.raises(ValueError, match=f"^model: {message}") as error:
                call()
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("named", ["dtype", "torch_dtype"])
@pytest.mark.parametrize(
    ("given", "dtype"),
    [(torch.bfloat16, torch.bfloat16), ("bfloat16", torch.bfloat16), ("torch.float64", torch.float64),
     ("auto", torch.float32), (None, torch.float32), ("half", torch.float16)],
)  # fmt: skip
def test_models_are_loaded_in_a_type(run: Path, named: str, given: Any, dtype: torch.dtype) -> None:
    for load in (unilatent.load, unilatent.UNITE.from_pretrained):
        assert load(run, **{named: given}).dtype == dtype


@pytest.mark.parametrize("given", ["cpu", "auto", torch.device("cpu"), {"": "cpu"}, {"decoder": "cpu", "": "cpu"}])
def test_device_maps_that_name_one_device(run: Path, given: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for load in (unilatent.load, unilatent.UNITE.from_pretrained):
        assert load(run, device_map=given).device == torch.device("cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dtype": "int8"}, "dtype: 'int8' cannot be used; give one of float32, float64, bfloat16, float16"),
     ({"torch_dtype": torch.int64}, "torch_dtype: 'torch.int64' cannot be used"),
     ({"dtype": "float16", "torch_dtype": "float32"}, "dtype: float16, but torch_dtype is float32"),
     ({"device_map": "balanced"}, "device_map: 'balanced' divides the model"),
     ({"device_map": {"encoder": "cpu", "decoder": "disk"}}, "device_map: .* divides the model"),
     ({"device_map": "cuda:97"}, "device_map: 'cuda:97' is not there"), ({"device_map": 97}, "'cuda:97' is not there")],
)  # fmt: skip
def test_types_and_maps_that_cannot_be_are_refused(run: Path, options: dict[str, Any], message: str) -> None:
    for load in (unilatent.load, unilatent.UNITE.from_pretrained):
        with pytest.raises(ValueError, match=f"^{message}" if message[0] != "'" else message) as error:
            load(run, **options)
        assert "\n" not in str(error.value)


# Gradients.


def test_gradients_flow_through_encode_decode_and_denoise_on_request(model: LatentModel) -> None:
    data = images().requires_grad_()
    latents = model.encode(data)
    latents.square().sum().backward()
    assert data.grad is not None and data.grad.isfinite().all() and data.grad.abs().sum() > 0
    z = model.encode(images()).requires_grad_()
    model.zero_grad()
    model.decode(z).sum().backward()
    assert z.grad is not None and z.grad.isfinite().all() and z.grad.abs().sum() > 0
    weight = model.decoder.out.weight.grad
    assert weight is not None and weight.abs().sum() > 0, "the weights get theirs too"
    noised = torch.randn_like(z).requires_grad_()
    cond = model.conditions({"labels": torch.tensor([1, 2, 3])})
    (model.denoise(noised, 0.5, cond) * torch.randn_like(z)).sum().backward()
    assert noised.grad is not None and noised.grad.isfinite().all() and noised.grad.abs().sum() > 0


def test_a_gradient_is_the_slope(model: LatentModel) -> None:
    """In float64, against central differences, with respect to latents."""
    model = model.double()
    z = model.encode(images(1)).double()
    direction = torch.randn(z.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cond, t = model.conditions.null(1), 0.5
    for function in (lambda x: model.decode(x).double().clamp(0.05, 0.95).sum(),
                     lambda x: (model.denoise(x, t, cond).double() * direction).sum()):  # fmt: skip
        x = z.clone().requires_grad_()
        function(x).backward()
        assert x.grad is not None
        step = 1e-2
        with torch.no_grad():
            slope = (function(z + step * direction) - function(z - step * direction)) / (2 * step)
        assert float((x.grad * direction).sum()) == pytest.approx(float(slope), rel=0.05, abs=1e-2)


def test_nothing_is_recorded_unasked(model: LatentModel) -> None:
    z = model.encode(images())
    assert not z.requires_grad and not model.decode(z).requires_grad
    assert not unilatent.decode(model, z).requires_grad
    with torch.no_grad():
        assert not model.decode(z.clone().requires_grad_()).requires_grad
    assert not unilatent.sample(model, 2, **FAST).requires_grad


def test_a_second_derivative_is_refused_and_not_wrong(model: LatentModel) -> None:
    z = model.encode(images(1)).requires_grad_()
    first = torch.autograd.grad(model.denoise(z, 0.5, model.conditions.null(1)).sum(), z, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().sum().backward()


# Export.


class Decode(nn.Module):
    def __init__(self, model: LatentModel):
        super().__init__()
        self.model = model

    def forward(self, latents: Tensor) -> Tensor:
        return self.model.decode(latents)


class Denoise(nn.Module):
    def __init__(self, model: LatentModel):
        super().__init__()
        self.model = model

    def forward(self, z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return self.model.denoise(z, t, self.model.conditions({"labels": labels}))


def test_decode_and_denoise_are_exported(model: LatentModel) -> None:
    """The program gives the model's outputs, also for other inputs; bad latents are still refused in eager code."""
    z = model.encode(images())
    program = torch.export.export(Decode(model), (z,), strict=False)
    for latents in (z, torch.randn_like(z)):
        torch.testing.assert_close(program.module()(latents), model.decode(latents), rtol=0, atol=1e-5)
    inputs = (z, torch.tensor(0.5), torch.tensor([1, 2, 3]))
    program = torch.export.export(Denoise(model), inputs, strict=False)
    for t in (0.5, 0.9):
        inputs = (torch.randn_like(z), torch.tensor(t), torch.tensor([4, 5, 6]))
        torch.testing.assert_close(program.module()(*inputs), Denoise(model)(*inputs), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="NaN or infinity"):
        model.decode(z * float("nan"))


def test_an_exported_program_takes_any_batch(model: LatentModel) -> None:
    z = model.encode(images(4))
    program = torch.export.export(
        Decode(model), (z,), strict=False, dynamic_shapes=({0: torch.export.Dim("batch", max=64)},)
    )
    assert program.module()(z[:2]).shape == (2, 1, 8, 8)
    torch.testing.assert_close(program.module()(z[:3]), model.decode(z[:3]), rtol=0, atol=1e-5)


# Copies.


def test_copies_and_pickles_are_the_same_model(model: LatentModel) -> None:
    want = unilatent.sample(model, 2, **FAST)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for again in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(unilatent.sample(again, 2, **FAST), want)
        assert again.fingerprint() == model.fingerprint() and again.config == model.config
    other = LatentModel.build(model.config)
    other.load_state_dict(model.state_dict())
    assert torch.equal(unilatent.sample(other.eval(), 2, **FAST), want)


def test_a_model_moves_to_meta_and_shows_itself_shortly(model: LatentModel) -> None:
    assert len(repr(model).splitlines()) < 150
    assert model.to("meta").device.type == "meta"
