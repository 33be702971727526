"""Stored latents of every modality and tokenizer: what a generator is trained on in place of the data."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from building import batch_of, model_of, splits_of

from unilatent.batches import collate, loader
from unilatent.heartbeat import Heartbeat, local_counter
from unilatent.maths.streams import Streams
from unilatent.methods.base import LatentModel
from unilatent.modalities.base import BadSample, Dataset
from unilatent.processes import Processes, SharedItems
from unilatent.records import Records
from unilatent.registry import available, find
from unilatent.stored_latents import StoredLatents, encode_views, read_header
from unilatent.training.config import RunConfig
from unilatent.training.plan import example
from unilatent.types import Batch, is_encoded

GENERATORS = [name for name in available("methods") if find("methods", name).trains_on_latents]
B = 6

every_modality = pytest.mark.parametrize("modality", available("modalities"))
every_generator = pytest.mark.parametrize("method", GENERATORS)


class First(Dataset):
    """The first samples of a data set; those in `bad` cannot be used."""

    def __init__(self, data: Dataset, count: int, bad: tuple[int, ...] = ()):
        self.data, self.count, self.bad, self.facts = data, count, bad, data.facts

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Any, dict[str, Any]]:
        if index in self.bad:
            raise BadSample(f"sample {index}: torn")
        return self.data[index]

    @property
    def fingerprint(self) -> str:
        return f"first {self.count} of {self.data.fingerprint}"


@every_modality
@every_generator
def test_a_plan_counts_latents_of_the_shapes_that_are_stored(modality: str, method: str, tmp_path: Path) -> None:
    model = model_of(modality, method, awake=True).eval()
    samples = stored(model, First(splits_of(modality).train, B), tmp_path)
    batch = collate([samples[i] for i in range(B)], model.modality)
    run = {"data": model.modality.DataConfig.small().plain(), "training": {"steps": 1, "batch_size": B, "latents": "z"}}
    planned = example(RunConfig.parse({**model.config.plain(), **run}))
    for of_plan, read in ((planned.data, batch.data), (planned.values, batch.values)):
        assert of_plan.keys() == read.keys()
        for name, tensor in read.items():
            assert of_plan[name].dtype == tensor.dtype, name
            if name != "prompts":  # as long as the longest text
                assert of_plan[name].shape[1:] == tensor.shape[1:], name


class EveryOther(Processes):
    """A process that gets every other piece of work."""

    def shared(self, items: Sequence[Any], fixed: bool = False) -> SharedItems[Any]:
        return super().shared(items[1::2])


def stored(model: LatentModel, data: Dataset, folder: Path, **settings: Any) -> StoredLatents:
    encode_views(model, data, folder, **{"views": 1, "precision": "fp32", "shard_size": 4, **settings})
    return StoredLatents(folder, read_header(folder, data, model.modality, "fp32"), data)


def loss(model: LatentModel, batch: Batch) -> torch.Tensor:
    torch.manual_seed(0)  # dropout
    return torch.stack([part.value for part in model.loss(batch, Streams(("train", 0), range(B)))]).detach()


def test_there_is_a_method_that_trains_on_latents() -> None:
    assert GENERATORS


@every_modality
@every_generator
def test_the_loss_on_stored_latents_is_that_on_the_data_they_are_of(
    modality: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a tokenizer that draws no random numbers, up to rounding; with all conditions that the data has."""
    model = model_of(modality, method, awake=True).eval()
    data = First(splits_of(modality).train, B)
    monkeypatch.setattr(type(model.modality), "augment", lambda self, data, streams: data)
    samples = stored(model, data, tmp_path, batch_size=B, shard_size=B)
    batch = collate([samples.view(i, i) for i in range(B)], model.modality)
    of_data = batch_of(modality, B)
    assert is_encoded(batch.data) and not is_encoded(of_data.data)
    assert batch.values.keys() == of_data.values.keys()
    for name, values in of_data.values.items():
        assert batch.values[name].dtype == values.dtype
        torch.testing.assert_close(batch.values[name], values, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(loss(model, batch), loss(model, of_data), rtol=1e-6, atol=1e-7)
    shuffled = collate([samples.view((i + 1) % B, i) for i in range(B)], model.modality)
    assert not torch.allclose(loss(model, shuffled), loss(model, of_data), rtol=1e-4)


@every_modality
@every_generator
def test_views_are_pure_functions_of_sample_and_view(modality: str, method: str, tmp_path: Path) -> None:
    """Neither batch size, shards, processes nor bad samples beside them change a view; views differ."""
    model = model_of(modality, method, awake=True).eval()
    data = First(splits_of(modality).train, 7)
    whole = stored(model, data, tmp_path / "whole", views=2, batch_size=5, shard_size=4)
    torn = First(splits_of(modality).train, 7, bad=(2,))
    for processes in (EveryOther.alone(), None):
        encode_views(model, torn, tmp_path / "parts", views=2, precision="fp32", batch_size=3, shard_size=2,
                     processes=processes)  # fmt: skip
    parts = StoredLatents(tmp_path / "parts", read_header(tmp_path / "parts", torn, model.modality, "fp32"), torn)
    differ = False
    for i in (0, 1, 3, 4, 5, 6):
        views = []
        for epoch in range(3):
            (a, values), (b, others) = (latents.view(i, epoch * 7 + i) for latents in (whole, parts))
            assert a.keys() == b.keys() and str(values) == str(others)  # nan is not equal to itself
            for name in a:
                torch.testing.assert_close(a[name].float(), b[name].float(), rtol=1e-4, atol=1e-4)
            views.append(a["latents"].clone())
        assert torch.equal(views[0], views[2]), "epoch 2 reads view 0 again"
        differ |= not torch.equal(views[0], views[1])
    assert differ or model.modality.augmentation.get("flip") is False, "pixels that are not flipped have one view"
    with pytest.raises(BadSample, match="sample 2: torn"):
        parts.view(2, 0)


@every_generator
def test_others_do_not_wait_for_a_slow_process(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes, here threads: one stands still in its first shard until the other has encoded all the rest. The
    files are those of one process."""
    model, data = model_of("image", method).eval(), First(splits_of("image").train, 12)
    settings = {"views": 1, "precision": "fp32", "shard_size": 2, "batch_size": 1}
    encode_views(model, data, tmp_path / "alone", **settings)
    add, wrote = Records.add, Counter[int]()

    def noted(self: Records, rows: range, tensors: dict[str, torch.Tensor]) -> None:
        wrote[threading.get_ident()] += 1
        add(self, rows, tensors)

    monkeypatch.setattr(Records, "add", noted)
    beats = [Heartbeat(dist.HashStore(), 2, 60) for _ in range(2)]
    beats[1].store = beats[0].store
    slow, fast = Processes.alone(), Processes.alone()
    slow.heartbeat, fast.heartbeat = beats
    began, rest_is_done, done = threading.Event(), threading.Event(), list[int]()

    def stand_still(count: int) -> None:
        done.append(count)
        if count:
            began.set()
            assert rest_is_done.wait(60), "the other process left shards to this one"

    of_slow = {**settings, "processes": slow, "progress": stand_still}
    one = threading.Thread(target=encode_views, args=(model, data, tmp_path / "two"), kwargs=of_slow)
    one.start()
    assert began.wait(60)
    encode_views(model, data, tmp_path / "two", **settings, processes=fast)
    rest_is_done.set()
    one.join()
    assert sorted(wrote.values()) == [1, 5] and wrote[threading.get_ident()] == 5
    assert done == [0, 1, 11], "progress is that of all processes"
    names = {path.name for path in (tmp_path / "alone").iterdir()}
    assert len(names) == 7 and names == {path.name for path in (tmp_path / "two").iterdir()}
    for name in names:
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


@every_generator
def test_a_process_that_is_stopped_leaves_the_others_what_they_began(method: str, tmp_path: Path) -> None:
    """No process takes another shard; the next call encodes the rest."""
    model, data = model_of("image", method).eval(), First(splits_of("image").train, 12)
    settings = {"views": 1, "precision": "fp32", "shard_size": 2, "batch_size": 1}
    taken = SharedItems(range(6), local_counter(), local_counter())

    class Stopped(Processes):
        def shared(self, items: Sequence[Any], fixed: bool = False) -> SharedItems[Any]:
            return SharedItems(items, taken._taken, taken._done)

    def stop(count: int) -> None:
        if count:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_views(model, data, tmp_path, **settings, processes=Stopped.alone(), progress=stop)
    assert list(taken) == [], "the others find nothing to take"
    assert encode_views(model, data, tmp_path, **settings) == 0 and len(list(tmp_path.glob("rows_*"))) == 6


@every_generator
def test_a_stop_before_the_first_batch_leaves_the_others_nothing(method: str, tmp_path: Path) -> None:
    model, data = model_of("image", method).eval(), First(splits_of("image").train, 12)
    lists = list[SharedItems[Any]]()

    class Stopped(Processes):
        def shared(self, items: Sequence[Any], fixed: bool = False) -> SharedItems[Any]:
            lists.append(super().shared(items, fixed))
            return lists[0]

    def stop(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_views(model, data, tmp_path, views=1, precision="fp32", processes=Stopped.alone(), progress=stop)
    assert len(lists) == 1 and list(lists[0]) == [], "the others find nothing to take"


def test_the_folder_is_opened_before_a_process_gives_signs_of_life_by_itself(tmp_path: Path) -> None:
    """Else those that wait for a first process that is frozen would be alive for ever, and so wait for ever."""
    working = list[bool]()

    class Watched(Processes):
        def from_main(self, find: Callable[[], Any]) -> Any:
            assert not working
            return find()

        @contextmanager
        def working(self) -> Iterator[None]:
            working.append(True)
            yield
            working.pop()

    def encoded(count: int) -> None:
        assert working == [True]

    model, data = model_of("image", "unified_latents").eval(), First(splits_of("image").train, 4)
    encode_views(model, data, tmp_path, views=1, precision="fp32", processes=Watched.alone(), progress=encoded)
    assert not working


@every_generator
def test_a_bad_sample_is_replaced_as_it_is_without_stored_latents(method: str, tmp_path: Path) -> None:
    model, torn = model_of("image", method).eval(), First(splits_of("image").train, 7, bad=(2, 5))
    left_out: list[str] = []
    samples = stored(model, torn, tmp_path, views=2, skipped=left_out.append)
    assert left_out == ["sample 2: torn", "sample 5: torn"]
    plan = [range(0, 6), range(6, 12)]
    for (stored_batch, bad), (batch, as_bad) in zip(
        loader(samples, model.modality, plan, seed=1, workers=1),
        loader(torn, model.modality, plan, seed=1),
        strict=True,
    ):
        assert bad == as_bad and torch.equal(stored_batch.values["labels"], batch.values["labels"])


VALUES: list[dict[str, Any]] = [
    {"labels": 3, "prompts": "a small red circle", "properties": 0.1},
    {"labels": 0, "prompts": "", "properties": float("nan")},
    {"labels": 9, "prompts": "grün, 赤, \U0001f534 and more than before", "properties": -2.5e9},
]


class WithValues(First):
    """Samples with condition values of all types; each has another text in every epoch."""

    def view(self, index: int, position: int) -> tuple[Any, dict[str, Any]]:
        values = VALUES[index % 3]
        return self[index][0], {**values, "prompts": f"{values['prompts']} {position // len(self)}"}


@every_generator
def test_condition_values_come_back_as_they_were(method: str, tmp_path: Path) -> None:
    """Numbers and texts, of each view, in shards whose longest texts differ; the bad sample has none."""
    model, data = model_of("image", method).eval(), WithValues(splits_of("image").train, 6, bad=(1,))
    samples = stored(model, data, tmp_path, views=2, shard_size=2)
    plan = [range(0, 5), range(5, 9)]
    for (batch, _), (of_data, _) in zip(
        loader(samples, model.modality, plan, 0), loader(data, model.modality, plan, 0), strict=True
    ):
        assert batch.values.keys() == of_data.values.keys()
        for name, values in of_data.values.items():
            assert batch.values[name].dtype == values.dtype
            torch.testing.assert_close(batch.values[name], values, rtol=0, atol=0, equal_nan=True)


@every_generator
def test_a_process_maps_only_the_shards_that_it_reads(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = model_of("image", method).eval(), First(splits_of("image").train, 12)
    samples, mapped = stored(model, data, tmp_path, shard_size=2), []
    original = Records.tensors
    monkeypatch.setattr(Records, "tensors", lambda self, rows: mapped.append(rows) or original(self, rows))
    for index in (5, 4, 0, 5):
        samples.view(index, 0)
    assert mapped == [range(4, 6), range(0, 2)]


@every_generator
def test_latents_are_clean(method: str, tmp_path: Path) -> None:
    """Of a tokenizer whose `encode` adds noise for its decoder, none of that noise is stored."""
    tokenizers = [name for name in available("methods") if name not in GENERATORS]
    noisy = 0
    for name in tokenizers:
        model, batch = model_of("image", name, awake=True).eval(), batch_of("image", B)
        noise = model.encode(batch.data, seed=1) - model.encode(batch.data, seed=2)
        clean = [model.encode_clean(batch.data, Streams(("clean", seed), range(B))) for seed in (1, 2)]
        if float(noise.std()) < 0.05 or not torch.equal(*clean):
            continue
        noisy += 1
        samples = stored(model, First(splits_of("image").train, B), tmp_path / name)
        z = torch.stack([samples[i][0]["latents"] for i in range(B)])
        torch.testing.assert_close(z, clean[0], rtol=1e-5, atol=1e-5)
    assert noisy, "no tokenizer adds noise: this test shows nothing"


def test_two_views_of_a_mirrored_image_are_its_two_orientations() -> None:
    from unilatent.stored_latents import ViewStreams

    rows, views = [i // 2 for i in range(200)], [i % 2 for i in range(200)]
    numbers = ViewStreams(0, rows, views, 2, torch.device("cpu")).uniform()
    mirrored = (numbers < 0.5).view(100, 2)
    assert (mirrored.sum(1) == 1).all() and 30 < mirrored[:, 0].sum() < 70
    assert float(numbers.min()) >= 0 and float(numbers.max()) < 1
