"""Olive's workflows with the pass of the package file that the command writes."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec

import numpy as np
import onnx
import pytest
from follow import mlp, operators, pairs

from onnx_lowrank import compress

pytestmark = [
    pytest.mark.toolchains,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(find_spec("olive") is None, reason="olive-ai is not installed"),
]
STEPS = {
    "lowrank": {"type": "OnnxLowRank", "ratio": 0.5},
    "int8": {"type": "OnnxDynamicQuantization"},
}
FACTORS = 6
"""Of the three layers of the model at a ratio of 0.5."""


@pytest.fixture
def source(tmp_path):
    onnx.save(mlp(), tmp_path / "mlp.onnx")
    return tmp_path / "mlp.onnx"


def package():
    command = [sys.executable, "-m", "onnx_lowrank", "olive-package-config"]
    return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)


def workflow(source, steps=None, **others):
    steps = STEPS if steps is None else steps
    folders = {"cache_dir": str(source.parent / "cache"), "output_dir": str(source.parent / "out")}
    given = {"type": "ONNXModel", "model_path": str(source)}
    return {"input_model": given, "passes": steps, **folders, **others}


def run(config, package_config=None):
    from olive.workflows import run as olive_run

    return olive_run(config, package_config=package_config or package())


def one_pass(**options):
    from olive.passes.olive_pass import create_pass_from_dict

    from onnx_lowrank.toolchains.olive import OnnxLowRank

    return create_pass_from_dict(OnnxLowRank, options, disable_search=True)


def searched(**options):
    """What a search tries of each option."""
    from olive.hardware import DEFAULT_CPU_ACCELERATOR

    from onnx_lowrank.toolchains.olive import OnnxLowRank

    _, _, found = OnnxLowRank.get_config_params(DEFAULT_CPU_ACCELERATOR, options)
    return {name: parameter.get_support() for name, parameter in found.items()}


def result(source, made="made", **options):
    from olive.model import ONNXModelHandler

    return one_pass(**options).run(ONNXModelHandler(str(source)), str(source.parent / made))


def raw_data(folder):
    """Olive's configuration of data for files of numbers."""
    (folder / "raw" / "x").mkdir(parents=True)
    rng = np.random.default_rng(9)
    for number in range(40):
        rng.standard_normal((1, 32)).astype(np.float32).tofile(folder / "raw" / "x" / f"{number:02}.bin")
    what = {"data_dir": str(folder / "raw"), "input_names": ["x"], "input_shapes": [[1, 32]]}
    dataset = {**what, "input_types": ["float32"]}
    return {"name": "raw", "type": "RawDataContainer", "load_dataset_config": dataset}


def test_the_command_of_olive_decomposes_then_quantizes(source):
    folder = source.parent
    (folder / "p.json").write_text(json.dumps(package()))
    (folder / "c.json").write_text(json.dumps(workflow(source)))
    command = [sys.executable, "-m", "olive", "run", "--config", "c.json", "--package-config", "p.json"]
    subprocess.run([*command, "--disable_telemetry"], cwd=folder, check=True, capture_output=True)
    made = onnx.load(folder / "out" / "model.onnx")
    assert operators(made)["MatMulInteger"] == FACTORS
    assert "onnx_lowrank.layers" in {entry.key for entry in made.metadata_props}


def test_the_model_is_that_of_the_library(source):
    made = onnx.load(result(source, ratio=0.5).model_path)
    with compress(source, 0.5) as expected:
        assert made.graph == expected.proto.graph
    assert pairs(made) == FACTORS // 2


def test_data_of_a_workflow_are_calibration_inputs(source):
    made = onnx.load(result(source, ratio=0.5, data_config=raw_data(source.parent)).model_path)
    notes = {entry.key: entry.value for entry in made.metadata_props}
    assert json.loads(notes["onnx_lowrank.run"])["recipe"] != json.loads(plain_run(source))["recipe"]


def plain_run(source):
    with compress(source, 0.5) as made:
        return {entry.key: entry.value for entry in made.proto.metadata_props}["onnx_lowrank.run"]


def test_weights_go_to_a_data_file_if_the_workflow_says_so(source):
    found = result(
        source, ratio=0.5, save_as_external_data=True, external_data_name="d.bin", size_threshold=0
    )
    assert (source.parent / "made" / "d.bin").stat().st_size > 0
    assert pairs(onnx.load(found.model_path)) == FACTORS // 2


def test_a_search_tries_ratios_unless_there_is_a_target():
    assert searched() == {"ratio": [0.9, 0.8, 0.7, 0.6, 0.5]}
    assert searched(ratio=[0.4, 0.3]) == {"ratio": [0.4, 0.3]}
    assert searched(ratio=0.4) == {}
    assert searched(target_error=0.1) == {}


def test_a_search_finds_the_smallest_model(source):
    size = {"name": "size", "type": "size_on_disk", "sub_types": [{"name": "bytes", "priority": 1}]}
    found = run(
        workflow(
            source,
            {"lowrank": {"type": "OnnxLowRank", "ratio": [0.9, 0.5]}},
            search_strategy={"execution_order": "joint", "sampler": "sequential"},
            evaluators={"bytes": {"type": "OnnxEvaluator", "metrics": [size]}},
            evaluator="bytes",
        )
    )
    with compress(source, 0.5) as smallest:
        assert onnx.load(found.get_best_candidate().model_path).graph == smallest.proto.graph


@pytest.mark.parametrize(("budget", "is_agnostic"), [("params", True), ("latency", False)])
def test_a_plan_made_with_times_belongs_to_one_accelerator(budget, is_agnostic):
    made = one_pass(ratio=0.8, budget=budget)
    assert made.is_accelerator_agnostic(made.accelerator_spec) is is_agnostic


def test_the_key_of_the_cache_has_the_version():
    made = one_pass(ratio=0.5)
    assert made.config.to_json()["onnx_lowrank_version"] == version("onnx-lowrank")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.001}, "The ratio 0.001 of params cannot be reached"),
        ({}, "Give exactly one of these"),
        ({"ratio": 0.5, "onnx_lowrank_version": "99"}, "The workflow needs onnx-lowrank 99, and"),
    ],
)
def test_errors_are_those_of_a_pass(source, options, message):
    from olive.exception import OlivePassError

    with pytest.raises(OlivePassError, match=message):
        result(source, **options)


def test_a_model_that_is_not_onnx_is_refused(source):
    from olive.exception import OlivePassError

    with pytest.raises(OlivePassError, match="put OnnxConversion before it"):
        one_pass(ratio=0.5).run(Foreign(), str(source.parent / "made"))


class Foreign:
    """A model of another kind."""

    model_attributes = None


def test_an_error_ends_up_in_the_log_of_the_workflow(source, caplog):
    with caplog.at_level(logging.ERROR):
        run(workflow(source, {"lowrank": {"type": "OnnxLowRank", "ratio": 0.001}}))
    assert "The ratio 0.001 of params cannot be reached" in caplog.text


def test_another_package_file_does_not_know_the_pass(source):
    with pytest.raises(ValueError, match="pass of type 'onnxlowrank' not found"):
        run(workflow(source), {"passes": {}})


def test_the_package_file_has_all_passes_of_olive():
    from olive.package_config import OlivePackageConfig

    own = OlivePackageConfig.load_default_config().model_dump()
    ours = OlivePackageConfig.model_validate(package()).model_dump()
    assert ours["passes"].pop("onnxlowrank")["module_path"].endswith(".OnnxLowRank")
    assert ours == own
