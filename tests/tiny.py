"""Small models for the tests of the whole command: built in milliseconds, with spectra that decay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

DIGITS = Path(__file__).parents[1] / "models" / "digits.onnx"

CNN = """
<ir_version: 8, opset_import: ["": 17]>
cnn (float[N, 8, 6, 6] x) => (float[N, 4] y) {
  a = Conv <pads = [1, 1, 1, 1]> (x, conv1)
  b = Relu (a)
  c = Conv <pads = [1, 1, 1, 1]> (b, conv2)
  d = GlobalAveragePool (c)
  e = Flatten (d)
  y = Gemm <transB = 1> (e, fc)
}
"""


def decaying(seed, *shape):
    """A weight of full rank whose singular values fall by a factor of 0.7 each, along its first axis."""
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((shape[0], int(np.prod(shape[1:]))))
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    return ((u * s[0] * 0.7 ** np.arange(len(s))) @ v).reshape(shape).astype(np.float32)


def weights(**replaced):
    """The weights of `CNN`."""
    made = {"conv1": decaying(1, 16, 8, 3, 3), "conv2": decaying(2, 16, 16, 3, 3), "fc": decaying(3, 4, 16)}
    return made | replaced


def cnn(text=CNN, **replaced):
    """A model of two convolutions and a matrix, 3,520 parameters in all; its nodes are called n.OUTPUT."""
    return built(text, weights(**replaced))


def built(text, arrays):
    """A model from its text and its initializers."""
    proto = onnx.parser.parse_model(text)
    for node in proto.graph.node:
        node.name = f"n.{node.output[0]}"
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
    return proto


def files(folder):
    """Everything in a folder, with its contents."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }
