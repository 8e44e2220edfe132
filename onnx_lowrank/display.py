"""The ways in which a command shows its progress on stderr: bars, lines of JSON, or nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from onnx_lowrank.logs import shown
from onnx_lowrank.progress import Lines, Progress, Silent, Terminal


@contextmanager
def displayed(verbosity: int, *, quiet: bool, as_json: bool) -> Iterator[tuple[Console, Progress]]:
    """Show records and progress during the block.

    Args:
        verbosity: How often -v was given.
        quiet: Whether to show errors only.
        as_json: Whether to write one JSON object a line.

    Yields:
        The console for tables, and the progress to report to.
    """
    console = Console(stderr=True)
    lines = Lines(sys.stderr) if as_json else None
    progress: Progress = Silent() if quiet else lines or Terminal(console)
    with shown(console, verbosity or -quiet, write=None if lines is None else lines.log):
        yield console, progress
