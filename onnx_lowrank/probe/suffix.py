"""The part of a model that runs behind a cut: what a change of some layers cannot reach runs only once.

Rules:

1. A cut lies in the main graph, before the first node that uses one of the layers, or that holds a use.
2. The tensors that cross it were made before it and are read behind it, or in a body there. They become
   inputs of the suffix. Tensors that follow from constants alone do not cross: the suffix computes them.
3. Outputs of the model that are made before the cut are not outputs of the suffix.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto
from onnx.helper import make_tensor_value_info

from onnx_lowrank.files.load import Model
from onnx_lowrank.graph.scopes import reads
from onnx_lowrank.graph.walk import Walk
from onnx_lowrank.layers.binding import Binding
from onnx_lowrank.probe.inference import without_dropout
from onnx_lowrank.probe.segments import RANDOM


@dataclass(frozen=True, slots=True)
class Cut:
    """A place in the main graph.

    Attributes:
        crossing: The tensors that cross it (rule 2), in the order in which they are made.
        before: All tensors that are made before it.
    """

    crossing: tuple[str, ...]
    before: frozenset[str]


class Cuts:
    """Finds the places where a model's main graph can be cut."""

    def __init__(self, model: Model, walk: Walk) -> None:
        """Read the model; it is not changed."""
        self._model = model
        self._walk = walk
        self._nodes = list(walk.scopes[""].nodes)
        self._reads = [set(reads(node)) for node in self._nodes]
        graph = model.proto.graph
        constants = {tensor.name for tensor in graph.initializer}
        constants |= {tensor.values.name for tensor in graph.sparse_initializer}
        for node, names in zip(self._nodes, self._reads, strict=True):
            if names <= constants and _is_plain(node):
                constants.update(node.output)
        self._constants = constants

    def before(self, bindings: Sequence[Binding]) -> Cut:
        """The cut before some layers (rule 1)."""
        first = min(map(self.position, bindings))
        read = set().union(*self._reads[first:])
        made = [name for node in self._nodes[:first] for name in node.output if name]
        crossing = (name for name in made if name in read and name not in self._constants)
        return Cut(tuple(crossing), frozenset(made))

    def position(self, binding: Binding) -> int:
        """The index of the first node of the main graph that uses a layer, or holds a use."""
        return min(self._place(use.scope, use.node) for use in binding.layer.uses)

    def returning(self, names: Iterable[str]) -> Model:
        """A copy of the model that also returns some of its tensors."""
        proto = ModelProto()
        proto.CopyFrom(self._model.proto)
        without_dropout(proto.graph)
        known = {output.name for output in proto.graph.output}
        proto.graph.output.extend(ValueInfoProto(name=name) for name in names if name not in known)
        return replace(self._model, proto=proto, path=None)

    def _place(self, scope: str, node: int) -> int:
        """The index of the node of the main graph that is, or holds, a node; 0 for nodes of functions."""
        while scope:
            outer = self._walk.scopes[scope]
            if outer.parent is None or outer.node is None:
                return 0
            scope, node = outer.parent, outer.node
        return node


START = Cut((), frozenset())
"""The cut before all nodes."""


def behind(
    model: Model, cut: Cut, kinds: Mapping[str, int], wanted: Collection[str] | None = None
) -> Model | None:
    """The suffix of a model behind a cut.

    Args:
        model: The model in which the cut was found, or a copy with the same names before the cut.
        cut: The cut.
        kinds: The element types of the tensors that cross it.
        wanted: Tensors that the suffix returns, none of which crosses the cut; by default, the outputs of the
            model that are made behind it.

    Returns:
        The suffix. Its inputs are the inputs of the model and the tensors at the cut that it needs. None if
        no output of the model is made behind the cut.
    """
    source = model.proto.graph
    known = {output.name: output for output in source.output}
    names = [n for n in known if n not in cut.before] if wanted is None else wanted
    if not names:
        return None
    outputs = [known.get(name) or ValueInfoProto(name=name) for name in names]
    nodes, needed = _kept(source, cut, names)
    # Optional inputs stay, even if no output needs them: a caller may feed them.
    needed.update(value.name for value in source.input if value.name in {t.name for t in source.initializer})
    graph = GraphProto(name=source.name)
    graph.node.extend(nodes)
    graph.initializer.extend(tensor for tensor in source.initializer if tensor.name in needed)
    graph.sparse_initializer.extend(t for t in source.sparse_initializer if t.values.name in needed)
    graph.input.extend(value for value in source.input if value.name in needed)
    # Shapes stay open: the shape of a tensor may differ from batch to batch.
    crossing = (name for name in cut.crossing if name in needed)
    graph.input.extend(make_tensor_value_info(name, kinds[name], None) for name in crossing)
    graph.output.extend(outputs)
    proto = ModelProto(graph=graph, ir_version=model.proto.ir_version)
    proto.opset_import.extend(model.proto.opset_import)
    proto.functions.extend(model.proto.functions)
    return replace(model, proto=proto, path=None)


def _kept(graph: GraphProto, cut: Cut, outputs: Collection[str]) -> tuple[list[NodeProto], set[str]]:
    """The nodes that make some outputs from the tensors at a cut, in order, and the names that they need."""
    needed, given = set(outputs), {*cut.crossing, ""}
    kept = []
    for node in reversed(graph.node):
        if not needed.isdisjoint(set(node.output) - given):
            needed.update(reads(node))
            kept.append(node)
    return kept[::-1], needed


def _is_plain(node: NodeProto) -> bool:
    """Whether a node without computed inputs gives the same in every copy; see `probe.segments`."""
    has_body = any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute)
    return node.domain in ("", "ai.onnx") and node.op_type not in RANDOM and not has_body
