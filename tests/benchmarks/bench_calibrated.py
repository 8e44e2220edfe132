"""The benefit of calibration: scores, seconds and peak memory over models, recipes and ratios.

    python tests/benchmarks/bench_calibrated.py [--models …] [--recipes …] [--ratios …] [--samples N]

Every cell is one run of the command in its own process, so its seconds and its memory are those of a user's
run, with validation. The calibration inputs are those of `scores.calibration`, without labels; recipes that
use only weights get none. Models from ../shared take part if that folder exists. The zoo, whose weights are
random, contributes BERT at a quarter of its width.

The cells go into a JSON file one by one, each with its environment: package versions, CPU and the digest of
the program. An interrupted run continues when it is started again. Cells from another environment are
measured again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from itertools import groupby, product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from bench_spectra import cpu_model
from scores import CHECKOUT, REAL, ZOO, Task, calibrated_tasks, calibration

from onnx_lowrank.documents import recipes as shipped
from onnx_lowrank.request import AUTO_RECIPE

MODELS = (*REAL, "bert_base")
RECIPES = ("schatten", "pca", "activation", "output", AUTO_RECIPE)
RATIOS = (0.8, 0.65, 0.5, 0.35, 0.25, 0.2)
RESULTS = Path(__file__).parent / "results" / "calibrated.json"
PACKAGES = ("numpy", "onnx", "onnx-graphsurgeon", "onnxruntime", "scipy")
SOURCES = ("onnx_lowrank/**/*.py", "passes/*.toml", "models/digits.onnx", "tests/benchmarks/scores.py")
ASKED = ("model", "recipe", "ratio", "samples")
ORIGINAL = "original"
UNREACHABLE = 3  # the command's exit code

# A process starts with the peak memory of the one that starts it, so a bare interpreter has to: this one.
LAUNCHER = """
import json, os, subprocess, sys, time
begin = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
seconds, cpu = time.perf_counter() - begin, usage.ru_utime + usage.ru_stime
code = os.waitstatus_to_exitcode(status)
print(json.dumps({"code": code, "seconds": seconds, "cpu_seconds": cpu, "peak_mb": usage.ru_maxrss / 1024}))
"""

Cell = dict[str, Any]


def environment(sources: Sequence[str] = SOURCES, packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Everything that changes a cell's figures, except the options."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in sources for path in CHECKOUT.glob(pattern)):
        digest.update(f"{path.relative_to(CHECKOUT).as_posix()}\n".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return {
        "program": digest.hexdigest()[:16],
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


class Results:
    """The cells measured so far, in a JSON file that is whole at any time.

    Args:
        path: The file.
        asked: Names of the entries that tell what a cell was asked for.
        here: What the figures of new cells depend on; by default `environment()`.
    """

    def __init__(self, path: Path, asked: Sequence[str] = ASKED, here: dict[str, Any] | None = None) -> None:
        self.path, self.asked = path, asked
        stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self.environments: dict[str, Any] = stored.get("environments", {})
        self.cells: dict[str, Cell] = {self._key(cell): cell for cell in stored.get("cells", [])}
        here = here or environment()
        self.here = hashlib.sha256(json.dumps(here, sort_keys=True).encode()).hexdigest()[:8]
        self.environments[self.here] = here

    def known(self, asked: Cell) -> Cell | None:
        """The cell, if it was measured in this environment and did not fail."""
        cell = self.cells.get(self._key(asked))
        return cell if cell and cell["environment"] == self.here and "failed" not in cell else None

    def add(self, cell: Cell) -> Cell:
        """Put a cell in place of the one that was asked for in the same way, and save all."""
        cell = cell | {"environment": self.here}
        self.cells[self._key(cell)] = cell
        cells = [self.cells[key] for key in sorted(self.cells)]
        used = {cell["environment"] for cell in cells}
        kept = {name: self.environments[name] for name in sorted(used)}
        text = json.dumps({"environments": kept, "cells": cells}, indent=1, ensure_ascii=False)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(self.path)
        return cell

    def _key(self, cell: Cell) -> str:
        return json.dumps([cell[name] for name in self.asked])


def measure(asked: Cell, tasks: Sequence[Task], folder: Path) -> Cell:
    """Run the command once and score what it writes.

    Args:
        asked: The cell's model, recipe, ratio and samples.
        tasks: The scores of the model.
        folder: Where to write files.

    Returns:
        The cell with its figures; with `smallest` where the ratio is out of reach, or
        with `failed`, the message.
    """
    out, report = folder / "out.onnx", folder / "report.json"
    command = [sys.executable, "-m", "onnx_lowrank", model_file(tasks[0], folder), str(out), "--quiet"]
    command += ["--ratio", str(asked["ratio"]), "--pass", asked["recipe"], "--report", str(report)]
    for name, shape in tasks[0].shape.items():
        command += ["--input-shape", f"{name}={','.join(map(str, shape))}"]
    if is_calibrated(asked["recipe"]):
        command += ["--calibration", str(calibration_file(asked["model"], folder))]
        if asked["samples"] is not None:
            command += ["--calibration-samples", str(asked["samples"])]
    usage, code, message = launched(command)
    cell = asked | usage
    if code == UNREACHABLE and (smallest := re.search(r" is ([0-9.e-]+)\.$", message)):
        return cell | {"smallest": float(smallest[1])}
    if code:
        return cell | {"failed": f"exit code {code}: {message}"}
    return cell | reported(report) | {"scores": scored(str(out), tasks)}


def launched(command: Sequence[str]) -> tuple[Cell, int, str]:
    """Run a command from a bare interpreter: its seconds and peak memory, its exit code, its errors."""
    launch = [sys.executable, "-I", "-S", "-c", LAUNCHER, *command]
    run = subprocess.run(launch, cwd=CHECKOUT, capture_output=True, text=True, check=True)
    usage = json.loads(run.stdout)
    code = usage.pop("code")
    return {name: round(value, 2) for name, value in usage.items()}, code, run.stderr.strip()


def is_calibrated(recipe: str) -> bool:
    return recipe == AUTO_RECIPE or shipped.load(recipe).calibrated


def model_file(task: Task, folder: Path) -> str:
    """The model as the command reads it."""
    model = task.model()
    if isinstance(model, str):
        return model
    path = folder / f"{task.name}.onnx"
    onnx.save(model, path)
    return str(path)


def calibration_file(model: str, folder: Path) -> Path:
    """The calibration inputs as the command reads them, written once."""
    path = folder / f"{model}.npz"
    if not path.exists():
        np.savez(path, **calibration(model))
    return path


def reported(path: Path) -> Cell:
    """The figures of the compressed model in the command's report."""
    report = json.loads(path.read_text(encoding="utf-8"))
    calibrated = report["calibration"] or {}
    return {
        "chosen": report["recipe"]["name"],
        "reached": report["ratio"]["reached"],
        "calibration_samples": calibrated.get("samples", 0),
        "held": calibrated.get("held", 0),
        "worst": (report["validation"] or {}).get("worst"),
    }


