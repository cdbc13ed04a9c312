"""Is a response right? Gold solutions are, perturbed ones are not, hostile ones do no harm."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opsdc.data.notation import same_answer
from opsdc.data.problem import Problem
from opsdc.data.sources import load_problems
from opsdc.data.text import last_boxed
from opsdc.errors import ConfigError, DataError
from opsdc.eval import grader
from opsdc.eval.scorers import SCORERS, Score, last_answer_line, score


def problem(answer: str | None, **fields) -> Problem:
    messages = ({"role": "user", "content": "Q"},)
    return Problem(id="p:1", messages=messages, answer=answer, **fields)


def right(response: str, answer: str, scorer: str) -> bool:
    return score(response, problem(answer), scorer).correct


# --- extraction -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{1} then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}} and {more}", r"\{1, 2\}"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\fbox{7}", "7"),
        (r"\boxed {8}", "8"),
        (r"\boxed{5} and \boxed{unclosed", "5"),
        (r"\boxed{unclosed {5}", None),
        (r"} \boxed{\text{a}}", r"\text{a}"),
        (r"boxed{5}", None),
        ("", None),
    ],
)
def test_last_boxed(text, found):
    assert last_boxed(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Answer: 5", "5"),
        ("answer: 5\nAnswer:  x + 1 \nbye", "x + 1"),
        ("**Answer:** 5", "5"),
        ("**Answer: 5**", "5"),
        ("### Final Answer: $5$", "$5$"),
        ("Answer:\n\n42\nend", "42"),
        (r"Answer: \boxed{42}", "42"),
        (r"Answer: $\boxed{42}$.", "42"),
        (r"Answer: \boxed{3} or \boxed{5}", r"\boxed{3} or \boxed{5}"),
        ("- Answer: 42", "42"),
        ("2. **Answer:** 42", "42"),
        ("• Answer: 42", "42"),
        ("Answer:\n- 42", "42"),
        ("Answer: - 42", "- 42"),
        ("Answer:\n1) **42**", "42"),
        ("Answer：４２。", "４２。"),
        ("-Answer: 5", None),
        ("Answer:", None),
        ("The Answer: 5", None),
        ("My answer is 5", None),
        ("", None),
    ],
)
def test_last_answer_line(text, found):
    assert last_answer_line(text) == found


# --- scorers --------------------------------------------------------------------------------------


def test_scorers_by_name():
    assert SCORERS == (
        "math_verify",
        "answer_line",
        "boxed",
        "letter",
        "exact",
        "dual",
        "reasoning_gym",
        "number",
    )
    with pytest.raises(
        ConfigError, match="unknown scorer 'mathverify'; the scorers are math_verify"
    ):
        score("5", problem("5"), "mathverify")


@pytest.mark.parametrize(
    ("scorer", "response", "expected"),
    [
        ("exact", " 5\n", Score(True, "5")),
        ("exact", "It is 5", Score(False, "It is 5")),
        ("exact", "  ", Score(False, None)),
        ("answer_line", "...\nAnswer: 5.0", Score(True, "5.0")),
        ("answer_line", r"\boxed{5}", Score(False, None)),
        ("boxed", r"It is \boxed{5}", Score(True, "5")),
        ("boxed", r"\boxed{5} or \boxed{6}", Score(False, "6")),
        ("boxed", "Answer: 5", Score(False, None)),
        ("number", "3 + 2 = 5.", Score(True, "5")),
        ("number", "5 or maybe $6", Score(False, "6")),
        ("number", "five", Score(False, None)),
        ("math_verify", r"thus $\frac{10}{2}$", Score(True, r"\frac{10}{2}")),
        ("math_verify", "no idea", Score(False, None)),
        ("math_verify", "The answer is 15/3", Score(True, "15/3")),
        ("dual", "Answer: 10/2", Score(True, "10/2")),
        ("dual", r"\boxed{5}", Score(True, "5")),
        ("dual", "Answer: 6", Score(False, "6")),
        ("dual", "no idea", Score(False, None)),
    ],
)
def test_scores(scorer, response, expected):
    assert score(response, problem("5"), scorer) == expected


def test_dual_takes_either():
    """The paper's scorer: an `Answer:` line, or math-verify on the whole response."""
    answer = r"\left( 3, \frac{\pi}{2} \right)"
    assert right(f"So.\nAnswer: {answer}", answer, "dual")
    assert right(f"So.\nAnswer: ${answer}$", answer, "dual")
    assert right(f"So $\\boxed{{{answer}}}$.\nAnswer: above", answer, "dual")
    assert right("Answer: 3", "3", "dual")
    assert not right(f"Answer: {answer.replace('3', '4')}", answer, "dual")
    assert right("Answer: Evelyn", r"\text{Evelyn}", "dual")
    assert not right("Answer: Briana", r"\text{Evelyn}", "dual")
    assert not right("Answer: 52_9", "52_8", "dual")
    assert right("Answer: 52_8", "52_8", "dual")
    # As in math-verify, a number stands for a number in the expected base.
    assert right(r"\boxed{52}", "52_8", "dual")


