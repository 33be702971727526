"""Which sample comes when: a pure function of (seed, position), so a resumed run reads what an unbroken run reads.

A position is a global sample index: the place of a sample in the infinite sample sequence over all epochs. A sample
that cannot be used is replaced by another one, itself a function of (seed, position), and is reported together with
the batch that lacks it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .faults import reach
from .maths.streams import seed_of
from .modalities.base import BadSample, Dataset, Modality, Splits, Stream
from .plain_text import count_of
from .types import Batch, encode_texts, is_encoded

ATTEMPTS = 16
"""Number of samples tried for one position. If all of them are bad, this is a fault of the data set, not chance."""

Example = tuple[Any, dict[str, Any]]
"""An item of a Dataset: one sample and its condition values by argument."""


@dataclass(frozen=True)
class SkippedSample:
    """A sample that could not be used: its index in the data set, the position it was read for, and the reason."""

    index: int
    position: int
    message: str


ReadResult = tuple[Example | None, list[SkippedSample]]
"""The example used at a position (None if every attempt failed) and the samples skipped on the way."""


class WorkerError(RuntimeError):
    """A data worker died or hangs."""


def micro_batches(steps: range, batch_size: int, micro: int | None, rank: int = 0, world: int = 1) -> Iterator[range]:
    """Positions of each micro-batch of one process, step by step; together, all processes cover every position.

    A process takes every `world`-th position, so each lane of a Stream is read by as few processes as possible.
    """
    for step in steps:
        own_positions = range(step * batch_size + rank, (step + 1) * batch_size, world)
        size = micro or max(1, len(own_positions))
        for first in range(0, len(own_positions), size):
            yield own_positions[first : first + size]


@dataclass(frozen=True)
class Plan:
    """All micro-batches of one process. Can be iterated more than once, and pickled for workers."""

    steps: range
    batch_size: int
    micro: int | None = None
    rank: int = 0
    world: int = 1

    def __iter__(self) -> Iterator[range]:
        return micro_batches(self.steps, self.batch_size, self.micro, self.rank, self.world)


# ---- one position --------------------------------------------------------------------------------------------------


class _Keys:
    """Batch sampler of (index, position). Runs in the training process: the permutation of an epoch is large."""

    def __init__(self, dataset: Dataset, seed: int, batches: Iterable[range]):
        self.dataset, self.seed, self.batches = dataset, seed, batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for positions in self.batches:
            yield [(self.dataset.index_at(self.seed, position), position) for position in positions]


class _Views:
    """Map-style data set with (index, position) as keys."""

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: tuple[int, int]) -> ReadResult:
        """Read the sample; if it is bad, the first usable one of a sequence drawn from (seed, position, attempt)."""
        index, position = key
        reach("data.read", position)
        skipped: list[SkippedSample] = []
        for attempt in range(ATTEMPTS):
            try:
                return self.dataset.view(index, position), skipped
            except BadSample as error:
                skipped.append(SkippedSample(index, position, str(error)))
            index = seed_of("replacement", self.seed, position, attempt) % len(self.dataset)
        return None, skipped


class _Lane:
    """Reader of one lane of a Stream, starting at a place in it.

    A bad sample is replaced by the next usable one of its lane, which is also used at its own place: what is read
    stays a function of (seed, position), and later places do not move.
    """

    def __init__(self, stream: Stream, seed: int, lane: int, place: int):
        self.samples, self.place = stream.read(seed, lane, place), place
        self.ahead: deque[tuple[int, Example | BadSample]] = deque()

    def take(self, place: int, position: int) -> ReadResult:
        while self.place < place:
            if self.ahead:
                self.ahead.popleft()
            else:
                next(self.samples)
            self.place += 1
        skipped: list[SkippedSample] = []
        for attempt in range(ATTEMPTS):
            if attempt == len(self.ahead):
                index, load = next(self.samples)
                self.ahead.append((index, _load_or_error(load)))
            index, example = self.ahead[attempt]
            if not isinstance(example, BadSample):
                return example, skipped
            skipped.append(SkippedSample(index, position, str(example)))
        return None, skipped


def _load_or_error(load: Callable[[], Example]) -> Example | BadSample:
    try:
        return load()
    except BadSample as error:
        return error


class _StreamReader(IterableDataset[ReadResult]):
    """A stream's samples at consecutive positions; each of n workers reads every n-th."""

    def __init__(self, stream: Stream, seed: int, batches: Iterable[range]):
        self.stream, self.seed, self.batches = stream, seed, batches

    def __iter__(self) -> Iterator[ReadResult]:
        worker = get_worker_info()
        first, every = (worker.id, worker.num_workers) if worker else (0, 1)
        lanes: dict[int, _Lane] = {}
        for position in islice(chain.from_iterable(self.batches), first, None, every):
            reach("data.read", position)
            place, lane = divmod(position, self.stream.lanes)
            if lane not in lanes:
                lanes[lane] = _Lane(self.stream, self.seed, lane, place)
            yield lanes[lane].take(place, position)


