"""Saving a model beside its target, and renaming it over that."""

from __future__ import annotations

import os
from pathlib import Path

from onnx_lowrank.errors import InputError
from onnx_lowrank.files.atomic import check_writable, replacing
from onnx_lowrank.files.external import pack
from onnx_lowrank.files.load import Model, serialized
from onnx_lowrank.files.tensors import (
    is_external,
    tensors,
)


def check_target(model: Model, path: str | os.PathLike[str]) -> None:
    """Find out early whether `save` can write a model there.

    Raises:
        InputError: The target cannot be written, or is a data file that the model itself reads.
    """
    data_target, target = _targets(Path(path))
    for file in (target, data_target) if model.files else (target,):
        check_writable(file)
        if file.exists() and any(file.samefile(read_from) for read_from in model.files.values()):
            raise InputError(f"{file} is a data file of the input model: choose another name.")


def _targets(path: Path) -> tuple[Path, Path]:
    """The data file and the model file, in the order in which they are renamed."""
    return path.parent / f"{path.name}.data", path


def save(model: Model, path: str | os.PathLike[str]) -> None:
    """Write a model beside its target and rename it over that; a failure leaves the target as it was.

    A model with external data, or one that exceeds protobuf's 2 GB, becomes `path` and `path`.data.
    A target that is a symbolic link is replaced, not followed.

    Raises:
        InputError: The target cannot be written, or is a data file that the model itself reads.
    """
    check_target(model, path)
    data_target, target = _targets(Path(path))
    data = serialized(model.proto)
    if data is not None and not any(is_external(t) for t in tensors(model.proto)):
        with replacing(target) as (file,):
            file.write(data)
        return
    with replacing(data_target, target) as (data_file, file):
        packed = pack(model.proto, model.files, model.name, data_file, data_target.name, inline=data is None)
        data = serialized(packed)
        if data is None:
            raise InputError(f"{model.name} has over 2 GB beside its tensors' contents: split the model.")
        file.write(data)
