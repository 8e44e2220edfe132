"""A copy of a model that takes the weights of layers as inputs, so that one session serves all trials.

Rules:

1. The stored weight of a layer becomes an optional input of the main graph: an initializer that is an
   input, too. The stored value is the default. All uses of the layer read it through their old views.
2. A weight in a Constant node, or in a body of If, Loop or Scan, moves into the main graph, because bodies
   can read its names. Functions cannot, so these layers are left out; so are weights above `LARGEST` bytes,
   because a trial holds a whole weight.
3. A bias that a rewrite can change (`layers.bias`) becomes an optional input as well. The defaults include
   a BatchNorm that is folded into a layer, and an Identity replaces its node.
4. No other initializer is an input, so a runtime can treat it as constant.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto
from onnx.helper import make_tensor_value_info

from onnx_lowrank.errors import InputError
from onnx_lowrank.files.load import Model
from onnx_lowrank.files.tensors import inline
from onnx_lowrank.graph.scopes import Scope, scopes
from onnx_lowrank.graph.walk import FreeNames, Place, Walk, is_op, label
from onnx_lowrank.graph.weights import Source, dtype_of, viewed
from onnx_lowrank.layers.bias import bias
from onnx_lowrank.layers.binding import Binding
from onnx_lowrank.layers.find import read
from onnx_lowrank.operators import registry
from onnx_lowrank.probe.inference import without_dropout
from onnx_lowrank.probe.segments import Substitute

_FIRST_IR = 4
"""From this IR version on, an initializer need not be an input; without an input, it is a constant."""


LARGEST = 2**30
"""The most bytes of a weight that is fed."""


@dataclass(frozen=True, slots=True)
class _Slot:
    """An optional input for a bias.

    Attributes:
        name: Its name.
        shape: Its shape.
        dtype: Its dtype.
        behind: The old bias if an Add behind the layer's node adds it, shape (f,); otherwise 0.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    behind: NDArray[np.float64] | float


