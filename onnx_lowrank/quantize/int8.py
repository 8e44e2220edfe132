"""int8: weights and activations of 8 bits, with ONNX Runtime's quantize_static or quantize_dynamic.

Rules:

1. With calibration inputs, convolutions get static ranges and QuantizeLinear and DequantizeLinear around
   every operator (QDQ), with a scale for each output channel of a weight. Such scales need opset 13.
2. Without calibration inputs, or where most of the work is in matrices, the ranges of activations are
   measured in every run. Activations of transformers have outliers, which a static range of the whole tensor
   serves badly.
3. Dynamic convolutions have unsigned weights: ONNX Runtime's ConvInteger has no kernel for signed ones in
   all versions. Then matrices have them, too, because one call knows one type.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.errors import InputError
from onnx_lowrank.files.load import Model, ModelProto
from onnx_lowrank.quantize.kind import Feeds, Given, Kind, Quantizer, affine, opset, silent, symmetric, tool
from onnx_lowrank.quantize.sizes import Weight, activations, weights

_PER_CHANNEL, _DYNAMIC = 13, 11
"""The first opsets with a scale for each channel, and with DynamicQuantizeLinear."""

_MODULE = "onnxruntime.quantization"
_BESIDE, _PAIR, _LINK, _AROUND = 270, 330, 30, 700
"""Bytes beside names: of a weight with its node, of the nodes and numbers of an activation, of each reader of
one, and of the nodes around a dynamic weight."""
_MUL = 200  # bytes of a Mul that balances a tensor, beside its numbers and names
_MATRIX = 2  # axes
_MATRICES = frozenset({"MatMul", "Gemm"})
_CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})


class Int8(Kind):
    """Weights and activations of 8 bits."""

    name = "int8"
    order = 1
    modules = ((_MODULE, "onnxruntime"), ("sympy", "sympy"))

    def choose(self, model: Model, given: Given) -> Quantizer:
        """Static for convolutions with calibration inputs, else dynamic (rules 1 and 2)."""
        if given.calibrated and not given.multiplies:
            if opset(model) < _PER_CHANNEL:
                raise InputError(
                    f"{model.name} has opset {opset(model)}, and scales per channel need {_PER_CHANNEL}: "
                    f"convert it with onnx.version_converter.convert_version(model, {_PER_CHANNEL})."
                )
            return Static()
        if opset(model) < _DYNAMIC:
            raise InputError(
                f"{model.name} has opset {opset(model)}, and dynamic quantization needs {_DYNAMIC}: convert "
                f"it with onnx.version_converter.convert_version(model, {_DYNAMIC})."
            )
        kinds = {given.walk.node(place).op_type for place in given.walk.places()}
        reason = "most of the work is in matrices" if given.multiplies else "there is no calibration"
        return Dynamic(reason, is_signed="Conv" not in kinds, balances=given.calibrated)


class Static(Quantizer):
    """QDQ with ranges from calibration inputs (rule 1)."""

    kind = "int8"
    method = "quantize_static, QDQ, weights signed per channel"
    reason = "calibration inputs give the ranges of convolutions"
    operators = _MATRICES | _CONVOLUTIONS
    per_number = 1
    per_row = 5
    rounds_activations = True

    def rounded(self, weight: NDArray[Any], operator: str) -> NDArray[Any]:
        """Each output feature has a scale."""
        return symmetric(weight, 127, tuple(range(2, weight.ndim)))

    def write(self, source: Path, target: Path, feeds: Feeds, *, is_large: bool) -> None:
        """Do what `quantize_static` does, but keep its temporary files beside the target."""
        made, kinds = tool(_MODULE), sorted(_around())
        calibrate, qdq = tool(f"{_MODULE}.calibrate"), tool(f"{_MODULE}.qdq_quantizer")
        with silent():
            ranges = calibrate.create_calibrator(
                source,
                kinds,
                augmented_model_path=str(target.with_name("ranges.onnx")),
                calibrate_method=calibrate.CalibrationMethod.MinMax,
                use_external_data_format=is_large,
            )
            ranges.collect_data(_Reader(feeds))
            quantizer = qdq.QDQQuantizer(
                tool(f"{_MODULE}.quant_utils").load_model_with_shape_infer(source),
                True,  # a scale for each channel
                False,
                made.QuantType.QInt8,
                made.QuantType.QUInt8,
                ranges.compute_data(),
                [],
                [],
                kinds,
                {},
            )
            quantizer.quantize_model()
            quantizer.model.save_model_to_file(target, is_large)

    def saved(self, proto: ModelProto) -> int:
        """Weights and biases each get a DequantizeLinear, activations a QuantizeLinear, too."""
        total = 0
        for each in weights(proto, self.operators):
            total += 3 * each.size - self.per_row * each.rows - _BESIDE - 7 * len(each.name)
            if each.bias:
                total -= 8 * each.bias + _BESIDE + 7 * len(each.node.input[2])
        around = activations(proto, _around())
        return total - sum(_PAIR + 12 * len(name) + _LINK * n for name, n in around.items())


@cache
def _around() -> frozenset[str]:
    """The operators whose activations the static tool quantizes."""
    registry = tool(f"{_MODULE}.registry")
    return frozenset({*registry.QLinearOpsRegistry, *registry.QDQRegistry})


class Dynamic(Quantizer):
    """Ranges of activations from every run (rules 2 and 3)."""

    kind = "int8"
    per_number = 1
    per_row = 5
    rounds_activations = True

    def __init__(self, reason: str, *, is_signed: bool, balances: bool = False) -> None:
        self.reason = reason
        self.balances = balances
        self._is_signed = is_signed
        weights = "signed per channel" if is_signed else "unsigned"
        self.method = f"quantize_dynamic, weights {weights}"
        self.operators = _MATRICES | {"Gather"} | (frozenset() if is_signed else {"Conv"})

    def rounded(self, weight: NDArray[Any], operator: str) -> NDArray[Any]:
        """Each output feature of a matrix has a scale; all others share one."""
        if operator not in _MATRICES:
            return affine(weight, tuple(range(weight.ndim)))
        # The tool gives a feature the same scale in all matrices of a stack.
        axes = (0, *range(2, weight.ndim))
        return symmetric(weight, 127, axes) if self._is_signed else affine(weight, axes)

    def write(self, source: Path, target: Path, feeds: Feeds, *, is_large: bool) -> None:
        """Run `quantize_dynamic`."""
        made = tool(_MODULE)
        with silent():
            made.quantize_dynamic(
                source,
                target,
                per_channel=True,
                weight_type=made.QuantType.QInt8 if self._is_signed else made.QuantType.QUInt8,
                use_external_data_format=is_large,
            )
        _stack_scales(target, is_large=is_large)

    def saved(self, proto: ModelProto) -> int:
        """Each weight gets the nodes that quantize its input and scale its result; inputs may get scales."""
        found = list(weights(proto, self.operators))
        inputs = {
            each.node.input[0]: each.size // (each.rows * each.stack)
            for each in found
            if self._is_balanced(each)
        }
        scales = sum(4 * size + _MUL + 4 * len(name) for name, size in inputs.items())
        return -scales + sum(
            3 * each.size
            - self.per_row * each.rows * each.stack
            - _AROUND
            - 25 * max(len(each.node.name), len(each.node.output[0]))
            - 10 * len(each.name)
            for each in found
        )

    def _is_balanced(self, weight: Weight) -> bool:
        return self.balances and weight.node.op_type == "MatMul" and weight.stack == 1


def _stack_scales(path: Path, *, is_large: bool) -> None:
    """Repeat the scales and zeros of weights that are stacks of matrices, one row of them for each matrix.

    The tool writes one row for the whole stack, and ONNX Runtime's kernels refuse it: `MatMulInteger` asks
    for shape (stack, 1, features).
    """
    import onnx

    made = onnx.load(path)
    stored = {tensor.name: tensor for tensor in made.graph.initializer}
    changed = False
    for node in made.graph.node:
        weight = stored.get(node.input[1]) if node.op_type == "MatMulInteger" else None
        if weight is None or len(weight.dims) <= _MATRIX:
            continue
        for name in (node.input[3], f"{weight.name.removesuffix('_quantized')}_scale"):
            row = onnx.numpy_helper.to_array(stored[name])
            if row.ndim == 1:
                rows = np.broadcast_to(row, (*weight.dims[:-2], 1, row.size))
                stored[name].CopyFrom(onnx.numpy_helper.from_array(rows.copy(), name))
                changed = True
    if changed:
        path.with_name(f"{path.name}.data").unlink(missing_ok=True)  # onnx would append to it.
        onnx.save_model(made, path, save_as_external_data=is_large, location=f"{path.name}.data")


class _Reader:
    """ONNX Runtime's CalibrationDataReader over feeds."""

    def __init__(self, feeds: Feeds) -> None:
        self._feeds: Iterator[Mapping[str, NDArray[Any]]] = iter(feeds)

    def get_next(self) -> Mapping[str, NDArray[Any]] | None:
        """The next feed; None after the last one."""
        feed = next(self._feeds, None)
        return None if feed is None else dict(feed)


KIND = Int8()
