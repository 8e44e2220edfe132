"""Quantization after the decomposition: scores and bytes of dense, low-rank, quantized, and both.

    python tests/benchmarks/bench_quantized.py --models resnet20 --ratios 1 0.5 0.35 --then none int8
    python tests/benchmarks/bench_quantized.py --models resnet20 --budget bytes --ratios 0.2 --then none int8

Every cell is one run of the command. At ratio 1 of the parameters nothing is decomposed: with a kind of
quantization that is the quantized model alone, without one the original. With `--budget bytes` all models of
a row have equal bytes at most. ResNet-20 is in ../shared; the other models are those of
`bench_transformers.py`.

The cells go into a JSON file one by one. A run that was cut off goes on where it was. The table goes to
stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx.version_converter
from bench_calibrated import PACKAGES, Cell, Results, environment, launched
from bench_transformers import MODULES, REAL, SOURCES, rounded
from scores import SHARED, calibrated_tasks, calibration
from trained.subject import Subject

from onnx_lowrank import quantize

RESULTS = Path(__file__).parent / "results" / "quantized.json"
ASKED = ("model", "recipe", "budget", "ratio", "then", "samples")
NONE = "none"
RESNET = "resnet20"
_PER_CHANNEL = 13  # the first opset with a scale for each channel
_WRONG, _UNREACHABLE = 2, 3  # the command's exit codes


def resnet20() -> Subject:
    """ResNet-20 as a subject, like the trained transformers."""
    (task,) = calibrated_tasks((RESNET,))
    return Subject(
        RESNET,
        SHARED / "models/resnet20_cifar10.onnx",
        about="",
        calibration=lambda: calibration(RESNET),
        scores=lambda path: {"top-1": task.measure(onnx.load(path))},
        shapes={},
        times={},
        asked={},
    )


def subjects(real: Path, names: Sequence[str]) -> Iterator[Subject]:
    """The models asked for that are here; why the others are not goes to stderr."""
    known = [resnet20()] if SHARED.is_dir() else []
    known += [subject for module in MODULES for subject in module.subjects(real)]
    for subject in known:
        if subject.name in names:
            if lacking := subject.lacks():
                print(f"{subject.name}: skipped, {lacking}", file=sys.stderr)
            else:
                yield subject


def with_channels(subject: Subject, folder: Path) -> Subject:
    """The subject with an opset that has a scale for each channel; converted once if its own is older."""
    proto = onnx.load(subject.file)
    if max(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")) >= _PER_CHANNEL:
        return subject
    path = folder / subject.file.name
    if not path.exists():
        onnx.save(onnx.version_converter.convert_version(proto, _PER_CHANNEL), path)
    return replace(subject, file=path)


def measure(subject: Subject, asked: Cell, folder: Path) -> Cell:
    """Run the command once and score what it writes; the original is only scored."""
    if asked["then"] == NONE and asked["ratio"] == 1:
        size = subject.file.stat().st_size
        return asked | {"scores": rounded(subject.scores(subject.file)), "bytes": size}
    data, out, report = folder / f"{subject.name}.npz", folder / "out.onnx", folder / "report.json"
    if not data.exists():
        np.savez(data, **subject.calibration())  # type: ignore[arg-type]
    words = [sys.executable, "-m", "onnx_lowrank", str(subject.file), str(out), "--quiet", "--no-cache"]
    words += ["--ratio", f"{asked['ratio']:g}", "--budget", asked["budget"], "--pass", asked["recipe"]]
    words += ["--calibration", str(data), "--report", str(report)]
    words += [] if asked["then"] == NONE else ["--then", asked["then"]]
    words += [] if asked["samples"] is None else ["--calibration-samples", str(asked["samples"])]
    for name, shape in subject.shapes.items():
        words += ["--input-shape", f"{name}={','.join(map(str, shape))}"]
    usage, code, message = launched(words)
    if code:
        kind = "refused" if code in (_WRONG, _UNREACHABLE) else "failed"
        return asked | {kind: message.removeprefix("onnx-lowrank: ").replace(str(folder), "")}
    content = json.loads(report.read_text(encoding="utf-8"))
    done = content["validation"]["quantized"] or {}
    worst = max((o["relative"] for o in done.get("alone", ()) if o["relative"] is not None), default=None)
    return (
        asked
        | usage
        | {
            "scores": rounded(subject.scores(out)),
            "bytes": content["totals"]["bytes"]["after"],
            "params": content["totals"]["params"]["ratio"],
            "error": content["validation"]["worst"],
            "error before": worst,
            "method": done.get("method", ""),
        }
    )


def cells(subject: Subject, options: argparse.Namespace, results: Results) -> Iterator[Cell]:
    """The cells of one model; the known ones come as they are stored."""
    with tempfile.TemporaryDirectory() as name:
        for ratio in options.ratios:
            for then in options.then:
                asked: Cell = {"model": subject.name, "recipe": options.recipe, "budget": options.budget}
                asked |= {"ratio": ratio, "then": then, "samples": options.samples}
                folder = Path(name)
                known = results.known(asked)
                yield known or results.add(measure(with_channels(subject, folder), asked, folder))


def table(found: Sequence[Cell]) -> Iterator[str]:
    """The cells of one model in Markdown."""
    names = list(dict.fromkeys(name for cell in found for name in cell.get("scores", {})))
    yield f"| budget | ratio | then | bytes | parameters | output error (before) | {' | '.join(names)} |"
    yield "| --- " * (6 + len(names)) + "|"
    for cell in found:
        head = f"| {cell['budget']} | {cell['ratio']:g} | {cell['then']} |"
        if "scores" not in cell:
            yield f"{head} {cell.get('refused') or cell.get('failed')} |" + " |" * (2 + len(names))
            continue
        error, before, share = cell.get("error"), cell.get("error before"), cell.get("params", 1.0)
        errors = "–" if error is None else f"{error:.3g}"
        errors += "" if before is None else f" ({before:.3g})"
        scores = " | ".join(f"{cell['scores'][name]:.4f}" for name in names)
        yield f"{head} {cell['bytes']:,} | {share:.3f} | {errors} | {scores} |"


def parsed() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=[RESNET, "minilm", "ppocr", "efficientnet"])
    parser.add_argument("--recipe", default="output")
    parser.add_argument("--budget", default="params", choices=("params", "macs", "bytes"))
    parser.add_argument("--ratios", nargs="+", type=float, default=[1.0, 0.8, 0.5])
    parser.add_argument("--then", nargs="+", choices=[NONE, *quantize.names()], default=[NONE, "int8"])
    parser.add_argument("--samples", type=int, help="calibration samples; by default all")
    parser.add_argument("--real", type=Path, default=REAL, help="the folder that build.py wrote")
    parser.add_argument("--json", type=Path, default=RESULTS, help="the cells; by default the tracked file")
    return parser.parse_args()


def main() -> int:
    """Measure, and print a table for each model."""
    options, failed = parsed(), False
    results = Results(options.json, ASKED, environment(SOURCES, [*PACKAGES]))
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
