"""The models of onnx's backend tests with their stored inputs and outputs, and forms of them with weights.

Most of these models read their weights as inputs, and the light models compute theirs from shapes, so nothing
in them can be decomposed. `nodes_with_weights` and `light_with_weights` give them constants instead.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TypeProto, numpy_helper
from onnx.backend.test.case.test_case import TestCase
from onnx.backend.test.loader import DATA_DIR, load_model_tests
from onnx.backend.test.runner import Runner

from onnx_lowrank.graph.scopes import scopes
from onnx_lowrank.operators import registry

_LARGE = 2**25
_KINDS = ("simple", "pytorch-converted", "pytorch-operator")


@dataclass(frozen=True)
class Case:
    """A model of the backend tests.

    Attributes:
        name: Its name, unique in its kind.
        proto: The model.
        sets: Inputs by name, with the outputs in the model's order.
        rtol: The relative tolerance of the outputs.
        atol: The absolute tolerance of the outputs.
    """

    name: str
    proto: ModelProto
    sets: tuple[tuple[dict[str, Any], list[Any]], ...]
    rtol: float = 1e-3
    atol: float = 1e-7


@cache
def nodes() -> tuple[Case, ...]:
    """A model for every example of every operator; onnx computes their inputs and outputs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The examples overflow and divide by zero on purpose.
        found = load_model_tests(kind="node")
    return tuple(
        Case(
            case.name,
            case.model,
            tuple((_named(case.model, feed), list(map(_array, wanted))) for feed, wanted in case.data_sets),
            case.rtol,
            case.atol,
        )
        for case in sorted(found, key=lambda case: case.name)
    )


@cache
def files() -> tuple[Case, ...]:
    """The models in files with inputs and outputs: small networks, and operators as PyTorch exports them."""
    found = (case for kind in _KINDS for case in load_model_tests(kind=kind))
    return tuple(map(_file, sorted(found, key=lambda case: case.name)))


def _file(case: TestCase) -> Case:
    folder = Path(case.model_dir)
    proto = onnx.load(folder / "model.onnx")
    sets = tuple(
        (
            _named(proto, _values(data, "input", [value.type for value in proto.graph.input])),
            _values(data, "output", [value.type for value in proto.graph.output]),
        )
        for data in sorted(folder.glob("test_data_set_*"))
    )
    return Case(case.name, proto, sets, case.rtol, case.atol)


@cache
def light() -> tuple[Case, ...]:
    """Whole networks, which compute their weights from shapes."""
    found = load_model_tests(kind="real")
    return tuple(map(_light, sorted(found, key=lambda case: case.name)))


def _light(case: TestCase) -> Case:
    path = Path(DATA_DIR) / "light" / Path(case.url).name
    proto = onnx.load(path)
    given = {tensor.name for tensor in proto.graph.initializer}
    feed = {v.name: Runner.generate_dummy_data(v) for v in proto.graph.input if v.name not in given}
    outputs = _values(path.parent, f"{path.stem}_output", [value.type for value in proto.graph.output])
    return Case(case.name, proto, ((feed, outputs),), case.rtol, case.atol)


@cache
def nodes_with_weights() -> tuple[Case, ...]:
    """Forms of `nodes` with one input, the first or the second; the inputs beside it are constants.

    Only models that hold an operator with a decomposable weight have such forms.
    """
    return tuple(
        form
        for case in nodes()
        if any(registry.known(node) for scope in scopes(case.proto) for node in scope.nodes)
        for value in case.proto.graph.input[:2]
        if (form := _with_weights(case, value.name)) is not None
    )


def _with_weights(case: Case, kept: str) -> Case | None:
    """A case with one input; None if no other input is an array of numbers."""
    feed, outputs = case.sets[0]
    fixed = {name: value for name, value in feed.items() if name != kept and _is_numeric(value)}
    if not fixed:
        return None
    proto = ModelProto()
    proto.CopyFrom(case.proto)
    proto.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in fixed.items())
    if proto.ir_version >= 4:  # Before, initializers are inputs, too.
        for value in [value for value in proto.graph.input if value.name in fixed]:
            proto.graph.input.remove(value)
    rest = {name: value for name, value in feed.items() if name not in fixed}
    return replace(case, name=f"{case.name}({kept})", proto=proto, sets=((rest, outputs),))


def light_with_weights() -> Iterator[Case]:
    """Forms of `light` with random weights in place of computed ones, and so without stored outputs.

    AlexNet, VGG-19 and ZFNet are left out: the rest has fewer than 26 million parameters each.
    """
    for case in light():
        shapes = {tensor.name: numpy_helper.to_array(tensor) for tensor in case.proto.graph.initializer}
        computed = {
            node.output[0]: shapes[node.input[0]]
            for node in case.proto.graph.node
            if node.op_type == "ConstantOfShape" and node.input[0] in shapes
        }
        if sum(map(np.prod, computed.values())) < _LARGE:
            yield replace(case, proto=_drawn(case.proto, computed), sets=())


def _drawn(proto: ModelProto, shapes: dict[str, np.ndarray]) -> ModelProto:
    """A copy with random weights of these shapes, which keep the size of activations.

    Vectors are positive, as the variances of a BatchNormalization have to be.
    """
    copy = ModelProto()
    copy.CopyFrom(proto)
    rng = np.random.default_rng(5)
    for name, shape in shapes.items():
        drawn = rng.standard_normal(shape, np.float32)
        drawn = np.abs(drawn) if drawn.ndim == 1 else drawn * np.float32(np.sqrt(2 / np.prod(shape[1:])))
        tensor = numpy_helper.from_array(drawn, name)
        copy.graph.initializer.append(tensor)
        value = onnx.helper.make_tensor_value_info(name, tensor.data_type, tensor.dims)
        copy.graph.input.append(value)  # In these old models, initializers are inputs, too.
    for node in [node for node in copy.graph.node if node.output[0] in shapes]:
        copy.graph.node.remove(node)
    return copy


def _named(proto: ModelProto, values: Sequence[Any]) -> dict[str, Any]:
    names = [value.name for value in proto.graph.input][: len(values)]
    return dict(zip(names, map(_array, values), strict=True))


def _array(value: Any) -> Any:
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def _is_numeric(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind not in "OUS"


def _values(folder: Path, stem: str, types: Sequence[TypeProto]) -> list[Any]:
    """The values in the files stem_0.pb, stem_1.pb and so on."""
    values: list[Any] = []
    while (path := folder / f"{stem}_{len(values)}.pb").exists():
        data = path.read_bytes()
        match types[len(values)].WhichOneof("value"):
            case "sequence_type":
                values.append(numpy_helper.to_list(onnx.SequenceProto.FromString(data)))
            case "optional_type":
                values.append(numpy_helper.to_optional(onnx.OptionalProto.FromString(data)))
            case _:
                values.append(numpy_helper.to_array(onnx.TensorProto.FromString(data)))
    return values
