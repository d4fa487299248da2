"""Rewards for mathematics with a known answer: GSM8K, MATH, arithmetic in worked steps."""

import contextlib
import re
from fractions import Fraction
from itertools import pairwise

from rljax.rewards.base import Score, Span
from rljax.rewards.expression import NotAnExpression, evaluate
from rljax.rewards.latex import normal_form, same_answer

_DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
# A minus belongs to the number unless it subtracts: "10-3" and "x-3" end in 3, "= -3" in -3.
_NUMBER = re.compile(rf"(?<![\w.)\]}}])-?\$?{_DIGITS}|{_DIGITS}")
_FINAL_ANSWER = re.compile(r"final answer is:?\s*(.+)", re.IGNORECASE)
_MATH_SPAN = re.compile(r"(?<!\\)\$\$?([^$]+?)(?<!\\)\$")
_CALCULATION = re.compile(r"<<[^<>=]*=([^<>=]*)>>")
_ARITHMETIC_ANSWER = re.compile(r"=|#+|answer(?: is)?:?", re.IGNORECASE)
_ARITHMETIC = "0123456789.+-*/×÷() "
_BOX = re.compile(r"\\f?box(?:ed)?(?![a-zA-Z])\s*(?:(?P<open>\{)|(?P<bare>[^\s${}]+))?|\\.|[{}]", re.DOTALL)
MAX_DIGITS = 1000  # a longer number is no answer; Python refuses to read one of 4,300


def gsm8k(prompt: str, completion: str, answer: str | float) -> Score:
    """1 if the completion's last number equals the reference, commas and dollar signs removed, compared exactly.

    ``answer`` is GSM8K's whole solution (what stands behind ``####`` counts) or a number; so it serves SVAMP too.
    """
    given, expected = last_number(completion), last_number(reference_answer(answer))
    correct = given is not None and given == expected
    return Score(float(correct), correct, None if given is None else str(given))


def gsm8k_steps(prompt: str, completion: str, answer: str) -> Score:
    """Dense form (arXiv 2403.04642): the share of the reference's results, the final one too, that appear in order.

    The results are those of its ``<<16-3-4=9>>`` calculations; each that is found is a span of equal value. ``correct``
    is that of ``gsm8k``.
    """
    expected = [number for result in _CALCULATION.findall(answer) if (number := last_number(result)) is not None]
    final = last_number(reference_answer(answer))
    if final is not None and expected[-1:] != [final]:
        expected.append(final)
    spans: list[Span] = []
    found = [(match, _as_fraction(match[0])) for match in _NUMBER.finditer(completion)]
    place = 0
    for number in expected:
        hit = next((k for k in range(place, len(found)) if found[k][1] == number), None)
        if hit is not None:
            spans.append(Span(*found[hit][0].span(), 1 / len(expected)))
            place = hit + 1
    value = len(spans) / max(len(expected), 1)
    return gsm8k(prompt, completion, answer)._replace(value=value, spans=tuple(spans))


def math_answer(prompt: str, completion: str, answer: str | float) -> Score:
    """1 if the final answer equals the reference as ``rljax.rewards.latex.same_answer`` has it: MATH, AIME, AMC.

    The final answer is the last ``\\boxed{...}``; without one, what follows the last "final answer is"; without that,
    the last ``$...$``.
    """
    given = final_answer(completion)
    if given is None:
        return Score(0.0, False)
    correct = same_answer(given, str(answer))
    return Score(float(correct), correct, normal_form(str(answer)) if correct else normal_form(given))


def arithmetic(prompt: str, completion: str, answer: str | int) -> Score:
    """1 if what stands behind the last ``=``, ``#`` or "answer", to the end of the text, is exactly the answer.

    The part ``steps`` is the share of equations ``a = b`` in the text that hold; 0 if there are none.
    """
    given = _ARITHMETIC_ANSWER.split(completion)[-1].strip()
    correct = given == str(answer).strip()
    return Score(float(correct), correct, given or None, {"steps": _share_of_true_equations(completion)})


def reference_answer(answer: str | float) -> str:
    """GSM8K's reference: what stands behind ``####``, or the whole if there is no such mark."""
    return str(answer).rpartition("####")[2].strip()


def last_number(text: str) -> Fraction | None:
    """The last number in a text, None if there is none. ``3/4`` is two numbers, as in every GSM8K checker."""
    numbers = _NUMBER.findall(text)
    return _as_fraction(numbers[-1]) if numbers else None


def final_answer(text: str) -> str | None:
    """The answer that a solution to a MATH problem announces, None if it announces none."""
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    announced = _FINAL_ANSWER.findall(text)
    if announced:
        answer = announced[-1].partition("I hope it is correct")[0].strip().rstrip(".").strip()
        inside = _MATH_SPAN.match(answer)
        return inside[1].strip() if inside else answer
    spans = _MATH_SPAN.findall(text)
    return spans[-1].strip() if spans else None


def last_boxed(text: str) -> str | None:
    """The content of the last ``\\boxed{...}`` whose braces close, or of ``\\boxed 5``; ``\\fbox`` counts."""
    boxes: list[tuple[int, str]] = []
    open_braces: list[int | None] = []  # where the content of a box starts, None for any other brace
    for match in _BOX.finditer(text):
        if match[0] == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None:
                boxes.append((start, text[start : match.start()].strip()))
        elif match[0] == "{":
            open_braces.append(None)
        elif match["open"]:
            open_braces.append(match.end())
        elif match["bare"]:
            boxes.append((match.end(), match["bare"].rstrip(".,")))
    return max(boxes)[1] if boxes else None


def _as_fraction(number: str) -> Fraction | None:
    return Fraction(number.replace(",", "").replace("$", "")) if len(number) <= MAX_DIGITS else None


def _share_of_true_equations(text: str) -> float:
    true, count = 0, 0
    for left, right in pairwise(text.split("=")):
        expression = left[len(left.rstrip(_ARITHMETIC)) :].replace(" ", "").replace("×", "*").replace("÷", "/")
        result = re.match(r"\s*(-?\d+(?:\.\d+)?)", right)
        if result and any(map(str.isdigit, expression)):
            count += 1
            with contextlib.suppress(NotAnExpression):
                true += evaluate(expression, float) == evaluate(result[1], float)
    return true / max(count, 1)
