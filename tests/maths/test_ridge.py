"""Ridge regression against its normal equations, and R^2 against what is known."""

from __future__ import annotations

import pytest
import torch

from unilatent.maths import ridge


def cloud(n: int, f: int) -> torch.Tensor:
    return torch.randn(n, f, generator=torch.Generator().manual_seed(n + f), dtype=torch.float64)


def test_the_normal_equations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ridge, "PENALTIES", (0.1,))
    x, y, new = cloud(30, 4) * 3 + 1, cloud(30, 2), cloud(5, 4)
    a, b = (x - x.mean(0)) / x.std(0, unbiased=False), (y - y.mean(0)) / y.std(0, unbiased=False)
    w = torch.linalg.solve(a.T @ a + 0.1 * 30 * torch.eye(4), a.T @ b)
    wanted = y.mean(0) + y.std(0, unbiased=False) * (((new - x.mean(0)) / x.std(0, unbiased=False)) @ w)
    torch.testing.assert_close(ridge.fitted_ridge(x, y, new), wanted)


def test_the_penalty_is_that_of_least_leave_one_out_error() -> None:
    """More features than samples, one of which tells: chosen by fitting without each sample in turn."""
    x = cloud(24, 60)
    y = x[:, :1] + 0.5 * cloud(24, 1)
    errors = []
    for penalty in ridge.PENALTIES:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ridge, "PENALTIES", (penalty,))
            left = [ridge.fitted_ridge(x[keep], y[keep], x[i : i + 1]) - y[i]
                    for i in range(24) if (keep := torch.arange(24) != i) is not None]  # fmt: skip
            errors.append(float(torch.cat(left).square().sum()))
            alone = ridge.fitted_ridge(x, y, cloud(7, 60))
        if torch.allclose(alone, ridge.fitted_ridge(x, y, cloud(7, 60))):
            chosen = len(errors) - 1
    assert errors[chosen] <= 1.2 * min(errors) and errors[chosen] < errors[0]


def test_what_is_linear_is_explained_and_noise_is_not() -> None:
    x = torch.cat([cloud(200, 5), torch.ones(200, 1, dtype=torch.float64)], 1)
    linear = x @ torch.tensor([[1.0], [-2.0], [0.5], [0.0], [3.0], [7.0]], dtype=torch.float64)
    for y, least, most in ((linear, 0.999, 1.0), (cloud(200, 1), -0.2, 0.1)):
        r2 = ridge.explained(y, *ridge.unseen_predictions(x, y))
        assert least <= r2 <= most


def test_no_sample_helps_to_predict_itself() -> None:
    x, y = cloud(50, 3), cloud(50, 1)
    before, _ = ridge.unseen_predictions(x, y)
    y[7] = 1e6
    after, _ = ridge.unseen_predictions(x, y)
    fold = torch.arange(50) % 5 == 7 % 5
    torch.testing.assert_close(before[fold], after[fold])
    assert not torch.allclose(before[~fold], after[~fold])
