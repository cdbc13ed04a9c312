"""Answers in many notations: the same number is the same, two numbers are never joined."""

from __future__ import annotations

import time

import pytest

from opsdc.data.notation import numbers, same_answer, spelled_out, value
from opsdc.data.problem import Problem
from opsdc.data.text import last_boxed
from opsdc.eval.scorers import last_answer_line, score


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("she has 1,234.", "1234"),
        ("it costs $1,234.50.", "1234.50"),
        (r"it costs \$18", "18"),
        ("-5", "-5"),
        ("−7 degrees", "-7"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("5-3", "3"),
        ("5 - 3", "3"),
        ("x = -3", "-3"),
        ("2 - -1", "-1"),
        ("(-4)", "-4"),
        ("**-4**", "-4"),
        ("$-4$", "-4"),
        ("3/4.", "3/4"),
        (r"-\frac{3}{4}", r"-\frac{3}{4}"),
        ("about .5 of", ".5"),
        ("1{,}234", "1234"),
        ("1,2345", "2345"),
        ("x = 3,4", "4"),
        ("it is 2 1/2.", "2 1/2"),
        ("in 2021 4/3", "4/3"),
        (r"2\,\frac{1}{2} cups", r"2 \frac{1}{2}"),
        (r"\frac12 or \frac 3 4", r"\frac 3 4"),
        ("3 / 4", "3/4"),
        ("1.5e3 m", "1.5e3"),
        ("1e3x and 4", "4"),
        ("3 × 10⁸ m/s", r"3 \times 10^{8}"),
        ("100 200 300", "300"),
        ("100\u202f200", "100 200"),
        ("25 cm^2", "25"),
        ("25 m²", "25"),
        (r"x_{10} = 2^{10} = 1024, x_{11}", "1024"),
        (r"90^\circ", "90"),
        ("90 ^{\\circ}", "90"),
        ("release 1.2.3", None),
        ("7 bits are 2^{7}", "7"),
        ("1e3f", "1"),
        ("pages 3–5", "5"),
        ("it is –5", "-5"),
        ("costs －３", "-3"),
        ("a pause – 5", "5"),
        ("١٬٢٣٤٫٥ ريال", "1234.5"),
        ("50%", "50"),
        ("12,000,000 people", "12000000"),
        ("8 molecules of CO2", "8"),
        ("1st or 3rd", "3"),
        ("none", None),
        ("", None),
    ],
)
def test_last_number(text, found):
    assert next(reversed(numbers(text)), None) == found


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (r"\dfrac{1}{2}", r"\frac12"),
        ("0.5", r"\frac{1}{2}"),
        ("1/2", "0.50"),
        (r"-\frac{1}{2}", "-.5"),
        (r"\frac{-1}{2}", "-1/2"),
        ("1,234", "1234"),
        (r"1{,}234", "1,234.0"),
        (r"\$18.90", "18.9"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
        (r"\text{Evelyn}", "Evelyn"),
        (r"\text{(C)}", "C"),
        (r"90^\circ", "90"),
        (r"50\%", "50"),
        (r"x^{2}", "x^2"),
        ("$7$", "7."),
        ("007", "7"),
        ("1 1/2", "3/2"),
        (r"1\frac12", "1.5"),
        (r"-137 \frac{1}{2}", "-137.5"),
        ("1½", "1.5"),
        ("½", "0.5"),
        ("1 234 567", "1234567"),
        (r"1\,234", "1234"),
        (r"11,\! 111", "11111"),
        ("1e3", "1000"),
        ("1.5E-3", "0.0015"),
        (r"1.5 \times 10^{-3}", "0.0015"),
        (r"2\cdot10^3", "2000"),
        ("10⁻²", "0.01"),
        (r"-\frac{3}{-4}", "3/4"),
        ("3 / -4", "-0.75"),
        ("{5}", "5"),
        ("{{-5}}", "-5"),
        (r"\frac{{3}}{4}", "0.75"),
        ("–5", "-5"),
        ("−5", "- 5"),
        ("－５．２５", "-5.25"),
        ("٣", "3"),
        ("५।", "5"),
        ("4\u20602", "42"),
        (r"1\\ 2", r"1\\2"),
        ("\u200f٤٢\u200e", "42"),
        ("５，０００", "5000"),
        ("1\u2044 2", "1/2"),
        ("x₁²", "x_1^2"),
        ("3√2π", r"3\sqrt{2}\pi"),
        ("(−∞, 5]", r"(-\infty,5]"),
        ("(1, 2)", "(1,2)"),
        ("3, 5, 7", "3,5,7"),
    ],
)
def test_same_answer(a, b):
    assert same_answer(a, b)
    assert same_answer(b, a)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("5", "6"),
        ("0.33", "1/3"),
        ("-5", "5"),
        ("1,2", "12"),
        ("(1,234)", "1234"),
        ("x+1", "1+x"),
        ("A", "B"),
        ("1/0", "1/0.0"),
        (r"\sqrt{2}", "2"),
        ("52_8", "52_9"),
        ("", "5"),
        ("", ""),
        ("12", "1 and 2"),
        ("1 1/2", "11/2"),
        (r"1\frac{1}{2}", "11/2"),
        ("1 3/2", "13/2"),
        ("1½", "11/2"),
        ("3 4", "34"),
        (r"3\ 4", "34"),
        (r"3\!4", "34"),
        (r"3\quad 4", "34"),
        ("3%4", "34"),
        ("$3$ $4$", "34"),
        ("$3$ $400$", "3400"),
        (r"\text{3}\text{400}", "3400"),
        ("{3}{4}", "34"),
        ("3\u00a04", "34"),
        ("3\u200b4", "34"),
        ("3\n400", "3400"),
        ("0 123", "123"),
        ("12 34", "1234"),
        ("0. 5", "0.5"),
        ("1, 234", "1234"),
        ("1, 234", "1,234"),
        ("2^3 4", "2^34"),
        ("2^{3}4", "2^34"),
        ("5²", "52"),
        ("①", "1"),
        ("x₁2", "x_12"),
        (r"\frac{1 1}{2}", "11/2"),
        (r"\frac{3}{4 5}", "3/45"),
        ("1e3", "13"),
        ("1 e3", "1000"),
        ("1e-3", "1000"),
        ("5-", "-5"),
        ("1e9999", "1e9998"),
    ],
)
def test_other_answers(a, b):
    assert not same_answer(a, b)
    assert not same_answer(b, a)


