"""SSIM: closed forms for constant images, and scikit-image's value if it is installed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unilatent.modalities._media.similarity import ssim


def images(batch: int = 2, channels: int = 3, height: int = 20, width: int = 31, seed: int = 0) -> Tensor:
    return torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(seed))


def test_an_image_equals_itself():
    assert torch.equal(ssim(images(), images()), torch.ones(2).double())


def test_constant_images_differ_only_in_luminance():
    """(2 ab + C1) / (a^2 + b^2 + C1), C1 = 1e-4."""
    a, b = torch.full((1, 1, 16, 16), 0.25), torch.full((1, 1, 16, 16), 0.75)
    assert float(ssim(a, b)) == pytest.approx((2 * 0.1875 + 1e-4) / (0.0625 + 0.5625 + 1e-4), rel=1e-9)


def test_one_window_by_hand():
    """11 x 11 pixels are one window: a step of height h and its negative around 1/2, weighted by the Gaussian."""
    x = torch.arange(11, dtype=torch.float64) - 5
    weights = (-(x**2) / 4.5).exp() / (-(x**2) / 4.5).exp().sum()
    step = 0.2 * x.sign()
    mean, var = float(weights @ step), float(weights @ step**2 - (weights @ step) ** 2)
    assert mean == pytest.approx(0, abs=1e-15)
    a = (0.5 + step).expand(1, 1, 11, 11)
    want = (-2 * var + 9e-4) / (2 * var + 9e-4)  # the means are equal, the covariance is -var
    assert float(ssim(a, 1 - a)) == pytest.approx(want, rel=1e-9) and want < -0.9


def test_images_and_channels_are_independent():
    a, b = images(seed=1), images(seed=2)
    apart = torch.stack([ssim(a[:, c : c + 1], b[:, c : c + 1]) for c in range(3)]).mean(0)
    torch.testing.assert_close(ssim(a, b), apart)
    torch.testing.assert_close(ssim(a, b)[1:], ssim(a[1:], b[1:]))
    torch.testing.assert_close(ssim(a, b), ssim(b, a))


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"equal shape \(B, C, H, W\), got \(2, 3, 20, 31\) and \(1, 3, 20, 31\)"):
        ssim(images(), images(1))
    with pytest.raises(ValueError, match=r"at least 11 pixels, got \(8, 8\)"):
        ssim(images(height=8, width=8), images(height=8, width=8))


def test_agrees_with_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    a = images(1)
    b = (a + 0.2 * (images(1, seed=3) - 0.5)).clamp(0, 1)
    want = metrics.structural_similarity(
        a[0].double().numpy(), b[0].double().numpy(), channel_axis=0, data_range=1.0,
        gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    )  # fmt: skip
    assert 0.3 < want < 0.99 and float(ssim(a, b)) == pytest.approx(want, rel=1e-9)
