"""The controller of the dial against a model of a student that follows its teacher."""

import json
import math
import random

import pytest

from opsdc.config.settings import TeacherConfig
from opsdc.errors import ConfigError
from opsdc.method.target import Dial

PLAIN = {f"p{i}": 60.0 + i for i in range(-20, 21)}


def follow(target, *, speed, noise=0.0, steps=60, pull=1.8, seed=0, told=PLAIN):
    """Relative lengths of a student whose log length moves to −pull·dial, at `speed` a step."""
    draw, dial = random.Random(seed), Dial(TeacherConfig(target=target))
    dial.begin(0, lambda: (PLAIN, told))
    log_length, relative = 0.0, []
    for _ in range(steps):
        problems = draw.sample(sorted(PLAIN), 16)
        lengths = [
            (p, max(round(PLAIN[p] * math.exp(log_length + draw.gauss(0, noise))), 1))
            for p in problems
        ]
        relative.append(dial.after_step(lengths)["relative_length"])
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


@pytest.mark.parametrize("target", [0.3, 0.5, 0.7])
def test_a_dial_that_starts_where_the_told_length_says_never_leaves_the_target(target):
    """A student that follows its teacher in three steps, and a told length of exp(-1.8)."""
    told = {p: n * math.exp(-1.8) for p, n in PLAIN.items()}
    relative, dial = follow(target, speed=0.8, told=told, steps=24)
    assert dial._start == pytest.approx(-math.log(1 - target) / 1.8)
    assert all(abs(1 - r - target) <= 0.1 for r in relative[4:]), relative
    assert all(abs(1 - r - target) <= 0.03 for r in relative[-6:]), relative


def test_where_the_dial_starts():
    def start(told, **settings):
        dial = Dial(TeacherConfig(target=0.5, **settings))
        dial.begin(0, lambda: ({"a": 100.0}, {"a": told}))
        return dial.value

    assert start(50.0) == pytest.approx(1.0)
    assert start(25.0) == pytest.approx(0.5)
    # An instruction that does not shorten says nothing, and a dial that was asked for stands.
    assert start(99.0) == start(120.0) == 1.0
    assert start(25.0, dial=0.8) == 0.8
    assert start(90.0, dial_max=1.5) == 1.5


def test_a_dial_at_its_limit_does_not_wind_up():
    """A target that cannot be reached: once lengths fall, the dial comes back at once."""
    dial = Dial(TeacherConfig(target=0.9, dial_max=1.5))
    dial.begin(0, lambda: (PLAIN, PLAIN))
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
    assert dial.after_step([("p0", 5)]) == {"dial": 0.7}
    assert dial.value == 0.7
    assert Dial(TeacherConfig()).after_step([("p0", 5)]) == {}
    dial.begin(7, lambda: pytest.fail("nothing to measure"))


def test_problems_with_a_known_plain_length_count_by_it():
    dial = Dial(TeacherConfig(target=0.5))
    plain = {"short": 10.0, "long": 90.0}
    dial.begin(0, lambda: (plain, plain))
    used = dial.after_step([("short", 5), ("long", 45)])
    assert used == {"dial": 1.0, "relative_length": pytest.approx(0.5)}
    assert dial.after_step([("short", 5), ("new", 25)])["relative_length"] == pytest.approx(0.5)


def test_a_resumed_dial_steers_as_the_whole_one():
    whole = Dial(TeacherConfig(target=0.5))
    whole.begin(0, lambda: (PLAIN, PLAIN))
    lengths = [[("p1", 50 - i), ("p2", 40 - i)] for i in range(12)]
    values = []
    for step in lengths:
        whole.after_step(step)
        values.append(whole.value)
    resumed = Dial(TeacherConfig(target=0.5))
    resumed.begin(0, lambda: (PLAIN, PLAIN))
    for step in lengths[:5]:
        resumed.after_step(step)
    state = json.loads(json.dumps(resumed.state()))
    resumed = Dial(TeacherConfig(target=0.5))
    resumed.load(state)
    resumed.begin(5, lambda: pytest.fail("measured already"))
    for step, value in zip(lengths[5:], values[5:]):
        resumed.after_step(step)
        assert resumed.value == value


def test_steps_without_responses_move_nothing():
    dial = Dial(TeacherConfig(target=0.5))
    dial.begin(0, lambda: (PLAIN, PLAIN))
    assert dial.after_step([]) == {"dial": 1.0}
    assert dial.value == 1.0


def test_a_target_that_comes_too_late_is_refused():
    with pytest.raises(ConfigError, match=r"teacher.target 0.5 .* before its step 3"):
        Dial(TeacherConfig(target=0.5)).begin(3, lambda: (PLAIN, PLAIN))
