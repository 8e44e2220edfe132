"""The budget latency: its requirements, and its text in the report."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from onnx_lowrank.budgets.budget import Budget, Run, Tools
from onnx_lowrank.budgets.macs import model_macs
from onnx_lowrank.core.option import Lowering
from onnx_lowrank.engines.engine import RejectedError, UnsupportedError
from onnx_lowrank.errors import InputError
from onnx_lowrank.layers.found import Found
from onnx_lowrank.report.content import Total
from onnx_lowrank.report.words import time

if TYPE_CHECKING:
    from onnx_lowrank.budgets.latency.measured import Latency

_WARNED = 1.05


class LatencyBudget(Budget):
    """The time of a run, on this machine."""

    name = "latency"
    order = 2
    figure = "time"
    is_measured = True
    tolerance = 0.03  # the usual difference between two measurements of one time
    is_aligned = True
    narrows = True
    shares = frozenset((Lowering.SHARED,))

    def show(self, amount: int | None) -> str:
        """Write a number of nanoseconds."""
        return time(amount)

    def check(self, found: Found) -> None:
        """Check that times can be measured, which needs all shapes.

        Raises:
            InputError: Dimensions of inputs are open.
        """
        if found.open_inputs and model_macs(found) is None:
            raise InputError(
                "Times can be measured for known shapes only, and the inputs "
                f"{', '.join(found.open_inputs)} have open dimensions: pass them as "
                f"{found.shape_words}, or choose --budget params."
            )

    def on(self, found: Found, tools: Tools | None = None) -> Latency:
        """Measure a model and its layers.

        Raises:
            InputError: The model does not run.
        """
        # Every run imports this module for the budget's name; few measure.
        from onnx_lowrank.budgets.latency.measured import Latency
        from onnx_lowrank.budgets.latency.scene import scenes
        from onnx_lowrank.budgets.latency.whole import unmeasurable

        if tools is None or tools.stopwatch is None:
            raise RuntimeError("times are measured with a stopwatch")
        stopwatch = tools.stopwatch
        try:
            with tools.progress.stage("time the model"):
                return Latency(self, tuple(scenes(found, tools, stopwatch, self.check)), stopwatch)
        except (UnsupportedError, RejectedError) as error:
            raise unmeasurable(stopwatch, error, "choose --budget macs") from error

    def total(self, run: Run) -> Total | None:
        """The times of both models, measured, or predicted in a dry run; None if nothing was timed."""
        timing = run.timing
        if timing is None:
            return None
        return Total(timing.before, timing.predicted if timing.after is None else timing.after)

    def warnings(self, run: Run, total: Total) -> Iterator[str]:
        """Warnings about disturbed times and about a compressed model that is slower."""
        timing, is_counted = run.timing, run.plan.budget == self.name
        if timing is None or timing.ratio is None:
            return
        if not timing.is_steady:
            again = "plan" if is_counted else "time it"
            yield (
                f"The times of the input model differ by a factor of {timing.spread:.1f}: other work on this "
                f"machine disturbs the times, so {again} again when it is idle."
            )
        # An unchanged model is not slower than itself, even if two measurements of it differ.
        if timing.ratio > _WARNED and any(choice.option for choice in run.plan.choices):
            advice = (
                "its plan comes from a machine or a setting where it is faster"
                if is_counted
                else f"--budget {self.name} makes models that are faster"
            )
            yield (
                f"The compressed model takes {timing.ratio:.2f} times as long as the input model on "
                f"{timing.engine}: {advice}."
            )


BUDGET = LatencyBudget()
