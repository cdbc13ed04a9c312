"""Columns of a row: prompt, answer and teacher's prompt, as files and datasets hold them."""

from __future__ import annotations

import json
from decimal import Decimal

import pytest
from helpers.problems import load, written

from opsdc.data.sources import problems_from_rows
from opsdc.errors import DataError


def ids(problems) -> list[str]:
    return [p.id for p in problems]


def test_columns(tmp_path):
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    asked = ({"role": "user", "content": "Q"},)
    rows = [
        ({"problem": "Q", "answer": "5"}, "5"),
        ({"question": "Q", "solution": r"so \boxed{\frac{1}{2}} it is"}, r"\frac{1}{2}"),
        ({"question": "Q", "answer": "2 * 3 = <<2*3=6>>6\n#### 1,006"}, "1,006"),
        ({"prompt": turns[:1], "reward_model": {"ground_truth": "34"}}, "34"),
        ({"messages": [*turns, turns[1]], "prompt": "not this", "ground_truth": 7}, "7"),
        ({"messages": None, "prompt": "Q", "answer": 70.0}, "70"),
        ({"prompt": "Q", "answer": 0.25}, "0.25"),
        ({"prompt": "Q", "answer": None}, None),
        ({"prompt": "Q"}, None),
    ]
    found = load(written(tmp_path, [row for row, _ in rows]))
    assert ids(found) == [f"p.jsonl:{i}" for i in range(1, 10)]
    for problem, (_, answer) in zip(found, rows, strict=True):
        assert problem.messages == asked
        assert problem.answer == answer
        assert problem.teacher_messages is None


def test_structure_stored_as_json_text(tmp_path):
    """As CSV exports and some Hub datasets hold it: the same problem as with the structure."""
    turns = [{"role": "system", "content": "S"}, {"role": "user", "content": 'Is "Q" [{?'}]
    reward = {"style": "rule", "ground_truth": "34", "more": {"gold": 0.5}}
    rows = [
        {"prompt": turns, "reward_model": reward, "teacher_prompt": turns},
        {
            "prompt": json.dumps(turns),
            "reward_model": json.dumps(reward),
            "teacher_prompt": json.dumps(turns, indent=1),
        },
        {"prompt": turns, "reward_model": {**reward, "more": json.dumps({"gold": "1/2"})}},
    ]
    structured, as_text, _ = load(path := written(tmp_path, rows))
    for field in ("messages", "answer", "teacher_messages"):
        assert getattr(as_text, field) == getattr(structured, field)
    assert structured.answer == "34"
    nested = load(path, answer_column="reward_model.more.gold")
    assert [p.answer for p in nested] == ["0.5", "0.5", "1/2"]
    # A problem may begin with a bracket or be JSON; only a list of messages is a chat.
    for text in ('[{"a": 1}]', "[1, 2] is what?", '{"role": "user"}', "[{x}]"):
        assert load(written(tmp_path, [{"problem": text}]))[0].messages[0]["content"] == text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": str([{"role": "user", "content": "Q"}])}, "column prompt looks like a list"),
        ({"prompt": '[{"role": "user", "content": "Q'}, "column prompt looks like a list"),
        ({"prompt": '[{"content": "Q", "role": "human"}]'}, "role must be one of"),
        ({"prompt": "Q", "reward_model": str({"ground_truth": "5"})}, "reward_model looks like an"),
        ({"prompt": "Q", "reward_model": '{"ground_truth": '}, "column reward_model looks like an"),
        (
            {"prompt": "Q", "reward_model": '{"ground_truth": ["5"]}'},
            "ground_truth must be text",
        ),
        ({"prompt": "Q", "solution": r"\boxed{3} or \boxed{5}"}, "differ, '3' and '5'; put the"),
        ({"prompt": "Q", "answer": r"\boxed{1 1/2}, \boxed{11/2}"}, r"differ, '1 1/2' and '11/2'"),
        ({"prompt": "Q", "solution": r"\boxed{B}\boxed{A}\boxed{B}"}, "differ, 'A' and 'B'"),
    ],
)
def test_structure_that_cannot_be_told_is_refused(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        load(written(tmp_path, [row]))


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"\boxed{3}. Again: \boxed{3}", "3"),
        (r"$\boxed{15\frac{39}{40}},$ or $\boxed{\frac{639}{40}}$ inches", r"\frac{639}{40}"),
        (r"\fbox{0.5}, so \boxed{\boxed{1/2}}", "1/2"),
    ],
)
def test_boxes_that_agree_are_one_answer(tmp_path, solution, answer):
    assert load(written(tmp_path, [{"problem": "Q", "solution": solution}]))[0].answer == answer


def test_decimals_of_a_parquet_file(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    written_as = ["70.00", "0.25", "-1234.50", "100.00", "0.00"]
    columns = {"problem": list("abcde"), "answer": [Decimal(x) for x in written_as]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "p.parquet")
    answers = [p.answer for p in load(tmp_path / "p.parquet")]
    assert answers == ["70", "0.25", "-1234.5", "100", "0"]
    for value, text in ((Decimal("1E+3"), "1000"), (1e-06, "1e-06")):
        rows = [{"problem": "Q", "answer": value}]
        (problem,) = problems_from_rows(
            rows, origin="rows", prompt_column=None, answer_column=None, seed=0
        )
        assert problem.answer == text
    for value in (Decimal("NaN"), Decimal("Infinity")):
        with pytest.raises(DataError, match=r"column answer is (NaN|Infinity)"):
            problems_from_rows(
                [{"problem": "Q", "answer": value}],
                origin="rows",
                prompt_column=None,
                answer_column=None,
                seed=0,
            )


def test_named_columns_and_a_teacher_prompt(tmp_path):
    row = {
        "problem": "not this",
        "text": "Q",
        "gold": {"value": "9"},
        "answer": "not this",
        "teacher_prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "T"}],
    }
    path = written(tmp_path, [row, {**row, "teacher_prompt": None}])
    first, second = load(path, prompt_column="text", answer_column="gold.value")
    assert first.messages == ({"role": "user", "content": "Q"},)
    assert first.answer == "9"
    assert first.teacher_messages == tuple(row["teacher_prompt"])
    assert second.teacher_messages is None


def test_json_and_parquet_hold_the_same(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {"prompt": [{"role": "user", "content": f"Q{i}"}], "reward_model": {"ground_truth": str(i)}}
        for i in range(4)
    ]
    (tmp_path / "p.json").write_text(json.dumps(rows, indent=1), "utf-8")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    expected = list(load(written(tmp_path, rows)))
    for name in ("p.json", "p.parquet"):
        for found, same in zip(load(tmp_path / name), expected, strict=True):
            assert (found.messages, found.answer) == (same.messages, same.answer)
