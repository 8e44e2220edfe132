"""The command that shows a model before any ratio: `onnx-lowrank inspect IN.onnx`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.console import Console

from onnx_lowrank.commands import compress
from onnx_lowrank.inspection import inspect
from onnx_lowrank.logs import shown
from onnx_lowrank.progress import Silent, Terminal
from onnx_lowrank.report.inspection import show

_OPTIONS = frozenset(
    {"include", "exclude", "input_shape", "device", "workers", "scheduler", "verbose", "help"}
)
"""The parameters of `compress` that choose layers, shapes and the machine."""


@click.command("inspect", context_settings={"max_content_width": 100}, add_help_option=False)
@click.argument("source", metavar="IN.onnx", type=click.Path(path_type=Path))
@click.option("--quiet", "-q", is_flag=True, help="Show no progress.")
@click.pass_context
def command(ctx: click.Context, /, source: Path, quiet: bool, **options: Any) -> None:
    """Show the layers of IN.onnx that can be decomposed, their spectra, and why others are left alone."""
    console = Console(stderr=True)
    progress = Silent() if quiet else Terminal(console)
    with shown(console, ctx.obj["verbose"] or -quiet):
        seen = inspect(source, progress=progress, **options)
    show(seen, Console())


command.params += [param for param in compress.command.params if param.name in _OPTIONS]
