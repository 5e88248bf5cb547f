"""The calculator behind a model's python calls: a few kinds of expressions, computed by walking their syntax tree.

Known are numbers with + - * / // % and brackets, and text.count(text) on two literals: what GSM8K's annotations and questions
about letters need, and what nanochat's engine lets through. Nothing is ever passed to eval.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable
from typing import Any

MAX_CHARACTERS = 256  # of an expression; it bounds the size of every number that can come out
MAX_DEPTH = 64  # of its syntax tree
_DIGITS = 10  # significant digits of a fraction: 0.1 + 0.2 is 0.3, as GSM8K's annotations have it
_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_SEPARATOR = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")  # of thousands


def calculate(expression: str) -> str | None:
    """The result as text, or None where the expression is not one of those known or has no finite value (1/0).

    Whole numbers are written without ".0", fractions with ten significant digits at most.
    """
    text = expression.strip()
    if not text or len(text) > MAX_CHARACTERS:
        return None
    if "'" not in text and '"' not in text:
        text = _SEPARATOR.sub("", text).replace("$", "")
    try:
        tree = ast.parse(text, mode="eval")
        return _format(_value(tree.body, 0))
    except (SyntaxError, ValueError, ArithmeticError, TypeError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr, depth: int) -> int | float:
    """Value of a node; ValueError for whatever is not known."""
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value  # type: ignore[return-value]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand, depth + 1)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left, depth + 1), _value(node.right, depth + 1))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "count":
        if len(node.args) != 1 or node.keywords:
            raise ValueError("count takes one text")
        return _text(node.func.value).count(_text(node.args[0]))
    raise ValueError(f"{type(node).__name__} is not known")


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    raise ValueError("not a text literal")


def _format(value: int | float) -> str:
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError("not finite")
        if value == int(value) and abs(value) < 1e15:
            return str(int(value))
        return f"{value:.{_DIGITS}g}"
    return str(value)
