"""Mathematical rewards: three strings each at least, then every reference solution of the real data sets."""

import json
from fractions import Fraction
from itertools import pairwise

import pytest

from rljax.rewards.base import Span
from rljax.rewards.countdown import countdown, countdown_subset, evaluate, expression_of
from rljax.rewards.math import arithmetic, final_answer, gsm8k, gsm8k_steps, last_boxed, last_number, math_answer

pytestmark = pytest.mark.fast


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("completion", "value", "answer"),
    [
        ("She makes 9 * 2 = $18 every day.", 1.0, "18"),
        ("#### 18.00", 1.0, "18"),
        ("so 9 eggs, which is 17", 0.0, "17"),
        ("18 dollars for 2 eggs", 0.0, "2"),
        ("-18", 0.0, "-18"),
        ("1,018", 0.0, "1018"),
        ("no idea", 0.0, None),
    ],
)
def test_gsm8k(completion, value, answer):
    score = gsm8k("", completion, "Janet sells 9.\n#### 18")
    assert (score.value, score.correct, score.answer) == (value, value == 1.0, answer)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("10-3", 3),
        ("x = -3.", -3),
        ("-$5", -5),
        ("109,200,000 bees", 109_200_000),
        ("1,2,3", 3),
        ("between 10,20", 20),
        (".5", Fraction(1, 2)),
        ("none", None),
        ("7" * 2000, None),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == number


def test_gsm8k_steps_gives_spans_that_sum_to_the_value():
    reference = "16-3-4 = <<16-3-4=9>>9.\n9*2 = $<<9*2=18>>18.\n#### 18"
    assert gsm8k_steps("", "She has 9 eggs and gets $18", reference)[:3] == (1.0, True, "18")
    half = gsm8k_steps("", "9 eggs, so 9 dollars", reference)
    assert half.value == 0.5 and half.correct is False and half.spans == (Span(0, 1, 0.5),)
    assert gsm8k_steps("", "18 and then 9", reference).value == 0.5  # in order: after 18 was not yet due, 9 counts
    assert gsm8k_steps("", "", reference).value == 0.0


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"Hence \boxed{\frac{1}{2}}, or so.", r"\frac{1}{2}"),
        (r"\boxed{1} and then \boxed{\boxed{2}}", "2"),
        (r"\boxed 5.", "5"),
        (r"\fbox{7}", "7"),
        (r"so \boxed{3} and \boxed{\frac{1}{2", "3"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"$x=2$. Final Answer: The final answer is $\sqrt{2}$. I hope it is correct.", r"\sqrt{2}"),
        ("The final answer is 12.", "12"),
        ("first $x=1$, then $$y=2$$ it costs \\$5.", "y=2"),
        ("twelve", None),
    ],
)
def test_final_answer_boxed_then_announced_then_last_formula(completion, answer):
    assert final_answer(completion) == answer


def test_last_boxed_of_unclosed_boxes_takes_linear_time():
    assert last_boxed(r"\boxed{" * 20_000) is None


def test_math_answer():
    assert math_answer("", r"thus \boxed{0.5}", r"\frac12")[:3] == (1.0, True, "1/2")
    assert math_answer("", r"thus \boxed{5}", 27.0)[:3] == (0.0, False, "5")
    assert math_answer("", r"\boxed{27}", 27.0).value == 1.0
    assert math_answer("", "thus 27", 27)[:3] == (0.0, False, None)
    # A right answer votes under the reference's name, however it was written.
    assert math_answer("", r"\boxed{2+\sqrt3}", r"\sqrt{3}+2").answer == r"\sqrt{3}+2"


@pytest.mark.parametrize(
    ("completion", "value", "steps"),
    [
        ("12+30=42\n42+5=47", 1.0, 1.0),
        ("12+30=43\n43+4=47", 1.0, 0.5),
        ("1 + 2×3 = 7 #### 47", 1.0, 1.0),
        ("12+30=42;42+5=47;#47", 1.0, 1.0),
        ("The answer is 47", 1.0, 0.0),
        ("47", 1.0, 0.0),
        ("47 eggs", 0.0, 0.0),
        ("12+35=47.", 0.0, 1.0),
        ("12+35=047", 0.0, 1.0),
        ("", 0.0, 0.0),
    ],
)
def test_arithmetic_with_worked_steps(completion, value, steps):
    score = arithmetic("", completion, 47)
    assert (score.value, score.correct, score.parts["steps"]) == (value, value == 1.0, steps)


