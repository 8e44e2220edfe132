"""How ONNX Runtime runs the slices of a matrix (k > 1): `python tests/benchmarks/bench_slices.py`.

The time of a chain over that of the dense MatMul, medians of interleaved runs on one thread, for three
ways to apply k slices: a batched MatMul behind a transpose (what `graph/chains.py` writes), a grouped
1×1 Conv between two transposes, and a MatMul that broadcasts over rows.
"""

from __future__ import annotations

from time import perf_counter

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import numpy_helper, parser

# Rows, input channels, output features, slices, rank.
SHAPES = ((128, 768, 768, 2, 128), (128, 768, 768, 4, 64), (128, 768, 3072, 8, 32), (197, 768, 768, 16, 16))
BODIES = {
    "dense": "y = MatMul(x, dense)",
    "batched MatMul": "p = Reshape(x, split) q = Transpose<perm=[0,2,1,3]>(p) r = MatMul(q, encoder) "
    "t = Transpose<perm=[0,2,1,3]>(r) h = Reshape(t, join) y = MatMul(h, decoder)",
    "grouped Conv": "p = Transpose<perm=[0,2,1]>(x) q = Conv<group=K>(p, kernel) "
    "h = Transpose<perm=[0,2,1]>(q) y = MatMul(h, decoder)",
    "broadcast MatMul": "p = Reshape(x, rows) r = MatMul(p, encoder) h = Reshape(r, join) "
    "y = MatMul(h, decoder)",
}


def session(
    body: str, c: int, f: int, k: int, tensors: dict[str, NDArray[np.generic]]
) -> onnxruntime.InferenceSession:
    """A session on one thread for one of the bodies."""
    head = f'<ir_version: 8, opset_import: ["": 17]> g (float[1,N,{c}] x) => (float[1,N,{f}] y)'
    model = parser.parse_model(f"{head} {{ {body.replace('K', str(k))} }}")
    names = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in tensors.items() if n in names)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def main() -> None:
    """Print one line per shape."""
    print("| rows, c, f, k, j | " + " | ".join(list(BODIES)[1:]) + " |\n" + "| --- " * len(BODIES) + "|")
    for rows, c, f, k, j in SHAPES:
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
        x = rng.standard_normal((1, rows, c), np.float32)
        sessions = {name: session(body, c, f, k, tensors) for name, body in BODIES.items()}
        times: dict[str, list[float]] = {name: [] for name in BODIES}
        for _ in range(40):
            for name, one in sessions.items():
                begin = perf_counter()
                one.run(None, {"x": x})
                times[name].append(perf_counter() - begin)
        ratios = [np.median(times[name]) / np.median(times["dense"]) for name in list(BODIES)[1:]]
        print(f"| {rows}, {c}, {f}, {k}, {j} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")


if __name__ == "__main__":
    main()
