"""The command that compresses one model at many ratios: `onnx-lowrank sweep IN.onnx FOLDER`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from onnx_lowrank import budgets, values
from onnx_lowrank.commands import compress
from onnx_lowrank.destinations import check_outputs
from onnx_lowrank.display import displayed
from onnx_lowrank.errors import EvaluatorError
from onnx_lowrank.report import curve
from onnx_lowrank.request import DEFAULT_BUDGET
from onnx_lowrank.sweeps import page
from onnx_lowrank.sweeps.run import FILE, spread, sweep

_RANGE = re.compile(r"([0-9.]+)\.\.([0-9.]+)")
_DEFAULT, _POINTS = "0.9..0.2", 8

_OWN = frozenset({"source", "recipe", "budget", "quiet", "cache", "no_cache", "report"})
_SINGLE = frozenset({"out", "ratio", "plan", "save_plan", "dry_run", "list_passes"}) | {
    "target_error",
    "target_agreement",
    "completion",
}
"""The parameters of `compress` that this command has in its own form, and those of a single model."""

_EPILOG = f"""\b
Examples:
  onnx-lowrank sweep IN.onnx points --ratios 0.9,0.7,0.5 --calibration DATA
  onnx-lowrank sweep IN.onnx points --budget params --budget macs --evaluate mine:accuracy

The folder gets a model, a plan and a report for every point, and {FILE}. A sweep that was interrupted goes on
where it stopped: type the same command again.

{compress.EXIT_CODES}"""


def _ratios(
    ctx: click.Context, param: click.Parameter, value: str
) -> tuple[float, ...] | tuple[float, float]:
    """The ends of a range, or ratios one by one.

    Raises:
        click.BadParameter: It is neither.
    """
    ctx.meta["is_range"] = bool(ends := _RANGE.fullmatch(value))
    try:
        return tuple(map(float, ends.groups() if ends else value.split(",")))
    except ValueError:
        raise click.BadParameter(
            f"{value!r} is no list of ratios: write it like 0.9,0.7,0.5 or like 0.9..0.2"
        ) from None


@click.command(
    "sweep",
    context_settings={"max_content_width": 100},
    epilog=_EPILOG,
    add_help_option=False,
)
@click.argument("source", metavar="IN.onnx", type=click.Path(path_type=Path))
@click.argument("folder", metavar="FOLDER", type=click.Path(path_type=Path))
@click.option(
    "--ratios",
    callback=_ratios,
    default=_DEFAULT,
    show_default=True,
    metavar="LIST|A..B",
    help="The ratios, or the ends of a range.",
)
@click.option(
    "--points", callback=values.count, metavar="N", help=f"Ratios in a range, by default {_POINTS}."
)
@click.option(
    "--budget",
    "budgets",
    multiple=True,
    metavar="|".join(budgets.names()),
    help=f"The quantity that the ratios bound, by default {DEFAULT_BUDGET}. Repeatable.",
)
@click.option(
    "--pass",
    "recipes",
    multiple=True,
    metavar="NAME|FILE",
    help="A recipe, as for one model. Repeatable.",
)
@click.option(
    "--evaluate",
    metavar="MODULE:FUNCTION",
    help="Your score: a function of the path of a model, in this folder or on PYTHONPATH.",
)
@click.option(
    "--cache",
    type=click.Path(),
    callback=values.given_path,
    metavar="DIR",
    help="Keep results that all points share in DIR; by default in FOLDER.",
)
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    callback=values.page_path,
    metavar="FILE.html",
    help="Write a page with the curve and the details of all points.",
)
@click.option("--quiet", "-q", is_flag=True, help="Print errors only.")
@click.pass_context
def command(
    ctx: click.Context,
    /,
    source: Path,
    folder: Path,
    ratios: tuple[float, ...],
    points: int | None,
    budgets: tuple[str, ...],
    recipes: tuple[str, ...],
    evaluate: str | None,
    cache: Path | None,
    report: Path | None,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Compress IN.onnx at many ratios, and compare the results; FOLDER gets their files."""
    if ctx.meta["is_range"]:
        ratios = spread(ratios[0], ratios[1], _POINTS if points is None else points)
    elif points is not None:
        raise click.UsageError("--points divides a range, such as --ratios 0.9..0.2: leave it out of a list.")
    if report is not None:
        check_outputs(source, None, None, (report,))
    with displayed(ctx.obj["verbose"], quiet=quiet, as_json=as_json) as (console, progress):
        try:
            found = sweep(
                source,
                folder,
                ratios,
                budgets=budgets or (DEFAULT_BUDGET,),
                recipes=recipes or (None,),
                evaluate=evaluate,
                progress=progress,
                cache=True if cache is None else cache,
                **options,
            )
        except EvaluatorError:
            if report is not None and page.has_points(folder):
                page.write(folder, report, ctx.obj["command"])
            raise
    if report is not None:
        page.write(folder, report, ctx.obj["command"])
    if not quiet and not as_json:
        curve.show(found, console, folder)


command.params += [param for param in compress.command.params if param.name not in _OWN | _SINGLE]
