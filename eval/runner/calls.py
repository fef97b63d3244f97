"""Read `Name(argument, option=value)` without evaluating it."""

import ast
from dataclasses import dataclass
from typing import Any

from pikv_hf.eval.errors import InputError


@dataclass(frozen=True, slots=True)
class Call:
    """A class name with its arguments, as a user writes it.

    Attributes
    ----------
    name : str
        Of the class.
    arguments : tuple
        Positional: plain values or further calls.
    options : dict
        By keyword: plain values or further calls.
    """

    name: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]


def parse_call(text: str) -> Call:
    """Read a bare name or a call; arguments are literals, lists of arguments, or calls.

    Raises
    ------
    InputError
        If `text` is anything else.
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise InputError(f"cannot read {text!r} as NAME or NAME(option=value): {error.msg}") from None
    value = _value(node, text)
    if isinstance(value, Call):
        return value
    raise InputError(f"expected NAME or NAME(option=value), got {text!r}")


def _value(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if any(keyword.arg is None for keyword in node.keywords):
            raise InputError(f"cannot read {text!r}: ** is not allowed")
        options = {str(keyword.arg): _value(keyword.value, text) for keyword in node.keywords}
        return Call(node.func.id, tuple(_value(argument, text) for argument in node.args), options)
    if isinstance(node, ast.Name):
        return Call(node.id, (), {})
    if isinstance(node, ast.List):
        return [_value(element, text) for element in node.elts]
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise InputError(
            f"cannot read {ast.unparse(node)!r} in {text!r}: expected a number, text or NAME(...)"
        ) from None
