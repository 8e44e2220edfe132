"""Quality of a compressed model: accuracy or agreement, for real models beside the checkout and our own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

CHECKOUT = Path(__file__).parents[2]
SHARED = CHECKOUT.parent / "shared"
sys.path.insert(0, str(CHECKOUT / "models"))

import evaluate_digits  # noqa: E402
import zoo  # noqa: E402

Outputs = list[NDArray[np.float32]]

DIGITS = str(CHECKOUT / "models/digits.onnx")
REAL = ("resnet20", "magika", "ultraface", "digits")
_ZOO_SUFFIX = " (zoo)"
ZOO = ("resnet18", "mobilenet_v2", "vit_b_16", "bert_base")
EVEN, ODD = slice(0, None, 2), slice(1, None, 2)  # UltraFace's images: to calibrate on, to score on


@dataclass(frozen=True, slots=True)
class Task:
    """A model and its score.

    Attributes:
        name: The model.
        score: The name of the score, for the head of a table.
        model: Gives the input model.
        measure: Gives the score of a compressed model; higher is better.
        shape: Input shapes that make its MACs known.
    """

    name: str
    score: str
    model: Callable[[], str | ModelProto]
    measure: Callable[[ModelProto], float]
    shape: Mapping[str, tuple[int, ...]]


def run(model: ModelProto | str, feeds: Mapping[str, NDArray[np.generic]]) -> Outputs:
    """Outputs of a model on ONNX Runtime's CPU provider."""
    return open_session(model).run(None, dict(feeds))


