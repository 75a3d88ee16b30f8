"""Arithmetic over the values of a trial, such as ``optim.lr * factor``. Nothing else can be called or read."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from detr_ray.printable import shortened
from detr_ray.search.distributions import is_number

Value = int | float | bool

_BINARY: dict[type[ast.operator], Callable[[Value, Value], Value]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: lambda base, exponent: math.pow(base, exponent) if isinstance(base, float) else _power(base, exponent),
}
_COMPARISONS: dict[type[ast.cmpop], Callable[[Value, Value], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
FUNCTIONS: dict[str, Callable[..., Value]] = {"min": min, "max": max, "log10": math.log10, "round": round}
_COUNTS = {"min": (1, 99), "max": (1, 99), "log10": (1, 1), "round": (1, 1)}
_GRAMMAR = "numbers, names, + - * / **, min, max, log10, round, comparisons, and, or"


def _power(base: Value, exponent: Value) -> Value:
    # Whole numbers have no largest one: powers of powers would compute for hours.
    if isinstance(exponent, int) and 0 <= exponent <= 64 and abs(base) < 2**64:
        return base**exponent
    return math.pow(base, exponent)


@dataclass(frozen=True, slots=True)
class Expression:
    """A parsed expression.

    Attributes:
        text: as written.
        names: the names that it uses, in their order: dotted keys and variables.
    """

    text: str
    names: tuple[str, ...]
    _root: ast.expr

    def value(self, values: Mapping[str, object]) -> Value:
        """Computes it.

        Args:
            values: name -> number.

        Raises:
            ValueError: a name has no number as its value, or the result is not a finite number or true or false.
        """
        try:
            result = _evaluate(self._root, values)
        except (ArithmeticError, ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"'{self.text}' cannot be computed: {error}") from error
        if not isinstance(result, bool) and not is_number(result):
            raise ValueError(f"'{self.text}' is {result}, not a finite number")
        return result


def parse_expression(text: str) -> Expression:
    """Parses an expression.

    Raises:
        ValueError: it holds anything else than arithmetic.
    """
    names: dict[str, None] = {}
    try:
        root = ast.parse(text.strip(), mode="eval").body
        _check(root, text, names)
    except SyntaxError as error:
        raise ValueError(f"'{text}' is no expression; it may hold {_GRAMMAR}") from error
    except (MemoryError, RecursionError) as error:
        raise ValueError(f"'{shortened(text, 80)}' is nested too deeply") from error
    return Expression(text, tuple(names), root)


def _check(node: ast.expr, text: str, names: dict[str, None]) -> None:
    """Refuses all that is not arithmetic, and collects the names."""
    match node:
        case ast.Constant(value=value) if is_number(value) or isinstance(value, bool):
            parts: list[ast.expr] = []
        case ast.Name() | ast.Attribute() if (name := _dotted(node)) is not None:
            names[name] = None
            parts = []
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            parts = [left, right]
        case ast.UnaryOp(op=ast.UAdd() | ast.USub() | ast.Not(), operand=operand):
            parts = [operand]
        case ast.Compare(left=left, ops=ops, comparators=others) if all(type(op) in _COMPARISONS for op in ops):
            parts = [left, *others]
        case ast.BoolOp(values=parts):
            pass
        case ast.Call(func=ast.Name(id=name), args=parts, keywords=[]) if name in FUNCTIONS:
            fewest, most = _COUNTS[name]
            if not fewest <= len(parts) <= most:
                raise ValueError(f"'{text}': {name} cannot take {len(parts)} values")
        case _:
            raise ValueError(f"'{text}': '{ast.unparse(node)}' is not allowed; an expression may hold {_GRAMMAR}")
    for part in parts:
        _check(part, text, names)


def _dotted(node: ast.expr) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        front = _dotted(node.value)
        return None if front is None else f"{front}.{node.attr}"
    return None


def _evaluate(node: ast.expr, values: Mapping[str, object]) -> Value:
    match node:
        case ast.Constant(value=value):
            assert isinstance(value, int | float)
            return value
        case ast.Name() | ast.Attribute():
            return _number(_dotted(node) or "", values)
        case ast.BinOp(left=left, op=op, right=right):
            return _BINARY[type(op)](_evaluate(left, values), _evaluate(right, values))
        case ast.UnaryOp(op=op, operand=operand):
            inner = _evaluate(operand, values)
            return (not inner) if isinstance(op, ast.Not) else -inner if isinstance(op, ast.USub) else inner
        case ast.Compare(left=left, ops=ops, comparators=others):
            row = [_evaluate(part, values) for part in (left, *others)]
            return all(_COMPARISONS[type(op)](row[n], row[n + 1]) for n, op in enumerate(ops))
        case ast.BoolOp(op=op, values=parts):
            # `and` and `or` stop early, so that a condition can protect a division.
            every = isinstance(op, ast.And)
            found = (bool(_evaluate(part, values)) for part in parts)
            return all(found) if every else any(found)
        case ast.Call(func=ast.Name(id=name), args=arguments):
            return FUNCTIONS[name](*[_evaluate(part, values) for part in arguments])
        case _:
            raise ValueError(f"'{ast.unparse(node)}' is not allowed")


def _number(name: str, values: Mapping[str, object]) -> Value:
    value = values.get(name)
    if not isinstance(value, int | float):
        raise ValueError(f"{name} is {value!r}, not a number")
    return value
