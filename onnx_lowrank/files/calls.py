"""Bounds on the calls of a model's functions: what reads a model expands every call, again and again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import onnx
from onnx import FunctionProto, NodeProto

from onnx_lowrank.errors import InputError

_MOST_NODES = 1 << 20
_MOST_DEPTH = 64  # Readers recurse, on stacks of a few MiB.

_Key = tuple[str, str, str]


def check_calls(proto: onnx.ModelProto, owner: str) -> None:
    """Check that a model stays small and flat when its functions are expanded.

    Args:
        proto: The model.
        owner: Its name, for messages.

    Raises:
        InputError: Two functions have one name, a function calls itself, directly or through others, calls
            nest too deep, or the model has too many nodes after the expansion.
    """
    if not proto.functions:
        return
    bodies = {(_domain(f.domain), f.name, f.overload): f for f in proto.functions}
    if len(bodies) < len(proto.functions):
        ((twice, _),) = Counter(f.name for f in proto.functions).most_common(1)
        raise InputError(f"{owner} has the function {twice!r} twice: export it again.")
    callees = {key: list(_calls(function.node, bodies)) for key, function in bodies.items()}
    sizes: dict[_Key, tuple[int, int]] = {}
    for key in bodies:
        _measure(key, callees, bodies, sizes, owner)
    total, _ = _size(proto.graph.node, list(_calls(proto.graph.node, bodies)), sizes)
    if total > _MOST_NODES:
        raise InputError(
            f"{owner} has {total} nodes when its functions are expanded, over {_MOST_NODES}: "
            "export it without functions."
        )


def _measure(
    start: _Key,
    callees: Mapping[_Key, Sequence[_Key]],
    bodies: Mapping[_Key, FunctionProto],
    sizes: dict[_Key, tuple[int, int]],
    owner: str,
) -> None:
    """Note the size of a function and of all that it calls; without recursion, as calls may be deep."""
    open_calls = {start: iter(callees[start])}
    while open_calls:
        key, others = next(reversed(open_calls.items()))
        called = next((callee for callee in others if callee not in sizes), None)
        if called is None:
            sizes[key] = _size(bodies[key].node, callees[key], sizes)
            del open_calls[key]
        elif called in open_calls:
            raise InputError(
                f"{owner} has the function {called[1]!r}, which calls itself: export it without functions."
            )
        else:
            open_calls[called] = iter(callees[called])
        if len(open_calls) > _MOST_DEPTH or sizes.get(key, (0, 0))[1] > _MOST_DEPTH:
            raise InputError(
                f"{owner} has the function {key[1]!r} in calls that nest over {_MOST_DEPTH} deep: "
                "export it without functions."
            )


def _size(
    nodes: Sequence[NodeProto], calls: Sequence[_Key], sizes: Mapping[_Key, tuple[int, int]]
) -> tuple[int, int]:
    """The number of nodes after the expansion, and the depth of the calls."""
    called = [sizes[key] for key in calls]
    return len(nodes) + sum(size for size, _ in called), 1 + max((depth for _, depth in called), default=0)


def _calls(nodes: Sequence[NodeProto], bodies: Mapping[_Key, FunctionProto]) -> Iterator[_Key]:
    """The functions that nodes call, in their bodies, too; one that is called twice occurs twice."""
    for node in nodes:
        key = (_domain(node.domain), node.op_type, node.overload)
        if key in bodies:
            yield key
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _calls(attribute.g.node, bodies)
            for graph in attribute.graphs:
                yield from _calls(graph.node, bodies)


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name
