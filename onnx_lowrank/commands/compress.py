"""The command that compresses one model: `onnx-lowrank IN.onnx OUT.onnx --ratio 0.5`."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from onnx_lowrank import budgets, completion, quantize, values
from onnx_lowrank.api import compress
from onnx_lowrank.core.option import Style
from onnx_lowrank.destinations import check_outputs, print_text, write
from onnx_lowrank.display import displayed
from onnx_lowrank.documents import recipes
from onnx_lowrank.engines import kinds
from onnx_lowrank.request import AUTO_RECIPE, DEFAULT_BUDGET, DEFAULT_RECIPE
from onnx_lowrank.targets import TARGETS

_AUTO = (
    "Tries several recipes and keeps the best on held-out calibration inputs "
    "(the default with --calibration)."
)
_NUMBER = re.compile(r"[0-9]*\.?[0-9]+")
EXIT_CODES = """\b
Exit codes:
  0    done
  1    internal error
  2    wrong command or input
  3    the ratio cannot be reached; the message names one that can
  4    validation failed; nothing is written
  129  hung up
  130  interrupted
  143  terminated

Colours are left out where NO_COLOR is set.
"""
_EPILOG = f"""\b
Examples:
  onnx-lowrank IN.onnx OUT.onnx --ratio 0.5
  onnx-lowrank IN.onnx OUT.onnx --ratio 0.4 --calibration samples.npz
  onnx-lowrank IN.onnx OUT.onnx --target-error 0.05 --calibration samples.npz
  onnx-lowrank IN.onnx OUT.onnx --ratio 0.6 --budget latency --threads 4
  onnx-lowrank IN.onnx --ratio 0.5 --dry-run --save-plan plan.json
  eval "$(onnx-lowrank --completion bash)"

\b
Other commands, each with -h:
  onnx-lowrank sweep IN.onnx FOLDER    many ratios, side by side
  onnx-lowrank inspect IN.onnx         the layers and their spectra
  onnx-lowrank explain PLAN.json       a saved plan in words
  onnx-lowrank compare A.onnx B.onnx   the differences of two models
  onnx-lowrank olive-package-config    the package file for Olive's workflows

