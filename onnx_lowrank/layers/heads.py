"""Layers with attention between them, whose heads can be narrowed: values and output, queries and keys.

Rules:

1. Attention is a MatMul of two computed tensors before a Softmax (of queries and keys), or behind one (with
   the values). Each layer has one use, in the main graph, and a plain linear family (`Operator.product`).
2. Between them lie only operators that lay out elements anew, repeat heads, cast or scale all of them alike,
   and the bias of a layer. All heads get the same size, so a Reshape splits or joins heads as before.
3. Nothing else reads the tensors between, and the model does not return them. A Shape may read them: where it
   gives the size of a head (for a scale), that number is pinned.
4. The sizes of heads in the targets of Reshape and Expand are constants, or sizes of tensors between.
5. Which axis is which follows from the shapes. Open dimensions are assumed (`graph.shapes.assumed`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from onnx_lowrank.core.layer import Rows
from onnx_lowrank.files.load import Model
from onnx_lowrank.graph.walk import Place, Walk, attribute_of, is_op
from onnx_lowrank.graph.weights import FLOATS, constant
from onnx_lowrank.layers.axes import INSIDE, Axes, Part, axes_of, inside, permuted, regrouped, shared_heads
from onnx_lowrank.layers.bias import bias
from onnx_lowrank.layers.binding import Binding, Hidden, Pin, Size
from onnx_lowrank.layers.ends import End, Heads
from onnx_lowrank.layers.hidden import channel_axis, place_of
from onnx_lowrank.layers.packed import Cut, rows_of, uncut
from onnx_lowrank.layers.products import (
    ANEW,
    BIAS,
    COMPUTED,
    CUT,
    CUTS,
    LONGEST,
    MIXED,
    NO_LAYER,
    OTHER,
    READ,
    SAME,
    UNKNOWN,
    reason_of,
    softmax_behind,
)
from onnx_lowrank.layers.sizes import Followed, Sizes
from onnx_lowrank.operators import registry


class Search:
    """Follows the heads from one MatMul to the layers on both sides."""

    def __init__(self, model: Model, walk: Walk, plain: Mapping[Place, Binding], sizes: Sizes) -> None:
        self._model = model
        self._walk = walk
        self._plain = plain
        self._sizes = sizes
        self._head = 0
        self._nodes: set[tuple[Place, int]] = set()
        self._tensors: dict[str, tuple[Any, Axes, int | None]] = {}
        self._constants: list[tuple[Place, int, int]] = []
        # The parts of the axes along which constants are added.
        self._biases: list[tuple[Part, ...]] = []
        self._changed: list[Size] = []
        self._totals: list[Size] = []
        # The cut between the layer and where the walk is; the tensors that are cut by other nodes, too.
        self._cut: Cut | None = None
        self._packed: set[str] = set()
        self._others: set[Place] = set()
        # The constants that are added to all features of a packed matrix.
        self._wide: set[tuple[Place, int]] = set()
        # With the size that the target should have.
        self._followed: list[tuple[Followed, int]] = []

    def values(self, product: Place) -> Heads | str:
        """The layer that reads the result of attention, and the one that computes the values."""
        result, right = self._walk.result(product), self._walk.operand(product, 1)
        shape, given = self._sizes.of(result), self._sizes.of(right)
        if shape is None or given is None or min(len(shape), len(given)) < 2:
            return UNKNOWN
        self._head = shape[-1]
        *batch, _ = range(len(shape))
        axes = axes_of((*batch, INSIDE), shape)
        keys = len(shape)  # no axis of the result
        origins = (*range(len(shape) - len(given), len(shape) - 2), keys, INSIDE)
        self._nodes.add((product, 1))
        partner = self._from_layer(right, axes_of(origins, given), one_bias=False)
        if isinstance(partner, str):
            return partner
        return self._read(result, axes, partner)

    def behind(self, place: Place, head: int, partner: Binding, rows: Rows) -> Heads | str:
        """The layer that reads the result of a fused Attention, whose values have heads of a size."""
        result = self._walk.result(place)
        # ONNX does not infer the shape; an operator that lays out elements anew asks for one.
        shape = self._sizes.of(result) or (2, 2, rows.size)
        if len(shape) != 3 or shape[2] != rows.size:
            return MIXED
        self._head = head
        heads = Part(2, 1, rows.size // head)
        values = (heads, Part(INSIDE, 1, head)) if heads.size > 1 else (Part(INSIDE, 1, head),)
        reason = self._own_bias(partner)
        return reason or self._read(result, (*axes_of((0, 1), shape[:2]), values), End(partner, values, rows))

    def _read(self, result: Any, axes: Axes, partner: End) -> Heads | str:
        """The layer that reads the result of attention, and the one that computes the values."""
        self._cut = None
        found = self._ahead(result, axes)
        if isinstance(found, str):
            return found
        binding, axes = found
        axis = channel_axis(self._walk, binding)
        parts = () if axis is None or len(axes) < -axis.index else axes[axis.index]
        return self._pair(End(binding, parts), partner, ignores_shift=False)

    def scores(self, product: Place) -> Heads | str:
        """The layer that computes the queries, and the one that computes the keys."""
        left, right = (self._walk.operand(product, index) for index in (0, 1))
        queries, keys = self._sizes.of(left), self._sizes.of(right)
        if queries is None or keys is None or min(len(queries), len(keys)) < 2:
            return UNKNOWN
        self._head = queries[-1]
        rank = max(len(queries), len(keys))
        first, second = (range(rank - len(shape), rank - 2) for shape in (queries, keys))
        self._nodes |= {(product, 0), (product, 1)}
        partner = self._from_layer(right, axes_of((*second, INSIDE, rank), keys), one_bias=True)
        if isinstance(partner, str):
            return partner
        constants = len(self._constants)
        owner = self._from_layer(left, axes_of((*first, rank - 2, INSIDE), queries), one_bias=True)
        if isinstance(owner, str):
            return owner
        # The bias of the queries is fitted with their weight.
        del self._constants[0 if partner.rows and owner.rows else constants :]
        return self._pair(owner, partner, ignores_shift=self._ignores_shift(product))

    def _ignores_shift(self, product: Place) -> bool:
        """Whether a Softmax over the keys follows behind a scale and the addition of a mask."""
        chain = softmax_behind(self._walk, product) or []
        if not chain:
            return False
        *between, softmax = chain
        rank = len(self._sizes.of(self._walk.result(product)) or ())
        axis = attribute_of(self._walk.node(softmax), "axis", -1 if self._walk.opsets[""] >= 13 else 1)
        only = all(is_op(self._walk.node(p), ("Mul", "Div", "Add", "Cast", "Identity")) for p in between)
        scales = [p for p in between if is_op(self._walk.node(p), ("Mul", "Div"))]
        return only and axis in (-1, rank - 1) and all(self._scaled(p) is not None for p in scales)

    def _pair(self, owner: End, partner: End, *, ignores_shift: bool) -> Heads | str:
        """The pair, if both layers lay out their heads alike and rule 3 holds."""
        whole, ends = Part(INSIDE, 1, self._head), (owner, partner)
        if any(end.parts[-1:] != (whole,) for end in ends) or self._head < 2:
            return MIXED
        if prod(owner.binding.layer.kernel) != 1:
            return NO_LAYER
        shared = shared_heads(owner.parts[:-1], partner.parts[:-1])
        is_one = owner.binding.layer.id == partner.binding.layer.id
        if shared is None or is_one != (owner.rows is not None) or (is_one and owner.rows == partner.rows):
            return MIXED
        cuts = [end.cut for end in ends if end.cut is not None]
        if len({cut.has_heads for cut in cuts}) > 1:
            return CUT
        pins = self._pins()
        if isinstance(pins, str):
            return pins
        hidden = Hidden(
            producers=() if is_one else (partner.binding,),
            constants=tuple(dict.fromkeys(self._constants)),
            tensors=tuple(self._walk.origin(tensor)[1] for tensor, *_ in self._tensors.values()),
            sizes=tuple(dict.fromkeys(self._changed)),
            pins=pins,
            totals=tuple(dict.fromkeys(self._totals)),
            splits=tuple(cut.piece for cut in cuts if cut.has_heads),
            shared=shared,
            ignores_shift=ignores_shift,
        )
        heads = prod(part.size for part in owner.parts[:-1])
        return Heads(owner, partner, hidden, heads, frozenset(self._others))

    # --- the walk ---------------------------------------------------------------------------------

    def _axis(self, axes: Axes) -> int | None:
        """The axis that narrowing changes: with the numbers of a head, or all features of a packed matrix."""
        whole = None if self._cut is None else (self._cut.whole,)
        return axes.index(whole) if whole in axes and self._is_wide else inside(axes, self._head)

    @property
    def _is_wide(self) -> bool:
        """Whether a Split cuts the axis of the features, behind the tensor where the walk is."""
        return self._cut is not None and self._cut.has_heads

    def _back(self, tensor: Any, axes: Axes) -> tuple[Binding, Axes] | str:
        """Walk from a tensor to the layer that computes it, and follow its axes."""
        for _ in range(LONGEST):
            self._tensors[tensor.name] = tensor, axes, self._axis(axes)
            place = self._walk.producer(tensor)
            if place is None or place.scope:
                return NO_LAYER
            if place in self._plain:
                return self._plain[place], axes
            operand = self._data(place)
            if isinstance(operand, str):
                return operand
            self._nodes.add((place, operand))
            result, tensor = tensor, self._walk.operand(place, operand)
            before = self._before(place, result, axes, self._sizes.of(tensor))
            if isinstance(before, str):
                return before
            axes = before
            if not self._fits(tensor, axes):
                return MIXED
        return NO_LAYER

    def _ahead(self, tensor: Any, axes: Axes) -> tuple[Binding, Axes] | str:
        """Walk from a tensor to the layer that reads it, and follow its axes."""
        for _ in range(LONGEST):
            self._tensors[tensor.name] = tensor, axes, self._axis(axes)
            found = [r for r in self._walk.consumers(tensor) if not is_op(self._walk.node(r[0]), ("Shape",))]
            if len(found) != 1 or found[0][0].scope:
                return READ
            place, operand = found[0]
            self._nodes.add((place, operand))
            if place in self._plain:
                layer = self._plain[place].layer
                family = registry.family(self._walk.node(place))
                is_input = family.activation(layer.uses[0].operand) == operand
                return (self._plain[place], axes) if is_input else NO_LAYER
            if self._data(place) != operand:
                return reason_of(self._walk.node(place))
            tensor = self._walk.result(place)
            if tensor is None:
                return NO_LAYER
            behind = self._behind(place, axes, self._sizes.of(tensor))
            if isinstance(behind, str):
                return behind
            axes = behind
            if not self._fits(tensor, axes):
                return MIXED
        return NO_LAYER

    def _fits(self, tensor: Any, axes: Axes) -> bool:
        """Whether a tensor has these axes; an operator that broadcasts may give it others."""
        return self._sizes.of(tensor) == tuple(prod(part.size for part in axis) for axis in axes)

    def _data(self, place: Place) -> int | str:
        """The operand with the heads, of an operator that may lie between (rule 2)."""
        node = self._walk.node(place)
        if is_op(node, ("Cast",)) and attribute_of(node, "to", 0) not in FLOATS:
            return OTHER
        if is_op(node, SAME | ANEW | CUTS | {"Transpose", "Expand"}):
            return 0
        if is_op(node, ("Mul", "Div")) and (scaled := self._scaled(place)) is not None:
            return scaled
        if is_op(node, ("Add",)) and (added := self._biased(place)) is not None:
            return added
        return reason_of(self._walk.node(place))

    def _scaled(self, place: Place) -> int | None:
        """The operand of a Mul or Div that meets a single number; None if there is none."""
        operands = (0,) if is_op(self._walk.node(place), ("Div",)) else (0, 1)
        for operand in operands:
            shape = self._sizes.of(self._walk.operand(place, 1 - operand))
            if shape is not None and prod(shape) == 1:
                return operand
        return None

    def _biased(self, place: Place) -> int | None:
        """The operand of an Add of a constant; None if there is none."""
        for operand in (0, 1):
            if constant(self._walk, self._model, self._walk.operand(place, 1 - operand)) is not None:
                return operand
        return None

    def _before(self, place: Place, result: Any, axes: Axes, sizes: tuple[int, ...] | None) -> Axes | str:
        """The axes of an operator's operand, given those of its result."""
        node = self._walk.node(place)
        if sizes is None:
            return UNKNOWN
        if is_op(node, CUTS):
            return self._uncut(place, result, axes, sizes)
        if is_op(node, ("Transpose",)):
            return permuted(axes, np.argsort(self._order(place, len(axes))).tolist()) or MIXED
        if is_op(node, ("Expand",)):
            rest = axes[len(axes) - len(sizes) :]
            made = tuple(() if size == 1 else axis for axis, size in zip(rest, sizes, strict=True))
            return self._resized(place, made, axes) or made
        if is_op(node, ANEW):
            regained = regrouped(axes, sizes)
            return MIXED if regained is None else self._resized(place, regained, axes) or regained
        return self._added(place, axes) if is_op(node, ("Add",)) else axes

    def _behind(self, place: Place, axes: Axes, sizes: tuple[int, ...] | None) -> Axes | str:
        """The axes of an operator's result, given those of its operand."""
        node = self._walk.node(place)
        if sizes is None:
            return UNKNOWN
        if is_op(node, ("Transpose",)):
            return permuted(axes, self._order(place, len(axes))) or MIXED
        if is_op(node, ANEW):
            made = regrouped(axes, sizes)
            return MIXED if made is None else self._resized(place, axes, made) or made
        return axes if is_op(node, SAME | {"Mul", "Div"}) else reason_of(node)

    def _uncut(self, place: Place, result: Any, axes: Axes, sizes: tuple[int, ...]) -> Axes | str:
        """The axes before the one cut between a layer and attention."""
        found = None if self._cut else uncut(self._walk, self._model, place, result, axes, sizes)
        operand = self._walk.operand(place, 0)
        if found is None or operand is None:
            return CUT
        self._cut, before = found
        if not self._cut.has_heads:
            self._packed.add(operand.name)
        return before

    def _order(self, place: Place, rank: int) -> list[int]:
        return list(attribute_of(self._walk.node(place), "perm", list(range(rank))[::-1]))

    def _added(self, place: Place, axes: Axes) -> Axes | str:
        """Note the constant of an Add, which has one number for each feature, along the axis of the heads."""
        axis = self._axis(axes)
        operand = 1 - (self._biased(place) or 0)
        value = constant(self._walk, self._model, self._walk.operand(place, operand))
        if axis is None or value is None:
            return MIXED
        self._biases.append(axes[axis])
        features = prod(part.size for part in axes[axis])
        axis -= len(axes)
        if len(value.shape) < -axis or not value.shape[axis] == features == value.size:
            return OTHER
        self._constants.append((place, operand, axis))
        if self._cut is not None:
            self._wide.add((place, operand))
        return axes

    def _own_bias(self, binding: Binding) -> str:
        """Note the bias of a layer's own node; why the heads stay, or ""."""
        place = place_of(binding)
        operand = registry.family(self._walk.node(place)).bias
        tensor = None if operand is None else self._walk.operand(place, operand)
        if operand is None or tensor is None:
            return ""
        value, axis = constant(self._walk, self._model, tensor), channel_axis(self._walk, binding)
        if value is None or axis is None or value.size != binding.layer.f:
            return BIAS
        self._constants.append((place, operand, -1 if value.ndim == 1 else axis.index))
        self._wide.add((place, operand))
        return ""

    def _from_layer(self, tensor: Any, axes: Axes, *, one_bias: bool) -> End | str:
        """The layer that computes a tensor; `one_bias` asks for none or one bias that nothing else reads."""
        start, self._cut = len(self._constants), None
        self._biases.clear()
        self._wide.clear()
        found = self._back(tensor, axes)
        if isinstance(found, str):
            return found
        binding, axis = found[0], channel_axis(self._walk, found[0])
        features = () if axis is None else found[1][axis.index]
        taken = None if self._cut is None else rows_of(features, self._cut)
        if self._cut is not None and (taken is None or binding.layer.batchnorm is not None):
            return MIXED
        rows, parts = taken or (None, features)
        if axis is None or any(each not in (features, parts) for each in self._biases):
            return OTHER
        reason = self._own_bias(binding)
        biases = {constant[:2] for constant in self._constants[start:]}
        alone = biases if one_bias else self._wide if rows is not None else set()
        own = bias(self._model, self._walk, binding) if alone else None
        if alone and (own is None or alone != {(own.place, own.operand)}):
            return BIAS
        return reason or End(binding, parts, rows, self._cut)

    # --- sizes ------------------------------------------------------------------------------------

    def _resized(self, place: Place, before: Axes, after: Axes) -> str:
        """Rule 4: note the number in the target of a Reshape or Expand; why the heads stay, or ""."""
        first, axis = self._axis(before), self._axis(after)
        if first is None or axis is None:
            return MIXED
        if not is_op(self._walk.node(place), ("Reshape", "Expand")):
            return ""
        target = self._sizes.of(self._walk.operand(place, 1))
        # Expand may leave out the first axes.
        index = -1 if target is None or len(target) != 1 else axis - len(after) + target[0]
        found = self._sizes.entry(place, index)
        if found is None:
            followed = self._sizes.followed(place, index)
            if followed is None or self._is_wide:
                return COMPUTED
            self._followed.append((followed, prod(part.size for part in after[axis])))
            return ""
        size, number = found
        is_copied = number == 0 and before[axis : axis + 1] == after[axis : axis + 1]
        is_free = is_op(self._walk.node(place), ("Expand",)) and number == 1
        if number == prod(part.size for part in after[axis]):
            (self._totals if self._is_wide else self._changed).append(size)
        elif number != -1 and not is_copied and not is_free:
            return COMPUTED
        return ""

    def _follow(self) -> bool:
        """Whether the sizes that a model computes are those of axes that change, or known ones that stay."""
        for followed, expected in self._followed:
            if followed.tensor not in self._tensors and followed.stated == expected:
                self._changed.append(replace(followed.size, stated=expected))
                continue
            _, known, axis = self._tensors.get(followed.tensor, (None, (), None))
            if axis != followed.axis or prod(part.size for part in known[axis]) != expected:
                return False
        return True

    def _pins(self) -> tuple[Pin, ...] | str:
        """Rule 3: the numbers that Shapes give of the tensors between; or why the heads stay."""
        if not self._follow():
            return COMPUTED
        readers = {followed.reader for followed, _ in self._followed}
        pins: list[Pin] = []
        for tensor, axes, axis in self._tensors.values():
            if self._walk.is_output(tensor):
                return READ
            for place, operand in self._walk.consumers(tensor):
                if (place, operand) in self._nodes:
                    continue
                if tensor.name in self._packed and is_op(self._walk.node(place), CUTS) and not operand:
                    self._others.add(place)
                    continue
                if axis is None or not is_op(self._walk.node(place), ("Shape",)):
                    return READ
                found = self._sizes.pins(place, axis, len(axes), prod(part.size for part in axes[axis]))
                # A body of an If or Loop has node numbers of its own, and constants that only it may read.
                if found is None or any(pin.place.scope for pin in found):
                    return COMPUTED
                pins += [pin for pin in found if (pin.place, pin.operand) not in readers]
        return tuple(pins)