def open_session(model: ModelProto | str) -> onnxruntime.InferenceSession:
    """A session on ONNX Runtime's CPU provider."""
    source = model if isinstance(model, str) else model.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def cifar_inputs(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """CIFAR-10 pixels as ResNet-20 was trained on them."""
    mean = np.array([0.485, 0.456, 0.406])[:, None, None]
    std = np.array([0.229, 0.224, 0.225])[:, None, None]
    return ((images / 255 - mean) / std).astype(np.float32)


def _digits(model: ModelProto) -> float:
    return evaluate_digits.top1(model.SerializeToString())


def _resnet20(model: ModelProto) -> float:
    data = np.load(SHARED / "data/cifar10_subset.npz")
    logits = run(model, {"input": cifar_inputs(data["test_images"])})[0]
    return float(np.mean(logits.argmax(1) == data["test_labels"]))


def _magika(model: ModelProto) -> float:
    data = np.load(SHARED / "data/magika_files.npz")
    scores = run(model, {"bytes": data["test_bytes"].astype(np.int32)})[0]
    return float(np.mean(scores.argmax(1) == data["test_labels"]))


@cache
def _magika_files() -> tuple[dict[str, NDArray[np.generic]], NDArray[np.intp]]:
    """Other files than those of the test, and what the original takes them for."""
    feeds = {"bytes": np.load(SHARED / "data/magika_files.npz")["calibration_bytes"][::4].astype(np.int32)}
    return feeds, run(str(SHARED / "models/magika_v3_3.onnx"), feeds)[0].argmax(1)


def _magika_agreement(model: ModelProto) -> float:
    feeds, original = _magika_files()
    return float(np.mean(run(model, feeds)[0].argmax(1) == original))


def _faces(model: ModelProto, images: slice = slice(None)) -> float:
    """Share of the original's boxes (score > 0.7) that the model also finds, with IoU > 0.5."""
    found = total = 0
    for wanted, given in zip(_wanted_faces()[images], _all_boxes(model, images), strict=True):
        total += len(wanted)
        found += sum(bool(len(given)) and float(_iou(box, given).max()) > 0.5 for box in wanted)
    return found / total


@cache
def _wanted_faces() -> list[NDArray[np.float32]]:
    return _all_boxes(str(SHARED / "models/ultraface_rfb320.onnx"))


def _face_images() -> NDArray[np.float32]:
    return (np.load(SHARED / "data/faces_320x240.npz")["images"].astype(np.float32) - 127) / 128


def _all_boxes(model: ModelProto | str, images: slice = slice(None)) -> list[NDArray[np.float32]]:
    session = open_session(model)
    return [_boxes(session.run(None, {"input": image[None]})) for image in _face_images()[images]]


def _boxes(outputs: Outputs) -> NDArray[np.float32]:
    """The distinct faces: boxes above the threshold after greedy non-maximum suppression."""
    scores, boxes = outputs[0][0, :, 1], outputs[1][0]
    kept: list[NDArray[np.float32]] = []
    for index in np.argsort(-scores):
        if scores[index] <= 0.7:
            break
        if not kept or _iou(boxes[index], np.array(kept)).max() < 0.3:
            kept.append(boxes[index])
    return np.array(kept)


def _iou(box: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float32]:
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    common = np.prod(np.clip(high - low, 0, None), axis=1)
    return common / (np.prod(box[2:] - box[:2]) + np.prod(others[:, 2:] - others[:, :2], axis=1) - common)


def _zoo(name: str, scale: float) -> Task:
    """A zoo model at random inputs: 1 − relative error of what tells different inputs apart."""
    model = zoo.build(name, scale=scale)
    feeds = _zoo_inputs(model, 0, 16)
    original = run(model, feeds)[0].astype(np.float64)
    spread = np.linalg.norm(original - original.mean(0))

    def measure(compressed: ModelProto) -> float:
        difference = run(compressed, feeds)[0] - original
        return 1 - float(np.linalg.norm(difference - difference.mean(0)) / spread)

    return Task(
        name + _ZOO_SUFFIX, "1 − error", lambda: model, measure, {k: v.shape for k, v in feeds.items()}
    )


def _zoo_inputs(model: ModelProto, seed: int, number: int) -> dict[str, NDArray[np.generic]]:
    """Random inputs of a zoo model, so many samples of sequences of 32 where the model leaves that open."""
    rng = np.random.default_rng(seed)
    feeds: dict[str, NDArray[np.generic]] = {}
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        sizes = [dim.dim_value or (number if axis == 0 else 32) for axis, dim in enumerate(dims)]
        if value.name == "input_ids":
            feeds[value.name] = rng.integers(0, 100, sizes)
        elif value.type.tensor_type.elem_type == TensorProto.INT64:
            feeds[value.name] = np.full(sizes, int("mask" in value.name))
        else:
            feeds[value.name] = rng.standard_normal(sizes, np.float32)
    return feeds


def tasks(names: tuple[str, ...] = ()) -> list[Task]:
    """Everything that can be measured here: without ../shared only this project's own models.

    Args:
        names: Which models; by default all.
    """
    found = []
    if SHARED.is_dir():
        resnet20, magika, ultraface = (
            str(SHARED / "models" / f"{name}.onnx")
            for name in ("resnet20_cifar10", "magika_v3_3", "ultraface_rfb320")
        )
        found += [
            Task("resnet20", "top-1", lambda: resnet20, _resnet20, {"input": (1, 3, 32, 32)}),
            Task("magika", "top-1", lambda: magika, _magika, {"bytes": (1, 2048)}),
            Task("magika", "agreement", lambda: magika, _magika_agreement, {"bytes": (1, 2048)}),
            Task("ultraface", "faces found", lambda: ultraface, _faces, {}),
        ]
    found.append(Task("digits", "top-1", lambda: DIGITS, _digits, {"image": (1, 1, 8, 8)}))
    wanted = [task for task in found if not names or task.name in names]
    return wanted + [_zoo(name, 0.25) for name in ZOO if not names or name in names]


def calibrated_tasks(names: tuple[str, ...]) -> list[Task]:
    """The scores of models: those of `tasks`, and UltraFace's on what `calibration` leaves out.

    Args:
        names: Which of `REAL` and `ZOO`.
    """
    found = []
    for task in tasks(names):
        found.append(task)
        if task.name == "ultraface":
            odd = partial(_faces, images=ODD)
            found.append(replace(task, score="faces found, odd images", measure=odd))
    return found


def calibration(name: str) -> dict[str, NDArray[np.generic]]:
    """Unlabelled inputs of a task's model that it is not scored on.

    UltraFace has 24 images in all: these are the even ones, so that only its score on the odd ones is clean.
    """
    match name:
        case "resnet20":
            return {"input": cifar_inputs(np.load(SHARED / "data/cifar10_subset.npz")["calibration_images"])}
        case "magika":
            files = np.load(SHARED / "data/magika_files.npz")["calibration_bytes"].astype(np.int32)
            scored = {file.tobytes() for file in files[::4]}  # by the agreement; some files are there twice
            return {"bytes": np.array([file for file in files if file.tobytes() not in scored])}
        case "ultraface":
            return {"input": _face_images()[EVEN]}
        case "digits":
            return {"image": evaluate_digits.load().train_images}
    (task,) = tasks((name.removesuffix(_ZOO_SUFFIX),))
    model = task.model()
    assert isinstance(model, ModelProto)
    return _zoo_inputs(model, 1, 256)
