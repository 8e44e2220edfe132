"""Saving a model beside its target, then renaming it over the target.

The name of the external data contains a digest of its bytes, so writing it changes no file that a model
reads. The data gets its name first, then the model file that refers to it gets its name, in one step. However
the run ends, the target is the old model with the old data or the new model with the new data. A data file
is old, and is removed at the end, under these conditions:

1. The replaced model referred to it, or an unfinished model of a dead run did. It has a name of this
   target's data.
2. No other model file in the folder contains its name, and the saved model does not read it.

What describes the model, its plan and its report, is removed right before the model gets its name, and is
written anew right after that, so that a plan of another model is never beside it.

While names change and old data is removed, the folder is locked. Otherwise another run could remove data
whose model does not have its name yet. A run that dies meanwhile leaves a second name of the model that it
replaced, so the next run finds the old data.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial, reduce
from operator import and_
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

import onnx
from google.protobuf.message import DecodeError

from onnx_lowrank.errors import InputError
from onnx_lowrank.files.atomic import (
    MODEL,
    check_writable,
    finish,
    hidden,
    lock_folder,
    permissions,
    replacing,
    second_name,
    surely,
    sweep,
    told,
)
from onnx_lowrank.files.external import data_names, pack
from onnx_lowrank.files.load import Model, check_unchanged, inline_locations, serialized
from onnx_lowrank.files.spilling import write_whole
from onnx_lowrank.files.tensors import is_external, reference, tensors

_CHUNK = 1 << 20
_LONGEST_NAME = 512  # bytes; file systems have shorter ones


def check_target(model: Model, path: str | os.PathLike[str]) -> None:
    """Check early that `save` can write a model to a path.

    Raises:
        InputError: The target cannot be written, or is a data file that the model itself reads.
    """
    target = Path(path)
    check_writable(target)
    if model.files:
        check_writable(target.with_name(f"{target.name}.{'0' * 16}.data"))
    if target.exists() and _is_read(model, target):
        raise InputError(f"{target} is a data file of the input model: choose another name.")


def save(
    model: Model, path: str | os.PathLike[str], texts: Mapping[Path, str] = MappingProxyType({})
) -> None:
    """Write a model beside its target and rename it over the target; a failure changes nothing.

    A model with external data, one that exceeds protobuf's 2 GB, or a loaded one of over 1.5 GiB, becomes
    `path` and `path`.DIGEST.data. A target that is a symbolic link is replaced, not followed.

    Args:
        model: The model.
        path: The target.
        texts: What describes the model, by its target: it is written before the model, and replaced with it.

    Raises:
        InputError: A target cannot be written, or is a data file that the model itself reads.
    """
    target, own = Path(path), inline_locations(model)
    inline = {name: file for name, file in model.files.items() if name in own}
    outside = {name: file for name, file in model.files.items() if name not in own}
    check_target(replace(model, files=outside), target)
    old = _data_of(target, target.name)
    sweep(target.parent, lambda unfinished: old.update(_data_of(unfinished, target.name)))
    data = serialized(model.proto)
    with ExitStack() as alone, ExitStack() as undo:
        with replacing(target, *texts, mark=MODEL, leads=True) as (file, *others):
            for other, (place, text) in zip(others, texts.items(), strict=True):
                with told(place):  # Cheap failures come first.
                    other.write(text.encode())
                    finish(other)
            if data is None or outside:
                _write_both(model, inline, target, file, _data_permissions(target, old), alone, undo)
            else:
                write_whole(data, inline, model.name, file)
                finish(file)
                _enter(target.parent, alone)
            check_unchanged({f: stamp for f, stamp in model.stamps.items() if f in outside.values()})
            if replaced := _data_of(target, target.name):  # of another run, if it was faster
                alone.enter_context(second_name(target, MODEL))
            # If the model does not get to its target, nothing is removed that the target needs.
            alone.callback(surely, partial(_remove, model, target, old | replaced))
        undo.pop_all()


def _write_both(
    model: Model,
    inline: Mapping[str, Path],
    target: Path,
    file: BinaryIO,
    mode: int | None,
    alone: ExitStack,
    undo: ExitStack,
) -> None:
    """Write a model to its temporary file, and its data to the final place.

    Args:
        model: The model; if it exceeds protobuf's 2 GB, its large inline tensors become external.
        inline: The external files whose tensors become inline.
        target: The final path of the temporary file.
        file: The temporary file.
        mode: Permissions of the data file; None for the defaults.
        alone: Takes the lock that keeps other runs from changing names in the folder.
        undo: Takes the clean-up for the case that the model does not get to its target.
    """
    with hidden(target.parent, mode) as (temporary, data_file):
        packed, name = pack(
            model.proto,
            model.files,
            model.name,
            data_file,
            target.name,
            with_inline=serialized(model.proto) is None,
            kept=inline.keys(),
        )
        data = serialized(packed)
        if data is None:
            raise InputError(f"{model.name} has over 2 GB beside its tensors' contents: split the model.")
        write_whole(data, inline, model.name, file)
        written = os.fstat(file.fileno())
        # The model before the data has its name: if the run dies, the model tells whose the data is.
        finish(file)
        finish(data_file)
        place = target.with_name(name)
        _enter(target.parent, alone)
        if not place.exists():  # data that was there already may belong to another model
            undo.callback(surely, partial(_take_back, place, target, written))
        temporary.replace(place)


def _enter(folder: Path, alone: ExitStack) -> None:
    """Wait until no other run has locked a folder, and lock it until a stack is closed, if it has locks."""
    with suppress(OSError):
        lock_folder(folder.resolve(), alone, waiting=True)


def _take_back(data: Path, target: Path, written: os.stat_result) -> None:
    """Remove new data if its model file did not get to its target."""
    # Checked again, as an interrupt may come right after the rename.
    if not (target.exists() and os.path.samestat(target.stat(), written)):
        data.unlink(missing_ok=True)


def _is_read(model: Model, file: Path) -> bool:
    """Whether a file is one of a model's data files."""
    return file.exists() and any(file.samefile(read_from) for read_from in model.files.values())


