"""The interface of a kind of quantization: what it does to a model, to one weight, and to the bytes.

A `Kind` does not depend on a model. Its `Quantizer` is for one model, and decides the method. ONNX Runtime's
own tools write the quantized model; `Quantizer.rounded` gives the numbers that they will store, so that other
factors and biases can be fitted to them before.
"""

from __future__ import annotations

import importlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.errors import InputError
from onnx_lowrank.files.load import Model, ModelProto
from onnx_lowrank.graph.walk import Walk, label

Feeds = Iterable[Mapping[str, NDArray[Any]]]

QUANTIZED = frozenset(
    {
        "ConvInteger",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "DynamicQuantizeMatMul",
        "GatherBlockQuantized",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "QAttention",
        "QGemm",
        "QLinearConv",
        "QLinearMatMul",
        "QuantizeLinear",
    }
)
"""The operators of quantized models, of ONNX and of ONNX Runtime."""


@dataclass(frozen=True, slots=True)
class Given:
    """The knowledge about a run that decides the method.

    Attributes:
        walk: The walk of the input model.
        calibrated: Whether there are calibration inputs.
        multiplies: Whether most of the work of the layers is in matrices (MatMul, Gemm), not in convolutions.
    """

    walk: Walk
    calibrated: bool
    multiplies: bool


class Quantizer(ABC):
    """One method for one model.

    Attributes:
        kind: The name of its kind.
        method: The method, a short phrase for reports.
        reason: Why this method was chosen, a phrase; "" if there is only one.
        operators: The operators whose constant weights it stores in fewer bits.
        per_number: Bytes of a number of such a weight.
        per_row: Bytes of the scale and the zero of an output feature.
        rounds_activations: Whether a whole tensor of activations has one scale.
        balances: Whether the input features of matrices are balanced before it (`stages.balancing`).
    """

    kind: ClassVar[str]
    method: str
    reason: str = ""
    operators: frozenset[str]
    per_number: float
    per_row: int = 0
    rounds_activations: bool = False
    balances: bool = False

    @abstractmethod
    def rounded(self, weight: NDArray[Any], operator: str) -> NDArray[Any]:
        """A weight after quantization, as the numbers that it then stands for.

        Args:
            weight: The canonical weight, shape (g, f, c, *kernel), as its node reads it.
            operator: The type of the node.
        """

    @abstractmethod
    def write(self, source: Path, target: Path, feeds: Feeds, *, is_large: bool) -> None:
        """Quantize a model file with ONNX Runtime's own tool.

        Args:
            source: The model.
            target: The file to write.
            feeds: Inputs that show the ranges of activations; read only by methods that need them.
            is_large: Whether weights go to a data file beside the target.
        """

    @abstractmethod
    def saved(self, proto: ModelProto) -> int:
        """The bytes by which a model gets smaller, or somewhat fewer; below 0 if it grows.

        Args:
            proto: The model; its tensors need no contents.
        """


class Kind(ABC):
    """One kind of quantization.

    Attributes:
        name: Its name in `--then`, plans and reports.
        order: Its place among the kinds in help and messages.
        modules: The modules that it needs, each with the name of its package.
    """

    name: ClassVar[str]
    order: ClassVar[int]
    modules: ClassVar[tuple[tuple[str, str], ...]] = ()

    def check(self) -> None:
        """Check before any work that the packages are there.

        Raises:
            InputError: One is missing.
        """
        for module, package in self.modules:
            try:
                tool(module)
            except ImportError as error:
                raise InputError(
                    f"--then {self.name} needs the package {package}, which is not installed: "
                    'pip install "onnx-lowrank[quantize]".'
                ) from error

    def on(self, model: Model, given: Given) -> Quantizer:
        """The quantizer for a model.

        Raises:
            InputError: The model is quantized already, or this kind has nothing to do in it.
        """
        for place in given.walk.places():
            node = given.walk.node(place)
            if node.op_type in QUANTIZED:
                raise InputError(
                    f"{model.name} is quantized already (node {label(node)!r} is {node.op_type}): leave out "
                    f"--then {self.name}, or name the float model."
                )
        return self.choose(model, given)

    @abstractmethod
    def choose(self, model: Model, given: Given) -> Quantizer:
        """The quantizer for a float model.

        Raises:
            InputError: This kind has nothing to do in the model, or its opset is too old.
        """


def tool(*modules: str) -> ModuleType:
    """Import the first of these modules of ONNX Runtime that this version has.

    Raises:
        ImportError: It has none of them.
    """
    with silent():  # One of them gives the root logger a handler and a level where it has none.
        for name in modules[:-1]:
            try:
                return importlib.import_module(name)
            except ModuleNotFoundError as error:
                if error.name != name:
                    raise
        return importlib.import_module(modules[-1])


def opset(model: Model) -> int:
    """The version of ONNX's own operators in a model."""
    versions = [entry.version for entry in model.proto.opset_import if entry.domain in ("", "ai.onnx")]
    return int(max(versions, default=1))


class _Mute(logging.Filter):
    """Drops what ONNX Runtime's tools log, without a logger of their own, by the root logger itself."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "onnxruntime" not in Path(record.pathname).parts


_MUTE, _NOWHERE, _LOCK = _Mute(), logging.NullHandler(), Lock()
_runs: list[None] = []
"""One item for each tool that runs, in any thread."""


@contextmanager
def silent() -> Iterator[None]:
    """Keep the advice of ONNX Runtime's tools from the user, and logging as it is."""
    root = logging.getLogger()
    with _LOCK:
        _runs.append(None)
        root.addFilter(_MUTE)
        root.addHandler(_NOWHERE)  # Without any handler, the first message would give the process one.
    try:
        yield
    finally:
        with _LOCK:
            _runs.pop()
            if not _runs:
                root.removeFilter(_MUTE)
                root.removeHandler(_NOWHERE)


def symmetric(weight: NDArray[Any], largest: int, axes: tuple[int, ...]) -> NDArray[Any]:
    """A weight rounded to multiples of max|w| / largest, shape kept.

    Args:
        weight: Any array.
        largest: The largest integer.
        axes: The axes that share a scale.
    """
    scale = np.abs(weight).max(axis=axes, keepdims=True, initial=0) / largest
    scale = np.where(scale > 0, scale, 1).astype(weight.dtype)
    return np.asarray(np.clip(np.rint(weight / scale), -largest, largest) * scale, weight.dtype)


def affine(weight: NDArray[Any], axes: tuple[int, ...]) -> NDArray[Any]:
    """A weight rounded to 256 steps between its least and its largest number, zero included.

    Args:
        weight: Any array.
        axes: The axes that share a scale and a zero.
    """
    low = np.minimum(weight.min(axis=axes, keepdims=True), 0)
    high = np.maximum(weight.max(axis=axes, keepdims=True), 0)
    scale = (high.astype(np.float64) - low) / 255
    scale = np.where(scale > 0, scale, 1).astype(weight.dtype)
    zero = np.rint(-low / scale)
    steps = np.clip(np.rint(weight / scale) + zero, 0, 255)
    return np.asarray((steps - zero) * scale, weight.dtype)
