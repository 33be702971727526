"""How users name classes: names, numbers, ranges; classes that are called by numbers; the stored order of classes."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from unilatent.conditions.class_label import ClassLabel, ClassLabelConfig
from unilatent.model_config import follow

MONTHS = tuple(map(str, range(1, 13)))
FEW = ("1", "2", "3", "10", "11", "12")
OLD = tuple(sorted(MONTHS))
PADDED = tuple(f"{i:02d}" for i in range(12))
TWELVE = tuple(f"{i:02d}" for i in range(1, 13))
DIGITS = tuple(map(str, range(10)))
GAPS = ("0", "1", "2", "5")
WORDS = ("cat", "dog", "fox")
MIXED = ("10", "2", "cat", "dog-2", "3-4")
COMMAS = ("tench, Tinca tinca", "goldfish, Carassius auratus", "shark", "tench")


def condition(names: tuple[str, ...] | None, count: int | None = None) -> ClassLabel:
    return ClassLabel(ClassLabelConfig(num_classes=count or len(names or ()), class_names=names), 8)


def named(names: tuple[str, ...], value: Any) -> list[str]:
    """The names of the classes that a request gives, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return condition(names).describe(condition(names).parse(value))


@pytest.mark.parametrize("names", [MONTHS, FEW, OLD])
@pytest.mark.parametrize(
    ("given", "classes"),
    [
        ("2", "2"), (["2"], "2"), ("2,3", "2 3"), ("2-3", "2 3"), ("2-2", "2"), ("10-12", "10 11 12"), ("12", "12"),
        ("1-3,10", "1 2 3 10"), (["1", "10-11"], "1 10 11"), ("1-1,1", "1 1"),
    ],
)  # fmt: skip
def test_text_that_equals_a_class_name_is_that_class_in_ranges_too(names: tuple[str, ...], given: Any, classes: str):
    assert named(names, given) == classes.split()


@pytest.mark.parametrize(
    ("names", "given", "classes"),
    [
        (FEW, "1-12", ["1", "2", "3", "10", "11", "12"]),  # names that do not occur between them are left out
        (FEW, "3-10", ["3", "10"]),
        (MIXED, "2-10", ["2", "10"]),
        (MIXED, "3-4", ["3-4"]),
        (MIXED, "dog-2", ["dog-2"]),
        (MIXED, "4,cat", ["3-4", "cat"]),
        (PADDED, "02-05", ["02", "03", "04", "05"]),
        (PADDED, "1-3", ["01", "02", "03"]),
        (TWELVE, "1", ["01"]),
        (TWELVE, "1-3", ["01", "02", "03"]),
        (TWELVE, "001,012", ["01", "12"]),
        (MONTHS, "01-03", ["1", "2", "3"]),
        (GAPS, "0-3", ["0", "1", "2"]),
        (GAPS, "3-5", ["5"]),
        (GAPS, "5", ["5"]),
        ((*GAPS, "cat"), "0-3", ["0", "1", "2"]),
        (("0", "1", "cat", "dog"), "0-3", ["0", "1", "cat", "dog"]),  # each number is its index too
        (("0", "1", "cat", "dog"), "2-3", ["cat", "dog"]),
        (("01", "1", "2"), "1-2", ["1", "2"]),
        (("01", "1", "2"), "01-2", ["01", "1", "2"]),
        (MONTHS, "2 - 3", ["2", "3"]),
        (WORDS, "0 -1, fox", ["cat", "dog", "fox"]),
        (MIXED, "3 - 4", ["3-4"]),
        (DIGITS, "0-9", list(DIGITS)),
        (DIGITS, "3,7-8", ["3", "7", "8"]),
        (("cafe\u0301", "th\u00e9"), "caf\u00e9,the\u0301", ["cafe\u0301", "th\u00e9"]),
        (("a, cafe\u0301", "b"), "b,a, caf\u00e9", ["b", "a, cafe\u0301"]),
        (WORDS, "1", ["dog"]),
        (WORDS, "0-2", ["cat", "dog", "fox"]),
        (WORDS, "fox,0", ["fox", "cat"]),
        (WORDS, [2, "cat"], ["fox", "cat"]),
        (WORDS, range(3), ["cat", "dog", "fox"]),
        (WORDS, np.array([1, 1]), ["dog", "dog"]),
        (WORDS, torch.tensor([2]), ["fox"]),
        (COMMAS, "tench, Tinca tinca", ["tench, Tinca tinca"]),
        (COMMAS, "shark,tench, Tinca tinca,goldfish, Carassius auratus,tench", ["shark", *COMMAS[:2], "tench"]),
        (("0", "1", "2"), [2, "1", "0-1"], ["2", "1", "0", "1"]),
    ],
)
def test_one_rule_for_names_numbers_and_ranges(names: tuple[str, ...], given: Any, classes: list[str]):
    assert named(names, given) == classes


