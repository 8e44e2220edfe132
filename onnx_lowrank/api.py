"""The public entry: compress() and its result."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

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
from onnx_lowrank.request import Inputs


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
        return self.model.proto

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the compressed model: two files if it exceeds 2 GB or has external data, else one.

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
    inputs: Inputs | None = None,
    input_shape: Mapping[str, Sequence[int]] | None = None,
    max_error: float | None = None,
    device: str = "auto",
    provider: str = "CPUExecutionProvider",
    time: bool = False,
    threads: int = 0,
    cache: bool = True,
    workers: int = 0,
    dry_run: bool = False,
    tokenizer: str | os.PathLike[str] | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    progress: Progress | None = None,
) -> Result:
    """Make a model smaller by low-rank decomposition.

    Args:
        model: A path or a model in memory; it is not changed.
        ratio: Largest cost of the compressed model over that of the input model, in the budget; above 0, at
            most 1.
        recipe: Name of a recipe, path of a TOML file, or a recipe; "auto" tries several and keeps the best
            on held-out calibration inputs. By default "auto" with calibration, else `DEFAULT_RECIPE`.
        budget: Name of the budget that the ratio bounds, a module of `onnx_lowrank.budgets`: "params" (the
            default), "macs", "latency" (time of a run on this machine) or "bytes" (size of the files).
        align: Consider only ranks that are multiples of this number. For convolutions, the number of channels
            of a slice must be a multiple of it, too. "auto" is the block of the provider. The default is 1,
            or "auto" for the budget "latency".
        plan: A plan to replay, instead of ratio, recipe, budget and alignment.
        include: Globs of layer ids or node names; if there are any, only these layers are decomposed.
        exclude: Globs of layer ids or node names; these layers are left alone.
        calibration: Inputs to fit to, without labels: an .npz or .npy file, a folder of feeds or of images, a
            text, arrays by name, an iterable of feeds, or an ONNX Runtime CalibrationDataReader; see
            `calibrate.data.open_needed`.
        calibration_samples: Largest number of calibration samples to use.
        recover: If the recipe asks for it, fit each layer so that it corrects the errors of the layers before
            it.
        target_error: Instead of a ratio, find the smallest model whose outputs on held-out calibration
            inputs have at most this error, relative to their variation (`OutputError.centred`).
        target_agreement: Instead of a ratio, find the smallest model with at least this share of outputs that
            agree (of an embedding: rows that keep their nearest neighbour), above 0 and at most 1.
        inputs: An .npz file, a text, a folder of images, or arrays by input name, on which the models are
            compared; by default held-out calibration inputs, or without calibration, inputs made from the
            graph.
        input_shape: Shapes by input name, for inputs whose dimensions the model leaves open.
        max_error: Bound on the largest relative error over the outputs.
        device: Where the linear algebra runs: "auto", "cpu" or "cuda".
        provider: ONNX Runtime's execution provider for calibration, validation and timing.
        time: Time the finished model against the input model; the budget "latency" always does.
        threads: Number of threads per operator while times are measured; 0 leaves it to the runtime.
        cache: Whether times of layers may be read from the user's cache folder and written there.
        workers: Number of processes that compute the work of the layers; 0 uses threads of this process. With
            processes, a script must guard its call of this function by `if __name__ == "__main__":`.
        dry_run: Make the plan and the report only; the model stays as it is.
        tokenizer: The model's tokenizer.json, if `calibration` or `inputs` is a text.
        mean: The mean of each channel of images, whose values are scaled to 0..1; by default 0.
        std: The standard deviation of each channel of images; by default 1.
        progress: Where to show progress; None shows none.

    Returns:
        The compressed model with its report and plan. If the model has external data, close the
        result, or use it in a `with` block.

    Raises:
        InputError: An argument, the calibration data or the model is wrong.
        BudgetError: The ratio cannot be reached.
        ValidationError: The compressed model does not behave like the input model.
    """
    # All arguments are checked before the work begins: a late error would waste minutes of work.
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
        tokenizer=tokenizer,
        mean=mean,
        std=std,
    )
    made = session.run(model, asked, setting, progress or Silent())
    return Result(made.report, made.plan, made.model, made.resources)
