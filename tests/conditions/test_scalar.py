"""A number as a condition: standardised; unknown numbers are no condition; samples follow the requested number."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor, nn

from unilatent.conditions.base import Conditions
from unilatent.conditions.scalar import Scalar, ScalarConfig
from unilatent.config import ConfigError
from unilatent.maths.guidance import classifier_free
from unilatent.types import Conditioning

FACTS = {"column": "gap", "mean": 7.0, "std": 2.0, "quantiles": (1.0, 5.0, 7.0, 9.0, 13.0)}
D = 16


def scalar(**fields: object) -> Scalar:
    torch.manual_seed(0)
    return Scalar(ScalarConfig.parse(fields).with_data(**FACTS), D)


def test_the_data_fill_in_what_is_not_set() -> None:
    found = ScalarConfig().with_data(**FACTS)
    assert (found.column, found.mean, found.std) == ("gap", 7.0, 2.0) and found.quantiles == FACTS["quantiles"]
    other = {"column": "gap", "mean": 0.0, "std": 9.0, "quantiles": (0.0,)}
    assert found.with_data(**other) == found, "a trained model keeps its units on other data"
    with pytest.raises(ValueError, match=r"set data\.property_column=mu"):
        ScalarConfig(column="mu").with_data(**FACTS)
    with pytest.raises(ValueError, match="is 3 for every training sample"):
        ScalarConfig().with_data(**{**FACTS, "mean": 3.0, "std": 0.0})
    with pytest.raises(ConfigError, match="give all of them or none"):
        ScalarConfig.parse({"mean": 1.0})
    with pytest.raises(ValueError, match=r"data\.property_column"):
        Scalar(ScalarConfig(), D)


def test_units_do_not_matter() -> None:
    """The same numbers in meV, or with an offset, give the same embeddings."""
    own = scalar()
    torch.manual_seed(0)
    moved = {**FACTS, "mean": 1000 * 7.0 - 50, "std": 2000.0}
    other = Scalar(ScalarConfig().with_data(**moved), D)
    values = torch.tensor([1.0, 6.5, 12.0])
    torch.testing.assert_close(own.embed(values).vector, other.embed(1000 * values - 50).vector)
    torch.testing.assert_close(own.standardised(values), torch.tensor([-3.0, -0.25, 2.5]))


def test_what_is_not_known_is_no_condition() -> None:
    """Exactly, row by row; its gradient is finite and reaches the null row only."""
    condition = scalar()
    values = torch.tensor([4.0, math.nan, 8.0])
    made, null = condition.embed(values), condition.null(1)
    assert torch.equal(made.vector[1], null.vector[0])
    torch.testing.assert_close(made.vector[[0, 2]], condition.embed(values[[0, 2]]).vector)
    made.vector[1].sum().backward()
    assert torch.equal(condition.null_row.grad, torch.ones(D))
    assert all(p.grad is None or not p.grad.any() for p in condition.embedding.parameters())
    assert condition.describe(values) == ["4", "", "8"]


def test_guidance_extrapolates_from_the_null_row() -> None:
    torch.manual_seed(0)
    conditions = Conditions({"scalar": ScalarConfig().with_data(**FACTS)}, D)
    values = {"properties": torch.tensor([3.0, math.nan])}
    cond, null = conditions(values), conditions.null(2)

    def denoise(z: Tensor, t: float, cond: Conditioning) -> Tensor:
        return cond.vector

    guided = classifier_free(denoise, cond, null, 3.0)(torch.zeros(2, D), 0.5)
    torch.testing.assert_close(guided, null.vector + 3 * (cond.vector - null.vector))
    assert torch.equal(guided[1], null.vector[1]), "nothing to be guided to"


def test_examples_follow_the_training_data_whatever_their_number() -> None:
    condition = scalar()
    many = condition.example(4000)
    assert torch.equal(condition.example(7), many[:7])
    for level, quantile in zip((0.25, 0.5, 0.75), FACTS["quantiles"][1:4], strict=True):
        assert float((many <= quantile).double().mean()) == pytest.approx(level, abs=0.002)
    assert many.min() >= 1 and many.max() <= 13


@pytest.mark.parametrize(
    ("given", "numbers"),
    [
        (5.2, [5.2]), ("5.2", [5.2]), ("-1.5e0", [-1.5]), ("4,5.5", [4, 5.5]), ([4, "6-8:3"], [4, 6, 7, 8]),
        ("-2--1:2", [-2, -1]), ("4.0-5.8", [4 + 0.2 * i for i in range(10)]), (torch.tensor([3.5]), [3.5]),
    ],
)  # fmt: skip
def test_what_users_write(given: object, numbers: list[float]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert scalar().parse(given).tolist() == pytest.approx(numbers)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("high", "neither a number, a range"), ("8-4", "write 4-8"), ("inf", "neither"), (math.inf, "infinite"),
        ("4-6:1", "range of 1"), (True, "neither"), ("", "neither"), ("4,", "neither"),
    ],
)  # fmt: skip
def test_what_is_refused(given: object, words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        scalar().parse(given)
    assert str(error.value).startswith("properties: ") and "\n" not in str(error.value)


def test_a_number_far_from_all_of_training_is_warned_of() -> None:
    condition = scalar()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        condition.parse([14.9, -0.9, math.nan])
    with pytest.warns(UserWarning, match=r"properties: 40 is far outside .* gap, 1 to 13"):
        assert condition.parse("40").tolist() == [40]


def test_samples_follow_the_number_that_is_asked_for() -> None:
    """A flow on one dimension, x ~ N(v^2, 0.2^2), some v unknown: the means of samples are those asked for, and without
    a number the mean of all."""
    generator = torch.Generator().manual_seed(0)
    v = torch.rand(4096, generator=generator) * 2 - 1
    x = v.square() + 0.2 * torch.randn(4096, generator=generator)
    given = torch.where(torch.rand(4096, generator=generator) < 0.2, math.nan, v)
    quantiles = tuple(torch.linspace(-1, 1, 5).tolist())
    torch.manual_seed(0)
    facts = {"column": "v", "mean": 0.0, "std": 3**-0.5, "quantiles": quantiles}
    condition = Scalar(ScalarConfig().with_data(**facts), 32)
    net = nn.Sequential(nn.Linear(34, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

    def velocity(z: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return net(torch.cat([z[:, None], t[:, None], cond.vector], 1))[:, 0]

    optimizer = torch.optim.Adam([*net.parameters(), *condition.parameters()], 3e-3)
    for _ in range(400):
        rows = torch.randint(0, 4096, (512,), generator=generator)
        eps, t = torch.randn(512, generator=generator), torch.rand(512, generator=generator)
        z = (1 - t) * x[rows] + t * eps
        loss = (velocity(z, t, condition.embed(given[rows])) - (eps - x[rows])).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    asked = [(0.0, 0.0), (-0.7, 0.49), (0.9, 0.81), (math.nan, 1 / 3)]
    with torch.no_grad():
        for number, mean in asked:
            z, cond = torch.randn(1000, generator=generator), condition.embed(torch.full((1000,), number))
            for step in range(20):
                z = z - velocity(z, torch.full((1000,), 1 - step / 20), cond) / 20
            assert float(z.mean()) == pytest.approx(mean, abs=0.08), number