class Overridable:
    """The copy with its optional inputs.

    Attributes:
        model: The copy; without further feeds it computes the same as the model.
        inputs: For each layer that can be overridden, the names of the inputs for its weight and for its
            bias; the latter is None if no bias can change.
        reasons: For each of the other layers, the reason why it cannot be overridden.
    """

    def __init__(self, model: Model, walk: Walk, bindings: Iterable[Binding]) -> None:
        """Make the copy.

        Args:
            model: The model; it is not changed. The copy refers to its data files.
            walk: Its walk.
            bindings: The layers to override.

        Raises:
            InputError: A data file has changed since the layers were found.
        """
        self._original = model
        self._walk = walk
        self._unique = FreeNames(walk).unique
        self._slots: dict[str, _Slot] = {}
        self._proto = _copy(model.proto)
        self._scopes: dict[str, Scope] = {scope.path: scope for scope in scopes(self._proto)}
        moved: set[Place] = set()
        inputs: dict[str, tuple[str, str | None]] = {}
        reasons: dict[str, str] = {}
        for binding in bindings:
            layer = binding.layer
            if (reason := _closed(walk, binding)) is not None:
                reasons[layer.id] = reason
                continue
            inputs[layer.id] = self._open_weight(binding), self._open_bias(binding)
            if binding.stored.source.place is not None:
                moved.add(binding.stored.source.place)
        for place in sorted(moved, reverse=True):  # the last first, so that the other indices stay right
            del self._scopes[place.scope].nodes[place.node]  # type: ignore[attr-defined]
        self.inputs: Mapping[str, tuple[str, str | None]] = inputs
        self.reasons: Mapping[str, str] = reasons
        self.model = replace(model, proto=self._proto, path=None)

    def feeds(self, binding: Binding, substitute: Substitute) -> dict[str, NDArray[Any]]:
        """The feeds, beside the model's inputs, that make a layer compute a substitute.

        Args:
            binding: A layer that can be overridden.
            substitute: The weight and bias. Values beyond the range of the stored dtype become infinite.

        Raises:
            InputError: The substitute has a bias, but the layer has no bias that can be changed.
        """
        layer = binding.layer
        name, _ = self.inputs[layer.id]
        fed = {name: self._stored(binding, substitute.weight)}
        if substitute.bias is not None:
            if (slot := self._slots.get(layer.id)) is None:
                raise InputError(f"The layer {layer.id!r} has no bias that can be changed: give none for it.")
            fed[slot.name] = _narrowed(substitute.bias + slot.behind, slot.dtype).reshape(slot.shape)
        return fed

    def _open_weight(self, binding: Binding) -> str:
        """Rules 1 and 2: make a weight an optional input of the main graph; returns its name."""
        source, norm = binding.stored.source, binding.layer.batchnorm
        graph = self._proto.graph
        if source.scope or source.place is not None:
            tensor = self._moved(source)
        else:
            tensor = next(tensor for tensor in graph.initializer if tensor.name == source.name)
        if norm is not None:
            weight = read(self._original, self._walk, binding)
            scale = norm.scale.reshape(*weight.shape[:2], *[1] * (weight.ndim - 2))
            tensor.CopyFrom(inline(tensor.name, self._stored(binding, weight * scale)))
        graph.input.append(make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        return str(tensor.name)

    def _moved(self, source: Source) -> TensorProto:
        """Move a source into the main graph, and let all its readers read it there; returns its tensor."""
        tensor: TensorProto = self._proto.graph.initializer.add()
        tensor.CopyFrom(source.tensor)
        tensor.name = self._unique(source.name)
        for place, operand in self._walk.consumers(source.value):
            self._scopes[place.scope].nodes[place.node].input[operand] = tensor.name
        if source.place is None:
            stored: Any = self._scopes[source.scope].graph
            del stored.initializer[[other.name for other in stored.initializer].index(source.name)]
        return tensor

    def _open_bias(self, binding: Binding) -> str | None:
        """Rule 3: make a bias an optional input of the main graph; returns its name."""
        old, norm = bias(self._original, self._walk, binding), binding.layer.batchnorm
        if old is None:
            return None
        node = self._scopes[old.place.scope].nodes[old.place.node]
        name = self._unique(f"{label(node)}_bias")
        if old.in_node:
            registry.family(node).set_bias(node, name)
        else:
            node.input[old.operand] = name
        if norm is not None:
            behind = self._scopes[old.place.scope].nodes[norm.node]
            behind.op_type = "Identity"
            del behind.input[1:], behind.attribute[:]
        dtype = dtype_of(self._walk, binding.stored)
        self._slots[binding.layer.id] = _Slot(name, old.shape, dtype, 0.0 if old.in_node else old.values)
        tensor = inline(name, old.values.astype(dtype).reshape(old.shape))
        self._proto.graph.initializer.append(tensor)
        self._proto.graph.input.append(make_tensor_value_info(name, tensor.data_type, old.shape))
        return name

    def _stored(self, binding: Binding, weight: NDArray[Any]) -> NDArray[Any]:
        """A canonical weight in the layout of the layer's source: the inverse of `layers.find.read`."""
        stored, use = binding.stored, binding.layer.uses[0]
        source = stored.source
        node = self._walk.node(Place(use.scope, use.node))
        operator = registry.family(node)
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(source.tensor.data_type))
        values, dims = _narrowed(weight, dtype), tuple(source.tensor.dims)
        if not stored.views:
            return np.ascontiguousarray(operator.laid_out(node, use.operand, values, dims))
        # Views only move elements, so the views of an array of positions give the origin of each element.
        positions = inline(source.name, np.arange(prod(dims)).reshape(dims))
        traced = replace(stored, source=replace(source, tensor=positions))
        origins = viewed(self._walk, self._original, traced)
        if origins is None:
            raise InputError(f"The weight {source.name!r} changed while it was read: run again.")
        result = np.empty(prod(dims), dtype)
        result[origins.ravel()] = operator.laid_out(node, use.operand, values, origins.shape).ravel()
        return result.reshape(dims)


def _copy(source: ModelProto) -> ModelProto:
    """A copy of a model without initializers that are inputs (rule 4)."""
    proto = ModelProto()
    proto.CopyFrom(source)
    without_dropout(proto.graph)
    proto.ir_version = max(proto.ir_version, _FIRST_IR)
    stored = {tensor.name for tensor in proto.graph.initializer}
    stored |= {tensor.values.name for tensor in proto.graph.sparse_initializer}
    open_inputs = [value for value in source.graph.input if value.name not in stored]
    del proto.graph.input[:]
    proto.graph.input.extend(open_inputs)
    return proto


def _closed(walk: Walk, binding: Binding) -> str | None:
    """The reason why a layer cannot be overridden (rule 2), or None."""
    size = binding.layer.size * dtype_of(walk, binding.stored).itemsize
    if size > LARGEST:
        return (
            f"its weight of {size / 2**30:.1f} GiB is too large to be fed: at most {LARGEST / 2**30:g} GiB is"
        )
    path: str | None = binding.stored.source.scope
    while path:
        scope = walk.scopes[path]
        if scope.function is not None or scope.parent is None or scope.node is None:
            return f"its weight is in the function {path!r}, which takes it from no input: inline it first"
        holder = walk.node(Place(scope.parent, scope.node))
        if not is_op(holder, ("If", "Loop", "Scan")):
            return (
                f"its weight is in a body of {holder.op_type} {label(holder)!r}: move it out of there first"
            )
        path = scope.parent
    return None


def _narrowed(values: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Values in a dtype; values beyond its range become infinite."""
    with np.errstate(over="ignore"):
        return values.astype(dtype)
