"""Arrays: an .npz file with arrays named like the inputs, or an .npy file for a model of one input."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from onnx_lowrank.calibrate.sources.source import Claim, Kind, Need
from onnx_lowrank.calibrate.table import Table, only, table
from onnx_lowrank.errors import InputError
from onnx_lowrank.files import arrays

_SUFFIXES = (".npz", ".npy")


def _claim(path: Path) -> Claim:
    if path.is_dir():
        return Claim.NONE
    return Claim.SURE if path.suffix.lower() in _SUFFIXES else Claim.REST


def _read(path: Path, need: Need, files: ExitStack) -> Table:
    if not path.is_file():
        raise InputError(
            f"{need.title} {path} does not exist: pass an .npz or .npy file, a text, or a folder."
        )
    found = arrays.load(path)
    columns = found if isinstance(found, dict) else only(found, need.specs, str(path))
    return table(columns, need.specs, need.most, str(path))


KIND = Kind("a file of arrays", _claim, _read)
