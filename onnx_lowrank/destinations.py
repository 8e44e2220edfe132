"""Where results go: the model, the plan and the report, into files or to stdout."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onnx_lowrank.api import Result
from onnx_lowrank.documents import plans
from onnx_lowrank.errors import InputError
from onnx_lowrank.files.atomic import check_writable, replacing

_STDOUT = Path("-")


def check_outputs(source: Path, out: Path | None, save_plan: Path | None, report: Path | None) -> None:
    """Say before the work begins what would keep its results from being written.

    Raises:
        InputError: A target is the input model or another target, or cannot be written.
    """
    targets = [target for target in (out, save_plan, report) if target is not None]
    for target in targets:
        if target == _STDOUT:
            continue
        check_writable(target)
        if target.exists() and source.exists() and target.samefile(source):
            raise InputError(f"{target} is the input model, which is never changed: name another file.")
    if len({target.resolve() for target in targets}) < len(targets):
        raise InputError("Two of the output files are the same: give each its own name.")


def write(result: Result, out: Path | None, save_plan: Path | None, report: Path | None) -> None:
    """Write the model, the plan and the report, each atomically; a plan or report named - goes to stdout.

    What can fail at least cost comes first: stdout, then the small files, which take their places only
    after the model has.

    Raises:
        InputError: One of them cannot be written.
    """
    texts: dict[Path, str] = {}
    if save_plan is not None:
        texts[save_plan] = plans.to_json(result.plan)
    if report is not None:
        texts[report] = result.report.to_json()
    if (text := texts.pop(_STDOUT, None)) is not None:
        print_text(text)
    with _written(texts):
        if out is not None:
            result.save(out)


def print_text(text: str) -> None:
    """Write text to stdout as UTF-8 and see that it arrives; a reader who stops early is no error.

    Raises:
        InputError: It cannot be written.
    """
    if sys.stdout is None:
        raise InputError("The standard output is closed: send it somewhere.")
    try:
        sys.stdout.buffer.write(text.encode())
        sys.stdout.buffer.flush()
    except OSError as error:
        # The rest of the buffer must not fail again when the program ends.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
        if not isinstance(error, BrokenPipeError):
            reason = error.strerror or error
            raise InputError(
                f"The standard output cannot be written ({reason}): make room or send it elsewhere."
            ) from error


@contextmanager
def _written(texts: dict[Path, str]) -> Iterator[None]:
    """Texts that lie beside their targets during the block, and take their places if it ends well."""
    if not texts:
        yield
        return
    with replacing(*texts) as files:
        for file, text in zip(files, texts.values(), strict=True):
            file.write(text.encode())
            file.flush()
        yield
