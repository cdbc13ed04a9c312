"""What `opsdc inspect` shows is what the loss of a run with these settings would see."""

import re

import pytest

from opsdc.data.prompted import prompted_sets
from opsdc.debug.show import inspect


def shown(make_config, **settings):
    from opsdc.models.load import prepare_model, receive_model

    config = make_config(**settings)
    module, tokenizer, model = receive_model(None, config.model, None)
    module = prepare_model(module, model)
    item = prompted_sets(config, tokenizer).training[0]
    return inspect(module, tokenizer, item, config, colour=False)


def mean(text):
    return float(re.search(r"mean (-?[\d.]+) nats", text)[1])


def test_the_dial_and_the_other_instruction_are_in_the_divergences(make_config):
    plain = mean(shown(make_config))
    assert plain > 1e-3
    held = shown(make_config, **{"teacher.dial": 0.0})
    assert mean(held) == pytest.approx(0, abs=1e-4)
    assert "+1 plain" in held
    double = shown(make_config, **{"teacher.dial": 2.0})
    assert mean(double) > 1.5 * plain
    assert "+2 concise" in double
    assert "-1 plain" in double
    styled = {"teacher.against": "Be wordy, please.", "teacher.against_weight": 0.5}
    other = shown(make_config, **styled)
    assert "Be wordy, please." in other
    assert "-0.5 against" in other
    assert abs(mean(other) - plain) > 1e-3
