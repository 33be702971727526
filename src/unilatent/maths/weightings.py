"""Loss weights w(t) that multiply |x - x_hat|^2, the squared error of the clean estimate."""

from __future__ import annotations

from torch import Tensor


def velocity(t: Tensor, min_time: float = 0.05) -> Tensor:
    """1 / max(t, min_time)^2: the linear path's velocity error (UNITE's flow loss, clamp as in the authors' code)."""
    return t.clamp(min=min_time) ** -2
