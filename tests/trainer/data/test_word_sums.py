import re

import pytest

from opsdc.data.sources import load_problems
from opsdc.data.word_sums import word_sums
from opsdc.errors import ConfigError


def load(**options):
    return load_problems(
        "embedded:word_sums",
        split=None,
        options=options,
        prompt_column=None,
        answer_column=None,
        seed=3,
    )


def test_answers_are_right():
    for row in word_sums(500, 0):
        a, b = map(int, re.findall(r"\d+", row["problem"]))
        less = re.search(r"gives|takes", row["problem"])
        assert int(row["answer"]) == (a - b if less else a + b) > 0


def test_problems_differ_and_follow_the_seed():
    rows = word_sums(500, 0)
    assert len({row["problem"] for row in rows}) == 500
    assert word_sums(500, 0) == rows != word_sums(500, 1)
    assert word_sums(100, 0) == rows[:100]


def test_as_a_source():
    problems = load(size=20)
    assert len(problems) == 20
    assert problems[0].answer is not None


@pytest.mark.parametrize("options", [{"size": 0}, {"size": 10**9}, {"size": "x"}, {"sice": 5}])
def test_wrong_options_are_named(options):
    with pytest.raises(ConfigError, match=r"data\.options"):
        load(**options)
