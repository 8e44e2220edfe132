"""The interface of engines: an engine opens models and runs them."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from numpy.typing import NDArray

from onnx_lowrank.engines.node_times import Runs
from onnx_lowrank.files.external import relocated
from onnx_lowrank.files.load import Model, inlined, serialized
from onnx_lowrank.files.save import save
from onnx_lowrank.files.scratch import scratch

_log = logging.getLogger(__name__)

Feed = Mapping[str, NDArray[Any]]
"""Input arrays by name."""


Run = Callable[[Feed], dict[str, Any]]
"""Runs an open model: takes inputs by name, and gives outputs by name."""


class UnsupportedError(Exception):
    """An engine cannot run the model on any inputs; the message is one line."""


class UnmadeError(UnsupportedError):
    """No inputs can be made for the model, whatever runs it; the message is one line."""


class RejectedError(Exception):
    """An engine failed on these inputs; the message is one line."""


@dataclass(frozen=True, slots=True)
class Source:
    """A model in a form that a runtime can load.

    Attributes:
        model: The path of its file, or its bytes.
        folder: The folder to which the locations in its bytes are relative; "" if there are no data files.
        locations: The locations of its data files.
    """

    model: bytes | str
    folder: str = ""
    locations: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Profiled:
    """A session that notes the times of its nodes.

    Attributes:
        run: Runs the model once.
        finish: Ends the session's profile and returns the times of all runs; to be called once.
    """

    run: Callable[[], object]
    finish: Callable[[], Runs]


class Deployed(Protocol):
    """An engine that runs models as they are deployed, to compare them and to time them."""

    @property
    def name(self) -> str:
        """The name in reports."""

    @property
    def concurrent(self) -> int:
        """The number of runs of an open model that may be in progress; each takes memory for itself."""

    @property
    def module(self) -> ModuleType:
        """The package of the runtime, on whose version times depend."""

    @property
    def provider(self) -> str:
        """The part of the runtime that computes, on which times depend, too."""

    @property
    def times_nodes(self) -> bool:
        """Whether profiles have the times that nodes take."""

    def open(self, model: Model) -> AbstractContextManager[Run]:
        """Load a model.

        Raises:
            UnsupportedError: The engine does not accept the model.
        """

    def ready(self, model: Model, feed: Feed, threads: int) -> AbstractContextManager[Callable[[], object]]:
        """Load a model as it is deployed, to time repeated runs on the same inputs.

        Args:
            model: The model.
            feed: The inputs.
            threads: How many threads compute one operator; 0 leaves it to the engine.

        Raises:
            UnsupportedError: The engine does not accept the model.
        """

    def profiled(self, model: Model, feed: Feed, threads: int) -> AbstractContextManager[Profiled]:
        """Load a model as `ready` does, to time its nodes; only for an engine that times nodes."""


@dataclass(frozen=True, slots=True)
class Kind:
    """An engine that a user can choose.

    Attributes:
        name: Its name in `--engine`.
        make: Makes it, for ONNX Runtime's execution provider; an InputError tells what is not installed.
    """

    name: str
    make: Callable[[str], Deployed]


def one_line(error: object, source: Source | None = None) -> str:
    """An engine's message in one line, without codes, source locations and file names."""
    text = str(error) or type(error).__name__
    if source is not None and isinstance(source.model, str):
        text = text.replace(source.model, "the model")
        if (folder := str(Path(source.model).parent)) != ".":
            text = text.replace(folder, "its folder")
    elif source is not None:
        for location in source.locations:
            text = text.replace(str(Path(source.folder) / location), "its data").replace(location, "its data")
    text = re.sub(r"\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : ", "", text)
    # ONNX Runtime names the line of its own source and that function's signature.
    text = re.sub(r"\S*[/\\]onnxruntime\S*:\d+ [^)]*\) ", "", text)
    text = " ".join(text.split()).rstrip(".")
    return text if len(text) <= 240 else text[:239] + "…"


@contextmanager
def materialized(model: Model, *, is_deployed: bool = False, relocates: bool = True) -> Iterator[Source]:
    """A model in a form that a runtime can load: its file, or its bytes with the data files where they are.

    If neither is possible, it is written to a temporary file with all its data.

    Args:
        model: The model.
        is_deployed: Whether to load it as it is deployed: tensors that `save` would write inline are inline.
        relocates: Whether the runtime takes the folder of the data files of a model's bytes.
    """
    if model.path is not None and (is_deployed or not model.temporary):
        yield Source(str(model.path))
        return
    source = _in_memory(inlined(model) if is_deployed else model)
    if source is not None and (relocates or not source.locations):
        yield source
        return
    with scratch() as folder:
        path = folder / "model" / "model.onnx"
        path.parent.mkdir()  # This run has locked `folder`, and `save` locks the folder of the model.
        save(model, path)
        _log.debug("wrote %r with its data to %s to load it from there", model.name, folder)
        yield Source(str(path))


def _in_memory(model: Model) -> Source | None:
    """The bytes of a model; None if they exceed protobuf's 2 GB, or if no folder contains all data files."""
    if not model.files:
        data = serialized(model.proto)
        return None if data is None else Source(data)
    try:
        folder = os.path.commonpath([file.parent for file in model.files.values()])
        names = {name: file.relative_to(folder).as_posix() for name, file in model.files.items()}
        data = serialized(relocated(model.proto, names))
    except ValueError:  # The files are on several drives, or their names are not valid Unicode.
        return None
    return None if data is None else Source(data, folder, tuple(names.values()))
