"""Speed-up of compressed models: `python tests/benchmarks/bench_latency.py [--models …] [--ratios …]`.

Every row is one run of the command with --budget latency (or macs), and then a separate measurement: three
processes, which do nothing else, time both models in turns, with the default options of the runtime except
for the number of threads. The median of the three counts, because sessions of the same model differ by
several percent. Each turn runs a model twice and times the second run. Only the ratio of the two times is
meaningful. The row also gives the prediction of the command and its duration. ResNet-20, which is calibrated,
also has its top-1 accuracy on 761 images.

Results go into a JSON file row by row, each with its machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from bench_calibrated import calibration_file
from bench_spectra import cpu_model
from scores import CHECKOUT, SHARED, tasks

RESULTS = Path(__file__).parent / "results" / "latency.json"
RATIOS = (0.9, 0.7, 0.5)
_REFUSED = (2, 3)  # MACs are unknown, or the ratio is out of reach
_ROUNDS = 15
_SESSIONS = 3


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to make faster.

    Attributes:
        name: Its name in the table.
        file: Its file in ../shared, or "" where models/zoo.py builds it.
        shapes: The shapes of its inputs.
        calibrated: Whether the command gets calibration inputs.
    """

    name: str
    file: str
    shapes: dict[str, tuple[int, ...]]
    calibrated: bool = False


_IMAGE = {"image": (1, 3, 224, 224)}
_SOUND = {"input": (1, 512), "state": (2, 1, 128)}
SUBJECTS = (
    *(Subject(name, "", _IMAGE) for name in ("resnet18", "resnet50", "vgg16", "mobilenet_v2", "vit_b_16")),
    Subject("bert_base", "", dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), (1, 128))),
    Subject("digits", str(CHECKOUT / "models/digits.onnx"), {"image": (1, 1, 8, 8)}),
    Subject("resnet20", str(SHARED / "models/resnet20_cifar10.onnx"), {"input": (1, 3, 32, 32)}, True),
    Subject("magika", str(SHARED / "models/magika_v3_3.onnx"), {"bytes": (1, 2048)}),
    Subject("ultraface", str(SHARED / "models/ultraface_rfb320.onnx"), {"input": (1, 3, 240, 320)}),
    Subject("silero_vad", str(SHARED / "models/silero_vad.onnx"), _SOUND),
    Subject("silero_vad_half", str(SHARED / "models/silero_vad_half.onnx"), _SOUND),
)


def source(subject: Subject, folder: Path) -> Path:
    """The model's file, built where it has none."""
    if subject.file:
        return Path(subject.file)
    path = folder / f"{subject.name}.onnx"
    if not path.exists():
        import zoo

        path.write_bytes(zoo.build(subject.name).SerializeToString())
    return path


def command(subject: Subject, model: Path, out: Path, row: dict[str, Any]) -> list[str]:
    """The command of a row."""
    words = [sys.executable, "-m", "onnx_lowrank", str(model), str(out), "--quiet"]
    words += ["--ratio", f"{row['ratio']:g}", "--budget", row["budget"], "--threads", str(row["threads"])]
    words += ["--report", str(out.with_suffix(".json"))]
    model_inputs = {value.name for value in onnx.load(model, load_external_data=False).graph.input}
    for name, shape in subject.shapes.items():
        if name in model_inputs:
            words += ["--input-shape", f"{name}={','.join(map(str, shape))}"]
    if subject.calibrated:
        words += ["--calibration", str(calibration_file(subject.name, out.parent))]
    return words


def measured(subject: Subject, budget: str, ratio: float, threads: int, folder: Path) -> dict[str, Any]:
    """Run the command, then time what it gave."""
    row: dict[str, Any] = {"model": subject.name, "budget": budget, "ratio": ratio, "threads": threads}
    model, out = source(subject, folder), folder / "out.onnx"
    out.unlink(missing_ok=True)
    begin = time.perf_counter()
    done = subprocess.run(command(subject, model, out, row), capture_output=True, text=True, check=False)
    row["seconds"] = round(time.perf_counter() - begin, 1)
    if done.returncode in _REFUSED:
        said = done.stderr.strip().removeprefix("onnx-lowrank: ")
        return row | {"refused": said.replace(str(model), subject.name)}
    if done.returncode:
        raise SystemExit(done.stderr)
    report = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    row |= {name: report["totals"][name]["ratio"] for name in ("params", "macs")}
    if report["timing"] and report["timing"]["predicted"]:
        row["predicted"] = report["timing"]["predicted"] / report["timing"]["before"]
        row["reported"] = report["totals"]["time"]["ratio"]
    row |= compared(model, out, threads, subject.shapes)
    if subject.name == "resnet20":
        row |= {task.score: task.measure(onnx.load(out)) for task in tasks((subject.name,))}
    return row


