"""Which layers attention connects, so that its heads can be narrowed, and what narrowing them costs.

The products of attention are MatMuls (`layers.heads` follows the heads from them), or hidden in ONNX
Runtime's Attention, which holds a packed matrix; its `qkv_hidden_sizes` states the sizes of the parts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from onnx_lowrank.core.layer import Beside, Between, Narrowing, Rows
from onnx_lowrank.files.load import Model
from onnx_lowrank.graph.shapes import Shapes, assumed, infer, shape_of
from onnx_lowrank.graph.walk import Place, Walk, attribute_of, label
from onnx_lowrank.layers.axes import INSIDE, Part
from onnx_lowrank.layers.beside import beside
from onnx_lowrank.layers.bias import bias
from onnx_lowrank.layers.binding import Binding, Hidden
from onnx_lowrank.layers.ends import End, Heads
from onnx_lowrank.layers.heads import Search
from onnx_lowrank.layers.hidden import is_plain, place_of
from onnx_lowrank.layers.products import BIAS, BOUND, OTHER, PAST, UNEQUAL, blocked, products
from onnx_lowrank.layers.sizes import Sizes
from onnx_lowrank.operators import registry
from onnx_lowrank.operators.attention import widths_of

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Attention:
    """The layers that attention connects.

    Attributes:
        pairs: By the id of a layer, how it is narrowed with its partner.
        left: By the node of attention, why its heads stay as they are.
    """

    pairs: Mapping[str, tuple[Narrowing, Hidden]]
    left: Mapping[Place, str]


@dataclass(frozen=True, slots=True)
class _Met:
    """A node of attention: its two layers, or the reason why its heads stay."""

    place: Place
    between: Between
    found: Heads | str
    macs: int = 0


def attention(
    model: Model,
    walk: Walk,
    bindings: Sequence[Binding],
    shapes: Shapes,
    input_shapes: Mapping[str, tuple[int, ...]],
) -> Attention:
    """The layers whose heads can be narrowed.

    Args:
        model: The model.
        walk: Its walk.
        bindings: Its layers, in graph order.
        shapes: Its inferred shapes.
        input_shapes: The shapes of inputs that the user fixes.
    """
    met = list(products(walk))
    fused = [binding for binding in bindings if _is_fused(walk, binding)]
    if not met and not fused:
        return Attention({}, {})
    plain = {place_of(binding): binding for binding in bindings if is_plain(walk, binding)}
    left = {place: reason for place, _ in met if (reason := blocked(model, walk, plain, place))}
    # Shapes take a while to infer, and no heads of a decoder with a past can be narrowed.
    rest = [(place, between) for place, between in met if place not in left]
    needed = rest or fused
    sizes = Sizes(model, walk, infer(model, assumed(model, shapes, input_shapes)) if needed else shapes)
    ends: list[_Met] = []
    for place, between in rest:
        search = Search(model, walk, plain, sizes)
        found = search.values(place) if between is Between.VALUES else search.scores(place)
        ends.append(_Met(place, between, found, _macs(walk, shapes, place)))
    for binding in fused:
        ends += _fused(model, walk, binding, Search(model, walk, plain, sizes), shapes)
    pairs: dict[str, tuple[Narrowing, Hidden]] = {}
    for one, bound in _bound(ends):
        if isinstance(one.found, str):
            left[one.place] = one.found
            _log.debug("the heads at %r stay: %s", label(walk.node(one.place)), one.found)
            continue
        narrowing = _narrowing(model, walk, shapes, one, one.found)
        pairs[one.found.owner.binding.layer.id] = replace(narrowing, bound=bound), one.found.hidden
    return Attention(pairs, left)


def _narrowing(model: Model, walk: Walk, shapes: Shapes, one: _Met, found: Heads) -> Narrowing:
    """How the layer at one end of attention is narrowed with its partner."""
    rows = tuple(end.rows for end in found.packed if end.rows is not None)
    hidden, owner = found.hidden, found.owner
    partners = () if owner.rows is not None else (found.partner.binding.layer,)
    own = bias(model, walk, found.packed[0].binding) if found.packed else None
    if own is not None:
        # Only a part of a packed matrix's bias gets narrower.
        rest = tuple(each for each in hidden.constants if each[:2] != (own.place, own.operand))
        hidden = replace(hidden, constants=rest)
    costs = beside(model, walk, shapes, hidden, one.macs)
    added = 0 if own is None else sum(each.size for each in rows)
    if one.between is Between.SCORES and owner.rows is None and bias(model, walk, owner.binding) is not None:
        # The queries' own bias gets narrower with them, too; nothing else reads it.
        added += owner.binding.layer.f
    costs = Beside(costs.stored + added, costs.owned + added, costs.macs)
    return Narrowing(one.between, partners, found.heads, costs, rows)


def _macs(walk: Walk, shapes: Shapes, place: Place) -> int:
    """MACs of the product; 0 if a dimension is unknown."""
    node = walk.node(place)
    inputs = [shape_of(walk, shapes, walk.operand(place, index)) for index in (0, 1)]
    result = shape_of(walk, shapes, walk.result(place))
    return registry.family(node).macs_undecomposed(node, inputs, result) or 0


def _bound(ends: Sequence[_Met]) -> Iterator[tuple[_Met, str]]:
    """The nodes of attention, with the layers that go together: their packed matrix has one size of heads.

    All features of such a matrix have to get fewer, as many in every head.
    """
    groups: dict[str, list[_Met]] = {}
    for one in ends:
        if isinstance(one.found, Heads) and one.found.is_bound:
            groups.setdefault(one.found.packed[0].binding.layer.id, []).append(one)
        else:
            yield one, ""
    for group in groups.values():
        founds = [one.found for one in group if isinstance(one.found, Heads)]
        if not _is_whole(founds):
            yield from ((replace(one, found=BOUND), "") for one in group)
            continue
        names = [found.owner.binding.layer.id for found in founds]
        yield from zip(group, reversed(names), strict=True)


def _is_whole(founds: Sequence[Heads]) -> bool:
    """Whether a pair of queries and keys and one of values are all that a packed matrix computes."""
    ends = [end for found in founds for end in found.packed]
    rows = {end.rows for end in ends if end.rows is not None}
    cuts = {end.cut.piece.place for end in ends if end.cut is not None}
    features = ends[0].binding.layer.f
    return (
        len(founds) == 2
        and len({found.heads for found in founds}) == 1
        and len(rows) == len(ends)
        and sum(each.size for each in rows) == features
        and all(found.others <= cuts for found in founds)
    )


def _is_fused(walk: Walk, binding: Binding) -> bool:
    """Whether a layer is the matrix of an Attention of the main graph, which stays as it is otherwise."""
    (use, *others) = binding.layer.uses
    return not others and not use.scope and use.op == "Attention" and binding.casts[0] is None


def _fused(model: Model, walk: Walk, binding: Binding, search: Search, shapes: Shapes) -> Iterator[_Met]:
    """The layers that an Attention connects, given the layer with its matrix."""
    place, layer = place_of(binding), binding.layer
    node = walk.node(place)
    widths, heads = widths_of(node, layer.f), attribute_of(node, "num_heads", 0)
    own = bias(model, walk, binding)
    if any(node.input[4:5]) or any(node.input[6:]) or any(node.output[1:]):
        reason = PAST
    elif widths is None or heads < 1 or any(n % heads for n in widths) or widths[0] != widths[1]:
        reason = UNEQUAL
    elif own is None and any(node.input[2:3]):
        reason = BIAS
    else:
        reason = ""
    if reason or widths is None:
        yield _Met(place, Between.VALUES, reason)
        return
    queries, keys, values = (Rows(sum(widths[:index]), width) for index, width in enumerate(widths))
    found = search.behind(place, values.size // heads, binding, values)
    if isinstance(found, Heads):
        found = replace(found, hidden=replace(found.hidden, fused=place))
    macs = _products(walk, shapes, place)
    yield _Met(place, Between.VALUES, found, macs * values.size)
    if attribute_of(node, "do_rotary", 0):
        yield _Met(place, Between.SCORES, OTHER)
        return
    parts = (Part(2, 1, heads), Part(INSIDE, 1, queries.size // heads))
    hidden = Hidden((), (), (), fused=place, ignores_shift=True)
    both = Heads(End(binding, parts, queries), End(binding, parts, keys), hidden, heads)
    yield _Met(place, Between.SCORES, both, macs * queries.size)


def _products(walk: Walk, shapes: Shapes, place: Place) -> int:
    """How often an Attention multiplies every number of its heads; 0 if a dimension is unknown."""
    shape = shape_of(walk, shapes, walk.operand(place, 0)) or ()
    if len(shape) != 3 or None in shape:
        return 0
    batch, tokens, _ = (size or 0 for size in shape)
    return batch * tokens * tokens
