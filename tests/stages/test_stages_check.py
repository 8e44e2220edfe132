import builtins
from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, numpy_helper

from decoders import decoder
from onnx_lowrank.core.outcome import OutputError, Trial
from onnx_lowrank.engines.compare import Comparison, compare
from onnx_lowrank.engines.engine import RejectedError, Source, UnsupportedError, one_line
from onnx_lowrank.engines.id_limits import id_limits
from onnx_lowrank.engines.inputs import read, specs
from onnx_lowrank.engines.made import make
from onnx_lowrank.engines.reference import Reference
from onnx_lowrank.engines.running import calibrating_engine
from onnx_lowrank.engines.runtime import Runtime, runtime
from onnx_lowrank.errors import InputError, ValidationError
from onnx_lowrank.files.load import Model, load
from onnx_lowrank.stages.check import Measured, validate
from tiny import built, decaying

HEADER = '<ir_version: 10, opset_import: ["": 21]>'


def parse(body: str, header: str = HEADER) -> onnx.ModelProto:
    return onnx.parser.parse_model(header + body)


def model(body: str, header: str = HEADER) -> Model:
    return load(parse(body, header))


def never(layer: str):
    raise AssertionError(f"{layer} should not run alone")


def scaled(factor: float, dtype: str = "float") -> Model:
    return model(
        f"g ({dtype}[N, 4] x) => ({dtype}[N, 4] y) <{dtype} s = {{{factor}}}> {{ [mul] y = Mul(x, s) }}"
    )


def feed(m: Model, **shapes):
    return next(iter(make(m.proto, specs(m.proto), shapes)))


class TestWholeModels:
    def test_equal_models(self):
        result = validate(scaled(2.0), scaled(2.0), {}, alone=never)
        assert result.engine == "ONNX Runtime CPUExecutionProvider"
        (output,) = result.outputs
        assert (output.name, output.relative, output.largest, output.agreement) == ("y", 0.0, 0.0, 1.0)
        assert (result.never_ran, result.notes, result.worst) == ((), (), 0.0)
        assert "made from the graph: x float32 4×4" in result.inputs

    def test_relative_error_of_a_scaled_output(self):
        result = validate(scaled(2.0), scaled(1.5), {}, alone=never)
        assert result.worst == pytest.approx(0.25, abs=1e-7)

    def test_given_inputs(self, tmp_path):
        np.savez(tmp_path / "in.npz", x=np.full((3, 4), 2, np.float32))
        result = validate(scaled(2.0), scaled(1.5), {}, alone=never, inputs=tmp_path / "in.npz")
        assert result.outputs[0].largest == pytest.approx(1.0)
        assert result.inputs == "given: x float32 3×4"

    @pytest.mark.parametrize(("bound", "fails"), [(0.2, True), (0.26, False), (0.0, True)])
    def test_max_error(self, bound, fails):
        if not fails:
            assert validate(scaled(2.0), scaled(1.5), {}, alone=never, max_error=bound).worst < bound
            return
        with pytest.raises(ValidationError, match=r"'y' is 0\.25, above --max-error"):
            validate(scaled(2.0), scaled(1.5), {}, alone=never, max_error=bound)

    @pytest.mark.parametrize(
        ("outputs", "name"),
        [
            ("float[0, 4] y", None),
            ("float[N, 4] y, float[0, 4] z", "z"),
            ("float[0, 4] z, float[N, 4] y", "z"),
        ],
    )
    def test_a_bound_needs_elements_in_every_output(self, outputs, name):
        body = "{ i = Constant <value_ints = [0]> () z = Slice (x, i, i, i) y = Abs (x) }"
        if name is None:
            body = body.replace("z = Slice", "y = Slice").replace(" y = Abs (x)", "")
        sliced = model(f"g (float[N, 4] x) => ({outputs}) {body}")
        result = validate(sliced, sliced, {}, alone=never)
        assert result.worst == (None if name is None else 0.0)
        with pytest.raises(
            ValidationError, match=f"'{name or 'y'}' has no relative error .It has no elements"
        ):
            validate(sliced, sliced, {}, alone=never, max_error=10)

    @pytest.mark.parametrize("equal", [True, False])
    def test_texts_keep_a_bound_where_they_are_equal(self, equal):
        texts = [
            model(f'g () => (string[1] y) {{ y = Constant <value_strings = ["{t}"]> () }}') for t in "ab"
        ]
        if equal:
            assert validate(texts[0], texts[0], {}, alone=never, max_error=0.0).worst is None
            return
        with pytest.raises(ValidationError, match=r"'y' has no relative error .It holds texts"):
            validate(*texts, {}, alone=never, max_error=10)

    def test_equal_models_meet_a_bound_of_zero(self):
        assert validate(scaled(2.0), scaled(2.0), {}, alone=never, max_error=0.0).worst == 0.0

    @pytest.mark.parametrize("factor", ["inf", "nan"])
    def test_new_nan_and_inf(self, factor):
        bad = scaled(1.0)
        proto = _copy(bad.proto)
        proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.float32(factor), "s"))
        with pytest.raises(ValidationError, match="NaN or Inf in 16 of 16 elements of 'y'"):
            validate(scaled(1.0), load(proto), {}, alone=never)

    def test_compressed_fails_in_the_runtime(self):
        bad = model(
            "g (float[N, 4] x) => (float[A, B] y) <int64[2] s = {7, 9}> { z = Reshape(x, s) y = Abs(z) }"
        )
        with pytest.raises(ValidationError, match="rejects the compressed one"):
            validate(scaled(1.0), bad, {}, alone=never)

    def test_compressed_fails_in_the_checker(self):
        bad = model("g (float[2, 4] x) => (float[2, 4] y) { y = Relu(x, x) }")
        good = model("g (float[2, 4] x) => (float[2, 4] y) { y = Relu(x) }")
        with pytest.raises(ValidationError, match="ONNX checker rejects the compressed model"):
            validate(good, bad, {}, alone=never)

    def test_checker_rejects_both_alike(self):
        proto = scaled(1.0).proto
        bad = _copy(proto)
        bad.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 5
        result = validate(load(bad), load(bad), {}, alone=never)
        assert "rejects the input model, and so the compressed one" in result.notes[0]
        assert result.worst == 0.0

    def test_checker_names_other_nodes_in_the_chain(self):
        ours = "g (bfloat16[1, 1, 4, 4] x, bfloat16[1, 1, 1, 1] k) => (bfloat16[1, 1, 4, 4] y) {"
        original = model(ours + "[conv] y = Conv(x, k) }")
        chain = model(ours + "[conv_encode] z = Conv(x, k) [conv_decode] y = Conv(z, k) }")
        result = validate(original, chain, {}, alone=never)
        assert "so the compressed one" in result.notes[0]

    def test_external_data(self, tmp_path):
        weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
        proto = parse("g (float[N, 64] x) => (float[N, 64] y) <float[64, 64] w = {0}> { y = MatMul(x, w) }")
        proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w"))
        onnx.save(
            _copy(proto), tmp_path / "m.onnx", save_as_external_data=True, size_threshold=0, location="m.bin"
        )
        external = load(tmp_path / "m.onnx")
        assert external.files
        assert validate(external, load(proto), {}, alone=never).worst == 0.0
        with pytest.raises(ValidationError) as caught:
            validate(external, replace(external, proto=_broken(external.proto), path=None), {}, alone=never)
        assert str(tmp_path.parent.parent.parent) not in str(caught.value)

    def test_model_without_inputs(self):
        constant = model("g () => (float[2] y) { y = Constant<value_floats = [1.0, 2.0]>() }")
        assert validate(constant, constant, {}, alone=never).inputs == "the model has none"


