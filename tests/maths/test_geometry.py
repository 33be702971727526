"""Rotations, superposition and cells, against known results."""

from __future__ import annotations

import math

import pytest
import torch

from unilatent.maths.geometry import (
    cell_of,
    centre,
    in_first_axes,
    in_principal_axes,
    nearest_image,
    parameters_of,
    rmsd,
    rotation_of,
    superpose,
    to_cartesian,
    to_fractional,
    wrap,
)
from unilatent.maths.streams import generator


def normal(*shape: int, name: str = "geometry") -> torch.Tensor:
    return torch.randn(*shape, generator=generator(name), dtype=torch.float64)


def cells(n: int) -> torch.Tensor:
    """Parameters (n, 6) of valid cells."""
    lengths = 3 + 5 * torch.rand(n, 3, generator=generator("lengths"), dtype=torch.float64)
    angles = 70 + 40 * torch.rand(n, 3, generator=generator("angles"), dtype=torch.float64)
    return torch.cat([lengths, angles], 1)


def test_rotations_are_proper_and_uniform() -> None:
    """R R^T = 1, det R = 1; every entry has mean 0 and variance 1/3, and the angle's distribution is (1 - cos) / pi."""
    r = rotation_of(normal(40_000, 4))
    torch.testing.assert_close(r @ r.mT, torch.eye(3, dtype=r.dtype).expand_as(r))
    torch.testing.assert_close(torch.det(r), torch.ones(len(r), dtype=r.dtype))
    error = math.sqrt(1 / 3 / len(r))
    assert r.mean(0).abs().max() < 5 * error and (r.square().mean(0) - 1 / 3).abs().max() < 0.01
    angle = ((r.diagonal(dim1=-2, dim2=-1).sum(-1) - 1) / 2).clamp(-1, 1).acos()
    assert float(angle.mean()) == pytest.approx(math.pi / 2 + 2 / math.pi, abs=0.02)


def test_quaternions_of_one_sign_are_not_uniform() -> None:
    """Four uniform numbers in [0, 1), a common mistake, favour some directions; the test above would fail."""
    r = rotation_of(torch.rand(10_000, 4, generator=generator("corner"), dtype=torch.float64))
    assert r.mean(0).abs().max() > 0.2


def test_rotations_keep_distances() -> None:
    x, r = normal(5, 9, 3), rotation_of(normal(5, 4, name="q"))
    torch.testing.assert_close(torch.cdist(x @ r.mT, x @ r.mT), torch.cdist(x, x))


def test_superposition_undoes_a_rigid_motion_and_sees_only_what_counts() -> None:
    x, r = normal(6, 8, 3), rotation_of(normal(6, 4, name="q"))
    mask = torch.arange(8) < torch.tensor([[8], [7], [6], [5], [4], [4]])
    moved = x @ r.mT + normal(6, 1, 3, name="shift")
    junk = torch.where(mask[..., None], moved, 100 * normal(6, 8, 3, name="junk"))
    back = superpose(junk, x, mask)
    assert rmsd(back, x, mask).max() < 1e-12 and rmsd(moved, x, mask).min() > 0.1
    torch.testing.assert_close(centre(back, mask), centre(x, mask))


def test_principal_axes_do_not_depend_on_how_a_system_is_turned_and_keep_mirror_images_apart() -> None:
    x, r = normal(6, 8, 3), rotation_of(normal(6, 4, name="q"))
    mask = torch.arange(8) < torch.tensor([[8], [7], [6], [5], [4], [4]])
    one, two = in_principal_axes(x, mask), in_principal_axes(x @ r.mT + normal(6, 1, 3, name="shift"), mask)
    torch.testing.assert_close(one, two)
    real = one * mask[..., None]
    products = real.mT @ real  # the axes' spreads, in descending order, and nothing between axes
    spreads = products.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(products, torch.diag_embed(spreads), atol=1e-12, rtol=0)
    assert (spreads.diff() <= 0).all() and (real.pow(3).sum(1)[:, :2] >= 0).all()
    assert rmsd(superpose(one, x, mask), x, mask).max() < 1e-12, "a rotation only"
    mirror = in_principal_axes(x * torch.tensor([-1.0, 1.0, 1.0]), mask)
    torch.testing.assert_close(mirror * torch.tensor([1.0, 1.0, -1.0]), one)


def test_the_first_atoms_determine_the_axes() -> None:
    x, r = normal(6, 8, 3), rotation_of(normal(6, 4, name="q"))
    mask = torch.arange(8) < torch.tensor([[8], [7], [6], [5], [4], [3]])
    one, two = in_first_axes(x, mask), in_first_axes(x @ r.mT + normal(6, 1, 3, name="shift"), mask)
    torch.testing.assert_close(one, two)
    assert one[:, 0].abs().max() == 0 and one[:, 1, 1:].abs().max() < 1e-12 and one[:, 2, 2].abs().max() < 1e-12
    assert one[:, 1, 0].min() > 0 and one[:, 2, 1].min() > 0
    assert rmsd(superpose(one, x, mask), x, mask).max() < 1e-12, "a rotation only"
    mirror = in_first_axes(x * torch.tensor([-1.0, 1.0, 1.0]), mask)
    torch.testing.assert_close(mirror * torch.tensor([1.0, 1.0, -1.0]), one)


