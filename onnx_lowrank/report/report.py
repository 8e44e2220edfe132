"""The report of a run: its content, and the two ways to show it."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console

from onnx_lowrank.report import as_json, terminal
from onnx_lowrank.report.content import Content


@dataclass(frozen=True, slots=True)
class Report(Content):
    """All results of a run, as a table and as JSON."""

    def table(self, console: Console | None = None, *, every: bool = False) -> None:
        """Print the report.

        Args:
            console: Where to print, by default stdout.
            every: Whether to list all kept layers and all outputs, too.
        """
        terminal.show(self, console or Console(), every=every)

    def to_json(self) -> str:
        """The whole report as JSON text; see `onnx_lowrank.documents.report_schema` for the keys."""
        return as_json.dumps(self)
