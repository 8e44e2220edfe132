"""Two adjacent linear operators -> one, where that is smaller.

The decoder of a chain often feeds another linear operator alone: the encoder of the next chain, or an
operator that was kept. Two matrices with nothing between them are one matrix. Rules:

1. A and B are two operators of one scope. B reads A's output once, as its data, and nothing else reads it.
   An Add may stand between them, behind a MatMul with its weight on the right, if its constant has at most
   one axis; it counts as A's bias. At least one of A and B belongs to a chain, and they are not the two
   factors of one layer: the plan has split these. A node belongs to a chain if it has the name of a node in
   the chain and no other node has this name. The user wants neither of them left alone.
2. The weights and the biases that change are constants (initializers or Constant nodes) without other
   readers. They have the same float dtype, and no view stands between them and their nodes.
3. Conv → Conv, of one group. If B is 1×1 without strides or pads, the product is W_B W_A with A's geometry.
   If A is such a Conv, the product is Σ_m W_B[f, m, …] W_A[m, c] with B's geometry. Then A may have a bias
   only if B pads nothing (the padding lacks A's bias), and B's output must not be larger than its input,
   or the product could be evaluated at more positions than A was.
4. MatMul or Gemm → MatMul or Gemm, with matrices as weights on the same side and data that is not
   transposed. The product is W_B W_A, as maps from inputs to outputs, with A's alpha; B's alpha, beta and
   layout stay. A MatMul behind a Gemm with a C becomes a Gemm, unless an Add stands behind it.
5. A's bias goes through B into a new bias: W_B b_A + b_B, summed over B's kernel. For this, the C of a Gemm
   (A's and B's) must have at most one value per feature; the new bias includes beta. If A has no bias, any
   bias of B stays as it is. If neither B nor an Add behind it takes a bias, A's Add moves behind B.
6. The product has fewer elements than the two weights together, and the number of parameters falls with
   the biases counted, too. So both parameters and MACs fall. The product is computed in float64 and rounded
   once; the pair stays if a value is not finite in the stored dtype.
7. The product is stored where B's weight was. The node keeps B's name, doc string, metadata, output and
   place, and takes those entries of A's metadata with keys that B's lacks. A goes, with both weights and
   all metadata about them.
8. The pair that saves most merges first; among equals, the first in the graph. This repeats until nothing
   merges.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from onnx_lowrank.core.factors import Certificate
from onnx_lowrank.core.outcome import Merge
from onnx_lowrank.files.load import array
from onnx_lowrank.files.tensors import inline
from onnx_lowrank.graph.walk import Place, Walk, is_op, label
from onnx_lowrank.graph.weights import Source, resolve
from onnx_lowrank.layers.bias import is_own
from onnx_lowrank.layers.find import canonical_weight
from onnx_lowrank.linalg.backend import one_blas_thread
from onnx_lowrank.operators import registry
from onnx_lowrank.rewrite.edits import Edits, Store
from onnx_lowrank.rewrite.product import (
    LinearMap,
    Pair,
    Product,
    is_per_feature,
    multiplied,
    pads_nothing,
    product_shape,
)
from onnx_lowrank.rewrite.replace import Rewritten

_Array = NDArray[np.float64]


def merge(
    rewritten: Rewritten, store: Store = inline, spared: Collection[tuple[str, str]] = ()
) -> tuple[Rewritten, tuple[Merge, ...]]:
    """Multiply adjacent linear operators where the product is smaller.

    Args:
        rewritten: A model and its chains; it is not changed. Its files include the file of `store`.
        store: Makes the new tensors.
        spared: Scope and name of the nodes to leave alone.

    Returns:
        The model, and the merges in the order in which they were made. In its chains, a product replaces
        every node that went into it. If nothing merges, the model is the same object.

    Raises:
        InputError: The disk is full.
    """
    made: list[Merge] = []
    while True:  # ends, since every merge removes a node
        step = _Round(rewritten, store, {merged.second for merged in made}, spared)
        # One thread, or the order of the sums, and with it the last bits, would depend on the machine.
        with one_blas_thread():
            found = step.run()
        if not found:
            return rewritten, tuple(made)
        made += found
        rewritten = step.finish()


class _Round:
    """Merges pairs without common nodes, all in one copy of a model."""

    def __init__(
        self, rewritten: Rewritten, store: Store, merged: set[str], spared: Collection[tuple[str, str]]
    ) -> None:
        """Walk a model.

        Args:
            rewritten: The model.
            store: Makes the new tensors.
            merged: Names of the nodes that are products already.
            spared: Scope and name of the nodes to leave alone.
        """
        self._rewritten = rewritten
        self._model = rewritten.model
        self._merged = merged
        self._spared = spared
        self._walk = Walk(self._model.proto)
        self._owners = _owners(self._walk, rewritten.chains)
        self._edits = Edits(self._model, self._walk, store)
        self._renamed: dict[str, str] = {}

    def run(self) -> list[Merge]:
        """Plan all merges of this round, the largest savings first (rule 8)."""
        found: list[Merge] = []
        busy: set[Place] = set()
        # By place among equals, or the result would depend on the order of the search.
        for pair in sorted(self._pairs(), key=lambda pair: (-pair.saved, pair.first.place)):
            places = {pair.first.place, pair.second.place}
            # A node merges once a round: the walk does not see products, only the next round's does.
            made = None if places & busy else multiplied(self._model, pair)
            if made is not None:  # not before: a pair that is not finite must not block its neighbours
                busy |= places
                found.append(self._replace(pair, made))
        return found

    def finish(self) -> Rewritten:
        """Apply the planned edits; returns the new model with its chains."""
        proto, removed = self._edits.apply()
        # dict.fromkeys, as several nodes of one chain can be in the same product.
        chains = {
            layer: tuple(
                tuple(dict.fromkeys(self._renamed.get(name, name) for name in chain)) for chain in uses
            )
            for layer, uses in self._rewritten.chains.items()
        }
        removed = tuple(sorted((*self._rewritten.removed_inputs, *removed)))
        proofs = self._rewritten.proofs
        return Rewritten(replace(self._model, proto=proto, path=None), chains, removed, proofs)

    # --- finding ----------------------------------------------------------------------------------

    def _pairs(self) -> Iterator[Pair]:
        """Every pair that the rules allow, before its numbers are read."""
        for first in self._walk.places():
            adder = self._adder(first)
            read = self._only_reader(first if adder is None else adder[0])
            if read is None:
                continue
            second, operand = read
            kinds = [self._walk.node(place) for place in (first, second)]
            is_data = operand < 2 and _multiply(*kinds) and registry.family(kinds[1]).is_data(operand)
            # No Add for data on the right: its vector lies along the last axis, but the features do not.
            if not is_data or (adder is not None and operand) or not self._is_wanted(first, second):
                continue
            operators = [self._operator(place, 1 - operand) for place in (first, second)]
            if operators[0] is not None and operators[1] is not None:
                pair = self._pair(operators[0], operators[1])
                if pair is not None:
                    yield pair

    def _only_reader(self, place: Place) -> tuple[Place, int] | None:
        """Rule 1: the only reader of a node's result, in the same scope, and the operand that reads it."""
        result = self._walk.result(place)
        reads = [] if result is None or self._walk.is_output(result) else self._walk.consumers(result)
        # Reads, not readers: MatMul(y, y) is one node that reads y twice.
        if len(reads) != 1 or reads[0][0].scope != place.scope:
            return None
        return reads[0]

    def _adder(self, place: Place) -> tuple[Place, int] | None:
        """Rule 1: the Add behind a MatMul, and the operand that is a constant without other readers."""
        operator = registry.known(self._walk.node(place))
        # Before opset 7, Add has other rules of broadcasting.
        if operator is None or not operator.adds_behind or self._walk.opsets[place.scope] < 7:
            return None
        read = self._only_reader(place)
        if read is None or not is_op(self._walk.node(read[0]), ("Add",)):
            return None
        adder, operand = read
        source = self._sole_constant(adder, 1 - operand)
        return None if source is None or len(source.tensor.dims) > 1 else (adder, 1 - operand)

    def _is_wanted(self, first: Place, second: Place) -> bool:
        """Rule 1: whether a node is in a chain, neither is spared, and they are not one layer's factors."""
        if any((place.scope, label(self._walk.node(place))) in self._spared for place in (first, second)):
            return False
        layers = [self._owners.get(place, frozenset()) for place in (first, second)]
        # Not by the layers alone: a product carries the layers of both its nodes and is no factor any more.
        are_factors = layers[0] == layers[1] and not any(
            self._walk.node(place).name in self._merged for place in (first, second)
        )
        return any(layers) and not are_factors

    def _operator(self, place: Place, side: int) -> LinearMap | None:
        """Rules 2 to 4 for one node; None if its weight has other readers, or it has several groups."""
        node = self._walk.node(place)
        is_complete = self._walk.operand(place, 1 - side) is not None
        if not is_complete or any(attribute.ref_attr_name for attribute in node.attribute):
            return None
        operator = registry.family(node)
        weight = self._sole_constant(place, side)
        if weight is None or (operator.product == "matrix" and len(weight.tensor.dims) != 2):
            return None
        if operator.transposes(node, 1 - side):
            return None
        maps = canonical_weight(node, side, array(self._model, weight.tensor))
        if isinstance(maps, str) or len(maps) > 1:
            return None
        # None for a weight on the left (side 0): an Add's vector would not lie along the features.
        bias = self._adder(place) if side else None
        if operator.bias is not None and self._walk.operand(place, operator.bias) is not None:
            bias = place, operator.bias
        return LinearMap(place, node, side, weight, maps.shape[1:], bias)

    def _sole_constant(self, place: Place, operand: int) -> Source | None:
        """Rule 2: the source of an operand that is a constant without views and without other readers."""
        stored = resolve(self._walk, self._walk.operand(place, operand))
        if isinstance(stored, str) or stored.views:
            return None
        is_sole_reader = is_own(self._model, self._walk, stored.source, place, operand)
        return stored.source if is_sole_reader else None

    def _pair(self, first: LinearMap, second: LinearMap) -> Pair | None:
        """Rules 2 to 6, without the numbers."""
        shape = product_shape(first, second)
        # Not >, or a merge that saves no MACs would cost the rounding of the product.
        if shape is None or prod(shape) >= prod(first.shape) + prod(second.shape):
            return None
        biases = self._biases(first, second)
        if biases is None:
            return None
        parts = [source for source in (first.weight, second.weight, *biases) if source is not None]
        before = sum(prod(source.tensor.dims) for source in parts)
        after = prod(shape) + (0 if biases[0] is None else shape[0])
        # Also after >= before: a new bias can cost more than the weights save, e.g. if b_A has one value.
        if len({source.tensor.data_type for source in parts}) > 1 or after >= before:
            return None
        return Pair(first, second, shape, biases, before - after)

    def _biases(self, first: LinearMap, second: LinearMap) -> tuple[Source | None, Source | None] | None:
        """Rule 5: the sources of both biases, (None, None) if A has none; None if they cannot be joined."""
        if first.bias is None:
            return None, None
        if first.family.product == "kernel":
            if not second.is_pointwise and not pads_nothing(second.node):
                return None
        elif self._walk.opsets[first.place.scope] < 7:  # before, Gemm had other rules of broadcasting
            return None
        found: list[Source | None] = []
        for operator in (first, second):
            source = None if operator.bias is None else self._sole_constant(*operator.bias)
            if operator.bias and (source is None or not is_per_feature(source.tensor.dims, operator)):
                return None
            found.append(source)
        return found[0], found[1]

    # --- making -----------------------------------------------------------------------------------

    def _replace(self, pair: Pair, product: Product) -> Merge:
        """Plan the edits for one pair (rule 7)."""
        first, second, edits = pair.first, pair.second, self._edits
        # A copy: the walk reads the model's own nodes until the edits are applied.
        node = NodeProto()
        node.CopyFrom(second.node)
        node.name = node.name or edits.unique(f"{label(node)}/merged")
        node.input[second.data] = first.node.input[first.data]
        node.input[second.side] = edits.keep(second.weight, f"{second.weight.name}_merged", product.weight)
        # A's geometry: B is 1×1 without strides or pads, so it adds nothing to it.
        if second.family.product == "kernel" and second.is_pointwise:
            _set_attributes(node, first.node)
        made = [node]
        if product.bias is not None:
            made += self._put_bias(pair, node, product.bias)
        keys = {entry.key for entry in node.metadata_props}
        node.metadata_props.extend(entry for entry in first.node.metadata_props if entry.key not in keys)
        for operator in (first, second):
            edits.unread(operator.place, operator.side)
        if first.bias is not None:
            edits.unread(*first.bias)
        edit = edits.scopes[second.place.scope]
        edit.before.setdefault(second.place.node, []).extend(made)
        gone = [first.place] if first.adder is None else [first.place, first.adder]
        edit.deleted |= {place.node for place in (*gone, second.place)}
        edit.forgotten |= {self._walk.node(place).output[0] for place in gone}
        return self._merge(pair, node.name, product.certificate)

    def _put_bias(self, pair: Pair, node: NodeProto, new_bias: NDArray[Any]) -> list[NodeProto]:
        """Add the new bias to the product (rule 5); returns the new nodes behind it."""
        first, second, edits = pair.first, pair.second, self._edits
        name = edits.keep(second.weight, f"{label(node)}_merged_bias", new_bias)
        if second.bias is not None:
            edits.unread(*second.bias)
        # This case first: B's own Add stays and takes the new bias, so that there are never two Adds.
        if second.bias is not None and second.adder is not None:
            edits.scopes[second.place.scope].repointed[second.adder.node, second.bias[1]] = name
            return []
        if first.adder is not None and second.family.bias is None:
            add = NodeProto()
            add.CopyFrom(self._walk.node(first.adder))
            add.output[0] = node.output[0]
            node.output[0] = edits.unique(f"{add.output[0]}_merged")
            add.input[:] = [node.output[0], name]
            return [add]
        # A MatMul behind a Gemm reads a matrix, so it can become a Gemm, which takes a bias.
        node.op_type = first.node.op_type if second.family.bias is None else node.op_type
        registry.family(node).set_bias(node, name)
        return []

    def _merge(self, pair: Pair, name: str, certificate: Certificate) -> Merge:
        """Describe the merge into the node of this name, and note A's new name for its chains."""
        first, second = pair.first, pair.second
        layers = [self._owners.get(operator.place, frozenset()) for operator in (first, second)]
        if layers[0]:
            self._renamed[first.node.name] = name
        return Merge(
            first=label(first.node),
            second=name,
            layers=tuple(sorted(layers[0] | layers[1])),
            elements=(prod(first.shape), prod(second.shape), prod(pair.shape)),
            saved=pair.saved,
            certificate=certificate,
        )


def _multiply(first: NodeProto, second: NodeProto) -> bool:
    """Whether two nodes are linear maps of the same kind."""
    one, other = registry.known(first), registry.known(second)
    return one is not None and other is not None and one.product is not None and one.product == other.product


def _owners(walk: Walk, chains: Mapping[str, tuple[tuple[str, ...], ...]]) -> dict[Place, frozenset[str]]:
    """For every node of a chain, the layers with a chain that contains it (rule 1)."""
    layers: dict[str, set[str]] = defaultdict(set)
    for layer, uses in chains.items():
        for chain in uses:
            for name in chain:
                layers[name].add(layer)
    names = {place: walk.node(place).name for place in walk.places()}
    bearers = Counter(names.values())
    return {
        place: frozenset(layers[name])
        for place, name in names.items()
        if name in layers and bearers[name] == 1
    }


def _set_attributes(node: NodeProto, source: NodeProto) -> None:
    """Give a node the attributes of another one."""
    del node.attribute[:]
    node.attribute.extend(source.attribute)
