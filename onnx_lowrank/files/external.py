"""External data: finding a model's files safely, spilling new tensors, and packing them into one file."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import TracebackType
from typing import Any, BinaryIO, Self
from weakref import finalize

import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from onnx_lowrank.errors import InputError
from onnx_lowrank.files.scratch import scratch
from onnx_lowrank.files.tensors import (
    Region,
    inline,
    is_external,
    read,
    reference,
    region,
    stored_size,
    tensors,
)

_PAGE, _LARGE_PAGE = 4096, 65536
_LARGE = 1 << 20
_INLINE_BYTES = 1024
_LARGE_INLINE = 1 << 16
_SPILLED = 1 << 24
_ROOM = 4  # Factors and activations go to the same folder.
_DIGITS = 16  # of the digest in the name of a data file
_STALE_KEYS = ("checksum", "basepath", "prepacked_")  # they describe the whole old file, or its offsets


def locate(proto: onnx.ModelProto, model: Path) -> dict[str, Path]:
    """The real file of every external location that a model names.

    A file must be in the folder of the model, either as named or after its symbolic links are followed
    (model hubs store both as links into one folder).

    Raises:
        InputError: A location is empty, absolute, leaves the folder, or is no file.
    """
    roots = (model.parent.resolve(), model.resolve().parent)
    locations = {reference(t).get("location", "") for t in tensors(proto) if is_external(t)}
    return {location: _real_file(location, model, roots) for location in sorted(locations)}


def _real_file(location: str, model: Path, roots: tuple[Path, ...]) -> Path:
    posix, windows = PurePosixPath(location), PureWindowsPath(location)
    if (
        not location
        or posix.is_absolute()
        or windows.anchor
        or ".." in (*posix.parts, *windows.parts)
        or "\0" in location
    ):
        raise InputError(f"{model} has external data at {location!r}: name a file inside the model's folder.")
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


class Spill:
    """A temporary data file for new tensors, so that memory need not hold them.

    Use it as a context manager around the making and the saving of a model; its end deletes the file.

    Attributes:
        files: The mapping to merge into the files of the model that uses the tensors.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        """Open the file.

        Args:
            folder: The folder of the file; None for the system's temporary folder.

        Raises:
            InputError: The folder takes no file.
        """
        with ExitStack() as stack:
            try:
                place = stack.enter_context(scratch(folder))
                path = place / f"{place.stem}.spill"
                self._file = stack.enter_context(path.open("xb"))
            except OSError as error:
                where = folder or tempfile.gettempdir()
                raise InputError(f"{where} takes no temporary file ({error.strerror}): free it.") from error
            # A result that is forgotten, not closed, leaves nothing on disk either.
            self._close = finalize(self, stack.pop_all().close)
        self.files: Mapping[str, Path] = {path.name: path}

    def __enter__(self) -> Self:
        """Use the file until the block ends."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Delete the file."""
        self._close()

    def tensor(self, name: str, array: NDArray[Any]) -> TensorProto:
        """Write an array to the file.

        Args:
            name: The name of the new tensor.
            array: Any shape, any data type of ONNX except strings.

        Returns:
            A tensor that refers to the array in the file.

        Raises:
            InputError: The disk is full.
        """
        tensor = numpy_helper.from_array(array, name)
        self.take(tensor)
        return tensor

    def large(self, name: str, array: NDArray[Any]) -> TensorProto:
        """As `tensor`, but a small array stays in the tensor."""
        return inline(name, array) if array.nbytes < _LARGE_INLINE else self.tensor(name, array)

    def take(self, tensor: TensorProto) -> None:
        """Write the bytes of a tensor to the file, and have it refer to them, in place.

        Raises:
            InputError: The disk is full.
        """
        data = tensor.raw_data
        try:
            offset = append(self._file, [data], len(data))
            self._file.flush()
        except OSError as error:
            raise InputError(
                f"{self._file.name} cannot be written ({error.strerror}): make room there."
            ) from error
        tensor.ClearField("raw_data")
        refer(tensor, Path(self._file.name).name, offset, len(data))


def spilled(proto: onnx.ModelProto, resources: ExitStack) -> tuple[onnx.ModelProto, Mapping[str, Path]]:
    """Move large inline tensors into a temporary file, if copies of the model would need much memory.

    Args:
        proto: The model. It is changed, so the caller hands over the only reference.
        resources: Removes the file when it closes.

    Returns:
        The model, and the file by its location. `whole` restores the original model byte for byte. Without
        room for a file the model stays unchanged.
    """
    large = [tensor for tensor in tensors(proto) if _is_large(tensor)]
    size = sum(stored_size(tensor) or 0 for tensor in large)
    if size < _SPILLED:
        return proto, {}
    with ExitStack() as stack:
        try:
            if shutil.disk_usage(tempfile.gettempdir()).free < _ROOM * size:
                return proto, {}
            spill = stack.enter_context(Spill())
        except (InputError, OSError):
            return proto, {}
        try:
            for tensor in large:
                spill.take(tensor)
        except InputError:
            return whole(proto, spill.files, "the model"), {}
        # Protobuf frees the cleared bytes only with the proto that held them, so copy the rest.
        light = onnx.ModelProto()
        light.CopyFrom(proto)
        resources.enter_context(stack.pop_all())
        return light, spill.files


def _is_large(tensor: TensorProto) -> bool:
    """Whether a tensor has many bytes of its own, and says of itself nothing that only external ones say."""
    fields = ("data_location", "segment")
    is_plain = not tensor.external_data and not any(tensor.HasField(field) for field in fields)
    return is_plain and tensor.HasField("raw_data") and (stored_size(tensor) or 0) >= _LARGE_INLINE


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


def append(out: Any, chunks: Iterable[bytes], length: int) -> int:
    """Write `length` bytes at the next offset at which a runtime can map them; returns the offset."""
    offset = aligned(out.tell(), length)
    out.write(bytes(offset - out.tell()))
    for chunk in chunks:
        out.write(chunk)
    return int(offset)


class _Digested:
    """A file that is written from start to end, with the digest of its bytes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self._digest.update(data)
        self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()

    def name(self, owner: str) -> str:
        return f"{owner}.{self._digest.hexdigest()[:_DIGITS]}.data"


def data_names(owner: str) -> re.Pattern[str]:
    """The names of data files of a model file, in this version and in earlier ones."""
    return re.compile(rf"{re.escape(owner)}(\.[0-9a-f]{{{_DIGITS}}})?\.data")


def pack(
    proto: onnx.ModelProto,
    files: Mapping[str, Path],
    owner: str,
    out: BinaryIO,
    target: str,
    *,
    with_inline: bool,
) -> tuple[onnx.ModelProto, str]:
    """Copy the external data of a model into one file.

    Args:
        proto: The model; it is not changed.
        files: Its external files.
        owner: Its name, for messages.
        out: The data file to write.
        target: The name of the model file.
        with_inline: Move large inline tensors there, too.

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
            place = region(tensor, files, owner)
            if place not in offsets:
                offsets[place] = append(data_file, place.chunks(), place.length)
            regions.append((tensor, offsets[place], place.length))
        elif with_inline and (stored_size(tensor) or 0) > _INLINE_BYTES and not tensor.HasField("segment"):
            data = numpy_helper.from_array(read(tensor, files, owner)).raw_data
            tensor.ClearField("raw_data")
            tensor.ClearField(helper.tensor_dtype_to_field(tensor.data_type))
            regions.append((tensor, append(data_file, [data], len(data)), len(data)))
    location = data_file.name(target)
    for tensor, offset, length in regions:
        refer(tensor, location, offset, length)
    return packed, location
