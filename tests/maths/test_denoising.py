"""The weighted error of a clean estimate, with and without padding."""

from __future__ import annotations

import pytest
import torch

from unilatent.maths.denoising import denoising_loss, masked_mean

STREAM = torch.Generator().manual_seed(0)
VALUES = torch.randn(3, 4, 5, generator=STREAM)
MASK = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]]).bool()


def test_masked_mean_is_the_mean_over_samples_of_what_is_real_in_each():
    means = torch.stack([VALUES[b][MASK[b]].mean() for b in range(3)])
    torch.testing.assert_close(masked_mean(VALUES, MASK), means.mean())
    scalars = torch.stack([VALUES[b, :, 0][MASK[b]].mean() for b in range(3)])
    torch.testing.assert_close(masked_mean(VALUES[..., 0], MASK), scalars.mean())
    torch.testing.assert_close(masked_mean(VALUES, None), VALUES.mean())
    torch.testing.assert_close(masked_mean(VALUES, torch.ones(3, 4).bool()), VALUES.mean())


def test_a_mask_of_one_row_that_stands_for_all_is_weighted_alike():
    torch.testing.assert_close(masked_mean(VALUES, MASK[2:].expand(3, 4)), VALUES[:, :2].mean())


def test_without_anything_real_the_mean_is_zero_not_nan():
    assert masked_mean(VALUES, torch.zeros(3, 4).bool()) == 0


def test_a_batch_cut_in_two_has_the_same_mean():
    """What makes accumulation and the number of processes invisible, with padding too."""
    halves = (2 * masked_mean(VALUES[:2], MASK[:2]) + masked_mean(VALUES[2:], MASK[2:])) / 3
    torch.testing.assert_close(masked_mean(VALUES, MASK), halves)


@pytest.mark.parametrize("mask", [None, MASK])
def test_denoising_loss_equals_an_explicit_loop(mask):
    clean, estimate = VALUES, torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))
    weight = torch.tensor([1.0, 4.0, 0.25])
    samples = []
    for b in range(3):
        terms = [
            weight[b] * (clean[b, n, c] - estimate[b, n, c]) ** 2
            for n in range(4) for c in range(5) if mask is None or mask[b, n]
        ]  # fmt: skip
        samples.append(torch.stack(terms).mean())
    torch.testing.assert_close(denoising_loss(clean, estimate, weight, mask), torch.stack(samples).mean())


def test_padding_changes_neither_value_nor_gradient():
    clean = VALUES.clone().requires_grad_()
    noise = 1e3 * torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(2)) * ~MASK[..., None]
    weight = torch.ones(3)
    plain = denoising_loss(clean, torch.zeros_like(clean), weight, MASK)
    assert torch.equal(plain, denoising_loss(clean + noise, torch.zeros_like(clean), weight, MASK))
    plain.backward()
    assert (clean.grad[~MASK] == 0).all() and (clean.grad[MASK] != 0).all()


def test_the_loss_is_float32_and_gradients_reach_both_sides():
    clean, estimate = VALUES.clone().requires_grad_(), VALUES.bfloat16().requires_grad_()
    loss = denoising_loss(clean, estimate * 2, torch.ones(3))
    assert loss.dtype == torch.float32
    loss.backward()
    assert clean.grad.abs().sum() > 0 and estimate.grad.abs().sum() > 0
