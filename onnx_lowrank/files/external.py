"""External data: finding a model's files safely, spilling new tensors, and packing them into one file."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Container, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO

import onnx
from onnx import TensorProto, helper, numpy_helper

from onnx_lowrank.errors import InputError
from onnx_lowrank.files.regions import Region
from onnx_lowrank.files.tensors import (
    is_external,
    read,
    reference,
    region,
    stored_size,
    tensors,
)

_PAGE, _LARGE_PAGE = 4096, 65536
_LARGE = 1 << 20
_CHUNK = 1 << 20
_INLINE_BYTES = 1024
_DIGITS = 16  # of the digest in the name of a data file
_UNUSUAL = re.compile(
    r"[\\:\ud800-\udfff]"
)  # characters that Windows or protobuf does not take in a location
_STALE_KEYS = ("checksum", "basepath", "prepacked_")  # they describe the whole old file, or its offsets


def locate(proto: onnx.ModelProto, model: Path, known: Container[str] = ()) -> dict[str, Path]:
    """The real file of every external location that a model names.

    A file must be in the folder of the model, either as named or after its symbolic links are followed
    (model hubs store both as links into one folder).

    Args:
        proto: The model.
        model: Its file.
        known: Locations to leave out.

    Raises:
        InputError: A location is empty, absolute, leaves the folder, has a backslash, or is no file.
    """
    roots = (model.parent.resolve(), model.resolve().parent)
    locations = {reference(t).get("location", "") for t in tensors(proto) if is_external(t)}
    return {name: _real_file(name, model, roots) for name in sorted(locations) if name not in known}


def _real_file(location: str, model: Path, roots: tuple[Path, ...]) -> Path:
    # On every system, as on Windows a backslash separates folders and a letter with a colon is a drive.
    if (
        not location
        or PurePosixPath(location).is_absolute()
        or PureWindowsPath(location).drive
        or ".." in PurePosixPath(location).parts
        or "\\" in location
        or "\0" in location
    ):
        raise InputError(
            f"{model} has external data at {location!r}, which is no file inside the model's folder: "
            "save both in one folder, with / between the parts of the path."
        )
    named = model.parent / location
    try:
        real = named.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"{model} needs its external data {named}, which is not there: put it beside the model."
        ) from error
    if not any(real.is_relative_to(root) for root in roots):
        raise InputError(
            f"{model} has external data {named} that links to {real}: copy it into the model's folder."
        )
    if not real.is_file():
        raise InputError(f"{model} has external data {named} that is no file: put the data file there.")
    if not os.access(real, os.R_OK):
        raise InputError(f"{model} has external data {named} that cannot be read: change its permissions.")
    return real


def refer(tensor: TensorProto, location: str, offset: int, length: int) -> None:
    """Make a tensor refer to a region of a data file, in place; other keys stay unless they are stale."""
    kept = {key: value for key, value in reference(tensor).items() if not key.startswith(_STALE_KEYS)}
    kept |= {"location": location, "offset": str(offset), "length": str(length)}
    del tensor.external_data[:]
    for key, value in kept.items():
        tensor.external_data.add(key=key, value=value)
    tensor.data_location = TensorProto.EXTERNAL


def relocated(proto: onnx.ModelProto, names: Mapping[str, str]) -> onnx.ModelProto:
    """A copy of a model that refers to its data files by other names.

    Args:
        proto: The model; it is not changed.
        names: The new name of every external location.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for tensor in tensors(copy):
        if is_external(tensor):
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = names[entry.value]
    return copy


def whole(proto: onnx.ModelProto, files: Mapping[str, Path], owner: str) -> onnx.ModelProto:
    """A copy of a model that holds the bytes of its data files in memory, of any size.

    Args:
        proto: The model; it is not changed.
        files: Its external files, or a part of them: tensors in other files stay there.
        owner: Its name, for messages.

    Raises:
        InputError: A file has changed since the model was loaded.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for tensor in tensors(copy):
        if is_external(tensor) and reference(tensor).get("location") in files:
            tensor.raw_data = b"".join(region(tensor, files, owner).chunks())
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
    return copy


def aligned(position: int, length: int) -> int:
    """The first offset from a position on at which a runtime can map `length` bytes."""
    page = _LARGE_PAGE if length >= _LARGE else _PAGE
    return -(-position // page) * page


def append(out: BinaryIO, content: Region | bytes) -> int:
    """Write bytes at the next offset at which a runtime can map them; returns the offset."""
    length = content.length if isinstance(content, Region) else len(content)
    offset = aligned(out.tell(), length)
    out.write(bytes(offset - out.tell()))
    if isinstance(content, Region):
        content.copy(out)
    else:
        out.write(content)
    return offset


class _Digested:
    """A file that is written from start to end, with the digest of its bytes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()

    def append(self, content: Region | bytes) -> int:
        """As the function `append`."""
        begin = self._file.tell()
        offset = append(self._file, content)
        # The digest is that of the bytes in this file, as the source of a copy may change meanwhile.
        self._file.seek(begin)
        while chunk := self._file.read(_CHUNK):
            self._digest.update(chunk)
        return offset

    def name(self, owner: str) -> str:
        return f"{_UNUSUAL.sub('_', owner)}.{self._digest.hexdigest()[:_DIGITS]}.data"


def data_names(owner: str) -> re.Pattern[str]:
    """The names of data files of a model file, in this version and in earlier ones."""
    stem = re.escape(_UNUSUAL.sub("_", owner))
    return re.compile(rf"{stem}(\.[0-9a-f]{{{_DIGITS}}})?\.data")


def pack(
    proto: onnx.ModelProto,
    files: Mapping[str, Path],
    owner: str,
    out: BinaryIO,
    target: str,
    *,
    with_inline: bool,
    kept: Container[str] = (),
) -> tuple[onnx.ModelProto, str]:
    """Copy the external data of a model into one file.

    Args:
        proto: The model; it is not changed.
        files: Its external files.
        owner: Its name, for messages.
        out: The data file to write, open for reading, too.
        target: The name of the model file.
        with_inline: Move large inline tensors there, too.
        kept: The locations of external tensors that stay as they are.

    Returns:
        A copy of the model that refers to the new data file, and the name of this file: the name of the
        model file with a digest of the data. Tensors that shared a region share it again.
    """
    packed = onnx.ModelProto()
    packed.CopyFrom(proto)
    data_file = _Digested(out)
    regions: list[tuple[TensorProto, int, int]] = []
    offsets: dict[Region, int] = {}
    for tensor in tensors(packed):
        if is_external(tensor):
            if reference(tensor).get("location") in kept:
                continue
            place = region(tensor, files, owner)
            if place not in offsets:
                offsets[place] = data_file.append(place)
            regions.append((tensor, offsets[place], place.length))
        elif with_inline and (stored_size(tensor) or 0) > _INLINE_BYTES and not tensor.HasField("segment"):
            data = numpy_helper.from_array(read(tensor, files, owner)).raw_data
            tensor.ClearField("raw_data")
            tensor.ClearField(helper.tensor_dtype_to_field(tensor.data_type))
            regions.append((tensor, data_file.append(data), len(data)))
    location = data_file.name(target)
    for tensor, offset, length in regions:
        refer(tensor, location, offset, length)
    return packed, location