def _copy(proto: onnx.ModelProto) -> onnx.ModelProto:
    return onnx.ModelProto.FromString(proto.SerializeToString())


def _broken(proto: onnx.ModelProto) -> onnx.ModelProto:
    copy = _copy(proto)
    copy.graph.node[0].op_type = "NoSuchOperator"
    return copy


class TestEngines:
    def test_unknown_provider(self):
        with pytest.raises(InputError, match=r"'NoSuchProvider'.*CPUExecutionProvider"):
            validate(scaled(1.0), scaled(1.0), {}, alone=never, provider="NoSuchProvider")

    def test_runtime_missing(self, monkeypatch):
        real = builtins.__import__

        def without(name, *arguments):
            if name == "onnxruntime":
                raise ImportError(name)
            return real(name, *arguments)

        monkeypatch.setattr(builtins, "__import__", without)
        with pytest.raises(InputError, match=r"onnx-lowrank\[cpu\] or onnx-lowrank\[gpu\]"):
            runtime("CPUExecutionProvider")

    @pytest.mark.parametrize("dtype", ["bfloat16", "double"])
    def test_reference_where_the_runtime_cannot(self, dtype):
        body = f"g ({dtype}[1, 1, 4, 4] x, {dtype}[1, 1, 3, 3] k) => ({dtype}[1, 1, 2, 2] y) "
        body += "{ y = Conv(x, k) }"
        result = validate(model(body), model(body), {}, alone=never)
        assert result.engine == "onnx ReferenceEvaluator"
        assert "ONNX Runtime CPUExecutionProvider cannot run the input model" in result.notes[-1]
        assert (result.worst, result.outputs[0].largest) == (0.0, 0.0)

    @pytest.mark.parametrize(
        ("inputs", "kind", "advice"),
        [
            (None, "made", "pass --inputs or --input-shape."),
            ({"x": np.zeros((3, 5), ml_dtypes.bfloat16)}, "given", "pass other --inputs."),
        ],
    )
    def test_inputs_on_which_the_reference_fails_are_no_fault_of_it(self, inputs, kind, advice):
        body = "g (bfloat16[N, 5] x) => (bfloat16[2, 2] y) <int64[2] s = {2, 2}> { y = Reshape(x, s) }"
        result = validate(model(body), model(body), {}, alone=never, inputs=inputs)
        assert f"onnx ReferenceEvaluator fails on {kind} inputs" in result.notes[-1]
        assert result.notes[-1].endswith(advice)

    def test_compressed_fails_in_the_reference(self):
        body = "g (bfloat16[2, 3] x) => (bfloat16[2, 3] y) { y = Abs(x) }"
        bad = body.replace("y = Abs", "s = Constant<value_ints = [5, 5]>() z = Reshape(x, s) y = Abs")
        proto = parse(bad.replace("Abs(x)", "Abs(z)"))
        with pytest.raises(ValidationError, match="compressed"):
            validate(model(body), load(proto), {}, alone=never)

    def test_layers_alone(self):
        header = '<ir_version: 10, opset_import: ["": 21, "custom": 1]>'
        unknown = model("g (float[2, 4] x) => (float[2, 4] y) { y = custom.Mystery(x) }", header)
        parts = {"w": (scaled(1.0).proto, scaled(0.5).proto)}
        result = validate(unknown, unknown, {"w": ("n",)}, alone=parts.__getitem__)
        assert result.engine == "layers alone (ONNX Runtime CPUExecutionProvider)"
        assert result.outputs == ()
        assert result.worst is None, "a layer is no output"
        assert [(error.name, error.relative) for error in result.alone] == [("layer w", 0.5)]
        assert len(result.notes) == 2
        for bound in (0.1, 10):
            with pytest.raises(
                ValidationError, match=r"No output of the model could be compared .* be judged"
            ):
                validate(unknown, unknown, {"w": ("n",)}, alone=parts.__getitem__, max_error=bound)

    def test_a_bound_is_not_kept_by_outputs_that_nobody_compared(self):
        header = '<ir_version: 10, opset_import: ["": 21, "custom": 1]>'
        unknown = model("g (float[2, 4] x) => (float[2, 4] y) { y = custom.Mystery(x) }", header)
        assert validate(unknown, unknown, {}, alone=never).worst is None
        with pytest.raises(ValidationError, match=r"cannot be judged.*pass --inputs"):
            validate(unknown, unknown, {}, alone=never, max_error=1e6)

    def test_a_kernel_that_lacks_a_type_only_when_it_runs_is_no_fault_of_the_inputs(self):
        inputs = "double[3, 1, 4] x, double[1, 8, 4] w, double[1, 8, 2] r"
        lstm = model(f"g ({inputs}) => (double[3, 1, 1, 2] y) {{ y = LSTM<hidden_size = 2>(x, w, r) }}")
        rng = np.random.default_rng(0)
        feed = {"x": rng.random((3, 1, 4)), "w": rng.random((1, 8, 4)), "r": rng.random((1, 8, 2))}
        result = validate(lstm, lstm, {}, alone=never, inputs=feed)
        assert result.engine == "onnx ReferenceEvaluator"
        assert "not support" in result.notes[0]
        assert result.worst == 0.0

    def test_layer_that_runs_nowhere_is_noted(self):
        header = '<ir_version: 10, opset_import: ["": 21, "custom": 1]>'
        unknown = model("g (float[2, 4] x) => (float[2, 4] y) { y = custom.Mystery(x) }", header)
        result = validate(unknown, unknown, {"w": ("n",)}, alone=lambda _: (unknown.proto, unknown.proto))
        assert result.outputs == ()
        assert "'w' ran nowhere" in result.notes[-1]

    def test_given_inputs_that_fail(self):
        body = "g (float[N, M] x) => (float[2, 2] y) <int64[2] s = {2, 2}> { y = Reshape(x, s) }"
        inputs = {"x": np.zeros((3, 5), np.float32)}
        with pytest.raises(InputError, match="fails on the given inputs"):
            validate(model(body), model(body), {}, alone=never, inputs=inputs)

    def test_made_inputs_that_fail_lead_to_layers(self):
        body = "g (float[3, 5] x) => (float[A, B] y) <int64[2] s = {2, 2}> { z = Abs(x) y = Reshape(z, s) }"
        proto = parse(body)
        del proto.graph.value_info[:]
        proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "N"
        result = validate(load(proto), load(proto), {}, alone=never)
        assert result.engine == "layers alone (none ran)"
        assert "pass --inputs or --input-shape" in result.notes[0]

    @pytest.mark.parametrize("fixed", [16, 64, 128, 256, 512])
    def test_attempts_find_the_size(self, fixed):
        body = f"g (float[N, L] x) => (float[N, {fixed}] y) <float[{fixed}] s> {{ y = Add(x, s) }}"
        proto = parse(body.replace(" s>", " s = {" + ", ".join(["1"] * fixed) + "}>"))
        assert f"×{fixed}" in validate(load(proto), load(proto), {}, alone=never).inputs

    @pytest.mark.parametrize("root", ["/onnxruntime_src/", "D:\\a\\_work\\1\\s\\"])
    def test_messages_are_one_short_line(self, root):
        source = f"{root}onnxruntime/core/a.h:91 f(int)".replace("/", root[-1])
        noisy = f"[ONNXRuntimeError] : 1 : FAIL : Status Message: {source} " + "bad shape.\n" * 99
        line = one_line(noisy)
        assert line.startswith("Status Message: bad shape.")
        assert "\n" not in line
        assert len(line) == 240


