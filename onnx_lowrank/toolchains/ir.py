"""onnx_ir: a pass that decomposes the layers of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.api import compress
from onnx_lowrank.errors import InputError, LowRankError
from onnx_lowrank.files.scratch import scratch
from onnx_lowrank.options import Options, completed
from onnx_lowrank.request import request

try:
    import onnx_ir as ir
except ImportError as error:
    raise InputError("The package onnx_ir is not installed: install onnx-lowrank[ir].") from error


class LowRankPass(ir.passes.InPlacePass):  # type: ignore[misc]
    """Make a model smaller by low-rank decomposition, in place.

    The model object stays. Its graph and functions are replaced; their inputs, outputs, nodes and values keep
    their names, except for what a layer is decomposed into. Tensors that stay the same are the same objects,
    so external data is neither read into memory nor written again. Disk space for two copies of the model is
    needed meanwhile.

    Args:
        ratio: As in `onnx_lowrank.compress`.
        options: The options of `onnx_lowrank.compress`.

    Raises:
        InputError: An argument is wrong. A call raises the errors of `onnx_lowrank.compress`.
    """

    def __init__(self, ratio: float | None = None, **options: Unpack[Options]) -> None:
        super().__init__()
        request(ratio, completed(options))
        self._ratio, self._options = ratio, options

    def requires(self, model: ir.Model) -> None:
        """Check that every initializer has a value.

        Raises:
            PreconditionError: One has none.
        """
        _check(model, ir.passes.PreconditionError)

    def ensures(self, model: ir.Model) -> None:
        """Check that every initializer has a value, and that every output is computed.

        Raises:
            PostconditionError: One has none, or is not.
        """
        _check(model, ir.passes.PostconditionError)
        given = {*model.graph.inputs, *model.graph.initializers.values()}
        for output in model.graph.outputs:
            if output.producer() is None and output not in given:
                raise ir.passes.PostconditionError(f"No node computes the output {output.name!r}: report it.")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Decompose the layers; the result is modified if a layer or a number of a weight is another."""
        with scratch() as folder:
            made, is_rewritten = self._made(model, folder)
            is_changed = _keep_tensors(model, made)
        if is_rewritten or is_changed:
            model.graph = made.graph
            model.functions.clear()
            model.functions.update(made.functions)
            model.ir_version = made.ir_version
            model.metadata_props.update(made.metadata_props)
        return ir.passes.PassResult(model, modified=is_rewritten or is_changed)

    def _made(self, model: ir.Model, folder: Path) -> tuple[ir.Model, bool]:
        """The compressed model with its data in a folder, and whether it has rewritten layers."""
        source, target = folder / "in.onnx", folder / "made" / "out.onnx"
        target.parent.mkdir()  # The folder itself is locked, and saving locks the target's.
        ir.save(model, source, external_data="in.data")
        try:
            with compress(source, self._ratio, **self._options) as result:
                result.save(target)
                is_rewritten = not self._options.get("dry_run") and any(
                    choice.option is not None for choice in result.plan.choices
                )
        except LowRankError as error:
            error.args = (str(error).replace(str(source), model.graph.name or "model"), *error.args[1:])
            raise
        return ir.load(target), is_rewritten


def _check(model: ir.Model, error: type[Exception]) -> None:
    for graph in model.graphs():
        for name, value in graph.initializers.items():
            if value.const_value is None:
                raise error(f"The initializer {name!r} has no value: load the weights before the pass.")


def _keep_tensors(old: ir.Model, made: ir.Model) -> bool:
    """Give a new model the tensors of the old one where they are the same, and hold all others in memory.

    Returns:
        Whether there are others.
    """
    known = {name: v.const_value for graph in old.graphs() for name, v in graph.initializers.items()}
    is_changed = False
    for graph in made.graphs():
        for name, value in graph.initializers.items():
            tensor = value.const_value
            if name in known and _is_same(known[name], tensor):
                value.const_value = known[name]
            else:
                is_changed = True
                if isinstance(tensor, ir.ExternalTensor):
                    value.const_value = ir.Tensor(np.array(tensor.numpy()), dtype=tensor.dtype, name=name)
            if isinstance(tensor, ir.ExternalTensor):
                tensor.release()
    return is_changed


def _is_same(one: ir.TensorProtocol, other: ir.TensorProtocol) -> bool:
    if one.dtype != other.dtype or tuple(one.shape) != tuple(other.shape):
        return False
    if one.dtype == ir.DataType.STRING:
        return bool(np.array_equal(one.numpy(), other.numpy()))
    return bool(np.array_equal(_bytes(one), _bytes(other)))


def _bytes(tensor: ir.TensorProtocol) -> NDArray[np.uint8]:
    array: NDArray[Any] = np.ascontiguousarray(tensor.numpy())
    return array.reshape(-1).view(np.uint8)
