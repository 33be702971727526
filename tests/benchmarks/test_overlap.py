"""The comparison of the two kinds of steps in benchmarks/overlap.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from overlap import Sums, Training, differences
from unilatent.processes import Processes

SMALL = ("method.generative_encoder.width=32", "method.generative_encoder.depth=2", "method.decoder.width=32",
         "method.decoder.depth=1", "method.decoder.mlp_width=64", "training.batch_size=4")  # fmt: skip


def both() -> tuple[Training, Training]:
    return Training(Processes.alone(), False, *SMALL), Training(Processes.alone(), True, *SMALL)


def test_like_steps_are_equal_and_each_is_on_another_batch() -> None:
    one, other = both()
    before = [p.clone() for p in one.state.model.parameters()]
    assert differences(one, other, 3) == (0, 0) and one.taken == 3
    assert any(not torch.equal(a, b) for a, b in zip(before, one.state.model.parameters(), strict=True))


def test_a_gradient_that_is_not_summed_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the gradients of the step, and in the losses of the next ones."""
    one, other = both()
    finish = Sums.finish

    def halved(self: Sums) -> None:
        if self is other.sums:
            for parameter in self.parameters[:3]:
                if parameter.grad is not None:
                    parameter.grad /= -2
        finish(self)

    monkeypatch.setattr(Sums, "finish", halved)
    loss, gradient = differences(one, other, 3)
    assert loss > 1e-6 and gradient == pytest.approx(1.5, rel=1e-3)
