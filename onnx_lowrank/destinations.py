"""Writing of the model, the plan and the reports to files or to stdout."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from onnx_lowrank.api import Result
from onnx_lowrank.documents import plans
from onnx_lowrank.errors import InputError
from onnx_lowrank.files.atomic import check_writable, replacing
from onnx_lowrank.files.save import save

PAGE, NODES = ".html", ".nodes.json"
"""The ends of the names of reports that are a page, or data for Model Explorer."""

_STDOUT = Path("-")


def check_outputs(source: Path, out: Path | None, save_plan: Path | None, reports: Sequence[Path]) -> None:
    """Check before the work begins that its results can be written.

    Raises:
        InputError: A target is the input model or another target, or cannot be written.
    """
    for report in reports:
        check_report(report)
    if out is not None and out.is_file() and not source.exists():
        raise InputError(f"{source} does not exist, but {out} does: name the input model first.")
    targets = [target for target in (out, save_plan, *reports) if target is not None]
    for target in targets:
        if target == _STDOUT:
            continue
        check_writable(target)
        if target.exists() and source.exists() and target.samefile(source):
            raise InputError(f"{target} is the input model, which is never changed: name another file.")
    places = [target.resolve() for target in targets]
    for target, place in zip(targets, places, strict=True):
        if places.count(place) > 1:
            raise InputError(f"{target} is named for two outputs: give each its own name.")


def check_report(report: Path) -> None:
    """Check before the work begins that the libraries of a page are there, if the report is one.

    Raises:
        InputError: One is not installed.
    """
    if report.suffix == PAGE:
        from onnx_lowrank.report.web import render  # Most runs show no page.

        render.check_libraries()


def write(
    result: Result, out: Path | None, save_plan: Path | None, reports: Sequence[Path], command: str = ""
) -> None:
    """Write the model, the plan and the reports, each atomically; a plan or report named - goes to stdout.

    Cheap failures come first: stdout is written first, then the small files. These replace their targets with
    the model, so that they are all old or all new. A killed run may leave none of the small files beside the
    model, never those of another model.

    Args:
        result: The results.
        out: The place of the model; None for none, as for the others.
        save_plan: The place of the plan.
        reports: The places of reports: a page, data for Model Explorer or JSON, each by its suffix.
        command: The command that makes the model, for a page to show.

    Raises:
        InputError: One of them cannot be written.
    """
    texts: dict[Path, str] = {}
    if save_plan is not None:
        texts[save_plan] = plans.to_json(result.plan)
    for report in reports:
        texts[report] = _report(result, report, command)
    if (text := texts.pop(_STDOUT, None)) is not None:
        print_text(text)
    if out is not None:
        save(result.model, out, texts)
    elif texts:
        with replacing(*texts) as files:
            for file, text in zip(files, texts.values(), strict=True):
                file.write(text.encode())


def _report(result: Result, place: Path, command: str) -> str:
    """The report in the form that the name of its place asks for."""
    if place.suffix == PAGE:
        return result.report.to_html(command)
    return result.report.to_node_data() if place.name.endswith(NODES) else result.report.to_json()


def print_text(text: str) -> None:
    """Write text to stdout as UTF-8 and flush it; a reader that closes the pipe early is not an error.

    Raises:
        InputError: The text cannot be written.
    """
    if sys.stdout is None:
        raise InputError("The standard output is closed: redirect it to a file or a program.")
    try:
        sys.stdout.buffer.write(text.encode())
        sys.stdout.buffer.flush()
    except OSError as error:
        # Python flushes the rest of the buffer when the program ends, and this must not fail again.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
        if not isinstance(error, BrokenPipeError):
            reason = error.strerror or error
            raise InputError(
                f"The standard output cannot be written ({reason}): make room or redirect it."
            ) from error
