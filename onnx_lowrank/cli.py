"""The command: parse, call, print, exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.table import Table

from onnx_lowrank import recipe as recipes
from onnx_lowrank.errors import LowRankError
from onnx_lowrank.pipeline import DEFAULT_RECIPE, check_outputs, compress, write
from onnx_lowrank.report.progress import Silent, Terminal
from onnx_lowrank.types import Budget

_INTERRUPTED = 130


class _Shape(click.ParamType):
    """NAME=1,3,224,224."""

    name = "NAME=SIZES"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        name, separator, sizes = str(value).rpartition("=")
        parts = sizes.replace("x", ",").split(",")
        if not separator or not name or not all(part.isdigit() and int(part) > 0 for part in parts):
            self.fail(f"{value!r} has to look like NAME=1,3,224,224", param, ctx)
        return name, tuple(map(int, parts))


class _Ratio(click.ParamType):
    """A number above 0 and at most 1."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            ratio = float(value)
        except ValueError:
            self.fail(f"{value!r} is no number: 0.5 keeps half", param, ctx)
        if not 0 < ratio <= 1:
            self.fail(f"{value} is not above 0 and at most 1: 0.5 keeps half", param, ctx)
        return ratio


def _list_passes(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if not value:
        return
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for recipe in recipes.load_all():
        default = " (the default)" if recipe.name == DEFAULT_RECIPE else ""
        table.add_row(recipe.name, recipe.summary + default)
    Console(soft_wrap=not sys.stdout.isatty()).print(table)
    ctx.exit()


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("source", metavar="IN.onnx", type=click.Path(path_type=Path))
@click.argument("out", metavar="OUT.onnx", type=click.Path(path_type=Path), required=False)
@click.option("--ratio", type=_Ratio(), help="What is left of the budget: 0.5 keeps half.")
@click.option("--pass", "recipe", default=DEFAULT_RECIPE, show_default=True, metavar="NAME|FILE",
              help="The recipe: one that --list-passes lists, or a TOML file.")
@click.option("--list-passes", is_flag=True, is_eager=True, expose_value=False, callback=_list_passes,
              help="List the recipes and exit.")
@click.option("--budget", type=click.Choice([str(b) for b in Budget]), default=str(Budget.PARAMS),
              show_default=True, help="What the ratio counts.")
@click.option("--plan", type=click.Path(path_type=Path), help="Replay a saved plan instead of --ratio.")
@click.option("--save-plan", type=click.Path(path_type=Path), help="Write the plan as JSON.")
@click.option("--include", multiple=True, metavar="GLOB", help="Decompose only layers of these names. Repeatable.")
@click.option("--exclude", multiple=True, metavar="GLOB", help="Leave layers of these names alone. Repeatable.")
@click.option("--inputs", type=click.Path(path_type=Path), metavar="DATA.npz",
              help="Inputs on which both models are compared; made from the graph by default.")
@click.option("--input-shape", multiple=True, type=_Shape(), metavar="NAME=1,3,224,224",
              help="The shape of an input that the model leaves open. Repeatable.")
@click.option("--max-error", type=float, help="Fail if an output's relative error is larger.")
@click.option("--report", type=click.Path(path_type=Path, allow_dash=True), metavar="FILE.json",
              help="Write the report as JSON; - is stdout.")
@click.option("--dry-run", is_flag=True, help="Show the plan; factorize and write nothing.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True,
              help="Where the linear algebra runs.")
@click.option("--provider", default="CPUExecutionProvider", show_default=True, metavar="EP",
              help="ONNX Runtime's execution provider for the comparison.")
@click.option("--quiet", "-q", is_flag=True, help="Print errors only.")
@click.option("--verbose", "-v", is_flag=True, help="Print tracebacks too.")
@click.version_option(package_name="onnx-lowrank")
def command(
    source: Path,
    out: Path | None,
    save_plan: Path | None,
    report: Path | None,
    input_shape: Sequence[tuple[str, tuple[int, ...]]],
    dry_run: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Make IN.onnx smaller by low-rank decomposition and write it to OUT.onnx.

    Exit codes: 0 done; 1 internal error; 2 wrong command or input; 3 the ratio cannot be reached;
    4 the result failed validation, and nothing was written; 130 interrupted.
    """
    if out is None and not dry_run:
        raise click.UsageError("OUT.onnx is missing: name the file to write, or pass --dry-run.")
    check_outputs(source, out, save_plan, report)
    console = Console(stderr=True)
    result = compress(
        source,
        input_shape=dict(input_shape),
        dry_run=dry_run,
        progress=Silent() if quiet else Terminal(console),
        **options,
    )
    if not quiet:
        result.report.table(console)
    write(result, None if dry_run else out, save_plan, report)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit with its code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    verbose = any(argument in ("--verbose", "-v") for argument in arguments)
    sys.exit(_run(arguments, verbose))


def _run(arguments: Sequence[str], verbose: bool) -> int:
    try:
        return int(command.main(arguments, prog_name="onnx-lowrank", standalone_mode=False) or 0)
    except click.ClickException as error:
        _complain(" ".join(error.format_message().split()), verbose)
        return 2
    except (click.Abort, KeyboardInterrupt):
        _complain("Interrupted; nothing was written.", False)
        return _INTERRUPTED
    except LowRankError as error:
        _complain(str(error), verbose)
        return error.exit_code
    except Exception as error:
        _complain(f"Internal error ({type(error).__name__}: {error}): please report it with --verbose.", verbose)
        return 1


def _complain(message: str, verbose: bool) -> None:
    console = Console(stderr=True, soft_wrap=True)
    if verbose:
        console.print_exception()
    console.print(f"onnx-lowrank: {message}", style="red", markup=False, highlight=False)
