"""OpenVINO on the CPU.

It computes in float32. On processors with bfloat16, its own default is bfloat16, in which no comparison would
show the errors of the factors alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar, NoReturn

import numpy as np

from onnx_lowrank.engines.engine import Feed, Kind, RejectedError, Run, Source, UnsupportedError, materialized
from onnx_lowrank.engines.engine import one_line as shortened
from onnx_lowrank.errors import InputError
from onnx_lowrank.files.load import Model

_DEVICE = "CPU"
_FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}
_WAIT = 100  # milliseconds
_PLACES = re.compile(r"Exception from \S+:\d+:|Check '.*' failed at \S+:\d+:|FrontEnd API failed with \w+:")
"""The places in OpenVINO's own source that its messages name."""


@dataclass(frozen=True, slots=True)
class OpenVino:
    """OpenVINO on the CPU."""

    module: ModuleType
    name: ClassVar[str] = "OpenVINO CPU"
    provider: ClassVar[str] = name
    concurrent: ClassVar[int] = 1
    times_nodes: ClassVar[bool] = False

    @contextmanager
    def open(self, model: Model) -> Iterator[Run]:
        """Load a model.

        Raises:
            UnsupportedError: OpenVINO cannot convert the model.
        """
        with materialized(model, relocates=False) as source:
            yield self._run(model, source, _FLOAT32, _interruptibly)

    @contextmanager
    def ready(self, model: Model, feed: Feed, threads: int) -> Iterator[Callable[[], object]]:
        """Load a model as it is deployed, to time repeated runs on the same inputs.

        Args:
            model: The model.
            feed: The inputs.
            threads: How many threads compute; 0 leaves it to OpenVINO.

        Raises:
            UnsupportedError: OpenVINO cannot convert the model.
        """
        number = {"INFERENCE_NUM_THREADS": threads} if threads else {}
        with materialized(model, is_deployed=True, relocates=False) as source:
            settings = {"PERFORMANCE_HINT": "LATENCY", **_FLOAT32, **number}
            run = self._run(model, source, settings, lambda request, feed: request.infer(feed))
            yield lambda: run(feed)

    def profiled(self, model: Model, feed: Feed, threads: int) -> NoReturn:
        """It does not time nodes.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError(f"{self.name} does not time nodes")

    def _run(
        self, model: Model, source: Source, settings: Mapping[str, Any], infer: Callable[[Any, Feed], object]
    ) -> Run:
        """A compiled model; its outputs have the names of the ONNX model's, and their order."""
        core = self.module.Core()
        try:
            compiled = core.compile_model(core.read_model(source.model), _DEVICE, dict(settings))
        except Exception as error:
            raise UnsupportedError(_one_line(error, source)) from error
        request = compiled.create_infer_request()
        # It leaves out inputs that nothing reads.
        read = [name for port in compiled.inputs for name in port.names]
        names = [value.name for value in model.proto.graph.output]

        def run(feed: Feed) -> dict[str, Any]:
            try:
                infer(request, {name: feed[name] for name in read if name in feed})
                # Copies: the next run writes into the same arrays.
                values = [np.array(tensor.data) for tensor in request.output_tensors]
            except Exception as error:
                raise RejectedError(_one_line(error, source)) from error
            return dict(zip(names, values, strict=True))

        return run


def _interruptibly(request: Any, feed: Feed) -> None:
    """Run a model, and end the run at a signal, which Python sees between two waits only."""
    request.start_async(dict(feed))
    try:
        while not request.wait_for(_WAIT):
            pass
    except BaseException:
        request.cancel()
        raise


def _one_line(error: Exception, source: Source) -> str:
    """OpenVINO's message in one line, without the places in its source and its advice on extensions."""
    text = _PLACES.sub("", str(error)).partition("To facilitate the conversion")[0]
    return shortened(text.strip() or error, source)


def _openvino(provider: str) -> OpenVino:
    """OpenVINO.

    Raises:
        InputError: It is not installed.
    """
    try:
        # An optional dependency: it comes with an extra.
        import openvino
    except ImportError as error:
        raise InputError(
            "The engine 'openvino' needs the package openvino, which is not installed: install "
            "onnx-lowrank[openvino], or pass --engine onnxruntime."
        ) from error
    return OpenVino(openvino)


KIND = Kind("openvino", _openvino)
