"""Nodes -> layers: every constant weight that a chain of two factors can replace.

The rules, in the order of the checks:

1. The node belongs to a registered family of operators (`operators.registry`). It has an input and an
   output, and none of its attributes is a reference to a function's attribute.
2. One of its operands is a constant float tensor, behind any chain of views.
3. The family can decompose the weight (`Operator.canonical`): a kernel that fits the node's attributes and
   is not depthwise, matrices, or a table on axis 0.
4. All readers of the constant use the same matrix (or its transpose, with k = 1), and a batch of matrices
   meets no vector.
5. The layer's name is included and not excluded, rank 1 is smaller than the weight, and its numbers are
   finite and, with a folded BatchNorm, small enough for factors of their dtype.

An operator that fails a rule is Skipped, with a reason that advises the user.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from onnx_lowrank.core.layer import Evaluations, Layer, Skipped, Use
from onnx_lowrank.core.option import Fold, Lowering
from onnx_lowrank.errors import InputError
from onnx_lowrank.files.load import Model
from onnx_lowrank.files.tensors import is_external
from onnx_lowrank.graph.shapes import Shapes, shape_of
from onnx_lowrank.graph.walk import Place, Walk, attributes, label
from onnx_lowrank.graph.weights import (
    COMPUTED,
    FLOATS,
    Source,
    Stored,
    cast_of,
    dtype_of,
    readers,
    resolve,
    viewed,
)
from onnx_lowrank.layers.binding import Binding
from onnx_lowrank.layers.foreign import foreign
from onnx_lowrank.layers.prepare import Preparation, prepare, too_large
from onnx_lowrank.operators import registry
from onnx_lowrank.operators.geometry import Geometry


@dataclass(frozen=True, slots=True)
class _Seen:
    """One use of a source, before layers are built: the weight's shape as read, and its canonical shape."""

    place: Place
    operand: int
    stored: Stored
    laid_out: tuple[int, ...]
    shape: tuple[int, ...]