def scored(model: str | onnx.ModelProto, tasks: Iterable[Task]) -> dict[str, float]:
    model = onnx.load(model) if isinstance(model, str) else model
    return {task.score: round(task.measure(model), 4) for task in tasks}


def table(cells: Sequence[Cell], ratios: Sequence[float]) -> Iterator[str]:
    """Markdown: for every model one table per score, then one of seconds and memory."""
    for model, group in groupby(cells, key=lambda cell: cell["model"]):
        rows = {name: list(row) for name, row in groupby(group, key=lambda cell: cell["recipe"])}
        (uncompressed,) = rows.pop(ORIGINAL)
        for score, best in uncompressed["scores"].items():
            yield from head(f"{model}, {score}; uncompressed {best:.3f}", ratios)
            for recipe, row in rows.items():
                yield f"| `{recipe}` | " + " | ".join(score_text(cell, score) for cell in row) + " |"
        yield from head(f"{model}, seconds and peak MB", ratios)
        for recipe, row in rows.items():
            texts = (f"{cell['seconds']:.1f} s, {cell['peak_mb']:.0f} MB" for cell in row)
            yield f"| `{recipe}` | " + " | ".join(texts) + " |"


def head(title: str, ratios: Sequence[float]) -> Iterator[str]:
    yield f"\n{title}\n"
    yield "| recipe | " + " | ".join(f"{ratio:g}" for ratio in ratios) + " |"
    yield "| --- " * (len(ratios) + 1) + "|"