IF = """
g (float[2, 3] x, bool c) => (float[2, 3] y) {
  [if] y = If (c) <
    then_branch = t () => (float[2, 3] a) { [n_then] a = Identity(x) },
    else_branch = e () => (float[2, 3] b) { [n_else] b = Neg(x) }
  >
}
"""
FUNCTION = """
<domain: "local", opset_import: ["": 21]>
f (p) => (q) { [inner] q = Neg(p) }
"""


class TestNeverRan:
    def test_branches(self):
        m = model(IF)
        nodes = {"a": ("n_then",), "b": ("n_else",), "c": ("if",), "d": ("n_else", "n_then")}
        assert validate(m, m, nodes, alone=never).never_ran == ("b",)
        inputs = {"x": np.ones((2, 3), np.float32), "c": np.array(False)}
        assert validate(m, m, nodes, alone=never, inputs=inputs).never_ran == ("a",)

    def test_function(self):
        header = '<ir_version: 10, opset_import: ["": 21, "local": 1]>'
        m = model("g (float[2] x) => (float[2] y) { y = local.f(x) }" + FUNCTION, header)
        assert validate(m, m, {"a": ("inner",), "b": ("nowhere",)}, alone=never).never_ran == ("b",)

    @pytest.mark.parametrize("calls", [1, 3])
    def test_what_functions_run_counts_in_every_call(self, calls):
        header = '<ir_version: 10, opset_import: ["": 21, "local": 1]>'
        lines = " ".join(f"h{n + 1} = local.f(h{n})" for n in range(calls))
        m = model(f"g (float[2] h0) => (float[2] h{calls}) {{ {lines} }}" + FUNCTION, header)
        ran = runtime("CPUExecutionProvider").executed(m, [{"h0": np.ones(2, np.float32)}] * 2)
        assert (ran.count("inner"), ran.count("nowhere")) == (2 * calls, 0)

    def test_unknown_in_the_reference(self):
        m = model(IF.replace("float", "bfloat16"))
        result = validate(m, m, {"a": ("n_then",)}, alone=never)
        assert result.engine == "onnx ReferenceEvaluator"
        assert result.never_ran is None
        assert validate(m, m, {"a": ("if",)}, alone=never).never_ran == ()


