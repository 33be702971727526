"""The contract of every modality, and tests that each check fails if its promise is broken."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from building import HELD_OUT, apply, batch_of, modality_of, rows, same, splits_of, tensors

from unilatent.maths.streams import Streams
from unilatent.modalities.base import Dataset, Modality
from unilatent.registry import available, find
from unilatent.types import Layout, Tokens

every_modality = pytest.mark.parametrize("name", available("modalities"))
B = 6


def keys(n: int, start: int = 0) -> Streams:
    return Streams(("test",), range(start, start + n))


def noise(like: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))


# ---- the promises, as functions, so that they can be shown to fail ---------------------------------------------------


def holds_round_trip(modality: Modality, data: Any) -> None:
    back = modality.unpack(modality.pack(data))
    assert same(back, data, atol=1e-5), "unpack does not invert pack"


def holds_layout(modality: Modality, layout: Layout, n: int) -> None:
    b, tokens, axes = layout.positions.shape
    assert layout.positions.dtype == torch.float32 and axes == modality.axes and b in (1, n)
    assert 1 <= tokens <= modality.max_tokens
    if layout.mask is not None:
        assert layout.mask.dtype == torch.bool and layout.mask.shape == (n, tokens)
        assert layout.mask.any(1).all(), "a sample without tokens"


def total(modality: Modality, tokens: Tokens, data: Any) -> float:
    return sum(term.item() for term in modality.reconstruction_loss(tokens, data).values())


def holds_least_loss(modality: Modality, data: Any) -> None:
    truth = modality.ideal(data)
    assert same(modality.unpack(truth), data, atol=1e-5), "the ideal prediction is not the data"
    least = total(modality, truth, data)
    for scale in (0.03, 0.3, 3.0):
        for seed in range(3):
            moved = Tokens(truth.values + scale * noise(truth.values, seed), truth.layout)
            assert total(modality, moved, data) > least, f"moving tokens by {scale} does not raise the loss"


def holds_invisible_padding(modality: Modality, data: Any) -> None:
    """Values of padded tokens affect neither the loss, nor its gradient, nor the data."""
    truth = modality.pack(data)
    mask = truth.layout.mask
    if mask is None:
        return
    assert not mask.all(), "data for this test must need padding"
    values = (truth.values + 0.1 * noise(truth.values)).requires_grad_()
    other = torch.where(mask[..., None], values, 7 + 50 * noise(truth.values, 1))
    plain, changed = Tokens(values, truth.layout), Tokens(other, truth.layout)
    assert total(modality, plain, data) == pytest.approx(total(modality, changed, data), rel=1e-6)
    assert same(modality.unpack(plain), modality.unpack(changed), atol=1e-6), "padding shows in the data"
    sum(modality.reconstruction_loss(plain, data).values()).backward()
    assert values.grad is not None and not values.grad[~mask].any() and values.grad[mask].any()


def holds_own_stream(modality: Modality, data: Any, n: int) -> None:
    together = modality.augment(data, keys(n))
    for i in range(n):
        alone = modality.augment(rows(data, slice(i, i + 1)), keys(1, i))
        assert same(alone, rows(together, slice(i, i + 1))), "a view depends on batch mates"


# ---- every modality keeps them ---------------------------------------------------------------------------------------


@every_modality
def test_pack_and_unpack(name: str):
    modality, data = modality_of(name), batch_of(name, B).data
    tokens = modality.pack(data)
    assert tokens.values.dtype == torch.float32 and tokens.values.shape[0] == B
    assert tokens.values.shape[1:] == (tokens.layout.num_tokens, modality.channels)
    holds_layout(modality, tokens.layout, B)
    holds_round_trip(modality, data)


@every_modality
def test_tokens_have_a_scale_that_networks_bear(name: str):
    """The tokens themselves, and shifted and scaled as methods that add noise to them see them."""
    modality = modality_of(name)
    values = modality.pack(batch_of(name, B).data).values
    assert values.isfinite().all() and 0.05 < values.std() < 5
    noised = (values - modality.token_shift) / modality.token_scale
    assert abs(noised.mean()) < 0.75 and 0.5 < noised.square().mean().sqrt() < 1.5


@every_modality
def test_loss_is_least_at_the_truth(name: str):
    modality, data = modality_of(name), batch_of(name, B).data
    holds_least_loss(modality, data)
    terms = modality.reconstruction_loss(modality.ideal(data), data)
    assert terms and all(
        term.shape == () and term.isfinite() and term.dtype == torch.float32 for term in terms.values()
    )


@every_modality
def test_loss_passes_gradients_and_leaves_its_arguments_alone(name: str):
    modality, data = modality_of(name), batch_of(name, B).data
    truth = modality.pack(data)
    values = (truth.values + noise(truth.values)).requires_grad_()
    before = values.detach().clone()
    sum(modality.reconstruction_loss(Tokens(values, truth.layout), data).values()).backward()
    assert values.grad is not None and values.grad.isfinite().all() and values.grad.abs().sum() > 0
    assert torch.equal(values, before) and same(data, batch_of(name, B).data)


@every_modality
def test_padding_is_invisible(name: str):
    holds_invisible_padding(modality_of(name), batch_of(name, B).data)


@every_modality
def test_layouts_of_new_samples_come_from_their_own_streams(name: str):
    modality = modality_of(name)
    layout = modality.sample_layout(keys(B))
    holds_layout(modality, layout, B)
    again = modality.sample_layout(keys(B))
    assert torch.equal(layout.positions, again.positions)
    sizes = torch.full((B,), layout.num_tokens) if layout.mask is None else layout.mask.sum(1)
    for i in range(B):
        alone = modality.sample_layout(keys(1, i))
        own = alone.num_tokens if alone.mask is None else int(alone.mask.sum())
        assert own == sizes[i], "the size of a new sample depends on its batch mates"


@every_modality
def test_augmentation_is_each_sample_s_own(name: str):
    modality, data = modality_of(name), batch_of(name, B).data
    holds_own_stream(modality, data, B)
    view = modality.augment(data, keys(B))
    modality.check(view)
    assert same(view, modality.augment(data, keys(B))) and same(data, batch_of(name, B).data)


@every_modality
def test_finish_makes_valid_samples_and_changes_none_twice(name: str):
    modality, data = modality_of(name), batch_of(name, B).data
    truth = modality.pack(data)
    for scale in (0.1, 10.0):
        made = modality.finish(modality.unpack(Tokens(truth.values + scale * noise(truth.values), truth.layout)))
        modality.check(made)
        assert same(modality.finish(made), made, atol=1e-6)
    assert same(modality.finish(data), data, atol=1e-5), "a real sample is finished already"


@every_modality
@pytest.mark.parametrize(
    "nonsense",
    [None, 3, "image", [1, 2], {}, torch.zeros(2), torch.zeros(0), object()],
    ids=lambda value: type(value).__name__,
)
def test_nonsense_is_refused_in_one_line(name: str, nonsense: Any):
    with pytest.raises(ValueError) as caught:
        modality_of(name).check(nonsense)
    assert "\n" not in str(caught.value)


@every_modality
def test_values_that_are_not_numbers_are_refused_and_real_data_pass_unchanged(name: str):
    modality, data = modality_of(name), batch_of(name, B).data
    assert same(modality.check(data), data)
    broken = apply(data, lambda x: torch.full_like(x, float("nan")) if x.is_floating_point() else x)
    with pytest.raises(ValueError, match="NaN"):
        modality.check(broken)


@every_modality
def test_data_sets_are_functions_of_the_index(name: str):
    """In this process, and in a worker with a pickled copy."""
    splits = splits_of(name)
    assert len(splits.held_out) == HELD_OUT and len(splits.train) > 0
    for dataset in (splits.train, splits.held_out):
        assert isinstance(dataset, Dataset) and isinstance(dataset.facts, dict)
        copy = pickle.loads(pickle.dumps(dataset))
        for index in (0, len(dataset) - 1):
            sample, values = dataset[index]
            for other, again in (dataset[index], copy[index]):
                assert same(sample, other) and values == again
            assert dataset.facts.keys() <= values.keys()
        assert copy.fingerprint == dataset.fingerprint


@every_modality
def test_held_out_samples_are_not_trained_on_and_fingerprints_tell(name: str):
    splits = splits_of(name)
    modality = modality_of(name)
    config = modality.DataConfig.small().model_copy(update={"held_out": 0})
    everything = modality.splits(config)
    generated = getattr(config, "path", None) in getattr(
        config, "generated", ()
    )  # then held-out samples are others than the first ones
    assert len(everything.train) == len(splits.train) + (0 if generated else HELD_OUT)
    assert len(everything.held_out) == 0
    prints = {splits.train.fingerprint, splits.held_out.fingerprint, everything.train.fingerprint}
    assert len(prints) == 3
    assert modality.splits(config).train.fingerprint == everything.train.fingerprint


@every_modality
def test_drawing_and_writing_make_files_that_can_be_read_back(name: str, tmp_path):
    modality, data = modality_of(name), batch_of(name, B).data
    modality.draw_grid([data, data], tmp_path / "grid" / "grid.png")
    assert (tmp_path / "grid" / "grid.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    written = modality.write(data, tmp_path / "samples", start=3)
    assert len(set(written)) == B and all(path.is_file() and path.stat().st_size for path in written)
    batches = list(modality.read(tmp_path / "samples", batch_size=4))
    assert [len(names) for _, names in batches] == [4, 2]
    for part, _ in batches:
        modality.check(part)


@every_modality
def test_arrays_have_a_row_for_each_sample(name: str):
    arrays = modality_of(name).arrays(batch_of(name, B).data)
    assert arrays and all(len(array) == B for array in arrays.values())


@every_modality
def test_collating_keeps_each_sample(name: str):
    dataset, modality = splits_of(name).train, modality_of(name)
    data = modality.collate([dataset[i][0] for i in range(B)])
    for i in range(B):
        alone = modality.collate([dataset[i][0]])
        assert all(len(tensor) == 1 for tensor in tensors(alone))
        own = modality.unpack(modality.pack(alone))
        assert same(own, alone, atol=1e-5)
    modality.check(data)


@every_modality
def test_metrics_are_callable(name: str):
    assert all(callable(metric) for metric in modality_of(name).metrics())


# ---- provoked: each check fails where its promise is broken ----------------------------------------------------------


class Broken:
    """A modality with one method replaced."""

    def __init__(self, modality: Any, **verbs: Any):
        self.modality, self.verbs = modality, verbs

    def __getattr__(self, verb: str) -> Any:
        return self.verbs.get(verb) or getattr(self.modality, verb)


class Ragged:
    """A minimal modality with padding: values (B, N, 2) and mask (B, N)."""

    axes, channels, max_tokens = 1, 2, 4

    def pack(self, data: dict[str, torch.Tensor]) -> Tokens:
        return Tokens(data["values"], Layout(torch.arange(4.0)[None, :, None], data["mask"]))

    ideal = pack

    def unpack(self, tokens: Tokens) -> dict[str, torch.Tensor]:
        return {"values": tokens.values * tokens.layout.mask[..., None], "mask": tokens.layout.mask}

    def reconstruction_loss(self, prediction: Tokens, data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        error = (prediction.values - data["values"]).square()[data["mask"]]
        return {"squared": error.mean()}


def ragged_data() -> dict[str, torch.Tensor]:
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    return {"values": noise(torch.zeros(2, 4, 2)) * mask[..., None], "mask": mask}


def test_a_flipped_unpack_is_noticed():
    good, data = modality_of("image"), batch_of("image", B).data
    with pytest.raises(AssertionError, match="does not invert"):
        holds_round_trip(Broken(good, unpack=lambda tokens: good.unpack(tokens).flip(-1)), data)


def test_a_loss_with_its_minimum_elsewhere_is_noticed():
    good, data = modality_of("image"), batch_of("image", B).data
    shifted = Broken(
        good, reconstruction_loss=lambda p, d: {"l2": (p.values - good.pack(d).values - 1).square().mean()}
    )
    with pytest.raises(AssertionError, match="does not raise"):
        holds_least_loss(shifted, data)


def test_an_augmentation_that_mixes_samples_is_noticed():
    good, data = modality_of("image"), batch_of("image", B).data
    with pytest.raises(AssertionError, match="batch mates"):
        holds_own_stream(Broken(good, augment=lambda d, s: d - d.mean(0, keepdim=True)), data, B)


def test_padding_that_shows_is_noticed():
    good, data = Ragged(), ragged_data()
    holds_invisible_padding(good, data)
    holds_round_trip(good, data)
    holds_least_loss(good, data)
    careless = Broken(good, reconstruction_loss=lambda p, d: {"l2": (p.values - d["values"]).square().mean()})
    with pytest.raises(AssertionError):
        holds_invisible_padding(careless, data)
    with pytest.raises(AssertionError, match="shows in the data"):
        holds_invisible_padding(Broken(good, unpack=lambda tokens: {"values": tokens.values}), data)


def test_the_small_size_of_every_modality_is_its_own():
    for name in available("modalities"):
        assert find("modalities", name).Config.small().name == name
