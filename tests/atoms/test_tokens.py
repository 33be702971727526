"""Tokens of atoms, losses, sizes, augmentation, and systems as data sets."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hand_made import MOST, data_of, modality_of

from unilatent.maths.geometry import cell_of, nearest_image, to_cartesian
from unilatent.maths.streams import Streams
from unilatent.modalities._atoms.dataset import SystemsDataset
from unilatent.modalities._atoms.modality import draw_sizes
from unilatent.modalities._atoms.systems import System, Systems
from unilatent.modalities.base import BadSample, Splits
from unilatent.types import Tokens

kinds = pytest.mark.parametrize("kind", ["free", "bound", "both"])


def keys(n: int, start: int = 0) -> Streams:
    return Streams(("test",), range(start, start + n))


def loss(modality, prediction: Tokens, data) -> dict[str, float]:
    return {key: value.item() for key, value in modality.reconstruction_loss(prediction, data).items()}


@kinds
def test_unpack_inverts_pack_and_the_ideal_prediction_costs_nothing(kind: str) -> None:
    modality, data = modality_of(kind), data_of(kind)
    for tokens in (modality.pack(data), modality.ideal(data)):
        back = modality.unpack(tokens)
        assert back.keys() == data.keys()
        for key in data:
            torch.testing.assert_close(back[key], data[key], rtol=0, atol=1e-5)
    assert tokens.values.shape == (5, modality.max_tokens, modality.channels)
    assert sum(loss(modality, modality.ideal(data), data).values()) < 1e-9


@kinds
def test_a_smaller_vocabulary_loses_nothing_and_refuses_others(kind: str) -> None:
    data = data_of(kind)
    found = tuple(sorted(set(data["types"].flatten().tolist()) - {0}))
    modality = modality_of(kind, elements=found)
    assert modality.channels == modality_of(kind).channels - (100 - 1 - len(found))
    assert torch.equal(modality.unpack(modality.pack(data))["types"], data["types"])
    with pytest.raises(ValueError, match=r"modality\.elements"):
        modality_of(kind, elements=found[:-1]).check(data)


@kinds
def test_an_atom_of_class_0_becomes_hydrogen(kind: str) -> None:
    modality, data = modality_of(kind), data_of(kind)
    tokens = modality.pack(data)
    values = tokens.values.clone()
    values[..., 0] = 50.0
    types = modality.unpack(Tokens(values, tokens.layout))["types"]
    assert torch.equal(types, (data["types"] > 0).long())


def test_fractional_coordinates_wrap_in_the_loss_unless_they_are_not_to() -> None:
    data = data_of("bound")
    wrapped, plain = modality_of("bound"), modality_of("bound", frac_loss="plain")
    ideal = wrapped.ideal(data)
    width = wrapped.token_format.classes
    values = ideal.values.clone()
    values[:, 1:, width + 3 : width + 6] += torch.tensor([1.0, -1.0, 2.0])
    moved = Tokens(values, ideal.layout)
    assert loss(wrapped, moved, data)["fractional"] == pytest.approx(0, abs=1e-9)
    assert loss(plain, moved, data)["fractional"] == pytest.approx(10 * (1 + 1 + 4) / 3, rel=1e-4)


def test_losses_have_the_published_weights_and_units() -> None:
    """Errors of 0.05 nm in x after centring, 0.2 A / N^(1/3) in length and 0.1 rad in angle; uniform class scores."""
    data = data_of("both", 2)
    modality = modality_of("both")
    ideal, classes = modality.ideal(data), modality.token_format.classes
    values = ideal.values.clone()
    values[0, 1, classes] += 1.0  # a molecule of two atoms: each is off by half of it after centring
    values[0, 1:, classes + 2] += 7.0  # a shift of all atoms is no error
    values[1, 0, -6:] += torch.tensor([0.2, 0.2, 0.2, 0.1, 0.1, 0.1])
    found = loss(modality, Tokens(values, ideal.layout), data)
    assert found["positions"] == pytest.approx(10 * (0.05**2 / 3) / 2, rel=1e-4)  # over three axes, two samples
    assert found["lengths"] == pytest.approx(0.2**2 / 2, rel=1e-4)
    assert found["angles"] == pytest.approx(10 * 0.1**2 / 2, rel=1e-4)
    values[..., :classes] = 3.0
    assert loss(modality, Tokens(values, ideal.layout), data)["types"] == pytest.approx(math.log(100), rel=1e-5)


@kinds
def test_padding_slots_change_neither_loss_nor_data(kind: str) -> None:
    """The same systems with fewer padding slots, and with arbitrary values in them."""
    modality, data = modality_of(kind), data_of(kind, 4)
    short = {key: value[:, :6] if key in ("types", "positions", "fractional") else value for key, value in data.items()}
    wide, narrow = modality.pack(data), modality.pack(short)
    used = narrow.layout.num_tokens
    assert torch.equal(wide.values[:, :used], narrow.values) and not wide.layout.mask[:, used:].any()
    noise = torch.randn(wide.values.shape, generator=torch.Generator().manual_seed(0))
    a = Tokens(wide.values + noise * wide.layout.mask[..., None], wide.layout)
    b = Tokens(wide.values + noise * torch.where(wide.layout.mask[..., None], 1.0, 9.0), wide.layout)
    c = Tokens((narrow.values + noise[:, :used] * narrow.layout.mask[..., None]), narrow.layout)
    assert loss(modality, a, data) == loss(modality, b, data)
    assert loss(modality, a, data) == pytest.approx(loss(modality, c, short), rel=1e-6)
    for key, value in modality.unpack(b).items():
        assert torch.equal(value, modality.unpack(a)[key])


def test_every_sample_is_rotated_independently_and_keeps_its_distances() -> None:
    modality, data = modality_of("free"), data_of("free", 8)
    augmented = modality.augment(data, keys(8))
    real = (data["types"] > 0)[:, :, None] & (data["types"] > 0)[:, None, :]
    before, after = (torch.cdist(d["positions"].double(), d["positions"].double()) * real for d in (data, augmented))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    assert (augmented["positions"] - data["positions"]).abs().flatten(1).max(1).values.min() > 0.1
    assert torch.equal(augmented["types"], data["types"]) and torch.equal(
        modality.check(augmented)["positions"], augmented["positions"]
    )
    same = {key: value[:1].expand(8, *value.shape[1:]) for key, value in data.items()}
    turned = modality.augment(same, keys(8))["positions"]
    assert torch.cdist(turned.flatten(1), turned.flatten(1)).fill_diagonal_(9).min() > 1e-3, "all turned alike"
    alone = modality.augment({key: value[3:4] for key, value in data.items()}, keys(1, 3))
    assert torch.equal(alone["positions"][0], augmented["positions"][3])


def test_rotations_are_uniform() -> None:
    """Over many streams, an atom is uniform on its sphere: its mean is 0."""
    modality, n = modality_of("free"), 3000
    one = {key: value[3:4].expand(n, *value.shape[1:]) for key, value in data_of("free").items()}
    positions = modality.augment(one, keys(n))["positions"][:, 0]
    assert positions.mean(0).norm() < 5 * positions[0].norm() / math.sqrt(n)


def test_a_crystal_with_a_shifted_origin_is_the_same_crystal() -> None:
    modality, data = modality_of("bound"), data_of("bound", 6)
    augmented = modality.augment(data, keys(6))
    assert torch.equal(augmented["lattice"], data["lattice"])
    assert (augmented["fractional"] >= 0).all() and (augmented["fractional"] < 1).all()
    cell = cell_of(data["lattice"])

    def distances(f):
        return to_cartesian(nearest_image(f[:, :, None] - f[:, None]).flatten(1, 2), cell).norm(dim=-1)

    real = ((data["types"] > 0)[:, :, None] & (data["types"] > 0)[:, None, :]).flatten(1)
    gap = (distances(augmented["fractional"]) - distances(data["fractional"])) * real
    assert gap.abs().max() < 1e-4
    first = nearest_image(augmented["fractional"][:, 0] - data["fractional"][:, 0])
    assert torch.cdist(first, first).fill_diagonal_(9).min() > 1e-3, "all shifted alike"
    tokens, width = modality.pack(augmented), modality.token_format.classes
    positions = to_cartesian(augmented["fractional"], cell)
    between = tokens.values[:, 1, width : width + 3] - tokens.values[:, 2, width : width + 3]
    torch.testing.assert_close(between, positions[:, 0] - positions[:, 1], rtol=0, atol=1e-5)


def test_sizes_of_samples_follow_those_of_training() -> None:
    modality = modality_of("free", sizes=(0, 0, 1, 0, 3))
    mask = modality.sample_layout(keys(2000)).mask
    assert mask.shape == (2000, MOST)
    counts = mask.sum(1).bincount(minlength=5)
    assert counts[2] + counts[4] == 2000 and counts[4] / 2000 == pytest.approx(0.75, abs=0.04)
    assert draw_sizes(torch.tensor([0.0, 0.2499, 0.25, 0.9999999]), (0, 0, 1, 0, 3), MOST).tolist() == [2, 2, 4, 4]
    assert modality_of("free").sample_layout(keys(500)).mask.sum(1).unique().tolist() == list(range(1, MOST + 1))


@kinds
def test_layouts_follow_from_their_masks(kind: str) -> None:
    modality = modality_of(kind)
    layout = modality.pack(data_of(kind)).layout
    again = modality.layout_of(layout.mask)
    assert torch.equal(again.mask, layout.mask) and torch.equal(again.positions, layout.positions)
    for wrong in (layout.mask & False, layout.mask.flip(1)):
        with pytest.raises(ValueError, match=r"^latents: expected"):
            modality.layout_of(wrong)


@kinds
def test_shorter_data_are_padded_centred_and_wrapped(kind: str) -> None:
    modality, data = modality_of(kind), data_of(kind, 4)
    short = {key: value[:, :5] if key in ("types", "positions", "fractional") else value for key, value in data.items()}
    for key, value in modality.check(short).items():
        torch.testing.assert_close(value, data[key], rtol=0, atol=1e-5)
    if kind == "free":
        moved = dict(data, positions=data["positions"] + 4.0)
        torch.testing.assert_close(modality.check(moved)["positions"], data["positions"], rtol=0, atol=1e-5)


def systems() -> Systems:
    return Systems.of([
        System(types=[6, 1], coordinates=[[0, 0, 1.0], [0, 0, 2.0]], name="CH", columns={"kind": 2}),
        System(types=[8], coordinates=[[5.0, 0, 0]], name="O", columns={"kind": 7}),
        System(types=[26] * 12, coordinates=torch.randn(12, 3).numpy(), name="large", columns={"kind": 2}),
    ])  # fmt: skip


def test_systems_become_padded_samples_with_labels() -> None:
    modality = modality_of("free", elements=(1, 6, 8))
    splits = modality.datasets(systems(), systems().take([]), "kind")
    data, values = splits.train[0]
    assert data["types"].tolist() == [6, 1, *[0] * (MOST - 2)] and values == {"labels": 0}
    torch.testing.assert_close(data["positions"][:3], torch.tensor([[0, 0, -0.5], [0, 0, 0.5], [0, 0, 0]]))
    assert splits.train.facts == {"labels": {"class_names": ("2", "7")}} and splits.train[1][1] == {"labels": 1}
    with pytest.raises(BadSample, match=r"large: 12 atoms, but modality\.max_atoms is 9"):
        splits.train[2]
    with pytest.raises(BadSample, match="CH: atomic number 6"):
        modality_of("free", elements=(1,)).datasets(systems(), systems().take([]), None).train[0]
    with pytest.raises(ValueError, match=r"data.label_column: 'no' is not .* columns: kind"):
        modality.datasets(systems(), systems(), "no")


def test_sizes_and_elements_are_found_in_the_data() -> None:
    modality = modality_of("free", elements="found")
    train, other = systems().take([0, 1]), systems().take([2])
    found = modality.fitted(Splits(SystemsDataset(train, MOST), SystemsDataset(other, MOST)))
    assert found.sizes == (0, 1, 1) and found.elements == (1, 6, 8, 26)
    given = modality_of("free", sizes=(0, 5))
    assert given.fitted(Splits(SystemsDataset(train, MOST), SystemsDataset(other, MOST))) == given.config
    assert type(found).parse(found.plain()) == found


def test_the_fingerprint_depends_on_all_that_is_read() -> None:
    one = SystemsDataset(systems(), MOST)
    moved = replace(systems(), coordinates=systems().coordinates + 1)
    again = SystemsDataset(systems().take([0, 1]), MOST)
    prints = {
        d.fingerprint for d in (again, SystemsDataset(moved.take([0, 1]), MOST), SystemsDataset(again.systems, 7))
    }
    assert len(prints) == 3 and one.fingerprint != again.fingerprint
    assert again.fingerprint == SystemsDataset(systems().take([0, 1]), MOST).fingerprint