class TestMadeInputs:
    @pytest.mark.parametrize(
        ("dtype", "name", "shape", "low", "high"),
        [
            ("float", "x", "4, 5", -9, 9),
            ("float16", "x", "4, 5", -9, 9),
            ("double", "x", "4, 5", -9, 9),
            ("bfloat16", "x", "4, 5", -9, 9),
            ("float", "attention_mask", "4, 5", 1, 1),
            ("int64", "attention_mask", "4, 5", 1, 1),
            ("bool", "flag", "4", 1, 1),
            ("int64", "sr", "", 16000, 16000),
            ("int64", "lengths", "3", 1, 1),
            ("int32", "codes", "3, 50", 0, 1),
            ("uint8", "image", "1, 8, 8, 3", 0, 127),
        ],
    )
    def test_values(self, dtype, name, shape, low, high):
        kind = f"{dtype}[{shape}]" if shape else dtype
        m = model(f"g ({kind} {name}) => ({kind} y) {{ y = Identity({name}) }}")
        value = feed(m)[name]
        assert value.dtype == onnx.helper.tensor_dtype_to_np_dtype(
            m.proto.graph.input[0].type.tensor_type.elem_type
        )
        assert low <= float(value.min()) <= float(value.max()) <= high
        assert value.size < 10 or (value.min() != value.max()) == (low != high)

    def test_deterministic(self):
        assert np.array_equal(feed(scaled(1.0))["x"], feed(scaled(1.0))["x"])

    def test_one_name_one_size(self):
        m = model("g (float[B, 3, H, W] a, float[2, B, 7] s) => (float[B] y) { y = ReduceSum(a) }")
        made = feed(m)
        assert made["a"].shape == (4, 3, 224, 224)
        assert made["s"].shape == (2, 4, 7)

    @pytest.mark.parametrize(
        ("dims", "shape"),
        [
            ("N, C, H, W", (4, 3, 224, 224)),
            ("N, H, W, 3", (4, 224, 224, 3)),
            ("N, C, D, H, W", (4, 3, 32, 32, 32)),
            ("L", (64,)),
            ("N, L", (4, 64)),
            ("1, L", (1, 64)),
            ("", ()),
        ],
    )
    def test_first_shapes(self, dims, shape):
        kind = f"float[{dims}]" if dims else "float"
        m = model(f"g ({kind} x) => (float[A] y) {{ y = Identity(x) }}")
        assert feed(m)["x"].shape == shape

    def test_input_shape_names_dimensions_of_other_inputs(self):
        m = model("g (float[B, L] a, float[B, 7] b) => (float[B] y) { y = ReduceSum(a) }")
        made = feed(m, a=(2, 9))
        assert (made["a"].shape, made["b"].shape) == ((2, 9), (2, 7))

    @pytest.mark.parametrize(
        ("shapes", "message"),
        [
            ({"z": (1,)}, "no input 'z'"),
            ({"x": (2, 5)}, r"'x' has the shape N×4 in the model, which --input-shape 2×5"),
            ({"x": (4,)}, "does not fit"),
            ({"x": (2**28, 4)}, "more than 1 GiB"),
        ],
    )
    def test_bad_input_shapes(self, shapes, message):
        with pytest.raises(InputError, match=message):
            validate(scaled(1.0), scaled(1.0), {}, alone=never, input_shapes=shapes)

    def test_unknown_rank_asks_for_a_shape(self):
        proto = scaled(1.0).proto
        free = _copy(proto)
        free.graph.input[0].type.tensor_type.ClearField("shape")
        with pytest.raises(InputError, match=r"pass one, such as --input-shape x=1,3,224,224\."):
            feed(load(free))
        assert feed(load(free), x=(2, 4))["x"].shape == (2, 4)

    def test_initializers_that_are_inputs_are_not_asked_for(self):
        proto = parse("g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { y = Add(x, w) }")
        proto.graph.input.add().CopyFrom(onnx.helper.make_tensor_value_info("w", TensorProto.FLOAT, [2]))
        assert [spec.name for spec in specs(proto)] == ["x"]

    def test_a_decoder_runs_from_an_empty_past(self):
        proto = decoder()
        result = validate(load(proto), load(proto), {}, alone=never)
        assert result.inputs.endswith(
            "input_ids int64 4×64, attention_mask int64 4×64, position_ids int64 4×64, "
            "past_key_values_0_key float32 4×2×0×8, past_key_values_0_value float32 4×2×0×8"
        )
        assert [(output.name, output.relative) for output in result.outputs] == [
            ("logits", 0.0),
            ("present_0_key", 0.0),
            ("present_0_value", 0.0),
        ]

    def test_sequences_lead_to_layers_alone(self):
        m = model("g (seq(float[2]) s) => (float[2] y) <int64 i = {0}> { y = SequenceAt(s, i) }")
        result = validate(m, m, {}, alone=never)
        assert result.engine.startswith("layers alone")
        assert result.notes == ("No inputs can be made for the input model: the input 's' is no tensor.",)


