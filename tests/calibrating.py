"""Calibrated runs of single stages: a model, its layers, and what was measured on given arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnxruntime
from onnx import ModelProto

from onnx_lowrank.calibrate import data, measurement
from onnx_lowrank.calibrate.calibration import Calibration
from onnx_lowrank.calibrate.variety import varied
from onnx_lowrank.core.factors import Fit
from onnx_lowrank.core.option import Option
from onnx_lowrank.core.plan import Choice, Plan
from onnx_lowrank.engines.inputs import specs
from onnx_lowrank.engines.runtime import runtime
from onnx_lowrank.files.load import load
from onnx_lowrank.layers.found import Found, find_layers
from onnx_lowrank.linalg.backend import resolve
from onnx_lowrank.progress import Silent
from onnx_lowrank.stages.build import Built, build
from onnx_lowrank.work.executor import Threads

CPU = resolve("cpu")
THREADS = Threads(CPU)
ENGINE = runtime("CPUExecutionProvider")


def seen(proto: ModelProto) -> Found:
    return find_layers(load(proto), {}, (), ())


@contextmanager
def measured(found: Found, source: Any, **options: Any) -> Iterator[Calibration]:
    """Calibration by any data that compress() takes."""
    model = found.model
    with data.open_samples(source, specs(model.proto)) as samples:
        fitted = varied(model, samples, ENGINE)
        options = {"looked_up": samples, **options}
        with measurement.measure(
            model, found.walk, found.bindings, fitted, ENGINE, THREADS, **options
        ) as statistics:
            yield Calibration(samples, fitted, ENGINE, statistics)


def plan_of(
    found: Found, options: Sequence[Option | None], fit: Fit = Fit.ACTIVATIONS, *, recover: bool = False
) -> Plan:
    """A plan that gives every layer its option."""
    choices = tuple(
        Choice(layer.id, option, 0, 0.0) for layer, option in zip(found.layers, options, strict=True)
    )
    sha = found.model.sha256
    return Plan(sha, "test", "activation", 0.5, "params", choices, factors=fit, recover=recover)


def made(found: Found, plan: Plan, calibration: Calibration | None) -> Built:
    return build(found, plan, calibration, THREADS, Silent())


def run(proto: ModelProto, **feed: Any) -> np.ndarray:
    """The first output, in float64."""
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feed)[0], np.float64)
