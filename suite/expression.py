"""Linear expressions over names, "0.7*a + 0.3*b - c" or "(a + b) / 2": Python's grammar reads them, nothing is run."""

import ast
import math
import re
from collections.abc import Collection

from adaptsuite.errors import UsageError, nearest

LONGEST = 1000  # characters
_SIGNS = {ast.Add: 1.0, ast.Sub: -1.0, ast.UAdd: 1.0, ast.USub: -1.0}


def coefficients(expression: str, names: Collection[str]) -> dict[str, float]:
    """The factor of each name, in the order of the expression; names that cancel are left out.

    Sums, differences, signs, parentheses, and products and quotients with numbers. Raises UsageError with the column
    of what is wrong, for a name that is not in `names`, for one of them that is not used, and where all cancel.
    """
    text = " ".join(expression.split())
    if len(text) > LONGEST:
        raise UsageError(f"expression of {len(text)} characters, at most {LONGEST} are read")
    if strange := re.search(r"[^\w.+*/() -]", text):
        raise _error(text, strange.start(), f"{strange[0]!r} has no meaning here; use + - * / ( ), numbers and names")
    try:
        tree = ast.parse(text, mode="eval").body
        found = _linear(text, tree)
    except SyntaxError as e:
        raise _error(text, e.offset - 1 if e.offset else len(text), e.msg) from None  # 0: something is missing behind
    except (RecursionError, MemoryError, OverflowError, ValueError) as e:
        raise e if isinstance(e, UsageError) else _error(text, 0, "too deep, or a number too large") from None
    if found.pop(None, 0.0):
        raise _error(text, 0, "a number cannot be added to adapters, only multiplied with them")
    used = {node.id: node.col_offset for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for name, column in used.items():
        if name not in names:
            raise _error(text, column, f"{name!r} is not one of the adapters; {nearest(name, names)}")
    if unused := sorted(set(names) - set(used)):
        raise UsageError(f"adapter {unused[0]!r} is not in the expression {text!r}")
    found = {name: value for name, value in found.items() if value}
    if not found:
        raise UsageError(f"expression {text!r} is zero: its adapters cancel, which leaves the backbone")
    return found


def _linear(text: str, node: ast.expr) -> dict[str | None, float]:
    """Name -> factor of a part of the expression; a number stands under None."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return {None: _finite(text, node, float(node.value))}
    if isinstance(node, ast.Name):
        return {node.id: 1.0}
    if isinstance(node, ast.UnaryOp) and type(node.op) in _SIGNS:
        return _scaled(text, node, _linear(text, node.operand), _SIGNS[type(node.op)])
    if not isinstance(node, ast.BinOp):
        raise _error(text, node.col_offset, "only sums, signs, numbers and names have a meaning here")
    left, right = _linear(text, node.left), _linear(text, node.right)
    if type(node.op) in _SIGNS:
        right = _scaled(text, node, right, _SIGNS[type(node.op)])
        return {name: left.get(name, 0.0) + right.get(name, 0.0) for name in {**left, **right}}
    if isinstance(node.op, ast.Mult) and (left.keys() == {None} or right.keys() == {None}):
        factor, other = (left, right) if left.keys() == {None} else (right, left)
        return _scaled(text, node, other, factor[None])
    if isinstance(node.op, ast.Div) and right.keys() == {None} and right[None]:
        return _scaled(text, node, left, 1 / right[None])
    what = {ast.Mult: "adapters cannot be multiplied with each other", ast.Div: "only numbers but 0 divide"}
    raise _error(text, node.right.col_offset, what.get(type(node.op), "this operator has no meaning here"))


def _scaled(text: str, node: ast.expr, part: dict[str | None, float], factor: float) -> dict[str | None, float]:
    return {name: _finite(text, node, value * factor) for name, value in part.items()}


def _finite(text: str, node: ast.expr, value: float) -> float:
    if not math.isfinite(value):
        raise _error(text, node.col_offset, "a number too large")
    return value


def _error(text: str, column: int, what: str) -> UsageError:
    return UsageError(f"expression {text!r}, column {column + 1}: {what}")
