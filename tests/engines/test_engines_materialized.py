"""Models as engines load them: data files are read where they are, and copied only where that cannot be."""

import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper, parser

from onnx_lowrank.engines import engine as materializing
from onnx_lowrank.engines.checker import check
from onnx_lowrank.engines.engine import RejectedError, UnsupportedError
from onnx_lowrank.engines.reference import Reference
from onnx_lowrank.engines.runtime import runtime
from onnx_lowrank.files.load import Model, load
from onnx_lowrank.files.spilling import Spill
from windows import is_mapped, pretend

X = np.random.default_rng(0).standard_normal((2, 300)).astype(np.float32)
W = np.random.default_rng(1).standard_normal((300, 400)).astype(np.float32)
V = np.random.default_rng(2).standard_normal((400, 50)).astype(np.float32)
ENGINES = [runtime("CPUExecutionProvider"), Reference()]


def changed(tmp_path: Path, spill: Spill, name: str = "in.data") -> Model:
    """A model of a file and of another one elsewhere: y = x W V + 1, with the 1 inline."""
    proto = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[2,300] x) => (float[2,50] y)'
        "<float one = {1}> {h = MatMul(x, w) k = MatMul(h, v) y = Add(k, one)}"
    )
    proto.graph.initializer.append(numpy_helper.from_array(W, "w"))
    folder = tmp_path / "models"
    folder.mkdir()
    onnx.save(proto, folder / "in.onnx", save_as_external_data=True, location=name)
    loaded = load(folder / "in.onnx")
    proto = onnx.ModelProto()
    proto.CopyFrom(loaded.proto)
    proto.graph.initializer.append(spill.tensor("v", V))
    return replace(loaded, proto=proto, files={**loaded.files, **spill.files}, path=None)


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """An empty folder for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def uncopied(monkeypatch):
    """No model may be saved with its data."""

    def fail(*args: object) -> None:
        raise AssertionError("it copies the data")

    monkeypatch.setattr(materializing, "save", fail)


def result(engine, model: Model):
    with engine.open(model) as run:
        return run({"x": X})["y"]


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
def test_data_is_read_where_it_is(tmp_path, temporary, uncopied, engine):
    with Spill() as spill:
        model = changed(tmp_path, spill)
        before = model.proto.SerializeToString(deterministic=True)
        np.testing.assert_allclose(result(engine, model), X @ W @ V + 1, rtol=1e-4, atol=1e-3)
        assert model.proto.SerializeToString(deterministic=True) == before
        assert len(list(temporary.iterdir())) == 1, "what was spilled, and no more"


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
def test_data_behind_links_and_in_folders_is_read(tmp_path, temporary, uncopied, engine):
    with Spill() as spill:
        model = changed(tmp_path, spill)
    (data,) = (file for name, file in model.files.items() if name == "in.data")
    store = tmp_path / "models" / "a store: 100 %"
    store.mkdir()
    data.rename(store / "0123")
    data.symlink_to(store / "0123")
    model = replace(load(tmp_path / "models" / "in.onnx"), path=None)
    with pytest.raises((UnsupportedError, RejectedError)):
        result(engine, model)  # There is no v any more.
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    proto.graph.initializer.append(numpy_helper.from_array(V, "v"))
    got = result(engine, replace(model, proto=proto))
    np.testing.assert_allclose(got, X @ W @ V + 1, rtol=1e-4, atol=1e-3)


def test_data_without_a_common_folder_is_copied(tmp_path, temporary, monkeypatch):
    def on_two_drives(paths: object) -> str:
        raise ValueError("Paths don't have the same drive")

    with Spill() as spill:
        model = changed(tmp_path, spill)
        expected = result(ENGINES[0], model)
        monkeypatch.setattr(os.path, "commonpath", on_two_drives)
        np.testing.assert_array_equal(result(ENGINES[0], model), expected)
        assert len(list(temporary.iterdir())) == 1


def test_windows_deletes_the_copy(tmp_path, temporary, monkeypatch):
    """Windows deletes no file that is mapped, so the session has to end before."""
    pretend(monkeypatch)
    monkeypatch.setattr(materializing, "_in_memory", lambda model: None)
    proto = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[2,300] x) => (float[2,300] y) {y = Add(x, w)}'
    )
    proto.graph.initializer.append(numpy_helper.from_array(W[:, 0], "w"))
    onnx.save(proto, tmp_path / "in.onnx", save_as_external_data=True, location="in.data")
    model = replace(load(tmp_path / "in.onnx"), path=None)
    for opened in (lambda: ENGINES[0].open(model), lambda: ENGINES[0].ready(model, {"x": X}, 1)):
        with opened():
            (copy,) = temporary.glob("*/model/*.data")
            assert is_mapped(copy)
        assert not [*temporary.iterdir()]


def test_messages_name_no_data_file(tmp_path, temporary):
    with Spill() as spill:
        model = changed(tmp_path, spill)
    with pytest.raises(UnsupportedError) as error, ENGINES[0].open(model):
        pass
    assert "its data" in str(error.value)
    assert str(tmp_path) not in str(error.value)
    assert not any(name in str(error.value) for name in model.files)


def test_the_checker_gets_no_data(tmp_path, temporary, uncopied, monkeypatch):
    seen = {}
    original = onnx.checker.check_model

    def look(path: str, **options: object) -> None:
        seen.update(
            {p.name: (p.stat().st_size, p.stat().st_blocks) for p in Path(path).parent.glob("*.data")}
        )
        original(path, **options)

    monkeypatch.setattr(onnx.checker, "check_model", look)
    with Spill() as spill:
        model = changed(tmp_path, spill)
        sizes = sorted(file.stat().st_size for file in model.files.values())
        assert check(model) == ()
    assert sorted(size for size, _ in seen.values()) == sizes
    assert not any(blocks for _, blocks in seen.values())
    assert not list(temporary.iterdir())


def test_the_checker_finds_what_is_wrong_beside_the_data(tmp_path, temporary):
    with Spill() as spill:
        model = changed(tmp_path, spill)
        model.proto.graph.node[0].op_type = "Nothing"
        (complaint, *_) = check(model)
    assert "Nothing" in complaint
    assert str(temporary) not in complaint
    faulty = TensorProto(name="w", data_type=1, dims=[300, 400], raw_data=W.tobytes()[:-4])
    model.proto.graph.initializer[1].CopyFrom(faulty)
    assert check(replace(model, files={}))


COUNTED = """
import sys
import numpy as np
from onnx_lowrank import compress

