"""Networks in the shapes that people deploy, with seeded weights of decaying spectra.

    python models/zoo.py resnet50 resnet50.onnx

The weights come from nowhere else, so these models know nothing: they serve to measure time and size and
to test, not to measure accuracy. Architectures and parameter names follow torchvision, timm (the packed
qkv of vit_b_16) and Hugging Face transformers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from math import sqrt
from typing import Any
from zlib import crc32

import numpy as np
import onnx
from builder import HE_GAIN, Builder, Parameter, Weights
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

DTYPES = ("float32", "float16", "bfloat16", "float64")
IMAGE = 224
CLASSES = 1000
HEADS = 12
LAYERS = 12  # of both transformers
# The last convolution of a residual branch adds little, or activations would grow from block to block.
RESIDUAL_GAIN = 0.5


def build(
    name: str,
    seed: int = 0,
    dtype: str = "float32",
    *,
    scale: float = 1.0,
    batchnorm: bool = False,
) -> onnx.ModelProto:
    """Make a network with random weights; the same arguments give the same bytes.

    Args:
        name: One of NAMES.
        seed: Of the weights; every tensor's numbers depend on it and on the tensor's name only.
        dtype: One of DTYPES. bfloat16 models have opset 22, the others 17.
        scale: Factor on all channel counts, hidden sizes and the vocabulary, above 0 and at most 1. Depth,
            image size, sequence length and the number of heads and classes stay.
        batchnorm: Leave BatchNormalization as nodes, as training frameworks hold it; otherwise it is
            folded into the convolutions' biases, as most exporters leave it. Transformers have none.

    Raises:
        ValueError: One of the arguments is not among those.
    """
    dtype_of_draws = np.float64 if dtype == "float64" else np.float32
    # One BLAS thread: sums in one order, so that the bytes do not depend on the machine's cores.
    with threadpool_limits(1, user_api="blas"):
        return _assemble(name, decaying(seed, dtype_of_draws), dtype, scale, batchnorm)


def skeleton(name: str, *, scale: float = 1.0, batchnorm: bool = False) -> onnx.ModelProto:
    """The float32 network whose parameters have names and shapes but no data: made in no time.

    Raises:
        ValueError: As build().
    """
    return _assemble(name, lambda parameter: None, "float32", scale, batchnorm)


def decaying(seed: int, dtype: type[np.floating[Any]] = np.float32) -> Weights:
    """Weights whose every unfolding has a spectrum that decays, as trained ones have.

    A Gaussian core is mixed along each of its axes by a Gaussian basis whose rows decay as i^-a, a drawn
    per tensor and axis. An axis has at most half its size and 512 rows: the rest of the spectrum is a
    Gaussian bulk which holds a quarter of the energy. No SVD, no QR: one product per axis.

    Args:
        seed: Mixed with the tensor's name.
        dtype: In which numbers are drawn and multiplied.
    """
    bulk = 0.5  # in root mean square

    def weights(parameter: Parameter) -> NDArray[Any]:
        rng = np.random.default_rng([seed, crc32(parameter.name.encode())])
        sizes = [n for n in parameter.shape if n > 1]
        if len(sizes) < 2:
            values = rng.standard_normal(parameter.shape, dtype)
            return (values * parameter.std + parameter.mean).astype(dtype, copy=False)
        ranks = [min((n + 1) // 2, 512) if axis < 2 else n for axis, n in enumerate(sizes)]
        values = rng.standard_normal(ranks, dtype)
        for rank, n in zip(ranks, sizes, strict=True):
            decay = np.arange(1, rank + 1, dtype=dtype) ** dtype(-rng.uniform(0.05, 0.35))
            # Each product takes the first axis away and appends the mixed one, so they end in order.
            values = np.tensordot(values, rng.standard_normal((rank, n), dtype) * decay[:, None], axes=(0, 0))
        values *= dtype(parameter.std * sqrt((1 - bulk**2) * values.size) / np.linalg.norm(values))
        for row in values:  # row by row, since a second array of this size may not fit
            row += rng.standard_normal(row.shape, dtype) * dtype(parameter.std * bulk)
        return values.reshape(parameter.shape)

    return weights


def _assemble(name: str, weights: Weights, dtype: str, scale: float, batchnorm: bool) -> onnx.ModelProto:
    if name not in _NETWORKS:
        raise ValueError(f"There is no network {name!r}: name one of {', '.join(NAMES)}.")
    if dtype not in DTYPES:
        raise ValueError(f"There is no dtype {dtype!r}: name one of {', '.join(DTYPES)}.")
    if not 0 < scale <= 1:
        raise ValueError(f"scale is {scale}: give a number above 0 and at most 1.")
    net = Builder(name, weights, dtype=dtype, batchnorm=batchnorm)
    _NETWORKS[name](net, scale)
    return net.model


def _scaled(size: int, scale: float, step: int = 8) -> int:
    return max(1, round(size * scale / step)) * step


def _relu(net: Builder, x: str, name: str) -> str:
    return net.node("Relu", [x], name)


def _relu6(net: Builder, x: str, name: str) -> str:
    return net.node("Clip", [x, net.scalar(0.0), net.scalar(6.0)], name)


def _first_token(net: Builder, x: str, name: str) -> str:
    """N × width of N × sequence × width."""
    first = net.node("Slice", [x, net.integers(0), net.integers(1), net.integers(1)], name)
    return net.node("Flatten", [first], name, axis=1)


def _classify(net: Builder, x: str, name: str, channels: int) -> None:
    net.output(net.gemm(x, name, channels, CLASSES, output="logits"), "batch", CLASSES)


def _pool(net: Builder, x: str) -> str:
    return net.node("Flatten", [net.node("GlobalAveragePool", [x], "avgpool")], "flatten", axis=1)


def _image(net: Builder) -> str:
    return net.input("image", "batch", 3, IMAGE, IMAGE)


Block = Callable[[Builder, str, str, int, int, int], str]


def _resnet(net: Builder, scale: float, depths: tuple[int, ...], block: Block, expansion: int) -> None:
    """He et al. 2016, as torchvision builds it: the stride of a bottleneck is in its 3×3 convolution."""
    width = _scaled(64, scale)
    x = _relu(net, net.conv(_image(net), "conv1", 3, width, 7, stride=2, norm="bn1"), "relu")
    x = net.node("MaxPool", [x], "maxpool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    channels = width
    for stage, depth in enumerate(depths):
        middle = width * 2**stage
        features = middle * expansion
        for index in range(depth):
            name, stride = f"layer{stage + 1}.{index}", 2 if stage and not index else 1
            y = block(net, x, name, channels, middle, stride)
            if channels != features or stride > 1:
                down = f"{name}.downsample"
                x = net.conv(x, f"{down}.0", channels, features, stride=stride, norm=f"{down}.1", gain=1.0)
            x = _relu(net, net.node("Add", [y, x], name), name)
            channels = features
    _classify(net, _pool(net, x), "fc", channels)


def _basic_block(net: Builder, x: str, name: str, channels: int, features: int, stride: int) -> str:
    x = net.conv(x, f"{name}.conv1", channels, features, 3, stride=stride, norm=f"{name}.bn1")
    x = _relu(net, x, f"{name}.relu")
    return net.conv(x, f"{name}.conv2", features, features, 3, norm=f"{name}.bn2", gain=RESIDUAL_GAIN)


def _bottleneck(net: Builder, x: str, name: str, channels: int, middle: int, stride: int) -> str:
    x = _relu(net, net.conv(x, f"{name}.conv1", channels, middle, norm=f"{name}.bn1"), f"{name}.relu")
    x = net.conv(x, f"{name}.conv2", middle, middle, 3, stride=stride, norm=f"{name}.bn2")
    x = _relu(net, x, f"{name}.relu")
    return net.conv(x, f"{name}.conv3", middle, 4 * middle, norm=f"{name}.bn3", gain=RESIDUAL_GAIN)


def _mobilenet_v2(net: Builder, scale: float) -> None:
    """Sandler et al. 2018, table 2: expansion, features, repetitions and first stride of every stage."""
    stages = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
    channels = _scaled(32, scale)
    x = net.conv(_image(net), "features.0.0", 3, channels, 3, stride=2, norm="features.0.1")
    x = _relu6(net, x, "features.0")
    place = 0
    for expansion, size, count, first_stride in stages:
        features = _scaled(size, scale)
        for index in range(count):
            place += 1
            name, stride = f"features.{place}", 1 if index else first_stride
            y = _inverted_residual(net, x, f"{name}.conv", channels, features, expansion, stride)
            x = net.node("Add", [x, y], name) if index else y
            channels = features
    last = _scaled(1280, scale)
    x = net.conv(x, "features.18.0", channels, last, norm="features.18.1")
    _classify(net, _pool(net, _relu6(net, x, "features.18")), "classifier.1", last)


def _inverted_residual(
    net: Builder, x: str, name: str, channels: int, features: int, expansion: int, stride: int
) -> str:
    middle, step = channels * expansion, 0
    if expansion > 1:
        x = _relu6(net, net.conv(x, f"{name}.0.0", channels, middle, norm=f"{name}.0.1"), f"{name}.0")
        step = 1
    deep = f"{name}.{step}"
    x = net.conv(x, f"{deep}.0", middle, middle, 3, stride=stride, groups=middle, norm=f"{deep}.1")
    x = _relu6(net, x, deep)
    return net.conv(x, f"{name}.{step + 1}", middle, features, norm=f"{name}.{step + 2}", gain=1.0)


def _vgg16(net: Builder, scale: float) -> None:
    """Simonyan and Zisserman 2015, column D; parameters are named as in torchvision's vgg16_bn."""
    x, channels, place = _image(net), 3, 0
    for size, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            features = _scaled(size, scale)
            x = net.conv(x, f"features.{place}", channels, features, 3, norm=f"features.{place + 1}")
            place += 3  # convolution, BatchNormalization, ReLU
            x = _relu(net, x, f"features.{place - 1}")
            channels = features
        x = net.node("MaxPool", [x], f"features.{place}", kernel_shape=[2, 2], strides=[2, 2])
        place += 1
    x = net.node("Flatten", [x], "flatten", axis=1)
    inputs, hidden = channels * (IMAGE // 32) ** 2, _scaled(4096, scale)
    x = _relu(net, net.gemm(x, "classifier.0", inputs, hidden, gain=HE_GAIN), "classifier.1")
    x = _relu(net, net.gemm(x, "classifier.3", hidden, hidden, gain=HE_GAIN), "classifier.4")
    _classify(net, x, "classifier.6", hidden)


def _attention(net: Builder, query: str, key: str, value: str, name: str, width: int, mask: str = "") -> str:
    """Scaled dot-product attention of N × sequence × width inputs in HEADS heads.

    The mask is added to the scores before the softmax.
    """
    head = width // HEADS
    split = net.integers(0, 0, HEADS, head)

    def heads(x: str, perm: list[int]) -> str:
        return net.node("Transpose", [net.node("Reshape", [x, split], name)], name, perm=perm)

    scores = net.node("MatMul", [heads(query, [0, 2, 1, 3]), heads(key, [0, 2, 3, 1])], f"{name}/scores")
    scores = net.node("Div", [scores, net.scalar(sqrt(head))], name)
    if mask:
        scores = net.node("Add", [scores, mask], name)
    weights = net.node("Softmax", [scores], name, axis=-1)
    context = net.node("MatMul", [weights, heads(value, [0, 2, 1, 3])], name)
    context = net.node("Transpose", [context], f"{name}/merge", perm=[0, 2, 1, 3])
    return net.node("Reshape", [context, net.integers(0, 0, width)], f"{name}/merge")


def _vit_b_16(net: Builder, scale: float) -> None:
    """Dosovitskiy et al. 2021, table 1 (ViT-Base, patches of 16 × 16), with timm's packed qkv."""
    width, patch = HEADS * _scaled(64, scale), 16
    tokens = (IMAGE // patch) ** 2
    x = net.conv(_image(net), "patch_embed.proj", 3, width, patch, stride=patch, pad=0, gain=1.0)
    x = net.node("Reshape", [x, net.integers(0, width, tokens)], "patch_embed")
    x = net.node("Transpose", [x], "patch_embed", perm=[0, 2, 1])
    batch = net.node("Shape", ["image"], "cls_token", start=0, end=1)
    shape = net.node("Concat", [batch, net.integers(1, width)], "cls_token", axis=0)
    token = net.node("Expand", [net.parameter("cls_token", (1, 1, width), 0.02), shape], "cls_token")
    x = net.node("Concat", [token, x], "embeddings", axis=1)
    x = net.node("Add", [x, net.parameter("pos_embed", (1, tokens + 1, width), 0.02)], "pos_embed")
    thirds = net.integers(width, width, width)
    for index in range(LAYERS):
        name = f"blocks.{index}"
        y = net.layernorm(x, f"{name}.norm1", width, epsilon=1e-6)
        packed = net.linear(y, f"{name}.attn.qkv", width, 3 * width)
        query, key, value = net.nodes("Split", [packed, thirds], f"{name}.attn", [""] * 3, axis=-1)
        y = _attention(net, query, key, value, f"{name}.attn", width)
        x = net.node("Add", [x, net.linear(y, f"{name}.attn.proj", width, width)], f"{name}.attn")
        y = net.layernorm(x, f"{name}.norm2", width, epsilon=1e-6)
        y = net.gelu(net.linear(y, f"{name}.mlp.fc1", width, 4 * width), f"{name}.mlp.act")
        x = net.node("Add", [x, net.linear(y, f"{name}.mlp.fc2", 4 * width, width)], f"{name}.mlp")
    x = net.layernorm(x, "norm", width, epsilon=1e-6)
    _classify(net, _first_token(net, x, "head"), "head", width)


def _bert_base(net: Builder, scale: float) -> None:
    """Devlin et al. 2019, BERT-base uncased with its pooler, as transformers' BertModel is exported."""
    width = HEADS * _scaled(64, scale)
    x = _bert_embeddings(net, width, _scaled(30522, scale, step=2))
    mask = net.node("Unsqueeze", ["attention_mask", net.integers(1, 2)], "mask")
    mask = net.node("Cast", [mask], "mask", to=net.elements)
    mask = net.node("Sub", [net.scalar(1.0), mask], "mask")
    mask = net.node("Mul", [mask, net.scalar(-10000.0)], "mask")
    for index in range(LAYERS):
        name = f"encoder.layer.{index}"
        this = f"{name}.attention.self"
        query, key, value = (net.linear(x, f"{this}.{of}", width, width) for of in ("query", "key", "value"))
        y = _attention(net, query, key, value, this, width, mask)
        y = net.linear(y, f"{name}.attention.output.dense", width, width)
        x = net.node("Add", [y, x], f"{name}.attention.output")
        x = net.layernorm(x, f"{name}.attention.output.LayerNorm", width, epsilon=1e-12)
        y = net.gelu(net.linear(x, f"{name}.intermediate.dense", width, 4 * width), f"{name}.intermediate")
        y = net.linear(y, f"{name}.output.dense", 4 * width, width)
        x = net.node("Add", [y, x], f"{name}.output")
        output = "last_hidden_state" if index == LAYERS - 1 else ""
        x = net.layernorm(x, f"{name}.output.LayerNorm", width, epsilon=1e-12, output=output)
    net.output(x, "batch", "sequence", width)
    pooled = net.gemm(_first_token(net, x, "pooler"), "pooler.dense", width, width)
    net.output(net.node("Tanh", [pooled], "pooler", output="pooler_output"), "batch", width)


def _bert_embeddings(net: Builder, width: int, vocabulary: int) -> str:
    positions, token_types = 512, 2
    ids, _, types = (
        net.input(name, "batch", "sequence", integer=True)
        for name in ("input_ids", "attention_mask", "token_type_ids")
    )
    words = net.embedding(ids, "embeddings.word_embeddings", vocabulary, width)
    typed = net.embedding(types, "embeddings.token_type_embeddings", token_types, width)
    length = net.node("Shape", [ids], "embeddings", start=1, end=2)
    ids = net.integers(*range(positions), name="embeddings.position_ids")
    steps = net.node("Slice", [ids, net.integers(0), length], "embeddings")
    placed = net.embedding(steps, "embeddings.position_embeddings", positions, width)
    x = net.node("Add", [net.node("Add", [words, typed], "embeddings"), placed], "embeddings")
    return net.layernorm(x, "embeddings.LayerNorm", width, epsilon=1e-12)


_NETWORKS: Mapping[str, Callable[[Builder, float], None]] = {
    "resnet18": lambda net, scale: _resnet(net, scale, (2, 2, 2, 2), _basic_block, 1),
    "resnet50": lambda net, scale: _resnet(net, scale, (3, 4, 6, 3), _bottleneck, 4),
    "mobilenet_v2": _mobilenet_v2,
    "vgg16": _vgg16,
    "vit_b_16": _vit_b_16,
    "bert_base": _bert_base,
}
NAMES = tuple(_NETWORKS)


def main() -> None:
    """Write one network to a file."""
    parser = argparse.ArgumentParser(description="Write a network with seeded weights of decaying spectra.")
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("output", help="the .onnx file to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on all channel counts")
    parser.add_argument("--batchnorm", action="store_true", help="leave BatchNormalization unfolded")
    asked = vars(parser.parse_args())
    output = asked.pop("output")
    onnx.save(build(**asked), output)


if __name__ == "__main__":
    main()
