"""Seconds, elapsed and of the processor, and peak memory of the whole command, with validation.

`python tests/benchmarks/bench_end_to_end.py [--all]`: ResNet-20 from ../shared and the digits model of this
repository; with --all, the full-size builders of models/zoo.py, too.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
MODELS = (
    (CHECKOUT.parent / "shared/models/resnet20_cifar10.onnx", 0.5),
    (CHECKOUT / "models/digits.onnx", 0.5),
)


def measure(model: Path, ratio: float, out: Path) -> tuple[float, float, int]:
    """Elapsed seconds, those of the processor, and the peak resident memory in MB, of one run."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", "onnx_lowrank", str(model), str(out), "--ratio", str(ratio), "--quiet"]
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{model} failed")
    elapsed = time.perf_counter() - begin
    return elapsed, usage.ru_utime + usage.ru_stime, usage.ru_maxrss // 1024


def main() -> None:
    """Print one line per model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="the zoo's full-size models too")
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores")
    print("| model | MB | seconds | of the processor | peak MB |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        models = [(path, ratio) for path, ratio in MODELS if path.exists()]
        if options.all:
            sys.path.insert(0, str(CHECKOUT / "models"))
            import zoo

            for name in zoo.NAMES:
                path = Path(folder) / f"{name}.onnx"
                path.write_bytes(zoo.build(name).SerializeToString())
                models.append((path, 0.6))
        for path, ratio in models:
            size = path.stat().st_size / 1e6
            seconds, processor, peak = measure(path, ratio, Path(folder) / "out.onnx")
            print(f"| {path.stem} | {size:.1f} | {seconds:.1f} | {processor:.1f} | {peak} |", flush=True)


if __name__ == "__main__":
    main()
