"""Rates in nats: the same loss in every parameterisation, sums with padding, and a Gaussian's known rate."""

from __future__ import annotations

import math

import pytest
import torch

from unilatent.maths import weightings
from unilatent.maths.coding import gaussian_bits, histogram_entropy, rates
from unilatent.maths.denoising import denoising_loss, denoising_nats, masked_sum, terminal_kl
from unilatent.maths.paths import LinearPath, LogSNRPath, NoisePath
from unilatent.maths.predictions import from_clean
from unilatent.maths.times import stratified

PATHS = [LogSNRPath(5, -10), LogSNRPath(5, -12, "linear"), LogSNRPath(15, -15), LinearPath()]
LATENT = [LogSNRPath(5, end, shape) for shape in ("cosine", "linear") for end in (-8, -12)]
every_path = pytest.mark.parametrize("path", PATHS, ids=repr)
T = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)


def normals(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@every_path
def test_losses_of_clean_estimate_noise_and_velocity_agree(path: NoisePath):
    """The weight on the clean estimate's error gives -logsnr' / 2 w(logsnr) |eps - eps_hat|^2, and so does v's."""
    x, estimate, eps = normals(50, 1, 8), normals(50, 1, 8, seed=1), normals(50, 1, 8, seed=2)
    z = path.add_noise(x, eps, T)
    noise_error = (eps - path.noise_of(z, estimate, T)).square().sum((1, 2))
    velocity = from_clean("velocity", x, z, T, path) - from_clean("velocity", estimate, z, T, path)
    torch.testing.assert_close(path.alpha(T) ** 2 * velocity.square().sum((1, 2)), noise_error, rtol=1e-7, atol=0)
    for weight, on_noise in [
        (weightings.elbo(T, path), torch.ones_like(T)),
        (weightings.sigmoid(T, path, 2.0), torch.sigmoid(2.0 - path.logsnr(T))),
        (weightings.sigmoid(T, path, -3.0), torch.sigmoid(-3.0 - path.logsnr(T))),
    ]:
        want = -path.dlogsnr(T) / 2 * on_noise * noise_error
        torch.testing.assert_close(denoising_nats(x, estimate, weight), want, rtol=1e-9, atol=0)
        single = denoising_nats(x.float(), estimate.float(), weight.float())
        torch.testing.assert_close(single, want.float(), rtol=1e-5, atol=0)


@every_path
def test_derivative_of_logsnr_is_that_of_autograd(path: NoisePath):
    t = T.clone().requires_grad_()
    torch.testing.assert_close(path.dlogsnr(T), torch.autograd.grad(path.logsnr(t).sum(), t)[0], rtol=1e-8, atol=1e-9)


def test_the_sigmoid_identity():
    logsnr, bias = torch.linspace(-20, 20, 81, dtype=torch.float64), 1.7
    torch.testing.assert_close(
        logsnr.exp() * torch.sigmoid(bias - logsnr), math.exp(bias) * torch.sigmoid(logsnr - bias), rtol=1e-12, atol=0
    )


def test_sigmoid_weights_on_the_noise_fall_with_logsnr_and_tend_to_one():
    path = LogSNRPath(15, -15, "linear")
    t = torch.linspace(0, 1, 200, dtype=torch.float64)
    on_noise = weightings.sigmoid(t, path, 2.0) / weightings.elbo(t, path)
    assert (on_noise.diff() > 0).all() and (on_noise > 0).all() and on_noise[0] < 1e-5
    assert on_noise[-1] == pytest.approx(1, abs=1e-6)
    crossing = 2.0 + math.log(1.6 - 1)  # where 1.6 sigmoid(2 - logsnr) = 1: latents and decoder cost the same
    at = torch.tensor([(15 - crossing) / 30], dtype=torch.float64)
    assert 1.6 * weightings.sigmoid(at, path, 2.0) / weightings.elbo(at, path) == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_sigmoid_weights_overflow_nowhere(shape: str):
    path, t = LogSNRPath(90.0, -10.0, shape), torch.tensor([0.0, 0.01, 0.5, 1.0])
    weight = weightings.sigmoid(t, path, 2.0)
    assert weight.isfinite().all() and (weight > 0).all() and weightings.elbo(t, path)[0].isinf()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("path", LATENT, ids=repr)
def test_latents_end_with_exactly_their_noise(path: LogSNRPath, dtype: torch.dtype):
    zero = torch.zeros(1, dtype=dtype)
    assert path.logsnr(zero).item() == pytest.approx(5, abs=2e-6)
    assert path.sigma(zero).item() == pytest.approx((1 + math.exp(5)) ** -0.5, abs=2e-7)
    assert path.sigma(zero).item() == pytest.approx(0.0818, abs=2e-5)
    assert path.alpha(zero).item() == pytest.approx((1 + math.exp(-5)) ** -0.5, abs=2e-7)


@pytest.mark.parametrize("path", LATENT, ids=repr)
def test_a_gaussian_costs_half_log_one_plus_e_to_the_five(path: LogSNRPath):
    """E L_z = 2.50336 nats a dimension for z ~ N(0, 1) and its best denoiser alpha_t z_t, on any schedule.

    Standard error of 2^15 random samples of 32 dimensions, measured over seeds: 0.007 at stratified times, 0.019 at
    independent ones. With data and noise of exactly unit moments only the times' error is left: below 5e-4.
    """
    n, d = 2**15, 32
    t = stratified(torch.arange(n), 1234567 << 40).double()
    want = 0.5 * math.log1p(math.exp(5))
    assert want == pytest.approx(2.50336, abs=1e-5)
    unit = torch.ones(n, 1, 2, dtype=torch.float64), torch.tensor([1.0, -1.0], dtype=torch.float64).expand(n, 1, 2)
    for clean, eps, error in ((normals(n, 1, d), normals(n, 1, d, seed=1), 0.02), (*unit, 5e-4)):
        z = path.add_noise(clean, eps, t)
        estimate = path.alpha(t)[:, None, None] * z
        nats = denoising_nats(clean, estimate, weightings.elbo(t, path)) + terminal_kl(clean, path)
        assert float(nats.mean() / clean.shape[-1]) == pytest.approx(want, abs=error)
    bits = rates(nats.mean(), latent_dimension=2)["bits_per_latent_dimension"]
    assert float(bits) == pytest.approx(3.6116, abs=1e-3)


def test_a_constant_costs_nothing():
    path, zeros = LogSNRPath(5, -12), torch.zeros(4, 2, 3)
    assert denoising_nats(zeros, zeros, torch.ones(4)).abs().max() == 0
    assert 0 <= terminal_kl(zeros, path).max() < 1e-9


@pytest.mark.parametrize("end", [-3.0, -12.0, -20.0])
def test_terminal_kl_is_torch_s(end: float):
    path, clean = LogSNRPath(5, end), normals(3, 4, 2)
    end_time = torch.tensor(1.0, dtype=torch.float64)
    at_end = torch.distributions.Normal(path.alpha(end_time) * clean, path.sigma(end_time))
    want = torch.distributions.kl_divergence(at_end, torch.distributions.Normal(0.0, 1.0)).sum((1, 2))
    torch.testing.assert_close(terminal_kl(clean, path), want, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(terminal_kl(clean.float(), path), want.float(), rtol=1e-5, atol=0)


def test_padding_costs_nothing_and_gets_no_gradient():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    clean, estimate = normals(2, 3, 4), normals(2, 3, 4, seed=1)
    clean[~mask] = float("nan")
    clean.requires_grad_()
    weight = torch.tensor([2.0, 3.0], dtype=torch.float64)
    nats = denoising_nats(clean, estimate, weight, mask)
    for b in range(2):
        real = (clean[b, mask[b]] - estimate[b, mask[b]]).square().sum()
        torch.testing.assert_close(nats[b], weight[b] * real)
    kl = terminal_kl(clean, LogSNRPath(5, -10), mask)
    torch.testing.assert_close(kl[1:], terminal_kl(clean[1:, :1], LogSNRPath(5, -10)))
    torch.testing.assert_close(masked_sum(mask.float(), mask), torch.tensor([2.0, 1.0]))


def test_the_sum_is_the_mean_times_how_many_there_are():
    clean, estimate, weight = normals(3, 5, 4).float(), normals(3, 5, 4, seed=1).float(), torch.tensor([1.0, 2.0, 0.5])
    summed = denoising_nats(clean, estimate, weight)
    torch.testing.assert_close(summed.mean(), 20 * denoising_loss(clean, estimate, weight))
    assert summed.dtype == torch.float32


def test_rates_say_what_they_divide_by():
    got = rates(torch.tensor(math.log(2) * 96.0), pixel=16, subpixel=48, latent_dimension=32)
    assert got.keys() == {"bits_per_pixel", "bits_per_subpixel", "bits_per_latent_dimension"}
    assert [round(float(v), 5) for v in got.values()] == [6.0, 2.0, 3.0]


def test_a_rate_of_samples_that_differ_in_size_is_that_of_all_together():
    """60 bits in 20 atoms, whichever sample has them; not the mean of 2 and 4 bits per atom."""
    nats = math.log(2) * torch.tensor([20.0, 40.0])
    assert rates(nats, atom=torch.tensor([10, 10]))["bits_per_atom"].item() == pytest.approx(3.0)
    assert rates(nats, atom=torch.tensor([5, 10]))["bits_per_atom"].item() == pytest.approx(4.0)
    assert rates(nats, atom=torch.tensor([2, 18]))["bits_per_atom"].item() == pytest.approx(3.0)
    assert rates(nats, pixel=10)["bits_per_pixel"].item() == pytest.approx(3.0)


def test_histogram_entropy_of_known_laws():
    n = 200_000
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = torch.stack([uniform, 3 * normals(n), torch.full((n,), 0.3, dtype=torch.float64)], dim=1)
    got = histogram_entropy(values, 1 / 16)
    gaussian = 0.5 * math.log2(2 * math.pi * math.e * 9) + 4
    torch.testing.assert_close(got, torch.tensor([4.0, gaussian, 0.0], dtype=torch.float64), rtol=0, atol=0.01)
    with pytest.raises(ValueError, match="width 0"):
        histogram_entropy(values, 0)


def test_bits_through_noise_closed_form():
    """1/2 log2(1 + snr variance) a channel, whatever the directions; unit variance at log-SNR 5: 3.6116 bits, as the
    bound of an optimal prior."""
    assert gaussian_bits(torch.eye(1), math.exp(5)) == pytest.approx(3.6116, abs=1e-4)
    variances = torch.tensor([4.0, 1.0, 0.25, 0.0], dtype=torch.float64)
    want = sum(math.log2(1 + 3 * v) / 2 for v in variances.tolist())
    rotation = torch.linalg.qr(normals(4, 4)).Q
    assert gaussian_bits(variances.diag(), 3.0) == pytest.approx(want, rel=1e-12)
    assert gaussian_bits(rotation @ variances.diag() @ rotation.T, 3.0) == pytest.approx(want, rel=1e-9)
    assert gaussian_bits(torch.zeros(4, 4), 3.0) == 0
    for snr in (0.0, math.inf):
        with pytest.raises(ValueError, match="without noise there is no limit"):
            gaussian_bits(torch.eye(2), snr)


@pytest.mark.parametrize("snr", [0.1, 1.0, 10.0])
def test_latents_of_the_same_variance_carry_less(snr: float):
    """Latents of +1 and -1 carry at most one bit: here by integration over what arrives, below the bound everywhere."""
    x = torch.linspace(-12, 12, 20001, dtype=torch.float64)
    density = sum(torch.exp(-((x - mean) ** 2) / 2) / math.sqrt(8 * math.pi) for mean in (-(snr**0.5), snr**0.5))
    entropy = -float(torch.trapezoid(torch.xlogy(density, density), x)) / math.log(2)
    carried = entropy - 0.5 * math.log2(2 * math.pi * math.e)
    assert 0 < carried <= 1 + 1e-9 and carried < gaussian_bits(torch.eye(1), snr)