class TestIdLimits:
    TABLE = "<float[5, 2] t = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10}>"

    @pytest.mark.parametrize(
        "nodes",
        [
            "y = Gather(t, i)",
            "y = Gather<axis = -2>(t, i)",
            "j = Cast<to = 6>(i) y = Gather(t, j)",
            "a = Identity(i) b = Transpose(a) y = Gather(t, b)",
            "u = Identity(t) y = Gather(u, i)",
            "c = Concat<axis = 0>(i, i) y = Gather(t, c)",
        ],
    )
    def test_ids_stay_inside_the_table(self, nodes):
        m = model(f"g (int64[N, L] i) => (float[A, B, C] y) {self.TABLE} {{ {nodes} }}")
        assert id_limits(m.proto) == {"i": 5}
        ids = feed(m)["i"]
        assert (ids.min(), ids.max()) == (0, 4)
        assert validate(m, m, {}, alone=never).engine.startswith("ONNX Runtime")

    def test_the_smallest_table_counts(self):
        m = model(
            f"g (int64[N] i) => (float[A, B] y, float[A] z) {self.TABLE[:-1]}, float[2] u = {{1, 2}}> "
            "{ y = Gather(t, i) z = Gather(u, i) }"
        )
        assert id_limits(m.proto) == {"i": 2}

    def test_in_a_branch_and_in_a_function(self):
        header = '<ir_version: 10, opset_import: ["": 21, "local": 1]>'
        m = model(
            f"""g (int64[3] i, int64[3] k, bool c) => (float[3, 2] y, float[3, 2] z) {self.TABLE} {{
              y = If (c) <then_branch = a () => (float[3, 2] p) {{ p = Gather(t, i) }},
                          else_branch = b () => (float[3, 2] q) {{ q = Gather(t, i) }}>
              z = local.embed(t, k)
            }}
            <domain: "local", opset_import: ["": 21]>
            embed (table, ids) => (rows) {{ rows = Gather(table, ids) }}""",
            header,
        )
        assert id_limits(m.proto) == {"i": 5, "k": 5}

    def test_shape_arithmetic_sets_no_limit(self):
        m = model("g (float[N, 4] x) => (int64 y) <int64 i = {0}> { s = Shape(x) y = Gather(s, i) }")
        assert id_limits(m.proto) == {}


class TestGivenInputs:
    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({}, "lack 'x'"),
            ({"x": np.zeros((2, 4), np.float32), "z": np.zeros(1)}, "no input 'z': name one of x"),
            ({"x": np.zeros((2, 4))}, "'x' is float32 in the model, but float64 was given"),
            ({"x": np.zeros((2, 5), np.float32)}, "'x' has the shape N×4 in the model, but 2×5 was given"),
            ({"x": np.zeros(4, np.float32)}, "but 4 was given"),
        ],
    )
    def test_arrays_that_do_not_fit(self, arrays, message, tmp_path):
        with pytest.raises(InputError, match=message):
            read(arrays, specs(scaled(1.0).proto))
        np.savez(tmp_path / "in.npz", **arrays)
        with pytest.raises(InputError, match=message):
            read(tmp_path / "in.npz", specs(scaled(1.0).proto))

    def test_bfloat16_comes_back_from_a_file(self, tmp_path):
        wanted = specs(parse("g (bfloat16[2] x) => (bfloat16[2] y) { y = Identity(x) }"))
        value = np.array([1, 2], wanted[0].dtype)
        np.savez(tmp_path / "in.npz", x=value)
        assert np.array_equal(read(tmp_path / "in.npz", wanted)["x"], value)

    @pytest.mark.parametrize(
        "content", [b"", b"text", b"PK\x03\x04broken", b"\x93NUMPY\x01\x00", b"\x80\x04N."]
    )
    def test_files_that_are_none(self, content, tmp_path):
        (tmp_path / "in.npz").write_bytes(content)
        with pytest.raises(InputError, match=r"is not an \.npz archive"):
            read(tmp_path / "in.npz", specs(scaled(1.0).proto))

    def test_a_single_array(self, tmp_path):
        np.save(tmp_path / "in.npy", np.zeros(3))
        with pytest.raises(InputError, match=r"is not an \.npz archive"):
            read(tmp_path / "in.npy", specs(scaled(1.0).proto))

    def test_pickles_are_refused(self, tmp_path):
        np.savez(tmp_path / "in.npz", x=np.array([{}], object))
        with pytest.raises(InputError, match="'x' holds pickled objects, which are not read"):
            read(tmp_path / "in.npz", specs(scaled(1.0).proto))

    def test_missing_file_and_folder(self, tmp_path):
        for path in (tmp_path / "none.npz", tmp_path):
            with pytest.raises(InputError, match="cannot be read"):
                read(path, specs(scaled(1.0).proto))


