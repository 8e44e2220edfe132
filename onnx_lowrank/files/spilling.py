"""Temporary data files: for new tensors, and for the large inline tensors of a large model."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from io import BytesIO
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self
from weakref import finalize

import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from onnx_lowrank.errors import InputError
from onnx_lowrank.files.external import append, refer, whole
from onnx_lowrank.files.regions import Region
from onnx_lowrank.files.scratch import discard, scratch
from onnx_lowrank.files.tensors import inline, is_external, reference, region, stored_size, tensors
from onnx_lowrank.files.wire import LENGTH, Field, Piece, Walker, WireError, encoded, write

_LARGE_INLINE = 1 << 16
_SPILLED = 1 << 24
_ROOM = 4  # Factors and activations go to the same folder.
_MOST_FIELDS = 512  # More are numbers, each a field of its own: not the bytes that are to be moved.
_RAW = TensorProto.RAW_DATA_FIELD_NUMBER


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
                self._file = path.open("xb")
                stack.callback(discard, self._file)
            except OSError as error:
                where = folder or tempfile.gettempdir()
                raise InputError(
                    f"{where} takes no temporary file ({error.strerror}): make room there."
                ) from error
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

    def take(self, tensor: TensorProto, content: Region | None = None) -> None:
        """Write the bytes of a tensor to the file, and have it refer to them, in place.

        Args:
            tensor: The tensor.
            content: The place of the bytes; None if they are in the tensor.

        Raises:
            InputError: The disk is full, or the bytes cannot be read.
        """
        data = tensor.raw_data if content is None else content
        try:
            offset = append(self._file, data)
            self._file.flush()
        except OSError as error:
            raise InputError(
                f"{self._file.name} cannot be written ({error.strerror}): make room there."
            ) from error
        tensor.ClearField("raw_data")
        refer(tensor, Path(self._file.name).name, offset, self._file.tell() - offset)


def spilled(proto: onnx.ModelProto, resources: ExitStack) -> tuple[onnx.ModelProto, Mapping[str, Path]]:
    """Move large inline tensors into a temporary file, if copies of the model would need much memory.

    Args:
        proto: The model. It is changed, so the caller hands over the only reference.
        resources: Removes the file when it closes.

    Returns:
        The model, and the file by its location. `whole` restores the original model byte for byte. Without
        room for a file the model stays unchanged.
    """
    large = [t for t in tensors(proto) if t.HasField("raw_data") and _may_move(t)]
    size = sum(stored_size(tensor) or 0 for tensor in large)
    with ExitStack() as stack:
        spill = _spill(size, stack)
        if spill is None:
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


def spilled_file(path: Path, resources: ExitStack) -> tuple[bytes, Mapping[str, Path]] | None:
    """As `spilled`, for a model in a file: the large tensors never are in memory.

    Args:
        path: The file of a serialized model.
        resources: Removes the temporary file when it closes.

    Returns:
        The serialized model that `spilled` gives, and the file by its location; None if nothing is moved, be
        it that the model is damaged.

    Raises:
        OSError: The file cannot be read.
    """
    size = path.stat().st_size
    moved = 0
    with ExitStack() as stack:
        spill = _spill(size, stack)
        if spill is None:
            return None

        def move(walker: Walker, begin: int, end: int) -> tuple[Piece, ...] | None:
            nonlocal moved
            found = _bare(walker, begin, end)
            if found is None:
                return None
            tensor, place = found
            spill.take(tensor, Region(path, place.start, len(place)))
            moved += len(place)
            return (tensor.SerializeToString(deterministic=True),)

        light = BytesIO()
        with path.open("rb") as file:
            walker = Walker(file)
            try:
                pieces = walker.pieces(onnx.ModelProto.DESCRIPTOR, 0, size, _LARGE_INLINE, move)
                if pieces is None or moved < _SPILLED:
                    return None
                write(pieces, walker, light)
            except (WireError, InputError):
                return None
        resources.enter_context(stack.pop_all())
        return light.getvalue(), spill.files


def _spill(size: int, stack: ExitStack) -> Spill | None:
    """A new file for some bytes of tensors; None if they are few, or if there is no room."""
    try:
        if size < _SPILLED or shutil.disk_usage(tempfile.gettempdir()).free < _ROOM * size:
            return None
        return stack.enter_context(Spill())
    except (InputError, OSError):
        return None


def _bare(walker: Walker, begin: int, end: int) -> tuple[TensorProto, range] | None:
    """A serialized tensor without its bytes, and the place of these; None if they are not to be moved.

    Raises:
        WireError: It is no tensor, or has two fields of bytes.
    """
    fields = list(islice(walker.fields(begin, end), _MOST_FIELDS + 1))
    raw = list(filter(_is_raw, fields))
    if not raw or len(fields) > _MOST_FIELDS:
        return None
    if len(raw) > 1:
        raise WireError
    place = range(raw[0].content, raw[0].end)
    if len(place) < _LARGE_INLINE:
        return None
    try:
        bare = TensorProto.FromString(walker.read(begin, raw[0].begin) + walker.read(raw[0].end, end))
    except DecodeError as error:
        raise WireError from error
    return (bare, place) if _may_move(bare) and stored_size(bare) == len(place) else None


def _is_raw(field: Field) -> bool:
    """Whether a field of a tensor is its bytes; protobuf keeps one of another kind as an unknown field."""
    return field.number == _RAW and field.kind == LENGTH


def _may_move(tensor: TensorProto) -> bool:
    """Whether a tensor is large, and says of itself nothing that only external ones say."""
    fields = ("data_location", "segment")
    is_plain = not tensor.external_data and not any(tensor.HasField(field) for field in fields)
    return is_plain and (stored_size(tensor) or 0) >= _LARGE_INLINE


def write_whole(light: bytes, files: Mapping[str, Path], owner: str, out: BinaryIO) -> None:
    """Write the serialized model that `whole` gives; the bytes of its data files never are in memory.

    Only a model that is not walked is in memory as a whole.

    Args:
        light: The serialized model.
        files: Its external files, or a part of them: tensors in other files stay there.
        owner: Its name, for messages.
        out: The file to write.

    Raises:
        InputError: A data file has changed since the model was loaded.
        OSError: The file cannot be written.
    """

    def fill(walker: Walker, begin: int, end: int) -> tuple[Piece, ...] | None:
        tensor = TensorProto.FromString(walker.read(begin, end))
        if not is_external(tensor) or reference(tensor).get("location") not in files:
            return None
        place = region(tensor, files, owner)
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
        return _filled(tensor, place)

    if not files:
        out.write(light)
        return
    walker = Walker(BytesIO(light), most=len(light))
    try:
        pieces = walker.pieces(onnx.ModelProto.DESCRIPTOR, 0, len(light), 0, fill)
    except WireError:
        proto = whole(onnx.ModelProto.FromString(light), files, owner)
        out.write(proto.SerializeToString(deterministic=True))
        return
    write(pieces or (light,), walker, out)


def _filled(tensor: TensorProto, place: Region) -> tuple[Piece, ...]:
    """The pieces of a serialized tensor with its bytes."""
    tensor.raw_data = b""
    bare = tensor.SerializeToString(deterministic=True)
    walker = Walker(BytesIO(bare))
    (raw,) = filter(_is_raw, walker.fields(0, len(bare)))
    tag = encoded(_RAW << 3 | LENGTH)
    return (bare[: raw.begin], tag + encoded(place.length), place, bare[raw.end :])