def _data_permissions(target: Path, old: Iterable[str]) -> int | None:
    """Permissions of new data: those that all old files, model and data, have; None without old files."""
    files = (target, *(target.with_name(name) for name in old))
    modes = [mode for file in files if (mode := permissions(file)) is not None]
    return reduce(and_, modes) if modes else None


def _data_of(file: Path, target: str) -> set[str]:
    """The names to which a model file refers, limited to names of a target's data."""
    names = data_names(target)
    proto = onnx.ModelProto()
    try:
        # Nothing for a link: saving replaces the link, but the model behind it stays and needs its data.
        if file.is_symlink() or file.stat().st_size >= 2**31 or not _found(names, file):
            return set()
        proto.ParseFromString(file.read_bytes())
    except (OSError, DecodeError):
        return set()
    locations = {reference(tensor).get("location", "") for tensor in tensors(proto) if is_external(tensor)}
    return {location for location in locations if names.fullmatch(location)}


def _found(names: re.Pattern[str], file: Path) -> set[str]:
    """All matches of a pattern in the bytes of a file."""
    pattern = re.compile(os.fsencode(names.pattern))
    found: set[str] = set()
    window = b""
    # Not mapped: the system counts the pages of a mapped file as memory of this process.
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
            window = window[-_LONGEST_NAME:] + chunk
            found.update(os.fsdecode(match[0]) for match in pattern.finditer(window))
    return found


def _remove(model: Model, target: Path, names: set[str]) -> None:
    """Remove data files of a target unless a model file in the folder names them or `model` reads them."""
    with suppress(OSError):  # if a model cannot be searched, all data stays
        names = {name for name in names if not _is_read(model, target.with_name(name))}
        models = {target, *target.parent.glob("*.onnx")} if names else ()
        for name in names.difference(*(_found(data_names(target.name), file) for file in models)):
            target.with_name(name).unlink(missing_ok=True)
