"""Models that run part by part."""

from __future__ import annotations

import weakref
from types import MappingProxyType
from typing import Any

import large
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_lowrank import compress
from onnx_lowrank.engines import parted
from onnx_lowrank.engines.engine import UnsupportedError
from onnx_lowrank.engines.parted import Parted, is_large, parts
from onnx_lowrank.engines.running import fitting_engine
from onnx_lowrank.engines.runtime import Runtime, runtime
from onnx_lowrank.files.load import Model, load

FLOAT = TensorProto.FLOAT
WEIGHT = 4 * 8 * 8  # bytes


@pytest.fixture
def engine() -> Runtime:
    return runtime("CPUExecutionProvider")


def model_of(nodes: list[onnx.NodeProto], outputs: list[str], names: tuple[str, ...]) -> Model:
    rng = np.random.default_rng(0)
    weights = [numpy_helper.from_array(rng.standard_normal((8, 8)).astype(np.float32), n) for n in names]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", FLOAT, ["n", 8])],
        [helper.make_tensor_value_info(name, FLOAT, None) for name in outputs],
        weights,
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return Model(proto, "m", MappingProxyType({}), "")


def feed() -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(1).standard_normal((3, 8)).astype(np.float32)}


def both(model: Model, engine: Runtime) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    with engine.open(model) as whole, Parted(engine).open(model) as divided:
        return whole(feed()), divided(feed())


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> None:
    """A session holds one weight."""
    monkeypatch.setattr(parted, "_WHOLE", WEIGHT)
    monkeypatch.setattr(parted, "_LARGEST", 0)


@pytest.mark.parametrize(
    ("whole", "largest", "expected"), [(2, 0, True), (3, 0, False), (2, 1, False), (1, 1, True)]
)
def test_a_session_may_hold_more_of_a_model_with_a_large_tensor(
    monkeypatch: pytest.MonkeyPatch, whole: int, largest: int, expected: bool
) -> None:
    monkeypatch.setattr(parted, "_WHOLE", whole * WEIGHT)
    monkeypatch.setattr(parted, "_LARGEST", largest)
    nodes = [helper.make_node("MatMul", ["x", name], [f"y{name}"]) for name in "abc"]
    assert is_large(model_of(nodes, ["ya"], ("a", "b", "c"))) is expected


def test_parts_hold_their_weights_and_hand_on_what_is_read_later() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["y"]),
        helper.make_node("Relu", ["y"], ["z"]),
        helper.make_node("MatMul", ["z", "b"], ["u"]),
        helper.make_node("MatMul", ["u", "a"], ["v"]),
        helper.make_node("Add", ["v", "y"], ["w"]),
    ]
    found = parts(model_of(nodes, ["w", "z"], ("a", "b")), WEIGHT)
    assert [[node.op_type for node in part.nodes] for part in found] == [
        ["MatMul", "Relu"],
        ["MatMul"],
        ["MatMul", "Add"],
    ]
    assert [part.outputs for part in found] == [("y", "z"), ("u",), ("w",)]
    assert [part.inputs for part in found] == [("a", "x"), ("b", "z"), ("a", "u", "y")]
    assert len(parts(model_of(nodes, ["w", "z"], ("a", "b")), 2 * WEIGHT)) == 1


def test_nodes_whose_results_nobody_needs_are_no_part() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["y"]),
        helper.make_node("MatMul", ["x", "b"], ["unread"]),
    ]
    assert [part.outputs for part in parts(model_of(nodes, ["y"], ("a", "b")), WEIGHT)] == [("y",)]


@pytest.mark.usefixtures("tight")
def test_bodies_inputs_and_stored_outputs_are_as_in_one_session(engine: Runtime) -> None:
    info = helper.make_tensor_value_info("r", FLOAT, None)
    one = helper.make_graph([helper.make_node("MatMul", ["y", "b"], ["r"])], "then", [], [info])
    two = helper.make_graph([helper.make_node("MatMul", ["x", "c"], ["r"])], "else", [], [info])
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["y"]),
        helper.make_node("ReduceSum", ["y"], ["s"], keepdims=0),
        helper.make_node("Cast", ["s"], ["q"], to=TensorProto.BOOL),
        helper.make_node("If", ["q"], ["z"], then_branch=one, else_branch=two),
        helper.make_node("MatMul", ["z", "d"], ["w"]),
    ]
    model = model_of(nodes, ["w", "a"], ("a", "b", "c", "d"))
    whole, divided = both(model, engine)
    assert divided.keys() == whole.keys()
    for name, value in whole.items():
        np.testing.assert_array_equal(divided[name], value)


