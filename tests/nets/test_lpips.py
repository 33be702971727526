"""LPIPS with random VGG weights: a distance, frozen, differentiable, errors for wrong files."""

import math

import pytest
import safetensors.torch
import torch

from unilatent.nets.lpips import CHANNELS, LPIPS, VGG16, published_linear, vgg_features


@pytest.fixture(scope="module")
def backbone():
    """Return a random VGG16 in torchvision's layout, scaled so that features neither vanish nor explode."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, value in vgg_features().state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        state[f"features.{key}"] = noise * (math.sqrt(2 / value[0].numel()) if value.ndim == 4 else 0.01)
    return state | {"classifier.0.weight": torch.randn(4, 5), "classifier.0.bias": torch.randn(4)}


@pytest.fixture(scope="module")
def lpips(backbone):
    return LPIPS(backbone)


def images(batch=2, size=32, seed=0):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_numbering_is_torchvisions():
    convolutions = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    assert list(vgg_features().state_dict()) == [f"{i}.{kind}" for i in convolutions for kind in ("weight", "bias")]
    assert sum(value.numel() for value in vgg_features().state_dict().values()) == 14_714_688


def test_published_linear_weights():
    linear = published_linear()
    assert sorted(linear) == [f"lin{i}.weight" for i in range(5)]
    assert [tuple(linear[f"lin{i}.weight"].shape) for i in range(5)] == [(channels,) for channels in CHANNELS]
    assert all(weight.dtype == torch.float32 and weight.min() >= 0 for weight in linear.values())
    assert sum(weight.numel() for weight in linear.values()) == 1472


def test_taps(lpips):
    shapes = [tuple(tap.shape) for tap in lpips.taps(images(size=48))]
    assert shapes == [(2, 64, 48, 48), (2, 128, 24, 24), (2, 256, 12, 12), (2, 512, 6, 6), (2, 512, 3, 3)]
    assert all(tap.min() == 0 < tap.max() for tap in lpips.taps(images()))  # after a ReLU, not dead


def test_is_a_distance(lpips):
    a, b = images(seed=1), images(seed=2)
    distance = lpips(a, b)
    assert distance.shape == (2,) and distance.dtype == torch.float32
    assert torch.equal(lpips(a, a), torch.zeros(2))
    assert (distance > 0.01).all()
    torch.testing.assert_close(lpips(b, a), distance)
    assert (lpips(a, a + 0.05 * b) < distance).all()


def test_samples_are_independent(lpips):
    a, b = images(3, seed=1), images(3, seed=2)
    torch.testing.assert_close(lpips(a, b)[1:2], lpips(a[1:2], b[1:2]))


def test_gradient_reaches_both_inputs_and_no_weight(lpips):
    a, b = images(seed=1).requires_grad_(), images(seed=2).requires_grad_()
    lpips(a, b).sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() and x.grad.abs().max() > 0 for x in (a, b))
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in lpips.parameters())


def test_gradient_is_the_slope(lpips):
    a, b, direction = images(1, seed=1), images(1, seed=2), images(1, seed=3)
    a.requires_grad_()
    (gradient,) = torch.autograd.grad(lpips(a, b).sum(), a)
    step = 1e-3
    slope = (lpips(a.detach() + step * direction, b) - lpips(a.detach() - step * direction, b)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), slope[0], rtol=0.02, atol=1e-4)


def test_dead_features_have_a_finite_gradient(backbone):
    dead = {key: value if value.ndim == 4 else value - 1e3 for key, value in backbone.items()}
    a = images().requires_grad_()
    distance = LPIPS(dead)(a, images(seed=2))
    distance.sum().backward()
    assert torch.equal(distance, torch.zeros(2)) and torch.equal(a.grad, torch.zeros_like(a))


def test_train_changes_nothing(lpips):
    a, b = images(seed=1), images(seed=2)
    before = lpips(a, b)
    assert lpips.train() is lpips and not any(module.training for module in lpips.modules())
    assert torch.equal(lpips(a, b), before) and torch.equal(lpips(a, b), before)


def test_float32_inside_autocast(lpips):
    a, b = images(seed=1).bfloat16(), images(seed=2).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        distance = lpips(a, b)
    assert distance.dtype == torch.float32
    assert torch.equal(distance, lpips(a.float(), b.float()))


def test_in_bfloat16(backbone, lpips):
    """As training on a GPU: distances within 2 %, gradients within 20 % of those in float32 and nearly parallel."""
    fast = LPIPS(backbone).in_16_bits(torch.bfloat16)
    weights = [layer.weight for layer in fast.features if hasattr(layer, "weight")]
    assert all(w.dtype == torch.bfloat16 and w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    found = []
    for network in (lpips, fast):
        a, b = images(4, 64, seed=1), images(4, 64, seed=2)
        a = (b + 0.3 * a).requires_grad_()  # a reconstruction
        distance = network(a, b)
        distance.sum().backward()
        assert distance.dtype == torch.float32 and a.grad.dtype == torch.float32
        found.append((distance.detach(), a.grad.flatten(1)))
    (exact, gradient), (distance, near) = found
    torch.testing.assert_close(distance, exact, rtol=0.02, atol=0)
    assert not torch.equal(distance, exact)
    assert (torch.cosine_similarity(near, gradient) > 0.98).all()
    assert ((near - gradient).norm(dim=1) < 0.2 * gradient.norm(dim=1)).all()


def test_construction_draws_no_random_numbers(backbone):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    LPIPS(backbone)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    ("a", "b", "says"),
    [
        ((2, 3, 32, 32), (1, 3, 32, 32), "equal shapes"),
        ((2, 1, 32, 32), (2, 1, 32, 32), "3 times"),
        ((3, 32, 32), (3, 32, 32), r"\(B, 3, H, W\)"),
        ((2, 3, 32, 15), (2, 3, 32, 15), "at least 16"),
    ],
)
def test_wrong_shapes_are_refused(lpips, a, b, says):
    with pytest.raises(ValueError, match=says):
        lpips(torch.zeros(a), torch.zeros(b))


def test_smallest_size(lpips):
    assert lpips(images(size=16, seed=1), images(size=16, seed=2)).isfinite().all()


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_load_takes_a_file(backbone, lpips, tmp_path, suffix):
    path = tmp_path / f"vgg.{suffix}"
    if suffix == "pth":
        torch.save(backbone, path)
    else:
        safetensors.torch.save_file(backbone, path)
    a, b = images(seed=1), images(seed=2)
    assert torch.equal(LPIPS.load(str(path))(a, b), lpips(a, b))


def without(backbone, key):
    return {name: value for name, value in backbone.items() if name != key}


def test_missing_unknown_and_misshapen_tensors_are_named(backbone):
    with pytest.raises(ValueError, match=r"no tensor features\.28\.bias \(1 of 26 missing\)"):
        LPIPS(without(backbone, "features.28.bias"))
    with pytest.raises(ValueError, match=r"unknown tensor features\.31\.weight"):
        LPIPS(backbone | {"features.31.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"features\.0\.weight has shape \(64, 1, 3, 3\)"):
        LPIPS(backbone | {"features.0.weight": torch.zeros(64, 1, 3, 3)})


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("half.pth", {"features.0.weight": torch.zeros(64, 3, 3, 3)}, "no tensor features.0.bias"),
        ("list.pth", [torch.zeros(1)], "holds a list"),
        ("code.pth", math.sqrt, "UnpicklingError"),
        ("noise.pth", b"noise", "not a readable weight file"),
        ("noise.safetensors", b"noise", "not a readable weight file"),
        ("empty.pth", b"", "not a readable weight file"),
    ],
)
def test_files_that_are_not_vgg16_are_refused(tmp_path, name, content, says):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError) as caught:
        LPIPS.load(str(path))
    message = str(caught.value)
    assert says in message and str(path) in message and "\n" not in message
    assert "modality.perceptual_weights=PATH" in message and "modality.perceptual_weight=0" in message


def test_missing_weights_are_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("UNILATENT_OFFLINE", "1")
    monkeypatch.setenv("UNILATENT_CACHE", str(tmp_path))
    for path in (None, str(tmp_path / "absent.pth")):
        with pytest.raises(ValueError) as caught:
            LPIPS.load(path)
        message = str(caught.value)
        assert message.startswith(VGG16.name) and VGG16.url in message and str(tmp_path) in message
        assert "modality.perceptual_weights=PATH" in message and "modality.perceptual_weight=0" in message