class TestCompare:
    def one(self, y, z):
        (error,) = compare({"y": np.asarray(y)}, {"y": np.asarray(z)}, {})
        return error

    @pytest.mark.parametrize("seed", range(20))
    def test_against_the_definition(self, seed):
        rng = np.random.default_rng(seed)
        y, z = rng.standard_normal((2, 6, 5)).astype(np.float32)
        error = self.one(y, z)
        y, z = y.astype(np.float64), z.astype(np.float64)
        assert error.relative == pytest.approx(np.linalg.norm(y - z) / np.linalg.norm(y), rel=1e-14)
        assert error.largest == np.abs(y - z).max()
        assert error.agreement == sum(y[i].argmax() == z[i].argmax() for i in range(6)) / 6

    @pytest.mark.parametrize(
        ("y", "z", "relative"), [([0.0], [0.0], 0.0), ([0.0], [1.0], float("inf")), ([], [], None)]
    )
    def test_zero_outputs(self, y, z, relative):
        assert self.one(y, z).relative == relative

    def test_large_values_do_not_overflow(self):
        assert self.one(np.float16([60000, 60000]), np.float16([60000, -60000])).relative == pytest.approx(
            2**0.5
        )
        assert self.one(np.float32([3e38]), np.float32([-3e38])).relative == pytest.approx(2.0)

    @pytest.mark.parametrize("shape", [(4,), (3, 1), ()])
    def test_no_classes_no_agreement(self, shape):
        assert self.one(np.ones(shape), np.ones(shape)).agreement is None

    @pytest.mark.parametrize(
        ("y", "z"),
        [([1, 2, 3, 4], [1, 2, 3, 5]), ([True] * 4, [True] * 3 + [False]), (list("abcd"), list("abcx"))],
    )
    def test_exact_types_agree_by_element(self, y, z):
        error = self.one(y, z)
        assert error.agreement == 0.75
        assert (error.relative is None) == (error.largest is None) == isinstance(y[0], str)

    def test_shapes_that_differ(self):
        error = self.one(np.ones((2, 3)), np.ones((4, 3)))
        assert error.relative == float("inf")
        assert "(4, 3)" in error.note

    def test_nothing_but_nan_is_nothing_to_compare(self):
        error = self.one([np.nan, np.inf], [1.0, np.nan])
        assert (error.relative, error.largest) == (None, None)
        assert "2 of 2" in error.note

    def test_nan_of_the_input_model_is_left_out(self):
        error = self.one([1.0, np.nan, np.inf], [2.0, 5.0, np.nan])
        assert (error.relative, error.largest) == (1.0, 1.0)
        assert "2 of 3" in error.note

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_nan_of_the_compressed_model(self, bad):
        with pytest.raises(ValidationError, match="1 of 2 elements of 'y'"):
            self.one([1.0, 2.0], [1.0, bad])

    def test_sequences_maps_and_optionals(self):
        ours = {"s": [np.ones(2), np.ones(3)], "m": [{1: 0.5}, {2: 1.0}], "o": None}
        theirs = {"s": [np.ones(2), 2 * np.ones(3)], "m": [{1: 0.25}, {2: 1.0}], "o": None}
        errors = {error.name: error.relative for error in compare(ours, theirs, {})}
        assert errors == {"s[0]": 0.0, "s[1]": 1.0, "m[0][1]": 0.5, "m[1][2]": 0.0}

    def test_maps_from_the_same_keys_are_rows_of_one_output(self):
        ours = {"m": [{"a": 3.0, "b": 4.0}, {"a": 0.0, "b": 0.0}]}
        theirs = {"m": [{"b": 4.0, "a": 3.0}, {"a": 5.0, "b": 0.0}]}
        (error,) = compare(ours, theirs, {})
        assert (error.name, error.relative, error.largest) == ("m", 1.0, 5.0)

    def test_sequences_of_other_length(self):
        errors = compare({"s": [np.ones(2)]}, {"s": [np.ones(2), np.ones(2)]}, {})
        assert [error.relative for error in errors] == [0.0, float("inf")]
        assert errors[-1].note == "It has 2 elements, the input model's 1."


