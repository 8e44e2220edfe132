"""Tensor shapes through ONNX shape inference."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from itertools import count
from math import isqrt

from onnx import ModelProto, ValueInfoProto

from onnx_lowrank.errors import InputError
from onnx_lowrank.files.load import Model, outline
from onnx_lowrank.graph.constants import UNKNOWN, infer_shapes
from onnx_lowrank.graph.dimensions import parse, solve
from onnx_lowrank.graph.runtime_shapes import know_runtime
from onnx_lowrank.graph.scopes import scopes
from onnx_lowrank.graph.walk import Walk

_LARGEST_SIZE = 2**63 - 1
_MOST_EXAMPLES = 3

Shape = tuple[int | None, ...]
Shapes = Mapping[tuple[str, str], Shape]
"""The shapes of all tensors of known rank, by (path of the scope, name); unknown dimensions are None."""


def infer(model: Model, input_shapes: Mapping[str, tuple[int, ...]]) -> Shapes:
    """Infer the shapes of all tensors.

    Args:
        model: The model.
        input_shapes: Shapes of inputs, by name, where the user fixes them.

    Raises:
        InputError: `input_shapes` has a name that is no input or a shape that contradicts the model's, or
            the model has a text that is not UTF-8.
    """
    try:
        proto = outline(model)
    except UnicodeDecodeError as error:
        raise InputError(
            f"The model has the text {error.object!r}, which is no UTF-8: export it again."
        ) from error
    _fix(proto, input_shapes)
    proto = _inferred(proto)
    shapes: dict[tuple[str, str], Shape] = {}
    for scope in scopes(proto):
        if scope.graph is not None:
            for tensor in scope.graph.initializer:
                shapes[scope.path, tensor.name] = tuple(tensor.dims)
            for value in (*scope.graph.value_info, *scope.graph.input, *scope.graph.output):
                if value.type.tensor_type.HasField("shape"):
                    shapes[scope.path, value.name] = _shape(value)
    return shapes


def _inferred(proto: ModelProto) -> ModelProto:
    """A light copy with its shapes; where the inference fails, with the shapes that it states."""
    known = ModelProto()
    known.CopyFrom(proto)
    know_runtime(known)
    # A function that does not fit its node makes the whole inference fail, so it is tried without, too.
    for copy in (known, proto):
        with suppress(*UNKNOWN):
            return infer_shapes(copy)
    return proto


def _shape(value: ValueInfoProto) -> Shape:
    dims = value.type.tensor_type.shape.dim
    return tuple(d.dim_value if d.HasField("dim_value") and d.dim_value >= 0 else None for d in dims)


def _fix(proto: ModelProto, input_shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Write the given shapes, and all sizes that follow from them, into the inputs of a light copy."""
    weights = {tensor.name for tensor in proto.graph.initializer}
    inputs = {value.name: value for value in proto.graph.input if value.name not in weights}
    for name, shape in input_shapes.items():
        if name not in inputs:
            raise InputError(
                f"--input-shape names {name!r}, but the model's inputs are {', '.join(inputs)}: "
                "name one of them."
            )
        if not inputs[name].type.HasField("tensor_type"):
            raise InputError(f"--input-shape names {name!r}, but that input is no tensor: leave it out.")
        _check_fits(inputs[name], shape)
    symbols = _symbols(inputs, input_shapes)
    for name, value in inputs.items():
        dims = value.type.tensor_type.shape.dim
        if name in input_shapes:
            del dims[:]
            for n in input_shapes[name]:
                dims.add(dim_value=n)
        for dim in dims:
            size = _size(dim.dim_param, symbols)
            if size is not None and size <= _LARGEST_SIZE:
                dim.dim_value = size


