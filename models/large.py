"""A feed-forward network of any size, with its weights in one external data file.

    python models/large.py large.onnx --gib 6

The weights are made and written in blocks of rows, so the script takes little memory for any size. They are
seeded random numbers. In every fourth block their spectra decay to a small noise; in the others they hardly
decay. So a plan has a few layers to compress much. The model knows nothing: it serves to measure time and
memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from math import sqrt
from pathlib import Path
from typing import BinaryIO
from zlib import crc32

import numpy as np
from builder import Builder
from numpy.typing import NDArray
from onnx import TensorProto
from threadpoolctl import threadpool_limits

WIDTH = 2048
TIMES = 4  # the hidden features of a block over the width
VOCABULARY = 2  # the rows of the table over the width
PLANTED = 4  # one block of so many has planted spectra
NOISE = 0.02  # in root mean square, beside planted factors
_ROWS = 256
_PAGE = 65536


def write(path: Path, size: int, width: int = WIDTH, seed: int = 0) -> None:
    """Write a model and, beside it, its data file; the same arguments give the same bytes.

    Args:
        path: The .onnx file; the data file is called like it, with `.data` behind.
        size: Bytes of all weights, at least; blocks are added until they have so many.
        width: Features between two blocks; a multiple of 16.
        seed: Every tensor's numbers depend on it, and on the tensor's name.

    Raises:
        ValueError: The width is no positive multiple of 16.
    """
    if width < 16 or width % 16:
        raise ValueError(f"width is {width}: give a positive multiple of 16.")
    data = path.with_name(f"{path.name}.data")
    net = Builder("large", lambda vector: np.full(vector.shape, vector.mean))
    # One BLAS thread: sums in one order, so that the bytes do not depend on the machine's cores.
    with data.open("wb") as file, threadpool_limits(1, user_api="blas"):
        stored = _Stored(net, file, data.name, seed)
        tokens = net.input("input_ids", "batch", "sequence", integer=True)
        table = stored.matrix("embedding.weight", VOCABULARY * width, width, 1.0)
        x = net.node("Gather", [table, tokens], "embedding")
        block = 0
        while block == 0 or file.tell() < size - 4 * VOCABULARY * width**2:
            x = _block(net, stored, x, f"blocks.{block}", width, planted=block % PLANTED == 0)
            block += 1
        head = stored.matrix("head.weight", width, VOCABULARY * width, 1 / sqrt(width))
        net.node("MatMul", [x, head], "head", output="logits")
        net.output("logits", "batch", "sequence", VOCABULARY * width)
    path.write_bytes(net.model.SerializeToString(deterministic=True))


def _block(net: Builder, stored: _Stored, x: str, name: str, width: int, *, planted: bool) -> str:
    """A square layer and two layers through more features; each pair adds to the residual stream."""
    mix = stored.matrix(f"{name}.mix.weight", width, width, 1 / sqrt(width), planted=planted)
    up = stored.matrix(f"{name}.up.weight", width, TIMES * width, 1 / sqrt(width), planted=planted)
    down = stored.matrix(f"{name}.down.weight", TIMES * width, width, 1 / sqrt(width), planted=planted)
    y = net.layernorm(x, f"{name}.norm", width, epsilon=1e-5)
    y = net.node("Tanh", [net.node("MatMul", [y, mix], f"{name}.mix")], f"{name}.tanh")
    y = net.node("Relu", [net.node("MatMul", [y, up], f"{name}.up")], f"{name}.relu")
    y = net.node("MatMul", [y, down], f"{name}.down")
    return net.node("Add", [x, y], f"{name}.sum")


class _Stored:
    """Weights that go to a data file while they are made."""

    def __init__(self, net: Builder, file: BinaryIO, location: str, seed: int) -> None:
        self._net = net
        self._file = file
        self._location = location
        self._seed = seed

    def matrix(self, name: str, rows: int, cols: int, std: float, *, planted: bool = False) -> str:
        """Write a matrix, and append the initializer that refers to it."""
        offset = -(-self._file.tell() // _PAGE) * _PAGE
        self._file.write(bytes(offset - self._file.tell()))
        rng = np.random.default_rng([self._seed, crc32(name.encode())])
        parts = _planted(rng, rows, cols) if planted else _bulk(rng, rows, cols)
        for values in parts:
            self._file.write((values * np.float32(std)).tobytes())
        tensor = self._net.model.graph.initializer.add(name=name, dims=(rows, cols))
        tensor.data_type, tensor.data_location = TensorProto.FLOAT, TensorProto.EXTERNAL
        entries = {"location": self._location, "offset": offset, "length": self._file.tell() - offset}
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=str(value))
        return name


def _bulk(rng: np.random.Generator, rows: int, cols: int) -> Iterator[NDArray[np.float32]]:
    """Independent normal numbers, in blocks of rows."""
    for begin in range(0, rows, _ROWS):
        yield rng.standard_normal((min(_ROWS, rows - begin), cols), np.float32)


def _planted(rng: np.random.Generator, rows: int, cols: int) -> Iterator[NDArray[np.float32]]:
    """A product of thin factors whose singular values decay as 1 / √i, and noise, in blocks of rows."""
    rank = min(rows, cols) // 16
    decay = np.arange(1, rank + 1, dtype=np.float32) ** np.float32(-0.5)
    right = rng.standard_normal((rank, cols), np.float32) * (decay / np.linalg.norm(decay))[:, None]
    for begin in range(0, rows, _ROWS):
        count = min(_ROWS, rows - begin)
        noise = rng.standard_normal((count, cols), np.float32) * np.float32(NOISE)
        yield rng.standard_normal((count, rank), np.float32) @ right + noise


def main() -> None:
    """Write one model."""
    parser = argparse.ArgumentParser(description="Write a feed-forward network with external data.")
    parser.add_argument("output", type=Path, help="the .onnx file to write")
    parser.add_argument("--gib", type=float, default=6.0, help="GiB of all weights")
    parser.add_argument("--width", type=int, default=WIDTH, help="features between two blocks")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    write(asked.output, int(asked.gib * 2**30), asked.width, asked.seed)


if __name__ == "__main__":
    main()