class TestCentred:
    """‖y − ŷ‖ / ‖y − ȳ‖, ȳ the mean over samples."""

    def of(self, feeds, ys, zs):
        comparison = Comparison()
        for x, y, z in zip(feeds, ys, zs, strict=True):
            comparison.add({"y": y}, {"y": z}, {"x": x})
        (error,) = comparison.errors()
        return error

    def drawn(self, seed, shape=(12, 3, 4)):
        rng = np.random.default_rng(seed)
        y = rng.standard_normal(shape) + 1e4 * rng.standard_normal(shape[1:])
        return y, y + 0.1 * rng.standard_normal(shape)

    def wanted(self, y, z):
        return np.linalg.norm(z - y) / np.linalg.norm(y - y.mean(axis=0))

    @pytest.mark.parametrize("size", [1, 2, 5, 12])
    @pytest.mark.parametrize("seed", range(5))
    def test_batches_make_no_difference(self, seed, size):
        y, z = self.drawn(seed)
        parts = [slice(n, n + size) for n in range(0, 12, size)]
        error = self.of([np.zeros(len(y[p])) for p in parts], [y[p] for p in parts], [z[p] for p in parts])
        assert error.centred == pytest.approx(self.wanted(y, z), rel=1e-9)
        assert error.relative == pytest.approx(np.linalg.norm(z - y) / np.linalg.norm(y), rel=1e-9)
        assert error.centred > 100 * error.relative

    @pytest.mark.parametrize("seed", range(5))
    def test_outputs_without_a_batch_axis_are_a_sample_each(self, seed):
        y, z = self.drawn(seed)
        error = self.of([np.zeros(7)] * 12, y, z)
        assert error.centred == pytest.approx(self.wanted(y, z), rel=1e-9)

    def test_complex_outputs(self):
        y, z = self.drawn(0)
        turned = self.of([np.zeros(12)], [y * 1j], [z * 1j])
        assert turned.centred == pytest.approx(self.wanted(y, z), rel=1e-9)

    @pytest.mark.parametrize("size", [1, 5, 12])
    @pytest.mark.parametrize("hidden", [(slice(None), 0), (0, 0), (slice(1, 8), 2), (11, slice(None))])
    def test_what_is_not_finite_in_the_input_model_is_left_out(self, hidden, size):
        y, z = self.drawn(1)
        y[hidden] = -np.inf
        parts = [slice(n, n + size) for n in range(0, 12, size)]
        error = self.of([np.zeros(len(y[p])) for p in parts], [y[p] for p in parts], [z[p] for p in parts])
        gaps = np.where(np.isfinite(y), y, np.nan)
        seen = np.isfinite(gaps)
        mean = np.sum(np.where(seen, gaps, 0), axis=0) / np.maximum(seen.sum(axis=0), 1)
        lost, varying = (np.linalg.norm(a[seen]) for a in (z - gaps, gaps - mean))
        assert error.centred == pytest.approx(lost / varying, rel=1e-9)

    @pytest.mark.parametrize(
        "ys",
        [
            [np.ones((1, 3))],
            [np.ones((4, 3))],
            [np.full((4, 3), 0.1), np.full((2, 3), 0.1)],
            [np.arange(12).reshape(4, 3)],
            [np.arange(12).reshape(4, 3) > 5],
            [np.array([["a"], ["b"]])],
            [np.arange(12.0).reshape(4, 3), np.arange(10.0).reshape(2, 5)],
            [np.zeros((0, 3))],
        ],
        ids=["one", "constant", "batches", "integers", "booleans", "texts", "shapes", "empty"],
    )
    def test_what_does_not_vary_or_has_no_norm_has_none(self, ys):
        error = self.of([np.zeros(len(y)) for y in ys], ys, ys)
        assert error.centred is None
        assert error.is_exact == (ys[0].dtype.kind in "ibU")

    def test_a_trial_counts_no_integers_and_centres_where_it_can(self):
        floats, whole = OutputError("y", 0.1, 1.0, 0.9, centred=0.4), OutputError("i", 7.0, 7.0, 0.5)
        whole = replace(whole, is_exact=True)
        assert Trial("a", 0.5, outputs=(floats, whole)).error == 0.4
        assert Trial("a", 0.5, outputs=(floats, whole)).agreement == 0.5
        assert Trial("a", 0.5, outputs=(replace(floats, centred=None), whole)).error == 0.1
        assert Trial("a", 0.5, outputs=(whole,)).error is None
        cache = replace(floats, name="present", centred=0.9)
        assert Trial("a", 0.5, outputs=(floats, cache)).error == 0.9
        assert Trial("a", 0.5, outputs=(floats, cache), caches=frozenset({"present"})).error == 0.4


def test_what_was_measured_on_more_inputs_is_judged():
    known = (OutputError("y", 0.25, 1.0, None),)
    feeds = ({"x": np.ones((1, 4), np.float32)},)
    given = {"measured": Measured(known, feeds, "80 inputs")}
    result = validate(scaled(2.0), scaled(1.5), {}, alone=never, **given)
    assert (result.outputs, result.inputs) == (known, "80 inputs")
    with pytest.raises(ValidationError, match=r"The relative error of 'y' is 0\.25"):
        validate(scaled(2.0), scaled(1.5), {}, alone=never, max_error=0.2, **given)