{EXIT_CODES}"""


def _printing(text: Callable[[click.Context], str]) -> Callable[[click.Context, click.Parameter, bool], None]:
    """The callback of an option that prints a text and exits."""

    def callback(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value and not ctx.resilient_parsing:
            print_text(text(ctx).rstrip("\n") + "\n")
            ctx.exit()

    return callback


def _passes(ctx: click.Context) -> str:
    formatter = ctx.make_formatter()
    if not sys.stdout.isatty():
        formatter.width = sys.maxsize  # one line per recipe, so that grep finds whole entries
    default = {DEFAULT_RECIPE: " (the default)"}
    listed = [(recipe.name, recipe.summary + default.get(recipe.name, "")) for recipe in recipes.load_all()]
    formatter.write_dl([(AUTO_RECIPE, _AUTO), *listed])
    return formatter.getvalue()


def _noted(ctx: click.Context, param: click.Parameter, value: bool) -> bool:
    """Remember a flag, also for the errors of options."""
    ctx.obj[param.name] = value
    return value


def _script(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value and not ctx.resilient_parsing:
        print_text(completion.script(value))
        ctx.exit()


def _names(known: Callable[[], Iterable[str]]) -> Callable[..., list[str]]:
    """Completes the value of an option with known names."""
    return lambda ctx, param, typed: [name for name in known() if name.startswith(typed)]


def _recipes() -> Iterable[str]:
    return (AUTO_RECIPE, *(recipe.name for recipe in recipes.load_all()))


def _verbose(ctx: click.Context, param: click.Parameter, value: int) -> None:
    ctx.obj["verbose"] = value


@click.command(
    context_settings={"allow_extra_args": True, "max_content_width": 100},
    epilog=_EPILOG,
    add_help_option=False,
)
@click.argument("source", metavar="IN.onnx", type=click.Path(path_type=Path))
@click.argument("out", metavar="OUT.onnx", type=click.Path(path_type=Path), required=False)
@click.option("--ratio", callback=values.number, metavar="NUMBER", help="How much to keep: 0.5 keeps half.")
@click.option(
    "--pass",
    "recipe",
    metavar="NAME|FILE",
    shell_complete=_names(_recipes),
    help="A recipe from --list-passes, or a TOML file; "
    f"by default {DEFAULT_RECIPE}, or {AUTO_RECIPE} with --calibration.",
)
@click.option(
    "--list-passes",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_printing(_passes),
    help="List the recipes and exit.",
)
@click.option(
    "--budget",
    metavar="|".join(budgets.names()),
    shell_complete=_names(budgets.names),
    help=f"The quantity that the ratio bounds, by default {DEFAULT_BUDGET}.",
)
@click.option(
    "--align",
    callback=values.alignment,
    metavar="auto|int4|N",
    help="Choose only ranks that are multiples of N, for kernels that compute in blocks; "
    "auto takes the block of the provider, int4 that of --then int4 (32). By default, convolutions suit the "
    "CPU provider; 1 takes all.",
)
@click.option(
    "--then",
    metavar="|".join(quantize.names()),
    shell_complete=_names(quantize.names),
    help="Quantize the compressed model afterwards with ONNX Runtime's own tool, with factors and "
    "biases fitted to it; --budget bytes counts it.",
)
@click.option(
    "--distil",
    is_flag=True,
    help="Train the factors together afterwards, by gradients and without labels, on the inputs of "
    "--calibration; needs PyTorch.",
)
@click.option(
    "--minutes",
    callback=values.number,
    metavar="NUMBER",
    help="The time of the distillation; by default it goes on until the held-out loss stops falling.",
)
@click.option(
    "--synthetic",
    is_flag=True,
    help="Distil without data: on inputs made from the statistics of the model's BatchNormalizations.",
)
@click.option(
    "--lowering",
    metavar="|".join(Style),
    shell_complete=_names(lambda: Style),
    help="Write factors as convolutions of size 1, as matrices, or without grouped convolutions; a comma "
    "joins several. By default, as their layers are.",
)
@click.option(
    "--target",
    metavar="|".join(TARGETS),
    shell_complete=_names(lambda: TARGETS),
    help="The runtime or accelerator to write for: stands for its --align, --lowering and --engine.",
)
@click.option(
    "--calibration",
    type=click.Path(),
    callback=values.given_path,
    metavar="DATA",
    help="Inputs to fit to, without labels: .npz, .npy, a folder of .npz or of ONNX test data, a text with "
    "--tokenizer, or a folder of images with --mean and --std.",
)
@click.option(
    "--tokenizer",
    callback=values.given_path,
    metavar="FILE.json",
    help="The model's tokenizer.json, for texts.",
)
@click.option(
    "--mean",
    callback=values.numbers("channel", "0.485,0.456,0.406"),
    metavar="R,G,B",
    help="Mean of each channel of images, whose values are 0 to 1.",
)
@click.option(
    "--std",
    callback=values.numbers("channel", "0.229,0.224,0.225"),
    metavar="R,G,B",
    help="Standard deviation of each channel of images.",
)
@click.option(
    "--calibration-samples", callback=values.count, metavar="N", help="Use at most N calibration samples."
)
@click.option(
    "--no-recover",
    "recover",
    is_flag=True,
    callback=lambda ctx, param, value: not value,
    help="Fit every layer on its own; do not correct errors of the layers before it.",
)
@click.option(
    "--target-error",
    callback=values.number,
    metavar="NUMBER",
    help="Instead of --ratio: find the smallest model whose output error on held-out calibration "
    "inputs is at most this.",
)
@click.option(
    "--target-agreement",
    callback=values.number,
    metavar="NUMBER",
    help="Instead of --ratio: find the smallest model that agrees with IN.onnx on this share of held-out "
    "calibration inputs; 0.99 is 99 %.",
)
@click.option(
    "--plan",
    type=click.Path(path_type=Path),
    metavar="FILE.json",
    help="Replay a saved plan instead of --ratio, --pass, --budget, --align and --then.",
)
@click.option(
    "--save-plan",
    type=click.Path(path_type=Path),
    metavar="FILE.json",
    help="Write the plan, to edit or replay it; - is stdout.",
)
@click.option(
    "--include", multiple=True, metavar="GLOB", help="Decompose only these layers or nodes. Repeatable."
)
@click.option("--exclude", multiple=True, metavar="GLOB", help="Keep these layers or nodes. Repeatable.")
@click.option(
    "--inputs",
    type=click.Path(),
    callback=values.given_path,
    metavar="DATA",
    help="Inputs on which to compare the models: .npz, a text, or a folder of images; by default "
    "those of --calibration, else inputs made from the graph.",
)
@click.option(
    "--check",
    type=click.Path(),
    callback=values.given_path,
    metavar="DATA",
    help="Inputs of another kind, in the formats of --calibration: the report shows the errors on them, too.",
)
@click.option(
    "--input-shape",
    multiple=True,
    callback=values.shapes,
    metavar="NAME=1,3,224,224",
    help="Shape of an input whose dimensions the model leaves open; a past may be empty (1,3,0,64). "
    "Repeatable; second shapes of all inputs make a second set, on which times count, too.",
)
@click.option(
    "--weights",
    callback=values.numbers("set of shapes", "0.3,0.7"),
    metavar="W1,W2",
    help="How much the sets of --input-shape count in times; by default equally.",
)
@click.option(
    "--max-error",
    callback=values.number,
    metavar="NUMBER",
    help="Largest accepted relative error of an output.",
)
@click.option(
    "--report",
    multiple=True,
    type=click.Path(path_type=Path, allow_dash=True),
    callback=values.report_paths,
    metavar="FILE",
    help="Write the report: a .html file is a page for a browser, a .nodes.json file shows the errors in "
    "Model Explorer, a .json file has all data; - is stdout. Repeatable.",
)
@click.option("--dry-run", is_flag=True, help="Only make the plan; do not write OUT.onnx.")
@click.option(
    "--device",
    metavar="auto|cpu|cuda",
    default="auto",
    show_default=True,
    help="Where the linear algebra runs.",
)
@click.option(
    "--provider",
    default="CPUExecutionProvider",
    show_default=True,
    metavar="EP",
    help="ONNX Runtime's execution provider for calibration, validation and timing.",
)
@click.option(
    "--engine",
    metavar="|".join(kinds.names()),
    shell_complete=_names(kinds.names),
    help="What compares and times the models, by default onnxruntime.",
)
@click.option(
    "--time",
    is_flag=True,
    help="Time both models and report the times; --budget latency always does.",
)
@click.option(
    "--threads",
    callback=values.count,
    default="0",
    metavar="N",
    help="Threads per operator while times are measured; by default the runtime chooses.",
)
@click.option(
    "--cache",
    type=click.Path(),
    callback=values.given_path,
    metavar="DIR",
    help="Keep results in DIR for other runs: spectra, statistics of activations, errors, measured times; "
    "by default in the user's cache folder, for models above 1 GiB, and times for all.",
)
@click.option("--no-cache", is_flag=True, help="Neither read nor write results of other runs.")
@click.option(
    "--memory",
    callback=values.number,
    metavar="GIB",
    help="Memory that calibration may take for statistics and activations, by default 2; less takes longer.",
)
@click.option(
    "--workers",
    callback=values.count,
    default="0",
    metavar="N",
    help="Compute layers in N processes; by default in threads of one process.",
)
@click.option(
    "--scheduler",
    metavar="tcp://HOST:PORT",
    help="Compute layers on the workers of a running Dask cluster.",
)
@click.option("--quiet", "-q", is_flag=True, help="Print errors only.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    is_eager=True,
    callback=_noted,
    help="For programs: write progress, warnings and errors to stderr, one JSON object a line.",
)
@click.option(
    "--verbose",
    "-v",
    count=True,
    is_eager=True,
    expose_value=False,
    callback=_verbose,
    help="Show the decisions of every stage with their reasons; -vv shows more, with times and modules.",
)
@click.option(
    "--completion",
    type=click.Choice(completion.SHELLS),
    is_eager=True,
    expose_value=False,
    callback=_script,
    help="Print the script that completes commands and options in a shell, and exit.",
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_printing(lambda _: f"onnx-lowrank, version {version('onnx-lowrank')}"),
    help="Show the version and exit.",
)
@click.help_option("-h", "--help", callback=_printing(lambda ctx: ctx.get_help()))
@click.pass_context
def command(
    ctx: click.Context,
    /,
    source: Path,
    out: Path | None,
    save_plan: Path | None,
    report: tuple[Path, ...],
    dry_run: bool,
    quiet: bool,
    as_json: bool,
    cache: Path | None,
    no_cache: bool,
    **options: Any,
) -> None:
    """Make IN.onnx smaller by low-rank decomposition and write it to OUT.onnx."""
    if ctx.args:
        more = ctx.args[0]
        if _NUMBER.fullmatch(more):
            raise click.UsageError(f"{more!r} is one argument too many: write it as --ratio {more}.")
        raise click.UsageError(
            f"{more!r} is one argument too many: name IN.onnx and OUT.onnx, all others are options."
        )
    if out is None and not dry_run:
        raise click.UsageError("OUT.onnx is missing: name the file to write, or pass --dry-run.")
    if no_cache and cache is not None:
        raise click.UsageError("--cache and --no-cache contradict each other: leave one of them out.")
    options["cache"] = not no_cache if cache is None else cache
    out = None if dry_run else out
    check_outputs(source, out, save_plan, report)
    with (
        displayed(ctx.obj["verbose"], quiet=quiet, as_json=as_json) as (console, progress),
        compress(source, dry_run=dry_run, progress=progress, **options) as result,
    ):
        write(result, out, save_plan, report, ctx.obj["command"])
        if not quiet and not as_json:
            result.report.table(console, every=ctx.obj["verbose"] > 0)