def find(
    model: Model, walk: Walk, shapes: Shapes, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> tuple[tuple[Binding, ...], tuple[Skipped, ...]]:
    """Find every layer of a model, and list every operator that is left alone.

    Args:
        model: The model.
        walk: Its walk.
        shapes: Its inferred shapes.
        include: Globs of layer ids or node names; if there are any, only these become layers.
        exclude: Globs of layer ids or node names that become no layers.

    Returns:
        The layers and the skipped operators, both in graph order.
    """
    sources: dict[tuple[str, str], list[_Seen]] = {}
    order: list[tuple[Place, str | tuple[str, str]]] = []
    for place in walk.places():
        seen = _examine(model, walk, place)
        if isinstance(seen, str):
            order.append((place, seen))
        elif seen is not None:
            key = (seen.stored.source.scope, seen.stored.source.name)
            sources.setdefault(key, []).append(seen)
            order.append((place, key))
    ids = _ids(sources)
    built = {
        key: _shared_bytes(model, walk, uses[0].stored.source)
        or _build(model, walk, shapes, ids[key], uses, include, exclude)
        for key, uses in sources.items()
    }
    skipped = []
    for place, reason_or_key in order:
        outcome = reason_or_key if isinstance(reason_or_key, str) else built[reason_or_key]
        if isinstance(outcome, str):
            weight = reason_or_key[1] if isinstance(reason_or_key, tuple) else ""
            node = walk.node(place)
            skipped.append(Skipped(place.scope, label(node), node.op_type, weight, outcome))
    return tuple(b for b in built.values() if isinstance(b, Binding)), tuple(skipped)


def _ids(sources: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """An id for each (scope, name): the path, with a number if a slash in a name makes it ambiguous."""
    ids: dict[tuple[str, str], str] = {}
    taken: set[str] = set()
    for scope, name in sources:
        path = candidate = f"{scope}/{name}" if scope else name
        n = 1
        while candidate in taken:
            n += 1
            candidate = f"{path}#{n}"
        taken.add(candidate)
        ids[scope, name] = candidate
    return ids


def read(model: Model, walk: Walk, binding: Binding) -> NDArray[Any]:
    """A layer's canonical weight (groups, f / groups, c / groups, *kernel), in its stored dtype."""
    use = binding.layer.uses[0]
    return _canonical(model, walk, Place(use.scope, use.node), use.operand, binding.stored)


def geometry(walk: Walk, binding: Binding, index: int) -> Geometry:
    """The geometry of one use: the elements of its activation that meet the weight together.

    Args:
        walk: The model's walk.
        binding: The layer.
        index: Number of the use.
    """
    layer, use = binding.layer, binding.layer.uses[index]
    node = walk.node(Place(use.scope, use.node))
    return registry.family(node).geometry(layer, use, node)


def _canonical(model: Model, walk: Walk, place: Place, operand: int, stored: Stored) -> NDArray[Any]:
    value = viewed(walk, model, stored)
    weight = None if value is None else canonical_weight(walk.node(place), operand, value)
    if weight is None or isinstance(weight, str):  # find() could read it, so its file has changed since
        raise InputError(f"The weight {stored.source.name!r} changed while it was read: run again.")
    return weight


def _examine(model: Model, walk: Walk, place: Place) -> _Seen | str | None:
    """Rules 1 to 3 for one node: its use of a weight, or the reason to skip it; None for other operators."""
    node = walk.node(place)
    operator = registry.known(node)
    if operator is None:
        return registry.left_alone(node) or foreign(walk, place)
    if any(attribute.ref_attr_name for attribute in node.attribute):
        return "its attributes come from the function's caller: inline the functions first"
    needed = {index for operand in operator.operands for index in (operand, operator.activation(operand))}
    # Not the first output alone: models often read only the last state of a recurrent node.
    if not any(node.output) or not all(any(node.input[index : index + 1]) for index in needed):
        return "it lacks an input or its output: repair the export"
    if (unfit := operator.unfit(node, walk.opsets[place.scope])) is not None:
        return unfit
    reason = COMPUTED
    for operand in operator.operands:
        found = resolve(walk, walk.operand(place, operand))
        outcome = found if isinstance(found, str) else _seen(model, walk, place, operand, found)
        if isinstance(outcome, _Seen):
            return outcome
        if reason is COMPUTED:  # the other operand may give a reason that helps more
            reason = outcome
    return reason


def _seen(model: Model, walk: Walk, place: Place, operand: int, stored: Stored) -> _Seen | str:
    """Rule 3 for one constant operand."""
    value = viewed(walk, model, stored)
    if value is None:
        return "the views of its weight are not constant or do not fit it: constant-fold the model first"
    weight = canonical_weight(walk.node(place), operand, value)
    return weight if isinstance(weight, str) else _Seen(place, operand, stored, value.shape, weight.shape)


def canonical_weight(node: NodeProto, operand: int, weight: NDArray[Any]) -> NDArray[Any] | str:
    """Bring an operand into the canonical form (g, f / g, c / g, *kernel), or return a reason to skip it."""
    if weight.size == 0:
        return "its weight is empty"
    return registry.family(node).canonical(node, operand, weight)


def _build(
    model: Model,
    walk: Walk,
    shapes: Shapes,
    name: str,
    seen: list[_Seen],
    include: Sequence[str],
    exclude: Sequence[str],
) -> Binding | str:
    """Rules 4 and 5 for all uses of one source: the layer, or the reason to skip it."""
    first = seen[0]
    source = first.stored.source
    reason = _other_readers(walk, source, {(use.place, use.operand) for use in seen})
    if reason is not None:
        return reason
    transposed = []
    for use in seen:
        orientation = _orientation(model, walk, first, use)
        if isinstance(orientation, str):
            return orientation
        transposed.append(orientation)
    reason = unselected((name, *(label(walk.node(use.place)) for use in seen)), include, exclude)
    if reason is not None:
        return reason
    folds = _folds(walk, seen)
    uses = tuple(
        _use(walk, shapes, use, first.shape, folds, flip) for use, flip in zip(seen, transposed, strict=True)
    )
    operator = registry.family(walk.node(first.place))
    if operator.needs_rank(first.laid_out) and any(use.rank in (None, 1) for use in uses):
        return "its batch of matrices needs an input of known rank above 1: pass --input-shape"
    alone = len(seen) == 1  # with a BatchNorm folded into each, several uses could not share their factors
    features = first.shape[0] * first.shape[1]
    prepared = prepare(walk, model, first.place, first.operand, features) if alone else Preparation()
    layer = _layer(walk, name, seen, uses, folds, prepared)
    if not _has_cheaper(layer):
        return f"it is too small: rank 1 needs as many parameters as its {layer.size}"
    # Last: this reads all numbers of the weight.
    weight = _canonical(model, walk, first.place, first.operand, first.stored)
    if not np.isfinite(weight).all():
        return "its weight holds NaN or Inf: repair the export"
    if (reason := too_large(weight, prepared.batchnorm)) is not None:
        return reason
    return Binding(layer, first.stored, tuple(cast_of(walk, use.stored) for use in seen))


def _shared_bytes(model: Model, walk: Walk, source: Source) -> str | None:
    """Rule 4 for data files: bytes that another tensor refers to would stay, so nothing would be saved."""
    if is_external(source.tensor) and walk.readers_of_bytes(model, source.tensor) > 1:
        return "other tensors share its bytes in the data file: give it bytes of its own"
    return None


def _folds(walk: Walk, seen: list[_Seen]) -> tuple[Fold, ...]:
    """The folds of the kernel that all uses allow."""
    kernel = seen[0].shape[3:]
    folds = Fold.distinct(kernel)
    nodes = [walk.node(use.place) for use in seen]
    if any(registry.family(node).holds_kernel_whole(node) for node in nodes):
        folds = tuple(fold for fold in folds if 1 in map(prod, fold.kernels(kernel)))
    return folds


def _layer(
    walk: Walk,
    name: str,
    seen: list[_Seen],
    uses: tuple[Use, ...],
    folds: tuple[Fold, ...],
    prepared: Preparation,
) -> Layer:
    groups, f, c, *kernel = seen[0].shape
    sliceable = bool(kernel) or (groups == 1 and _can_slice(walk, seen, uses))
    return Layer(
        id=name,
        op=uses[0].op,
        f=groups * f,
        c=groups * c,
        kernel=tuple(kernel),
        groups=groups,
        dtype=FLOATS[seen[0].stored.source.tensor.data_type],
        folds=folds,
        slices=tuple(k for k in range(1, c + 1) if c % k == 0) if sliceable else (1,),
        uses=uses,
        batchnorm=prepared.batchnorm,
        freed=prepared.freed,
        added=groups * f if prepared.batchnorm is not None else 0,
        whole=_lowerings(walk, seen, uses, sliced=False),
        sliced=_lowerings(walk, seen, uses, sliced=True),
    )


def _lowerings(walk: Walk, seen: list[_Seen], uses: tuple[Use, ...], *, sliced: bool) -> tuple[Lowering, ...]:
    """The lowerings that all uses allow for their chains."""
    groups, _, _, *kernel = seen[0].shape
    ways = [
        registry.family(walk.node(one.place)).lowerings(use, tuple(kernel), groups, sliced=sliced)
        for one, use in zip(seen, uses, strict=True)
    ]
    has_conv = all(dtype_of(walk, one.stored).name not in _NO_CONV for one in seen)
    nodes = [walk.node(one.place) for one in seen]
    # A Conv has no place for a Gemm's scalars.
    is_plain = all(registry.family(n).scale(n) == registry.family(n).bias_scale(n) == 1 for n in nodes)
    refused = set() if has_conv else {Lowering.CONV, Lowering.POINTWISE}
    refused |= set() if is_plain else {Lowering.POINTWISE}
    return tuple(way for way in ways[0] if all(way in others for others in ways) and way not in refused)


_NO_CONV = frozenset({"float64", "bfloat16"})
"""The types without a Conv in ONNX Runtime's CPU provider, which runs matrices of float64."""


def _can_slice(walk: Walk, seen: list[_Seen], uses: tuple[Use, ...]) -> bool:
    """Whether a matrix can be cut into k > 1 slices: every use allows it, and all have it on one side."""
    return len({use.operand for use in uses}) == 1 and all(
        registry.family(walk.node(one.place)).can_slice(use, one.laid_out, walk.opsets[use.scope])
        for one, use in zip(seen, uses, strict=True)
    )


def _has_cheaper(layer: Layer) -> bool:
    """Whether any rank-1 option has fewer parameters than the layer as it is."""
    # Not <=: a chain of the same size saves nothing.
    for fold in layer.folds:
        encoder, decoder = fold.kernels(layer.kernel)
        cheapest = layer.slices[0] * layer.f * prod(decoder) + layer.c * prod(encoder) + layer.added
        if cheapest < layer.size + layer.freed:
            return True
    return False


def _other_readers(walk: Walk, source: Source, uses: set[tuple[Place, int]]) -> str | None:
    """Rule 4: the reason to skip a weight with readers other than the layer's nodes, or None."""
    found = readers(walk, source)
    if found is None:
        return "the graph also returns its weight: give that output a copy of its own"
    for place, operand in found:
        if (place, operand) not in uses:
            node = walk.node(place)
            return (
                f"its weight is also read by {node.op_type} {label(node)!r}: give that node a copy of its own"
            )
    return None


def _orientation(model: Model, walk: Walk, first: _Seen, use: _Seen) -> bool | str:
    """Whether a use applies the first use's matrix as it is (False) or transposed (True), or a reason."""
    if use is first or _reads_alike(walk, first, use):
        return False
    nodes = [walk.node(seen.place) for seen in (first, use)]
    operators = [registry.family(node) for node in nodes]
    if len({operator.kind(node) for operator, node in zip(operators, nodes, strict=True)}) > 1:
        return "operators of different kinds share its weight: give each a copy of its own"
    one = _canonical(model, walk, first.place, first.operand, first.stored)
    other = _canonical(model, walk, use.place, use.operand, use.stored)
    transposable = all(operator.transposable for operator in operators)
    # The canonical form joins the batch axes, so it alone cannot tell (2, 3) from (6,).
    same_batch = not transposable or first.laid_out[:-2] == use.laid_out[:-2]
    if same_batch and np.array_equal(one, other, equal_nan=True):
        return False
    if transposable and same_batch and np.array_equal(one, other.swapaxes(1, 2), equal_nan=True):
        return True
    return "its uses read the same numbers as different matrices: give each a copy of its own"


def _reads_alike(walk: Walk, first: _Seen, use: _Seen) -> bool:
    """Whether two uses have the same operator, attributes and views, so that they read the same matrix.

    This saves reading the numbers of a weight once per node if hundreds of nodes share it.
    """
    if first.operand != use.operand or _views(walk, first) != _views(walk, use):
        return False
    one, other = (walk.node(seen.place) for seen in (first, use))
    return (one.domain, one.op_type) == (other.domain, other.op_type) and attributes(one) == attributes(other)


def _views(walk: Walk, seen: _Seen) -> list[object]:
    """The views of a use in a form that can be compared: equal views move elements alike."""
    keys: list[object] = []
    for place in seen.stored.views:
        node = walk.node(place)
        # The first operand of a view is its data, but all operands of a Concat together give the order.
        first = 0 if node.op_type == "Concat" else 1
        operands = [walk.operand(place, index) for index in range(first, len(node.input))]
        origins = [None if operand is None else walk.origin(operand) for operand in operands]
        keys.append((node.op_type, attributes(node), origins))
    return keys


def unselected(names: Iterable[str], include: Sequence[str], exclude: Sequence[str]) -> str | None:
    """The reason by rule 5 to leave something with these names alone, or None."""
    names = tuple(names)
    for pattern in exclude:
        if matches(names, pattern):
            return f"--exclude {pattern} names it"
    if include and not any(matches(names, pattern) for pattern in include):
        return "no --include pattern names it"
    return None


def matches(names: Iterable[str], pattern: str) -> bool:
    """Whether a glob matches one of the names, or is one of them literally (names may have brackets).

    PyTorch calls the weight of the module NAME "NAME.weight", so NAME alone matches it, too.
    """
    spelled = (spelling for name in names for spelling in {name, name.removesuffix(".weight")})
    return any(name == pattern or fnmatchcase(name, pattern) for name in spelled)


def _use(
    walk: Walk,
    shapes: Shapes,
    seen: _Seen,
    shape: tuple[int, ...],
    folds: tuple[Fold, ...],
    transposed: bool,
) -> Use:
    node = walk.node(seen.place)
    operator = registry.family(node)
    groups, f, c, *kernel = shape
    entering = shape_of(walk, shapes, walk.operand(seen.place, operator.activation(seen.operand)))
    leaving = shape_of(walk, shapes, walk.result(seen.place))
    positions = operator.positions(node, seen.operand, entering, leaving, groups * (c if transposed else f))
    evaluations = None
    if positions is not None:
        evaluations = Evaluations(
            operator.dense_evaluations(node, positions),
            {
                fold: operator.factor_evaluations(node, positions, tuple(kernel), fold, transposed=transposed)
                for fold in folds
            },
        )
    return Use(
        scope=seen.place.scope,
        node=seen.place.node,
        name=label(node),
        op=node.op_type,
        operand=seen.operand,
        laid_out=seen.laid_out,
        transposed=transposed,
        rank=operator.rank(entering),
        pointwise=operator.is_pointwise(node, tuple(kernel)),
        inputs_first=operator.on_right(seen.operand),
        reads_indices=operator.reads_indices,
        is_linear=operator.is_linear,
        is_recovered=operator.is_linear or operator.multiplies_first,
        positions=positions,
        evaluations=evaluations,
    )
