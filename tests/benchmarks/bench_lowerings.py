"""Times of equivalent chains in ONNX Runtime: `python tests/benchmarks/bench_lowerings.py [--threads N]`.

The time of a chain over the time of the layer, as medians of interleaved runs, for each way to write the same
chain. Slices of a matrix: a batched MatMul after a transpose, a grouped Conv between two transposes (both as
`operators/matrix.py` writes them), and a MatMul that broadcasts over rows. Convolutions with a kernel of size
1: as Conv and as MatMul, between poolings of size 1, which make the runtime store their tensors in blocks.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import numpy_helper, parser

from onnx_lowrank.budgets.latency.clock import Pace, interleaved

Tensors = Mapping[str, NDArray[np.generic]]

# Rows, input channels, output features, slices, rank.
MATRICES = (
    (128, 768, 768, 2, 128),
    (128, 768, 768, 4, 64),
    (128, 768, 3072, 8, 32),
    (128, 3072, 768, 16, 24),
    (197, 768, 768, 16, 16),
    (1, 4096, 4096, 4, 256),
    (1, 4096, 4096, 32, 32),
)
SLICED = {
    "dense": "y = MatMul(x, dense)",
    "batched MatMul": "p = Reshape(x, split) q = Transpose<perm=[0,2,1,3]>(p) r = MatMul(q, encoder) "
    "t = Transpose<perm=[0,2,1,3]>(r) h = Reshape(t, join) y = MatMul(h, decoder)",
    "grouped Conv": "p = Transpose<perm=[0,2,1]>(x) q = Conv<group=K>(p, kernel) "
    "h = Transpose<perm=[0,2,1]>(q) y = MatMul(h, decoder)",
    "broadcast MatMul": "p = Reshape(x, rows) r = MatMul(p, encoder) h = Reshape(r, join) "
    "y = MatMul(h, decoder)",
}

# Input channels, output features, height and width, rank.
CONVOLUTIONS = (
    (256, 1024, 14, 64),
    (1024, 256, 14, 64),
    (2048, 512, 7, 128),
    (64, 256, 56, 32),
    (96, 24, 56, 8),
    (160, 960, 7, 64),
    (60, 60, 14, 20),
)
POINTWISE = {
    "dense": "b = Conv(a, dense)",
    "Conv": "h = Conv(a, encoder) b = Conv(h, decoder)",
    "MatMul": "p = Reshape(a, flat) h = MatMul(rows, p) q = MatMul(columns, h) b = Reshape(q, image)",
}


def session(head: str, body: str, tensors: Tensors, threads: int) -> onnxruntime.InferenceSession:
    """A session for one of the bodies."""
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {head} {{ {body} }}')
    names = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in tensors.items() if n in names)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def ratios(
    head: str, bodies: Mapping[str, str], tensors: Tensors, shape: tuple[int, ...], threads: int
) -> str:
    """A table's cells: the times of the bodies over the first's."""
    feed = {"x": np.random.default_rng(1).standard_normal(shape, np.float32)}
    sessions = [session(head, body, tensors, threads) for body in bodies.values()]
    first, *others = interleaved([lambda s=s: s.run(None, feed) for s in sessions], Pace(3, 0.01))
    return " | ".join(f"{other / first:.2f}" for other in others)


def slices(case: tuple[int, ...], threads: int) -> str:
    """One line of the table of matrices."""
    rows, c, f, k, j = case
    rng = np.random.default_rng(0)
    tensors = {
        "dense": rng.standard_normal((c, f), np.float32),
        "encoder": rng.standard_normal((k, c // k, j), np.float32),
        "kernel": rng.standard_normal((k * j, c // k, 1), np.float32),
        "decoder": rng.standard_normal((k * j, f), np.float32),
        "split": np.array([0, 0, k, c // k]),
        "rows": np.array([0, 0, k, 1, c // k]),
        "join": np.array([0, 0, k * j]),
    }
    bodies = {name: body.replace("K", str(k)) for name, body in SLICED.items()}
    head = f"g (float[1,N,{c}] x) => (float[1,N,{f}] y)"
    return f"| {rows}, {c}, {f}, {k}, {j} | {ratios(head, bodies, tensors, (1, rows, c), threads)} |"


def pointwise(case: tuple[int, ...], threads: int) -> str:
    """One line of the table of convolutions."""
    c, f, size, j = case
    rng = np.random.default_rng(0)
    encoder, decoder = rng.standard_normal((j, c), np.float32), rng.standard_normal((f, j), np.float32)
    tensors = {
        "dense": rng.standard_normal((f, c, 1, 1), np.float32),
        "encoder": encoder.reshape(j, c, 1, 1),
        "decoder": decoder.reshape(f, j, 1, 1),
        "rows": encoder,
        "columns": decoder,
        "flat": np.array([0, 0, -1]),
        "image": np.array([0, f, size, size]),
    }
    pool = "MaxPool<kernel_shape=[1,1]>"
    bodies = {name: f"a = {pool}(x) {body} r = Relu(b) y = {pool}(r)" for name, body in POINTWISE.items()}
    head = f"g (float[1,{c},{size},{size}] x) => (float[1,{f},{size},{size}] y)"
    return f"| {c}, {f}, {size}, {j} | {ratios(head, bodies, tensors, (1, c, size, size), threads)} |"


def main() -> None:
    """Print one line per shape."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--threads", type=int, default=1)
    threads = options.parse_args().threads
    for title, bodies, line, cases in (
        ("rows, c, f, k, j", SLICED, slices, MATRICES),
        ("c, f, size, j", POINTWISE, pointwise, CONVOLUTIONS),
    ):
        print(f"| {title} | " + " | ".join(list(bodies)[1:]) + " |\n" + "| --- " * len(bodies) + "|")
        for case in cases:
            print(line(case, threads), flush=True)
        print()


if __name__ == "__main__":
    main()
