"""Large given inputs are compared in batches, with the same result as in one run."""

import numpy as np
import onnx.parser
import pytest

from onnx_lowrank.core.outcome import Validation
from onnx_lowrank.engines import batches as module
from onnx_lowrank.engines.batches import batches
from onnx_lowrank.engines.compare import Comparison
from onnx_lowrank.engines.inputs import specs
from onnx_lowrank.engines.runtime import runtime
from onnx_lowrank.files.load import Model, load
from onnx_lowrank.stages.check import validate

CPU = runtime("CPUExecutionProvider")
ROWS = 1000


def scaled(factor: float, shape: str = "N, 64", body: str = "y = Mul(x, s)") -> Model:
    return load(
        onnx.parser.parse_model(
            '<ir_version: 10, opset_import: ["": 21]>'
            f"g (float[{shape}] x) => (float[N, 64] y) <float s = {{{factor}}}> {{ {body} }}"
        )
    )


def drawn(rows: int = ROWS) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(0).standard_normal((rows, 64)).astype(np.float32)}


def cut(model: Model, feed: dict[str, np.ndarray], memory: int | None = None) -> list[int]:
    return [len(batch["x"]) for batch in batches(CPU, model, feed, specs(model.proto), memory=memory)]


def no_layer(layer: str) -> None:
    raise AssertionError(layer)


def validated(ours: Model, theirs: Model) -> Validation:
    return validate(ours, theirs, {}, alone=no_layer, inputs=drawn())


def test_memory_bounds_the_batches() -> None:
    one = 33 * 256  # 32 times the inputs of a sample, and its outputs
    assert cut(scaled(2.0), drawn(), memory=300 * one) == [300, 300, 300, 100]
    assert cut(scaled(2.0), drawn(), memory=1) == [1] * ROWS


def test_inputs_that_are_small_are_one_batch() -> None:
    assert cut(scaled(2.0), drawn()) == [ROWS]
    assert cut(scaled(2.0), drawn(200), memory=1) == [200]


@pytest.mark.parametrize(
    ("shape", "body"),
    [(f"{ROWS}, 64", "y = Mul(x, s)"), ("N, 64", "z = Reshape(x, d) y = Mul(z, s)")],
    ids=["fixed", "rejects one sample"],
)
def test_what_cannot_be_split_is_one_batch(shape: str, body: str) -> None:
    d = "d = Constant <value = int64[2] {-1, 640}> () " if "d)" in body else ""
    assert cut(scaled(2.0, shape, d + body), drawn(), memory=1) == [ROWS]


def test_batches_give_the_report_of_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = validated(scaled(2.0), scaled(1.5))
    seen: list[int] = []
    add = Comparison.add

    def spy(self: Comparison, wanted: object, got: object, feed: dict[str, np.ndarray]) -> None:
        seen.append(len(feed["x"]))
        add(self, wanted, got, feed)

    monkeypatch.setattr(Comparison, "add", spy)
    monkeypatch.setattr(module, "MEMORY", 400 * 33 * 256)
    parts = validated(scaled(2.0), scaled(1.5))
    assert seen == [400, 400, 200]
    assert parts.inputs == whole.inputs == "given: x float32 1000×64"
    for ours, theirs in zip(parts.outputs, whole.outputs, strict=True):
        assert ours.relative == pytest.approx(theirs.relative, rel=1e-12)
        assert ours.centred == pytest.approx(theirs.centred, rel=1e-12)
        assert (ours.largest, ours.agreement) == (theirs.largest, theirs.agreement)