@pytest.mark.usefixtures("tight")
def test_a_sequence_cannot_pass(engine: Runtime) -> None:
    nodes = [
        helper.make_node("SequenceConstruct", ["x", "a"], ["s"]),
        helper.make_node("MatMul", ["x", "b"], ["y"]),
        helper.make_node("ConcatFromSequence", ["s"], ["z"], axis=0),
        helper.make_node("Concat", ["z", "y"], ["w"], axis=0),
    ]
    with pytest.raises(UnsupportedError, match="'s' is no tensor"):
        both(model_of(nodes, ["w"], ("a", "b")), engine)


def test_a_model_with_external_data_runs_in_parts(
    engine: Runtime, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "large.onnx"
    large.write(path, 2**20, width=32)
    model = load(path)
    ids = {"input_ids": np.arange(6, dtype=np.int64).reshape(2, 3)}
    assert not is_large(model)
    assert fitting_engine(model, engine) is engine
    monkeypatch.setattr(parted, "_WHOLE", 2**16)
    assert is_large(model)
    fitting = fitting_engine(model, engine)
    assert fitting.name == "ONNX Runtime CPUExecutionProvider, in parts"
    with engine.open(model) as whole, fitting.open(model) as divided:
        np.testing.assert_allclose(divided(ids)["logits"], whole(ids)["logits"], rtol=0, atol=1e-4)


def test_a_run_compares_the_outputs_of_a_large_model(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large.onnx"
    large.write(path, 2**18, width=32)
    found = []
    for whole in (2**29, 2**14):
        monkeypatch.setattr(parted, "_WHOLE", whole)
        with compress(path, 0.8) as result:
            found.append(result.report.validation)
    (one, two) = found
    assert (one.engine, two.engine) == (
        "ONNX Runtime CPUExecutionProvider",
        "ONNX Runtime CPUExecutionProvider, in parts",
    )
    assert [output.name for output in two.outputs] == ["logits"]
    assert two.outputs[0].relative == pytest.approx(one.outputs[0].relative, rel=1e-3)
    assert (one.never_ran, two.never_ran) == ((), ())


def test_a_large_model_is_calibrated_in_parts(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large.onnx"
    large.write(path, 2**18, width=32)
    data = {"input_ids": np.random.default_rng(0).integers(0, 64, (12, 5))}
    found = []
    for whole in (2**29, 2**14):
        monkeypatch.setattr(parted, "_WHOLE", whole)
        with compress(path, 0.7, calibration=data, recipe="activation") as result:
            found.append((result.plan, result.report))
    (one, plain), (two, divided) = found
    for ours, theirs in zip(two.choices, one.choices, strict=True):
        assert ours.option == theirs.option
        assert ours.error == pytest.approx(theirs.error, rel=1e-3)
    outputs = (report.validation.outputs[0].relative for report in (plain, divided))
    assert next(outputs) == pytest.approx(next(outputs), rel=1e-2)
    assert "every batch of inputs opens its parts again" in divided.calibration.warnings[-1]
    assert not any("parts" in warning for warning in plain.calibration.warnings)


@pytest.mark.usefixtures("tight")
def test_small_models_have_one_session(engine: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    original = Runtime.open
    monkeypatch.setattr(Runtime, "open", lambda self, model: opened.append(model) or original(self, model))
    model = model_of([helper.make_node("MatMul", ["x", "a"], ["y"])], ["y"], ("a",))
    with Parted(engine).open(model) as run:
        run(feed())
        run(feed())
    assert opened == [model]


@pytest.mark.usefixtures("tight")
def test_a_session_is_freed_before_the_next_part_opens(
    engine: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions: weakref.WeakSet[Any] = weakref.WeakSet()
    alive = []
    original = onnxruntime.InferenceSession

    def session(*arguments: Any, **options: Any) -> Any:
        alive.append(len(sessions))
        sessions.add(made := original(*arguments, **options))
        return made

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["y"]),
        helper.make_node("MatMul", ["y", "b"], ["z"]),
        helper.make_node("MatMul", ["z", "c"], ["w"]),
    ]
    with Parted(engine).open(model_of(nodes, ["w"], ("a", "b", "c"))) as run:
        run(feed())
    assert alive == [0, 0, 0]


@pytest.mark.usefixtures("tight")
def test_layers_of_a_large_model_that_cannot_run_in_parts_run_alone(tmp_path) -> None:
    nodes = [
        helper.make_node("SequenceConstruct", ["x", "a"], ["s"]),
        helper.make_node("MatMul", ["x", "b"], ["y"]),
        helper.make_node("ConcatFromSequence", ["s"], ["z"], axis=0),
        helper.make_node("Concat", ["z", "y"], ["w"], axis=0),
    ]
    with compress(model_of(nodes, ["w"], ("a", "b")).proto, 0.8) as result:
        validation = result.report.validation
    assert validation.engine.startswith("layers alone")
    assert [output.name for output in validation.alone] == ["layer b"]
    assert any("in parts cannot run the input model" in note for note in validation.notes)
