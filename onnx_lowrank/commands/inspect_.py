"""The command that shows a model before any ratio: `onnx-lowrank inspect IN.onnx`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.console import Console

from onnx_lowrank import values
from onnx_lowrank.commands import compress
from onnx_lowrank.display import displayed
from onnx_lowrank.inspection import inspect
from onnx_lowrank.report.inspection import show

_OPTIONS = frozenset({"device", "workers", "scheduler", "as_json", "verbose", "help"})
"""The parameters of `compress` that choose the machine."""

_EPILOG = f"""\b
Examples:
  onnx-lowrank inspect model.onnx
  onnx-lowrank inspect model.onnx --include "*attention*"

{compress.EXIT_CODES}"""


@click.command("inspect", context_settings={"max_content_width": 100}, epilog=_EPILOG, add_help_option=False)
@click.argument("source", metavar="IN.onnx", type=click.Path(path_type=Path))
@click.option("--include", multiple=True, metavar="GLOB", help="Show only these layers or nodes. Repeatable.")
@click.option("--exclude", multiple=True, metavar="GLOB", help="Leave these layers or nodes out. Repeatable.")
@click.option(
    "--input-shape",
    multiple=True,
    callback=values.shapes,
    metavar="NAME=1,3,224,224",
    help="Shape of an input whose dimensions the model leaves open, for the MACs of its layers. Repeatable.",
)
@click.option("--quiet", "-q", is_flag=True, help="Show no progress.")
@click.pass_context
def command(ctx: click.Context, /, source: Path, quiet: bool, as_json: bool, **options: Any) -> None:
    """Show the layers of IN.onnx that can be decomposed, their spectra, and why others are left alone."""
    with displayed(ctx.obj["verbose"], quiet=quiet, as_json=as_json) as (_, progress):
        seen = inspect(source, progress=progress, **options)
    show(seen, Console())


command.params += [param for param in compress.command.params if param.name in _OPTIONS]
