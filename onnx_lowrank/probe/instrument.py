"""A copy of a model that also returns the inputs and the outputs of its layers.

Rules:

1. A tensor is tapped in the scope of the node that reads it, so a branch or a body counts as often as it
   runs. Scopes that share a tensor have a tap each; nodes of one scope share a tap.
2. A tap leaves a body through the node that holds it. An If returns an empty tensor if its other branch
   runs; a Loop or Scan stacks the tensors of all iterations on a new first axis.
3. Layers in functions and in the bodies of other operators cannot be tapped: there is no way for a tensor
   to leave them. They are listed with the reason.
4. Nodes and outputs are only appended, so every place of the model is the same place in the copy.
5. Dropout passes its input on (`probe.inference`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto

from onnx_lowrank.core.layer import Use
from onnx_lowrank.files.load import Model
from onnx_lowrank.files.tensors import inline
from onnx_lowrank.graph.scopes import Scope, scopes
from onnx_lowrank.graph.walk import FreeNames, Place, Walk, is_op, label
from onnx_lowrank.layers.binding import Binding
from onnx_lowrank.operators import registry
from onnx_lowrank.probe.inference import without_dropout


@dataclass(frozen=True, slots=True)
class Tap:
    """A graph output with the contents of a tensor.

    Attributes:
        name: The graph output. An empty array means that the tensor's node did not run.
        depth: Number of axes before the tensor's own, one for each Loop or Scan around its node.
    """

    name: str
    depth: int = 0


@dataclass(frozen=True, slots=True)
class Instrumented:
    """The copy and its taps.

    Attributes:
        model: The copy: the model's own outputs, then the taps. Its weights are the model's.
        inputs: For each layer with wanted inputs, the activation that the weight meets, per use.
        outputs: For each layer with wanted outputs, the result, behind a folded BatchNorm, per use. For each
            layer with a wanted sum, this sum.
        reasons: For each of the other layers, the reason why it cannot be tapped.
    """

    model: Model
    inputs: Mapping[str, tuple[Tap, ...]]
    outputs: Mapping[str, tuple[Tap, ...]]
    reasons: Mapping[str, str]


def instrument(
    model: Model,
    walk: Walk,
    inputs: Iterable[Binding],
    outputs: Iterable[Binding] = (),
    sums: Iterable[Binding] = (),
) -> Instrumented:
    """Copy a model and add outputs for the activations and the results of layers.

    Args:
        model: The model; it is not changed.
        walk: Its walk.
        inputs: The layers with wanted activations; none of them reads indices.
        outputs: The layers with wanted results.
        sums: Layers whose `Binding.sum` of results is wanted.
    """
    inputs, outputs = tuple(inputs), tuple(outputs)
    reasons = {
        binding.layer.id: reason
        for binding in (*inputs, *outputs)
        if (reason := _unreachable(walk, binding)) is not None
    }
    taps = _Taps(model, walk)
    read = {b.layer.id: taps.tap(b, _activation) for b in inputs if b.layer.id not in reasons}
    given = {b.layer.id: taps.tap(b, _result) for b in outputs if b.layer.id not in reasons}
    given |= {binding.layer.id: (taps.add_up(binding),) for binding in sums}
    return Instrumented(replace(model, proto=taps.proto, path=None), read, given, reasons)


def _unreachable(walk: Walk, binding: Binding) -> str | None:
    """The reason why one of a layer's uses cannot be tapped, or None."""
    for use in binding.layer.uses:
        path: str | None = use.scope
        while path:
            scope = walk.scopes[path]
            if scope.function is not None or scope.parent is None or scope.node is None:
                return f"it is used in the function {path!r}, which returns no activations: inline it first"
            holder = walk.node(Place(scope.parent, scope.node))
            if not is_op(holder, ("If", "Loop", "Scan")):
                return (
                    f"it is used in a body of {holder.op_type} {label(holder)!r}, "
                    "which returns no activations: unroll it first"
                )
            path = scope.parent
    return None


def _activation(walk: Walk, binding: Binding, use: Use) -> str:
    """Name of the tensor that meets the weight."""
    node = walk.node(Place(use.scope, use.node))
    return node.input[registry.family(node).activation(use.operand)]


def _result(walk: Walk, binding: Binding, use: Use) -> str:
    """Name of the result of a use, behind a BatchNorm that is folded into its layer."""
    norm = binding.layer.batchnorm
    return walk.node(Place(use.scope, use.node if norm is None else norm.node)).output[0]


