"""Every model of onnx's backend tests: it stays as it is, or only what the plan names is rewritten."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from io import StringIO
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.backend.test.runner import Runner
from rich.console import Console

import backend_cases
from backend_cases import Case
from onnx_lowrank import BudgetError, Result, compress, session
from onnx_lowrank.stages.build import Built
from rewriting import assert_only_named_changes, found, rewritten

HALF, MORE, SAME = "rewritten at 0.5", "rewritten above 0.5", "unchanged"
NOTHING = (
    "{} has no layer that can be decomposed, so the smallest ratio that can be reached is 1: "
    "--ratio 1 --dry-run lists every operator with the reason."
)
QUANTIZED = re.compile(
    r"^ cannot get smaller than a ratio of 1, as its .* quantized: compress the float model, then quantize\.$"
)

LEAST = {
    backend_cases.light_with_weights: ((2, 2, 2), (4, 4, 4)),
    backend_cases.nodes: (
        (216, 0, 0),
        (232, 0, 0),
        (252, 0, 0),
        (224, 0, 0),
        (238, 0, 0),
        (245, 0, 0),
        (224, 0, 0),
        (253, 0, 0),
    ),
    backend_cases.nodes_with_weights: ((103, 4, 21), (110, 5, 21), (110, 3, 15), (105, 2, 19)),
    backend_cases.light: ((4, 0, 0), (5, 0, 0)),
    backend_cases.files: ((140, 27, 31),),
}
"""For every part of a group, how many models there are, are rewritten at 0.5, and are rewritten at all.

The numbers are those of onnx 1.23; newer versions have more models. Parts are small, and those that take
longest come first, so that all workers have something to do until the end.
"""


@pytest.fixture
def builds(monkeypatch) -> list[Built]:
    """The models that a test makes, with the names of their new nodes."""
    made: list[Built] = []
    build = session.build

    def recorded(*arguments: Any) -> Built:
        made.append(build(*arguments))
        return made[-1]

    monkeypatch.setattr(session, "build", recorded)
    return made


def compressed(source: Path) -> tuple[str, Result]:
    """Compress a model to one half, or else to the smallest ratio that the refusal names."""
    try:
        return HALF, compress(source, 0.5)
    except BudgetError as error:
        message, ratio = str(error), error.smallest_ratio
    if ratio == 1:
        assert message == NOTHING.format(source) or QUANTIZED.search(message.removeprefix(str(source)))
    else:
        assert ratio is not None
        assert 0.5 < ratio < 1
    return MORE if ratio < 1 else SAME, compress(source, ratio)


def check(case: Case, folder: Path, builds: list[Built]) -> tuple[str, str]:
    """Compress one model, and check the result; return the outcome, and what validated it."""
    source, target = folder / "in.onnx", folder / "out.onnx"
    source.write_bytes(case.proto.SerializeToString())
    builds.clear()
    outcome, result = compressed(source)
    with result:
        result.save(target)
        result.report.table(Console(file=StringIO()))
        (built,) = builds
        chains = built.rewritten.chains
    assert bool(chains) == (outcome != SAME)
    written = onnx.load(target)
    before, after = answers(source, case), answers(target, case)
    if chains:
        seen = found(case.proto)
        layers = [layer for layer in seen.layers.values() if layer.id in chains]
        assert [c.layer for c in result.plan.choices if c.option is not None] == [la.id for la in layers]
        assert_only_named_changes(case.proto, written, layers, chains)
        assert [shapes for shapes, _ in after] == [shapes for shapes, _ in before]
        if case.sets:
            onnx.save(rewritten(seen).model.proto, target)
            assert answers(target, case) == before, "at full rank, the outputs are the stored ones"
    else:
        assert written == case.proto
        assert after == before
    return outcome, result.report.validation.engine


def answers(path: Path, case: Case) -> list[tuple[list[Any], bool]]:
    """For every set of inputs, the shapes of ONNX Runtime's outputs, and whether they are the stored ones."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        opened = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return [answer(opened.run(None, feed), wanted, case) for feed, wanted in case.sets]
    except Exception:  # The runtime's exceptions have no common base, and its binding raises others.
        return []


def answer(got: list[Any], wanted: list[Any], case: Case) -> tuple[list[Any], bool]:
    shapes = [getattr(value, "shape", None) for value in got]
    try:
        Runner.assert_similar_outputs(wanted, got, case.rtol, case.atol)
    except (AssertionError, TypeError):  # The latter for sequences whose nesting differs.
        return shapes, False
    return shapes, True


def tally(
    name: str,
    cases: Iterable[Case],
    folder: Path,
    builds: list[Built],
    record: Callable[[str, str], None],
) -> dict[str, int]:
    """Check models; count their outcomes, and record these for the summary with what validated them."""
    outcomes: Counter[str] = Counter()
    engines: Counter[str] = Counter()
    for case in cases:
        try:
            outcome, engine = check(case, folder, builds)
        except Exception as error:
            error.add_note(f"The model is {case.name}.")
            raise
        outcomes[outcome] += 1
        engines[engine] += 1
    record("counts", f"{outcomes.total()} {name}: {dict(outcomes)}, validated on {dict(engines)}")
    return dict(outcomes)


def test_a_sample(tmp_path, builds, record_property):
    rng = np.random.default_rng(14)
    groups = {
        backend_cases.nodes: 60,
        backend_cases.files: 20,
        backend_cases.nodes_with_weights: 40,
    }
    cases = [
        group()[index]
        for group, size in groups.items()
        for index in rng.choice(len(group()), size, replace=False)
    ]
    outcomes = tally("backend tests", cases, tmp_path, builds, record_property)
    assert outcomes.keys() == {HALF, MORE, SAME}


def part_of(name: str, parts: int) -> int:
    """The part that holds a model: models of newer versions leave all others where they are."""
    return crc32(name.encode()) % parts


@pytest.mark.backend
@pytest.mark.parametrize(
    ("group", "part"),
    [(group, part) for group, parts in LEAST.items() for part in range(len(parts))],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_all(group, part, tmp_path, builds, record_property):
    parts = LEAST[group]
    cases = (case for case in group() if part_of(case.name, len(parts)) == part)
    label = f"{group.__name__} (part {part + 1} of {len(parts)})"
    outcomes = tally(label, cases, tmp_path, builds, record_property)
    half, more = outcomes.get(HALF, 0), outcomes.get(MORE, 0)
    models, least_half, least_rewritten = parts[part]
    assert sum(outcomes.values()) >= models
    assert half >= least_half
    assert half + more >= least_rewritten
