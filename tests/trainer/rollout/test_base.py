"""What may be trained on: the answers to what was asked, by the weights of the step before."""

import math
from dataclasses import replace

import pytest

from opsdc.config.settings import OPSDCConfig
from opsdc.errors import ConfigError, RolloutError
from opsdc.rollout.base import Request, Rollout, check_batch, difference

REQUESTS = [Request(key=f"train/5/{i}", prompt_ids=[1, 2, i]) for i in range(3)]
ROLLOUTS = [
    Rollout(
        key=r.key, prompt_ids=list(r.prompt_ids), response_ids=[7], finished=True, weights_version=4
    )
    for r in REQUESTS
]


def check(rollouts, max_staleness=0):
    check_batch(REQUESTS, rollouts, step=5, max_staleness=max_staleness)


def test_the_answers_by_the_weights_before_the_step_are_taken():
    check(ROLLOUTS)


@pytest.mark.parametrize(
    "changed",
    [
        ROLLOUTS[:2],
        [*ROLLOUTS, ROLLOUTS[0]],
        ROLLOUTS[::-1],
        [*ROLLOUTS[:2], replace(ROLLOUTS[2], key="train/4/2")],
        [*ROLLOUTS[:2], replace(ROLLOUTS[2], prompt_ids=[1, 2, 9])],
    ],
)
def test_other_answers_than_asked_for(changed):
    with pytest.raises(RolloutError, match="step 5"):
        check(changed)


@pytest.mark.parametrize(("version", "staleness"), [(3, 1), (2, 2), (5, None), (0, 4)])
def test_one_stale_response_of_a_batch(version, staleness):
    """A batch is as stale as its oldest response; weights of a later step are never right."""
    mixed = [*ROLLOUTS[:2], replace(ROLLOUTS[2], weights_version=version)]
    for allowed in range(6):
        if staleness is not None and allowed >= staleness:
            check(mixed, allowed)
        else:
            with pytest.raises(RolloutError, match=r"rollout\.max_staleness is"):
                check(mixed, allowed)


def test_staleness_is_off_by_default_and_never_negative():
    assert OPSDCConfig().rollout.max_staleness == 0
    with pytest.raises(ConfigError, match=r"rollout\.max_staleness"):
        OPSDCConfig.from_dict({"rollout": {"max_staleness": -1}})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_response_of_numbers_that_are_none(value):
    assert ROLLOUTS[0].is_finite
    assert replace(ROLLOUTS[0], logprobs=[-1.0]).is_finite
    assert not replace(ROLLOUTS[0], logprobs=[-1.0, value]).is_finite


def test_difference_of_what_cannot_be_compared_is_infinite():
    assert difference([-1.0, -2.0], [-1.5, -2.0]) == (0.25, 0.5)
    assert difference([-1.0], []) == (math.inf, math.inf)
    assert not difference([math.nan], [-1.0])[0] <= 1
