"""The models of `models/`: their builders, and the committed classifier of digits."""

from __future__ import annotations

import sys
from functools import cache
from math import prod
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

MODELS = Path(__file__).parents[1] / "models"
sys.path.insert(0, str(MODELS))

import evaluate_digits  # noqa: E402
import large  # noqa: E402
import zoo  # noqa: E402
from builder import Builder, Parameter  # noqa: E402

DIGITS = MODELS / "digits.onnx"
SMALL = 1 / 8
TRANSFORMERS = ("vit_b_16", "bert_base")
CONVOLUTIONAL = tuple(name for name in zoo.NAMES if name not in TRANSFORMERS)
SEQUENCE = 9

# Learned parameters as torchvision (vgg16_bn: less the 4,224 biases of its convolutions, which its
# BatchNormalization makes redundant), timm and transformers count them; and those that are left when
# BatchNormalization is folded.
LEARNED = {
    "resnet18": (11_689_512, 11_684_712),
    "resnet50": (25_557_032, 25_530_472),
    "mobilenet_v2": (3_504_872, 3_487_816),
    "vgg16": (138_365_992 - 4_224, 138_357_544),
    "vit_b_16": (86_567_656, 86_567_656),
    "bert_base": (109_482_240, 109_482_240),
}


@cache
def small(name: str, dtype: str = "float32", batchnorm: bool = False) -> onnx.ModelProto:
    return zoo.build(name, dtype=dtype, scale=SMALL, batchnorm=batchnorm)


