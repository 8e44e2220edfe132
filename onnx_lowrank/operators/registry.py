"""The operator family of a node.

Every module of this package is imported once, in the order of the names, and its classes with `types` are
registered. A new operator family is a new module here.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib import import_module
from inspect import getmembers, isabstract, isclass
from pkgutil import iter_modules

from onnx import NodeProto

from onnx_lowrank import operators
from onnx_lowrank.operators.family import Operator
from onnx_lowrank.operators.left_alone import LEFT_ALONE

_DEFAULT = ("", "ai.onnx")


def known(node: NodeProto) -> Operator | None:
    """The family of a node, or None if its weight is not decomposed."""
    return _families().get((_domain(node), node.op_type))


def family(node: NodeProto) -> Operator:
    """The family of a node that applies a layer's weight.

    Raises:
        LookupError: The node belongs to none.
    """
    found = known(node)
    if found is None:
        raise LookupError(f"{node.op_type} has no family of operators")
    return found


def left_alone(node: NodeProto) -> str | None:
    """The reason why the weight of a known operator is never decomposed; None for all others."""
    return None if known(node) is not None else LEFT_ALONE.get((_domain(node), node.op_type))


def is_standard(node: NodeProto) -> bool:
    """Whether a node belongs to the default domain."""
    return node.domain in _DEFAULT


def _domain(node: NodeProto) -> str:
    return "" if node.domain in _DEFAULT else str(node.domain)


@cache
def _families() -> dict[tuple[str, str], Operator]:
    found: dict[tuple[str, str], Operator] = {}
    for operator in _classes():
        instance = operator()
        for name in operator.types:
            if (operator.domain, name) in found:
                raise RuntimeError(f"two families of operators claim {operator.domain or 'ai.onnx'}.{name}")
            found[operator.domain, name] = instance
    return found


def _classes() -> Iterator[type[Operator]]:
    for module in sorted(entry.name for entry in iter_modules(operators.__path__)):
        loaded = import_module(f"{operators.__name__}.{module}")
        for _, member in getmembers(loaded, isclass):
            # Only in its own module: a family also appears in modules that import it to derive another.
            if not issubclass(member, Operator) or member.__module__ != loaded.__name__:
                continue
            if not isabstract(member) and "types" in vars(member):
                yield member
