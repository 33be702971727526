"""Linear regression with a quadratic penalty, in closed form, and how well it predicts what it was not fitted to."""

from __future__ import annotations

import torch
from torch import Tensor

PENALTIES = tuple(10.0**power for power in range(-4, 5))
"""Of standardised features, for each sample: the one with the least leave-one-out error is taken."""


def fitted_ridge(x: Tensor, y: Tensor, new: Tensor) -> Tensor:
    """Predictions (M, T) at `new` (M, F) of the ridge regression of y (N, T) on x (N, F), in float64.

    Features and targets are standardised by x and y; the penalty minimises the summed leave-one-out error, which is
    e_i / (1 - h_ii) with the hat matrix of ridge (and the mean) h.
    """
    x, y, new = x.double(), y.double(), new.double()
    centre, middle = x.mean(0), y.mean(0)
    width, spread = x.std(0, unbiased=False), y.std(0, unbiased=False)
    width = torch.where(width > 1e-9 * (1 + centre.abs()), width, torch.inf)  # a constant says nothing
    spread = torch.where(spread > 0, spread, 1.0)
    a, b = (x - centre) / width, (y - middle) / spread
    u, s, v = torch.linalg.svd(a, full_matrices=False)
    inside = u.T @ b
    best, chosen = float("inf"), torch.zeros(a.shape[1], b.shape[1], dtype=torch.float64)
    for penalty in PENALTIES:
        shrunk = s.square() / (s.square() + penalty * len(a))
        left = 1 - 1 / len(a) - (u.square() @ shrunk)  # 1 - h_ii
        error = float((((b - u @ (shrunk[:, None] * inside)) / left.clamp(min=1e-9)[:, None]).square()).sum())
        if error < best:
            factor = s / (s.square() + penalty * len(a))
            best, chosen = error, v.T @ (factor[:, None] * inside)
    return middle + spread * (((new - centre) / width) @ chosen)


def unseen_predictions(x: Tensor, y: Tensor, folds: int = 5) -> tuple[Tensor, Tensor]:
    """Of each sample, what is predicted by the regression on the other folds, and their mean of y; both (N, T).

    Sample i is in fold i mod `folds`.
    """
    fold = torch.arange(len(x)) % folds
    predicted, means = torch.zeros_like(y.double()), torch.zeros_like(y.double())
    for number in range(folds):
        out = fold == number
        predicted[out] = fitted_ridge(x[~out], y[~out], x[out])
        means[out] = y[~out].double().mean(0)
    return predicted, means


def explained(y: Tensor, predicted: Tensor, means: Tensor) -> float:
    """R^2 over all targets, 1 - sum (y - predicted)^2 / sum (y - means)^2: 0 says no more than a mean, 1 everything."""
    total = float((y.double() - means).square().sum())
    return 1 - float((y.double() - predicted).square().sum()) / total if total else 0.0
