"""Random numbers as a function of key, row, draw and place."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch

from unilatent.maths import streams as module
from unilatent.maths.streams import (
    MASK,
    Streams,
    all_numbers,
    generator,
    normals,
    numbers_at,
    philox,
    round_keys,
    seed_of,
    uniforms,
)

KEY = ("sample", 0)


# ---- the generator ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((MASK,) * 4, (MASK,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)  # fmt: skip
def test_philox_gives_the_published_words(counter, key, words):
    """The known answers that the generator's authors distribute for Philox4x32-10."""
    got = philox(tuple(torch.tensor([word]) for word in counter), torch.tensor(round_keys(key[1] << 32 | key[0])))
    assert tuple(int(word) for word in got) == words


def test_uniform_numbers_are_the_upper_bits():
    words = tuple(torch.tensor([word]) for word in (0, MASK, 1 << 31, 255))
    assert uniforms(words).tolist() == [[0.0, 1 - 2.0**-24, 0.5, 0.0]]


def test_normal_numbers_are_box_and_mullers():
    """Radius and angle from two words; the smallest radius word gives the largest number, 6.66, not infinity."""
    words = tuple(torch.tensor([word]) for word in (0, 0, (1 << 31) - 1, 1 << 30))
    largest, radius = math.sqrt(2 * 32 * math.log(2)), math.sqrt(2 * math.log(2))
    torch.testing.assert_close(normals(words), torch.tensor([[largest, 0.0, 0.0, radius]]), rtol=1e-6, atol=1e-6)


# ---- what a number depends on ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", ["normal", "uniform"])
@pytest.mark.parametrize("shape", [(), (1,), (5, 3), (40,), (257, 33)])
def test_a_stream_knows_nothing_of_its_batch_mates(draw: str, shape: tuple[int, ...]):
    """The same row gets the same numbers, bit for bit, alone, among 7 and among 64, in any order."""
    together = getattr(Streams(KEY, range(64)), draw)(*shape)
    assert together.shape == (64, *shape) and together.dtype == torch.float32
    for order in ([3], [5, 3, 0, 63, 17, 1, 2], list(range(10, 50))):
        assert torch.equal(getattr(Streams(KEY, order), draw)(*shape), together[order])


@pytest.mark.parametrize("draw", ["normal", "uniform"])
def test_a_shorter_draw_is_the_beginning_of_a_longer_one(draw: str):
    """So padding changes no number."""
    longer = getattr(Streams(KEY, range(3)), draw)(11, 5)
    for tokens in (1, 2, 7, 10):
        assert torch.equal(getattr(Streams(KEY, range(3)), draw)(tokens, 5), longer[:, :tokens])


def test_chunks_change_nothing(monkeypatch):
    whole = Streams(KEY, range(9)).normal(100)
    for chunk in (64, 192):
        monkeypatch.setattr(module, "CHUNK", chunk)
        assert torch.equal(Streams(KEY, range(9)).normal(100), whole)


def test_threads_change_nothing():
    wide, before = 1 << 16, torch.get_num_threads()
    try:
        numbers = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            numbers.append(Streams(KEY, range(3)).normal(wide))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*numbers)


def test_successive_draws_are_other_numbers_whatever_was_drawn_before():
    streams = Streams(KEY, range(6))
    first, second = streams.uniform(2), streams.uniform(2)
    assert not torch.equal(first, second)
    again = Streams(KEY, [2, 3])
    again.normal(1000)
    assert torch.equal(again.uniform(2), second[2:4])


@pytest.mark.parametrize("row", [0, 1, MASK, MASK + 1, 2**40 + 7])
def test_rows_beyond_32_bits_are_rows_of_their_own(row: int):
    alike = Streams(KEY, [row, row & MASK, row + 1]).normal(8)
    assert torch.equal(alike[0], alike[1]) == (row <= MASK) and not torch.equal(alike[0], alike[2])


def test_empty_draws_have_their_shape():
    assert Streams(KEY, range(3)).uniform(0).shape == (3, 0) and Streams(KEY, []).normal(4).shape == (0, 4)


def test_unlike_keys_give_unlike_streams():
    keys = [("a", 0, 1), ("a", 1, 0), ("b", 0, 1), ("a", 0, "1"), ("a", 0), ("a01",), ("a", 0, 1, 0), ("a", 10)]
    assert len({seed_of(*key) for key in keys}) == len(keys)
    assert torch.cat([Streams(key, [1]).normal(4) for key in keys]).unique(dim=0).shape[0] == len(keys)
    assert all(0 <= seed_of("x", i) < 2**63 for i in range(200))


