"""Balances the input features of matrices before a quantization that gives their whole tensor one scale.

Activations of transformers have features with ranges far above the others', and one scale for all leaves few
steps to those. So the input of a matrix is divided by a scale for each feature, and the rows of the matrix
are multiplied by it: an exact change of the float model, and one Mul for each tensor (SmoothQuant, Xiao et
al., 2023, arXiv:2211.10438). The scale is the square root of the feature's range, as for ranks (`scale_of`).
Decoders are left out: between the factors of a layer it takes no Mul.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.calibrate.calibration import Calibration
from onnx_lowrank.core.factors import Certificate
from onnx_lowrank.files.load import Model
from onnx_lowrank.graph.walk import Place
from onnx_lowrank.layers.binding import Binding
from onnx_lowrank.layers.find import read
from onnx_lowrank.layers.found import Found
from onnx_lowrank.quantize.balance import SUFFIX, showing, with_scales
from onnx_lowrank.quantize.kind import Feeds
from onnx_lowrank.rewrite.refit import Refitted
from onnx_lowrank.stages.build import assemble
from onnx_lowrank.stages.rounding import columns, scale_of

_WEIGHT = 1
"""The operand of a MatMul that the tool quantizes as a weight."""

_NO_PROOF = Certificate((), ())


def balanced(
    found: Found, bindings: Iterable[Binding], calibration: Calibration, feeds: Feeds
) -> tuple[Model, ExitStack]:
    """The model with balanced inputs of matrices.

    Args:
        found: The model with its layers.
        bindings: The layers that the quantization rounds, each with one use, without decoders.
        calibration: Gives the engine.
        feeds: Inputs that show the ranges.

    Returns:
        The model, and its files on disk, to close with the model.

    Raises:
        InputError: The disk is full.
    """
    chosen = _by_input(found, bindings)
    if not chosen:
        return found.model, ExitStack()
    scales = {name: scale_of(size) for name, size in _ranges(found.model, chosen, calibration, feeds).items()}

    def refits() -> Iterator[Refitted]:
        for tensor, group in chosen.items():
            for binding in group:
                weight = columns(read(found.model, found.walk, binding), scales[tensor])
                yield Refitted(binding, weight, _NO_PROOF, None, is_narrowed=False)

    made, _, files = assemble(found, refits(), merging=False)
    uses = [binding.layer.uses[0] for group in chosen.values() for binding in group]
    outputs = {found.walk.node(Place(use.scope, use.node)).output[0] for use in uses}
    return replace(made.model, proto=with_scales(made.model.proto, scales, outputs)), files


def _by_input(found: Found, bindings: Iterable[Binding]) -> dict[str, list[Binding]]:
    """The matrices of the main graph by the tensor that they multiply."""
    groups: dict[str, list[Binding]] = {}
    for binding in bindings:
        layer, use = binding.layer, binding.layer.uses[0]
        is_matrix = use.op == "MatMul" and use.operand == _WEIGHT and not use.scope
        if is_matrix and layer.groups == 1 and layer.dtype == "float32":
            groups.setdefault(found.walk.node(Place(use.scope, use.node)).input[0], []).append(binding)
    return groups


def _ranges(
    model: Model, groups: Mapping[str, list[Binding]], calibration: Calibration, feeds: Feeds
) -> dict[str, NDArray[np.float64]]:
    """The largest size of every feature of tensors, by their names."""
    sizes = {name: group[0].layer.c for name, group in groups.items()}
    largest = {name: np.zeros(size) for name, size in sizes.items()}
    with calibration.engine.open(replace(model, proto=showing(model, sizes))) as run:
        for feed in feeds:
            shown = run(dict(feed))
            for name, known in largest.items():
                np.maximum(known, shown[f"{name}/{SUFFIX}"], out=known)
    return largest
