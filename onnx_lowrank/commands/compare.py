"""The command that compares two models: `onnx-lowrank compare A.onnx B.onnx`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.console import Console

from onnx_lowrank import values
from onnx_lowrank.commands import compress
from onnx_lowrank.comparison import compare
from onnx_lowrank.display import displayed
from onnx_lowrank.report.comparison import show

_OPTIONS = frozenset(
    {"tokenizer", "mean", "std", "provider", "engine", "threads", "as_json", "verbose", "help"}
)
"""The parameters of `compress` for inputs, times and the machine that mean the same here."""

_EPILOG = f"""\b
Examples:
  onnx-lowrank compare model.onnx small.onnx
  onnx-lowrank compare model.onnx small.onnx --inputs samples.npz --time

{compress.EXIT_CODES}"""


@click.command("compare", context_settings={"max_content_width": 100}, epilog=_EPILOG, add_help_option=False)
@click.argument("one", metavar="A.onnx", type=click.Path(path_type=Path))
@click.argument("other", metavar="B.onnx", type=click.Path(path_type=Path))
@click.option(
    "--inputs",
    type=click.Path(),
    callback=values.given_path,
    metavar="DATA",
    help="Inputs on which to compare the models: .npz, a text, or a folder of images; by default they are "
    "made from the graph of A.onnx.",
)
@click.option(
    "--input-shape",
    multiple=True,
    callback=values.shapes,
    metavar="NAME=1,3,224,224",
    help="Shape of an input whose dimensions A.onnx leaves open. Repeatable; second shapes of all inputs "
    "make a second set, on which --time counts, too.",
)
@click.option(
    "--weights",
    callback=values.numbers("set of shapes", "0.3,0.7"),
    metavar="W1,W2",
    help="How much the sets of --input-shape count in --time; by default equally.",
)
@click.option("--time", is_flag=True, help="Time both models in turns.")
@click.option("--quiet", "-q", is_flag=True, help="Show no progress.")
@click.pass_context
def command(
    ctx: click.Context, /, one: Path, other: Path, quiet: bool, as_json: bool, **options: Any
) -> None:
    """Compare B.onnx with A.onnx: graphs, sizes, fused operators, outputs and, with --time, times."""
    with displayed(ctx.obj["verbose"], quiet=quiet, as_json=as_json) as (_, progress):
        found = compare(one, other, progress=progress, **options)
    show(found, Console())


command.params += [param for param in compress.command.params if param.name in _OPTIONS]