class _Taps:
    """The copy under construction."""

    def __init__(self, model: Model, walk: Walk) -> None:
        self.proto = ModelProto()
        self.proto.CopyFrom(model.proto)
        without_dropout(self.proto.graph)
        self._walk = walk
        self._scopes: dict[str, Scope] = {scope.path: scope for scope in scopes(self.proto)}
        self._unique = FreeNames(walk).unique
        self._made: dict[tuple[str, str], Tap] = {}

    def tap(self, binding: Binding, named: Callable[[Walk, Binding, Use], str]) -> tuple[Tap, ...]:
        """Tap one tensor of every use of a layer; `named` gives its name in the use's scope."""
        taps = []
        for use, cast in zip(binding.layer.uses, binding.casts, strict=True):
            key = (use.scope, named(self._walk, binding, use))
            if key not in self._made:
                # The weight's type is the tensor's: operators with weights have one type for all tensors.
                self._made[key] = self._lift(*key, cast or binding.stored.source.tensor.data_type)
            taps.append(self._made[key])
        return tuple(taps)

    def add_up(self, binding: Binding) -> Tap:
        """Append Adds of the results of a sum's layers, all in the main graph, and tap the last one.

        Sums of float16 are those of float32: the model may add what keeps its own sum small in between.
        """
        if binding.sum is None:
            raise RuntimeError(f"the result of {binding.layer.id!r} is in no sum")
        kind, results = binding.stored.source.tensor.data_type, binding.sum.results
        if kind in (TensorProto.FLOAT16, TensorProto.BFLOAT16):
            kind = TensorProto.FLOAT
            results = tuple(self._appended("Cast", [result], to=kind) for result in results)
        total, *others = results
        for other in others:
            total = self._appended("Add", [total, other])
        return self._lift("", total, kind)

    def _appended(self, op: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Append a node to the main graph; the name of its output."""
        name = self._unique(f"{inputs[0]}_sum")
        node = onnx.helper.make_node(op, inputs, [name], self._unique(f"{name}/{op.lower()}"), **attributes)
        self.proto.graph.node.append(node)
        return name

    def _lift(self, path: str, name: str, kind: int) -> Tap:
        scope = self._scopes[path]
        graph: Any = scope.graph  # never None: layers in functions are unreachable
        is_returned = any(output.name == name for output in graph.output)
        if is_returned and not path:
            return Tap(name)
        # A graph must not return a tensor twice, nor one that it does not compute itself.
        if is_returned or not any(name in node.output for node in graph.node):
            name = self._renamed(graph, name)
        _add_output(graph, name, kind)
        if scope.parent is None or scope.node is None:
            return Tap(name)
        holder = self._scopes[scope.parent].nodes[scope.node]
        if holder.op_type == "If":
            self._return_nothing_elsewhere(holder, scope.attribute, kind)
        elif holder.op_type == "Scan":
            for attribute in holder.attribute:
                if attribute.name in ("scan_output_axes", "scan_output_directions"):
                    attribute.ints.append(0)
        # A Loop's body also returns the condition, which the Loop does not. Outputs that are left out at the
        # end get names, as ONNX Runtime takes no empty names there.
        place = len(graph.output) - 1 - (holder.op_type == "Loop")
        while len(holder.output) < place:
            holder.output.append(self._unique(f"{name}_unused"))
        lifted = self._unique(f"{name}_lifted")
        holder.output.append(lifted)
        outer = self._lift(scope.parent, lifted, kind)
        return replace(outer, depth=outer.depth + (holder.op_type != "If"))

    def _renamed(self, graph: Any, name: str) -> str:
        """Append an Identity to a graph, to give a tensor a second name; returns this name."""
        copy = self._unique(f"{name}_tap")
        graph.node.append(onnx.helper.make_node("Identity", [name], [copy], self._unique(f"{copy}/identity")))
        return copy

    def _return_nothing_elsewhere(self, holder: NodeProto, running: str, kind: int) -> None:
        """Let the other branch of an If return an empty tensor."""
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind)
        for attribute in holder.attribute:
            if attribute.HasField("g") and attribute.name != running:
                name = self._unique("nothing")
                tensor = inline(name, np.empty(0, dtype))
                node = onnx.helper.make_node("Constant", [], [name], self._unique(f"{name}/constant"))
                node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(tensor)
                attribute.g.node.append(node)
                _add_output(attribute.g, name, kind)


def _add_output(graph: Any, name: str, kind: int) -> None:
    """Append an output of unknown shape."""
    value = graph.output.add(name=name)
    value.type.tensor_type.elem_type = kind
