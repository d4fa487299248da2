"""Equality of answers in LaTeX: a normal form for strings, then comparison part by part and by value."""

import itertools
import random
import re
from fractions import Fraction

from rljax.rewards.expression import NotAnExpression, Number, evaluate

MAX_CHARACTERS = 500

_SPELLINGS = [  # applied in this order
    (r"\\\\(?:\[[^]]*\])?", "\n"),  # a row of a matrix ends
    (r"[−–]", "-"),
    (r"×", r"\\times"),
    (r"÷", r"\\div"),
    (r"π", r"\\pi"),
    (r"∞", r"\\infty"),
    (r"∪", r"\\cup"),
    (r"√", r"\\sqrt"),
    (r"\\[dtc]frac", r"\\frac"),
    (r",?\s*(?:\\text\{\s*(?:and|or)\s*\}|(?<=\s)(?:and|or)(?=\s))", ","),
    (r",\\!\s*", ","),  # 10,\!080
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits)(?![a-zA-Z])", ""),
    (r"\\(?:[,:;!>]|quad|qquad)|\\ |~", " "),
    (r"\^\s*(?:\\circ(?![a-zA-Z])|\{\s*\\circ\s*\})|\\degree(?![a-zA-Z])|°", ""),
    (r"\\?[%$]", ""),
    (r"\\(?:emptyset|varnothing)(?![a-zA-Z])|∅", r"\\{\\}"),
    (r"\\leq?(?:slant)?(?![a-zA-Z])|≤", "<="),
    (r"\\geq?(?:slant)?(?![a-zA-Z])|≥", ">="),
    (r"\\begin\{[bB]?matrix\}", r"\\begin{pmatrix}"),
    (r"\\end\{[bB]?matrix\}", r"\\end{pmatrix}"),
]
_SPELLING_PATTERNS = [(re.compile(pattern), new) for pattern, new in _SPELLINGS]

_WRAPPED = re.compile(r"\\(?:text|mbox|textbf|textrm|textit|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}")
_UNIT_BEHIND = re.compile(r"\s*\\(?:text|mbox|textrm|mathrm)\s*\{[^{}]*\}(?:\s*\^\s*\{?[23]\}?)?$")
_PLAIN_UNIT = re.compile(
    r"^(-?[\d.,]+(?:/\d+)?)(?:\s*(?:cm|mm|km|ft|in|mi|kg|lb|lbs|oz|hr|min|sec|day|mph)|\s+[a-zA-Z]{4,}(?:\s+[a-zA-Z]+)*)"
    r"\.?(?:\s*\^\s*\{?[23]\}?)?$"
)
_THOUSANDS = re.compile(r"^-?\d{1,3}(?:,\d{3})+(?:\.\d+)?$")
_NAMED = re.compile(r"^[a-zA-Z](?:_\w)?(?:=|\\in(?![a-zA-Z]))(?=[^=]+$)")  # x=5, x\in[-2,7]
_MATRIX = re.compile(r"^\\begin\{pmatrix\}(.*)\\end\{pmatrix\}$", re.DOTALL)
_PAIRS = {"(": ")", "[": "]", "{": "}", r"\{": r"\}"}


def normal_form(latex: str) -> str:
    """One spelling for answers that differ in typography, units, ``x =``, or the form of a rational number.

    Units behind a number, degree, percent and dollar signs go (so 50\\% is 50); ``\\text{Evelyn}`` is Evelyn, ``(C)``
    is C, ``1,000`` is 1000, and 0.5, 1/2, ``\\dfrac12`` are all 1/2. Equal normal forms are equal answers; not the
    reverse. An answer of more than 500 characters stays as it is.
    """
    if len(latex) > MAX_CHARACTERS:
        return latex.strip()
    text = latex.strip().removeprefix(r"\(").removesuffix(r"\)").removeprefix(r"\[").removesuffix(r"\]")
    for pattern, new in _SPELLING_PATTERNS:
        text = pattern.sub(new, text)
    text = _without_unit(text.strip())
    text = _WRAPPED.sub(r"\1", text).strip().rstrip(".").strip()
    text = _PLAIN_UNIT.sub(r"\1", text)
    if _THOUSANDS.match(text):
        text = text.replace(",", "")
    text = re.sub(r"(?<!\d)[ \t]+|[ \t]+(?!\d)", "", text)  # "1 2" is not 12
    text = re.sub(r"([\^_])\{(\w)\}", r"\1\2", text)
    text = _NAMED.sub("", text)
    text = re.sub(r"^\(([a-zA-Z])\)$", r"\1", text)
    value = _value(text, 0)
    return str(value) if isinstance(value, Fraction) else text


