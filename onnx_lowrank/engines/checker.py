"""onnx's checker."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import onnx

from onnx_lowrank.engines.engine import Source, materialized, one_line
from onnx_lowrank.files.external import relocated
from onnx_lowrank.files.load import Model
from onnx_lowrank.files.scratch import scratch


def check(model: Model) -> tuple[str, ...]:
    """The complaints of onnx's checker, with full shape inference, about a model; () if there are none."""
    with _source(model) as source:
        try:
            onnx.checker.check_model(source.model, full_check=True)
        except Exception as error:
            lines = (one_line(line, source) for line in str(error).splitlines())
            return tuple(line for line in lines if line) or (type(error).__name__,)
    return ()


@contextmanager
def _source(model: Model) -> Iterator[Source]:
    """The model in a form that the checker can load.

    The checker accepts data files only in the model's folder, and neither symbolic nor hard links. But it
    never reads the data, so empty files of the same sizes serve as well. The large tensors of an inline model
    are in such a file, too.
    """
    if not model.files or (model.path is not None and not model.temporary):
        with materialized(model) as source:
            yield source
        return
    with scratch() as folder:
        names = {location: f"{number}.data" for number, location in enumerate(model.files)}
        for location, file in model.files.items():
            with (folder / names[location]).open("xb") as hollow:
                hollow.truncate(file.stat().st_size)
        path = folder / "model.onnx"
        path.write_bytes(relocated(model.proto, names).SerializeToString())
        yield Source(str(path))
