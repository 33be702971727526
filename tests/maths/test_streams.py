"""One random number stream per sample."""

from __future__ import annotations

import math

import pytest
import torch

from unilatent.maths.streams import Streams, generator, seed_of

KEYS = [("sample", 0, i) for i in range(6)]


@pytest.mark.parametrize("draw", ["normal", "uniform"])
@pytest.mark.parametrize("shape", [(), (1,), (5, 3), (40,)])
def test_a_stream_knows_nothing_of_its_batch_mates(draw: str, shape: tuple[int, ...]):
    """The same key gives the same numbers, in any batch and order."""
    together = getattr(Streams(KEYS), draw)(*shape)
    assert together.shape == (6, *shape) and together.dtype == torch.float32
    for order in ([3], [5, 3, 0], [0, 1, 2, 3]):
        assert torch.equal(getattr(Streams([KEYS[i] for i in order]), draw)(*shape), together[order])


def test_successive_draws_continue_each_stream():
    streams = Streams(KEYS)
    first, second = streams.uniform(2), streams.uniform(2)
    assert not torch.equal(first, second)
    again = Streams(KEYS[2:4])
    assert torch.equal(again.uniform(2), first[2:4]) and torch.equal(again.uniform(2), second[2:4])


def test_unlike_keys_give_unlike_streams():
    keys = [
        ("a", 0, 1),
        ("a", 1, 0),
        ("b", 0, 1),
        ("a", 0, "1"),
        ("a", 0),
        ("a01",),
        ("a", 0, 1, 0),
        ("a", 1),
        ("a", 10),
    ]
    assert len({seed_of(*key) for key in keys}) == len(keys)
    assert Streams(keys).normal(4).unique(dim=0).shape[0] == len(keys)
    assert all(0 <= seed_of("x", i) < 2**63 for i in range(200))


def test_a_seed_is_the_same_in_every_process_and_version():
    assert seed_of("sample", 0, 0) == 4_667_277_444_736_951_684


def test_moments_over_many_streams():
    """First numbers of neighbouring keys are as good as independent draws."""
    n = 4000
    normal = Streams(("train", 0, i) for i in range(n)).normal().double()
    uniform = Streams(("train", 0, i) for i in range(n)).uniform().double()
    assert abs(normal.mean()) < 4 / math.sqrt(n) and abs(normal.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs(uniform.mean() - 0.5) < 4 * math.sqrt(1 / 12 / n) and uniform.min() >= 0 and uniform.max() < 1
    correlation = (normal[:-1] * normal[1:]).mean()
    assert abs(correlation) < 4 / math.sqrt(n)


def test_generator_is_fresh_each_time():
    a, b = generator("k", 1), generator("k", 1)
    assert torch.equal(torch.rand(3, generator=a), torch.rand(3, generator=b))


def test_global_random_state_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    Streams(KEYS).normal(3)
    assert torch.equal(torch.get_rng_state(), before)


def test_stratified_times_know_nothing_of_batch_mates_and_leave_the_streams_alone():
    streams = Streams(KEYS)
    first, second = streams.stratified(), streams.stratified()
    assert first.shape == (6,) and not torch.equal(first, second)
    others = Streams([KEYS[4], ("sample", 1, 3), KEYS[0]])
    t = others.stratified()
    assert torch.equal(t[[0, 2]], first[[4, 0]]) and torch.equal(others.stratified()[[0, 2]], second[[4, 0]])
    assert t[1] != first[3], "another seed shifts them all"
    assert torch.equal(streams.normal(3), Streams(KEYS).normal(3))


def test_stratified_times_of_a_batch_are_more_even_than_chance():
    size, mean = 64, []
    for step in range(50):
        keys = [("train", 3, position) for position in range(step * size, (step + 1) * size)]
        mean.append(Streams(keys).stratified().double().mean())
    assert (torch.stack(mean) - 0.5).abs().max() < 0.02, "chance gives 0.036 as the standard deviation"