def assumed(
    model: Model, shapes: Shapes, input_shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Shapes of all inputs with an open dimension, with another prime for every size that is open.

    They show which axis is which, in a model that lays out its tensors in the same way at all sizes.

    Args:
        model: The model.
        shapes: Its inferred shapes.
        input_shapes: The shapes of inputs that the user fixes.
    """
    inputs = {value.name: value for value in model.proto.graph.input}
    sizes = _symbols(inputs, input_shapes)
    primes = (n for n in count(3, 2) if all(n % m for m in range(3, isqrt(n) + 1, 2)))
    made = dict(input_shapes)
    for name in open_inputs(model, shapes):
        known = shapes.get(("", name))
        if known is None:
            continue
        dims = inputs[name].type.tensor_type.shape.dim
        shape = []
        for axis, (dim, n) in enumerate(zip(dims, known, strict=True)):
            dimension = parse(dim.dim_param or f"axis {axis}")
            for symbol in dimension.names if n is None else ():
                if symbol not in sizes:
                    sizes[symbol] = next(primes)
            shape.append(dimension.size(sizes) if n is None else n)
        if all(size is None or size <= _LARGEST_SIZE for size in shape):
            made[name] = tuple(shape)
    return made


def _symbols(
    inputs: Mapping[str, ValueInfoProto], input_shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, int]:
    """The sizes that follow from the given shapes, by the texts of the dimensions."""
    symbols: dict[str, int] = {}
    for name, shape in input_shapes.items():
        for dim, n in zip(inputs[name].type.tensor_type.shape.dim, shape, strict=False):
            if dim.dim_param and symbols.setdefault(dim.dim_param, n) != n:
                raise InputError(
                    f"--input-shape gives the dimension {dim.dim_param!r} the sizes "
                    f"{symbols[dim.dim_param]} and {n}, but the model wants them equal: give one size."
                )
    return solve([(parse(text), n) for text, n in symbols.items()], symbols)


def _size(text: str, symbols: Mapping[str, int]) -> int | None:
    """The size of the dimension with this text; None if it does not follow from `symbols`."""
    if text in symbols or not text:
        return symbols.get(text)
    dimension = parse(text)
    return dimension.size(symbols) if symbols.keys() >= set(dimension.names) else None


def _check_fits(value: ValueInfoProto, shape: tuple[int, ...]) -> None:
    known = _shape(value) if value.type.tensor_type.HasField("shape") else (None,) * len(shape)
    if len(known) != len(shape) or any(k not in (None, n) for k, n in zip(known, shape, strict=True)):
        stated = "×".join("?" if k is None else str(k) for k in known)
        given = "×".join(map(str, shape))
        raise InputError(
            f"--input-shape gives {value.name!r} the shape {given}, but the model says {stated}: "
            "give sizes for '?' only."
        )


def open_inputs(model: Model, shapes: Shapes) -> tuple[str, ...]:
    """The names of the inputs with an unknown dimension."""
    graph = model.proto.graph
    weights = {tensor.name for tensor in graph.initializer}
    return tuple(
        value.name
        for value in graph.input
        if value.name not in weights
        and value.type.HasField("tensor_type")
        and None in shapes.get(("", value.name), (None,))
    )


def examples(model: Model, shapes: Shapes) -> str:
    """The words of --input-shape for the inputs with unknown dimensions, with likely sizes for these.

    Inputs whose sizes follow from those before them are left out, and those after the first few.
    """
    inputs = {value.name: value for value in model.proto.graph.input}
    known: dict[str, int] = {}
    words = []
    for name in open_inputs(model, shapes):
        dims = inputs[name].type.tensor_type.shape.dim
        shape = shapes.get(("", name), (None,) * 4)
        texts = [dim.dim_param for dim in dims] if len(dims) == len(shape) else [""] * len(shape)
        sizes = [_size(text, known) if n is None else n for text, n in zip(texts, shape, strict=True)]
        if None not in sizes and dims:
            continue
        # Images have four axes, with one or three channels; sequences have fewer.
        likely = (1, 3, 224, 224) if len(shape) == 4 else (1, *[16] * len(shape))
        full = [guess if n is None else n for n, guess in zip(sizes, likely, strict=False)]
        known |= {text: n for text, n in zip(texts, full, strict=True) if text}
        known = solve([(parse(text), n) for text, n in known.items()], known)
        words.append(f"--input-shape {name}={','.join(map(str, full))}")
    return " ".join(words[:_MOST_EXAMPLES]) + " …" * (len(words) > _MOST_EXAMPLES)


def shape_of(walk: Walk, shapes: Shapes, tensor: object) -> Shape | None:
    """The shape of a walk's tensor; None if its rank is unknown."""
    return None if tensor is None else shapes.get(walk.origin(tensor))
