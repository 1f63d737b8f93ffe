"""Solutions read by rule: their format, their sums, and a reward model of four counted features.

A model of five million parameters solves no problem, so whether an answer is right cannot be its reward. What can be
counted in an answer, and what tells preferred from rejected solutions at all, is its shape: steps, calculator
annotations (``<<3*4=12>>``), decimals of whole numbers, whether the last line repeats the last result. `Rules` learns
from the training pairs how much each weighs and says how likely one answer would be preferred to another.
"""

from __future__ import annotations

import ast
import operator
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_ANNOTATION = re.compile(r"<<([^<>]*)>>")
_ENDING = re.compile(r"^#### -?[\d.,]*\d$")
_ANSWER = re.compile(r"^(?:####|A:)\s*\$?(-?[\d.,]*\d)")
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
FEATURES = ("steps", "annotations", "decimals of whole numbers", "last line repeats the last result")


def formatted(text: str) -> bool:
    """Whether the last line is ``#### N``, as in the demonstrations, and every annotation closes.

    Example:
        >>> formatted("2+2 = <<2+2=4>>4\\n#### 4"), formatted("2+2 = <<2+2=4>>4\\nA: 4"), formatted("<<2+2=4\\n#### 4")
        (True, False, False)
    """
    opened, closed = text.count("<<"), text.count(">>")
    return opened == closed == len(_ANNOTATION.findall(text)) and bool(_ENDING.match(_lines(text)[-1]))


def sums(text: str) -> tuple[int, int]:
    """How many annotations there are, and how many are arithmetically right (to half a unit of the last digit given).

    Example:
        >>> sums("<<48/2=24>> <<48+24=73>> <<2*(3+1)=8>> <<twelve=12>> <<10/3=3.33>>")
        (5, 3)
    """
    found = _ANNOTATION.findall(text)
    return len(found), sum(map(_right, found))


def features(text: str) -> np.ndarray:
    """What `Rules` weighs, [4], in the order of `FEATURES`; counts end at 12."""
    lines = _lines(text)
    results = [each.rpartition("=")[2] for each in _ANNOTATION.findall(text)]
    answer = _ANSWER.match(lines[-1])
    repeated = bool(answer and results and _number(answer[1]) == _number(results[-1]) is not None)
    counts = [len(lines) - bool(answer), len(results), text.count(".0>>")]
    return np.array([*(min(count, 12) for count in counts), repeated], dtype=float)


@dataclass(frozen=True)
class Rules:
    """P(a is preferred to b) = σ(w·(f(a) − f(b))), a logistic regression without intercept on pairs.

    Args:
        weights: w, [4], in the order of `FEATURES`.
    """

    weights: np.ndarray

    @classmethod
    def learnt(cls, pairs: Sequence[tuple[str, str]], penalty: float = 1.0) -> Rules:
        """From (chosen, rejected) pairs, by Newton's method with an L2 penalty.

        Example:
            >>> longer = [("1\\n2\\n#### 2", "1\\n#### 2")] * 30 + [("1\\n#### 2", "1\\n2\\n#### 2")] * 10
            >>> rules = Rules.learnt(longer)
            >>> round(rules.preferred("1\\n2\\n3\\n#### 3", "1\\n2\\n#### 3"), 1)
            0.7
        """
        x = np.stack([features(chosen) - features(rejected) for chosen, rejected in pairs])
        weights = np.zeros(x.shape[1])
        for _ in range(25):
            p = 1 / (1 + np.exp(-x @ weights))
            slope = x.T @ (1 - p) - penalty * weights
            bend = (x * (p * (1 - p))[:, None]).T @ x + penalty * np.eye(len(weights))
            weights = weights + np.linalg.solve(bend, slope)
        return cls(weights)

    def preferred(self, a: str, b: str) -> float:
        """How likely a would be preferred to b."""
        return float(1 / (1 + np.exp(-self.weights @ (features(a) - features(b)))))

    def accuracy(self, pairs: Sequence[tuple[str, str]]) -> float:
        """Share of (chosen, rejected) pairs that the rules order rightly; ties count half."""
        odds = [self.preferred(chosen, rejected) for chosen, rejected in pairs]
        return float(np.mean([(p > 0.5) + 0.5 * (p == 0.5) for p in odds]))


def _lines(text: str) -> list[str]:
    return text.strip().split("\n")


def _right(annotation: str) -> bool:
    left, _, right = annotation.rpartition("=")
    given, value = _number(right), _value(left)
    if given is None or value is None:
        return False
    digits = len(right.strip().partition(".")[2])
    return abs(value - given) <= 0.5001 * 10.0**-digits


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", "").replace("$", "").strip())
    except ValueError:
        return None


def _value(text: str) -> float | None:
    """Of +, −, ·, / and brackets; None for anything else: a model wrote it, so nothing is run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # such as "2if"
            tree = ast.parse(text.replace(",", "").replace("$", "").replace("%", "/100").strip()[:80], mode="eval")
        return _node(tree.body)
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError, RecursionError, MemoryError):
        return None


def _node(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return float(node.value)  # type: ignore[arg-type]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_node(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return float(_OPERATORS[type(node.op)](_node(node.left), _node(node.right)))
    raise ValueError("no sum")
