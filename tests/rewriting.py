"""Models as text, the stages from finding to rewriting in one call, and what a rewrite may change."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, parser
from onnx.reference import ReferenceEvaluator

from onnx_lowrank.core.factors import Certificate, Factors
from onnx_lowrank.core.layer import Layer, ScopeWork, Skipped
from onnx_lowrank.core.option import Option
from onnx_lowrank.engines.specified import OPERATORS
from onnx_lowrank.files.load import Model, load
from onnx_lowrank.files.tensors import inline
from onnx_lowrank.graph.scopes import scopes
from onnx_lowrank.graph.shapes import infer
from onnx_lowrank.graph.walk import Place, Walk
from onnx_lowrank.layers.binding import Binding
from onnx_lowrank.layers.find import find, read
from onnx_lowrank.layers.work import work
from onnx_lowrank.linalg.backend import resolve
from onnx_lowrank.linalg.factorize import factorize
from onnx_lowrank.rewrite.notes import stamp
from onnx_lowrank.rewrite.replace import Replacement, Rewritten, rewrite

DTYPES: dict[str, Any] = {
    "float": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "double": np.dtype(np.float64),
}
"""The float types, by their names in ONNX text."""

BACKEND = resolve("cpu")


def model(body: str, opset: int = 17, ir: int = 8, functions: str = "", **weights: Any) -> ModelProto:
    """Parse "g (inputs) => (outputs) { nodes }", and put weights (arrays, or shapes to draw) into it."""
    imports = f'<ir_version: {ir}, opset_import: ["" : {opset}, "local" : 1]>'
    proto = parser.parse_model(f"{imports} {body} {functions}")
    proto.graph.initializer.extend(tensors(**weights))
    return shaped(proto)


def shaped(proto: ModelProto) -> ModelProto:
    """State the shapes of the outputs, which the checker wants and the text leaves out."""
    inferred = {value.name: value for value in onnx.shape_inference.infer_shapes(proto).graph.output}
    for value in proto.graph.output:
        if not value.type.tensor_type.HasField("shape"):
            value.CopyFrom(inferred[value.name])
    return proto


def tensors(**weights: Any) -> list[TensorProto]:
    rng = np.random.default_rng(7)
    arrays = {name: draw(rng, w) if isinstance(w, tuple) else np.asarray(w) for name, w in weights.items()}
    return [inline(name, array) for name, array in arrays.items()]


def draw(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    return rng.standard_normal(shape).astype(dtype)


LOOP = """g (float[5, 24] x) => (float[5, 24] y) {
  n = Constant <value_int = COUNT> ()
  c = Constant <value = bool {1}> ()
  y = Loop (n, c, x) <body = l (int64 i, bool p, float[5, 24] h) => (bool o, float[5, 24] z) {
    o = Identity (p)
    z = MatMul (h, w)
  }>
}"""


def named_bodies(proto: ModelProto) -> ModelProto:
    """The nodes of bodies and functions have names, as exporters give them: n.OUTPUT."""
    bodies = [attribute.g.node for node in proto.graph.node for attribute in node.attribute]
    for nodes in (*bodies, *(function.node for function in proto.functions)):
        for node in nodes:
            node.name = f"n.{node.output[0]}"
    return proto


def constants(graph: Any, *values: TensorProto) -> None:
    """Put tensors into Constant nodes at the beginning of a graph or function."""
    for value in reversed(values):
        node = onnx.helper.make_node("Constant", [], [value.name])
        node.attribute.add(name="value", type=AttributeProto.TENSOR).t.CopyFrom(value)
        graph.node.insert(0, node)


@dataclass(frozen=True)
class Found:
    model: Model
    walk: Walk
    bindings: tuple[Binding, ...]
    skipped: tuple[Skipped, ...]
    work: tuple[ScopeWork, ...]

    @property
    def layers(self) -> dict[str, Layer]:
        return {binding.layer.id: binding.layer for binding in self.bindings}

    @property
    def layer(self) -> Layer:
        (binding,) = self.bindings
        return binding.layer

    @property
    def reason(self) -> str:
        assert not self.bindings
        (skipped,) = self.skipped
        return skipped.reason


def found(
    proto: Any, shapes: Mapping[str, tuple[int, ...]] | None = None, **selection: tuple[str, ...]
) -> Found:
    loaded = load(proto)
    walk = Walk(loaded.proto)
    inferred = infer(loaded, shapes or {})
    bindings, skipped = find(loaded, walk, inferred, **selection)
    places = {Place(use.scope, use.node) for binding in bindings for use in binding.layer.uses}
    return Found(loaded, walk, bindings, skipped, work(walk, inferred, places))


def full_rank(layer: Layer) -> Option:
    return Option(layer.folds[0], layer.slices[0], layer.full_rank(layer.folds[0], layer.slices[0]))


def rewritten(
    found: Found, options: Mapping[str, Option] | None = None, biases: Mapping[str, np.ndarray] | None = None
) -> Rewritten:
    """Rewrite the layers with these options, by default all of them at full rank, and with new biases."""
    chosen = options if options is not None else {n: full_rank(layer) for n, layer in found.layers.items()}
    replacements = [
        _replacement(found, binding, chosen[binding.layer.id], (biases or {}).get(binding.layer.id))
        for binding in found.bindings
        if binding.layer.id in chosen
    ]
    result = rewrite(found.model, found.walk, replacements)
    stamp(result, {"run": "test"})
    return result


def _replacement(found: Found, binding: Binding, option: Option, bias: np.ndarray | None) -> Replacement:
    weight = read(found.model, found.walk, binding)
    dtype, norm = weight.dtype, binding.layer.batchnorm
    if norm is not None:
        scale = norm.scale.reshape(*weight.shape[:2], *[1] * (weight.ndim - 2))
        weight = weight.astype(np.float64) * scale
    exact = factorize(weight, option, BACKEND, dtype)
    stored = Factors(exact.fold, exact.encoder.astype(dtype), exact.decoder.astype(dtype))
    return Replacement(binding, option, stored, Certificate((0.0,), (0.0,)), bias)


# --- running --------------------------------------------------------------------------------------


def run(proto: ModelProto, feed: Mapping[str, Any]) -> list[np.ndarray]:
    # Older versions fuse a transposition with a product in float64, and have no kernel for that; and they
    # multiply no batch of size 0.
    with _excused(onnxruntime, (1, 26), "FusedMatMul", "right operand cannot broadcast"):
        return _run(proto, feed)


def _run(proto: ModelProto, feed: Mapping[str, Any]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    data = proto.SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(feed))


def evaluate(proto: ModelProto, feed: Mapping[str, Any]) -> list[np.ndarray]:
    """Run in NumPy, float64 included."""
    # Older versions run recurrent operators in one direction only, and with the sequence first.
    with _excused(onnx, (1, 23), "num_directions", "operands could not be broadcast"):
        return ReferenceEvaluator(proto, new_ops=list(OPERATORS)).run(None, dict(feed))


@contextmanager
def _excused(library: ModuleType, since: tuple[int, int], *messages: str) -> Iterator[None]:
    """Skip a test at an error of an older version of a library."""
    try:
        yield
    except Exception as error:
        is_old = tuple(map(int, library.__version__.split(".")[:2])) < since
        if is_old and any(message in str(error) for message in messages):
            pytest.skip(f"{library.__name__} {library.__version__}: {str(error)[:100]}")
        raise


def feed_of(proto: ModelProto, seed: int = 3) -> dict[str, np.ndarray]:
    """Random inputs; symbolic dimensions are 3, integers below 4."""
    rng = np.random.default_rng(seed)
    weights = {tensor.name for tensor in proto.graph.initializer}
    feed = {}
    for value in proto.graph.input:
        if value.name in weights:
            continue
        kind = value.type.tensor_type
        shape = tuple(d.dim_value if d.HasField("dim_value") else 3 for d in kind.shape.dim)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        is_float = kind.elem_type in (1, 10, 11, 16)
        array = (
            rng.standard_normal(shape) if is_float else rng.integers(0, 2 if dtype.kind == "b" else 4, shape)
        )
        feed[value.name] = np.asarray(array).astype(dtype)
    return feed


def difference(one: Iterable[np.ndarray], other: Iterable[np.ndarray]) -> float:
    """The largest ‖a − b‖ / ‖a‖ over pairs of arrays, which must have the same shapes."""
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        assert a.shape == b.shape
        x, y = a.astype(np.float64), b.astype(np.float64)
        assert np.linalg.norm(x) > 0
        worst = max(worst, float(np.linalg.norm(x - y) / np.linalg.norm(x)))
    return worst


def assert_same(proto: ModelProto, new: ModelProto, tolerance: float = 1e-5, **feed: Any) -> None:
    """Both models pass the checker and compute the same in ONNX Runtime."""
    onnx.checker.check_model(new, full_check=True)
    inputs = feed_of(proto) | feed
    names = {value.name for value in new.graph.input}
    outputs = run(new, {name: value for name, value in inputs.items() if name in names})
    assert difference(run(proto, inputs), outputs) < tolerance


# --- what may change ------------------------------------------------------------------------------


def assert_only_named_changes(
    before: ModelProto,
    after: ModelProto,
    layers: Collection[Layer],
    chains: Mapping[str, tuple[tuple[str, ...], ...]],
) -> None:
    """A rewrite has changed what its layers name, and nothing else, in content or in order.

    Args:
        before: The input model.
        after: The output model.
        layers: The rewritten layers.
        chains: Names of the new nodes, as `rewrite` returns them.
    """
    old, new = _emptied(before), _emptied(after)
    assert {layer.id for layer in layers} == set(chains)
    assert new.metadata_props[: len(old.metadata_props)] == old.metadata_props[:]
    added = new.metadata_props[len(old.metadata_props) :]
    assert all(entry.key.startswith("onnx_lowrank.") for entry in added)
    del new.metadata_props[len(old.metadata_props) :]
    assert new == old

    gone = _gone(before, after, layers)
    chained = {name for uses in chains.values() for chain in uses for name in chain}
    old_scopes, new_scopes = list(scopes(before)), list(scopes(after))
    assert len(old_scopes) == len(new_scopes)
    for scope, other in zip(old_scopes, new_scopes, strict=True):
        names = {name for path, name in gone if path == scope.path}
        removed = {node for layer in layers for path, node in _nodes(layer) if path == scope.path}
        _assert_nodes(scope, other, removed, chained, names)
        for field, name in (
            ("initializer", "name"),
            ("sparse_initializer", ""),
            ("value_info", "name"),
            ("quantization_annotation", "tensor_name"),
            ("input", "name"),
            ("output", ""),
        ):
            _assert_entries(scope, other, field, name, names)


def _nodes(layer: Layer) -> list[tuple[str, int]]:
    """Where the nodes of a layer stand, its BatchNorm among them."""
    places = [(use.scope, use.node) for use in layer.uses]
    norm = layer.batchnorm
    return places if norm is None else [*places, (layer.uses[0].scope, norm.node)]


def _gone(before: ModelProto, after: ModelProto, layers: Iterable[Layer]) -> set[tuple[str, str]]:
    """What only rewritten nodes read, by (scope, name): weights, their views, BatchNorms, old biases."""
    walk, new = Walk(before), Walk(after)
    paths = dict(zip(new.scopes, walk.scopes, strict=True))
    operands = (new.operand(p, i) for p in new.places() for i in range(len(new.node(p).input)))
    origins = (new.origin(tensor) for tensor in operands if tensor is not None)
    read = {(paths[scope], name) for scope, name in origins}
    pending = []
    hidden = set()
    for layer in layers:
        places = [Place(use.scope, use.node) for use in layer.uses]
        pending += [
            walk.operand(place, index)
            for place, use in zip(places, layer.uses, strict=True)
            for index in (use.operand, 2)
        ]
        if layer.batchnorm is not None:
            place, norm = (Place(*at) for at in _nodes(layer))
            pending += [walk.operand(norm, index) for index in (1, 2, 3, 4)]
            hidden.add((place.scope, walk.node(place).output[0]))
    found = set()
    for tensor in pending:
        if tensor is not None and walk.origin(tensor) not in read and not walk.is_output(tensor):
            place = walk.producer(tensor)
            if place is not None and walk.node(place).op_type not in _SOURCES:
                continue
            found.add(walk.origin(tensor))
            if place is not None:
                pending += [walk.operand(place, index) for index in range(len(walk.node(place).input))]
    return found | hidden


def _emptied(proto: ModelProto) -> ModelProto:
    """A copy without what `_assert_nodes` and `_assert_entries` compare."""
    copy = ModelProto()
    copy.CopyFrom(proto)
    for scope in list(scopes(copy)):
        body = scope.graph or scope.function
        names = ("node", "initializer", "sparse_initializer", "value_info", "quantization_annotation")
        for name in (*names, "input", "output"):
            if name in body.DESCRIPTOR.fields_by_name:
                body.ClearField(name)
    return copy


def _assert_nodes(old: Any, new: Any, removed: set[int], chained: set[str], gone: set[str]) -> None:
    kept = [
        _shallow(node)
        for index, node in enumerate(old.nodes)
        if index not in removed
        and not (node.op_type in _SOURCES and all(name in gone for name in node.output))
    ]
    # Names may repeat, so content tells which nodes stay; all others are of chains.
    waiting = iter([*kept, None])
    expected = next(waiting)
    for node in new.nodes:
        if _shallow(node) == expected:
            expected = next(waiting)
        else:
            assert node.name in chained or node.name.endswith("/constant"), node
    assert expected is None


_SOURCES = (
    *("Constant", "Identity", "Transpose", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Cast"),
    *("Slice", "Concat"),
)


def _shallow(node: NodeProto) -> NodeProto:
    """A node without the contents of its bodies."""
    copy = NodeProto()
    copy.CopyFrom(node)
    for attribute in copy.attribute:
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            graph.Clear()
    return copy


def _assert_entries(old: Any, new: Any, field: str, name: str, gone: set[str]) -> None:
    bodies: list[GraphProto | FunctionProto] = [scope.graph or scope.function for scope in (old, new)]
    if field not in bodies[0].DESCRIPTOR.fields_by_name:
        return
    before, after = (list(getattr(body, field)) for body in bodies)
    if field in ("input", "output") and old.graph is None:
        assert after == before
        return
    kept = [entry for entry in before if not name or getattr(entry, name) not in gone]
    assert after[: len(kept)] == kept
    rest = after[len(kept) :]
    assert field == "initializer" or not rest
    assert all(
        tensor.name.rstrip("_0123456789").endswith(("_encoder", "_decoder", "_bias")) for tensor in rest
    )


def read_of(found: Found) -> np.ndarray:
    """The canonical weight of a model's only layer."""
    (binding,) = found.bindings
    return read(found.model, found.walk, binding)
