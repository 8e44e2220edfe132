"""What an engine is: it opens models and runs them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from numpy.typing import NDArray

from onnx_lowrank.files.load import Model, serialized
from onnx_lowrank.files.save import save

Feed = Mapping[str, NDArray[Any]]
"""Input arrays by name."""


Run = Callable[[Feed], dict[str, Any]]
"""Runs a model that is open: inputs by name in, outputs by name out."""


class UnsupportedError(Exception):
    """An engine cannot run the model at all, whatever its inputs; the message is one line."""


class RejectedError(Exception):
    """An engine failed on these inputs; the message is one line."""


def one_line(error: object, source: bytes | str = b"") -> str:
    """An engine's message in one line, without its decoration and without names of temporary files."""
    text = str(error) or type(error).__name__
    if isinstance(source, str):
        text = text.replace(source, "the model")
        if (folder := str(Path(source).parent)) != ".":
            text = text.replace(folder, "its folder")
    text = re.sub(r"\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : ", "", text)
    # ONNX Runtime names the line of its own source and that function's signature.
    text = re.sub(r"/\S*onnxruntime\S*:\d+ [^)]*\) ", "", text)
    text = " ".join(text.split()).rstrip(".")
    return text if len(text) <= 240 else text[:239] + "…"


@contextmanager
def materialized(model: Model) -> Iterator[bytes | str]:
    """A model as an engine loads it: its file, its bytes, or a temporary file where its data lies outside."""
    if model.path is not None:
        yield str(model.path)
        return
    data = None if model.files else serialized(model.proto)
    if data is not None:
        yield data
        return
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        save(model, path)
        yield str(path)
