"""Which sample comes when: a pure function of (seed, position), so a resumed run sees what an unbroken one sees.

A sample that cannot be used is replaced by one that is as much a function of (seed, position), and named beside the
batch it is missing from.
"""

from __future__ import annotations

import contextlib
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from ..faults import reach
from ..maths.streams import seed_of
from ..modalities.base import BadSample, Dataset, Modality, Stream
from ..types import Batch, encode_texts

ATTEMPTS = 16
"""How many samples are tried for one position; so many bad ones in a row are no chance."""

Sample = tuple[Any, dict[str, Any]]


@dataclass(frozen=True)
class Bad:
    """A sample that could not be used: its index in the data set, the position it was wanted at, and what is wrong."""

    index: int
    position: int
    message: str


Found = tuple[Sample | None, list[Bad]]
"""What is used at a position (None when every attempt failed), and what was not."""


class WorkerError(RuntimeError):
    """A process that reads data died or hangs."""


def micro_batches(steps: range, batch_size: int, micro: int | None, rank: int = 0, world: int = 1) -> Iterator[range]:
    """Positions of each micro-batch of one process, step by step; together they are every position of every step.

    A process takes every `world`-th position, so that data laid out in lanes is read by as few of them as possible.
    """
    for step in steps:
        own = range(step * batch_size + rank, (step + 1) * batch_size, world)
        size = micro or max(1, len(own))
        for first in range(0, len(own), size):
            yield own[first : first + size]


@dataclass(frozen=True)
class Plan:
    """All micro-batches of one process; starts over when it is iterated again, and travels to workers."""

    steps: range
    batch_size: int
    micro: int | None = None
    rank: int = 0
    world: int = 1

    def __iter__(self) -> Iterator[range]:
        return micro_batches(self.steps, self.batch_size, self.micro, self.rank, self.world)


# ---- one position --------------------------------------------------------------------------------------------------


class _Keys:
    """Batches of (index, position); made in the training process, as an epoch's order is long."""

    def __init__(self, dataset: Dataset, seed: int, batches: Iterable[range]):
        self.dataset, self.seed, self.batches = dataset, seed, batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for positions in self.batches:
            yield [(self.dataset.index_at(self.seed, position), position) for position in positions]


class _Views:
    """A data set whose keys are (index, position)."""

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: tuple[int, int]) -> Found:
        """That sample; for a bad one, the first usable of a row drawn from (seed, position, attempt)."""
        index, position = key
        reach("data.read", position)
        bad: list[Bad] = []
        for attempt in range(ATTEMPTS):
            try:
                return self.dataset.view(index, position), bad
            except BadSample as error:
                bad.append(Bad(index, position, str(error)))
            index = seed_of("replacement", self.seed, position, attempt) % len(self.dataset)
        return None, bad


class _Lane:
    """One lane of a stream, from a place on. A bad sample's place is taken by the next usable one of its lane, which
    is seen at its own place as well: that stays a function of (seed, position), and no later place moves."""

    def __init__(self, stream: Stream, seed: int, lane: int, place: int):
        self.samples, self.place = stream.read(seed, lane, place), place
        self.ahead: deque[tuple[int, Sample | BadSample]] = deque()

    def take(self, place: int, position: int) -> Found:
        while self.place < place:
            if self.ahead:
                self.ahead.popleft()
            else:
                next(self.samples)
            self.place += 1
        bad: list[Bad] = []
        for attempt in range(ATTEMPTS):
            if attempt == len(self.ahead):
                index, load = next(self.samples)
                self.ahead.append((index, _made(load)))
            index, sample = self.ahead[attempt]
            if not isinstance(sample, BadSample):
                return sample, bad
            bad.append(Bad(index, position, str(sample)))
        return None, bad


def _made(load: Callable[[], Sample]) -> Sample | BadSample:
    try:
        return load()
    except BadSample as error:
        return error