def test_atoms_on_a_line_wait_for_one_that_is_not() -> None:
    """As in C-C#N with a hydrogen at the end of the list; and one atom, or a line, has no plane."""
    line = torch.tensor([[0.0, 0, 0], [0, 0, 1.5], [0, 0, 2.7], [0, 0.9, -0.4]]).double()
    found = in_first_axes(line[None], torch.ones(1, 4, dtype=torch.bool))[0]
    torch.testing.assert_close(found[:, 0], torch.tensor([0, 1.5, 2.7, -0.4]).double(), atol=1e-8, rtol=0)
    torch.testing.assert_close(found[3, 1:], torch.tensor([0.9, 0]).double(), atol=1e-8, rtol=0)
    for atoms in (1, 2, 3):
        straight = in_first_axes(line[None, :atoms], torch.ones(1, atoms, dtype=torch.bool))[0]
        torch.testing.assert_close(straight.norm(dim=-1), line[:atoms].norm(dim=-1))


def test_superposition_takes_no_mirror_image() -> None:
    """A chiral set of points and its reflection cannot be superposed; a planar one can."""
    x = normal(4, 6, 3)
    mask = torch.ones(4, 6, dtype=torch.bool)
    mirror = x * torch.tensor([-1.0, 1.0, 1.0])
    best = rmsd(superpose(mirror, x, mask), x, mask)
    assert best.min() > 0.1
    others = torch.stack(
        [rmsd((mirror - centre(mirror, mask)) @ r + centre(x, mask), x, mask) for r in rotation_of(normal(2000, 4))]
    )
    assert (others.min(0).values >= best - 1e-9).all()
    flat = x * torch.tensor([1.0, 1.0, 0.0])
    assert rmsd(superpose(flat * torch.tensor([-1.0, 1.0, 1.0]), flat, mask), flat, mask).max() < 1e-9


def test_cells_and_parameters_are_each_other_s_inverse() -> None:
    parameters = cells(50)
    cell = cell_of(parameters)
    torch.testing.assert_close(parameters_of(cell), parameters)
    turned = cell @ rotation_of(normal(50, 4)).mT
    torch.testing.assert_close(parameters_of(turned), parameters)
    assert (torch.det(cell) > 0).all()


def test_the_cell_is_in_the_published_convention() -> None:
    """A hexagonal cell: c along z, a in the xz plane, volume a^2 c sqrt(3) / 2."""
    cell = cell_of(torch.tensor([3.0, 3.0, 5.0, 90.0, 90.0, 120.0], dtype=torch.float64))
    expected = torch.tensor([[3.0, 0, 0], [-1.5, 1.5 * math.sqrt(3), 0], [0, 0, 5.0]], dtype=torch.float64)
    torch.testing.assert_close(cell, expected, atol=1e-12, rtol=0)
    assert float(torch.det(cell)) == pytest.approx(45 * math.sqrt(3) / 2)


def test_fractional_and_cartesian_agree_after_a_shift_of_the_origin() -> None:
    """Distances between nearest images do not depend on the origin."""
    cell, f = cell_of(cells(7)), torch.rand(7, 5, 3, generator=generator("f"), dtype=torch.float64)
    shifted = wrap(f + torch.rand(7, 1, 3, generator=generator("u"), dtype=torch.float64))
    assert (shifted >= 0).all() and (shifted < 1).all() and not torch.allclose(shifted, f)
    torch.testing.assert_close(to_fractional(to_cartesian(shifted, cell), cell), shifted)

    def distances(x: torch.Tensor) -> torch.Tensor:
        difference = nearest_image(x[:, :, None] - x[:, None])
        return to_cartesian(difference.flatten(1, 2), cell).norm(dim=-1)

    torch.testing.assert_close(distances(shifted), distances(f))


def test_wrapping_stays_below_one_in_float32() -> None:
    tiny = torch.tensor([-1e-9, 0.0, 1.0, -1.0, 2.75, -0.25])
    torch.testing.assert_close(wrap(tiny), torch.tensor([0.0, 0.0, 0.0, 0.0, 0.75, 0.75]))
    assert (wrap(tiny) < 1).all()


def test_the_nearest_image_does_not_know_whole_cells() -> None:
    d = normal(40, 3)
    whole = torch.randint(-3, 4, (40, 3), generator=generator("whole"))
    torch.testing.assert_close(nearest_image(d + whole).abs(), nearest_image(d).abs())
    assert nearest_image(d).abs().max() <= 0.5
