"""The draft of a model: its scopes, its weights and the ways to store them, and the model that it gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import strategies as st
from onnx import FunctionProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

KINDS: dict[str, Any] = {
    "float": np.dtype(np.float32),
    "double": np.dtype(np.float64),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_ROOT_ONLY_IR = 4
"""Before this version, initializers have to be inputs, which a body cannot have."""

_CONSTANT_INTEGERS = 9
"""Before this version, a Constant node holds floats only."""


@dataclass(frozen=True)
class Value:
    """A float tensor of a draft; `is_open` says that its first size is only known at run time."""

    name: str
    shape: tuple[int, ...]
    is_open: bool = False

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def batch(self) -> int | str:
        return "N" if self.is_open else self.shape[0]


@dataclass
class Scope:
    """The nodes of a graph or function, and the initializers of a graph."""

    outer: Scope | None = None
    is_function: bool = False
    nodes: list[NodeProto] = field(default_factory=list)
    initializers: list[TensorProto] = field(default_factory=list)


class Draft:
    """A model that a strategy draws; its methods add nodes to the scope that is open."""

    def __init__(self, draw: st.DrawFn, kind: str, opset: int, ir: int) -> None:
        self.draw, self.kind, self.opset, self.ir = draw, kind, opset, ir
        self.dtype = KINDS[kind]
        self.number = helper.np_dtype_to_tensor_dtype(self.dtype)
        self.rng = np.random.default_rng(draw(st.integers(0, 2**16)))
        self.root = self.scope = Scope()
        self.inputs: list[ValueInfoProto] = []
        self.outputs: list[ValueInfoProto] = []
        self.values: list[ValueInfoProto] = []
        self.functions: list[FunctionProto] = []
        self.domains: set[str] = set()
        self._shared: dict[tuple[int, ...], list[str]] = {}
        self._count = 0

    # --- drawing ----------------------------------------------------------------------------------

    def pick(self, *choices: Any) -> Any:
        """One of the choices; failures shrink to the first."""
        return self.draw(st.sampled_from(choices))

    def size(self, least: int, most: int) -> int:
        return self.draw(st.integers(least, most))

    def order(self, length: int) -> list[int]:
        return self.draw(st.permutations(range(length)))

    def rarely(self, times: int = 4) -> bool:
        """True in one of so many cases."""
        return bool(self.draw(st.integers(0, times - 1)) == times - 1)

    # --- nodes ------------------------------------------------------------------------------------

    def fresh(self, stem: str = "v") -> str:
        self._count += 1
        return f"{stem}{self._count}"

    def node(
        self, op: str, inputs: Sequence[str], outputs: int = 1, domain: str = "", **attributes: Any
    ) -> Any:
        """Add a node, and return the name of its output, or the names of several."""
        names = [self.fresh() for _ in range(outputs)]
        known = {key: value for key, value in attributes.items() if value is not None}
        node = helper.make_node(op, list(inputs), names, self.fresh("n"), domain=domain or None, **known)
        self.domains.add(domain)
        self.scope.nodes.append(node)
        return names[0] if outputs == 1 else names

    def integers(self, *numbers: int) -> str:
        """Keep a list of integers."""
        return self.keep(np.asarray(numbers, np.int64))

    def axes(self, op: str, name: str, *numbers: int) -> str:
        """Squeeze or Unsqueeze: the axes were an attribute before opset 13."""
        if self.opset < 13:
            return self.node(op, [name], axes=list(numbers))
        return self.node(op, [name, self.integers(*numbers)])

    # --- weights ----------------------------------------------------------------------------------

    def weight(self, *shape: int, fan: int = 0) -> str:
        """A weight of this shape, perhaps one that is there already, or behind views."""
        known = self._shared.get(shape, [])
        if known and not self._in_function() and self.rarely(3):
            return self.pick(*known)
        name = self._viewed(self._numbers(shape, fan))
        # Tensors of a body are unknown outside of it.
        if self.scope is self.root:
            self._shared.setdefault(shape, []).append(name)
        return name

    def small(self, *shape: int, least: float | None = None) -> str:
        """A bias or a scale: normal numbers, or their sizes plus the least one."""
        values = self.rng.standard_normal(shape)
        return self.keep((values if least is None else np.abs(values) + least).astype(self.dtype))

    def keep(self, array: np.ndarray) -> str:
        """Store an array as an initializer of this scope or of the main graph, or in a Constant node."""
        name = self.fresh("w")
        tensor = numpy_helper.from_array(array, name)
        where = "here"
        if self.scope is not self.root:
            where = self.pick("constant", "outside", "here")
        elif self.rarely(5):
            where = "constant"
        is_barred = self.scope is not self.root and self.ir < _ROOT_ONLY_IR
        if self.opset < _CONSTANT_INTEGERS and array.dtype.kind not in "fV":
            where = "outside" if is_barred else "here"
        elif self._in_function() or (where == "here" and (self.scope.is_function or is_barred)):
            where = "constant"
        if where == "constant":
            node = helper.make_node("Constant", [], [name], self.fresh("n"))
            node.attribute.append(helper.make_attribute("value", tensor))
            self.scope.nodes.append(node)
        else:
            (self.root if where == "outside" else self.scope).initializers.append(tensor)
        return name

    def _in_function(self) -> bool:
        scope: Scope | None = self.scope
        while scope is not None and not scope.is_function:
            scope = scope.outer
        return scope is not None

    def _numbers(self, shape: tuple[int, ...], fan: int) -> np.ndarray:
        """Numbers of a weight: spectra that decay, in most cases; outputs of about the size of the inputs."""
        rows = shape[0]
        matrix = self.rng.standard_normal((rows, prod(shape) // rows))
        u, s, v = np.linalg.svd(matrix, full_matrices=False)
        match self.pick("decaying", "decaying", "flat", "one", "zero", "equal"):
            case "decaying":
                s = s[0] * 0.7 ** np.arange(len(s))
            case "one":
                s[1:] = 0
            case "zero":
                s[:] = 0
            case "equal":
                s[:] = 1
        spread = np.sqrt(max(fan, 1)) * (np.sqrt(np.mean(s**2)) or 1) / np.sqrt(max(matrix.shape))
        scale = self.pick(1.0, 1.0, 1.0, 1e-8, 1e8) if self.kind in ("float", "double") else 1.0
        return (scale * ((u * s) @ v) / spread).reshape(shape).astype(self.dtype)

    def _viewed(self, array: np.ndarray) -> str:
        """Store an array so that it comes out of a view as it is."""
        match self.pick("plain", "plain", "transposed", "reshaped", "squeezed", "identity", "cast"):
            case "transposed":
                order = self.order(array.ndim)
                stored = array.transpose(np.argsort(order))
                return self.node("Transpose", [self.keep(np.ascontiguousarray(stored))], perm=order)
            case "reshaped":
                shape = self.integers(*array.shape)
                return self.node("Reshape", [self.keep(array.reshape(self.pick(-1, (1, -1)))), shape])
            case "squeezed":
                return self.axes("Squeeze", self.keep(array[None]), 0)
            case "identity":
                return self.node("Identity", [self.keep(array)])
            case "cast" if self.kind != "bfloat16":
                stored = array.astype(self.pick(np.float32, np.float64))
                return self.node("Cast", [self.keep(stored)], to=self.number)
        return self.keep(array)

    # --- the model --------------------------------------------------------------------------------

    def input(self, name: str, kind: int, shape: Sequence[int | str]) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def value_info(self, value: Value, name: str = "") -> ValueInfoProto:
        """The type of a value; its sizes may be left out."""
        shape: list[Any] = [value.batch, *value.shape[1:]] if value.shape else []
        if self.rarely():
            shape = [None] * len(shape)
        return helper.make_tensor_value_info(name or value.name, self.number, shape)

    def model(self) -> ModelProto:
        """The finished model."""
        for tensor in self.root.initializers:
            # From IR 4 on, such an input has a default that a caller may replace.
            if self.ir < _ROOT_ONLY_IR or self.rarely(12):
                self.inputs.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        graph = helper.make_graph(
            self.root.nodes, "g", self.inputs, self.outputs, self.root.initializers, value_info=self.values
        )
        imports = [
            helper.make_opsetid(domain, 1 if domain else self.opset) for domain in sorted(self.domains | {""})
        ]
        return helper.make_model(
            graph,
            opset_imports=imports,
            ir_version=self.ir,
            functions=self.functions,
            producer_name="strategy",
        )