def score_text(cell: Cell, score: str) -> str:
    """A score; beside auto's the recipe that it chose; else the smallest ratio in reach."""
    if "smallest" in cell:
        return f"down to {cell['smallest']:g}"
    if "failed" in cell:
        return "failed"
    chosen = "" if cell["chosen"] == cell["recipe"] else f" ({cell['chosen']})"
    return f"{cell['scores'][score]:.3f}{chosen}"


def line(cell: Cell) -> str:
    """A cell for those who follow the run."""
    scores = cell.get("scores", {})
    said = ", ".join(f"{score} {score_text(cell, score)}" for score in scores)
    said = said or cell.get("failed") or score_text(cell, "")
    usage = f"{cell['seconds']:.1f} s, {cell['peak_mb']:.0f} MB"
    return f"{cell['model']} {cell['recipe']} {cell['ratio']:g}: {said}; {usage}"


def original(tasks: Sequence[Task]) -> Cell:
    """The uncompressed model's scores."""
    asked = {"model": tasks[0].name, "recipe": ORIGINAL, "ratio": 1.0, "samples": None}
    return asked | {"scores": scored(tasks[0].model(), tasks)}


def cells_of(tasks: Sequence[Task], options: argparse.Namespace, results: Results) -> Iterator[Cell]:
    """The cells of one model, its original first; the known ones come as they are stored."""
    yield results.add(original(tasks))
    with tempfile.TemporaryDirectory() as folder:
        for recipe, ratio in product(options.recipes, options.ratios):
            samples = options.samples if is_calibrated(recipe) else None
            asked = {"model": tasks[0].name, "recipe": recipe, "ratio": ratio, "samples": samples}
            known = results.known(asked)
            yield known or results.add(measure(asked, tasks, Path(folder)))


def main() -> int:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=[*REAL, *ZOO], default=list(MODELS))
    names = [AUTO_RECIPE, *(recipe.name for recipe in shipped.load_all())]
    parser.add_argument("--recipes", nargs="+", choices=names, default=list(RECIPES))
    parser.add_argument("--ratios", nargs="+", type=float, default=list(RATIOS))
    parser.add_argument("--samples", type=int, help="how many calibration inputs to use at most")
    parser.add_argument("--json", type=Path, default=RESULTS, help="the cells; by default the tracked file")
    parser.add_argument("--markdown", type=Path, help="write the tables, too")
    options = parser.parse_args()
    results = Results(options.json)
    groups = [
        list(group) for _, group in groupby(calibrated_tasks(tuple(options.models)), lambda task: task.name)
    ]
    total, cells = len(groups) * len(options.recipes) * len(options.ratios), []
    for tasks in groups:
        for number, cell in enumerate(cells_of(tasks, options, results)):
            cells.append(cell)
            if number:
                done = sum(cell["recipe"] != ORIGINAL for cell in cells)
                print(f"[{done}/{total}] {line(cell)}", file=sys.stderr, flush=True)
    text = "\n".join(table(cells, options.ratios)).lstrip() + "\n"
    print(text, end="")
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")
    return int(any("failed" in cell for cell in cells))


if __name__ == "__main__":
    sys.exit(main())
