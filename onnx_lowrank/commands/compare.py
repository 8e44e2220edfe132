"""The command that compares two models: `onnx-lowrank compare A.onnx B.onnx`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.console import Console

from onnx_lowrank.commands import compress
from onnx_lowrank.comparison import compare
from onnx_lowrank.logs import shown
from onnx_lowrank.progress import Silent, Terminal
from onnx_lowrank.report.comparison import show

_OPTIONS = frozenset(
    {
        "tokenizer",
        "mean",
        "std",
        "inputs",
        "input_shape",
        "weights",
        "provider",
        "engine",
        "time",
        "threads",
        "verbose",
        "help",
    }
)
"""The parameters of `compress` for inputs, times and the machine."""


@click.command("compare", context_settings={"max_content_width": 100}, add_help_option=False)
@click.argument("one", metavar="A.onnx", type=click.Path(path_type=Path))
@click.argument("other", metavar="B.onnx", type=click.Path(path_type=Path))
@click.option("--quiet", "-q", is_flag=True, help="Show no progress.")
@click.pass_context
def command(ctx: click.Context, /, one: Path, other: Path, quiet: bool, **options: Any) -> None:
    """Compare B.onnx with A.onnx: graphs, sizes, fused operators, outputs and, with --time, times."""
    console = Console(stderr=True)
    progress = Silent() if quiet else Terminal(console)
    with shown(console, ctx.obj["verbose"] or -quiet):
        found = compare(one, other, progress=progress, **options)
    show(found, Console())


command.params += [param for param in compress.command.params if param.name in _OPTIONS]
