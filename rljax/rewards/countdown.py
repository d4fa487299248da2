"""The countdown game: reach a target with + - * / from given numbers."""

import ast
import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

from rljax.rewards.base import Score

MAX_CHARACTERS = 200
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_ALLOWED = re.compile(r"[\d+\-*/() ]+")
_SIGNS = str.maketrans({"×": "*", "÷": "/", "−": "-", "·": "*"})


def countdown(prompt: str, completion: str, numbers: Sequence[int] | str, target: int | str) -> Score:
    """1 if the expression reaches the target and uses each number exactly once.

    The expression is what the last ``<answer>`` tag holds; without tags, what stands behind the last ``#``; without
    that, the last line; each time left of ``=``. ``numbers`` may be text, "30,100,93". Parts: ``valid``, it can be
    evaluated; ``numbers``, it uses the right ones. ``answer`` is its value.
    """
    return _score(completion, numbers, target, exactly_once=True)


def countdown_subset(prompt: str, completion: str, numbers: Sequence[int] | str, target: int | str) -> Score:
    """As ``countdown``, but numbers may be left unused (each at most once)."""
    return _score(completion, numbers, target, exactly_once=False)


def _score(completion: str, numbers: Sequence[int] | str, target: int | str, *, exactly_once: bool) -> Score:
    given = Counter(int(number) for number in (numbers.split(",") if isinstance(numbers, str) else numbers))
    try:
        value, used = evaluate(expression_of(completion))
    except ValueError:
        return Score(0.0, False, None, {"valid": 0.0, "numbers": 0.0})
    fits = used == given if exactly_once else used <= given
    correct = fits and value == int(target)
    return Score(float(correct), correct, str(value), {"valid": 1.0, "numbers": float(fits)})


def expression_of(completion: str) -> str:
    """The last expression that the completion offers as its answer; empty if there is none."""
    tagged = _TAGGED.findall(completion)
    lines = (tagged[-1] if tagged else completion.rpartition("#")[2]).strip().splitlines()
    return lines[-1].partition("=")[0].strip().translate(_SIGNS) if lines else ""


def evaluate(expression: str) -> tuple[Fraction, Counter[int]]:
    """The exact value of + - * / over whole numbers, and how often each is used. Raises ValueError for all else."""
    if len(expression) > MAX_CHARACTERS or not _ALLOWED.fullmatch(expression):
        raise ValueError(f"not an expression of whole numbers and + - * /: {expression[:MAX_CHARACTERS]!r}")
    used: Counter[int] = Counter()

    def value(node: ast.expr) -> Fraction:
        match node:
            case ast.Constant(value=int(number)):
                used[number] += 1
                return Fraction(number)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -value(operand)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return value(left) + value(right)
            case ast.BinOp(left=left, op=ast.Sub(), right=right):
                return value(left) - value(right)
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                return value(left) * value(right)
            case ast.BinOp(left=left, op=ast.Div(), right=right):
                return value(left) / value(right)
        raise ValueError(f"{ast.unparse(node)} is not one of + - * / over whole numbers")

    try:
        return value(ast.parse(expression, mode="eval").body), used
    except (SyntaxError, ZeroDivisionError, MemoryError, RecursionError) as error:
        raise ValueError(f"{expression!r} has no value: {type(error).__name__}") from error
