"""A scorer for `onnx-lowrank sweep --evaluate evaluate_cifar:top1`: ResNet-20's accuracy on test images."""

from __future__ import annotations

import onnx
from scores import tasks


def top1(path: str) -> float:
    """The share of CIFAR-10 test images that a model classifies as labelled.

    Args:
        path: The model.
    """
    (resnet20,) = tasks(("resnet20",))
    return resnet20.measure(onnx.load(path))