@pytest.mark.parametrize("gold", ["52_8", "52_{8}", "52₈"])
@pytest.mark.parametrize("scorer", ["math_verify", "dual"])
@pytest.mark.parametrize(
    ("response", "is_right"),
    [
        ("Not $52_9$ but $52_8$.", True),
        ("Not $52_8$ but $52_9$.", False),
        ("Of $52_8$, $52_7$ and $52_{16}$ the last.", False),
        ("Of $52_{16}$, $52_7$ and $52_8$ the last.", True),
        ("Answer: 52₈", True),
        ("Answer: 52₉", False),
        (r"\boxed{52_{ 9 }}", False),
        (r"\boxed{52_8} or rather \boxed{52_9}", False),
        (r"$152_9$, so \boxed{52}", True),
    ],
)
def test_of_several_bases_the_last_counts(gold, scorer, response, is_right):
    assert right(response, gold, scorer) is is_right


def test_algebra_is_for_math_verify_alone():
    assert right(r"$\boxed{1+x}$", "x+1", "math_verify")
    assert not right(r"$\boxed{1+x}$", "x+1", "boxed")
    assert not right(r"$\boxed{x-1}$", "x+1", "math_verify")


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("Answer: B", "B"),
        ("**Answer:** (b)", "B"),
        ("Answer: B. Paris", "B"),
        ("so it is\nAnswer: option B", "B"),
        (r"it is \boxed{\text{B}}", "B"),
        (r"Answer: $\boxed{B}$", "B"),
        ("Answer: C", "C"),
        ("Answer: A or B", None),
        ("Answer: A dog", None),
        ("Answer: Berlin", None),
        ("B", None),
    ],
)
def test_the_letter_of_an_option(response, letter):
    assert score(response, problem("B"), "letter") == Score(letter == "B", letter)


def test_what_a_scorer_needs():
    for scorer in SCORERS:
        if scorer != "reasoning_gym":
            with pytest.raises(DataError, match=r"p:1 has no answer .* data\.answer_column"):
                score("5", problem(None), scorer)
    with pytest.raises(DataError, match="scorer 'number' needs a number as answer, got 'x'"):
        score("5", problem("x"), "number")
    with pytest.raises(DataError, match="not from reasoning-gym"):
        score("5", problem("B" if scorer == "letter" else "5"), "reasoning_gym")


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(
        st.one_of(
            st.text(max_size=12),
            st.sampled_from(
                [
                    r"\boxed{",
                    "}",
                    "{",
                    "Answer:",
                    "\n",
                    "$",
                    "-",
                    "1,",
                    "/",
                    "\\",
                    r"\frac{1}{0}",
                    "9" * 5000,
                ]
            ),
        ),
        max_size=10,
    ).map("".join)
)
def test_any_text_can_be_scored(response):
    for scorer in ("exact", "answer_line", "boxed", "number"):
        found = score(response, problem("5"), scorer)
        assert isinstance(found.correct, bool)
        assert not (found.correct and found.extracted is None)


