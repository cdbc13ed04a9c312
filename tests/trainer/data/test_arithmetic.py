import re

import pytest

from opsdc.data.arithmetic import arithmetic
from opsdc.data.sources import load_problems
from opsdc.errors import ConfigError


def load(**options):
    return load_problems(
        "embedded:arithmetic",
        split=None,
        options=options,
        prompt_column=None,
        answer_column=None,
        seed=0,
    )


def test_answers_are_right_and_questions_differ():
    rows = arithmetic()
    assert len({row["problem"] for row in rows}) == len(rows) == 363
    for row in rows:
        a, b = map(int, re.findall(r"\d+", row["problem"]))
        assert int(row["answer"]) == (a + b if "plus" in row["problem"] else a * b)
        assert row["group"] == f"{min(a, b)} {max(a, b)}"


def test_held_out_by_pair_of_numbers():
    problems = load()
    train, gate, held_out = problems.split(132, 60)
    groups = [{p.group for p in part} for part in (train, gate, held_out)]
    assert sum(map(len, groups)) == len(set.union(*groups))
    assert (len(held_out), len(gate)) == (132, 60)
    assert len(train) > 150


def test_it_has_no_options():
    with pytest.raises(ConfigError, match=r"size.* means nothing to embedded:arithmetic; unset it"):
        load(size=5)
