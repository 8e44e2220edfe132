"""Models whose operands PyTorch holds, so that forms run and not the reference implementation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from onnx import ModelProto, parser
from torch import Tensor

from onnx_lowrank.distil.forms.form import FLOATS, as_tensor
from onnx_lowrank.distil.program import Program, program

OWN = "com.microsoft"


def model(text: str, opset: int = 17, functions: str = "") -> ModelProto:
    """Parse "g (inputs) => (outputs) { nodes }"."""
    head = f'<ir_version: 10, opset_import: ["" : {opset}, "{OWN}" : 1, "local" : 1]>'
    return parser.parse_model(f"{head} {text} {functions}")


def made(proto: ModelProto, **changes: Any) -> Program:
    """The program of all outputs of a model."""
    return program(proto, [value.name for value in proto.graph.output if value.name], **changes)


def held(feed: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Arrays to feed, and floats as tensors; all as tensors if none are floats."""
    floats = {name for name, value in feed.items() if _is_float(value)}
    trained = {name: as_tensor(feed[name]) for name in floats}
    return {name: value for name, value in feed.items() if name not in floats}, trained


def run(proto: ModelProto, feed: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The outputs of a model; its floats are tensors."""
    arrays, trained = held(feed)
    with torch.no_grad():
        return {name: value.numpy() for name, value in made(proto)(arrays, trained).items()}


def drawn(seed: int = 0, dtype: Any = np.float32, **shapes: Iterable[int]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(tuple(shape)).astype(dtype) for name, shape in shapes.items()}


def check_gradients(proto: ModelProto, feed: Mapping[str, Any]) -> Program:
    """Gradients to all floats of a feed are central differences, in float64."""
    doubles = {name: value.astype(np.float64) if _is_float(value) else value for name, value in feed.items()}
    arrays, trained = held(doubles)
    tensors = {name: value.requires_grad_() for name, value in trained.items()}
    runs = made(proto)

    def outputs(*given: Tensor) -> tuple[Tensor, ...]:
        results = runs(arrays, dict(zip(tensors, given, strict=True))).values()
        return tuple(value for value in results if value.is_floating_point())

    assert torch.autograd.gradcheck(outputs, tuple(tensors.values()), fast_mode=False)
    assert not runs.stops
    return runs


def _is_float(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype in FLOATS
