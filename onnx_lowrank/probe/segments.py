"""The main graph, cut at its layers into segments that run on their own, to go from layer to layer.

Rules:

1. The graph is cut right before the node of every layer. Segment i goes from layer i − 1 up to layer i,
   segment 0 from the start, and the last segment holds the last layer's node only. A folded BatchNorm
   stands right behind its layer's node.
2. A tensor crosses a cut if it is fed or computed before the cut and a later layer needs it. Tensors that
   follow from constants alone do not cross: every segment has its own copy of those that it needs.
3. A segment holds only the nodes that its wanted tensors need.
4. The other operand of an Add behind a layer (a residual connection) crosses the cut before the layer, if
   it is made there. Then the layer can compensate the error of the compressed prefix in it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto
from onnx.helper import make_node, make_tensor_value_info

from onnx_lowrank.errors import InputError
from onnx_lowrank.files.load import Model
from onnx_lowrank.files.tensors import inline, is_external, reference, tensors
from onnx_lowrank.graph.walk import Walk, is_op
from onnx_lowrank.graph.weights import dtype_of, viewed
from onnx_lowrank.layers.binding import Binding
from onnx_lowrank.operators import registry
from onnx_lowrank.operators.adding import addends
from onnx_lowrank.probe.inference import without_dropout

# fmt: off
RANDOM = frozenset({
    "Bernoulli", "Dropout", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform",
    "RandomUniformLike",
})
# fmt: on
"""Operators that may give something else in every copy of a model."""


@dataclass(frozen=True, slots=True)
class Substitute:
    """A map that a layer computes in place of its own.

    Attributes:
        weight: The canonical weight, shape (groups, f / groups, c / groups, *kernel), with a folded
            BatchNorm in it.
        bias: The addends of the output features, shape (f,), with a folded BatchNorm in it; None for the
            layer's own bias.
    """

    weight: NDArray[Any]
    bias: NDArray[Any] | None = None


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a model that runs on its own.

    Attributes:
        model: The segment as a model; it refers to weights in data files.
        inputs: The earlier tensors that it needs, in the order in which they are made.
        outputs: The tensors that it returns.
    """

    model: Model
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Surroundings:
    """The nodes behind a layer.

    Attributes:
        beside: The tensor that is added to the result, made before the layer runs; None if there is none.
        rectified: Whether a Relu is the only reader of the result, or of the sum.
    """

    beside: str | None
    rectified: bool


@dataclass(frozen=True, slots=True)
class _Step:
    """A node of the main graph, and the names of this graph that the node and its bodies read."""

    node: NodeProto
    reads: Set[str]


