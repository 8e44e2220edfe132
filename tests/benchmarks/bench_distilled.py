"""Distillation after the decomposition: the scores of models before and after it.

    python tests/benchmarks/bench_distilled.py --models resnet20 --ratios 0.35 0.25 0.2 0.15 --minutes 15
    python tests/benchmarks/bench_distilled.py --models resnet20 --ratios 0.25 --samples 500 --minutes 15
    python tests/benchmarks/bench_distilled.py --models minilm --budget macs --ratios 0.6 --minutes 15

Every cell is one run of the command, without a distillation for `--minutes 0`. ResNet-20, Magika and
UltraFace are
in ../shared; the other models are those of `bench_transformers.py`. It needs the extra `distil`.

The cells go into a JSON file one by one. A run that was cut off goes on where it was. The table goes to
stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnx
from bench_calibrated import PACKAGES, Cell, Results, environment, launched
from bench_transformers import MODULES, REAL, SOURCES, rounded
from scores import SHARED, Task, calibrated_tasks, calibration
from trained.subject import Subject

RESULTS = Path(__file__).parent / "results" / "distilled.json"
ASKED = ("model", "recipe", "budget", "ratio", "minutes", "samples")
FILES = {
    "resnet20": "resnet20_cifar10.onnx",
    "magika": "magika_v3_3.onnx",
    "ultraface": "ultraface_rfb320.onnx",
}


def shared(name: str) -> Subject:
    """A model of ../shared as a subject, like the trained transformers."""
    tasks = calibrated_tasks((name,))
    return Subject(
        name,
        SHARED / "models" / FILES[name],
        about="",
        calibration=partial(calibration, name),
        scores=partial(_scores, tasks),
        shapes={},
        times={},
        asked={},
    )


def _scores(tasks: Sequence[Task], path: Path) -> dict[str, float]:
    return {task.score: task.measure(onnx.load(path)) for task in tasks}


def subjects(real: Path, names: Sequence[str]) -> Iterator[Subject]:
    """The models asked for that are here; why the others are not goes to stderr."""
    known = [shared(name) for name in FILES] if SHARED.is_dir() else []
    known += [subject for module in MODULES for subject in module.subjects(real)]
    for subject in known:
        if subject.name in names:
            if lacking := subject.lacks():
                print(f"{subject.name}: skipped, {lacking}", file=sys.stderr)
            else:
                yield subject


def measure(subject: Subject, asked: Cell, folder: Path) -> Cell:
    """Run the command once and score its model; at ratio 1 the original is scored."""
    if asked["ratio"] == 1:
        return asked | {"scores": rounded(subject.scores(subject.file))}
    data, out, report = folder / f"{subject.name}.npz", folder / "out.onnx", folder / "report.json"
    if not data.exists():
        np.savez(data, **subject.calibration())  # type: ignore[arg-type]
    words = [sys.executable, "-m", "onnx_lowrank", str(subject.file), str(out), "--quiet", "--no-cache"]
    words += ["--ratio", f"{asked['ratio']:g}", "--budget", asked["budget"], "--pass", asked["recipe"]]
    words += ["--calibration", str(data), "--report", str(report)]
    words += [] if not asked["minutes"] else ["--distil", "--minutes", f"{asked['minutes']:g}"]
    words += [] if asked["samples"] is None else ["--calibration-samples", str(asked["samples"])]
    for name, shape in subject.shapes.items():
        words += ["--input-shape", f"{name}={','.join(map(str, shape))}"]
    usage, code, message = launched(words)
    if code:
        return asked | {"failed": message.removeprefix("onnx-lowrank: ").replace(str(folder), "")}
    validation = json.loads(report.read_text(encoding="utf-8"))["validation"]
    done = validation["distilled"] or {}
    return (
        asked
        | usage
        | {
            "scores": rounded(subject.scores(out)),
            "error": validation["worst"],
            "steps": done.get("steps", 0),
            "kept": done.get("is_kept"),
            "loss": done.get("loss_after"),
        }
    )


def cells(subject: Subject, options: argparse.Namespace, results: Results) -> Iterator[Cell]:
    """The cells of one model; the known ones come as they are stored."""
    with tempfile.TemporaryDirectory() as folder:
        for ratio in options.ratios:
            for minutes in options.minutes:
                asked: Cell = {"model": subject.name, "recipe": options.recipe, "budget": options.budget}
                asked |= {"ratio": ratio, "minutes": minutes, "samples": options.samples}
                yield results.known(asked) or results.add(measure(subject, asked, Path(folder)))


def table(found: Sequence[Cell]) -> Iterator[str]:
    """The cells of one model in Markdown."""
    names = list(dict.fromkeys(name for cell in found for name in cell.get("scores", {})))
    yield f"| budget | ratio | minutes | seconds | steps | output error | {' | '.join(names)} |"
    yield "| --- " * (6 + len(names)) + "|"
    for cell in found:
        head = f"| {cell['budget']} | {cell['ratio']:g} | {cell['minutes']:g} |"
        if "scores" not in cell:
            yield f"{head} {cell['failed']} |" + " |" * (2 + len(names))
            continue
        scores = " | ".join(f"{cell['scores'][name]:.4f}" for name in names)
        error = cell.get("error")
        known = "–" if error is None else f"{error:.3f}"
        yield f"{head} {cell.get('seconds', 0):.0f} | {cell.get('steps', 0)} | {known} | {scores} |"


def parsed() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["resnet20"])
    parser.add_argument("--recipe", default="auto")
    parser.add_argument("--budget", default="params", choices=("params", "macs", "bytes"))
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.35, 0.25, 0.2, 0.15])
    parser.add_argument("--minutes", nargs="+", type=float, default=[0.0, 15.0])
    parser.add_argument("--samples", type=int, help="calibration samples; by default all")
    parser.add_argument("--real", type=Path, default=REAL, help="the folder that build.py wrote")
    parser.add_argument("--json", type=Path, default=RESULTS, help="the cells; by default the tracked file")
    return parser.parse_args()


def main() -> int:
    """Measure, and print a table for each model."""
    options, failed = parsed(), False
    results = Results(options.json, ASKED, environment(SOURCES, [*PACKAGES, "torch"]))
    for subject in subjects(options.real, options.models):
        found = []
        for cell in cells(subject, options, results):
            failed |= "failed" in cell
            found.append(cell)
            print(cell, file=sys.stderr, flush=True)
        print(f"{subject.name}\n", *table(found), "", sep="\n", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