@pytest.mark.parametrize(
    ("names", "given", "words"),
    [
        (MONTHS, "0-3", "0-3: 3 is the name of a class and 0 is not; give two class names"),
        (MONTHS, "12-13", "12-13: 12 is the name of a class and 13 is not"),
        (MONTHS, "3-1", "3-1 runs backwards; write 1-3"),
        (MONTHS, "0-0", "0-0: no class is called 0; give two class names (1, 2"),
        (GAPS, "3-4", "3-4: no class is called 3 or 4; give two class names (0, 1, 2, 5)"),
        (GAPS, "0-7", "0-7: 0 is the name of a class and 7 is not; give two class names (0, 1, 2, 5)"),
        (("1", "2", "3", "cat"), "0-0", "no class is called 0"),
        (("1", "2", "3", "cat"), "0-3", "3 is the name of a class and 0 is not"),
        (MIXED, "0-1", "0-1: no class is called 0 or 1; give two class names (10, 2, cat, dog-2, 3-4)"),
        (("01", "001", "2"), "1", "1 may be '01' or '001'; write the name"),
        (WORDS, "2-0", "2-0 runs backwards; write 0-2"),
        (("0", "1", "2"), "0-12", "12 is out of range; this model has classes 0 to 2"),
        (WORDS, "3", "3 is out of range"),
        (WORDS, [-1], "-1 is out of range"),
        (WORDS, "cat-dog", "'cat-dog' is neither a class number, a range like 0-9 nor a class name; classes: cat, dog"),
        (WORDS, [], "empty"),
        (WORDS, [True], "'True' is neither"),
        (WORDS, "²", "'²' is neither"),
    ],
)
def test_what_is_no_class_is_named(names: tuple[str, ...], given: Any, words: str):
    with pytest.raises(ValueError, match="labels: ") as error:
        condition(names).parse(given)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("given", [3, [3], np.array([3])])
@pytest.mark.parametrize(("names", "three", "four"), [(MONTHS, "3", "4"), (TWELVE, "03", "04")])
def test_an_index_that_is_the_name_of_another_class_is_warned_of(
    given: Any, names: tuple[str, ...], three: str, four: str
):
    words = f"labels: 3 as a number means the fourth class, '{four}'; for class '{three}' pass the text '{three}'"
    with pytest.warns(UserWarning, match=words):
        assert condition(names).parse(given).tolist() == [3]


def test_indices_beyond_the_tenth_are_warned_of_by_their_place():
    with pytest.warns(UserWarning, match="11 as a number means class 12 in their order, '12'; for class '11'"):
        assert condition(MONTHS).parse(11).tolist() == [11]


@pytest.mark.parametrize("names", [MONTHS, TWELVE, ("1", "2", "3", "cat")])
def test_text_that_counts_to_a_class_of_another_number_is_warned_of(names: tuple[str, ...]):
    words = f"no class is called '0'; it counts classes from 0: the class called '{names[0]}'"
    with pytest.warns(UserWarning, match=words):
        assert condition(names).parse("0").tolist() == [0]


@pytest.mark.parametrize("names", [MONTHS, OLD, TWELVE, WORDS, MIXED, COMMAS, None])
def test_options_of_the_command_line_give_the_same_classes(names: tuple[str, ...] | None):
    labels = condition(names, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for given in (2, [2], [3, 0, 2], "2", ["2", 1]):
            if names == COMMAS and given == "2":
                continue
            option, text = labels.options(given)
            assert option == "--labels" and labels.parse(text).tolist() == labels.parse(given).tolist(), (given, text)


def test_numbers_without_names_count_classes():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert condition(None, 12).parse(["3", "10-11", 2]).tolist() == [3, 10, 11, 2]


# ---- the stored order ----------------------------------------------------------------------------------------------


class Data:
    """Data of twelve classes."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []

    def adopt(self, argument: str, stored: dict[str, Any]) -> None:
        self.asked.append((argument, stored["class_names"]))


def test_a_stored_order_of_the_same_classes_stays():
    new = ClassLabelConfig().with_data(class_names=MONTHS)
    assert new.keeping({"class_names": list(OLD)}).class_names == OLD
    assert new.keeping({"class_names": list(OLD[:-1])}) == new
    assert new.keeping({"class_names": None}) == new.keeping({}) == new
    kept = ClassLabelConfig(class_names=OLD)
    assert kept.with_data(class_names=OLD).class_names == OLD
    with pytest.raises(ValueError, match=r"conditions\.class_label\.class_names differ from the data's"):
        kept.with_data(class_names=MONTHS)


def test_both_parts_of_the_data_are_asked_to_follow():
    from unilatent.modalities.base import Splits

    splits = Splits(Data(), Data())  # type: ignore[arg-type]
    follow({"class_label": ClassLabelConfig(class_names=OLD)}, splits)
    assert splits.train.asked == splits.held_out.asked == [("labels", list(OLD))]  # type: ignore[attr-defined]