class Segments:
    """The segments of a model's main graph.

    Attributes:
        bindings: The layers with a cut before them, in node order.
    """

    def __init__(self, model: Model, walk: Walk, bindings: Iterable[Binding]) -> None:
        """Find the cuts.

        Args:
            model: The model.
            walk: Its walk.
            bindings: Layers. The graph is not cut at layers with several uses, outside the main graph, or
                without a product that recovery can aim at: their nodes run like any others.
        """
        single = (b for b in bindings if _is_cut(b))
        self.bindings = tuple(sorted(single, key=lambda binding: binding.layer.uses[0].node))
        self._model = model
        self._walk = walk
        self._steps = _steps(walk)
        self._stored = {tensor.name for tensor in model.proto.graph.initializer}
        self._stored |= {tensor.values.name for tensor in model.proto.graph.sparse_initializer}
        layers = {node for binding in self.bindings for node in _nodes(binding)}
        self._folded = _folded(self._steps, self._stored, layers)
        self._constants = self._stored | _outputs(self._folded)
        self._entries = {v.name: v for v in model.proto.graph.input if v.name not in self._stored}
        made = (name for step in self._steps for name in step.node.output if name)
        self._order = {name: number for number, name in enumerate((*self._entries, *made))}
        self._parts = self._divided()
        self._surrounding = [self._surroundings(index) for index in range(len(self.bindings))]
        self._cuts = self._crossings()
        self._names = set(walk.names())

    def entering(self, index: int) -> str:
        """Name of the activation that a layer reads."""
        use = self.bindings[index].layer.uses[0]
        node = self._steps[use.node].node
        return node.input[registry.family(node).activation(use.operand)]

    def leaving(self, index: int) -> str:
        """Name of a layer's result, behind a folded BatchNorm."""
        return self._steps[_nodes(self.bindings[index])[-1]].node.output[0]

    def beside(self, index: int) -> str | None:
        """Name of the tensor that is added to a layer's result (rule 4), or None."""
        return self._surrounding[index].beside

    def rectified(self, index: int) -> bool:
        """Whether a Relu is the only reader of a layer's result, after any Add."""
        return self._surrounding[index].rectified

    def cut(self, index: int) -> tuple[str, ...]:
        """The tensors that cross the cut before a layer, in the order in which they are made.

        They include the layer's activation, even if it is constant. No tensor crosses behind the last layer.

        Args:
            index: The layer, or the number of layers for the end behind the last one.
        """
        return self._cuts[index]

    def made(self, index: int) -> tuple[str, ...]:
        """The tensors at the cut before a layer that segment `index` makes; it passes the others on."""
        made = _outputs(self._parts[index]) | self._constants
        return tuple(name for name in self._cuts[index] if name in made)

    def changed(self, index: int, before: Collection[str], substituted: bool) -> frozenset[str]:
        """The tensors at the cut before a layer that depend on a substituted layer.

        Args:
            index: The layer.
            before: The tensors that do so at the cut before the previous layer.
            substituted: Whether the previous layer is substituted.
        """
        found = set(before)
        for position, step in enumerate(self._parts[index]):
            if (substituted and position == 0) or not found.isdisjoint(step.reads):
                found.update(step.node.output)
        return frozenset(found.intersection(self._cuts[index]))

    def segment(
        self,
        index: int,
        wanted: Iterable[str],
        kinds: Mapping[str, int],
        substitute: Substitute | None = None,
    ) -> Segment:
        """The nodes of a segment that some tensors need, as a model.

        Args:
            index: The segment.
            wanted: Tensors that it makes.
            kinds: Element types of the tensors that cross the cut before it, without the model's inputs.
            substitute: The map that the previous layer computes instead; its node is the segment's first.

        Raises:
            InputError: A bias has to be added to the rows of a MatMul of unknown rank, or a data file has
                changed.
        """
        outputs = tuple(dict.fromkeys(wanted))
        steps, substituted = self._parts[index], list[TensorProto]()
        if substitute is not None:
            binding = self.bindings[index - 1]
            nodes, substituted = self._substituted(binding, substitute)
            behind = steps[len(_nodes(binding)) :]
            steps = [*(_Step(node, frozenset(node.input)) for node in nodes), *behind]
        kept, needed = _slice(steps, outputs)
        folded, needed = _slice(self._folded, needed)
        foreign = needed - _outputs(kept) - self._constants
        inputs = tuple(name for name in self._order if name in foreign)
        graph = GraphProto(name=f"segment {index}")
        graph.node.extend(step.node for step in (*folded, *kept))
        graph.initializer.extend(substituted)
        stored = self._model.proto.graph
        graph.initializer.extend(tensor for tensor in stored.initializer if tensor.name in needed)
        graph.sparse_initializer.extend(t for t in stored.sparse_initializer if t.values.name in needed)
        # Shapes stay open: the shape of a tensor may differ from batch to batch.
        graph.input.extend(
            self._entries.get(name) or make_tensor_value_info(name, kinds[name], None) for name in inputs
        )
        graph.output.extend(ValueInfoProto(name=name) for name in outputs)
        without_dropout(graph)
        return Segment(self._alone(graph), inputs, outputs)

    def _alone(self, graph: GraphProto) -> Model:
        """A model of one graph and all functions of the model, with the data files that it needs."""
        source = self._model.proto
        proto = ModelProto(graph=graph, ir_version=max(source.ir_version, 4))  # before, weights were inputs
        proto.opset_import.extend(source.opset_import)
        proto.functions.extend(source.functions)
        locations = {reference(tensor)["location"] for tensor in tensors(proto) if is_external(tensor)}
        files = {location: self._model.files[location] for location in sorted(locations)}
        return replace(self._model, proto=proto, files=files, path=None)

    def _divided(self) -> list[list[_Step]]:
        """The nodes of every segment, in order (rule 1), without nodes that read constants alone (rule 2)."""
        layers = [_nodes(binding) for binding in self.bindings]
        heads = {nodes[0]: nodes for nodes in layers}
        norms = {node for nodes in layers for node in nodes[1:]}
        skipped = {id(step) for step in self._folded}
        parts: list[list[_Step]] = [[]]
        for index, step in enumerate(self._steps):
            if index in heads:
                parts.append([self._steps[node] for node in heads[index]])
            elif index not in norms and id(step) not in skipped:
                parts[-1].append(step)
        if layers:  # nothing behind the last layer's own nodes is needed
            del parts[-1][len(layers[-1]) :]
        return parts

    def _crossings(self) -> list[tuple[str, ...]]:
        """The tensors at every cut: made before it and needed by a layer behind it."""
        live: set[str] = set()
        cuts: list[tuple[str, ...]] = []
        # From the end, as in the liveness analysis of a compiler: uses come before definitions.
        for index in reversed(range(len(self._parts))):
            constant = [self.entering(index)] if index < len(self.bindings) else []
            if index < len(self.bindings) and (added := self._surrounding[index].beside) is not None:
                live.add(added)
            cuts.append(tuple(sorted(live.union(constant), key=lambda name: self._order.get(name, -1))))
            if index:
                live.add(self.leaving(index - 1))
            for step in reversed(self._parts[index]):
                if not live.isdisjoint(step.node.output):
                    live.difference_update(step.node.output)
                    live |= step.reads - self._constants
        return cuts[::-1]

    def _surroundings(self, index: int) -> _Surroundings:
        """Follow a layer's result past sums with constants and with one other tensor, to a Relu."""
        use = self.bindings[index].layer.uses[0]
        if not use.is_linear:  # what is added to the node's result is not added to the product inside
            return _Surroundings(None, rectified=False)
        name, first = self.leaving(index), use.node
        earlier = set(self._entries) | _outputs(self._steps[:first])
        given = {value.name for value in self._model.proto.graph.output}
        beside: str | None = None
        while name not in given:
            readers = [step for step in self._steps if name in step.reads]
            if len(readers) == 1 and is_op(readers[0].node, ("Relu",)):
                return _Surroundings(beside, rectified=True)
            if len(readers) != 1 or name not in readers[0].node.input:
                break
            node = readers[0].node
            added = addends(node, [*node.input].index(name))
            if added is None:
                break
            other = name if added.other is None else node.input[added.other]
            if added.other is not None and other not in self._constants:
                if beside is not None or other not in earlier:
                    break
                beside = other
            if not is_op(node, ("Add",)):
                break
            name = node.output[0]
        return _Surroundings(beside, rectified=False)

    def _substituted(
        self, binding: Binding, substitute: Substitute
    ) -> tuple[list[NodeProto], list[TensorProto]]:
        """The nodes that replace a layer's nodes, and the new tensors that they read."""
        use, norm = binding.layer.uses[0], binding.layer.batchnorm
        node = NodeProto()
        node.CopyFrom(self._steps[use.node].node)
        node.output[0] = self._steps[_nodes(binding)[-1]].node.output[0]
        value = viewed(self._walk, self._model, binding.stored)
        if value is None:  # it was readable when the layer was found
            raise InputError(
                f"The weight {binding.stored.source.name!r} changed while it was read: run again."
            )
        dtype = dtype_of(self._walk, binding.stored)
        operator = registry.family(node)
        dense = operator.laid_out(node, use.operand, substitute.weight, value.shape)
        weight = inline(self._free(f"{node.output[0]}_weight"), dense.astype(dtype))
        node.input[use.operand] = weight.name
        numbers = norm.bias if substitute.bias is None and norm is not None else substitute.bias
        if numbers is None:
            return [node], [weight]
        shape = operator.bias_shape(use, value.shape, binding.layer.f)
        bias = inline(self._free(f"{node.output[0]}_bias"), numbers.astype(dtype).reshape(shape))
        return self._biased(node, bias.name), [weight, bias]

    def _biased(self, node: NodeProto, bias: str) -> list[NodeProto]:
        """Set the bias of a node, in place, or put an Add behind it if it takes no bias."""
        operator = registry.family(node)
        if operator.bias is None:
            result, node.output[0] = node.output[0], self._free(f"{node.output[0]}_unbiased")
            return [node, make_node("Add", [node.output[0], bias], [result])]
        operator.set_bias(node, bias)
        return [node]

    def _free(self, name: str) -> str:
        """A name that the model does not use."""
        while name in self._names:
            name += "_"
        return name