@pytest.mark.parametrize(
    ("completion", "full", "subset", "parts"),
    [
        ("(30 + 93) - 100 = 23", 1.0, 1.0, (1.0, 1.0)),
        ("I try.\n<answer>30 + 93 − 100</answer>", 1.0, 1.0, (1.0, 1.0)),
        ("30+93=123;123-100=23;#(30+93)-100", 1.0, 1.0, (1.0, 1.0)),
        ("30 + 93 - 100 + 30 - 30", 0.0, 0.0, (1.0, 0.0)),
        ("23", 0.0, 0.0, (1.0, 0.0)),
        ("93 - 30", 0.0, 0.0, (1.0, 0.0)),
        ("30 * 93 - 100", 0.0, 0.0, (1.0, 1.0)),
        ("30 + 93 - ", 0.0, 0.0, (0.0, 0.0)),
        ("30 / (93 - 93)", 0.0, 0.0, (0.0, 0.0)),
        ("__import__('os')", 0.0, 0.0, (0.0, 0.0)),
        ("9**9**9", 0.0, 0.0, (0.0, 0.0)),
        ("30(93)", 0.0, 0.0, (0.0, 0.0)),
        ("", 0.0, 0.0, (0.0, 0.0)),
    ],
)
def test_countdown(completion, full, subset, parts):
    score = countdown("", completion, [30, 100, 93], 23)
    assert (score.value, score.correct) == (full, full == 1.0)
    assert (score.parts["valid"], score.parts["numbers"]) == parts
    assert countdown_subset("", completion, "30,100,93", "23").value == subset


def test_countdown_subset_may_leave_numbers():
    assert countdown("", "93-70", [93, 70, 5], 23).value == 0.0
    assert countdown_subset("", "93-70", [93, 70, 5], 23).value == 1.0
    assert countdown_subset("", "93-70*1", [93, 70, 5], 23).value == 0.0


def test_countdown_evaluates_exactly():
    assert evaluate("1/3+1/3+1/3")[0] == 1
    assert expression_of("a\n 1 + 2 = 3 \n\n") == "1 + 2"
    with pytest.raises(ValueError, match="not an expression"):
        evaluate("1+" * 500 + "1")


def test_every_gsm8k_reference_solution_scores_one(data_dir):
    for split, count in (("train", 7473), ("test", 1319)):
        rows = read(data_dir / f"datasets/gsm8k/{split}.jsonl")
        assert sum(gsm8k("", row["answer"], row["answer"]).value for row in rows) == len(rows) == count
        # The next row's solution is right only where the two answers happen to agree.
        for row, following in pairwise(rows):
            agree = row["answer"].split("####")[1] == following["answer"].split("####")[1]
            assert gsm8k("", following["answer"], row["answer"]).correct is agree


def test_every_gsm8k_reference_solution_takes_all_its_steps(data_dir):
    rows = read(data_dir / "datasets/gsm8k/test.jsonl")
    assert {gsm8k_steps("", row["answer"], row["answer"]).value for row in rows} == {1.0}


def test_every_math500_reference_solution_scores_one(data_dir):
    rows = read(data_dir / "datasets/math/math500.jsonl")
    assert sum(math_answer("", row["solution"], row["answer"]).value for row in rows) == len(rows) == 500
    for row, following in pairwise(rows):
        agree = row["answer"].removeprefix("x=") == following["answer"].removeprefix("x=")
        assert math_answer("", following["solution"], row["answer"]).correct is agree


def test_aime_amc_and_svamp_rows(data_dir):
    for name, count in (("aime24", 30), ("amc23", 40)):
        rows = read(data_dir / f"datasets/math/{name}.jsonl")
        assert len(rows) == count
        for row in rows:
            assert math_answer("", rf"So $\boxed{{{int(row['answer'])}}}$.", row["answer"]).value == 1.0
            assert math_answer("", rf"So $\boxed{{{int(row['answer']) + 1}}}$.", row["answer"]).value == 0.0
    rows = read(data_dir / "datasets/math/svamp_test.jsonl")
    assert len(rows) == 1000
    for row in rows:
        assert gsm8k("", f"It is {row['Answer']:,}.", row["Answer"]).value == 1.0


def test_countdown_rows_can_be_solved(data_dir):
    """A brute-force search over the real rows finds a solution, and the reward agrees."""
    rows = read(data_dir / "datasets/countdown/countdown_cd3_test.jsonl")
    assert len(rows) == 256
    for row in rows:
        a, b, c = row["input"].split(",")
        candidates = [
            f"({x}{f}{y}){g}{z}" if left else f"{x}{f}({y}{g}{z})"
            for x, y, z in ((a, b, c), (a, c, b), (b, a, c), (b, c, a), (c, a, b), (c, b, a))
            for f in "+-*/"
            for g in "+-*/"
            for left in (True, False)
        ]
        assert any(countdown("", text, row["input"], row["output"]).value for text in candidates)
