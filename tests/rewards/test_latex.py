"""Equality of mathematical answers: hand-picked pairs, all pairs of MATH-500's answers, and hostile text."""

import itertools
import json
from fractions import Fraction

import pytest

from rljax.rewards.expression import NotAnExpression, evaluate
from rljax.rewards.latex import normal_form, same_answer

pytestmark = pytest.mark.fast

SAME = [
    (r"\frac{1}{2}", "0.5"),
    (r"\dfrac12", "1/2"),
    (r"-\frac12", r"\frac{-1}{2}"),
    (r"1\frac{4}{5}", "9/5"),
    (r"137 \frac{1}{2}", "137.5"),
    (".5", "0.50"),
    ("27.0", "27"),
    (r"\text{Evelyn}", "Evelyn"),
    (r"\text{(C)}", "C"),
    (r"5.4 \text{ cents}", "5.4"),
    (r"864 \mbox{ inches}^2", "864"),
    ("10 cm", "10"),
    ("90 degrees", r"90^\circ"),
    (r"\$32,\!348", "32348"),
    ("$18", r"\$18.00"),
    ("50\\%", "50"),
    ("1,000,000", "1000000"),
    ("x=5", "5"),
    (r"x \in [-2,7]", r"\left[-2, 7\right]"),
    (r"11\sqrt2", r"11 \sqrt{2}"),
    (r"\frac{\sqrt3}{3}", r"\frac{1}{\sqrt{3}}"),
    (r"\sqrt[3]{8}", "2"),
    (r"\pi r^2", r"r^{2}\pi"),
    ("ab+2a+5b+10", "(a+5)(b+2)"),
    ("y = 3 + 2x", "y=2x+3"),
    ("x^{-1}", r"\frac{1}{x}"),
    ("6 - 5i", "-5i + 6"),
    (r"\left( \frac{3}{2}, -13 \right)", "(1.5,-13)"),
    ("1,-2", "-2, 1"),
    (r"3 \text{ and } 5", "5, 3"),
    (r"\{1, 2\}", r"\{2, 1\}"),
    (r"1 \pm \sqrt{19}", r"1-\sqrt{19}, 1+\sqrt{19}"),
    (r"(0,9) \cup (9,36)", r"(9,36)\cup(0,9)"),
    (r"\begin{pmatrix} 1/2 \\ 3 \end{pmatrix}", r"\begin{bmatrix} 0.5 \\ 3 \end{bmatrix}"),
    ("4210_{5}", "4210_5"),
    (r"x \le 3", r"x \leq 3"),
]
DIFFERENT = [
    ("1/3", "0.333"),
    (r"\sqrt{2}", "1.414"),
    ("(1,2)", "(2,1)"),
    ("(1,2]", "(1,2)"),
    ("[1,2]", "(1,2)"),
    ("(1,2)", r"\{1,2\}"),
    (r"\begin{pmatrix} 1 & 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    ("1,2", "1,2,3"),
    ("1,1,2", "1,2,2"),
    ("52_8", "52"),
    ("2xy", "2"),
    ("1 2", "12"),
    ("east", "seat"),
    ("-x^2", "(-x)^2"),
    ("b-a", "c-b"),
    ("x+1", "y+1"),
    ("<5", "5"),
    ("x<=3", "x>=3"),
    ("", ""),
    (r"\frac{1}{0}", r"\frac{2}{0}"),
]


@pytest.mark.parametrize(("a", "b"), SAME)
def test_same(a, b):
    assert same_answer(a, b) and same_answer(b, a)


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_different(a, b):
    assert not same_answer(a, b) and not same_answer(b, a)


def test_normal_form_is_what_votes_count():
    assert normal_form(r"\dfrac{2}{4}") == normal_form("0.5") == normal_form("0.5\\%") == "1/2"
    assert normal_form("10,\\!080") == "10080"
    assert normal_form(r"\text{ellipse}.") == "ellipse"


def test_all_pairs_of_math500(data_dir):
    """Of all pairs of answers that are not plain whole numbers, exactly these are equal: no false friends."""
    lines = (data_dir / "datasets/math/math500.jsonl").read_text().splitlines()
    answers = sorted({json.loads(line)["answer"] for line in lines})
    assert all(same_answer(answer, answer) for answer in answers)
    rest = [answer for answer in answers if not answer.lstrip("-").isdigit()]
    equal = {pair for pair in itertools.combinations(rest, 2) if same_answer(*pair)}
    assert equal == {
        ("-2,1", "1,-2"),
        (r"2 \sqrt{5}", r"2\sqrt{5}"),
        (r"36^\circ", r"\$36"),
        (r"\frac14", r"\frac{1}{4}"),
    }


def test_evaluate_is_exact_without_roots_and_letters():
    assert evaluate(r"\frac{1}{3}+\frac16", float) == Fraction(1, 2)
    assert evaluate(r"2^{-3}\cdot8-\sqrt{16}/2", float) == Fraction(-1)
    assert evaluate("2x^2", lambda letter: 3.0) == 18.0


@pytest.mark.parametrize(
    "text",
    [
        "9^{9^9}",
        "(((9^99)^99)^99)^99",
        "(" * 90 + "1" + ")" * 90,
        "-" * 299,
        "1+",
        "2 3",
        "abc",
        "1/0",
        "(-8)^{1/3}",
        "",
    ],
)
def test_evaluate_refuses_what_it_should_not_try(text):
    with pytest.raises(NotAnExpression):
        evaluate(text, lambda letter: 1.5)


@pytest.mark.parametrize(
    "text", ["(1," * 4000, "{" * 9000, "9" * 9000, " " * 50000, "\\" * 9000, "\\frac" * 80], ids=range(6)
)
def test_hostile_text_is_only_text(text):
    assert not same_answer(text, "1")
    assert same_answer("1", text) is False
