"""The comparison of two models."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from rich.console import Console

from onnx_lowrank import InputError, cli, compress
from onnx_lowrank.comparison import compare
from onnx_lowrank.core.outcome import Differences
from onnx_lowrank.inspection import inspect
from onnx_lowrank.report import comparison
from tiny import cnn


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A model and its compressed form."""
    onnx.save(cnn(), tmp_path / "a.onnx")
    with compress(tmp_path / "a.onnx", 0.6) as result:
        result.save(tmp_path / "b.onnx")
    return tmp_path / "a.onnx", tmp_path / "b.onnx"


def text(found: comparison.Comparison) -> str:
    out = StringIO()
    comparison.show(found, Console(file=out, width=80))
    return out.getvalue()


def test_a_compressed_model_differs_as_its_report_says(pair: tuple[Path, Path]) -> None:
    found = compare(*pair)
    with compress(pair[0], 0.6) as result:
        totals, outputs = result.report.totals, result.report.validation.outputs
        rewritten = sum(row.option is not None for row in result.report.layers)
    assert found.params == totals.amount("params")
    assert found.validation.outputs == outputs
    assert found.nodes.same == 6 - rewritten
    assert (found.nodes.gone, found.nodes.new) == (rewritten, 2 * rewritten)
    assert (found.tensors.same, found.tensors.gone) == (3 - rewritten, rewritten)
    assert sum(after - before for before, after in map(vars_of, found.operators.values())) == rewritten


def vars_of(total: Any) -> tuple[int, int]:
    return total.before, total.after


def test_a_model_equals_itself(pair: tuple[Path, Path]) -> None:
    found = compare(pair[0], pair[0])
    assert found.nodes == Differences(6, 0, 0, 0)
    assert found.tensors == Differences(3, 0, 0, 0)
    assert found.validation.outputs[0].relative == 0
    assert not found.operators
    assert "Nodes: 6 the same." in text(found)


def test_what_is_quantized_counts_by_its_bytes(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    quantized = onnx.load(pair[0])
    (weight,) = (tensor for tensor in quantized.graph.initializer if tensor.name == "fc")
    weight.CopyFrom(numpy_helper.from_array(np.ones((4, 16), np.int8), "fc"))
    quantized.graph.initializer.append(numpy_helper.from_array(np.float32(0.1), "scale"))
    quantized.graph.node[-1].input[1] = "fc_float"
    node = onnx.helper.make_node("DequantizeLinear", ["fc", "scale"], ["fc_float"], "dequantize")
    quantized.graph.node.insert(0, node)
    onnx.save(quantized, tmp_path / "q.onnx")
    found = compare(pair[0], tmp_path / "q.onnx")
    assert vars_of(found.quantized) == (0, 64)
    assert found.params.after == found.params.before - 64 + 1
    assert "quantized bytes" in text(found)
    assert "quantized bytes" not in text(compare(*pair))
    assert inspect(tmp_path / "q.onnx").quantized == 64


@pytest.mark.parametrize(
    ("weight", "differences"),
    [
        (np.full((4, 16), np.nan, np.float32), Differences(3, 0, 0, 0)),
        (np.zeros((4, 16), np.float32), Differences(2, 1, 0, 0)),
        (np.zeros((4, 16), np.float64), Differences(2, 1, 0, 0)),
    ],
)
def test_tensors_are_compared_number_by_number(
    tmp_path: Path, weight: np.ndarray, differences: Differences
) -> None:
    from onnx_lowrank.files.load import load
    from onnx_lowrank.graph.difference import tensors

    one, other = cnn(fc=np.full((4, 16), np.nan, np.float32)), cnn()
    next(t for t in other.graph.initializer if t.name == "fc").CopyFrom(numpy_helper.from_array(weight, "fc"))
    for name, proto in (("a", one), ("b", other)):
        (tmp_path / f"{name}.onnx").write_bytes(proto.SerializeToString())
    found = tensors(load(tmp_path / "a.onnx"), load(tmp_path / "b.onnx"))
    assert found == differences


def test_models_with_other_inputs_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    proto = cnn()
    proto.graph.input[0].name = proto.graph.node[0].input[0] = "image"
    onnx.save(proto, tmp_path / "c.onnx")
    with pytest.raises(InputError, match=r"have other inputs \(x and image\)"):
        compare(pair[0], tmp_path / "c.onnx")


def test_models_with_other_outputs_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    proto = cnn()
    proto.graph.output[0].name = proto.graph.node[-1].output[0] = "scores"
    onnx.save(proto, tmp_path / "c.onnx")
    with pytest.raises(InputError, match=r"have other outputs \(y and scores\)"):
        compare(pair[0], tmp_path / "c.onnx")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda proto: fill(proto, "fc", np.nan),
            r"c\.onnx does not run as .* \(The compressed model gives NaN",
        ),
        (lambda proto: shrink(proto), r"c\.onnx does not run as .*a\.onnx does \(ONNX Runtime"),
    ],
)
def test_a_model_that_does_not_run_alike_is_no_fault_of_this_program(
    pair: tuple[Path, Path], tmp_path: Path, change: Any, words: str
) -> None:
    proto = cnn()
    change(proto)
    (tmp_path / "c.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(InputError, match=words):
        compare(pair[0], tmp_path / "c.onnx")


def fill(proto: onnx.ModelProto, name: str, value: float) -> None:
    tensor = next(t for t in proto.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.full(tensor.dims, value, np.float32), name))


def shrink(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 9


def test_times_are_measured_if_they_are_asked_for(pair: tuple[Path, Path]) -> None:
    assert compare(*pair).timing is None
    found = compare(*pair, time=True, input_shape={"x": (1, 8, 6, 6)}, cache=False)
    assert found.timing is not None
    assert found.timing.ratio is not None
    assert "time" in text(found)


def test_the_command(pair: tuple[Path, Path], capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["compare", *map(str, pair), "-q"])
    out, err = capsys.readouterr()
    assert (ended.value.code, err) == (0, "")
    assert "Outputs on ONNX Runtime CPUExecutionProvider" in out
    assert max(map(len, out.splitlines())) <= 80


def test_the_command_with_one_model(pair: tuple[Path, Path], capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["compare", str(pair[0])])
    assert ended.value.code == 2
    said = "B.onnx is missing: onnx-lowrank compare A.onnx B.onnx compares two models."
    assert said in capsys.readouterr().err
