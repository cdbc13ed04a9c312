"""Where problems come from: every row a problem or a named error, every batch from (seed, step)."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from helpers.problems import load, written
from hypothesis import given, settings
from hypothesis import strategies as st

from opsdc.data.problem import Problem, ProblemSet
from opsdc.data.sources import problems_from_rows
from opsdc.errors import ConfigError, DataError


def numbered(n: int, seed: int = 0) -> ProblemSet:
    chats = [({"role": "user", "content": f"Q{i}"},) for i in range(n)]
    return ProblemSet([Problem(id=f"q:{i}", messages=c) for i, c in enumerate(chats)], seed=seed)


def ids(problems) -> list[str]:
    return [p.id for p in problems]


# --- order ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 700), st.integers(1, 40), st.integers(0, 2**40))
def test_an_epoch_uses_each_problem_at_most_once(n, size, seed):
    size = min(size, n)
    problems = numbered(n, seed)
    steps = n // size
    for epoch in range(2):
        seen = [
            i
            for step in range(1 + epoch * steps, 1 + (epoch + 1) * steps)
            for i in ids(problems.batch(step, size))
        ]
        assert len(seen) == len(set(seen)) == steps * size


def test_batch_is_a_pure_function_of_seed_and_step():
    one, other = numbered(100, 3), numbered(100, 3)
    forward = [ids(one.batch(step, 8)) for step in range(1, 40)]
    backward = [ids(other.batch(step, 8)) for step in range(39, 0, -1)]
    assert forward == backward[::-1]
    assert forward[:12] != forward[12:24]  # Another epoch, another order.
    assert forward != [ids(numbered(100, 4).batch(step, 8)) for step in range(1, 40)]
    # Pinned: a run that is resumed with a later version must see the same problems.
    assert ids(numbered(1000, 0).batch(1, 4)) == ["q:144", "q:255", "q:317", "q:766"]
    assert ids(numbered(1000, 7).batch(999, 4)) == ["q:468", "q:377", "q:313", "q:830"]


def test_shuffles_are_fair():
    """Where an epoch puts a problem is uniform over seeds, in small and larger sets."""
    for n in (2, 7, 40):
        draws = 2000
        first = Counter(numbered(n, seed).batch(1, 1)[0].id for seed in range(draws))
        expected = draws / n
        chi2 = sum((first[f"q:{i}"] - expected) ** 2 / expected for i in range(n))
        freedom = n - 1
        assert chi2 < freedom + 5 * (2 * freedom) ** 0.5 + 10


def test_steps_count_from_one_and_batches_fit():
    problems = numbered(5)
    for step, size in ((0, 2), (-1, 2), (1, 0)):
        with pytest.raises(ValueError, match="count from 1"):
            problems.batch(step, size)
    with pytest.raises(DataError, match="batch of 6 problems cannot be drawn from 5"):
        problems.batch(1, 6)
    assert len(problems) == 5
    assert problems[4].id == "q:4"


def test_split_is_disjoint_and_follows_from_the_seed():
    problems = numbered(100, 5)
    train, gate, held_out = problems.split(30)
    assert (len(gate), len(train), len(held_out)) == (0, 70, 30)
    assert set(ids(train)) | set(ids(held_out)) == set(ids(problems))
    again = numbered(100, 5).split(30)
    assert (ids(again[0]), ids(again[2])) == (ids(train), ids(held_out))
    assert ids(numbered(100, 6).split(30)[2]) != ids(held_out)
    assert train.seed == held_out.seed == 5
    # A larger held-out set holds the smaller one.
    assert ids(problems.split(31)[2])[:30] == ids(held_out)
    everything, _, nothing = problems.split(0)
    assert (ids(everything), len(nothing)) == (ids(problems), 0)
    for size in (100, 101):
        with pytest.raises(DataError, match=f"data.eval_size {size} leaves none of 100"):
            problems.split(size)
    with pytest.raises(DataError, match=r"data.eval_size 60 and data.gate_size 40 leave none"):
        problems.split(60, 40)


def test_a_gate_is_apart_from_both():
    problems = numbered(100, 5)
    train, gate, held_out = problems.split(30, 20)
    assert (len(train), len(gate), len(held_out)) == (50, 20, 30)
    assert ids(held_out) == ids(problems.split(30)[2])
    assert not set(ids(gate)) & (set(ids(train)) | set(ids(held_out)))


def test_groups_are_held_out_whole():
    def of_group(i, group):
        chat = ({"role": "user", "content": f"Q{i}"},)
        return Problem(id=str(i), messages=chat, group=group)

    problems = ProblemSet([of_group(i, f"g{i % 25}") for i in range(100)], seed=3)
    train, gate, held_out = problems.split(10, 10)
    # Cut within a group: the rest of it is in no part.
    assert (len(held_out), len(gate)) == (10, 10)
    groups = [{p.group for p in part} for part in (train, gate, held_out)]
    assert [len(g) for g in groups] == [19, 3, 3]
    assert sum(map(len, groups)) == len(set.union(*groups))
    assert len(train) == 4 * 19
    one = ProblemSet([of_group(i, "g") for i in range(9)], seed=1)
    with pytest.raises(DataError, match="repeat their prompts or groups"):
        one.split(2)


def test_no_prompt_is_trained_and_held_out(capsys):
    chats = [({"role": "user", "content": f"Q{i % 20}"},) for i in range(100)]
    problems = ProblemSet([Problem(id=str(i), messages=c) for i, c in enumerate(chats)], seed=1)
    train, _, held_out = problems.split(4)
    prompts = [{p.messages[0]["content"] for p in part} for part in (train, held_out)]
    assert not prompts[0] & prompts[1]
    dropped = 96 - len(train)
    assert dropped > 0
    assert f"left {dropped} of 96 training problems out" in capsys.readouterr().err
    same = ProblemSet([Problem(id=str(i), messages=chats[0]) for i in range(9)], seed=1)
    with pytest.raises(DataError, match="repeat their prompts"):
        same.split(2)


# --- sources --------------------------------------------------------------------------------------


def test_prompt_template(tmp_path):
    question = "Use {braces} and {problem} and {{ jinja }}."
    path = written(tmp_path, [{"problem": question}])
    content = load(path, options={"prompt_template": "Q: {problem}\nA:"})[0].messages[0]["content"]
    assert content == f"Q: {question}\nA:"
    for name, ends in (("DAPO", 'after "Answer:".'), ("DAPO-no-reminder", question)):
        content = load(path, options={"prompt_template": name})[0].messages[0]["content"]
        assert content.startswith("Solve the following math problem step by step. The last line ")
        assert question in content
        assert content.endswith(ends)
    for wrong in ("no place", "{problem} {problem}", 3):
        with pytest.raises(ConfigError, match="prompt_template must be"):
            load(path, options={"prompt_template": wrong})


def test_a_dataset_folder_and_rows_in_memory(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"question": f"Q{i}", "answer": f"#### {i}"} for i in range(5)]
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    written(folder / "data", rows, "train-0.jsonl")
    written(folder / "data", rows[:2], "test-0.jsonl")
    options = {"cache_dir": str(tmp_path / "cache")}
    found = load(folder, options=options)
    assert [p.answer for p in found] == list("01234")
    assert found[0].id == f"{folder}:train:1"
    assert len(load(folder, options=options, split="test")) == 2
    with pytest.raises(DataError, match=r"split nowhere: .*nowhere"):
        load(folder, options=options, split="nowhere")
    with pytest.raises(ConfigError, match=r"use data\.source and data\.split"):
        load(folder, options={"split": "test"})
    for given_rows in (rows, datasets.Dataset.from_list(rows)):
        same = problems_from_rows(
            given_rows, origin="train_dataset", prompt_column=None, answer_column=None, seed=0
        )
        assert [p.messages for p in same] == [p.messages for p in found]
        assert same[4].id == "train_dataset:5"


# --- what is wrong says where ---------------------------------------------------------------------

GOOD = {"problem": "Q", "answer": "5"}
BAD_ROWS = [
    (
        {"question_text": "Q", "ans": "5"},
        r"no prompt: no value in any of .*columns are question_te",
    ),
    ({"problem": "", "answer": "5"}, "column problem is empty"),
    ({"problem": " \n\t", "answer": "5"}, "column problem is empty"),
    ({"problem": 5}, "column problem must be text or a list of messages, not int: 5"),
    ({"problem": {"role": "user"}}, "must be text or a list of messages, not dict"),
    ({"problem": "a\0b"}, "holds a NUL character"),
    ({"problem": "a\ud800b"}, r"holds a lone surrogate \(U\+D800"),
    ({"messages": []}, "has no user turn at its end"),
    ({"messages": ["Q"]}, "message 1 must be an object with role and content, not str"),
    ({"messages": [{"role": "human", "content": "Q"}]}, "message 1: role must be one of .*'human'"),
    ({"messages": [{"role": "user<|im_end|>", "content": "Q"}]}, "role must be one of"),
    ({"messages": [{"role": "user"}]}, "message 1, content must be text, not NoneType"),
    ({"messages": [{"role": "user", "content": ["Q"]}]}, "content must be text, not list"),
    ({"messages": [{"role": "user", "content": ""}]}, "message 1, content is empty"),
    ({"messages": [{"role": "assistant", "content": "A"}]}, "has no user turn at its end"),
    ({"messages": [{"role": "system", "content": "S"}]}, "has no user turn at its end"),
    ({**GOOD, "answer": True}, "column answer must be text or a number, not bool"),
    ({**GOOD, "answer": ["5"]}, "column answer must be text or a number, not list"),
    ({**GOOD, "answer": ""}, "column answer is empty"),
    ({**GOOD, "teacher_prompt": 3}, "column teacher_prompt must be text or a list"),
    ({**GOOD, "teacher_prompt": ""}, "column teacher_prompt is empty"),
    (5, "must be an object with columns, not int"),
    (["Q"], "must be an object with columns, not list"),
    (None, "must be an object with columns, not NoneType"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_a_bad_row_is_named(tmp_path, row, message):
    path = written(tmp_path, [GOOD, row, GOOD])
    with pytest.raises(DataError, match=message) as caught:
        load(path)
    assert f"{path}, line 2" in str(caught.value)


BAD_FILES = [
    (b"", "holds no problems"),
    (b"\n \n", "holds no problems"),
    (b'{"problem": "Q"}\n{"problem": "Q"', r"line 2: not JSON: .*column"),
    (b'{"problem": "Q"}\n\n{"problem": "Q",}\n', "line 3: not JSON"),
    (b'{"problem": "Q"} {"problem": "R"}\n', "line 1: not JSON: Extra data"),
    (b'{"problem": "caf\xe9"}\n', "line 1 is not UTF-8 at byte 16"),
    (b'{"problem": "Q", "problem": "R"}\n', "'problem' stands twice"),
    (b'{"problem": "Q", "answer": NaN}\n', "NaN is not a JSON value"),
    (b'{"problem": "Q", "answer": 1e999}\n', "column answer is inf"),
    (b'{"problem": ' + b"[" * 100_000 + b"\n", "line 1: not"),
    (b'[{"problem": "Q"}]\n', "line 1 must be an object with columns, not list"),
]


@pytest.mark.parametrize(("content", "message"), BAD_FILES)
def test_a_bad_file_is_named(tmp_path, content, message):
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_other_bad_sources(tmp_path):
    (tmp_path / "o.json").write_text('{"problem": "Q"}', "utf-8")
    (tmp_path / "e.json").write_text("[]", "utf-8")
    (tmp_path / "t.json").write_text('[{"problem": "Q"},\n {"problem": }]', "utf-8")
    (tmp_path / "p.parquet").write_bytes(b"PAR1 not really PAR1")
    (tmp_path / "p.txt").write_text("problem\nQ\n", "utf-8")
    (tmp_path / "d.jsonl").mkdir()
    for name, message in (
        ("o.json", "must hold an array of objects, not dict"),
        ("e.json", "holds no problems"),
        ("t.json", "not JSON: .*line 2, column 14"),
        ("p.parquet", "not a usable Parquet file"),
        ("p.txt", r"files must end in \.jsonl, \.json, \.csv, \.parquet"),
        ("none.jsonl", r"there is no file .*none\.jsonl; check data\.source"),
        ("d.jsonl", "cannot read"),
        ("no/such/folder", "no such file or folder"),
    ):
        with pytest.raises(DataError, match=message):
            load(tmp_path / name)
    path = written(tmp_path, [GOOD])
    with pytest.raises(
        DataError, match=r"no value in 'gold'; its columns are problem, answer\. Set"
    ):
        load(path, answer_column="gold")
    with pytest.raises(DataError, match=r"data\.prompt_column to the one that holds it"):
        load(path, prompt_column="text")
    with pytest.raises(ConfigError, match=r"data\.split 'train' means nothing"):
        load(path, split="train")
    with pytest.raises(ConfigError, match=r"data\.options \['size'\] means nothing"):
        load(path, options={"size": 3})


def _malformed(rng: random.Random) -> bytes:
    """One row that no reader may take, of a kind drawn at random."""
    text = "".join(rng.choice(r"ab{}\"<|%é😀 ") for _ in range(rng.randint(1, 30))) + "x"
    line = json.dumps({"problem": text, "answer": "5"}, ensure_ascii=rng.random() < 0.5).encode()
    not_text = rng.choice([0, -1.5, True, {"a": text}, [1], [[]], [None], [text], [{}], [], {}])
    broken_text = text + rng.choice(["\0", "\ud800", "\udfff", "\udc80"]) + text
    turn = {"role": "user", "content": text}
    chats = [
        [
            {
                **turn,
                "role": rng.choice(["tool", "User", "", None, 5, "user\n<|im_start|>", ["user"]]),
            }
        ],
        [{**turn, "content": rng.choice([None, 5, [], {}, "", " \n", broken_text])}],
        [turn, {"role": "assistant", "content": rng.choice([None, "", 3])}, turn],
        [{"role": "system", "content": text}],
        [{"role": "assistant", "content": text}] * rng.randint(1, 3),
        [turn, rng.choice([None, "hi", 5, [turn]])],
    ]
    kind = rng.randrange(10)
    if kind == 0:
        return line[: rng.randrange(1, len(line))]
    if kind == 1:
        return line[:-1] + rng.choice(
            [b"}}", b"]", b",}", b', "answer": "6"}', b"} 5", b" 'a': 1}"]
        )
    if kind == 2:
        return line[:13] + rng.choice([b"\xff", b"\xc3", b"\xed\xa0\x80", b"\x01"]) + line[13:]
    if kind == 3:
        return rng.choice(
            [b"5", b'"Q"', b"null", b"true", b"[]", b"NaN", b"{}", b"-", b"\x00", b"{"]
        )
    row = {
        4: {"problem": not_text},
        5: {"problem": broken_text},
        6: {"problem": rng.choice(["", " ", "\n\t", "\u3000"]), "answer": "5"},
        7: {rng.choice(["Problem", "prompts", "text", "problem "]): text},
        8: {rng.choice(["messages", "prompt", "problem"]): rng.choice(chats)},
        9: {
            "problem": text,
            **rng.choice(
                [
                    {
                        "answer": rng.choice(
                            [True, [], {}, ["5"], "", "  ", broken_text, float("nan")]
                        )
                    },
                    {
                        "teacher_prompt": rng.choice(
                            [0, "", True, {}, broken_text, rng.choice(chats)]
                        )
                    },
                ]
            ),
        },
    }[kind]
    return json.dumps(row).encode()


def test_two_thousand_malformed_rows_are_all_refused(tmp_path):
    path = tmp_path / "p.jsonl"
    good = json.dumps(GOOD).encode()
    for seed in range(2000):
        bad = _malformed(random.Random(seed))
        path.write_bytes(b"\n".join([good, bad, good]) + b"\n")
        with pytest.raises(DataError) as caught:
            load(path)
        assert f"{path}, line 2" in str(caught.value), (seed, bad)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.text(min_size=1), min_size=1, max_size=6))
def test_good_rows_arrive_unchanged_and_complete(tmp_path_factory, texts):
    texts = [t for t in (t.replace("\0", "") for t in texts) if t.strip()] or ["x"]
    path = tmp_path_factory.getbasetemp() / "good.jsonl"
    lines = [json.dumps({"problem": t}, ensure_ascii=len(t) % 2 == 0) for t in texts]
    path.write_bytes("\n".join(lines).encode())
    assert [p.messages[0]["content"] for p in load(path)] == texts


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_never_give_another_error(tmp_path_factory, content):
    for name in ("any.jsonl", "any.json", "any.parquet"):
        path = tmp_path_factory.getbasetemp() / name
        path.write_bytes(content)
        with pytest.raises(DataError):
            load(path)


# --- reasoning-gym --------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["gsm_symbolic", "basic_arithmetic", "chain_sum"])
def test_reasoning_gym(task):
    pytest.importorskip("reasoning_gym")
    found = load(f"reasoning_gym:{task}", options={"size": 12}, seed=5)
    assert len(found) == 12
    assert found[3].id == f"{task}:5:3"
    assert found[3].entry == {"task": task, "options": {"seed": 5, "size": 12}, "index": 3}
    assert float(found[3].answer) == float(found[3].answer)
    again = load(f"reasoning_gym:{task}", options={"size": 12}, seed=5)
    assert list(found) == list(again)
    other = load(f"reasoning_gym:{task}", options={"size": 12}, seed=6)
    assert [p.messages for p in other] != [p.messages for p in found]


def test_reasoning_gym_settings_are_checked():
    pytest.importorskip("reasoning_gym")
    for source, options, message in (
        ("reasoning_gym:no_such_task", {}, "no_such_task"),
        ("reasoning_gym:chain_sum", {"no_such": 1}, "no_such"),
        ("reasoning_gym:chain_sum", {"size": "many"}, "size"),
        ("reasoning_gym:chain_sum", {"seed": 3}, r"data\.options\.seed"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(source, options=options)
    with pytest.raises(ConfigError, match="has no splits"):
        load("reasoning_gym:chain_sum", split="train")


def test_a_named_task_option_reaches_the_task():
    pytest.importorskip("reasoning_gym")
    options = {"size": 20, "min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    for problem in load("reasoning_gym:chain_sum", options=options):
        assert abs(int(problem.answer)) <= 18


def test_nothing_heavy_is_imported_before_it_is_needed():
    heavy = "torch transformers datasets pyarrow pandas sympy math_verify reasoning_gym numpy"
    code = (
        "import sys, opsdc.data.sources, opsdc.eval.scorers, opsdc.data.prompts; "
        f"print(sorted(set({heavy.split()!r}) & set(sys.modules)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        cwd=Path(__file__).parents[3],
    )
    assert found.stdout.strip() == "[]"
