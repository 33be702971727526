"""The contract of every condition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from unilatent.conditions.base import Condition, Conditions
from unilatent.maths.guidance import classifier_free
from unilatent.registry import available, find
from unilatent.types import Conditioning

every_condition = pytest.mark.parametrize("name", available("conditions"))
D = 24


def small(name: str, **changes: Any) -> Conditions:
    torch.manual_seed(0)
    return Conditions({name: find("conditions", name).Config.small().model_copy(update=changes)}, D)


def alike(*conds: Conditioning) -> list[Conditioning]:
    """Padded to the same number of tokens, if they have tokens."""
    counts = [cond.tokens.shape[1] for cond in conds if cond.tokens is not None]
    assert len(counts) in (0, len(conds)), "null has another form"
    return [cond.padded(max(counts)) if counts else cond for cond in conds]


def parts(cond: Conditioning) -> list[Tensor]:
    return [part.detach() for part in (cond.vector, cond.tokens, cond.mask) if part is not None]


def close(a: Conditioning, b: Conditioning) -> bool:
    pairs = zip(parts(a), parts(b), strict=True)
    return all(x.shape == y.shape and torch.allclose(x.double(), y.double(), atol=1e-6) for x, y in pairs)


def holds_null_differs(condition: Condition, values: Tensor) -> None:
    given, null = alike(condition.embed(values), condition.null(len(values)))
    assert [part.shape for part in parts(given)] == [part.shape for part in parts(null)], "null has another form"
    for i in range(len(values)):
        rows = [any_row(cond, i) for cond in (given, null)]
        assert any(not torch.allclose(a, b) for a, b in zip(*rows, strict=True)), "null says the same as a value"


def any_row(cond: Conditioning, i: int) -> list[Tensor]:
    return [part[i].double() for part in parts(cond)]


@every_condition
def test_shapes_of_embed_null_and_example(name: str):
    conditions = small(name)
    condition = conditions[name]
    values = condition.example(5)
    assert len(values) == 5 and len(condition.describe(values)) == 5
    for cond in (condition.embed(values), condition.null(5)):
        assert len(cond) == 5 and cond.vector.shape == (5, D) and cond.vector.dtype == torch.float32
        assert cond.tokens is None or (cond.tokens.ndim == 3 and cond.tokens.shape[::2] == (5, D))
        assert cond.mask is None or (cond.tokens is not None and cond.mask.shape == cond.tokens.shape[:2])
    holds_null_differs(condition, values)


@every_condition
def test_rows_are_independent_and_values_matter(name: str):
    condition = small(name)[name]
    values = condition.example(6)
    whole = condition.embed(values)
    for i in range(6):
        assert close(condition.embed(values[i : i + 1]), Conditioning(*(
            None if part is None else part[i : i + 1] for part in (whole.vector, whole.tokens, whole.mask)
        )))  # fmt: skip
    differ = [any(not torch.equal(a, b) for a, b in zip(any_row(whole, 0), any_row(whole, i), strict=True))
              for i in range(1, 6) if not torch.equal(values[0], values[i])]  # fmt: skip
    assert differ and all(differ)


@every_condition
def test_what_is_parsed_can_be_embedded_and_captions_can_be_parsed(name: str):
    conditions = small(name)
    condition = conditions[name]
    values = condition.example(4)
    assert torch.equal(condition.parse(values), values)
    again = condition.parse(condition.describe(values))
    assert again.shape == values.shape and again.dtype == values.dtype
    assert len(condition.embed(again)) == 4


@every_condition
@pytest.mark.parametrize("nonsense", [[], {"no": "sense"}], ids=repr)
def test_nonsense_is_refused_by_its_keyword(name: str, nonsense: Any):
    condition = small(name)[name]
    with pytest.raises(ValueError, match=condition.argument):
        condition.parse(nonsense)


@every_condition
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.7, 1.0])
def test_dropout_rate_row_by_row(name: str, rate: float):
    n = 4000
    conditions = small(name, dropout=rate)
    values = {conditions[name].argument: conditions[name].example(n)}
    drop = torch.rand(n, 1, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out, null, whole = alike(conditions(values, drop), conditions.null(n), conditions(values))
    dropped = torch.stack([(a == b).flatten(1).all(1) for a, b in zip(parts(out), parts(null), strict=True)]).all(0)
    kept = torch.stack([(a == b).flatten(1).all(1) for a, b in zip(parts(out), parts(whole), strict=True)]).all(0)
    assert torch.equal(dropped, drop[:, 0] < rate) and torch.equal(kept, ~dropped)
    assert abs(dropped.double().mean() - rate) <= 4 * (rate * (1 - rate) / n) ** 0.5


@every_condition
def test_guidance_one_is_conditional_and_zero_unconditional(name: str):
    conditions = small(name)
    values = {conditions[name].argument: conditions[name].example(3)}
    cond, null = conditions(values), conditions.null(3)

    def denoise(z: Tensor, t: float, cond: Conditioning) -> Tensor:
        return cond.vector if cond.tokens is None else cond.vector + cond.tokens.sum(1)

    c, u = (denoise(torch.zeros(3, D), 0.5, x).detach() for x in (cond, null))
    assert not torch.allclose(c, u)
    for scale in (0.0, 1.0, 2.0):
        made = classifier_free(denoise, cond, null, scale)(torch.zeros(3, D), 0.5)
        torch.testing.assert_close(made.detach(), u + scale * (c - u), rtol=1e-5, atol=1e-6)


@every_condition
def test_where_and_cat(name: str):
    conditions = small(name)
    cond, null = alike(conditions[name].embed(conditions[name].example(4)), conditions[name].null(4))
    keep = torch.tensor([True, False, False, True])
    mixed, both = cond.where(keep, null), cond.cat(null)
    assert len(mixed) == 4 and len(both) == 8
    for i in range(4):
        assert all(
            torch.equal(a, b) for a, b in zip(any_row(mixed, i), any_row(cond if keep[i] else null, i), strict=True)
        )
        assert all(torch.equal(a, b) for a, b in zip(any_row(both, i), any_row(cond, i), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(any_row(both, 4 + i), any_row(null, i), strict=True))


@every_condition
def test_gradients_reach_the_condition_s_weights(name: str):
    conditions = small(name)
    if not [p for p in conditions.parameters() if p.requires_grad]:
        pytest.skip("a condition without trainable weights")
    sum(
        part.float().square().sum() for part in (conditions[name].embed(conditions[name].example(3)).vector,)
    ).backward()
    assert any(p.grad is not None and p.grad.any() for p in conditions.parameters())


@every_condition
def test_keywords(name: str):
    conditions = small(name)
    argument = conditions[name].argument
    assert conditions.arguments == [argument]
    short = conditions[name].example(2)
    cycled = conditions.parse(5, {argument: short})[argument]
    assert torch.equal(cycled, short[torch.arange(5) % 2])
    assert torch.equal(conditions.parse(5, {})[argument], conditions[name].example(5))
    assert torch.equal(conditions.parse(5, {argument: None})[argument], conditions[name].example(5))
    with pytest.raises(ValueError, match=f"colour: this model has no such condition; it takes {argument}"):
        conditions.parse(5, {"colour": 3})
    with pytest.raises(ValueError, match=f"values for {argument} are missing"):
        conditions({})


@every_condition
def test_negative_values_take_the_place_of_no_condition(name: str):
    conditions = small(name)
    argument = conditions[name].argument
    values = conditions.parse(4, {f"negative_{argument}": conditions[name].example(2)})
    assert set(values) == {argument, f"negative_{argument}"} and len(values[f"negative_{argument}"]) == 4
    wanted = conditions[name].embed(conditions[name].example(2)[torch.arange(4) % 2])
    assert close(conditions.null(4, values), wanted)
    plain = {argument: values[argument]}
    assert close(conditions(values), conditions(plain)) and close(conditions.null(4, plain), conditions.null(4))


def test_a_model_without_conditions():
    conditions = Conditions({}, D)
    null = conditions.null(3)
    assert torch.equal(null.vector, torch.zeros(3, D)) and null.tokens is None and conditions.arguments == []
    assert conditions.parse(3, {}) == {} and conditions.state_dict() == {}
    with pytest.raises(ValueError, match="unconditional"):
        conditions.parse(3, {"labels": 1})


class Whisper(Condition):
    """A minimal condition with a vector, tokens and a mask, like a text condition."""

    argument = "whispers"

    def __init__(self, dim: int, length: int):
        super().__init__(None, dim)
        self.length = length

    def embed(self, values: Tensor) -> Conditioning:
        tokens = values[:, None, None].float().expand(-1, self.length, self.dim)
        return Conditioning(
            values[:, None].float().expand(-1, self.dim), tokens, values[:, None] > torch.arange(self.length)
        )

    def null(self, n: int) -> Conditioning:
        return self.embed(torch.zeros(n))

    def parse(self, value: Any) -> Tensor:
        return torch.as_tensor(value)

    def example(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return torch.arange(1, n + 1)


def test_vectors_add_and_tokens_follow_each_other():
    conditions = small("class_label")
    conditions["whisper"], conditions["echo"] = Whisper(D, 2), Whisper(D, 3)
    conditions["echo"].argument = "echoes"
    values = conditions.example(4)
    cond = conditions(values)
    label = conditions["class_label"].embed(values["labels"]).vector
    torch.testing.assert_close(cond.vector, label + 2 * values["whispers"][:, None])
    assert cond.tokens is not None and cond.mask is not None
    assert cond.tokens.shape == (4, 5, D) and cond.mask.shape == (4, 5)
    assert cond.mask[0].tolist() == [True, False, True, False, False] and cond.mask[3].all()
    assert not conditions.null(4).mask.any()


def test_a_null_that_equals_a_value_is_noticed():
    class Mute(Whisper):
        def null(self, n: int) -> Conditioning:
            return self.embed(torch.ones(n))

    holds_null_differs(Whisper(D, 2), torch.arange(1, 4))
    with pytest.raises(AssertionError, match="null says the same"):
        holds_null_differs(Mute(D, 2), torch.arange(1, 4))


def test_only_text_is_looked_up_as_a_class_name():
    from unilatent.conditions.class_label import ClassLabel, ClassLabelConfig

    labels = ClassLabel(ClassLabelConfig(num_classes=3, class_names=("1", "10", "2")), 8)
    assert labels.parse(1).tolist() == labels.parse(torch.tensor([1])).tolist() == [1]
    assert (
        labels.parse("10").tolist() == [1] and labels.parse("1").tolist() == [0] and labels.parse("2").tolist() == [2]
    )
