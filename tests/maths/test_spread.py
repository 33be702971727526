"""Spread of latents: closed forms; splitting, padding and large offsets change nothing."""

from __future__ import annotations

import pytest
import torch

from unilatent.maths.spread import Spread
from unilatent.maths.streams import generator


def spread_of(*batches: torch.Tensor, mask: torch.Tensor | None = None) -> Spread:
    spread = Spread(batches[0].shape[1], batches[0].shape[2])
    for batch in batches:
        spread.add(batch, mask)
    return spread


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator("spread"), dtype=torch.float64)


def test_std_is_that_of_the_variance_over_samples_and_rank_the_participation_ratio() -> None:
    z = normal(64, 4, 16) * torch.linspace(0.1, 2, 16)
    numbers = spread_of(z).numbers()
    assert float(numbers["latent_std"]) == pytest.approx(float(z.var(0).mean().sqrt()))
    assert float(numbers["latent_rms"]) == pytest.approx(float(z.square().mean().sqrt()))
    centred = z - z.mean(0)
    eigen = torch.linalg.eigvalsh(torch.einsum("bkd,bke->de", centred, centred))
    assert float(numbers["latent_rank"]) == pytest.approx(float(eigen.sum() ** 2 / eigen.square().sum()))


@pytest.mark.parametrize("directions", [1, 3, 8])
def test_rank_counts_directions(directions: int) -> None:
    """Equal spread along n orthogonal directions of 8 is rank n, whatever offset each latent position has."""
    basis = torch.linalg.qr(normal(8, 8)).Q[:directions]
    z = normal(20_000, 2, directions) @ basis + 5 * torch.arange(2)[:, None]
    assert float(spread_of(z).numbers()["latent_rank"]) == pytest.approx(directions, rel=0.01)


def test_identical_samples_have_no_spread_and_no_rank() -> None:
    z = normal(1, 4, 16).expand(32, -1, -1)
    numbers = spread_of(z).numbers()
    assert float(numbers["latent_std"]) < 1e-7 and float(numbers["latent_rank"]) == 0


def test_a_spread_far_below_the_size_is_not_lost_to_rounding() -> None:
    z = (normal(64, 4, 16) * 1e-5 + normal(1, 4, 16)).float()
    exact = z.double().var(0).mean().sqrt()
    assert float(spread_of(z).numbers()["latent_std"]) == pytest.approx(float(exact), rel=1e-3)


def test_cutting_into_batches_changes_nothing() -> None:
    z = normal(60, 4, 16)
    whole, parts = spread_of(z).numbers(), spread_of(*z.split([1, 30, 7, 22])).numbers()
    for key in whole:
        assert float(parts[key]) == pytest.approx(float(whole[key]), rel=1e-9)


def test_padding_is_invisible() -> None:
    z, mask = normal(40, 5, 8), torch.ones(40, 5, dtype=torch.bool)
    mask[:, 3:] = False
    padded = z.masked_fill(~mask[..., None], float("nan"))
    whole, parts = spread_of(z[:, :3]).numbers(), spread_of(padded, mask=mask).numbers()
    for key in whole:
        assert float(parts[key]) == pytest.approx(float(whole[key]), rel=1e-9)
