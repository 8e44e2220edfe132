# /// script
# dependencies = ["numpy", "onnxruntime", "scikit-learn"]
# ///
"""Prints the top-1 accuracy of any digit classifier in ONNX on the test images of models/digits.onnx.

    python models/evaluate_digits.py small.onnx

The images are scikit-learn's digits: nothing is downloaded.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


@dataclass(frozen=True, slots=True)
class Split:
    """Images of N × 1 × 8 × 8 in [0, 1], float32, and their labels from 0 to 9, int64."""

    train_images: NDArray[np.float32]
    test_images: NDArray[np.float32]
    train_labels: NDArray[np.int64]
    test_labels: NDArray[np.int64]


def load() -> Split:
    """The 1,797 digits; a third of them, the same in every run and of every class alike, is for the test."""
    pixels, labels = load_digits(return_X_y=True)
    images = (pixels / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    return Split(
        *train_test_split(images, labels.astype(np.int64), test_size=1 / 3, random_state=0, stratify=labels)
    )


def top1(model: str | bytes) -> float:
    """The share of the test images that a model, a path or its serialized bytes, classifies rightly."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    data = load()
    logits, *_ = session.run(None, {session.get_inputs()[0].name: data.test_images})
    return float((logits.argmax(axis=1) == data.test_labels).mean())


def main() -> None:
    """Print the accuracy of the models that the command line names."""
    parser = argparse.ArgumentParser(description="Top-1 accuracy on the test third of scikit-learn's digits.")
    parser.add_argument("models", nargs="+", metavar="model.onnx")
    for path in parser.parse_args().models:
        print(f"{path}: {top1(path):.4f}")


if __name__ == "__main__":
    main()
