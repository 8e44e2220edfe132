"""The original model as a teacher: its outputs and inner values, from the engine that runs calibration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray
from onnx import ModelProto
from onnx.helper import make_empty_tensor_value_info

from onnx_lowrank.engines.engine import Feed
from onnx_lowrank.engines.running import Engine
from onnx_lowrank.files.load import Model

Teach = Callable[[Feed], dict[str, NDArray[Any]]]
"""Gives the float outputs and the inner values of the original on a batch, by name."""


@contextmanager
def teaching(model: Model, engine: Engine, inner: Sequence[str]) -> Iterator[Teach]:
    """Open the original model with further outputs.

    Args:
        model: The model.
        engine: Runs it.
        inner: The names of inner values of its main graph.

    Raises:
        UnsupportedError: The engine does not accept it.
    """
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    known = {output.name for output in proto.graph.output}
    proto.graph.output.extend(make_empty_tensor_value_info(name) for name in inner if name not in known)
    with engine.open(replace(model, proto=proto, path=None)) as run:

        def teach(feed: Feed) -> dict[str, NDArray[Any]]:
            return {name: value for name, value in run(feed).items() if _is_float(value)}

        yield teach


def _is_float(value: Any) -> bool:
    return getattr(getattr(value, "dtype", None), "kind", "") == "f" and value.size > 0
