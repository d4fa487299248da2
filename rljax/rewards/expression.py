"""Evaluates small LaTeX expressions: exact fractions where possible, floats where not, never ``eval``."""

import math
import re
from collections.abc import Callable
from fractions import Fraction

Number = Fraction | float

MAX_CHARACTERS = 300
MAX_DEPTH = 40
MAX_BITS = 4096  # of an exact power; 9^{9^9} must not be tried

_TOKEN = re.compile(r"\d+(?:\.\d*)?|\.\d+|\\(?:frac|sqrt|pi|cdot|times|div)|[a-zA-Z]|[-+*/^(){}\[\]]")
_COMMAND = re.compile(r"\\(?:frac|sqrt|pi|cdot|times|div)")
_WORD = re.compile(r"[a-zA-Z]{3,}")
_TIMES, _DIVIDE = {"*", r"\cdot", r"\times"}, {"/", r"\div"}


class NotAnExpression(ValueError):
    """Text that this small grammar does not read, or a value that does not exist."""


def evaluate(latex: str, letter_value: Callable[[str], float]) -> Number:
    """The value with every letter replaced. Without letters and roots it is an exact Fraction.

    Reads + - * / ^, ``\\cdot \\times \\div \\frac \\sqrt[n] \\pi``, brackets, products without a sign and mixed numbers
    (``1\\frac{4}{5}`` is nine fifths). Raises NotAnExpression for anything else, words of three letters included.
    """
    tokens = _TOKEN.findall(latex)
    if not tokens or len(latex) > MAX_CHARACTERS or "".join(tokens) != latex:
        raise NotAnExpression(latex)
    if _WORD.search(_COMMAND.sub(" ", latex)):
        raise NotAnExpression(latex)
    try:
        value = _Parser(tokens, letter_value).whole()
        if isinstance(value, complex) or not math.isfinite(value):
            raise NotAnExpression(latex)
    except (ArithmeticError, TypeError) as error:  # division by zero, overflow, an ordering of complex numbers
        raise NotAnExpression(latex) from error
    return value


class _Parser:
    """Recursive descent: sum, product, power, atom."""

    def __init__(self, tokens: list[str], letter_value: Callable[[str], float]):
        self._tokens = [*tokens, ""]
        self._place = 0
        self._depth = 0
        self._letter_value = letter_value

    def whole(self) -> Number:
        value = self._sum()
        if self._next:
            raise NotAnExpression
        return value

    @property
    def _next(self) -> str:
        return self._tokens[self._place]

    def _take(self, *expected: str) -> str:
        token = self._next
        if not token or (expected and token not in expected):
            raise NotAnExpression
        self._place += 1
        return token

    def _sum(self) -> Number:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise NotAnExpression
        value = self._product()
        while self._next in ("+", "-"):
            value = value + self._product() if self._take() == "+" else value - self._product()
        self._depth -= 1
        return value

    def _product(self) -> Number:
        if self._next in ("+", "-"):
            return -self._product() if self._take() == "-" else self._product()
        value = self._power()
        while True:
            if self._next in _TIMES:
                self._take()
                value = value * self._signed_power()
            elif self._next in _DIVIDE:
                self._take()
                value = value / self._signed_power()
            elif self._next not in ("", "+", "-", "^", ")", "}", "]"):
                value = value * self._power()
            else:
                return value

    def _signed_power(self) -> Number:
        if self._next == "-":
            self._take()
            return -self._power()
        return self._power()

    def _power(self) -> Number:
        base = self._atom()
        if self._next != "^":
            return base
        self._take()
        exponent = self._signed_power() if self._next == "-" else self._atom()
        if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
            bits = max(base.numerator.bit_length(), base.denominator.bit_length())
            if abs(exponent) * bits > MAX_BITS:
                raise NotAnExpression
            return base**exponent
        return float(base) ** float(exponent)

    def _atom(self) -> Number:
        token = self._take()
        if token in ("(", "{", "["):
            value = self._sum()
            self._take({"(": ")", "{": "}", "[": "]"}[token])
            return value
        if token == r"\frac":
            return self._argument() / self._argument()
        if token == r"\sqrt":
            return self._root()
        if token == r"\pi":
            return math.pi
        if token.isalpha():
            return self._letter_value(token)
        if token[0].isdigit() or token[0] == ".":
            return self._number(token)
        raise NotAnExpression

    def _argument(self) -> Number:
        """What stands behind a command: braces or one character, so ``\\frac12`` is a half."""
        token = self._next
        if token.isdigit() and len(token) > 1:
            self._tokens[self._place : self._place + 1] = list(token)
        return self._number(self._take()) if self._next.isdigit() else self._atom()

    def _number(self, token: str) -> Number:
        value = Fraction(token)
        if self._next == r"\frac" and token.isdigit():  # 1\frac{4}{5} adds where 2\frac{x}{3} multiplies
            ahead = re.match(r"\\frac\{?(\d+)\}?\{?(\d+)\}?", "".join(self._tokens[self._place :]))
            if ahead:
                return value + self._atom()
        return value

    def _root(self) -> Number:
        degree: Number = Fraction(2)
        if self._next == "[":
            self._take()
            degree = self._sum()
            self._take("]")
        value = self._argument()
        if value < 0:
            raise NotAnExpression
        root = float(value) ** (1 / float(degree))
        nearest = Fraction(round(root))
        exact = isinstance(value, Fraction) and degree in (2, 3) and nearest ** int(degree) == value
        return nearest if exact else root