# ---- batches -------------------------------------------------------------------------------------------------------


def loader(
    dataset: Dataset, modality: Modality, batches: Iterable[range], seed: int, workers: int = 0,
    pin_memory: bool = False, timeout: float = 0,
) -> Generator[tuple[Batch, list[SkippedSample]], None, None]:  # fmt: skip
    """Yield a shuffled data set's batches at those positions, prefetched by `workers` processes, and what was skipped.

    Close the generator (`contextlib.closing`) to end the workers: they ignore signals, and Python waits for them at
    exit. timeout: seconds without data after which a worker counts as hanging, which is an error; 0 waits forever.
    """
    collate_results = _Collate(modality)
    common: dict[str, Any] = {
        "num_workers": workers, "worker_init_fn": _init_worker if workers else None,
        "timeout": timeout if workers else 0,
    }  # fmt: skip
    if isinstance(dataset, Stream):
        largest = max(1, max(map(len, islice(batches, 64)), default=1))
        if workers:
            common["prefetch_factor"] = max(2, -(-2 * largest // workers))
        stream_reader, common["collate_fn"] = _StreamReader(dataset, seed, batches), _identity
        items = _iterate(DataLoader(stream_reader, batch_size=None, **common), timeout)
        collated = (collate_results(list(islice(items, len(positions)))) for positions in batches)
    else:
        data_loader: DataLoader[Any] = DataLoader(
            _Views(dataset, seed),  # type: ignore[arg-type]
            batch_sampler=_Keys(dataset, seed, batches),
            collate_fn=collate_results, pin_memory=pin_memory, **common,
        )  # fmt: skip
        items = collated = _iterate(data_loader, timeout)
    with contextlib.closing(items):
        for batch, skipped in collated:
            if batch is None:
                raise ValueError(
                    f"data.path: {ATTEMPTS} samples in a row cannot be used, the last is: {skipped[-1].message}. Was "
                    "the data moved, deleted or damaged (`unilatent data verify` names what is)? Restore it, then "
                    "--resume auto"
                )
            yield batch, skipped
            del batch  # not held while the next one is read


def _iterate(data_loader: DataLoader[Any], timeout: float) -> Generator[Any, None, None]:
    """Iterate over the loader, and end its workers when the generator is closed or fails.

    A DataLoader ends its workers when its iterator is deallocated. So nothing else may refer to the iterator here: not
    the loader (`persistent_workers` is off), nor the frames in the traceback of an error.
    """
    running = multiprocessing.active_children()
    iterator = iter(data_loader)
    workers = [process for process in multiprocessing.active_children() if process not in running]
    try:
        yield from iterator
    except BaseException as error:
        hangs = isinstance(error, RuntimeError) and "DataLoader timed out" in str(error)
        if hangs:
            _kill(workers)
        traceback.clear_frames(error.__traceback__)
        if not hangs:
            raise
        raise WorkerError(
            f"training.worker_timeout: a data worker gave nothing for {timeout:g} seconds; is the storage slow or "
            "unreachable? Raise it, or set training.workers=0 to see where it hangs, then --resume auto"
        ) from error
    finally:
        del iterator


def _kill(processes: Iterable[multiprocessing.process.BaseProcess]) -> None:
    """Kill workers without triggering torch's SIGCHLD handler, which would report their end as another error."""
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in processes:
        process.kill()
        process.join()
    signal.signal(signal.SIGCHLD, handler)


@contextlib.contextmanager
def worker_deaths() -> Iterator[None]:
    """Turn the death of a worker, which torch raises wherever the training process is, into a clear error."""
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if not text.startswith("DataLoader worker (pid"):
            raise
        raise WorkerError(
            f"training.workers: a data worker died ({text.rstrip('.')}). Often memory or /dev/shm is full: set fewer "
            "workers (0 reads in the training process and shows the cause), then --resume auto"
        ) from error


class _Collate:
    def __init__(self, modality: Modality):
        self.modality = modality

    def __call__(self, results: list[ReadResult]) -> tuple[Batch | None, list[SkippedSample]]:
        """Collate the examples; no batch, and one position's failed attempts, if a position has no usable sample."""
        examples = [example for example, _ in results if example is not None]
        if len(examples) < len(results):
            return None, next(skipped for example, skipped in results if example is None)
        return collate(examples, self.modality), [sample for _, skipped in results for sample in skipped]


def _identity(result: ReadResult) -> ReadResult:
    return result


def collate(examples: list[Example], modality: Modality) -> Batch:
    """Collate items of a Dataset to a Batch: text condition values become bytes, all others numbers."""
    values = {key: value_rows([value[key] for _, value in examples]) for key in examples[0][1]}
    samples = [data for data, _ in examples]
    if is_encoded(samples[0]):
        return Batch({key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}, values)
    return Batch(modality.collate(samples), values)


def value_rows(values: list[Any]) -> Tensor:
    """Stack the values of one condition, one per sample, into a tensor."""
    return encode_texts(values) if isinstance(values[0], str) else torch.as_tensor(values)


def _init_worker(_: int) -> None:
    """Ignore signals, which the training process handles, and use a single thread."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    torch.set_num_threads(1)


# ---- without a loader ----------------------------------------------------------------------------------------------


def load_all(
    dataset: Dataset, modality: Modality, limit: int | None = None, say: Callable[[str], object] | None = None
) -> Batch:
    """Load a data set as one batch, or `limit` of its samples: spread evenly over it, or the first ones of a stream.

    Samples that cannot be used are left out and reported to `say`; ValueError if none is left.
    """
    size = len(dataset) if limit is None or not isinstance(dataset, Stream) else dataset.size or limit
    count = size if limit is None else min(limit, size)
    if isinstance(dataset, Stream):
        results = [example for example, _ in _StreamReader(dataset, 0, [range(count)])]
        examples: list[Example | BadSample] = [example for example in results if example is not None]
    else:
        examples = [_load_or_error(lambda i=i: dataset[i * size // count]) for i in range(count)]  # type: ignore[misc]
    bad = [example for example in examples if isinstance(example, BadSample)]
    usable = [example for example in examples if not isinstance(example, BadSample)]
    if bad and say is not None:
        named = "; ".join(map(str, bad[:3])) + ("; ..." if len(bad) > 3 else "")
        say(f"left out {len(bad)} of {count_of(count, 'sample')} that cannot be used: {named}")
    if not usable:
        raise ValueError(
            f"data: none of {count_of(count, 'sample')} can be used, the first is: {bad[0] if bad else 'missing'}"
        )
    return collate(usable, modality)


class _Positions:
    """Map-style data set with (index, position) as keys, whose samples are not replaced."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> Example | BadSample:
        return _load_or_error(lambda: self.dataset.view(*key))


def read_views(
    dataset: Dataset, batches: Iterable[Sequence[tuple[int, int]]], workers: int = 0
) -> Generator[list[Example | BadSample], None, None]:
    """Yield `Dataset.view` of the (index, position) of each batch in turn, read by `workers` processes, two batches of
    each ahead; a sample that cannot be used is its BadSample. Close the generator to end the workers."""
    data_loader: DataLoader[Any] = DataLoader(
        _Positions(dataset), batch_sampler=batches, collate_fn=list, num_workers=workers,  # type: ignore[arg-type]
        worker_init_fn=_init_worker if workers else None,
    )  # fmt: skip
    yield from _iterate(data_loader, 0)


def try_samples(dataset: Dataset, seed: int, count: int, all_usable: bool = False) -> list[Example]:
    """Read the samples at a run's first `count` positions and return the usable ones.

    ValueError with the reason if none is usable, or, with `all_usable`, if one is not.
    """
    results: list[ReadResult]
    if isinstance(dataset, Stream):
        results = list(_StreamReader(dataset, seed, [range(count)]))
    else:
        results = [_Views(dataset, seed)[dataset.index_at(seed, position), position] for position in range(count)]
    faults = [skipped[0].message for example, skipped in results if skipped and (example is None or all_usable)]
    usable = [example for example, _ in results if example is not None]
    if faults and (all_usable or not usable):
        raise ValueError(faults[0])
    return usable


def spread_evenly(dataset: Dataset, rows: range, count: int) -> Iterator[tuple[Example, str | None]]:
    """Yield the examples numbered `rows` of `count` that are spread evenly over a data set, and None or a reason.

    Of a stream these are the first `count` samples. An example depends on its number alone. A sample that cannot be
    used is replaced by the next usable one, which comes with the reason. ValueError if 16 in a row cannot be used.
    """
    size = count if isinstance(dataset, Stream) else len(dataset)
    stream = iter(_StreamReader(dataset, 0, [rows])) if isinstance(dataset, Stream) else None
    for row in rows:
        example, skipped = (
            next(stream) if stream is not None else _next_usable(dataset, row * size // count, dataset.__getitem__)
        )
        if example is None:
            raise _none_usable(skipped)
        yield example, skipped[0].message if skipped else None


def shown_size(splits: Splits, most: int) -> int:
    """Return how many samples there are to be drawn, at most `most`."""
    data = splits.shown
    return min(most, (data.size or most) if isinstance(data, Stream) else len(data))


def shown_batch(splits: Splits, modality: Modality, rows: range, count: int) -> Batch:
    """Return samples `rows` (at least one) of the `count` that are drawn, spread evenly over `Splits.shown`."""
    return collate([example for example, _ in spread_evenly(splits.shown, rows, count)], modality)


def values_of(dataset: Dataset, indices: Iterable[int]) -> list[dict[str, Any]]:
    """Return the condition values of these samples; of a stream, indices count its first samples.

    Each sample is read once, and its values without its data where the data set supports that. Values that cannot be
    read are replaced as in `spread_evenly`.
    """
    requested = list(indices)
    if isinstance(dataset, Stream):
        count = max(requested, default=-1) + 1
        first_values = [example[1] for example, _ in spread_evenly(dataset, range(count), count)]
        return [first_values[index] for index in requested]
    values: dict[int, dict[str, Any]] = {}
    for index in dict.fromkeys(requested):
        values_at_index, skipped = _next_usable(dataset, index, dataset.values)
        if values_at_index is None:
            raise _none_usable(skipped)
        values[index] = values_at_index
    return [values[index] for index in requested]


def _next_usable(dataset: Dataset, index: int, get: Callable[[int], Any]) -> tuple[Any, list[SkippedSample]]:
    skipped: list[SkippedSample] = []
    for attempt in range(ATTEMPTS):
        candidate = (index + attempt) % len(dataset)
        try:
            return get(candidate), skipped
        except BadSample as error:
            skipped.append(SkippedSample(candidate, index, str(error)))
    return None, skipped


def _none_usable(skipped: list[SkippedSample]) -> ValueError:
    return ValueError(f"data: {ATTEMPTS} samples in a row cannot be used, the last is: {skipped[-1].message}")
