"""The controller of the dial against a model of a student that follows its teacher."""

import json
import math
import random

import pytest

from opsdc.config.settings import TeacherConfig
from opsdc.method.target import Dial

PLAIN = {f"p{i}": 60.0 + i for i in range(-20, 21)}


def follow(target, *, speed, noise=0.0, steps=60, pull=1.8, seed=0):
    """Relative lengths of a student whose log length moves to −pull·dial, at `speed` a step."""
    draw, dial = random.Random(seed), Dial(TeacherConfig(target=target))
    dial.set_plain_lengths(PLAIN)
    log_length, relative = 0.0, []
    for _ in range(steps):
        problems = draw.sample(sorted(PLAIN), 16)
        lengths = [
            (p, max(round(PLAIN[p] * math.exp(log_length + draw.gauss(0, noise))), 1))
            for p in problems
        ]
        dial.after_step(lengths)
        relative.append(dial.relative_length)
        log_length += speed * (-pull * dial.value - log_length)
    return relative, dial


@pytest.mark.parametrize("target", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("speed", [0.1, 0.25, 0.5])
def test_a_target_is_reached_and_held(target, speed):
    relative, dial = follow(target, speed=speed)
    held = relative[-15:]
    assert all(abs(1 - r - target) <= 0.05 for r in held), held
    assert 0 < dial.value < 2


@pytest.mark.parametrize("seed", range(5))
def test_the_mean_of_noisy_lengths_is_held(seed):
    """Single responses vary by a factor of two, as real ones do."""
    relative, _ = follow(0.6, speed=0.3, noise=0.7, seed=seed, steps=80)
    # The mean of a log-normal is above its median.
    assert abs(1 - sum(relative[-20:]) / 20 - 0.6) <= 0.05


def test_a_dial_at_its_limit_does_not_wind_up():
    """A target that cannot be reached: once lengths fall, the dial comes back at once."""
    dial = Dial(TeacherConfig(target=0.9, dial_max=1.5))
    dial.set_plain_lengths(PLAIN)
    for _ in range(200):
        dial.after_step([("p0", 60)])
    assert dial.value == 1.5
    steps = 0
    while dial.value > 1.0 and steps < 20:
        dial.after_step([("p0", 1)])
        steps += 1
    assert steps <= 3


def test_without_a_target_the_dial_stands_still():
    dial = Dial(TeacherConfig(dial=0.7))
    dial.after_step([("p0", 5)])
    assert dial.value == 0.7
    assert dial.measures() == {"dial": 0.7}
    assert Dial(TeacherConfig()).measures() == {}
    assert not dial.needs_plain_lengths


def test_problems_with_a_known_plain_length_count_by_it():
    dial = Dial(TeacherConfig(target=0.5))
    assert dial.needs_plain_lengths
    dial.set_plain_lengths({"short": 10.0, "long": 90.0})
    dial.after_step([("short", 5), ("long", 45)])
    assert dial.relative_length == pytest.approx(0.5)
    dial.after_step([("short", 5), ("new", 25)])
    assert dial.relative_length == pytest.approx(30 / 60)


def test_a_resumed_dial_steers_as_the_whole_one():
    whole = Dial(TeacherConfig(target=0.5))
    whole.set_plain_lengths(PLAIN)
    lengths = [[("p1", 50 - i), ("p2", 40 - i)] for i in range(12)]
    values = []
    for step in lengths:
        whole.after_step(step)
        values.append(whole.value)
    resumed = Dial(TeacherConfig(target=0.5))
    resumed.set_plain_lengths(PLAIN)
    for step in lengths[:5]:
        resumed.after_step(step)
    state = json.loads(json.dumps(resumed.state()))
    resumed = Dial(TeacherConfig(target=0.5))
    resumed.load(state)
    assert not resumed.needs_plain_lengths
    for step, value in zip(lengths[5:], values[5:]):
        resumed.after_step(step)
        assert resumed.value == value


def test_steps_without_responses_move_nothing():
    dial = Dial(TeacherConfig(target=0.5))
    dial.set_plain_lengths(PLAIN)
    dial.after_step([])
    assert (dial.value, dial.relative_length) == (1.0, None)