def compared(model: Path, out: Path, threads: int, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Time two models in turns, in processes of their own: the median of their ratios, and all of them."""
    words = [sys.executable, __file__, "--time", str(model), str(out), "--threads", str(threads)]
    words += ["--shapes", json.dumps(dict(shapes))]
    times = [
        json.loads(subprocess.run(words, capture_output=True, check=True).stdout) for _ in range(_SESSIONS)
    ]
    times.sort(key=lambda found: found["time"])
    return times[_SESSIONS // 2] | {"times": [found["time"] for found in times]}


def timed(paths: list[str], threads: int, shapes: dict[str, list[int]]) -> dict[str, float]:
    """Medians of two models' times, in milliseconds, and the median of the ratios, in turns."""
    sessions = []
    for path in paths:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        # Threads of the one session that spin while the other runs would take its cores.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        sessions.append(onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]))
    feed = {value.name: _array(value, shapes.get(value.name)) for value in sessions[0].get_inputs()}
    times: list[list[float]] = []
    begin = time.perf_counter()
    while len(times) < _ROUNDS + 2 or (time.perf_counter() - begin < 3 and len(times) < 400):
        row = []
        for session in sessions:
            session.run(None, feed)
            start = time.perf_counter()
            session.run(None, feed)
            row.append(time.perf_counter() - start)
        times.append(row)
    table = np.array(times[2:])
    ratio = float(np.median(table[:, 1] / table[:, 0]))
    before, after = (round(float(ms), 3) for ms in np.median(table, axis=0) * 1e3)
    return {"before_ms": before, "after_ms": after, "time": round(ratio, 4)}


def _array(value: Any, shape: list[int] | None) -> np.ndarray[Any, Any]:
    sizes = shape or [size if isinstance(size, int) and size > 0 else 1 for size in value.shape]
    rng = np.random.default_rng(0)
    if value.name == "sr":
        return np.array(16000, np.int64)
    match value.type:
        case "tensor(float)":
            return rng.standard_normal(sizes).astype(np.float32)
        case "tensor(int32)":
            return rng.integers(0, 256, sizes).astype(np.int32)
    return np.ones(sizes, np.int64)


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The rows as markdown."""
    yield "| model | threads | budget | asked | time | predicted | MACs | parameters | ms | took |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for row in rows:
        head = f"| {row['model']} | {row['threads']} | {row['budget']} | {row['ratio']:g} |"
        if "refused" in row:
            yield f"{head} {row['refused']} | | | | | {row['seconds']:.0f} s |"
            continue
        predicted = f"{row['predicted']:.3f}" if "predicted" in row else "–"
        macs = "–" if row["macs"] is None else f"{row['macs']:.3f}"
        score = "".join(f", {name} {row[name]:.3f}" for name in ("top-1",) if name in row)
        yield (
            f"{head} {row['time']:.3f}{score} | {predicted} | {macs} | {row['params']:.3f} | "
            f"{row['before_ms']:.3g} → {row['after_ms']:.3g} | {row['seconds']:.0f} s |"
        )


def main() -> None:
    """Measure the rows that are asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    names = [subject.name for subject in SUBJECTS]
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    parser.add_argument("--ratios", nargs="+", type=float, default=RATIOS)
    parser.add_argument("--threads", nargs="+", type=int, default=(1, 2))
    parser.add_argument("--budget", choices=("latency", "macs", "params"), default="latency")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--time", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--shapes", type=json.loads, default={}, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.time:
        print(json.dumps(timed(options.time, options.threads[0], options.shapes)))
        return
    sys.path.insert(0, str(CHECKOUT / "models"))
    known = (
        json.loads(options.results.read_text(encoding="utf-8")) if options.results.exists() else {"rows": []}
    )
    machine = {"cpu": cpu_model(), "cores": os.cpu_count(), "onnxruntime": version("onnxruntime")}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for subject in (subject for subject in SUBJECTS if subject.name in options.models):
            if subject.file and not Path(subject.file).exists():
                continue
            for threads in options.threads:
                for ratio in options.ratios:
                    row = measured(subject, options.budget, ratio, threads, Path(folder))
                    print(*list(table([row]))[2:], sep="\n", file=sys.stderr, flush=True)
                    rows.append(row)
                    known["rows"] = [old for old in known["rows"] if _key(old) != _key(row)] + [row]
                    options.results.write_text(json.dumps({**known, "machine": machine}, indent=1) + "\n")
    print(*table(rows), sep="\n")


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("model", "budget", "ratio", "threads"))


if __name__ == "__main__":
    main()