def _without_unit(text: str) -> str:
    unit = _UNIT_BEHIND.search(text)
    has_number = unit and re.search(r"\d|\\pi", text[: unit.start()])
    return text[: unit.start()] if unit and has_number else text


def same_answer(given: str, expected: str) -> bool:
    """Whether two answers agree: as normal forms, entry by entry, or in value.

    Tuples, intervals and matrices agree in brackets and in every entry, in order; sets, unions and lists without
    brackets in any order; ``a \\pm b`` is a list of two. Expressions agree if they have the same exact value, or with
    roots and letters the same value at two fixed points, within 1e-9; a decimal is no approximation of a root.
    """
    return _same(normal_form(given), normal_form(expected))


def _same(given: str, expected: str) -> bool:
    if given == expected or len(given) > MAX_CHARACTERS:
        return given == expected != ""
    if _kind(given) != _kind(expected):
        return False
    kind, parts = _split(given)
    _, others = _split(expected)
    if kind == "value":
        return _same_value(given, expected)
    if len(parts) != len(others):
        return False
    if kind in ("list", "union", r"\{"):
        return _same_in_any_order(parts, others)
    return all(_same(normal_form(a), normal_form(b)) for a, b in zip(parts, others, strict=True))


def _kind(text: str) -> str:
    return _split(text)[0]


def _same_in_any_order(parts: list[str], others: list[str]) -> bool:
    left = list(others)
    for part in parts:
        match = next((other for other in left if _same(normal_form(part), normal_form(other))), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _split(text: str) -> tuple[str, list[str]]:
    """The outermost structure and its parts: matrix, union, list, equation, the two brackets, or value."""
    if matrix := _MATRIX.match(text):
        rows = [row.split("&") for row in matrix[1].strip("\n").split("\n")]
        return f"matrix{len(rows[0])}", list(itertools.chain.from_iterable(rows))
    for kind, separator in (("union", r"\cup"), ("list", ","), ("equation", "=")):
        parts = _cut(text, separator)
        if len(parts) > 1:
            return kind, _plus_and_minus(parts) if kind == "list" else parts
    if r"\pm" in text:
        return "list", _plus_and_minus([text])
    opening, closing = (r"\{", r"\}") if text.startswith(r"\{") else (text[:1], text[-1:])
    if opening in _PAIRS and text.endswith(closing) and closing in (")", "]", r"\}"):
        inside = _cut(text[len(opening) : -len(closing)], ",")
        if opening == r"\{":
            return opening, _plus_and_minus(inside)
        if len(inside) > 1:
            return opening + closing, inside
    return "value", [text]


def _cut(text: str, separator: str) -> list[str]:
    """Splits at a separator outside all brackets; intervals may open and close with different ones."""
    depth, start, parts = 0, 0, []
    for place, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0 and text.startswith(separator, place):
            parts.append(text[start:place])
            start = place + len(separator)
    return [*parts, text[start:]]


def _plus_and_minus(parts: list[str]) -> list[str]:
    both = [[part.replace(r"\pm", sign) for sign in "+-"] if r"\pm" in part else [part] for part in parts]
    return [part for pair in both for part in pair]


def _same_value(given: str, expected: str) -> bool:
    for point in (0, 1):
        a, b = _value(given, point), _value(expected, point)
        if a is None or b is None:
            return False
        if isinstance(a, Fraction) and isinstance(b, Fraction):
            if a != b:
                return False
        elif abs(float(a) - float(b)) > 1e-9 * max(1.0, abs(float(b))):
            return False
    return True


def _value(text: str, point: int) -> Number | None:
    """At one of two fixed points, where each letter stands for an unrelated number between 1 and 2."""
    try:
        return evaluate(text, lambda letter: random.Random(f"{letter}{point}").uniform(1, 2))
    except NotAnExpression:
        return None
