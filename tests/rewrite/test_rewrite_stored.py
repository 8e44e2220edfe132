"""The factors of layers, read back from the chains of compressed models."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import numpy_helper

from onnx_lowrank.core.option import Fold, Lowering, Option
from onnx_lowrank.layers.find import read
from onnx_lowrank.linalg.backend import resolve
from onnx_lowrank.linalg.factorize import factorize
from onnx_lowrank.rewrite import stored
from rewriting import found, model, rewritten

CPU = resolve("cpu")
CONV = "g (float[1,12,6,6] x) => (float[] y) { y = Conv <group = 1> (x, w) }"
GROUPED = "g (float[1,12,6,6] x) => (float[] y) { y = Conv <group = 2> (x, w) }"
MATMUL = "g (float[5,12] x) => (float[] y) { y = MatMul (x, w) }"
GEMM = "g (float[5,12] x) => (float[] y) { y = Gemm <transB = 1> (x, w) }"
CASES = [
    (CONV, (10, 12, 3, 3), Option(Fold.ENCODE, 1, 4)),
    (CONV, (10, 12, 3, 3), Option(Fold.DECODE, 1, 5)),
    (CONV, (10, 12, 3, 3), Option(Fold.ROWS, 1, 3)),
    (CONV, (10, 12, 3, 3), Option(Fold.COLS, 2, 3)),
    (CONV, (10, 12, 3, 3), Option(Fold.ENCODE, 3, 2)),
    (CONV, (10, 12, 3, 3), Option(Fold.ENCODE, 2, 2, Lowering.SPLIT)),
    (GROUPED, (10, 6, 3, 3), Option(Fold.ENCODE, 1, 3)),
    (GROUPED, (10, 6, 3, 3), Option(Fold.ENCODE, 2, 2)),
    (MATMUL, (12, 9), Option(Fold.ENCODE, 1, 4)),
    (MATMUL, (12, 9), Option(Fold.ENCODE, 3, 2)),
    (GEMM, (9, 12), Option(Fold.ENCODE, 1, 4)),
]


def read_back(body, shape, option):
    """The factors that were written, and those that are read back."""
    seen = found(model(body, w=shape))
    made = rewritten(seen, {"w": option})
    (binding,) = seen.bindings
    proto = made.model.proto
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    nodes = {node.name: node for node in proto.graph.node}
    chain = [nodes[name] for name in made.chains["w"][0]]
    exact = factorize(read(seen.model, seen.walk, binding), option, CPU, np.dtype(np.float32))
    return exact, stored.factors(seen.walk, binding, option, chain, values)


@pytest.mark.parametrize(("body", "shape", "option"), CASES, ids=lambda value: str(value)[:40])
def test_factors_come_back_as_they_were_written(body, shape, option):
    written, back = read_back(body, shape, option)
    assert back.fold is option.fold
    assert np.array_equal(back.encoder, written.encoder.astype(np.float32))
    assert np.array_equal(back.decoder, written.decoder.astype(np.float32))


def test_factors_that_are_not_both_there_do_not_come_back():
    seen = found(model(MATMUL, w=(12, 9)))
    option = Option(Fold.ENCODE, 1, 4)
    made = rewritten(seen, {"w": option})
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in made.model.proto.graph.initializer}
    (binding,) = seen.bindings
    nodes = list(made.model.proto.graph.node)
    assert stored.factors(seen.walk, binding, option, nodes[:1], values) is None
    narrow = Option(Fold.ENCODE, 1, 4, Lowering.NARROW)
    assert stored.factors(seen.walk, binding, narrow, nodes, values) is None