BRANCHES = """g (bool[1] k, float[1,4] x) => (float[1,4] y) { y = If (k) <
    then_branch = t () => (float[1,4] p) { [a] p = Abs (x) },
    else_branch = e () => (float[1,4] q) { [b] q = Neg (x) }> }"""


@pytest.mark.parametrize(("ks", "silent"), [((True,), ("b",)), ((False, False), ("a",)), ((True, False), ())])
def test_all_inputs_that_were_measured_show_what_runs(ks, silent):
    m = model(BRANCHES)
    feeds = tuple({"k": np.array([k]), "x": np.ones((1, 4), np.float32)} for k in ks)
    measured = Measured((OutputError("y", 0.0, 0.0, None),), feeds, "all")
    result = validate(m, m, {"a": ("a",), "b": ("b",)}, alone=never, measured=measured)
    assert result.never_ran == silent
    assert bool(result.notes) == bool(silent)


def test_what_cannot_run_in_the_runtime_runs_in_the_reference_implementation():
    floats, doubles = (
        model(f"g ({t}[N,2,4,4] x) => ({t}[N,2,2,2] y) <{t}[2,2,3,3] w = {{{', '.join(['1.0'] * 36)}}}>"
              " { y = Conv (x, w) }")
        for t in ("float", "double")
    )  # fmt: skip
    feeds = [{"x": np.ones((1, 2, 4, 4), dtype)} for dtype in (np.float32, np.float64)]
    engine, outputs = calibrating_engine(floats, feeds[0], "CPUExecutionProvider")
    assert isinstance(engine, Runtime)
    assert outputs["y"].ravel().tolist() == [18.0] * 8
    engine, outputs = calibrating_engine(doubles, feeds[1], "CPUExecutionProvider")
    assert isinstance(engine, Reference)
    assert outputs["y"].ravel().tolist() == [18.0] * 8


def test_inputs_on_which_the_model_fails_are_left_to_the_statistics():
    engine, outputs = calibrating_engine(
        scaled(2.0), {"x": np.ones((1, 5), np.float32)}, "CPUExecutionProvider"
    )
    assert isinstance(engine, Runtime)
    assert outputs is None


def test_a_model_that_nothing_runs_is_refused():
    odd = model(
        "g (float[N,4] x) => (float[N,4] y) { y = odd.Op (x) }",
        '<ir_version: 10, opset_import: ["": 21, "odd": 1]>',
    )
    with pytest.raises(InputError, match=r"--calibration has to run the model, and ONNX Runtime.* cannot"):
        calibrating_engine(odd, {"x": np.ones((1, 4), np.float32)}, "CPUExecutionProvider")


@pytest.mark.parametrize("path", ["in.onnx", "./in.onnx"])
def test_a_message_keeps_its_dots(path):
    assert one_line("Node 'a.b' in in.onnx fails", Source(path)).startswith("Node 'a.b' in ")


# --- models that are run again and again -----------------------------------------------------------


@pytest.fixture
def pooled():
    """A model, and inputs for it."""
    text = f"{HEADER} g (float[2, 8] x) => (float[2, 4] y) {{ y = MatMul (x, w) }}"
    proto = built(text, {"w": decaying(1, 8, 4)})
    return proto, {"x": np.ones((2, 8), np.float32)}


@pytest.mark.parametrize("threads", [0, 1, 2])
def test_a_model_that_is_ready_runs_as_often_as_one_likes(pooled, threads):
    proto, feed = pooled
    engine = runtime("CPUExecutionProvider")
    with engine.open(load(proto)) as run:
        expected = run(feed)["y"]
    with engine.ready(load(proto), feed, threads) as again:
        for _ in range(3):
            assert np.array_equal(again()["y"], expected)


def test_many_models_are_ready_at_the_same_time(pooled):
    proto, feed = pooled
    engine = runtime("CPUExecutionProvider")
    with engine.ready(load(proto), feed, 1) as one, engine.ready(load(proto), feed, 1) as other:
        assert np.array_equal(one()["y"], other()["y"])


@pytest.mark.parametrize("threads", [0, 1, 5])
def test_a_model_is_ready_with_the_threads_that_were_asked_for(pooled, threads, monkeypatch):
    proto, feed = pooled
    engine = runtime("CPUExecutionProvider")
    seen = []
    session = Runtime._session

    def recorded(self, source, options):
        seen.append(options.intra_op_num_threads)
        return session(self, source, options)

    monkeypatch.setattr(Runtime, "_session", recorded)
    with engine.ready(load(proto), feed, threads):
        assert seen == [threads]


def test_a_model_that_the_runtime_does_not_accept_is_never_ready(pooled):
    proto, feed = pooled
    proto.graph.node[0].op_type = "NoSuchOperator"
    engine = runtime("CPUExecutionProvider")
    with pytest.raises(UnsupportedError), engine.ready(load(proto), feed, 1):
        pass


def test_inputs_that_do_not_fit_are_told_when_the_model_runs(pooled):
    proto, _ = pooled
    engine = runtime("CPUExecutionProvider")
    with (
        engine.ready(load(proto), {"x": np.ones((3, 8), np.float32)}, 1) as run,
        pytest.raises(RejectedError),
    ):
        run()
