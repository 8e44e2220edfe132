"""fp16: all float32 tensors in float16, with onnxruntime.transformers.float16; inputs and outputs stay.

ONNX Runtime's converter is taken, not onnxconverter-common: it is a later version of the same code, it knows
ONNX Runtime's own operators, and it comes with the runtime.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from onnx_lowrank.errors import InputError
from onnx_lowrank.files.load import Model, ModelProto
from onnx_lowrank.files.tensors import tensors
from onnx_lowrank.quantize.kind import Feeds, Given, Kind, Quantizer, silent, tool
from onnx_lowrank.quantize.sizes import floats

_MODULE = "onnxruntime.transformers.float16"
_ORDER = "onnxruntime.transformers.onnx_model"
_CAST = 500  # bytes of the Cast of an input or an output


class Fp16(Kind):
    """Floats of 16 bits."""

    name = "fp16"
    order = 3
    modules = ((_MODULE, "onnxruntime"),)

    def choose(self, model: Model, given: Given) -> Quantizer:
        """There is one method; it needs float32 tensors."""
        if not any(tensor.data_type == TensorProto.FLOAT for tensor in tensors(model.proto)):
            raise InputError(
                f"--then fp16 converts float32 tensors, and {model.name} has none: leave it out."
            )
        return Half()


class Half(Quantizer):
    """The conversion of a whole model."""

    kind = "fp16"
    method = "float16, inputs and outputs float32"
    operators = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose", "Gather"})
    per_number = 2

    def rounded(self, weight: NDArray[Any], operator: str) -> NDArray[Any]:
        """Every number is rounded alone."""
        limits = np.finfo(np.float16)
        return np.asarray(np.clip(weight, limits.min, limits.max).astype(np.float16), weight.dtype)

    def write(self, source: Path, target: Path, feeds: Feeds, *, is_large: bool) -> None:
        """Run `convert_float_to_float16`."""
        import onnx

        module = tool(_MODULE)
        with silent():
            made = module.convert_float_to_float16(str(source), keep_io_types=True)
            ordered = tool(_ORDER).OnnxModel(made)
            ordered.topological_sort(is_deterministic=True)  # The tool puts its Casts at the end.
            made = ordered.model
        onnx.save_model(made, target, save_as_external_data=is_large, location=f"{target.name}.data")

    def saved(self, proto: ModelProto) -> int:
        """Inputs and outputs get Casts."""
        ends = len(proto.graph.input) + len(proto.graph.output)
        return 2 * floats(proto) - _CAST * ends


KIND = Fp16()