READERS = {
    "boxed": r"Thus \boxed{{{}}}",
    "answer_line": "Thus.\nAnswer: {}",
    "math_verify": r"Thus \boxed{{{}}}",
    "dual": "Thus.\nAnswer: {}",
    "number": "It is {}.",
}


@pytest.mark.parametrize("scorer", READERS)
@pytest.mark.parametrize(
    ("answer", "gold", "is_right"),
    [
        ("1 1/2", "3/2", True),
        ("1 1/2", "11/2", False),
        ("2½", "2.5", True),
        ("3 4", "34", False),
        (r"3\!4", "34", False),
        ("100  2", "1002", False),
        ("1e3", "1000", True),
        ("1e3", "1", False),
        ("2.5e-1", "1/4", True),
        (r"3 \times 10^4", "30000", True),
        (r"-\frac{3}{-4}", "3/4", True),
        ("{5}", "5", True),
        ("–5", "-5", True),
        ("–5", "5", False),
        ("3 / 4", "0.75", True),
        ("４２", "42", True),
        ("٤٢", "42", True),
        ("1，234。", "1234", True),
        (r"1\,234", "1234", True),
        (r"12\,34", "1234", False),
        ("1, 234", "1234", False),
    ],
)
def test_every_scorer_reads_a_number_alike(scorer, answer, gold, is_right):
    for written, expected in ((answer, gold), (gold, answer)):
        item = Problem(id="p", messages=({"role": "user", "content": "Q"},), answer=expected)
        if scorer == "number" and value(expected) is None:
            continue
        response = READERS[scorer].format(written)
        assert score(response, item, scorer).correct is is_right, (response, expected)


@pytest.mark.parametrize("answer", ["3 4", r"3\!4", r"\text{3 4}", "3% 4"])
def test_two_numbers_are_not_the_first_of_them(answer):
    for gold in ("34", "3", "4"):
        item = Problem(id="p", messages=({"role": "user", "content": "Q"},), answer=gold)
        for scorer in ("boxed", "answer_line", "math_verify", "dual"):
            assert not score(READERS[scorer].format(answer), item, scorer).correct


def test_a_mixed_number_is_no_row_of_numbers():
    item = Problem(id="p", messages=({"role": "user", "content": "Q"},), answer="1 1/2")
    for scorer in ("math_verify", "dual"):
        assert score(r"It is $\frac{6}{4}$.", item, scorer).correct


@pytest.mark.parametrize("answer", ["5 or 6", "12:30", "1e3, 1e4", "5 6", "5! = 120", "1½ or 5"])
def test_dual_takes_no_number_of_several(answer):
    """math-verify takes the first number of a sentence, which is one of two answers."""
    for gold in ("5", "12", "1000", "3/2", "1"):
        item = Problem(id="p", messages=({"role": "user", "content": "Q"},), answer=gold)
        assert not score(f"So.\nAnswer: {answer}", item, "dual").correct
    item = Problem(id="p", messages=({"role": "user", "content": "Q"},), answer="5")
    assert score("So.\nAnswer: 5 apples", item, "dual").correct
    assert score(f"\\boxed{{5}}\nAnswer: {answer}", item, "dual").correct


@pytest.mark.parametrize(
    ("text", "spelled"),
    [
        ("thus 1e3 or 2.5e-1 or 1 1/2", "thus 1000 or 1/4 or 3/2"),
        ("x1e3, 0x1e3, 1e3f, 1e999, 3/1e3, 2 3/2", "x1e3, 0x1e3, 1e3f, 1e999, 3/1e3, 2 3/2"),
        ("五是５，x²≤３½", "五是5,x^{2}≤7/2"),
    ],
)
def test_math_verify_gets_what_it_can_read(text, spelled):
    assert spelled_out(text) == spelled


def test_extraction_takes_linear_time():
    began = time.perf_counter()
    for text in (r"\boxed{" * 100_000, "{" * 300_000, "}" * 300_000, "Answer:\n" * 100_000):
        last_boxed(text)
        last_answer_line(text)
    pieces = ("1,", "9", "-$", r"\frac{", "1/", "1 1/", "1\u00a0", "10^{", "½", "^{", "_a", "1e1")
    for text in (100_000 * piece for piece in pieces):
        numbers(text)
        spelled_out(text)
        same_answer(text, "5")
    assert time.perf_counter() - began < 20
