"""int4: weights of matrices in blocks of 32 numbers of 4 bits, with ONNX Runtime's MatMulNBits.

Activations stay as they are. A block lies along the inputs of a matrix. The inputs of a decoder are its
ranks, so ranks that are multiples of 32 fill all blocks (`--align int4`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.errors import InputError
from onnx_lowrank.files.load import Model, ModelProto
from onnx_lowrank.graph.weights import resolve
from onnx_lowrank.quantize.kind import Feeds, Given, Kind, Quantizer, silent, tool
from onnx_lowrank.quantize.sizes import weights

BLOCK = 32
"""The numbers that share a scale."""

_MODULES = (
    "onnxruntime.quantization.matmul_nbits_quantizer",
    "onnxruntime.quantization.matmul_4bits_quantizer",
)
_CLASSES = ("MatMulNBitsQuantizer", "MatMul4BitsQuantizer")
_LARGEST = 8
_BESIDE = 250  # bytes of the attributes and of the second tensor of a MatMulNBits
_WEIGHT = 1  # the operand of a MatMul that the tool packs


class Int4(Kind):
    """Weights of matrices in 4 bits."""

    name = "int4"
    order = 2
    modules = (("onnx_ir", "onnx-ir"), ("sympy", "sympy"), ("onnxruntime.quantization", "onnxruntime"))

    def choose(self, model: Model, given: Given) -> Quantizer:
        """There is one method; it needs a MatMul with a constant weight on its right."""
        walk = given.walk
        for place in walk.places():
            if walk.node(place).op_type != "MatMul":
                continue
            if not isinstance(resolve(walk, walk.operand(place, _WEIGHT)), str):
                return Packed()
        raise InputError(
            f"--then int4 packs the constant weights of MatMul, and {model.name} has none: choose "
            "--then int8 or fp16."
        )


class Packed(Quantizer):
    """MatMulNBits with symmetric blocks."""

    kind = "int4"
    method = f"MatMulNBits, symmetric blocks of {BLOCK}"
    operators = frozenset({"MatMul"})
    per_number = 0.5 + 4 / BLOCK

    def rounded(self, weight: NDArray[Any], operator: str) -> NDArray[Any]:
        """Each block of the inputs of an output feature has a scale: the number of largest size over -8."""
        g, f, c, *kernel = weight.shape
        if g > 1:
            return weight  # The tool packs no stacks of matrices.
        blocks = -(-c // BLOCK)
        padded = np.zeros((g, f, blocks * BLOCK), weight.dtype)
        padded[..., :c] = weight.reshape(g, f, c)
        rows = padded.reshape(g, f, blocks, BLOCK)
        place = np.abs(rows).argmax(axis=3)[..., None]
        scale = np.take_along_axis(rows, place, axis=3) / -_LARGEST
        scale = np.where(scale != 0, scale, 1)
        steps = np.clip(np.rint(rows / scale), -_LARGEST, _LARGEST - 1)
        made = (steps * scale).reshape(g, f, blocks * BLOCK)[..., :c]
        return np.asarray(made.reshape(g, f, c, *kernel), weight.dtype)

    def write(self, source: Path, target: Path, feeds: Feeds, *, is_large: bool) -> None:
        """Run ONNX Runtime's quantizer for MatMulNBits."""
        module = tool(*_MODULES)
        kind = next(getattr(module, name) for name in _CLASSES if hasattr(module, name))
        with silent():
            made = kind(str(source), block_size=BLOCK, is_symmetric=True)
            made.process()
            made.model.save_model_to_file(str(target), is_large)

    def saved(self, proto: ModelProto) -> int:
        """A block has 16 bytes, and 4 for its scale."""
        total = 0
        for each in weights(proto, self.operators):
            if each.stack > 1:
                continue
            blocks = each.rows * -(-each.size // (each.rows * BLOCK))
            total += 4 * each.size - (BLOCK // 2 + 4) * blocks - _BESIDE - 3 * len(each.name)
        return total


KIND = Int4()