# --- MATH-500 -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def math500() -> list[dict]:
    folder = os.environ.get("OPSDC_DATA")
    if not folder:
        pytest.skip("set OPSDC_DATA to a folder with MATH-500.jsonl (Hub: HuggingFaceH4/MATH-500)")
    lines = (Path(folder) / "MATH-500.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 500
    return rows


def perturbed(answer: str) -> list[tuple[str, str]]:
    """(kind, answer that differs in what it says) for every kind that applies."""
    found = []
    # What follows a unit's name is no part of the value; see `test_units_are_not_compared`.
    value_end = answer.find(r"\mbox") % (len(answer) + 1)
    for number in re.finditer(r"\d+", answer[:value_end]):
        plus_one = str(int(number[0]) + 1)
        found.append(("number + 1", answer[: number.start()] + plus_one + answer[number.end() :]))
    if answer.startswith("-"):
        found.append(("sign", answer[1:]))
    elif re.match(r"[\d.]|\\d?frac|\\sqrt|\\pi", answer) and answer != "0":
        found.append(("sign", "-" + answer))
    words = re.search(r"^\\text\{(.*?([A-Za-z]).*?)\}$", answer)
    if words:
        other = "B" if words[2] != "B" else "C"
        at = words.start(2)
        found.append(("changed letter", answer[:at] + other + answer[at + 1 :]))
        found.append(("other text", r"\text{zebra}"))
    if "+" in answer:
        found.append(("plus to minus", answer.replace("+", "-", 1)))
    variable = re.search(r"(?<![\\a-zA-Z{])[a-zA-Z](?![a-zA-Z}])", answer)
    if variable:
        other = "w" if variable[0] != "w" else "v"
        found.append(
            ("other variable", answer[: variable.start()] + other + answer[variable.end() :])
        )
    if re.search(r"infty|\\cup|^\[|\]$", answer):
        # A bracket at a finite end says whether the end belongs; infinity has no closed end.
        for bracket in re.finditer(r"[\[(](?=[^,]*,)(?!-?\\infty)|(?<!infty)[\])]", answer):
            other = {"(": "[", "[": "(", ")": "]", "]": ")"}[bracket[0]]
            found.append(("bracket", answer[: bracket.start()] + other + answer[bracket.end() :]))
    if "," in answer and not re.search(r"\d,\\?!?\d{3}|\(", answer):
        found.append(("dropped element", answer.rsplit(",", 1)[0]))
    return found


def boxed_as(row: dict, answer: str) -> str:
    """The row's solution with another answer in its last box."""
    head, box, tail = row["solution"].rpartition(r"\boxed")
    content = last_boxed(box + tail)
    assert content is not None
    return head + box + tail.replace(content, answer, 1)


@pytest.mark.whole
@pytest.mark.parametrize("scorer", ["math_verify", "boxed", "dual"])
def test_gold_solutions_are_right(math500, scorer):
    wrong = [r["unique_id"] for r in math500 if not right(r["solution"], r["answer"], scorer)]
    assert wrong == []


def test_gold_answer_lines_are_right(math500):
    for scorer in ("answer_line", "dual"):
        wrong = [
            r["answer"]
            for r in math500
            if not right(f"Therefore.\nAnswer: {r['answer']}", r["answer"], scorer)
        ]
        assert wrong == []


@pytest.mark.whole
@pytest.mark.parametrize("scorer", ["math_verify", "boxed"])
def test_perturbed_solutions_are_wrong(math500, scorer):
    counts: Counter[str] = Counter()
    accepted = []
    for row in math500:
        for kind, other in perturbed(row["answer"]):
            counts[kind] += 1
            if right(boxed_as(row, other), row["answer"], scorer):
                accepted.append((kind, row["answer"], other))
    print(f"{scorer}: {sum(counts.values())} perturbed solutions, {dict(counts)}")
    assert accepted == []
    assert sum(counts.values()) >= 1200
    assert len(counts) == 8
    # Every problem has at least one perturbation of its own.
    assert all(perturbed(row["answer"]) for row in math500)


def test_perturbed_answer_lines_are_wrong(math500):
    tried = [(row, other) for row in math500[::4] for _, other in perturbed(row["answer"])]
    accepted = [
        (row["answer"], other)
        for row, other in tried
        if right(f"Therefore.\nAnswer: {other}", row["answer"], "dual")
    ]
    assert len(tried) > 200
    assert accepted == []


def test_units_are_not_compared_by_math_verify():
    """As in the paper's scorer, a unit is dropped on both sides; `boxed` compares it."""
    assert right(r"\boxed{15 \text{ inches}}", r"15\mbox{ cm}^2", "math_verify")
    assert not right(r"\boxed{15 \text{ inches}}", r"15\mbox{ cm}^2", "boxed")
    assert right(r"\boxed{15}", r"15\mbox{ cm}^2", "math_verify")


def test_loaded_solutions_keep_their_answer(math500, tmp_path):
    """A data set that has worked solutions only: the answer is what their last box holds."""
    rows = [{"problem": r["problem"], "solution": r["solution"]} for r in math500]
    path = tmp_path / "s.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    found = load_problems(
        str(path), split=None, options={}, prompt_column=None, answer_column=None, seed=0
    )
    same = [same_answer(p.answer or "", r["answer"]) for p, r in zip(found, math500, strict=True)]
    assert all(same)


