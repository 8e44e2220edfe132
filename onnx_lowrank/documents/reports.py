"""Reading of the JSON reports that `--report FILE.json` writes."""

from __future__ import annotations

import os

from onnx_lowrank.documents import report_schema as schema
from onnx_lowrank.documents.strict import Document
from onnx_lowrank.errors import ReportError

_DOCUMENT = Document(
    "report", schema.Report, ReportError, "write it anew with --report", ("schema", schema.VERSION)
)


def read(path: str | os.PathLike[str]) -> schema.Report:
    """Read a report.

    Raises:
        ReportError: It cannot be read, is not JSON, or has a wrong key or value.
    """
    return _DOCUMENT.from_json(_DOCUMENT.text(path), path)