class _Row(IterableDataset[Found]):
    """A stream's samples at a row of positions; each of n workers makes every n-th."""

    def __init__(self, stream: Stream, seed: int, batches: Iterable[range]):
        self.stream, self.seed, self.batches = stream, seed, batches

    def __iter__(self) -> Iterator[Found]:
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
) -> Generator[tuple[Batch, list[Bad]], None, None]:  # fmt: skip
    """Batches of a shuffled data set at those positions, read ahead by `workers` processes, and what was replaced.

    Close it (`contextlib.closing`) to end the workers: they ignore signals, and a process that ends waits for them.
    timeout: seconds after which a worker that gives nothing is an error; 0 waits for ever.
    """
    gather = _Collate(modality)
    common: dict[str, Any] = {
        "num_workers": workers, "worker_init_fn": _quiet_worker if workers else None,
        "persistent_workers": bool(workers), "timeout": timeout if workers else 0,
    }  # fmt: skip
    if isinstance(dataset, Stream):
        largest = max(1, max(map(len, islice(batches, 64)), default=1))
        if workers:
            common["prefetch_factor"] = max(2, -(-2 * largest // workers))
        row, common["collate_fn"] = _Row(dataset, seed, batches), _as_it_is
        reader: DataLoader[Any] = DataLoader(row, batch_size=None, **common)
        answers = _answers(reader, timeout)
        found = (gather(list(islice(answers, len(positions)))) for positions in batches)
    else:
        reader = DataLoader(
            _Views(dataset, seed),  # type: ignore[arg-type]
            batch_sampler=_Keys(dataset, seed, batches),
            collate_fn=gather, pin_memory=pin_memory, **common,
        )  # fmt: skip
        answers = found = _answers(reader, timeout)
    with contextlib.closing(answers):
        for batch, bad in found:
            if batch is None:
                raise ValueError(
                    f"data.path: {ATTEMPTS} samples in a row cannot be used, the last is: {bad[-1].message}. Are the "
                    "data still where they were? Put them back, then --resume auto"
                )
            yield batch, bad


def _answers(reader: DataLoader[Any], timeout: float) -> Generator[Any, None, None]:
    """What the workers give. They are ended here and now when nobody wants more: left to the garbage collector they
    may outlive it, deaf to signals as they are."""
    answers = iter(reader)
    try:
        yield from answers
    except RuntimeError as error:
        if "DataLoader timed out" not in str(error):
            raise
        _kill(getattr(answers, "_workers", ()))
        raise WorkerError(
            f"training.worker_timeout: a data worker gave nothing for {timeout:g} seconds; is the storage slow or "
            "gone? Allow more, or set training.workers=0 to see where it hangs, then --resume auto"
        ) from error
    finally:
        if isinstance(answers, _MultiProcessingDataLoaderIter):
            answers._shutdown_workers()


def _kill(processes: Iterable[Any]) -> None:
    """Without torch's handler of SIGCHLD, which would report their end as another error."""
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in processes:
        process.kill()
        process.join()
    signal.signal(signal.SIGCHLD, handler)


@contextlib.contextmanager
def worker_deaths() -> Iterator[None]:
    """The death of a worker, which torch raises wherever the program happens to be, as one clear error."""
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

    def __call__(self, found: list[Found]) -> tuple[Batch | None, list[Bad]]:
        samples = [sample for sample, _ in found if sample is not None]
        bad = [each for _, some in found for each in some]
        if len(samples) < len(found):
            return None, next(some for sample, some in found if sample is None)
        return collate(samples, self.modality), bad


def _as_it_is(found: Found) -> Found:
    return found


def collate(samples: list[Sample], modality: Modality) -> Batch:
    """Items of a Dataset to a Batch: condition values that are texts become bytes, others numbers."""
    values = {key: value_rows([value[key] for _, value in samples]) for key in samples[0][1]}
    return Batch(modality.collate([data for data, _ in samples]), values)


def value_rows(values: list[Any]) -> Tensor:
    """Values of samples as one tensor."""
    return encode_texts(values) if isinstance(values[0], str) else torch.as_tensor(values)


def _quiet_worker(_: int) -> None:
    """Signals are the training process's to handle."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    torch.set_num_threads(1)


# ---- without a loader ----------------------------------------------------------------------------------------------


def whole(
    dataset: Dataset, modality: Modality, limit: int | None = None, say: Callable[[str], object] | None = None
) -> Batch:
    """A whole data set in one batch, or `limit` samples spread evenly over it; of a stream, its first ones.

    What cannot be used is left out, and named to `say`; ValueError when nothing is left.
    """
    size = len(dataset) if limit is None or not isinstance(dataset, Stream) else dataset.size or limit
    count = size if limit is None else min(limit, size)
    if isinstance(dataset, Stream):
        found = [sample for sample, _ in _Row(dataset, 0, [range(count)])]
        samples: list[Sample | BadSample] = [sample for sample in found if sample is not None]
    else:
        samples = [_made(lambda i=i: dataset[i * size // count]) for i in range(count)]  # type: ignore[misc]
    bad = [sample for sample in samples if isinstance(sample, BadSample)]
    good = [sample for sample in samples if not isinstance(sample, BadSample)]
    if bad and say is not None:
        named = "; ".join(map(str, bad[:3])) + ("; ..." if len(bad) > 3 else "")
        say(f"left out {len(bad)} of {count} samples that cannot be used: {named}")
    if not good:
        raise ValueError(f"data: none of {count} samples can be used, the first is: {bad[0] if bad else 'missing'}")
    return collate(good, modality)


def try_samples(dataset: Dataset, seed: int, count: int, all_usable: bool = False) -> list[Sample]:
    """Those of a run's first samples that can be used; ValueError with a fault if there are none, or (`all_usable`) if
    one cannot be used."""
    found: list[Found]
    if isinstance(dataset, Stream):
        found = list(_Row(dataset, seed, [range(count)]))
    else:
        found = [_Views(dataset, seed)[dataset.index_at(seed, position), position] for position in range(count)]
    bad = [some[0].message for sample, some in found if some and (sample is None or all_usable)]
    usable = [sample for sample, _ in found if sample is not None]
    if bad and (all_usable or not usable):
        raise ValueError(bad[0])
    return usable


def spread_evenly(dataset: Dataset, rows: range, count: int) -> Iterator[tuple[Sample, str | None]]:
    """Samples `rows` of `count` that lie evenly over a data set (of a stream: its first ones), each a function of its
    number alone.

    One that cannot be used gives its place to the next usable one, and comes with what was wrong with it (else None).
    ValueError where 16 in a row cannot be used.
    """
    size = count if isinstance(dataset, Stream) else len(dataset)
    stream = iter(_Row(dataset, 0, [rows])) if isinstance(dataset, Stream) else None
    for row in rows:
        sample, bad = (
            next(stream) if stream is not None else _next_usable(dataset, row * size // count, dataset.__getitem__)
        )
        if sample is None:
            raise ValueError(f"data: {ATTEMPTS} samples in a row cannot be used, the last is: {bad[-1].message}")
        yield sample, bad[0].message if bad else None


def values_of(dataset: Dataset, indices: Iterable[int]) -> list[dict[str, Any]]:
    """Condition values of those samples (of a stream: of its first ones), each read once, and without the sample where
    the data set can. Values that cannot be had are replaced as in `spread_evenly`."""
    wanted = list(indices)
    if isinstance(dataset, Stream):
        first = max(wanted, default=-1) + 1
        read = [sample[1] for sample, _ in spread_evenly(dataset, range(first), first)]
        return [read[index] for index in wanted]
    known: dict[int, dict[str, Any]] = {}
    for index in dict.fromkeys(wanted):
        found, bad = _next_usable(dataset, index, dataset.values)
        if found is None:
            raise ValueError(f"data: {ATTEMPTS} samples in a row cannot be used, the last is: {bad[-1].message}")
        known[index] = found
    return [known[index] for index in wanted]


def _next_usable(dataset: Dataset, index: int, get: Callable[[int], Any]) -> tuple[Any, list[Bad]]:
    bad: list[Bad] = []
    for attempt in range(ATTEMPTS):
        at = (index + attempt) % len(dataset)
        try:
            return get(at), bad
        except BadSample as error:
            bad.append(Bad(at, index, str(error)))
    return None, bad
