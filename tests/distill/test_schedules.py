"""Laws of the schedules, with hand-computed values."""

import pytest

from distill.schedules import SCHEDULES, Schedule


@pytest.mark.parametrize("kind", SCHEDULES)
def test_warmup_rises_linearly_and_reaches_the_peak(kind):
    schedule = Schedule(kind, 20, warmup_steps=4)
    assert [schedule.factor(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
def test_the_last_step_is_at_the_final_fraction_and_stays_there(kind):
    schedule = Schedule(kind, 20, warmup_steps=4, final_fraction=0.1)
    assert schedule.factor(19) == pytest.approx(0.1)
    assert schedule.factor(500) == pytest.approx(0.1)


def test_cosine_is_half_way_in_the_middle():
    schedule = Schedule("cosine", 10, final_fraction=0.0)
    assert schedule.factor(4) == pytest.approx(0.5)
    values = [schedule.factor(step) for step in range(10)]
    assert values == sorted(values, reverse=True)


def test_wsd_is_flat_until_the_decay():
    schedule = Schedule("wsd", 10, warmup_steps=2, final_fraction=0.0, decay_fraction=0.4)
    assert [round(schedule.factor(step), 6) for step in range(10)] == [0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]


def test_constant_never_falls():
    assert {Schedule("constant", 10).factor(step) for step in range(30)} == {1.0}


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (2, 2), (3, 1), (7, 7)])
def test_short_stages_stay_between_zero_and_the_peak(kind, steps, warmup):
    schedule = Schedule(kind, steps, warmup)
    assert all(0 < schedule.factor(step) <= 1 for step in range(steps + 3))
