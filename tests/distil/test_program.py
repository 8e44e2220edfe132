"""ONNX graphs as programs in PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import ModelProto, numpy_helper

from differentiating import OWN, drawn, made, model
from onnx_lowrank.distil.forms import FORMS
from onnx_lowrank.distil.program import Program, Step, lacking, program
from rewriting import DTYPES

LAYERS = """g (float[4, 12] x) => (float[4, 12] y) {
  a = MatMul (x, w1)
  b = Tanh (a)
  c = MatMul (b, w2)
  d = Tanh (c)
  y = MatMul (d, w3)
}"""
WEIGHTS = {"w1": (12, 12), "w2": (12, 12), "w3": (12, 12)}


def stored(text: str, opset: int = 17, functions: str = "", **weights: Any) -> ModelProto:
    proto = model(text, opset, functions)
    proto.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    return proto


def tensors(**arrays: np.ndarray) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array.copy()).requires_grad_() for name, array in arrays.items()}


def runtime(proto: ModelProto, feed: dict[str, Any]) -> list[np.ndarray]:
    return onnxruntime.InferenceSession(proto.SerializeToString()).run(None, feed)


def test_outputs_are_those_of_the_runtime_and_weights_have_gradients() -> None:
    weights, feed = drawn(**WEIGHTS), drawn(1, x=(4, 12))
    proto, trained = stored(LAYERS, **weights), tensors(**weights)
    runs = made(proto)
    (output,) = runs(feed, trained).values()
    np.testing.assert_allclose(output.detach().numpy(), *runtime(proto, feed), rtol=1e-5, atol=1e-5)
    output.square().sum().backward()
    assert all(tensor.grad is not None and tensor.grad.abs().max() > 0 for tensor in trained.values())
    assert not runs.stops


def test_a_trained_tensor_takes_the_place_of_a_constant() -> None:
    weights, feed = drawn(**WEIGHTS), drawn(1, x=(4, 12))
    runs, other = made(stored(LAYERS, **weights)), drawn(2, w2=(12, 12))
    with torch.no_grad():
        runs(feed, {})
        got = runs(feed, tensors(**other))["y"]
    wanted = runtime(stored(LAYERS, **{**weights, **other}), feed)
    np.testing.assert_allclose(got.numpy(), *wanted, rtol=1e-5, atol=1e-5)


def test_a_tensor_changed_in_place_is_read_anew() -> None:
    proto = stored(
        "g (float[4, 12] x) => (float[4, 12] y) { t = Transpose (w) y = MatMul (x, t) }", **drawn(w=(12, 12))
    )
    runs, feed, (weight,) = made(proto), drawn(1, x=(4, 12)), tensors(**drawn(w=(12, 12))).values()
    with torch.no_grad():
        first = runs(feed, {"w": weight})["y"].clone()
        weight *= 2
        second = runs(feed, {"w": weight})["y"]
    assert torch.allclose(second, 2 * first)


def test_known_values_need_nothing_before_them() -> None:
    weights, feed = drawn(**WEIGHTS), drawn(1, d=(4, 12))
    runs = program(stored(LAYERS, **weights), ["y"], known=["d"])
    assert [step.node.op_type for step in runs.steps] == ["MatMul"]
    with torch.no_grad():
        got = runs(feed, {})["y"]
    np.testing.assert_allclose(got.numpy(), feed["d"] @ weights["w3"], rtol=1e-5, atol=1e-5)


def test_a_known_value_stays_where_its_node_runs_for_another_output() -> None:
    proto = model(
        "g (float[2, 8] x) => (float[2, 8] y) { a, b = Split <axis = 1> (x) y = Concat <axis = 1> (a, b) }",
        13,
    )
    runs = program(proto, ["y"], known=["a"])
    with torch.no_grad():
        got = runs({"x": np.ones((2, 8), np.float32), "a": np.zeros((2, 4), np.float32)}, {})["y"]
    assert got.tolist() == [[0] * 4 + [1] * 4] * 2


@pytest.mark.parametrize("cuts", [{"b"}, {"d"}, {"b", "d"}])
def test_gradients_are_the_same_when_inner_values_are_computed_again(cuts: set[str]) -> None:
    weights, feed = drawn(**WEIGHTS), drawn(1, x=(4, 12))
    found = []
    for names in (frozenset(), frozenset(cuts)):
        runs, trained = made(stored(LAYERS, **weights)), tensors(**weights)
        runs.cuts = names
        for _ in range(2):  # Values that are kept change nothing.
            output = runs(feed, trained)["y"]
            output.square().sum().backward()
        found.append([tensor.grad for tensor in trained.values()])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_bytes_of_all_values_are_counted() -> None:
    weights = drawn(**WEIGHTS)
    runs = made(stored(LAYERS, **weights))
    with torch.no_grad():
        runs(drawn(x=(4, 12)), {})
        assert runs.taken == 5 * 4 * 12 * 4
        runs(drawn(x=(9, 12)), {})
        runs(drawn(x=(4, 12)), {})
    assert runs.taken == 5 * 9 * 12 * 4


def test_the_operator_is_named_at_which_a_gradient_stops() -> None:
    proto = model(
        "g (float[4, 12] x) => (float[4, 12] y, bool[9, 9] z) { h = Det (v) y = Mul (x, h) z = IsInf (v) }"
    )
    proto.graph.initializer.append(numpy_helper.from_array(np.eye(9, dtype=np.float32), "v"))
    runs = made(proto)
    outputs = runs(drawn(x=(4, 12)), tensors(v=np.eye(9, dtype=np.float32)))
    assert not outputs["y"].requires_grad
    assert runs.stops == {"Det"}, "a truth value has no gradient that could stop"


BRANCH = """g (float[4, 12] x, bool c) => (float[4, 12] y) {
  a = MatMul (x, w)
  y = If (c) <
    then_branch = t () => (float[4, 12] p) { p = Add (a, b) },
    else_branch = e () => (float[4, 12] q) { q = Neg (a) }
  >
}"""
ROUNDS = """g (float[4, 12] x, bool c) => (float[4, 12] y) {
  n = Constant <value_int = 3> ()
  a = MatMul (x, w)
  y = Loop (n, c, x) <body = l (int64 i, bool p, float[4, 12] h) => (bool o, float[4, 12] z) {
    o = Identity (p)
    s = Add (h, a)
    z = Mul (s, b)
  }>
}"""


@pytest.mark.parametrize(("text", "stop"), [(BRANCH, "If"), (ROUNDS, "Loop")])
@pytest.mark.parametrize("condition", [True, False])
def test_bodies_run_with_what_they_take_from_outside(text: str, stop: str, condition: bool) -> None:
    weights = drawn(w=(12, 12), b=(12,))
    proto, feed = stored(text, **weights), {**drawn(1, x=(4, 12)), "c": np.array(condition)}
    runs = made(proto)
    got = runs(feed, tensors(w=weights["w"]))["y"]
    np.testing.assert_allclose(got.detach().numpy(), *runtime(proto, feed), rtol=1e-5, atol=1e-5)
    assert runs.stops == {stop}


def test_functions_of_the_model_are_inlined() -> None:
    functions = '<domain: "local", opset_import: ["" : 17]> Twice (a) => (b) { b = Add (a, a) }'
    proto = model(
        "g (float[4, 12] x) => (float[4, 12] y) { h = local.Twice (x) y = Exp (h) }", functions=functions
    )
    assert lacking(proto) == []
    with torch.no_grad():
        got = made(proto)(feed := drawn(x=(4, 12)), {})["y"]
    np.testing.assert_allclose(got.numpy(), np.exp(2 * feed["x"]), rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_computes_in_single_precision(dtype: str) -> None:
    text = f"""g ({dtype}[4, 12] x) => ({dtype}[4, 12] y, {dtype}[4, 12] z) {{
      t = Mul (s, s)
      h = MatMul (x, w)
      y = Mul (h, t)
      f = Cast <to = 1> (h)
      g = Mul (f, r)
      z = Cast <to = {10 if dtype == "float16" else 16}> (g)
    }}"""
    weight = drawn(w=(12, 12))["w"]
    proto, feed = model(text, 22), drawn(1, x=(4, 12))
    weight, feed["x"] = (array.astype(DTYPES[dtype]) for array in (weight, feed["x"]))
    proto.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    proto.graph.initializer.append(numpy_helper.from_array(np.array(0.5, DTYPES[dtype]), "s"))
    proto.graph.initializer.append(numpy_helper.from_array(np.array(3, np.float32), "r"))
    with torch.no_grad():
        got = made(proto)(feed, {})
    product = feed["x"].astype(np.float64) @ weight.astype(np.float64)
    assert {value.dtype for value in got.values()} == {torch.float32}
    np.testing.assert_allclose(got["y"].numpy(), product / 4, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got["z"].numpy(), product * 3, rtol=1e-5, atol=1e-5)


def test_whole_numbers_and_truth_values_stay_what_they_are() -> None:
    text = """g (float[4, 12] x) => (int64[4] i, bool[4, 12] b, int32[4, 12] c, int64[2] s) {
      i = ArgMax <axis = 1, keepdims = 0> (x)
      b = Greater (x, zero)
      c = Cast <to = 6> (x)
      s = Shape (x)
    }"""
    proto = stored(text, zero=np.float32(0))
    with torch.no_grad():
        got = made(proto)({}, tensors(**drawn(x=(4, 12))))
    assert [value.dtype for value in got.values()] == [torch.int64, torch.bool, torch.int32, torch.int64]
    wanted = runtime(proto, drawn(x=(4, 12)))
    for one, other in zip(got.values(), wanted, strict=True):
        np.testing.assert_array_equal(one.numpy(), other)


def test_scalars_and_short_vectors_meet_tensors() -> None:
    text = """g (float[4, 12] x) => (float[4, 12] y) {
      n = Shape (x)
      f = Cast <to = 1> (n)
      r = Sqrt (f)
      one = Constant <value_ints = [1]> ()
      k = Gather (r, one)
      d = Div (x, k)
      y = Add (d, b)
    }"""
    weights, feed = drawn(b=(12,)), drawn(1, x=(4, 12))
    with torch.no_grad():
        got = made(stored(text, **weights))(feed, {})["y"]
    np.testing.assert_allclose(got.numpy(), feed["x"] / np.sqrt(12) + weights["b"], rtol=1e-5)


RESHAPED = """g (float[N, 12] x) => (float[2, M, 12] y) {
  s = Shape (x)
  zero = Constant <value_ints = [0]> ()
  two = Constant <value_ints = [2]> ()
  last = Constant <value_ints = [12]> ()
  n = Gather (s, zero)
  m = Div (n, two)
  t = Concat <axis = 0> (two, m, last)
  e = ConstantOfShape <value = float {0.5}> (t)
  w = Transpose (v)
  p = MatMul (x, w)
  r = Reshape (p, t)
  y = Add (r, e)
}"""


def test_what_follows_from_shapes_and_constants_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ran, computed = list[str](), Program._computed

    def recorded(self: Program, step: Step, operands: Any) -> Any:
        ran.append(step.node.op_type)
        return computed(self, step, operands)

    monkeypatch.setattr(Program, "_computed", recorded)
    weight = drawn(v=(12, 12))
    runs = made(stored(RESHAPED, **weight))
    seen = []
    for rows in (4, 4, 6, 4, 4):
        ran.clear()
        feed = drawn(rows, x=(rows, 12))
        with torch.no_grad():
            got = runs(feed, {})["y"]
        np.testing.assert_allclose(
            got.numpy().reshape(rows, 12), feed["x"] @ weight["v"].T + 0.5, rtol=1e-4, atol=1e-5
        )
        seen.append(sorted(ran))
    always, shapes = ["Add", "MatMul", "Reshape", "Shape"], ["Concat", "ConstantOfShape", "Div", "Gather"]
    every = sorted([*always, *shapes])
    assert seen == [sorted([*every, "Transpose"]), always, every, every, always]


def test_a_feed_changed_in_place_is_read_anew() -> None:
    proto = model("g (int64[2] x, float[9, 9] z) => (float[a, b] y) { s = Abs (x) y = Reshape (z, s) }")
    runs, sizes, values = made(proto), np.array([9, 9]), drawn(z=(9, 9))
    for shape in ((9, 9), (3, 27)):
        sizes[:] = shape
        with torch.no_grad():
            assert runs({"x": sizes, **values}, {})["y"].shape == shape


def test_random_numbers_are_drawn_anew() -> None:
    runs = made(model("g () => (float[99] y) { y = RandomNormal <shape = [99]> () }"))
    assert not torch.equal(runs({}, {})["y"], runs({}, {})["y"])


def test_operators_that_nothing_runs_are_named() -> None:
    text = f"""g (float[4, 12] x) => (float[4, 12] y) {{
      a = {OWN}.Unheard (x)
      b = {OWN}.Unheard (a)
      c = {OWN}.QuickGelu (b)
      d = Det (c)
      y = local.Other (d)
    }}"""
    proto = model(text)
    assert lacking(proto) == [f"{OWN}.Unheard", "local.Other"]
    with pytest.raises(NotImplementedError, match=rf"{OWN}\.Unheard has neither a form nor"):
        made(proto)(drawn(x=(4, 12)), {})


def test_the_reference_runs_a_variant_that_a_form_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(call: Any) -> Any:
        raise NotImplementedError("a variant")

    monkeypatch.setitem(FORMS, ("", "Exp"), refuse)
    runs = made(model("g (float[4, 12] x) => (float[4, 12] y) { y = Exp (x) }"))
    (trained,) = tensors(**drawn(x=(4, 12))).values()
    assert torch.allclose(runs({}, {"x": trained})["y"], trained.detach().exp())
    assert runs.stops == {"Exp"}
