"""The report of a run: its content, and the ways to show it."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console

from onnx_lowrank.report import as_json, node_data, terminal
from onnx_lowrank.report.content import Content


@dataclass(frozen=True, slots=True)
class Report(Content):
    """All results of a run, as a table, as JSON, as a page and as data for Model Explorer."""

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

    def to_html(self, command: str = "") -> str:
        """The whole report as a page of one file, which opens without a network.

        Args:
            command: The command that makes the model, for the page to show.

        Raises:
            InputError: The extra `report` is not installed.
        """
        from onnx_lowrank.report.web import data, render  # Most runs show no page.

        return render.page(data.of_run(as_json.as_table(self), command))

    def to_node_data(self) -> str:
        """The errors of the rewritten layers as node data for Model Explorer, JSON text."""
        return node_data.dumps(self)
