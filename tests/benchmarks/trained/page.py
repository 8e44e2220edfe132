"""The page that shows all cells: for every model one table of scores, and one of costs."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trained.subject import Subject

HEAD = """
`python tests/benchmarks/bench_transformers.py` measures these tables and writes this page from
`tests/benchmarks/results/transformers.json`. The models come from packages; `build.py` of
shared/real_models writes them as ONNX. Every row is one run of the command. Test data are never calibration
data. A score with "other" is on data of another kind than the calibration data. Beside a score stands the
goal in brackets. "Time", "prefill" and "decode" are ratios to the original's time, both models run in
turns; the cores are shared with other machines, so a time is known to about 0.05. "Fused" counts the
operators of ONNX Runtime's own in the optimized model. Seconds with a star are those of a run that found
results of other rows in the cache. The rows of ppocr and of `asvd` are older
than the probes of today (1/128, 1/32, 1/8 and 1/2). The rows of ppocr and efficientnet are older than the
ranks that suit ONNX Runtime's layout (docs/latency.md).
"""

Cell = Mapping[str, Any]


def page(subjects: Sequence[Subject], cells: Sequence[Cell]) -> str:
    """The page in markdown."""
    lines = ["# Transformers and other trained models\n", _filled(HEAD) + "\n"]
    for subject in subjects:
        if own := [cell for cell in cells if cell["model"] == subject.name]:
            lines += _section(subject, own)
    return "\n".join(lines).rstrip() + "\n"


def _filled(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 120, break_on_hyphens=False, break_long_words=False)


def _section(subject: Subject, cells: Sequence[Cell]) -> Iterator[str]:
    yield f"## {subject.name}\n"
    yield _filled(subject.about) + "\n"
    order = list(subject.asked)
    rows = sorted(
        cells,
        key=lambda cell: (
            bool(cell["budget"]),
            order.index(cell["budget"]) if cell["budget"] in order else len(order),
            cell["recipe"],
            -cell["ratio"],
        ),
    )
    scores = list(dict.fromkeys(name for cell in rows for name in cell.get("scores", {})))
    yield from _head("recipe", "budget", "asked", *scores)
    yield from (_row(cell, [_score(subject, cell, name) for name in scores]) for cell in rows)
    yield ""
    times = list(subject.times)
    yield from _head("recipe", "budget", "asked", "parameters", "MACs", *times, "fused", "took", "peak MB")
    yield from (_row(cell, _costs(subject, cell, times)) for cell in rows)
    yield from _refusals(rows)
    yield ""


def _head(*names: str) -> Iterator[str]:
    yield "| " + " | ".join(names) + " |"
    yield "| --- " * len(names) + "|"


def _row(cell: Cell, figures: Sequence[str]) -> str:
    chosen = cell.get("chosen", cell["recipe"])
    recipe = f"`{cell['recipe']}`" + ("" if chosen == cell["recipe"] else f" → `{chosen}`")
    name, asked = (recipe, f"{cell['ratio']:g}") if cell["budget"] else (cell["recipe"], "–")
    return "| " + " | ".join((name, cell["budget"] or "–", asked, *figures)) + " |"


def _score(subject: Subject, cell: Cell, name: str) -> str:
    value = cell.get("scores", {}).get(name)
    return _with_goal(subject, cell, name, "–" if value is None else f"{value:.4g}")


def _with_goal(subject: Subject, cell: Cell, name: str, figure: str) -> str:
    goal = subject.goals.get((cell["budget"], cell["ratio"]), {}).get(name)
    return figure if goal is None else f"{figure} ({goal:g})"


def _costs(subject: Subject, cell: Cell, times: Sequence[str]) -> list[str]:
    shares = [f"{cell[name]:.3f}" if cell.get(name) is not None else "–" for name in ("params", "macs")]
    timed = cell.get("times", {})
    ratios = [
        _with_goal(subject, cell, name, f"{timed[name]['time']:.2f}" if name in timed else "–")
        for name in times
    ]
    fused = ", ".join(f"{number} {name}" for name, number in cell.get("fused", {}).items())
    mark = "*" if cell.get("cached") else ""
    usage = [f"{cell['seconds']:.0f} s{mark}", f"{cell['peak_mb']:.0f}"] if "seconds" in cell else ["–", "–"]
    return [*shares, *ratios, fused or "–", *usage]


def _refusals(cells: Sequence[Cell]) -> Iterator[str]:
    """What the command said where it wrote nothing."""
    said = [(cell, cell.get("refused") or cell.get("failed")) for cell in cells]
    if any(message for _, message in said):
        yield ""
    for cell, message in said:
        if message:
            yield f"- {cell['budget']} {cell['ratio']:g}, `{cell['recipe']}`: {message}"
