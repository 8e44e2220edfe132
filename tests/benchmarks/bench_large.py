"""Compress a model of any size: time and peak of memory, then the same run killed at random and resumed.

    python models/large.py g6.onnx --gib 6
    python tests/benchmarks/bench_large.py g6.onnx --kills 10

The first run is undisturbed, with a cache of its own. onnx's checker, onnx_ir and ONNX Runtime load its
model. Then runs with a second cache are killed (SIGKILL) after random times, and the last one completes. Its
files must be those of the first run, byte for byte; nothing else may be left beside them or in the temporary
folder. Prints JSON; the exit code is 1 if something differs. Needs Linux, and onnx-ir.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx

from onnx_lowrank.files.tensors import stored_size, tensors

_MIB = 2**20
_CHUNK = 2**24
_LOADERS = {
    "onnx": "import onnx, sys; onnx.checker.check_model(sys.argv[1], full_check=True)",
    "onnx_ir": "import onnx_ir, sys; [v.const_value.numpy().sum() for v in "
    "onnx_ir.load(sys.argv[1]).graph.initializers.values()]",
    "onnxruntime": "import onnxruntime, sys; onnxruntime.InferenceSession(sys.argv[1], "
    "providers=['CPUExecutionProvider'])",
}
"""Programs that load a model with its data."""


class Runs:
    """Runs of one command in a folder, each with the outputs in a folder of its own."""

    def __init__(self, model: Path, ratio: float, folder: Path) -> None:
        self._model = model.resolve()
        self._ratio = ratio
        self._folder = folder
        self.temporary = folder / "temporary"
        self.temporary.mkdir()

    def out(self, name: str) -> Path:
        """The folder of a run's outputs."""
        path = self._folder / name
        path.mkdir(exist_ok=True)
        return path

    def start(self, name: str, cache: str) -> subprocess.Popen[bytes]:
        """Start the command."""
        out = self.out(name)
        files = [out / "out.onnx", "--save-plan", out / "plan.json", "--report", out / "report.json"]
        options = ["--ratio", str(self._ratio), "--cache", self._folder / cache, "--quiet"]
        command = [sys.executable, "-m", "onnx_lowrank", self._model, *files, *options]
        environment = os.environ | {"TMPDIR": str(self.temporary)}
        return subprocess.Popen(list(map(str, command)), env=environment)

    def complete(self, name: str, cache: str) -> dict[str, Any]:
        """Run the command to its end; returns its time and its peak."""
        begin = time.monotonic()
        _, status, used = os.wait4(self.start(name, cache).pid, 0)
        if status:
            raise SystemExit(f"The run {name} ended with the status {status}.")
        seconds = {"wall": time.monotonic() - begin, "cpu": used.ru_utime + used.ru_stime}
        return {**{k: round(v, 1) for k, v in seconds.items()}, "peak_mib": round(used.ru_maxrss / 1024)}

    def killed(self, name: str, cache: str, after: float) -> str:
        """Kill the command after some seconds; returns "killed", or "complete" if it was faster."""
        process = self.start(name, cache)
        try:
            process.wait(after)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        return "killed" if process.returncode else "complete"


def digests(folder: Path) -> Mapping[str, str]:
    """The digest of every file in a folder, hidden ones included."""
    found = {}
    for path in sorted(folder.iterdir()):
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        found[path.name] = digest.hexdigest()
    return found


def size(model: Path) -> dict[str, Any]:
    """The bytes of a model's tensors, and the bound on memory that follows from the largest."""
    sizes = [stored_size(t) or 0 for t in tensors(onnx.load(model, load_external_data=False))]
    largest = max(sizes)
    bound = (2**30 + 12 * largest) / _MIB
    return {
        "mib": round(sum(sizes) / _MIB),
        "largest_mib": round(largest / _MIB, 1),
        "bound_mib": round(bound),
    }


def loaded(path: Path) -> dict[str, bool]:
    """Whether each library loads a model."""
    return {
        name: subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == 0
        for name, code in _LOADERS.items()
    }


def main() -> None:
    """Measure, and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--within", type=float, help="the longest time to a kill; by default the first run's")
    parser.add_argument("--seed", type=int, default=0, help="of the times")
    parser.add_argument("--folder", type=Path, help="the folder of all files; by default a temporary one")
    asked = parser.parse_args()
    rng = np.random.default_rng(asked.seed)
    with TemporaryDirectory(dir=asked.folder) as name:
        runs = Runs(asked.model, asked.ratio, Path(name))
        made: dict[str, Any] = {"model": size(asked.model), "undisturbed": runs.complete("whole", "one")}
        made["loaded"] = loaded(runs.out("whole") / "out.onnx")
        made["kills"] = []
        for _ in range(asked.kills):
            after = rng.uniform(0, asked.within or made["undisturbed"]["wall"])
            ended = runs.killed("resumed", "two", after)
            made["kills"].append({"after": round(after, 2), "ended": ended})
        made["resumed"] = runs.complete("resumed", "two")
        wanted, found = digests(runs.out("whole")), digests(runs.out("resumed"))
        made["identical"] = found == wanted
        # ONNX Runtime leaves a file of its own there.
        temporary = [path.name for path in runs.temporary.glob("*onnx-lowrank*")]
        made["left"] = sorted(found.keys() - wanted.keys()) + temporary
    print(json.dumps(made, indent=2))
    sound = made["identical"] and not made["left"] and all(made["loaded"].values())
    sys.exit(0 if sound else 1)


if __name__ == "__main__":
    main()
