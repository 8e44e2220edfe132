"""The page of a sweep: one file with the curve and the details of all points."""

from __future__ import annotations

import os
from pathlib import Path

from onnx_lowrank.documents import reports, sweeps
from onnx_lowrank.errors import InputError
from onnx_lowrank.files.atomic import replacing
from onnx_lowrank.sweeps.run import FILE


def has_points(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a sweep that has made a model."""
    path = Path(folder) / FILE
    return path.is_file() and any(point.is_made for point in sweeps.read(path).points)


def write(folder: str | os.PathLike[str], path: str | os.PathLike[str], command: str = "") -> None:
    """Write the page of a sweep.

    Args:
        folder: The folder of the sweep.
        path: The place of the page.
        command: The command that made the sweep, for the page to show.

    Raises:
        InputError: The folder holds no sweep with a model, the extra `report` is not installed, or the page
            cannot be written.
    """
    from onnx_lowrank.report.web import data, render  # Most sweeps show no page.

    found = sweeps.read(Path(folder) / FILE)
    made = {p.name: reports.read(Path(folder) / p.report) for p in found.points if p.is_made}
    if not made:
        raise InputError(f"No point of {folder} has a model, so there is no page: choose larger ratios.")
    text = render.page(data.of_sweep(found, made, command))
    with replacing(Path(path)) as (file,):
        file.write(text.encode())
