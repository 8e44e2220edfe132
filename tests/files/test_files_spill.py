"""Large inline tensors of a large model wait in a temporary file, and nothing else changes."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnx_lowrank import compress
from onnx_lowrank.engines.engine import materialized
from onnx_lowrank.files import external
from onnx_lowrank.files.load import array, inlined, load, stored_bytes
from onnx_lowrank.files.save import save
from onnx_lowrank.files.tensors import is_external

TEXT = """<ir_version: 8, opset_import: ["": 17]> g (float[2,64] x) => (float[2,300] y) {
    h = MatMul (x, w) y = Add (h, b) }"""


@pytest.fixture
def proto():
    rng = np.random.default_rng(7)
    spectrum = np.diag(np.arange(1, 65) ** -1.0)
    w = (rng.standard_normal((64, 64)) @ spectrum @ rng.standard_normal((64, 300))).astype(np.float32)
    made = onnx.parser.parse_model(TEXT)
    made.graph.initializer.append(numpy_helper.from_array(w, "w"))
    made.graph.initializer.append(numpy_helper.from_array(w[0], "b"))
    return made


@pytest.fixture
def path(tmp_path, proto):
    onnx.save(proto, tmp_path / "in.onnx")
    return tmp_path / "in.onnx"


@pytest.fixture
def small(monkeypatch):
    """All models are large enough to be spilled."""
    monkeypatch.setattr(external, "_SPILLED", 1)


@pytest.mark.usefixtures("small")
def test_large_tensors_are_spilled_and_small_ones_are_not(path):
    with ExitStack() as stack:
        model = load(path, stack)
        assert {t.name: is_external(t) for t in model.proto.graph.initializer} == {"w": True, "b": False}
        assert model.temporary == model.files.keys()
        (file,) = model.files.values()
        assert file.stat().st_size == 64 * 300 * 4
        plain = load(path)
        for spilled, kept in zip(model.proto.graph.initializer, plain.proto.graph.initializer, strict=True):
            np.testing.assert_array_equal(array(model, spilled), array(plain, kept))
        assert model.sha256 == plain.sha256
        assert stored_bytes(model) == stored_bytes(plain)
    assert not file.exists()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("in_memory", [False, True])
def test_inlined_gives_back_the_model_byte_for_byte(path, proto, in_memory):
    before = proto.SerializeToString()
    with ExitStack() as stack:
        model = load(proto if in_memory else path, stack)
        assert model.temporary
        assert proto.SerializeToString() == before, "the caller's model stays as it is"
        back = inlined(model)
        assert (back.temporary, dict(back.files)) == (frozenset(), {})
        assert back.proto == proto


@pytest.mark.usefixtures("small")
def test_saved_and_deployed_models_hold_their_tensors(path, proto, tmp_path):
    with ExitStack() as stack:
        model = load(path, stack)
        save(model, tmp_path / "out.onnx")
        with materialized(model, is_deployed=True) as source:
            assert source.model == str(path)
    assert onnx.load(tmp_path / "out.onnx") == proto
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in.onnx", "out.onnx"]


def test_a_small_model_stays_in_memory(path):
    with ExitStack() as stack:
        model = load(path, stack)
        assert not model.files


@pytest.mark.usefixtures("small")
def test_without_room_a_model_stays_in_memory(path, proto, monkeypatch):
    usage = type("Usage", (), {"free": 0})
    monkeypatch.setattr(external.shutil, "disk_usage", lambda _: usage)
    with ExitStack() as stack:
        model = load(path, stack)
        assert not model.temporary
        assert model.proto == proto


@pytest.mark.usefixtures("small")
def test_a_disk_that_fills_up_leaves_the_model_in_memory(path, proto, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(external, "append", full)
    with ExitStack() as stack:
        model = load(path, stack)
        assert not model.temporary
        assert model.proto == proto


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_spilled_model_compresses_to_the_same_bytes(path, proto, in_memory, monkeypatch):
    source = proto if in_memory else str(path)
    with compress(source, 0.5) as plain:
        expected = plain.proto
    monkeypatch.setattr(external, "_SPILLED", 1)
    with compress(source, 0.5) as spilled:
        assert spilled.proto == expected
        assert all(not is_external(tensor) for tensor in spilled.proto.graph.initializer)
        assert spilled.report.totals == plain.report.totals


def test_no_temporary_file_is_left(path, monkeypatch, tmp_path):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(external.tempfile, "tempdir", str(folder))
    monkeypatch.setattr(external, "_SPILLED", 1)
    with compress(str(path), 0.5):
        pass
    assert list(Path(folder).iterdir()) == []
