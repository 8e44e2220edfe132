"""The command that shows a saved plan: `onnx-lowrank explain PLAN.json`."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from onnx_lowrank.commands import compress
from onnx_lowrank.documents import plans
from onnx_lowrank.report import plan_table

_EPILOG = f"""\b
Examples:
  onnx-lowrank IN.onnx --ratio 0.5 --dry-run --save-plan plan.json
  onnx-lowrank explain plan.json

{compress.EXIT_CODES}"""


@click.command("explain", context_settings={"max_content_width": 100}, epilog=_EPILOG, add_help_option=False)
@click.argument("plan", metavar="PLAN.json", type=click.Path(path_type=Path))
def command(plan: Path) -> None:
    """Show the choices of a saved plan, and the reasons for the layers that it keeps."""
    known = plans.read(plan)
    plan_table.show(known, Console(), is_edited=plans.is_edited(known))


command.params += [param for param in compress.command.params if param.name == "help"]