def written():
    return int(next(line for line in open("/proc/self/io") if line.startswith("wchar:")).split()[1])

before = written()
with compress(sys.argv[1], 0.5, recipe="output", calibration=sys.argv[2], device="cpu"):
    print(written() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="nothing counts the bytes here")
def test_a_calibrated_run_writes_no_copy_of_the_data(tmp_path):
    """Wide weights on few features: what calibration keeps is small beside them."""
    layers, narrow, wide = 6, 16, 8192
    rng = np.random.default_rng(0)
    body = " ".join(
        f"h{i} = MatMul(x{i}, w{i}) s{i} = Slice(h{i}, start, end, axis) x{i + 1} = Relu(s{i})"
        for i in range(layers)
    )
    proto = parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 17]> g (float[N,{narrow}] x0) => (float[] h{layers - 1})'
        f"<int64[1] start = {{0}}, int64[1] end = {{{narrow}}}, int64[1] axis = {{1}}> {{ {body} }}"
    )
    for i in range(layers):
        weight = rng.standard_normal((narrow, wide)).astype(np.float32) / 4
        proto.graph.initializer.append(numpy_helper.from_array(weight, f"w{i}"))
    onnx.save(proto, tmp_path / "in.onnx", save_as_external_data=True, location="in.data")
    size = (tmp_path / "in.data").stat().st_size
    np.savez(tmp_path / "cal.npz", x0=rng.standard_normal((10, narrow)).astype(np.float32))
    command = [sys.executable, "-c", COUNTED, str(tmp_path / "in.onnx"), str(tmp_path / "cal.npz")]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert 0 < int(out) / size < 3
