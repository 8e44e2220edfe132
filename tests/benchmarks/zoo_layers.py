"""The real layers of a model of `models/zoo.py`, as the planner sees them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "models"))

from zoo import build

from onnx_lowrank.files.load import load
from onnx_lowrank.layers.found import Found, find_layers


def zoo_layers(name: str) -> Found:
    """The layers of one of the zoo's models, at batch size 1."""
    found = load(build(name))
    (entry, *_) = found.proto.graph.input
    shape = tuple(dim.dim_value or 1 for dim in entry.type.tensor_type.shape.dim)
    return find_layers(found, {entry.name: shape}, (), ())
