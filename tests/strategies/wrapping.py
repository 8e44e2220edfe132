"""Steps of a draft without a weight of their own, and bodies around blocks: If, Loop, Scan, functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod

import numpy as np
from onnx import TensorProto, helper

from .blocks import LARGEST, Block, square
from .drafts import Draft, Scope, Value

CUSTOM = "made.up"
"""A domain that no runtime knows."""


# --- without a weight -----------------------------------------------------------------------------


def elementwise(d: Draft, x: Value) -> Value:
    ops = ["Relu", "Tanh", "Sigmoid", "Identity", "Softplus", "LeakyRelu", "Dropout", "Abs", "Neg"]
    return Value(d.node(d.pick(*ops), [x.name]), x.shape, x.is_open)


def affine(d: Draft, x: Value) -> Value:
    name = d.node("Mul", [x.name, d.small(x.shape[-1])])
    return Value(d.node("Add", [d.small(), name]), x.shape, x.is_open)


def normalized(d: Draft, x: Value) -> Value:
    if d.opset >= 17 and d.pick(False, True):
        scale = d.small(x.shape[-1], least=0.5)
        return Value(d.node("LayerNormalization", [x.name, scale, d.small(x.shape[-1])]), x.shape, x.is_open)
    return Value(d.node("Softmax", [x.name], axis=x.rank - 1), x.shape, x.is_open)


def residual(d: Draft, x: Value) -> Value:
    """Two branches with a weight each, which read the same tensor and are added."""
    one, other = square(d, x), square(d, x)
    sums = d.pick([one, other], [x, one], [one, other, x])
    if len(sums) == 3:
        return Value(d.node("Sum", [each.name for each in sums]), x.shape, x.is_open)
    return Value(d.node("Add", [each.name for each in sums]), x.shape, x.is_open)


def concatenated(d: Draft, x: Value) -> Value:
    other = square(d, x)
    name = d.node("Concat", [x.name, other.name], axis=x.rank - 1)
    return Value(name, (*x.shape[:-1], 2 * x.shape[-1]), x.is_open)


def transposed(d: Draft, x: Value) -> Value:
    order = [0, *(1 + n for n in d.order(x.rank - 1))]
    return Value(d.node("Transpose", [x.name], perm=order), tuple(x.shape[n] for n in order), x.is_open)


def flattened(d: Draft, x: Value) -> Value:
    if d.pick(False, True):
        return Value(d.node("Flatten", [x.name]), (x.shape[0], prod(x.shape[1:])), x.is_open)
    name = d.node("Reshape", [x.name, d.integers(0, -1, x.shape[-1])])
    return Value(name, (x.shape[0], prod(x.shape[1:-1]), x.shape[-1]), x.is_open)


def raised(d: Draft, x: Value) -> Value:
    return Value(d.axes("Unsqueeze", x.name, x.rank), (*x.shape, 1), x.is_open)


def pooled(d: Draft, x: Value) -> Value:
    name = d.node("GlobalAveragePool", [x.name])
    return Value(name, (*x.shape[:2], *[1] * (x.rank - 2)), x.is_open)


def sequenced(d: Draft, x: Value) -> Value:
    """Through a sequence."""
    made = d.node("SequenceConstruct", [x.name, x.name])
    return Value(d.node("SequenceAt", [made, d.keep(np.int64(1))]), x.shape, x.is_open)


def optional(d: Draft, x: Value) -> Value:
    """Through an optional."""
    made = d.node("Optional", [x.name])
    return Value(d.node("OptionalGetElement", [made]), x.shape, x.is_open)


def custom(d: Draft, x: Value) -> Value:
    """Through an operator that nothing knows, perhaps one with a weight."""
    operands = [x.name, *([d.weight(x.shape[-1], 3)] if d.pick(False, True) else [])]
    y = Value(d.node("Mystery", operands, domain=CUSTOM, alpha=2.0), x.shape, x.is_open)
    if d.scope is d.root and d.pick(False, True):
        d.values.append(d.value_info(y))
    return y


# --- bodies ---------------------------------------------------------------------------------------


@contextmanager
def _body(d: Draft, *, is_function: bool = False) -> Iterator[Scope]:
    outer = d.scope
    d.scope = Scope(outer, is_function)
    try:
        yield d.scope
    finally:
        d.scope = outer


def branched(d: Draft, x: Value) -> Value:
    """An If whose branches hold a weight each, or one of them none."""
    if d.pick(True, False) and d.scope is d.root:
        condition = d.input(d.fresh("c"), TensorProto.BOOL, [])
    else:
        condition = d.keep(np.asarray(d.pick(True, False)))
    graphs = []
    for block in (square, d.pick(square, elementwise)):
        with _body(d) as scope:
            y = block(d, x)
        given = d.value_info(y)
        graphs.append(helper.make_graph(scope.nodes, "branch", [], [given], scope.initializers))
    name = d.node("If", [condition], then_branch=graphs[0], else_branch=graphs[1])
    return Value(name, x.shape, x.is_open)


def looped(d: Draft, x: Value) -> Value:
    """A Loop that multiplies its state again and again."""
    with _body(d) as scope:
        carried = Value(d.fresh(), x.shape, x.is_open)
        number, kept = d.fresh("i"), d.fresh("c")
        y = square(d, carried)
        again = d.node("Identity", [kept])
    inputs = [
        helper.make_tensor_value_info(number, TensorProto.INT64, []),
        helper.make_tensor_value_info(kept, TensorProto.BOOL, []),
        d.value_info(carried),
    ]
    outputs = [helper.make_tensor_value_info(again, TensorProto.BOOL, []), d.value_info(y)]
    body = helper.make_graph(scope.nodes, "body", inputs, outputs, scope.initializers)
    times = d.keep(np.int64(d.size(1, 2)))
    condition = d.pick("", d.keep(np.asarray(True)))
    return Value(d.node("Loop", [times, condition, x.name], body=body), x.shape, x.is_open)


def scanned(d: Draft, x: Value) -> Value:
    """A Scan over the first axis."""
    with _body(d) as scope:
        part = Value(d.fresh(), x.shape[1:])
        y = square(d, part)
    body = helper.make_graph(scope.nodes, "body", [d.value_info(part)], [d.value_info(y)], scope.initializers)
    return Value(d.node("Scan", [x.name], body=body, num_scan_inputs=1), x.shape, x.is_open)


def called(d: Draft, x: Value) -> Value:
    """One of the model's own functions, called once or twice; a caller may pass the weight."""
    name = d.fresh("F")
    is_passed = d.rarely()
    with _body(d, is_function=True) as scope:
        given = d.fresh()
        passed = [d.fresh()] if is_passed else []
        y = Value(d.node("MatMul", [given, *passed]), x.shape) if passed else square(d, Value(given, x.shape))
        activation = d.node("Relu", [y.name])
    imports = [helper.make_opsetid("", d.opset)]
    d.functions.append(
        helper.make_function(CUSTOM, name, [given, *passed], [activation], scope.nodes, imports)
    )
    value = x
    for _ in range(d.size(1, 2)):
        operands = [value.name, *([d.weight(x.shape[-1], x.shape[-1], fan=x.shape[-1])] if passed else [])]
        value = Value(d.node(name, operands, domain=CUSTOM), x.shape, x.is_open)
    return value


def around(d: Draft, x: Value) -> list[Block]:
    """The steps without a weight, and the bodies, that a value can enter."""
    found: list[Block] = [elementwise, affine, residual]
    if x.rank > 1:
        found += [normalized, concatenated]
    if x.rank > 2:
        found += [transposed, flattened, pooled]
    if 1 < x.rank < 5:
        found.append(raised)
    if d.opset >= 11 and d.kind != "bfloat16":
        found.append(sequenced)
    if d.opset >= 15 and d.kind in ("float", "double"):
        found.append(optional)
    found += [branched, looped]
    if d.opset >= 9 and x.rank > 1:
        found.append(scanned)
    if d.ir >= 8 and d.opset >= 9 and d.scope is d.root:
        found.append(called)
    if d.rarely(8):
        found.append(custom)
    return [step for step in found if step is not concatenated or prod(x.shape) < LARGEST]


Step = Callable[[Draft, Value], Value]
