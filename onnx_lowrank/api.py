"""The public entry: compress() and its result."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self, Unpack

from onnx_lowrank import request as arguments
from onnx_lowrank import session
from onnx_lowrank.core.plan import Plan
from onnx_lowrank.documents import plans
from onnx_lowrank.files.atomic import replacing
from onnx_lowrank.files.load import Model, ModelProto, inlined
from onnx_lowrank.files.save import save
from onnx_lowrank.options import Options, completed
from onnx_lowrank.progress import Silent
from onnx_lowrank.report.report import Report


@dataclass(frozen=True, slots=True)
class Result:
    """The result of `compress`.

    Attributes:
        report: The report of the run.
        plan: One choice for every layer.
        model: The compressed model; the input model after a dry run.
    """

    report: Report
    plan: Plan
    model: Model
    _resources: ExitStack

    @property
    def proto(self) -> ModelProto:
        """The compressed model's proto; its external data, if any, is on disk until `close`."""
        return inlined(self.model).proto

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the compressed model: two files if it exceeds 1.5 GiB or has external data, else one.

        Raises:
            InputError: The target cannot be written.
        """
        save(self.model, path)

    def save_plan(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, to be edited and replayed with `compress(model, plan=path)`.

        Raises:
            InputError: The target cannot be written.
        """
        with replacing(Path(path)) as (file,):
            file.write(plans.to_json(self.plan).encode())

    def close(self) -> None:
        """Delete the files of a big model on disk; the model cannot be saved after that."""
        self._resources.close()

    def __enter__(self) -> Self:
        """Close the result when the block ends."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the result."""
        self.close()


def compress(
    model: str | os.PathLike[str] | ModelProto, ratio: float | None = None, **options: Unpack[Options]
) -> Result:
    """Make a model smaller by low-rank decomposition.

    Args:
        model: A path or a model in memory; it is not changed.
        ratio: Largest cost of the compressed model over that of the input model, in the budget; above 0, at
            most 1.
        options: All else, by keyword; `help(onnx_lowrank.Options)` documents every option and its default.

    Returns:
        The compressed model with its report and plan. If the model has external data or over 256 MiB, close
        the result, or use it in a `with` block.

    Raises:
        InputError: An argument, the calibration data or the model is wrong.
        BudgetError: The ratio cannot be reached.
        ValidationError: The compressed model does not behave like the input model.
        TypeError: There is no option of a given name.
    """
    # All arguments are checked before the work begins: a late error would waste minutes of work.
    given = completed(options)
    asked = arguments.request(ratio, given)
    setting = arguments.setting(asked, given)
    made = session.run(model, asked, setting, given["progress"] or Silent())
    return Result(made.report, made.plan, made.model, made.resources)
