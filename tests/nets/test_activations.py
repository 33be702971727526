"""`record`: which modules a pattern names, and that nothing stays behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import unilatent


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.ReLU()) for _ in range(2))
        self.out = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def test_a_pattern_names_modules_by_the_end_of_their_name():
    tower = nn.ModuleDict({"a": Tower()})
    x = torch.randn(4, 3, requires_grad=True)
    with unilatent.record(tower, "blocks.*", "out") as found:
        tower["a"](x)
        tower["a"](2 * x)
    assert list(found) == ["a.blocks.0", "a.blocks.1", "a.out"]
    assert all(len(calls) == 2 and not calls[0].requires_grad for calls in found.values())
    assert torch.equal(found["a.blocks.0"][0], tower["a"].blocks[0](x).detach())
    tower["a"](x)
    assert len(found["a.out"]) == 2, "nothing is recorded after the context"
    with unilatent.record(tower, "*.0.*") as inner:
        tower["a"](x)
    assert list(inner) == ["a.blocks.0.0", "a.blocks.0.1"]


def test_hooks_are_removed_after_an_error_and_unknown_names_are_refused():
    tower = Tower()
    with pytest.raises(RuntimeError), unilatent.record(tower, "out"):
        raise RuntimeError
    assert not tower.out._forward_hooks
    unknown = r"'layers\.\*' is no module's name; there are blocks, blocks\.0"
    with pytest.raises(ValueError, match=unknown), unilatent.record(tower, "layers.*"):
        pass
    with pytest.raises(ValueError, match="no pattern"), unilatent.record(tower):
        pass


def test_modules_that_are_not_called_have_no_entry_and_near_names_are_suggested():
    tower = Tower()
    with unilatent.record(tower, "blocks.*", "out") as found:
        tower.blocks[0](torch.zeros(1, 3))
    assert list(found) == ["blocks.0"]
    with pytest.raises(ValueError, match=r"did you mean 'blocks\.\*'\?"), unilatent.record(tower, "block.*"):
        pass
    with pytest.raises(ValueError, match="'digits' is no module; give a model"):
        unilatent.record("digits", "blocks.*").__enter__()  # type: ignore[arg-type]
    other = nn.ModuleDict({"a": nn.Linear(1, 1)})
    with (
        pytest.raises(ValueError, match=r"'blocks\.\*' is no module's name; there"),
        unilatent.record(other, "blocks.*"),
    ):
        pass
