"""Saving a model beside its target, and renaming it over that.

External data takes a name of its own that follows from its bytes, so that it changes no file that a model
reads. It is put there first, and the model file that refers to it last, in one step: whatever ends the run,
the target is the old model with the old data or the new one with the new data. Then the old data goes:

1. It is what the replaced model referred to, or a model that a dead run had not finished, and it has the
   name of this target's data.
2. No other model file in the folder has its name in it, and the model that is saved does not read it.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from functools import reduce
from operator import and_
from pathlib import Path
from typing import BinaryIO

import onnx
from google.protobuf.message import DecodeError

from onnx_lowrank.errors import InputError
from onnx_lowrank.files.atomic import check_writable, finish, hidden, permissions, replacing, sweep
from onnx_lowrank.files.external import data_names, pack
from onnx_lowrank.files.load import Model, inlined, serialized
from onnx_lowrank.files.tensors import is_external, reference, tensors


def check_target(model: Model, path: str | os.PathLike[str]) -> None:
    """Find out early whether `save` can write a model there.

    Raises:
        InputError: The target cannot be written, or is a data file that the model itself reads.
    """
    target = Path(path)
    check_writable(target)
    if model.files:
        check_writable(target.with_name(f"{target.name}.{'0' * 16}.data"))
    if target.exists() and _is_read(model, target):
        raise InputError(f"{target} is a data file of the input model: choose another name.")


def save(model: Model, path: str | os.PathLike[str]) -> None:
    """Write a model beside its target and rename it over that; a failure leaves the target as it was.

    A model with external data, or one that exceeds protobuf's 2 GB, becomes `path` and
    `path`.DIGEST.data. A target that is a symbolic link is replaced, not followed.

    Raises:
        InputError: The target cannot be written, or is a data file that the model itself reads.
    """
    check_target(model, path)
    target, model = Path(path), inlined(model)
    old = _data_of(target, target.name)
    sweep(target.parent, lambda unfinished: old.update(_data_of(unfinished, target.name)))
    data = serialized(model.proto)
    with ExitStack() as undo:
        with replacing(target) as (file,):
            if data is None or any(is_external(t) for t in tensors(model.proto)):
                _write_both(model, target, file, data is None, _data_permissions(target, old), undo)
            else:
                file.write(data)
        undo.pop_all()
    _remove(target, {name for name in old if not _is_read(model, target.with_name(name))})


def _write_both(
    model: Model, target: Path, file: BinaryIO, inline: bool, mode: int | None, undo: ExitStack
) -> None:
    """Write a model to its temporary file, and its data to the place where it is to be.

    Args:
        model: The model.
        target: Where the temporary file will be renamed to.
        file: The temporary file.
        inline: Move large inline tensors into the data file, too.
        mode: Permissions of the data file; None for those of any new file.
        undo: Takes what has to be done if the model does not get to its target.
    """
    with hidden(target.parent, mode) as (temporary, data_file):
        packed, name = pack(model.proto, model.files, model.name, data_file, target.name, with_inline=inline)
        data = serialized(packed)
        if data is None:
            raise InputError(f"{model.name} has over 2 GB beside its tensors' contents: split the model.")
        file.write(data)
        written = os.fstat(file.fileno())
        finish(file)  # Before the data has its name, or nobody would know whose it is if the run died.
        finish(data_file)
        place = target.with_name(name)
        if not place.exists():
            undo.callback(_take_back, place, target, written)
        temporary.replace(place)


def _take_back(data: Path, target: Path, written: os.stat_result) -> None:
    """Remove data whose model file did not get to its target; an interrupt may come right after it did."""
    if not (target.exists() and os.path.samestat(target.stat(), written)):
        data.unlink(missing_ok=True)


def _is_read(model: Model, file: Path) -> bool:
    """Whether a file is one of a model's data files."""
    return file.exists() and any(file.samefile(read_from) for read_from in model.files.values())


def _data_permissions(target: Path, old: Iterable[str]) -> int | None:
    """Permissions of new data: those that the model file and all old data have; None where nothing is old."""
    files = (target, *(target.with_name(name) for name in old))
    modes = [mode for file in files if (mode := permissions(file)) is not None]
    return reduce(and_, modes) if modes else None


def _data_of(file: Path, target: str) -> set[str]:
    """The data files to which a model file refers, among those that have the name of a target's data."""
    names = data_names(target)
    proto = onnx.ModelProto()
    try:
        # A link is replaced, but the model behind it stays, and its data with it.
        if file.is_symlink() or file.stat().st_size >= 2**31 or not _found(names, file):
            return set()
        proto.ParseFromString(file.read_bytes())
    except (OSError, DecodeError):
        return set()
    locations = {reference(tensor).get("location", "") for tensor in tensors(proto) if is_external(tensor)}
    return {location for location in locations if names.fullmatch(location)}


def _found(names: re.Pattern[str], file: Path) -> set[str]:
    """All the names of a kind that are in a file, whatever they mean there."""
    if not file.stat().st_size:
        return set()
    pattern = re.compile(os.fsencode(names.pattern))
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return {os.fsdecode(found[0]) for found in pattern.finditer(content)}


def _remove(target: Path, names: set[str]) -> None:
    """Remove data files of a target that no model file in the folder has in it."""
    with suppress(OSError):  # What cannot be looked through or removed stays.
        models = {target, *target.parent.glob("*.onnx")} if names else ()
        for name in names.difference(*(_found(data_names(target.name), model) for model in models)):
            target.with_name(name).unlink(missing_ok=True)
