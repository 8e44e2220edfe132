"""The options of `compress`: their names, types, defaults and documentation, each in one place."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from numpy.typing import NDArray

from onnx_lowrank.core.plan import Plan
from onnx_lowrank.documents.recipes import Recipe
from onnx_lowrank.errors import InputError
from onnx_lowrank.progress import Progress

if TYPE_CHECKING:
    from onnx_lowrank.calibrate.data import Source

Inputs = str | Path | Mapping[str, NDArray[Any]]
"""An .npz file, a text, a folder of images, or arrays by input name."""


class Options(TypedDict, total=False):
    """The options of `compress`, all by keyword; each option that is left out has its default.

    Attributes:
        recipe: Name of a recipe, path of a TOML file, or a recipe; "auto" tries several and keeps the best
            on held-out calibration inputs. By default "auto" with calibration, else `DEFAULT_RECIPE`.
        budget: Name of the budget that the ratio bounds, a module of `onnx_lowrank.budgets`: "params" (the
            default), "macs", "latency" (time of a run on this machine) or "bytes" (size of the files).
        align: Consider only ranks that are multiples of this number. For convolutions, the number of channels
            of a slice must be a multiple of it, too. "auto" is the block of the provider, and the default for
            the budget "latency". By default, on the CPU provider, ranks and widths of two-dimensional float32
            convolutions suit ONNX Runtime's blocked layout, and those of other layers may be any number;
            1 allows any number everywhere.
        lowering: The operators of the factors: "conv" writes matrices as convolutions of size 1, "matmul"
            convolutions of size 1 as matrices, "group-free" no grouped convolutions; or several of these. By
            default, factors have the operators of their layers.
        target: A runtime or an accelerator of `targets.TARGETS`, which stands for `align`, `lowering` and
            `engine` where they are not given. By default none.
        then: Quantize the compressed model with ONNX Runtime's own tool, and fit the other factors and the
            biases to that before: "int8", "int4" or "fp16", a module of `onnx_lowrank.quantize`. By default
            None. The budget "bytes" counts the bytes after it.
        distil: Train the factors, and all other weights, together by gradients, without labels, so that the
            outputs and inner features of the compressed model follow the input model's on `calibration`; by
            default False. It needs PyTorch. A plan that was distilled is distilled again.
        minutes: The time of the distillation; None, the default, trains until the error on held-out inputs
            stops falling.
        synthetic: Distil without data: inputs made from the statistics of the input model's
            BatchNormalizations stand in for `calibration`; by default False.
        plan: A plan to replay, instead of ratio, recipe, budget, alignment, lowering and
            quantization.
        include: Globs of layer ids or node names; if there are any, only these layers are decomposed.
        exclude: Globs of layer ids or node names; these layers are left alone.
        calibration: Inputs to fit to, without labels: an .npz or .npy file, a folder of feeds or of images, a
            text, arrays by name, an iterable of feeds, or an ONNX Runtime CalibrationDataReader; see
            `calibrate.data.open_needed`.
        calibration_samples: Largest number of calibration samples to use; by default all.
        recover: If the recipe asks for it, fit each layer so that it corrects the errors of the layers before
            it; by default True.
        target_error: Instead of a ratio, find the smallest model whose outputs on held-out calibration
            inputs have at most this error, relative to their variation (`OutputError.centred`).
        target_agreement: Instead of a ratio, find the smallest model with at least this share of outputs that
            agree (of an embedding: rows that keep their nearest neighbour), above 0 and at most 1.
        inputs: An .npz file, a text, a folder of images, or arrays by input name, on which the models are
            compared; by default held-out calibration inputs, or without calibration, inputs made from the
            graph.
        check: Inputs of another kind, in the formats of `calibration`, on which the models are compared, too;
            the report shows both errors side by side.
        input_shape: Shapes by input name, for inputs whose dimensions the model leaves open; or several such
            mappings, if times count on several sets of shapes. Everything but times is for the first set.
        weights: The weight of each set of shapes in the times; by default all are equal.
        max_error: Bound on the largest relative error over the outputs; by default none.
        device: Where the linear algebra runs: "cpu", "cuda", or "auto" (the default), a GPU where it pays.
        provider: ONNX Runtime's execution provider for calibration, validation and timing; by default
            "CPUExecutionProvider".
        engine: What runs both models to compare them, and to time them: "onnxruntime" (the default) or
            "openvino". Calibration always runs on ONNX Runtime.
        time: Time the finished model against the input model; the budget "latency" always does. By default
            False.
        threads: Number of threads per operator while times are measured; 0, the default, leaves it to the
            runtime.
        cache: A folder that keeps results for other runs (spectra, statistics of activations, errors, times
            of layers), whatever the size of the model. True, the default, is the user's cache folder; it
            keeps times, and all else for models above 1 GiB alone. False keeps nothing.
        memory: GiB that calibration may take for its statistics and activations, beside the model; by default
            2. With less, it reads the inputs more often and keeps more in temporary files.
        workers: Number of processes that compute the work of the layers; 0, the default, uses threads of this
            process. With processes, a script must guard its call by `if __name__ == "__main__":`.
        scheduler: Address of the scheduler of a running Dask cluster, such as "tcp://10.0.0.1:8786", whose
            workers compute the work of the layers; None, the default, uses this machine alone.
        dry_run: Make the plan and the report only; the model stays as it is. By default False.
        tokenizer: The model's tokenizer.json, if `calibration`, `inputs` or `check` is a text.
        mean: The mean of each channel of images, whose values are scaled to 0..1; by default 0.
        std: The standard deviation of each channel of images; by default 1.
        progress: Where to show progress; None, the default, shows none.
    """

    recipe: str | Path | Recipe | None
    budget: str | None
    align: int | str | None
    lowering: str | Sequence[str] | None
    target: str | None
    then: str | None
    distil: bool
    minutes: float | None
    synthetic: bool
    plan: str | os.PathLike[str] | Plan | None
    include: str | Sequence[str]
    exclude: str | Sequence[str]
    calibration: Source | None
    calibration_samples: int | None
    recover: bool
    target_error: float | None
    target_agreement: float | None
    inputs: Inputs | None
    check: Source | None
    input_shape: Mapping[str, Sequence[int]] | Sequence[Mapping[str, Sequence[int]]] | None
    weights: Sequence[float] | None
    max_error: float | None
    device: str
    provider: str
    engine: str | None
    time: bool
    threads: int
    cache: bool | str | os.PathLike[str]
    memory: float | None
    workers: int
    scheduler: str | None
    dry_run: bool
    tokenizer: str | os.PathLike[str] | None
    mean: float | Sequence[float] | None
    std: float | Sequence[float] | None
    progress: Progress | None


DEFAULTS: Options = {
    "recipe": None,
    "budget": None,
    "align": None,
    "lowering": None,
    "target": None,
    "then": None,
    "distil": False,
    "minutes": None,
    "synthetic": False,
    "plan": None,
    "include": (),
    "exclude": (),
    "calibration": None,
    "calibration_samples": None,
    "recover": True,
    "target_error": None,
    "target_agreement": None,
    "inputs": None,
    "check": None,
    "input_shape": None,
    "weights": None,
    "max_error": None,
    "device": "auto",
    "provider": "CPUExecutionProvider",
    "engine": None,
    "time": False,
    "threads": 0,
    "cache": True,
    "memory": None,
    "workers": 0,
    "scheduler": None,
    "dry_run": False,
    "tokenizer": None,
    "mean": None,
    "std": None,
    "progress": None,
}


def completed(given: Options) -> Options:
    """The given options, and the defaults of all others.

    Raises:
        TypeError: An option does not exist; this is the error of a call with an unknown argument.
    """
    for name in given:
        if name not in DEFAULTS:
            alike = get_close_matches(name, ("model", "ratio", *DEFAULTS), n=1)
            hint = f"did you mean {alike[0]!r}?" if alike else "help(onnx_lowrank.Options) lists all."
            raise TypeError(f"compress() got an unexpected keyword argument {name!r}: {hint}")
    return {**DEFAULTS, **given}


def require(name: str, value: object, kinds: tuple[type, ...], wanted: str) -> None:
    """Check the type of an argument, which may come from Python unparsed.

    Raises:
        InputError: It has another type, or is an empty text.
    """
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise InputError(f"{name} is {str(value)[:60]!r} of type {type(value).__name__}: give {wanted}.")
    if isinstance(value, str) and not value:
        raise InputError(f"{name} is an empty text: give {wanted}.")


def flag(name: str, given: bool) -> bool:
    """Check an argument that is a flag.

    Raises:
        InputError: It is neither True nor False.
    """
    if not isinstance(given, bool):
        raise InputError(f"{name} is {repr(given)[:60]}: give True or False.")
    return given
