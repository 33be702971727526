"""Molecules and crystals in one model: the label selects the kind, the layout shows it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from unilatent.config import ConfigError
from unilatent.maths.streams import Streams
from unilatent.modalities._atoms.dataset import SystemsDataset
from unilatent.modalities._atoms.systems import System, Systems
from unilatent.modalities.base import Splits
from unilatent.modalities.joint import Joint, JointConfig, JointData, JointDataset

CUBE = [4.0, 4.0, 4.0, 90.0, 90.0, 90.0]
PARTS = ({"name": "molecule", "max_atoms": 6}, {"name": "crystal", "max_atoms": 4})


def config(**fields: Any) -> JointConfig:
    return JointConfig.parse({"max_atoms": 6, "parts": PARTS, "elements": "found", **fields})


def splits() -> Splits:
    """Six molecules of 5 atoms, two crystals of 2."""
    free = Systems.of([System([6, 1, 1, 1, 1], torch.randn(5, 3).numpy(), name=f"m{i}") for i in range(6)])
    bound = Systems.of([System([11, 17], torch.rand(2, 3).numpy(), CUBE, f"c{i}") for i in range(2)])
    names = [part["name"] for part in PARTS]
    train = JointDataset([SystemsDataset(free, 6), SystemsDataset(bound, 4)], names, 6)
    held_out = JointDataset([SystemsDataset(free.take([0]), 6), SystemsDataset(bound.take([0]), 4)], names, 6)
    return Splits(train, held_out)


def fitted() -> Joint:
    return Joint(Joint(config()).fitted(splits()))


def keys(n: int) -> Streams:
    return Streams(("test",), range(n))


def test_elements_and_sizes_are_found_and_both_kinds_alternate() -> None:
    joint, train = fitted(), splits().train
    assert joint.config.elements == (1, 6, 11, 17)
    assert [part.sizes for part in joint.config.parts] == [(0, 0, 0, 0, 0, 6), (0, 0, 2)]
    labels = [train[i][1]["labels"] for i in range(len(train))]
    assert sorted(labels) == [0] * 6 + [1] * 2 and 1 in labels[:4] and 1 in labels[4:]
    assert train.facts["labels"]["class_names"] == ("molecule", "crystal")
    data = joint.collate([train[i][0] for i in range(len(train))])
    assert data["periodic"].tolist() == [label == 1 for label in labels]
    assert all(torch.equal(joint.check(data)[key], data[key]) for key in data)


def test_the_label_determines_the_kind_of_a_sample() -> None:
    joint = fitted()
    labels = torch.tensor([0, 1, 1, 0])
    mask = joint.sample_layout(keys(4), {"labels": labels}).mask
    assert mask[:, 0].tolist() == [False, True, True, False]  # the lattice
    assert mask[:, 1:].sum(1).tolist() == [5, 2, 2, 5]
    free = joint.sample_layout(keys(400)).mask
    assert float(free[:, 0].float().mean()) == pytest.approx(2 / 8, abs=0.08)
    assert free[:, 1:].sum(1)[free[:, 0]].unique().tolist() == [2]


def test_each_kind_has_its_own_augmentation_and_terms() -> None:
    joint, train = fitted(), splits().train
    data = joint.collate([train[i][0] for i in range(len(train))])
    augmented, bound = joint.augment(data, keys(8)), data["periodic"]
    assert not augmented["positions"][bound].any() and not augmented["fractional"][~bound].any()
    assert not torch.equal(augmented["positions"], data["positions"])
    assert not torch.equal(augmented["fractional"], data["fractional"])
    terms = joint.reconstruction_loss(joint.pack(augmented), augmented)
    assert terms.keys() == {"types", "positions", "fractional", "lengths", "angles"}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"parts": [PARTS[0], PARTS[0]]}, "one modality of molecules and one of crystals"),
        ({"parts": [PARTS[0], {"name": "image", "size": 8, "patch_size": 2}]}, "one modality of molecules"),
        ({"max_atoms": 5}, "max_atoms of a part is above"),
        ({"sizes": [0, 0]}, "not all 0"),
        ({"elements": [6, 1]}, "in ascending order"),
    ],
)
def test_parts_that_do_not_fit_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        config(**fields)
    assert "\n" not in str(error.value)


def test_data_are_those_of_the_parts() -> None:
    with pytest.raises(ConfigError, match=r"parts\.crystal\.nun: unknown field; did you mean 'num'"):
        JointData.parse({"parts": {"crystal": {"nun": 3}}})
    with pytest.raises(ValueError, match=r"^data\.parts: give the data of molecule and crystal"):
        Joint(config()).splits(JointData.parse({"parts": {"molecule": {"num": 300}}}))