def test_numbers_are_the_same_in_every_process_and_version():
    assert seed_of("sample", 0, 0) == 4_667_277_444_736_951_684
    torch.testing.assert_close(
        Streams(KEY, [5]).normal(3),
        torch.tensor([[1.794119954109192, -1.6390553712844849, 1.4244509935379028]]),
        rtol=1e-6,
        atol=0,
        msg="models would draw other samples",
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_draws_the_same_numbers():
    for draw in ("uniform", "normal"):
        on_gpu, here = (getattr(Streams(KEY, range(7), device), draw)(999) for device in ("cuda", "cpu"))
        torch.testing.assert_close(on_gpu.cpu(), here, rtol=2e-7, atol=0)


def test_the_compiled_kernel_gives_the_same_numbers():
    """What CUDA runs, compiled here for the CPU: integers are equal, normal numbers up to their last bit."""
    compiled = torch.compile(numbers_at, dynamic=True, fullgraph=True)
    rows, keys = torch.tensor([4, 9, 2**33]), torch.tensor(round_keys(seed_of("train", 0)))
    for numbers, tolerance in ((uniforms, 0.0), (normals, 2e-7)):
        for draw in (2, 3):
            out, want = compiled(numbers, 0, 3 * 50, rows, 50, draw, keys), all_numbers(numbers, rows, 50, draw, keys)
            torch.testing.assert_close(out, want, rtol=tolerance, atol=0)


# ---- how random they are ---------------------------------------------------------------------------------------------

N = 1 << 17


def test_uniform_numbers_are_uniform():
    numbers = Streams(("train", 0), range(128)).uniform(N // 128).double().flatten()
    assert numbers.min() >= 0 and numbers.max() < 1
    for power in (1, 2, 3, 4):
        std = math.sqrt((1 / (2 * power + 1) - 1 / (power + 1) ** 2) / N)
        assert abs(numbers.pow(power).mean() - 1 / (power + 1)) < 4 * std
    assert scipy.stats.kstest(numbers.numpy(), "uniform").pvalue > 1e-3


def test_normal_numbers_are_normal():
    numbers = Streams(("train", 0), range(128)).normal(N // 128).double().flatten()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10_170)):
        assert abs(numbers.pow(power).mean() - moment) < 4 * math.sqrt(variance / N)
    assert scipy.stats.kstest(numbers.numpy(), "norm").pvalue > 1e-3
    assert numbers.abs().max() > 4, "one in 16,000 is"


@pytest.mark.parametrize("what", ["rows", "places", "draws", "seeds", "pairs"])
def test_neighbours_are_independent(what: str):
    """Correlations of numbers and of their squares between neighbouring rows, places, draws and seeds, and within the
    pairs of Box and Muller."""
    rows = Streams(("train", 0), range(256)).normal(N // 256)
    second = Streams(("train", 0), range(256))
    second.normal(1)
    a, b = {
        "rows": lambda: (rows[:-1], rows[1:]),
        "places": lambda: (rows[:, :-1], rows[:, 1:]),
        "draws": lambda: (rows, second.normal(N // 256)),
        "seeds": lambda: (rows, Streams(("train", 1), range(256)).normal(N // 256)),
        "pairs": lambda: (rows[:, ::2], rows[:, 1::2]),
    }[what]()
    for power in (1, 2):
        x, y = a.double().pow(power).flatten(), b.double().pow(power).flatten()
        assert abs(torch.corrcoef(torch.stack([x, y]))[0, 1]) < 4 / math.sqrt(len(x))
    table, _, _ = np_histogram(a, b)
    assert scipy.stats.chi2_contingency(table).pvalue > 1e-3


def np_histogram(a: torch.Tensor, b: torch.Tensor):
    """Counts of pairs in a table of 8 x 8 equally likely cells."""
    edges = [-math.inf, *scipy.stats.norm.ppf([i / 8 for i in range(1, 8)]), math.inf]
    import numpy as np

    return np.histogram2d(a.flatten().numpy(), b.flatten().numpy(), bins=[edges, edges])


def test_bits_of_neighbouring_counters_differ_in_half_of_the_places():
    """Avalanche: a counter that differs in one bit gives words that differ in 16 of 32 bits on average."""
    base = torch.arange(2000)
    for word in range(4):
        for bit in (0, 13, 31):
            counters = [torch.zeros_like(base) for _ in range(4)]
            counters[0] = base.clone()
            flipped = [c.clone() for c in counters]
            flipped[word] ^= 1 << bit
            first, other = (philox(tuple(c), torch.tensor(round_keys(12345))) for c in (counters, flipped))
            for x, y in zip(first, other, strict=True):
                flips = sum(((x ^ y) >> i & 1).double().mean() for i in range(32))
                assert abs(flips - 16) < 5 * math.sqrt(8 / 2000)


# ---- the rest --------------------------------------------------------------------------------------------------------


def test_generator_is_fresh_each_time():
    a, b = generator("k", 1), generator("k", 1)
    assert torch.equal(torch.rand(3, generator=a), torch.rand(3, generator=b))


def test_global_random_state_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    Streams(KEY, range(6)).normal(3)
    assert torch.equal(torch.get_rng_state(), before)


def test_stratified_times_know_nothing_of_batch_mates_and_leave_the_streams_alone():
    streams = Streams(KEY, range(6))
    first, second = streams.stratified(), streams.stratified()
    assert first.shape == (6,) and not torch.equal(first, second)
    others = Streams(KEY, [4, 0])
    assert torch.equal(others.stratified(), first[[4, 0]]) and torch.equal(others.stratified(), second[[4, 0]])
    assert Streams(("sample", 1), [3]).stratified() != first[3], "another seed shifts them all"
    assert torch.equal(streams.normal(3), Streams(KEY, range(6)).normal(3))


def test_stratified_times_of_a_batch_are_more_even_than_chance():
    size, mean = 64, []
    for step in range(50):
        mean.append(Streams(("train", 3), range(step * size, (step + 1) * size)).stratified().double().mean())
    assert (torch.stack(mean) - 0.5).abs().max() < 0.02, "chance gives 0.036 as the standard deviation"