def feeds(name: str, dtype: str = "float32", batch: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    if name != "bert_base":
        return {"image": rng.standard_normal((batch, 3, zoo.IMAGE, zoo.IMAGE)).astype(dtype)}
    shape = (batch, SEQUENCE)
    return {
        "input_ids": rng.integers(0, 3000, shape),
        "attention_mask": np.ones(shape, np.int64),
        "token_type_ids": rng.integers(0, 2, shape),
    }


def run(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, inputs)


def learned(model: onnx.ModelProto) -> int:
    """Elements of float tensors but scalar constants and running statistics."""
    return sum(
        prod(tensor.dims)
        for tensor in model.graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.dims and ".running_" not in tensor.name
    )


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


# --- The zoo -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batchnorm", [True, False])
@pytest.mark.parametrize("name", zoo.NAMES)
def test_parameter_counts_at_full_size_are_those_of_the_literature(name: str, batchnorm: bool) -> None:
    assert learned(zoo.skeleton(name, batchnorm=batchnorm)) == LEARNED[name][0 if batchnorm else 1]


@pytest.mark.parametrize("batchnorm", [True, False])
@pytest.mark.parametrize("name", zoo.NAMES)
def test_built_network_has_the_tensors_of_its_skeleton(name: str, batchnorm: bool) -> None:
    built = small(name, batchnorm=batchnorm).graph
    skeleton = zoo.skeleton(name, scale=SMALL, batchnorm=batchnorm).graph
    assert list(built.node) == list(skeleton.node)
    shapes = [(tensor.name, list(tensor.dims)) for tensor in built.initializer]
    assert shapes == [(tensor.name, list(tensor.dims)) for tensor in skeleton.initializer]


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_every_convolution_has_its_batchnorm_or_a_bias(name: str) -> None:
    unfolded, folded = small(name, batchnorm=True), small(name)
    count = operators(unfolded).count("Conv")
    assert operators(unfolded).count("BatchNormalization") == count
    assert all(len(node.input) == 2 for node in unfolded.graph.node if node.op_type == "Conv")
    assert "BatchNormalization" not in operators(folded)
    assert [len(node.input) for node in folded.graph.node if node.op_type == "Conv"] == [3] * count


@pytest.mark.parametrize("batchnorm", [True, False])
@pytest.mark.parametrize("dtype", zoo.DTYPES)
@pytest.mark.parametrize("name", zoo.NAMES)
def test_model_is_valid_in_every_dtype(name: str, dtype: str, batchnorm: bool) -> None:
    model = small(name, dtype, batchnorm)
    onnx.checker.check_model(model, full_check=True)
    expected = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    assert {tensor.data_type for tensor in model.graph.initializer} - {onnx.TensorProto.INT64} == {expected}
    assert {value.type.tensor_type.elem_type for value in model.graph.output} == {expected}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("batchnorm", [True, False])
@pytest.mark.parametrize("name", zoo.NAMES)
def test_runtime_gives_finite_outputs_of_sensible_size(name: str, batchnorm: bool, dtype: str) -> None:
    model = small(name, dtype, batchnorm)
    outputs = run(model, feeds(name, dtype))
    width = zoo.HEADS * 8
    shapes = [(2, SEQUENCE, width), (2, width)] if name == "bert_base" else [(2, zoo.CLASSES)]
    assert [output.shape for output in outputs] == shapes
    for output in outputs:
        assert output.dtype == dtype
        assert np.isfinite(output).all()
        assert 0.1 < output.astype(np.float64).std() < 10
        assert np.abs(output[0] - output[1]).max() > 0.01


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_reference_evaluator_runs_what_the_runtime_cannot(dtype: str) -> None:
    for output in ReferenceEvaluator(small("bert_base", dtype)).run(None, feeds("bert_base")):
        assert output.dtype == np.dtype(dtype)
        assert np.isfinite(output.astype(np.float64)).all()
        assert 0.1 < output.astype(np.float64).std() < 10


@pytest.mark.parametrize("name", zoo.NAMES)
def test_batch_is_dynamic_and_its_entries_are_independent(name: str) -> None:
    inputs = feeds(name, batch=3)
    together = run(small(name), inputs)
    alone = run(small(name), {key: value[1:2] for key, value in inputs.items()})
    for many, one in zip(together, alone, strict=True):
        np.testing.assert_allclose(many[1:2], one, rtol=1e-3, atol=1e-4)


def test_bert_ignores_masked_tokens() -> None:
    inputs = feeds("bert_base")
    inputs["attention_mask"][:, 6:] = 0
    changed = inputs | {"input_ids": inputs["input_ids"].copy()}
    changed["input_ids"][:, 6:] += 1
    before, after = run(small("bert_base"), inputs)[0], run(small("bert_base"), changed)[0]
    np.testing.assert_allclose(after[:, :6], before[:, :6], rtol=1e-4, atol=1e-5)
    assert np.abs(after[:, 6:] - before[:, 6:]).max() > 0.1


@pytest.mark.parametrize("name", zoo.NAMES)
def test_bytes_depend_on_the_seed_only(name: str) -> None:
    first = zoo.build(name, 1, scale=SMALL).SerializeToString(deterministic=True)
    assert zoo.build(name, 1, scale=SMALL).SerializeToString(deterministic=True) == first
    assert zoo.build(name, 2, scale=SMALL).SerializeToString(deterministic=True) != first


@pytest.mark.parametrize("shape", [(128, 96, 3, 3), (192, 64, 1, 1), (96, 192), (128, 1, 64)])
@pytest.mark.parametrize("seed", range(3))
def test_weights_decay_along_every_axis(shape: tuple[int, ...], seed: int) -> None:
    weight = zoo.decaying(seed, np.float64)(Parameter("weight", shape, 0.3))
    assert weight is not None
    assert weight.shape == shape
    assert np.sqrt(np.mean(weight**2)) == pytest.approx(0.3, rel=0.02)
    gaussian = np.random.default_rng(seed).standard_normal(shape)
    for axis in (axis for axis, n in enumerate(shape) if n > 8):
        assert energy_of_half_rank(weight, axis) > 0.85
        assert energy_of_half_rank(weight, axis) > energy_of_half_rank(gaussian, axis) + 0.05


def energy_of_half_rank(weight: np.ndarray, axis: int) -> float:
    matrix = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    energies = np.linalg.svd(matrix, compute_uv=False) ** 2
    return float(energies[: len(energies) // 2].sum() / energies.sum())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "alexnet"}, "'alexnet'.*resnet18"),
        ({"name": "resnet18", "dtype": "int8"}, "'int8'.*float32"),
        ({"name": "resnet18", "scale": 0.0}, r"scale is 0\.0"),
        ({"name": "resnet18", "scale": 1.5}, r"scale is 1\.5"),
        ({"name": "resnet18", "scale": float("nan")}, "scale is nan"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        zoo.build(**arguments)


def test_builder_refuses_weights_of_another_shape() -> None:
    net = Builder("net", lambda parameter: np.zeros((4, 3), np.float32))
    with pytest.raises(ValueError, match=r"'fc.weight' have shape \(4, 3\)"):
        net.gemm(net.input("x", "batch", 4), "fc", 4, 3)


def test_command_line_writes_what_build_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.onnx"
    options = ["--seed", "3", "--dtype", "float16", "--scale", "0.125", "--batchnorm"]
    monkeypatch.setattr(sys, "argv", ["zoo.py", "resnet18", str(path), *options])
    zoo.main()
    assert onnx.load(path) == zoo.build("resnet18", 3, "float16", scale=0.125, batchnorm=True)


# --- digits.onnx -------------------------------------------------------------------------------------


def test_digits_is_a_valid_small_model_with_unfused_batchnorm() -> None:
    model = onnx.load(DIGITS)
    onnx.checker.check_model(model, full_check=True)
    assert DIGITS.stat().st_size < 1_000_000
    assert 100_000 < learned(model) < 250_000
    count = operators(model)
    assert count.count("BatchNormalization") == count.count("Conv") == 8
    assert {"Relu", "Add", "GlobalAveragePool", "Gemm"} <= set(count)
    strides = [
        attribute.ints[0]
        for node in model.graph.node
        for attribute in node.attribute
        if attribute.name == "strides"
    ]
    assert max(strides) == 2


def test_digits_has_the_accuracy_that_it_claims() -> None:
    accuracy = evaluate_digits.top1(str(DIGITS))
    claims = {entry.key: entry.value for entry in onnx.load(DIGITS).metadata_props}
    assert claims["test_accuracy"] == f"{accuracy:.4f}"
    assert accuracy >= 0.985


def test_digits_are_split_by_class_and_without_overlap() -> None:
    data = evaluate_digits.load()
    assert data.train_images.shape == (1198, 1, 8, 8)
    assert data.test_images.shape == (599, 1, 8, 8)
    assert data.train_images.dtype == np.float32
    assert (data.train_images.min(), data.train_images.max()) == (0, 1)
    shares = np.bincount(data.test_labels) / np.bincount(
        np.concatenate([data.train_labels, data.test_labels])
    )
    np.testing.assert_allclose(shares, 1 / 3, atol=0.005)
    train = {image.tobytes() for image in data.train_images}
    assert not any(image.tobytes() in train for image in data.test_images)


def test_evaluation_prints_one_line_per_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate_digits.py", str(DIGITS), str(DIGITS)])
    evaluate_digits.main()
    assert capsys.readouterr().out == f"{DIGITS}: {evaluate_digits.top1(str(DIGITS)):.4f}\n" * 2


def test_the_large_model_has_the_same_bytes_each_time_and_at_least_the_size_asked_for(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        large.write(tmp_path / name / "m.onnx", 2**20, width=32)
    first, second = (tmp_path / name / "m.onnx.data" for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    assert (tmp_path / "a" / "m.onnx").read_bytes() == (tmp_path / "b" / "m.onnx").read_bytes()
    assert 2**20 <= first.stat().st_size < 2**20 + 2**18
    onnx.checker.check_model(tmp_path / "a" / "m.onnx", full_check=True)


def test_every_fourth_block_of_the_large_model_has_planted_spectra(tmp_path: Path) -> None:
    large.write(tmp_path / "m.onnx", 2**21, width=64)
    model = onnx.load(tmp_path / "m.onnx")
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    shares = []
    for block in range(5):
        sigma = np.linalg.svdvals(weights[f"blocks.{block}.up.weight"])
        shares.append(float(np.sum(sigma[4:] ** 2) / np.sum(sigma**2)))
    assert max(shares[0], shares[4]) < 0.01
    assert min(shares[1:4]) > 0.5


def test_the_large_model_refuses_other_widths(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="width is 24"):
        large.write(tmp_path / "m.onnx", 2**20, width=24)
