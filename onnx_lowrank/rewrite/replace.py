"""Layers and their factors -> a new model that differs from the old one in nothing else.

Rules:

1. The new proto is a copy of the input's. Chains replace the nodes of the layers that the plan names, in
   their places. The last node of a chain keeps the node's name, doc string, metadata and output. Of a sum's
   layers, only encoders do, and one decoder stands in the place of the sum (`rewrite.sums`).
2. Factors are stored where the weight was stored (initializer or Constant node), in its dtype, under new
   names that collide with nothing. Before IR 4, initializers had to be inputs of the graph, so there the
   factors are Constant nodes.
3. Tensors that only rewritten nodes read go with them: the weight, its views, a folded BatchNorm's
   parameters, an old bias, and their graph inputs, value_info and quantization annotations. A new bias
   takes the place and the shape of the old one; it includes a Gemm's beta, so the attribute goes.
4. Layers that stay may get new numbers (`rewrite.refit`). They come before the layers that narrow them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto

from onnx_lowrank.core.factors import Certificate, Factors
from onnx_lowrank.core.layer import Layer, Use
from onnx_lowrank.core.option import Lowering, Option
from onnx_lowrank.errors import InputError
from onnx_lowrank.files.load import Model
from onnx_lowrank.files.tensors import inline
from onnx_lowrank.graph.walk import Place, Walk, label
from onnx_lowrank.graph.weights import dtype_of
from onnx_lowrank.layers.bias import bias
from onnx_lowrank.layers.binding import Binding, Sum
from onnx_lowrank.operators import registry
from onnx_lowrank.operators.family import Operands, Site
from onnx_lowrank.operators.fragment import Fragment
from onnx_lowrank.rewrite.edits import Edits, Store
from onnx_lowrank.rewrite.heads import less_of, narrow_bias, resize
from onnx_lowrank.rewrite.narrow import narrow, narrow_weight, varying_axis
from onnx_lowrank.rewrite.packed import Packs
from onnx_lowrank.rewrite.refit import Operand, Refitted, operands, source
from onnx_lowrank.rewrite.sums import Encoded, add_up


@dataclass(frozen=True, slots=True)
class Replacement:
    """One layer of the plan, ready to be written.

    Attributes:
        binding: The layer and the place of its weight.
        option: Its option.
        factors: Its factors as stored: in the weight's dtype.
        certificate: The proved bounds of their error.
        bias: The new bias in place of `bias(model, walk, binding).values`, shape (f,), of any float dtype;
            None leaves the bias as it is.
    """

    binding: Binding
    option: Option
    factors: Factors
    certificate: Certificate
    bias: NDArray[Any] | None = None


@dataclass(frozen=True, slots=True)
class Rewritten:
    """The new model, and the fate of the old one's parts.

    Attributes:
        model: The new model.
        chains: For each layer and each of its uses, the names of the chain's nodes, in order.
        removed_inputs: Graph inputs that were removed with their initializers.
        proofs: For each layer, its option and the certificate of its factors; None without one.
    """

    model: Model
    chains: Mapping[str, tuple[tuple[str, ...], ...]]
    removed_inputs: tuple[str, ...]
    proofs: Mapping[str, tuple[Option, Certificate | None]] = field(default_factory=dict)


def rewrite(
    model: Model,
    walk: Walk,
    replacements: Iterable[Replacement | Refitted],
    store: Store = inline,
) -> Rewritten:
    """Replace layers by their chains, and the numbers of layers that stay.

    Args:
        model: The input model; it is not changed.
        walk: Its walk.
        replacements: The layers to replace, with their factors. They are consumed one by one, so a generator
            need not hold the factors of more than one layer beside the stored ones.
        store: Makes the new tensors.

    Raises:
        InputError: A replacement has a bias, but its layer has no bias that can be changed, or the dtype
            cannot hold the new one.
    """
    writer = _Writer(model, walk, store)
    for replacement in replacements:
        if isinstance(replacement, Refitted):
            writer.refit(replacement)
        else:
            writer.replace(replacement)
    proto, removed = writer.finish()
    return Rewritten(replace(model, proto=proto, path=None), writer.chains, removed, writer.proofs)


class _Writer:
    """Plans the edits of all scopes."""

    def __init__(self, model: Model, walk: Walk, store: Store) -> None:
        self.chains: dict[str, tuple[tuple[str, ...], ...]] = {}
        self.proofs: dict[str, tuple[Option, Certificate | None]] = {}
        # By the first layer that shares it: the names of the nodes of an encoder, and of its result.
        self._encoders: dict[str, tuple[tuple[str, ...], str]] = {}
        # By the ids of the layers of a sum: those that are written, with the biases that move behind the sum.
        self._sums: dict[tuple[str, ...], dict[str, tuple[Encoded, NDArray[Any] | None]]] = {}
        self._fresh: dict[Operand, NDArray[Any]] = {}  # New numbers of layers that will be narrowed.
        self._model = model
        self._walk = walk
        self.edits = Edits(model, walk, store)
        self.packs = Packs(model, walk, self.edits)
        self._turns = {place: turn for turn, place in enumerate(walk.places())}

    def refit(self, refitted: Refitted) -> None:
        """Plan new numbers for a layer that stays."""
        found = operands(self._model, self._walk, refitted.binding, refitted.weight, refitted.bias)
        if found is None:
            raise RuntimeError(f"{refitted.binding.layer.id!r} cannot store its new numbers")
        if refitted.is_narrowed:
            self._fresh.update(found)
            return
        for operand, values in found.items():
            stored = source(self._walk, operand)
            if stored is not None:
                self.edits.renew(stored, values)

    def finish(self) -> tuple[ModelProto, tuple[str, ...]]:
        """Apply all edits; returns the new model and the deleted graph inputs."""
        self.edits.turn = len(self._turns)
        self.packs.flush()
        return self.edits.apply()

    def replace(self, replacement: Replacement) -> None:
        """Plan the edits for one layer."""
        binding, layer = replacement.binding, replacement.binding.layer
        places = [Place(use.scope, use.node) for use in layer.uses]
        nodes = [self._walk.node(place) for place in places]
        operator = registry.family(nodes[0])
        self.edits.turn = self._turns[places[0]]
        self.proofs[layer.id] = replacement.option, replacement.certificate
        if replacement.option.lowering is Lowering.NARROW:
            self.chains[layer.id] = (self._narrow(replacement, nodes[0]),)
            return
        if replacement.option.lowering is Lowering.SHARED:
            self.chains[layer.id] = (self._share(replacement, nodes),)
            return
        if replacement.option.lowering is Lowering.SUMMED:
            self._encode(replacement, nodes)
            return
        arrays = operator.layout(layer, nodes, replacement.factors, replacement.option.lowering)
        name = binding.stored.source.name
        is_split = replacement.option.lowering is Lowering.SPLIT
        parts = np.split(arrays[0], replacement.option.k) if is_split else [arrays[0]]
        encoders = [self.edits.keep(binding.stored.source, f"{name}_encoder", part) for part in parts]
        decoder = self.edits.keep(binding.stored.source, f"{name}_decoder", arrays[1])
        slices = tuple(encoders) if is_split else ()
        new_bias = self._new_bias(replacement, nodes[0])
        names = Operands("", encoders[0], decoder, new_bias, self._rows(replacement), slices)
        self.chains[layer.id] = tuple(
            self._chain(replacement, nodes, index, names) for index in range(len(nodes))
        )

    def _rows(self, replacement: Replacement) -> tuple[str, str] | None:
        """Store the kept rows of a sparse table, and the place of every row among them."""
        origin, rows = replacement.binding.stored.source, replacement.factors.rows
        if rows is None:
            return None
        kept = rows.values.T
        # The places of all other rows are that of the zeros behind the kept rows.
        places = np.full(replacement.binding.layer.c, len(kept), np.int32)
        places[rows.indices] = np.arange(len(kept))
        table = np.concatenate([kept, np.zeros_like(kept[:1], shape=(1, kept.shape[1]))])
        return (
            self.edits.keep(origin, f"{origin.name}_places", places),
            self.edits.keep(origin, f"{origin.name}_kept", table),
        )

    def _narrow(self, replacement: Replacement, node: NodeProto) -> tuple[str, ...]:
        """Plan a narrower weight for a layer's node, and narrower partners; returns the node's name."""
        binding, layer = replacement.binding, replacement.binding.layer
        (use,) = layer.uses
        if binding.hidden is None:
            raise InputError(f"The layer {layer.id!r} has no partners to narrow: choose another option.")
        factors = replacement.factors
        less = less_of(layer, factors, binding.hidden.shared)
        width, place = replacement.option.j, Place(use.scope, use.node)
        taken = self.packs.take_all(binding, less, self._fresh)
        narrow(self._model, self._walk, self.edits, binding.hidden, less, width, taken, self._fresh)
        resize(self._model, self._walk, self.edits, binding, width)
        self.packs.resize(binding, width)
        weight = narrow_weight(self._walk, binding, factors, width)
        origin, stored = binding.stored.source, ""
        if layer.packs_own:
            axis = varying_axis(self._walk, binding, 1)
            self.packs.put(place, use.operand, axis, weight, origin, layer, width)
        else:
            stored = self.edits.keep(origin, f"{origin.name}_narrow", np.ascontiguousarray(weight))
        new_bias = self._new_bias(replacement, node)
        fragment = Fragment(label(node), self.edits.unique, self._walk.opsets[use.scope])
        fragment.copy("narrow", node, {use.operand: stored})
        self.packs.copied(place, fragment.nodes[-1])
        if new_bias:
            registry.family(node).set_bias(fragment.nodes[-1], new_bias)
        self._splice(fragment.nodes, use, node, layer)
        self._release(layer, use)
        return (fragment.nodes[-1].name,)

    def _share(self, replacement: Replacement, nodes: Sequence[NodeProto]) -> tuple[str, ...]:
        """Plan a decoder in a node's place, behind the encoder that the first of its group writes.

        Returns the names of the nodes from the encoder on.
        """
        binding, layer = replacement.binding, replacement.binding.layer
        first = replacement.option.encoder
        # The operators of the chain are the layer's own.
        own = replace(replacement.option, lowering=Lowering.NATIVE, encoder="")
        native = replace(replacement, option=own)
        arrays = registry.family(nodes[0]).layout(layer, nodes, replacement.factors, Lowering.NATIVE)
        origin = binding.stored.source
        before = self._encoders.get(first)
        encoder = self.edits.keep(origin, f"{origin.name}_encoder", arrays[0]) if before is None else ""
        decoder = self.edits.keep(origin, f"{origin.name}_decoder", arrays[1])
        names = Operands("", encoder, decoder, self._new_bias(replacement, nodes[0]))
        fragment = self._fragment(native, nodes, 0, names)
        *head, last = fragment.nodes
        if before is None:
            if not layer.holds_factor(replacement.option):
                raise RuntimeError(f"{first!r} has to be written before {layer.id!r}")
            before = self._encoders[first] = tuple(node.name for node in head), head[-1].output[0]
        else:
            # The encoder of this chain is the one that is there already.
            last.input[list(last.input).index(head[-1].output[0])] = before[1]
            head = []
        self._splice([*head, last], layer.uses[0], nodes[0], layer)
        self._release(layer, layer.uses[0])
        return (*before[0], last.name)

    def _encode(self, replacement: Replacement, nodes: Sequence[NodeProto]) -> None:
        """Plan an encoder in a node's place; after the last layer of its sum, plan what adds them up, too."""
        binding, layer = replacement.binding, replacement.binding.layer
        if binding.sum is None:
            raise RuntimeError(f"the result of {layer.id!r} is in no sum")
        native = replace(replacement, option=replace(replacement.option, lowering=Lowering.NATIVE))
        arrays = registry.family(nodes[0]).layout(layer, nodes, replacement.factors, Lowering.NATIVE)
        origin, decoder = binding.stored.source, ""
        encoder = self.edits.keep(origin, f"{origin.name}_encoder", arrays[0])
        if layer.holds_factor(replacement.option):
            decoder = self.edits.keep(origin, f"{origin.name}_decoder", arrays[1])
        *head, last = self._fragment(native, nodes, 0, Operands("", encoder, decoder, "")).nodes
        value = head[-1].output[0]
        self._put(head, layer.uses[0], nodes[0], layer)
        self._release(layer, layer.uses[0])
        parts = self._sums.setdefault(layer.addends, {})
        encoded = Encoded(tuple(node.name for node in head), value, last)
        parts[layer.id] = encoded, self._moved_bias(replacement, nodes[0])
        if len(parts) == len(layer.addends):
            self._add_up(binding, binding.sum, nodes[0])

    def _add_up(self, binding: Binding, added: Sum, node: NodeProto) -> None:
        """Plan the sum of the encoders of its layers, and its decoder, with a bias of one layer's shape."""
        layer = binding.layer
        parts = [self._sums[layer.addends][name] for name in layer.addends]
        moved = [values for _, values in parts if values is not None]
        name = ""
        if moved:
            self.edits.turn = self._turns[added.nodes[-1]]
            shape = registry.family(node).bias_shape(layer.uses[0], layer.uses[0].laid_out, layer.f)
            values = np.sum(np.asarray(moved, np.float64), axis=0).reshape(shape)
            stored = _finite(values, dtype_of(self._walk, binding.stored), layer)
            name = self.edits.keep(binding.stored.source, f"{label(node)}_bias", stored)
        encoded = [part for part, _ in parts]
        decoder = add_up(self._walk, self.edits, added, encoded, name)
        for other, part in zip(layer.addends, encoded, strict=True):
            self.chains[other] = ((*part.names, decoder),)

    def _moved_bias(self, replacement: Replacement, node: NodeProto) -> NDArray[Any] | None:
        """The bias that a node of a sum does not add any more, shape (f,); one behind the node is renewed."""
        old = bias(self._model, self._walk, replacement.binding)
        if old is None or not old.in_node:
            self._new_bias(replacement, node)
            return None
        self.edits.unread(old.place, old.operand)
        return old.values if replacement.bias is None else replacement.bias

    def _new_bias(self, replacement: Replacement, node: NodeProto) -> str:
        """Store a layer's new bias in the dtype of its computation; returns the bias's name for the chain.

        The name is "" if the bias stays as it is, or if an Add behind the chain adds the new one.
        """
        binding, layer = replacement.binding, replacement.binding.layer
        norm = layer.batchnorm
        values = norm.bias if replacement.bias is None and norm is not None else replacement.bias
        if values is None:
            return ""
        old = bias(self._model, self._walk, binding)
        if old is None:
            raise InputError(f"The layer {layer.id!r} has no bias that can be changed: give none for it.")
        dtype, shape = dtype_of(self._walk, binding.stored), old.shape
        if replacement.option.lowering is Lowering.NARROW:
            values = narrow_bias(layer, replacement.factors, values, replacement.option.j)
            shape = tuple(values.size if n == layer.f else n for n in shape)
        stored = _finite(values.reshape(shape), dtype, layer)
        if layer.packs_own and replacement.option.lowering is Lowering.NARROW:
            axis, source = stored.shape.index(values.size), binding.stored.source
            # The node keeps its attributes, such as a Gemm's beta.
            stored = stored / registry.family(node).bias_scale(node) if old.in_node else stored
            self.packs.put(old.place, old.operand, axis, stored, source, layer, replacement.option.j)
            return ""
        name = self.edits.keep(binding.stored.source, f"{label(node)}_bias", stored)
        self.edits.unread(old.place, old.operand)
        if old.place.node == layer.uses[0].node:
            return name
        self.edits.scopes[old.place.scope].repointed[old.place.node, old.operand] = name
        return ""

    def _chain(
        self, replacement: Replacement, nodes: Sequence[NodeProto], index: int, names: Operands
    ) -> tuple[str, ...]:
        """Plan the chain of one use; returns the names of its nodes."""
        layer = replacement.binding.layer
        use, node = layer.uses[index], nodes[index]
        fragment = self._fragment(replacement, nodes, index, names)
        self._splice(fragment.nodes, use, node, layer)
        self._release(layer, use)
        return tuple(node.name for node in fragment.nodes)

    def _fragment(
        self, replacement: Replacement, nodes: Sequence[NodeProto], index: int, names: Operands
    ) -> Fragment:
        """The nodes of the chain of one use, whose input and own bias are still unnamed."""
        binding, layer = replacement.binding, replacement.binding.layer
        use, node = layer.uses[index], nodes[index]
        fragment = Fragment(label(node), self.edits.unique, self._walk.opsets[use.scope])
        cast = binding.casts[index]
        if cast is not None:
            names = _cast(fragment, names, cast)
        operator = registry.family(node)
        value = node.input[operator.activation(use.operand)]
        has_bias = operator.bias is not None and len(node.input) > operator.bias
        old_bias = node.input[operator.bias] if has_bias and operator.bias is not None else ""
        names = replace(names, value=value, bias=names.bias or old_bias)
        read = self._walk.read_outputs(Place(use.scope, use.node))
        operator.chain(fragment, Site(layer, use, node, nodes, replacement.option, read), names)
        return fragment

    def _splice(self, chain: list[NodeProto], use: Use, node: NodeProto, layer: Layer) -> None:
        """Put a chain in a node's place; its last node takes the node's name, notes and first output."""
        norm = None if layer.batchnorm is None else self._walk.node(Place(use.scope, layer.batchnorm.node))
        chain[-1].output[0] = (node if norm is None else norm).output[0]
        self._put(chain, use, node, layer)

    def _put(self, chain: list[NodeProto], use: Use, node: NodeProto, layer: Layer) -> None:
        """Put nodes in a node's place; the last one takes the node's name and notes."""
        edit = self.edits.scopes[use.scope]
        last, gone = chain[-1], list(node.output)
        if layer.batchnorm is not None:
            gone += self._walk.node(Place(use.scope, layer.batchnorm.node)).output
            edit.deleted.add(layer.batchnorm.node)
        made = {name for link in chain for name in link.output}
        edit.forgotten.update(name for name in gone if name and name not in made)
        last.name = node.name or last.name
        last.doc_string = node.doc_string
        last.metadata_props.extend(node.metadata_props)
        edit.deleted.add(use.node)
        edit.before.setdefault(use.node, []).extend(chain)

    def _release(self, layer: Layer, use: Use) -> None:
        """Note the tensors that the chain of a use does not read any more (rule 3)."""
        self.edits.unread(Place(use.scope, use.node), use.operand)
        if layer.batchnorm is not None:
            for operand in range(1, 5):
                self.edits.unread(Place(use.scope, layer.batchnorm.node), operand)


def _finite(values: NDArray[Any], dtype: np.dtype[Any], layer: Layer) -> NDArray[Any]:
    """The new bias of a layer in the dtype of its computation."""
    with np.errstate(over="ignore"):
        stored = values.astype(dtype)
    if not np.isfinite(stored).all():
        raise InputError(f"The new bias of {layer.id!r} is not finite in {dtype}: exclude this layer.")
    return stored


def _cast(fragment: Fragment, names: Operands, kind: int) -> Operands:
    """Add Casts of the stored factors and kept rows to the type in which the chain computes."""
    slices = tuple(fragment.add("encoder_cast", "Cast", [name], to=kind) for name in names.slices)
    encoder = slices[0] if slices else fragment.add("encoder_cast", "Cast", [names.encoder], to=kind)
    decoder = fragment.add("decoder_cast", "Cast", [names.decoder], to=kind)
    rows = names.rows
    if rows is not None:
        rows = rows[0], fragment.add("kept_cast", "Cast", [rows[1]], to=kind)
    return replace(names, encoder=encoder, decoder=decoder, rows=rows, slices=slices)
