"""What a user may try after a run, in a few lines."""

from __future__ import annotations

from collections.abc import Iterator

from onnx_lowrank.core.outcome import largest_error
from onnx_lowrank.report.content import Content

_MOST = 3
_NOTABLE = 0.1  # an error of an output


def next_steps(report: Content) -> list[str]:
    """The most useful things to try after a run, the best first."""
    return list(_all(report))[:_MOST]


def _all(report: Content) -> Iterator[str]:
    if report.validation is None:
        yield "without --dry-run, OUT.onnx is written, and its outputs are compared"
    if report.calibration is None:
        yield "--calibration DATA fits to your inputs: less error at the same ratio"
    if report.timing is None:
        yield "--time measures both models, --budget latency plans by measured times"
    if report.calibration is not None and report.validation is not None and _may_be_distilled(report):
        yield "--distil --minutes 15 trains all factors together, without labels: less error"
    if report.calibration is not None and report.validation is not None and report.validation.other is None:
        yield "--check DATA shows the errors on inputs of another kind"
    yield "onnx-lowrank sweep IN.onnx FOLDER puts many ratios side by side"


def _may_be_distilled(report: Content) -> bool:
    """Whether a distillation is worth its time: the outputs err notably, and none was made."""
    if report.validation is None or report.validation.distilled is not None:
        return False
    return (largest_error(report.validation.outputs) or 0.0) > _NOTABLE
