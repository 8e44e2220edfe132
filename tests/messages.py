"""All messages of the errors that a user can meet, found in the source of the package."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import onnx_lowrank
from onnx_lowrank.errors import LowRankError

VALUE = "{…}"
"""A value that is known only when the error is made."""

_CLICK = frozenset({"BadParameter", "UsageError"})
_MOST = 8
"""Texts of one message: more alternatives are not told apart."""


@dataclass(frozen=True)
class Message:
    """The text of an error.

    Attributes:
        place: Module and line of the error.
        text: The text, with `VALUE` for every value.
        is_of_option: Whether the command puts the name of an option in front, and a full stop behind.
    """

    place: str
    text: str
    is_of_option: bool


def family() -> frozenset[str]:
    """The names of the package's own errors."""
    found, kinds = set(), [LowRankError]
    while kinds:
        kind = kinds.pop()
        found.add(kind.__name__)
        kinds += kind.__subclasses__()
    return frozenset(found)


@cache
def collected() -> tuple[Message, ...]:
    """The messages of all modules."""
    root = Path(onnx_lowrank.__file__).parent
    return tuple(
        message
        for path in sorted(root.rglob("*.py"))
        for message in of_source(path.read_text(encoding="utf-8"), str(path.relative_to(root)))
    )


def of_source(source: str, name: str) -> Iterator[Message]:
    """The messages of one module."""
    yield from _of_scope(ast.parse(source), name, family() | _CLICK)


def _of_scope(scope: ast.AST, name: str, wanted: frozenset[str]) -> Iterator[Message]:
    texts, inner = _texts(scope), [scope]
    for node in inner:
        if isinstance(node, ast.FunctionDef) and node is not scope:
            yield from _of_scope(node, name, wanted)
            continue
        inner += ast.iter_child_nodes(node)
        if isinstance(node, ast.Call) and node.args:
            kind = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            # `Document.error` is the class of a document's errors.
            if kind in wanted or (kind == "error" and ast.unparse(node.func) == "self.error"):
                for text in _rendered(node.args[0], texts):
                    yield Message(f"{name}:{node.lineno}", text, kind == "BadParameter")


def _texts(scope: ast.AST) -> dict[str, list[ast.expr]]:
    """What is assigned to every name in a function, if all of it is text."""
    found: dict[str, list[ast.expr]] = {}
    for node in ast.walk(scope):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                names, values = (getattr(side, "elts", [side]) for side in (target, node.value))
                for one, value in zip(names, values, strict=False):
                    if isinstance(one, ast.Name):
                        found.setdefault(one.id, []).append(value)
        elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
            longer = [ast.BinOp(start, node.op, node.value) for start in found.get(name, [])]
            found[name] = longer or [node.value]
    return {name: values for name, values in found.items() if all(map(_is_text, values))}


def _is_text(node: ast.expr) -> bool:
    if isinstance(node, ast.IfExp):
        return _is_text(node.body) and _is_text(node.orelse)
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.Add) and _is_text(node.left) and _is_text(node.right)
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _rendered(node: ast.expr, texts: dict[str, list[ast.expr]]) -> list[str]:
    """The texts that an expression can have."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.Name) and node.id in texts:
        return [text for value in texts[node.id] for text in _rendered(value, texts)]
    if isinstance(node, ast.IfExp):
        return _rendered(node.body, texts) + _rendered(node.orelse, texts)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        parts = [_rendered(side, texts) for side in (node.left, node.right)]
        return ["".join(chosen) for chosen in product(*parts)]
    if isinstance(node, ast.FormattedValue):
        return _rendered(node.value, texts)
    if isinstance(node, ast.JoinedStr):
        alternatives = product(*(_rendered(part, texts) for part in node.values))
        return ["".join(chosen) for chosen, _ in zip(alternatives, range(_MOST), strict=False)]
    return [VALUE]
