"""Tools that rewrite graphs leave the factors alone: none multiplies them together again."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from follow import MODELS, feed, pairs

from onnx_lowrank import compress

pytestmark = [pytest.mark.toolchains, pytest.mark.filterwarnings("ignore")]

Tool = Callable[[onnx.ModelProto, Path], onnx.ModelProto]


def level(number: int) -> Tool:
    """ONNX Runtime's optimizer at one level, without kernels of a machine."""

    def tool(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel(number)
        options.optimized_model_filepath = os.fspath(folder / "optimized.onnx")
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return onnx.load(folder / "optimized.onnx")

    return tool


def transformers(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """The optimizer of transformers that ONNX Runtime brings."""
    from onnxruntime.transformers import optimizer

    onnx.save(model, folder / "in.onnx")
    return optimizer.optimize_model(
        os.fspath(folder / "in.onnx"), model_type="bert", num_heads=2, hidden_size=32, opt_level=0
    ).model


def preparation(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """What ONNX Runtime recommends before quantization."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    quant_pre_process(model, os.fspath(folder / "prepared.onnx"))
    return onnx.load(folder / "prepared.onnx")


def slim(**options) -> Tool:
    """onnxslim."""

    def tool(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
        import onnxslim

        return onnxslim.slim(model, **options)

    return tool


def simplified(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """onnxsim."""
    import onnxsim

    return onnxsim.simplify(model)[0]


def rewritten(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """The optimizer and the rewriter of onnxscript."""
    from onnxscript import optimizer, rewriter

    return rewriter.rewrite(optimizer.optimize(model))


TOOLS: dict[str, tuple[str, Tool]] = {
    "onnxruntime basic": ("onnxruntime", level(1)),
    "onnxruntime extended": ("onnxruntime", level(2)),
    "onnxruntime all": ("onnxruntime", level(99)),
    "onnxruntime.transformers": ("onnxruntime", transformers),
    "quant_pre_process": ("onnxruntime", preparation),
    "onnxslim": ("onnxslim", slim()),
    # The call of nvidia-modelopt's modelopt/onnx/quantization/quantize.py.
    "modelopt": ("onnxslim", slim(skip_fusion_patterns=["FusionGemm"])),
    "onnxsim": ("onnxsim", simplified),
    "onnxscript": ("onnxscript", rewritten),
}
"""The package and the tool."""


def output(model: onnx.ModelProto, name: str) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feed(name))[0]


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("name", MODELS)
def test_factors_survive(name, tool, tmp_path):
    package, run = TOOLS[tool]
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    build, _ = MODELS[name]
    assert pairs(build()) == 0
    with compress(build(), 0.5) as result:
        made = result.proto
        rewritten_layers = sum(choice.option is not None for choice in result.plan.choices)
    after = run(onnx.ModelProto.FromString(made.SerializeToString()), tmp_path)
    assert pairs(after) == pairs(made) == rewritten_layers
    np.testing.assert_allclose(output(after, name), output(made, name), rtol=1e-4, atol=1e-5)


def test_a_product_of_factors_would_be_noticed():
    build, _ = MODELS["matrices"]
    with compress(build(), 0.5) as result:
        made = result.proto
    (first, second) = made.graph.node[:2]
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in made.graph.initializer}
    product = weights[first.input[1]] @ weights[second.input[1]]
    made.graph.initializer.append(onnx.numpy_helper.from_array(product, "product"))
    before = pairs(made)
    second.input[0], second.input[1] = first.input[0], "product"
    assert pairs(made) == before - 1