# --- hostile responses ----------------------------------------------------------------------------


@pytest.mark.whole
def test_an_endless_comparison_ends():
    """In C code no Python timer helps; the process is ended, and the next question is answered."""
    handler = signal.getsignal(signal.SIGALRM)
    for response in ("The answer is 9^9^9^9", "1 " * 20_000):
        assert score(response, problem("5"), "math_verify") == Score(False, None)
        assert score(r"\boxed{5}", problem("5"), "math_verify") == Score(True, "5")
    assert signal.getsignal(signal.SIGALRM) is handler


def test_scores_from_threads():
    found: list[Score] = []

    def work(n: int) -> None:
        found.append(score(rf"\boxed{{{2 * n}/2}}", problem(str(n)), "math_verify"))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert [s.correct for s in found] == [True] * 12


def test_no_answer_is_run(tmp_path):
    """Two scorers of reasoning-gym, and sympy, call eval() on what they are given."""
    pytest.importorskip("reasoning_gym")
    marker = tmp_path / "ran"
    code = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    # The attack is real: outside the grader the same scorer runs it.
    import reasoning_gym

    dataset = reasoning_gym.create_dataset("string_insertion", seed=0, size=1)
    dataset.score_answer(code, dataset[0])
    assert marker.exists()
    marker.unlink()
    for task in ("string_insertion", "countdown"):
        found = load_problems(
            f"reasoning_gym:{task}",
            split=None,
            options={"size": 2},
            prompt_column=None,
            answer_column=None,
            seed=0,
        )
        assert not score(code, found[0], "reasoning_gym").correct
        assert not score(f"Answer: {code}", found[0], "reasoning_gym").correct
    for scorer in SCORERS:
        if scorer != "reasoning_gym":
            for response in (code, f"Answer: {code}", rf"\boxed{{{code}}}", f"${code}$"):
                assert not right(response, "B" if scorer == "letter" else "5", scorer)
    assert not marker.exists()


@pytest.mark.parametrize("task", ["gsm_symbolic", "basic_arithmetic", "chain_sum"])
def test_reasoning_gym_scores_its_own(task):
    pytest.importorskip("reasoning_gym")
    found = load_problems(
        f"reasoning_gym:{task}",
        split=None,
        options={"size": 8},
        prompt_column=None,
        answer_column=None,
        seed=3,
    )
    for item in found:
        other = str(int(item.answer) + 1)
        for form in ("It is {}.", "Answer: {}", r"\boxed{{{}}}", "First 77, so\n\n**{}**"):
            assert score(form.format(other), item, "reasoning_gym").correct is False
            assert score(form.format(item.answer), item, "number").correct
            assert not score(form.format(other), item, "number").correct
            # Its own reader for gsm_symbolic overlooks a minus.
            if int(item.answer) >= 0 or task != "gsm_symbolic":
                assert score(form.format(item.answer), item, "reasoning_gym").correct
    assert score("no number", found[0], "reasoning_gym") == Score(False, None)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text("import no_such_module_here\n", "utf-8")
    grader._stop()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    try:
        with pytest.raises(ConfigError, match=r'needs the package math-verify .*"opsdc\[eval\]"'):
            score("5", problem("5"), "math_verify")
    finally:
        monkeypatch.undo()
        grader._stop()
    assert right("$5$", "5", "math_verify")


def test_a_defect_is_not_a_wrong_answer():
    """Only a signal (a limit) makes a score; a program that fails does not."""
    with pytest.raises(RuntimeError, match="ended with status 1"):
        grader._ask({"kind": "math_verify"})
    assert right("$5$", "5", "math_verify")
