"""What an engine is: it opens models and runs them."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from numpy.typing import NDArray

from onnx_lowrank.files.external import relocated
from onnx_lowrank.files.load import Model, inlined, serialized
from onnx_lowrank.files.save import save

_log = logging.getLogger(__name__)

Feed = Mapping[str, NDArray[Any]]
"""Input arrays by name."""


Run = Callable[[Feed], dict[str, Any]]
"""Runs a model that is open: inputs by name in, outputs by name out."""


class UnsupportedError(Exception):
    """An engine cannot run the model at all, whatever its inputs; the message is one line."""


class RejectedError(Exception):
    """An engine failed on these inputs; the message is one line."""


@dataclass(frozen=True, slots=True)
class Source:
    """A model as a runtime loads it.

    Attributes:
        model: Its file, or its bytes.
        folder: The folder to which the locations in its bytes are relative; "" where there is no data.
        locations: These locations.
    """

    model: bytes | str
    folder: str = ""
    locations: tuple[str, ...] = ()


def one_line(error: object, source: Source | None = None) -> str:
    """An engine's message in one line, without its decoration and without names of files."""
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
    text = re.sub(r"/\S*onnxruntime\S*:\d+ [^)]*\) ", "", text)
    text = " ".join(text.split()).rstrip(".")
    return text if len(text) <= 240 else text[:239] + "…"


@contextmanager
def materialized(model: Model, *, is_deployed: bool = False) -> Iterator[Source]:
    """A model as a runtime loads it: its file, or its bytes with the data files where they are.

    Only where that cannot be it becomes a temporary file with all its data.

    Args:
        model: The model.
        is_deployed: Whether tensors have to be inline that are so in what is deployed.
    """
    if model.path is not None and (is_deployed or not model.temporary):
        yield Source(str(model.path))
        return
    source = _in_memory(inlined(model) if is_deployed else model)
    if source is not None:
        yield source
        return
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        save(model, path)
        _log.debug("wrote %r with its data to %s, from where it is loaded", model.name, folder)
        yield Source(str(path))


def _in_memory(model: Model) -> Source | None:
    """The bytes of a model; None where they exceed protobuf's 2 GB or no folder holds all data files."""
    if not model.files:
        data = serialized(model.proto)
        return None if data is None else Source(data)
    try:
        folder = os.path.commonpath([file.parent for file in model.files.values()])
        names = {name: file.relative_to(folder).as_posix() for name, file in model.files.items()}
        data = serialized(relocated(model.proto, names))
    except ValueError:  # They are on several drives, or their names are no Unicode.
        return None
    return None if data is None else Source(data, folder, tuple(names.values()))
