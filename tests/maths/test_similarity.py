"""CKA and CKNNA: closed forms, invariances, and brute force."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from unilatent.maths.coding import description_bits
from unilatent.maths.similarity import LinearCKA, cknna, gram, hsic, nearest


def features(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear_cka(a: Tensor, b: Tensor) -> float:
    cka = LinearCKA()
    cka.add(gram(a), gram(b))
    return cka.value


@pytest.mark.parametrize("n", [64, 1024])
def test_cka_is_one_with_itself_and_near_zero_for_independent_features(n: int):
    x = features(n, 20, 0)
    assert linear_cka(x, x) == pytest.approx(1, abs=1e-12)
    values = torch.tensor([linear_cka(features(n, 20, seed), features(n, 30, 100 + seed)) for seed in range(40)])
    error = values.std() / math.sqrt(len(values))
    assert abs(values.mean()) < 4 * error and values.std() < 3 / n, "unbiased: 0 on average, at every n"


def test_cka_does_not_see_rotation_scale_or_shift():
    x, y = features(80, 12, 1), features(80, 7, 2) + 0.5 * features(80, 12, 1)[:, :7]
    rotation = torch.linalg.qr(features(12, 12, 3)).Q
    assert 0.05 < linear_cka(x, y) < 0.95
    assert linear_cka(3 * x @ rotation + 5, y) == pytest.approx(linear_cka(x, y), rel=1e-10)
    stretched = x * torch.linspace(0.1, 3, 12, dtype=torch.float64)
    assert linear_cka(stretched, y) != pytest.approx(linear_cka(x, y), rel=1e-2)


def test_cka_of_batches_has_the_expectation_of_the_whole():
    """Small batches do not raise it, as the biased estimate does."""
    x, noise = features(4000, 10, 4), features(4000, 10, 5)
    y = x + 2 * noise
    whole = linear_cka(x[:2000], y[:2000])
    batches = LinearCKA()
    for rows in torch.arange(4000).split(16):
        batches.add(gram(x[rows]), gram(y[rows]))
    assert batches.value == pytest.approx(whole, abs=0.03)


def brute_hsic(k: Tensor, l: Tensor) -> float:  # noqa: E741
    """The average over all ordered tuples of four different samples (Song et al. 2012, Eq. 5)."""
    n, total, count = len(k), 0.0, 0
    for i in range(n):
        for j in range(n):
            for q in range(n):
                for r in range(n):
                    if len({i, j, q, r}) == 4:
                        total += float(k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q]))
                        count += 1
    return total / count


def test_hsic_is_the_average_over_quadruples():
    k, l = gram(features(7, 3, 6)), gram(features(7, 4, 7))  # noqa: E741
    assert float(hsic(k, l)) == pytest.approx(brute_hsic(k, l), rel=1e-10)
    with pytest.raises(ValueError, match="3 samples"):
        hsic(k[:3, :3], l[:3, :3])


def brute_nearest(x: Tensor, i: int, count: int) -> set[int]:
    unit = x / x.norm(dim=1, keepdim=True)
    return set(sorted((j for j in range(len(x)) if j != i), key=lambda j: -float(unit[i] @ unit[j]))[:count])


def test_cknna_against_brute_force():
    n, count = 12, 4
    x, y = features(n, 5, 8), features(n, 5, 8) + 0.7 * features(n, 5, 9)
    k, l = (part / part.norm(dim=1, keepdim=True) for part in (x, y))  # noqa: E741
    k, l = k @ k.T, l @ l.T  # noqa: E741
    near = [torch.zeros(n, n, dtype=torch.float64) for _ in range(3)]
    for i in range(n):
        a, b = brute_nearest(x, i, count), brute_nearest(y, i, count)
        assert set(nearest(k, count)[i].nonzero().flatten().tolist()) == a
        for mask, chosen in zip(near, (a, b, a & b), strict=True):
            mask[i, list(chosen)] = 1
    own_k, own_l, both = near
    own = float(hsic(own_k * k, own_k * k)) * float(hsic(own_l * l, own_l * l))
    want = float(hsic(both * k, both * l)) / math.sqrt(own)
    assert cknna(x, y, count) == pytest.approx(want, rel=1e-10)


def test_long_features_are_no_hubs():
    """Lengths that both representations share, and nothing else, are no alignment."""
    lengths = features(200, 1, 12).exp()
    x, y = features(200, 16, 13), features(200, 16, 14)
    assert cknna(lengths * x, lengths * y) == pytest.approx(cknna(x, y), abs=1e-9) and abs(cknna(x, y)) < 0.1


def test_cknna_is_one_with_itself_and_falls_with_noise():
    x, noise = features(300, 16, 10), features(300, 16, 11)
    values = [cknna(x, x + sigma * noise, 10) for sigma in (0.0, 0.3, 1.0, 10.0)]
    assert values[0] == pytest.approx(1) and values == sorted(values, reverse=True) and values[-1] < 0.1
    with pytest.raises(ValueError, match="10 neighbours of 10 samples"):
        cknna(x[:10], x[:10], 10)


def test_features_that_are_the_same_for_all_samples_have_no_alignment():
    assert math.isnan(linear_cka(torch.ones(10, 3), features(10, 3, 0)))


def test_bits_of_a_tensor():
    """256 levels, equally often: 8 bits a value; one level: none; a Gaussian: its differential entropy."""
    bytes_ = torch.arange(256).repeat(64)[torch.randperm(256 * 64, generator=torch.Generator().manual_seed(0))]
    assert description_bits(bytes_.float()) == pytest.approx(8 * len(bytes_))
    assert description_bits(bytes_.float() * 1e-3 + 7) == pytest.approx(8 * len(bytes_))
    assert description_bits(torch.full((100,), 0.3)) == 0
    x = features(400_000, 1, 0)
    width = float(x.max() - x.min()) / 4096
    want = 0.5 * math.log2(2 * math.pi * math.e) - math.log2(width)
    assert description_bits(x) / len(x) == pytest.approx(want, abs=0.01)
