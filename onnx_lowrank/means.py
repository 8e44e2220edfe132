"""The means of a run: what computes its work items, and what keeps its results for others."""

from __future__ import annotations

import logging

import numpy as np
from platformdirs import user_cache_path

from onnx_lowrank.engines.engine import UnsupportedError
from onnx_lowrank.errors import InputError
from onnx_lowrank.files.keeping import Keeper, environment
from onnx_lowrank.files.load import Model, stored_bytes
from onnx_lowrank.files.store import Store
from onnx_lowrank.layers.found import Found
from onnx_lowrank.linalg import spectra
from onnx_lowrank.linalg.backend import Backend
from onnx_lowrank.request import Setting
from onnx_lowrank.work.executor import Executor, in_flight
from onnx_lowrank.work.executor import executor as local

_log = logging.getLogger(__name__)

_RESULTS = "results"
"""The folder of results in the cache, beside the database of times."""

_LARGE = 2**30
"""Bytes of a model above which results are kept unasked: smaller models take little time."""


def executor(setting: Setting, backend: Backend, found: Found) -> Executor:
    """What computes the work items: a cluster, processes, or threads of this process.

    Args:
        setting: Says which.
        backend: Where they compute.
        found: The model with its layers, whose weights bound the memory of items.

    Raises:
        InputError: The cluster cannot be used.
    """
    sizes = (layer.size * np.dtype(layer.dtype).itemsize for layer in found.layers)
    # Statistics of activations may take many times a weight, so their items are bounded otherwise.
    largest = None if setting.calibration is not None else max(sizes, default=0)
    if setting.scheduler is None:
        return local(setting.workers, backend, largest)
    from onnx_lowrank.work.cluster import Cluster  # An extra brings Dask.

    return Cluster(setting.scheduler, backend, budget=in_flight(largest))


def check_engine(model: Model, setting: Setting) -> None:
    """Check, before any work, that an engine other than ONNX Runtime runs a model.

    Args:
        model: The input model.
        setting: Names the engine.

    Raises:
        InputError: It does not.
    """
    if not setting.has_own_engine or (setting.dry_run and not setting.time):
        return
    try:
        with setting.tool.open(model):
            pass
    except UnsupportedError as error:
        raise InputError(
            f"The engine {setting.engine!r} cannot run {model.name} ({error}): pass --engine onnxruntime."
        ) from error


def operations(found: Found) -> float:
    """Operations of all spectra of a model's layers; fits to activations take a multiple of them."""
    wanted = ((layer.shape, dict.fromkeys(layer.folds, layer.slices)) for layer in found.layers)
    return sum(spectra.operations(shape, folds) for shape, folds in wanted)


def keeper(model: Model, setting: Setting, device: str, processors: tuple[str, ...]) -> Keeper | None:
    """Keeps results of a run for others; None if none are kept.

    Args:
        model: The model.
        setting: Says where, and what else the results depend on.
        device: The name of the device of the linear algebra.
        processors: As in `Executor`.
    """
    if not setting.cache or (setting.cache is True and stored_bytes(model) <= _LARGE):
        return None
    folder = user_cache_path("onnx-lowrank") if setting.cache is True else setting.cache
    _log.debug("results are kept in %s", folder)
    known = dict(environment(setting.provider, device))
    if processors:
        known["workers"] = "; ".join(processors)
    return Keeper(Store(folder / _RESULTS), known)
