"""The public entry: compress() and its result."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from numpy.typing import NDArray

from onnx_lowrank import request as arguments
from onnx_lowrank import session
from onnx_lowrank.calibrate.data import Source
from onnx_lowrank.core.plan import Plan
from onnx_lowrank.documents import plans
from onnx_lowrank.documents.recipes import Recipe
from onnx_lowrank.files.atomic import replacing
from onnx_lowrank.files.load import Model, ModelProto
from onnx_lowrank.files.save import save
from onnx_lowrank.progress import Progress, Silent
from onnx_lowrank.report.report import Report


@dataclass(frozen=True, slots=True)
class Result:
    """What came out.

    Attributes:
        report: Everything there is to say about it.
        plan: One choice for every layer.
        model: The compressed model; the input model where it was a dry run.
    """

    report: Report
    plan: Plan
    model: Model
    _resources: ExitStack

    @property
    def proto(self) -> ModelProto:
        """The compressed model's proto; its external data, if any, is on disk until `close`."""
        return self.model.proto

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the compressed model; over 2 GB or with external data it becomes two files.

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
        """Delete what a big model keeps on disk; after it, the model cannot be saved any more."""
        self._resources.close()

    def __enter__(self) -> Self:
        """Close the result when the block ends."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the result."""
        self.close()


def compress(
    model: str | os.PathLike[str] | ModelProto,
    ratio: float | None = None,
    *,
    recipe: str | Path | Recipe | None = None,
    budget: str | None = None,
    align: int | str | None = None,
    plan: str | os.PathLike[str] | Plan | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    calibration: Source | None = None,
    calibration_samples: int | None = None,
    recover: bool = True,
    target_error: float | None = None,
    target_agreement: float | None = None,
    inputs: str | Path | Mapping[str, NDArray[Any]] | None = None,
    input_shape: Mapping[str, Sequence[int]] | None = None,
    max_error: float | None = None,
    device: str = "auto",
    provider: str = "CPUExecutionProvider",
    time: bool = False,
    threads: int = 0,
    cache: bool = True,
    workers: int = 0,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Make a model smaller by low-rank decomposition.

    Args:
        model: A path or a model in memory; it is not changed.
        ratio: Budget of the output over that of the input, above 0 and at most 1.
        recipe: Name of a recipe, path of a TOML file, or a recipe; "auto" tries several and keeps the best
            on held-out calibration inputs. By default "auto" with calibration, else `DEFAULT_RECIPE`.
        budget: Name of the budget that the ratio bounds, a module of `onnx_lowrank.budgets`: "params" (the
            default), "macs", "latency", the time of a run on this machine, or "bytes", the size of the files.
        align: Consider only ranks that are multiples of this, and for convolutions only slices whose channels
            are; "auto" is what the provider computes in. By default any, and "auto" for latency.
        plan: A plan to replay, instead of ratio, recipe, budget and alignment.
        include: Globs of layer ids or node names; where there are any, only these are decomposed.
        exclude: Globs of layer ids or node names that are left alone.
        calibration: Inputs to fit to, without labels: an .npz or .npy file, a folder, arrays by name, an
            iterable of feeds, or an ONNX Runtime CalibrationDataReader; see `calibrate.data.open_samples`.
        calibration_samples: How many of them to use at most.
        recover: Let recipes that say so recover each layer from the errors of those before it.
        target_error: Instead of a ratio, find the smallest model whose outputs on held-out calibration
            inputs have at most this error, relative to what varies in them (`OutputError.centred`).
        target_agreement: The same for the share of outputs that agree (rows of an embedding: that keep their
            nearest neighbour), above 0 and at most 1.
        inputs: An .npz file, or arrays by input name, on which the models are compared; by default
            held-out calibration inputs, or inputs that are made from the graph.
        input_shape: Shapes by input name, where the model leaves dimensions open.
        max_error: Bound on the largest relative error over the outputs.
        device: Where the linear algebra runs: "auto", "cpu" or "cuda".
        provider: ONNX Runtime's execution provider, for calibration, for the comparison and for times.
        time: Time the finished model against the input model; a latency budget does so in any case.
        threads: How many threads compute one operator when times are measured; 0 leaves it to the runtime.
        cache: Whether times of layers may be read from the user's cache folder and written there.
        workers: How many processes compute what the layers need; 0 computes it in the threads of this one.
            With some, guard a script that calls this by `if __name__ == "__main__":`.
        dry_run: Make the plan and the report only; the model stays as it is.
        progress: Where to show progress; by default nowhere.

    Returns:
        The compressed model with its report and plan. Where the model has external data, close the
        result, or use it in a `with` block.

    Raises:
        InputError: An argument, the calibration data or the model is wrong.
        BudgetError: The ratio cannot be reached.
        ValidationError: The compressed model does not do what the input model does.
    """
    # All arguments are checked before the work: an error after minutes of it would waste them.
    calibrated = arguments.is_calibrated(calibration, calibration_samples, recover=recover)
    asked = arguments.request(
        ratio,
        recipe,
        budget,
        plan,
        arguments.target(target_error, target_agreement, calibrated=calibrated),
        align=align,
        provider=provider,
        calibrated=calibrated,
        recover=recover,
    )
    setting = arguments.setting(
        asked,
        calibration=calibration,
        samples=calibration_samples,
        inputs=inputs,
        shapes=input_shape or {},
        include=include,
        exclude=exclude,
        max_error=max_error,
        device=device,
        provider=provider,
        time=time,
        threads=threads,
        workers=workers,
        cache=cache,
        dry_run=dry_run,
    )
    made = session.run(model, asked, setting, progress or Silent())
    return Result(made.report, made.plan, made.model, made.resources)
