"""A look at a model before any ratio: its layers, the decay of their spectra, and what is left alone."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Unpack

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank import means
from onnx_lowrank import request as arguments
from onnx_lowrank.allocate.cost import factor_sizes
from onnx_lowrank.allocate.grid import Grid
from onnx_lowrank.budgets.budget import Tools
from onnx_lowrank.budgets.macs import macs
from onnx_lowrank.budgets.params import parameters
from onnx_lowrank.core.layer import Layer
from onnx_lowrank.core.option import Fold
from onnx_lowrank.errors import BudgetError
from onnx_lowrank.graph.parameters import quantized_bytes
from onnx_lowrank.layers.found import Found
from onnx_lowrank.linalg.backend import one_blas_thread, resolve
from onnx_lowrank.material import Material, read
from onnx_lowrank.options import Options, completed
from onnx_lowrank.progress import Progress, Silent
from onnx_lowrank.report.inspection import SHARES, Inspection, Row
from onnx_lowrank.report.naming import display_names
from onnx_lowrank.request import Request, Setting
from onnx_lowrank.stages import planning
from onnx_lowrank.work.scoring import WeightItem, singular_values
from onnx_lowrank.work.weights import reference

_LEAST = 1e-9
"""A ratio that no model reaches, so that the error names the smallest one."""


def inspect(model: str | os.PathLike[str], **options: Unpack[Options]) -> Inspection:
    """Show the layers of a model that can be decomposed, and the reasons for all others.

    Args:
        model: The path of the model; it is not changed.
        options: The options of `compress` that choose layers, shapes and the machine.

    Returns:
        The layers with the ranks that hold most of their weights' energy.

    Raises:
        InputError: The model, or an option, is wrong.
    """
    given = completed({**options, "dry_run": True})
    asked = arguments.request(1.0, given)
    setting = arguments.setting(asked, given)
    progress = given["progress"] or Silent()
    with one_blas_thread(), ExitStack() as stack:
        with progress.stage("find layers"):
            material = read(model, setting, stack, stack.enter_context(ExitStack()))
        ranks = _ranks(material.found, setting, progress, stack)
        return _seen(material, asked, ranks, progress)


def _ranks(
    found: Found, setting: Setting, progress: Progress, stack: ExitStack
) -> dict[str, NDArray[np.float64]]:
    """The share of the weight's energy, ‖Ŵ‖² / ‖W‖², that every rank of one slice holds, from rank 1 on."""
    backend = resolve(setting.device, means.operations(found))
    running = stack.enter_context(means.executor(setting, backend, found))
    items = (
        WeightItem(reference(found.model, found.walk, binding), {_fold(binding.layer): (1,)})
        for binding in found.bindings
    )
    held = {}
    with progress.stage("spectra", len(found.bindings)) as step:
        for binding, spectra in zip(found.bindings, running.map(singular_values, items), strict=True):
            energy = np.sum(spectra[_fold(binding.layer), 1][:, 0] ** 2, axis=0)
            held[binding.layer.id] = np.cumsum(energy) / max(float(np.sum(energy)), np.finfo(float).tiny)
            step()
    return held


def _fold(layer: Layer) -> Fold:
    return Fold.ENCODE.on(layer.kernel)


def _seen(
    material: Material, asked: Request, held: dict[str, NDArray[np.float64]], progress: Progress
) -> Inspection:
    found = material.found
    names = display_names(
        (binding.layer.id, binding.stored.source.name, binding.layer.uses[0].name)
        for binding in found.bindings
    )
    rows = tuple(_row(layer, name, held[layer.id]) for layer, name in zip(found.layers, names, strict=True))
    tools = Tools(None, material.shown, material.shapes, progress, (), ())
    grid = Grid(asked.budget.on(found, tools), asked.block, asked.blocked)
    least = None
    try:
        planning.check_reach(found.model, found.layers, _LEAST, asked.recipes, grid)
    except BudgetError as error:
        least = error.smallest_ratio
    return Inspection(
        Path(found.model.name).stem,
        rows,
        found.skipped,
        grid.costs.total,
        quantized_bytes(found.model),
        least,
    )


def _row(layer: Layer, name: str, held: NDArray[np.float64]) -> Row:
    full = layer.full_rank(_fold(layer), 1)
    saved = parameters(layer) - layer.added - 1  # what the factors may have, so that there are fewer in all
    return Row(
        id=layer.id,
        name=name,
        op=layer.op,
        shape=layer.shape,
        dtype=layer.dtype,
        params=parameters(layer),
        macs=macs(layer),
        full_rank=full,
        pays=max(0, min(full, saved // sum(factor_sizes(layer, _fold(layer), 1)))),
        # Rounding may leave the last share below 1.
        ranks=tuple(min(full, int(np.searchsorted(held, share)) + 1) for share in SHARES),
        is_narrowed=layer.narrowing is not None,
        siblings=len(layer.siblings),
    )