def _is_cut(binding: Binding) -> bool:
    uses = binding.layer.uses
    return len(uses) == 1 and not uses[0].scope and uses[0].is_recovered


def _nodes(binding: Binding) -> tuple[int, ...]:
    """The nodes of a layer with one use: its own node, and that of a folded BatchNorm."""
    norm = binding.layer.batchnorm
    return (binding.layer.uses[0].node, *(() if norm is None else (norm.node,)))


def _steps(walk: Walk) -> list[_Step]:
    """The nodes of the main graph with the names of this graph that they read."""
    reads: list[set[str]] = [set() for _ in walk.scopes[""].nodes]
    holders: dict[str, int | None] = {}  # the node of the main graph that holds a scope
    for path, scope in walk.scopes.items():
        holders[path] = scope.node if scope.parent in ("", None) else holders[scope.parent]
    for place in walk.places():
        holder = holders[place.scope] if place.scope else place.node
        if holder is None:  # the body of a function reads its arguments only
            continue
        for operand in range(len(walk.node(place).input)):
            tensor = walk.operand(place, operand)
            scope_of, name = ("", "") if tensor is None else walk.origin(tensor)
            if name and not scope_of:
                reads[holder].add(name)
    return [_Step(node, names) for node, names in zip(walk.scopes[""].nodes, reads, strict=True)]


def _folded(steps: Sequence[_Step], stored: Set[str], layers: Set[int]) -> list[_Step]:
    """The nodes that compute from constants alone and give the same in every copy, in order."""
    constants = set(stored)
    folded = []
    for index, step in enumerate(steps):
        node = step.node
        # Bodies and operators of other domains may be random, so they do not count as constant.
        is_plain = node.domain in ("", "ai.onnx") and node.op_type not in RANDOM
        has_body = any(a.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for a in node.attribute)
        if is_plain and not has_body and index not in layers and step.reads <= constants:
            constants.update(node.output)
            folded.append(step)
    return folded


def _outputs(steps: Iterable[_Step]) -> set[str]:
    return {name for step in steps for name in step.node.output if name}


def _slice(steps: Sequence[_Step], wanted: Iterable[str]) -> tuple[list[_Step], set[str]]:
    """The steps that some tensors need, in order, and all names that the steps need or return."""
    needed = set(wanted)
    kept = []
    for step in reversed(steps):
        if not needed.isdisjoint(step.node.output):
            needed |= step.reads
            kept.append(step)
    return kept[::-1], needed - {""}
