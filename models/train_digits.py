# /// script
# dependencies = ["numpy", "onnx", "onnxruntime", "scikit-learn", "torch==2.13.0"]
# ///
"""Trains the classifier of models/digits.onnx on scikit-learn's digits and writes it.

    python models/train_digits.py models/digits.onnx

Takes about a minute on one core. The same versions on one CPU type give the same bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import evaluate_digits
import numpy as np
import onnx
import torch
from builder import Builder, Parameter
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

SEED = 0
EPOCHS = 60
BATCH = 64
STAGES = ((32, 1), (64, 2), (64, 1))  # features and stride of each residual block
STEM = 32


class Block(nn.Module):
    """Two 3×3 convolutions with BatchNormalization around a shortcut."""

    def __init__(self, channels: int, features: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, features, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(features)
        self.conv2 = nn.Conv2d(features, features, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(features)
        self.downsample = nn.Sequential()
        if channels != features:
            shortcut = nn.Conv2d(channels, features, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(features))

    def forward(self, x: Tensor) -> Tensor:
        """N × features, at the input's resolution over the stride."""
        y = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(y)) + self.downsample(x)).relu()


class Network(nn.Module):
    """A small residual network; export() writes the same nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, STEM, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM)
        widths = [STEM, *(features for features, _ in STAGES)]
        self.blocks = nn.Sequential(
            *(Block(width, *stage) for width, stage in zip(widths, STAGES, strict=False))
        )
        self.fc = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of N × 10 from images of N × 1 × 8 × 8."""
        x = self.blocks(self.bn1(self.conv1(x)).relu())
        return self.fc(x.mean((2, 3)))


def train(images: Tensor, labels: Tensor) -> Network:
    """Train by SGD with a cosine schedule and weight decay on randomly shifted images."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # with more, sums depend on how many there are
    torch.use_deterministic_algorithms(True)
    network = Network()
    optimizer = torch.optim.SGD(network.parameters(), 0.1, 0.9, weight_decay=2e-3, nesterov=True)
    steps = EPOCHS * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(EPOCHS):
        for batch in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            loss = cross_entropy(network(_shift(images[batch])), labels[batch])
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}/{EPOCHS}: loss {loss.item():.4f}", flush=True)
    return network.eval()


def _shift(images: Tensor) -> Tensor:
    """Move every image by at most one pixel along each axis."""
    windows = pad(images, (1, 1, 1, 1)).unfold(2, 8, 1).unfold(3, 8, 1)[:, 0]
    rows, cols = torch.randint(3, (2, len(images)))
    return windows[torch.arange(len(images)), rows, cols][:, None]


def export(network: Network) -> onnx.ModelProto:
    """Write the trained network with its BatchNormalization as nodes of their own."""
    state = network.state_dict()

    def weights(parameter: Parameter) -> NDArray[np.float32]:
        return state[parameter.name].numpy()

    net = Builder("digits", weights)
    x = net.input("image", "batch", 1, 8, 8)
    x = net.node("Relu", [net.conv(x, "conv1", 1, STEM, 3, norm="bn1")], "relu")
    channels = STEM
    for index, (features, stride) in enumerate(STAGES):
        name = f"blocks.{index}"
        y = net.conv(x, f"{name}.conv1", channels, features, 3, stride=stride, norm=f"{name}.bn1")
        y = net.conv(net.node("Relu", [y], name), f"{name}.conv2", features, features, 3, norm=f"{name}.bn2")
        if channels != features:
            down = f"{name}.downsample"
            x = net.conv(x, f"{down}.0", channels, features, stride=stride, norm=f"{down}.1")
        x = net.node("Relu", [net.node("Add", [y, x], name)], name)
        channels = features
    x = net.node("Flatten", [net.node("GlobalAveragePool", [x], "avgpool")], "flatten", axis=1)
    net.output(net.gemm(x, "fc", channels, 10, output="logits"), "batch", 10)
    return net.model


def describe(model: onnx.ModelProto) -> None:
    """Measure the model as it will be saved and put the result into its metadata."""
    accuracy = evaluate_digits.top1(model.SerializeToString())
    model.doc_string = "Classifier of 8×8 handwritten digits: image in [0, 1], N×1×8×8, to logits, N×10."
    facts = {
        "license": "Apache-2.0",
        "script": "models/train_digits.py",
        "seed": str(SEED),
        "test_accuracy": f"{accuracy:.4f}",
        "training_data": "scikit-learn's digits, two thirds of them (UCI ML repository, CC BY 4.0)",
    }
    onnx.helper.set_model_props(model, facts)
    print(f"test accuracy {accuracy:.4f}")


def main() -> None:
    """Train, measure and write."""
    parser = argparse.ArgumentParser(description="Train the classifier of scikit-learn's digits.")
    parser.add_argument("output", type=Path, help="the .onnx file to write")
    output = parser.parse_args().output
    data = evaluate_digits.load()
    network = train(torch.from_numpy(data.train_images), torch.from_numpy(data.train_labels))
    model = export(network)
    describe(model)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, output)


if __name__ == "__main__":
    main()
