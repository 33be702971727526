"""The search for a setting, on functions with a known solution."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from unilatent.analysis.calibration import Trial, search, shortened
from unilatent.presets import preset
from unilatent.training.config import Decay, Onset, ScheduleConfig


def trials_of(function: Callable[[float], float]) -> tuple[Callable[[float], Trial], list[float]]:
    asked: list[float] = []

    def measure(setting: float) -> Trial:
        asked.append(setting)
        return Trial(setting, function(setting), {})

    return measure, asked


@pytest.mark.parametrize("start", [0.1, 1.0, 3.0, 40.0])
def test_a_logarithmic_dial_is_found_from_either_side(start: float):
    """PSNR of about 10 + 4 log2(factor): 22 dB at a factor of 8."""
    measure, asked = trials_of(lambda x: 10 + 4 * math.log2(x) + 0.3 * math.sin(math.log2(x)))
    found = search(measure, start, 22.0, 0.05, logarithmic=True)
    assert found.within and found.monotone and abs(found.best.value - 22.0) <= 0.05
    assert found.best.setting == pytest.approx(8, rel=0.1)
    assert len(asked) <= 8 and asked[0] == pytest.approx(start) and len(found.trials) == len(asked)


@pytest.mark.parametrize("start", [-9.0, 0.0, 2.0, 12.0])
def test_a_linear_dial_may_be_negative_and_the_function_saturate(start: float):
    measure, _ = trials_of(lambda b: 30 / (1 + math.exp(-b)))
    found = search(measure, start, 20.0, 0.1, most=14)
    assert found.within and found.best.setting == pytest.approx(math.log(2), abs=0.05)


def test_nothing_more_is_trained_once_the_target_is_met():
    measure, asked = trials_of(lambda x: x)
    assert search(measure, 5.0, 5.2, 0.3).within and asked == [5.0]


def test_steps_between_two_settings_never_leave_them():
    """A step function, where linear interpolation misleads."""
    measure, asked = trials_of(lambda x: float(x > 3.21))
    found = search(measure, 2.0, 0.5, 0.1, most=12)
    assert not found.within and len(asked) == 12 and min(asked) >= 2 and max(asked) <= 5
    enclosing = [x for x in asked if x > 0]
    assert min(abs(x - 3.21) for x in enclosing) < 0.05


def test_a_target_out_of_reach_ends_with_the_nearest():
    measure, asked = trials_of(lambda x: 10 - 1 / x)
    found = search(measure, 1.0, 22.0, 0.1, logarithmic=True)
    assert not found.within and found.best.setting == max(asked) and max(asked) <= 256
    with pytest.raises(ValueError, match="must be positive"):
        search(measure, 0.0, 1.0, 0.1, logarithmic=True)


def test_noise_that_breaks_the_order_is_told():
    values = iter([5.0, 4.0, 9.0, 7.0])
    measure, _ = trials_of(lambda x: next(values))
    assert not search(measure, 1.0, 8.0, 0.1, most=4).monotone


@pytest.mark.parametrize("start", [2.0, 9.0])
@pytest.mark.parametrize(
    "function", [lambda x: 10 - x, lambda x: 5.0, lambda x: 5 - 1e-3 * x], ids=["falling", "flat", "slowly falling"]
)
def test_a_dial_that_does_not_work_is_given_up(function: Callable[[float], float], start: float):
    """The search stops after two more trials, not at the end of its reach, and chooses the start."""
    measure, asked = trials_of(function)
    found = search(measure, start, 20.0, 0.1)
    assert len(asked) == 3 and found.wrong_way and not found.within and found.best.setting == start
    measure, asked = trials_of(lambda x: x)
    assert not search(measure, 0.0, 12.0, 0.1).wrong_way


def test_whole_numbers_stay_whole_and_within_their_bounds():
    measure, asked = trials_of(lambda n: 10 + 3 * math.log2(n))
    found = search(measure, 4, 10 + 3 * math.log2(6), 0.1, logarithmic=True, whole=True)
    assert found.within and found.best.setting == 6 and all(type(n) is int for n in asked)
    for target, end in ((-99.0, 1), (99.0, 32)):
        measure, asked = trials_of(lambda n: float(n))
        found = search(measure, 4, target, 0.1, logarithmic=True, whole=True, low=1, high=32)
        assert not found.within and asked[-1] == end and len(set(asked)) == len(asked), asked


def test_every_integer_between_two_is_tried_before_giving_up():
    """A step function that misses the target: all integers between 4 and 8 are tried, none twice."""
    measure, asked = trials_of(lambda n: 0.0 if n < 7 else 10.0)
    found = search(measure, 4, 5.0, 0.1, logarithmic=True, whole=True, most=20)
    assert not found.within and sorted(asked) == [4, 6, 7, 8]


def test_a_stretched_schedule_moves_every_mark():
    schedule = ScheduleConfig(
        warmup=4, decays=(Decay(start=6, end=8, factor=0.5),), onsets={"a": Onset(start=2, end=4)}
    )
    half = schedule.stretched(0.5)
    assert (half.warmup, half.decays[0], half.onsets) == (
        2,
        Decay(start=3, end=4, factor=0.5),
        {"a": Onset(start=1, end=2)},
    )


def test_a_shorter_run_keeps_the_shape_of_its_schedule():
    run = preset("digits-ul").first
    assert run is not None
    short, whole = shortened(run, run.training.steps // 2), shortened(run, None)
    before, after = run.training.schedule, short.training.schedule
    assert after.warmup == before.warmup / 2 and after.decays[0].end == before.decays[0].end / 2
    assert short.training.steps == run.training.steps // 2 and whole.training.schedule == before
    for made in (short, whole):
        assert made.training.evaluate_samples == made.training.sample_every == 0
        assert made.method == run.method and type(made).parse(made.plain()) == made
