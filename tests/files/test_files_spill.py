"""A large model keeps its inline tensors in a temporary file while it is worked on, and nobody can tell."""

import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper, parser

from onnx_lowrank import compress
from onnx_lowrank.engines import checker
from onnx_lowrank.engines.engine import materialized
from onnx_lowrank.errors import InputError
from onnx_lowrank.files import load as loading
from onnx_lowrank.files import spilling
from onnx_lowrank.files.load import array, inlined, load, stored_bytes
from onnx_lowrank.files.save import save
from onnx_lowrank.files.spilling import Spill
from onnx_lowrank.files.tensors import is_external, tensors
from onnx_lowrank.graph.parameters import parameters
from tiny import DIGITS, cnn

DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"
PACKAGED = sorted(DATA.rglob("*.onnx"))


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """An empty folder for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def all_large(monkeypatch):
    """Every inline tensor counts as large, and every model with one."""
    monkeypatch.setattr(spilling, "_LARGE_INLINE", 0)
    monkeypatch.setattr(spilling, "_SPILLED", 1)


def content(proto: onnx.ModelProto) -> bytes:
    return proto.SerializeToString(deterministic=True)


def linear(*more: TensorProto) -> onnx.ModelProto:
    proto = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N,4] x) => (float[N,3] y) {y = MatMul(x, w)}'
    )
    weight = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    proto.graph.initializer.extend([numpy_helper.from_array(weight, "w"), *more])
    return proto


def test_large_tensors_are_put_aside_and_small_ones_are_not(tmp_path, temporary, monkeypatch):
    monkeypatch.setattr(spilling, "_SPILLED", 1)
    large = numpy_helper.from_array(np.arange(1 << 14, dtype=np.float32), "large")
    proto = linear(large, numpy_helper.from_array(np.arange((1 << 14) - 1, dtype=np.float32), "small"))
    onnx.save(proto, tmp_path / "in.onnx")
    with ExitStack() as stack:
        model = load(tmp_path / "in.onnx", stack)
        outside = [tensor.name for tensor in tensors(model.proto) if is_external(tensor)]
        assert outside == ["large"]
        assert model.temporary == model.files.keys()
        (file,) = model.files.values()
        assert file.stat().st_size == 1 << 16
        with materialized(model, is_deployed=True) as source:
            assert source.model == str(tmp_path / "in.onnx")
        with materialized(replace(model, path=None), is_deployed=True) as source:
            assert source.model == content(proto)
    assert not file.exists()


@pytest.mark.parametrize("path", PACKAGED[::20], ids=lambda path: "-".join(path.parts[-2:]))
def test_packaged_models_come_back_byte_for_byte(path, tmp_path, temporary, all_large):
    with ExitStack() as stack:
        model = load(path, stack)
        assert not any(tensor.raw_data for tensor in tensors(model.proto))
        assert content(inlined(model).proto) == content(load(path).proto)
        assert stored_bytes(replace(model, path=None)) == path.stat().st_size
        save(model, tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").read_bytes() == content(load(path).proto)
    assert not list(temporary.iterdir())


def odd_tensors() -> list[TensorProto]:
    """Tensors that say more than others, or are no plain bytes."""
    said = numpy_helper.from_array(np.ones(5, np.float32), "said")
    said.data_location = TensorProto.DEFAULT
    noted = numpy_helper.from_array(np.ones(5, np.float32), "noted")
    noted.doc_string = "a note"
    noted.metadata_props.add(key="k", value="v")
    known = numpy_helper.from_array(np.ones(5, np.float32), "unknown field")
    known.MergeFromString(b"\xf2\x7f\x03abc\x48\x05\x4d1234\xc3\x3e\x08\x05\xc4\x3e")
    part = TensorProto(name="part", data_type=1, dims=[5], raw_data=bytes(8))
    part.segment.end = 2
    entry = numpy_helper.from_array(np.ones(5, np.float32), "entry")
    entry.external_data.add(key="note", value="odd")
    return [
        said, noted, known, part, entry,
        onnx.helper.make_tensor("typed", TensorProto.FLOAT, [5], np.arange(5)),
        onnx.helper.make_tensor("texts", TensorProto.STRING, [2], ["a", "b"]),
        numpy_helper.from_array(np.empty((0, 3), np.float32), "empty"),
        TensorProto(name="int4", data_type=TensorProto.INT4, dims=[3], raw_data=b"\x21\x03"),
    ]  # fmt: skip


@pytest.mark.parametrize("in_memory", [True, False])
def test_odd_tensors_come_back_byte_for_byte(tmp_path, temporary, all_large, in_memory):
    proto = linear(*odd_tensors())
    proto.MergeFromString(b"\xf2\x7f\x03abc")
    before = content(proto)
    (tmp_path / "in.onnx").write_bytes(before)
    with ExitStack() as stack:
        model = load(proto if in_memory else tmp_path / "in.onnx", stack)
        assert content(proto) == before, "what the caller has stays as it is"
        moved = {
            tensor.name for tensor in tensors(model.proto) if tensor.data_location == TensorProto.EXTERNAL
        }
        assert moved == {"w", "noted", "unknown field", "empty", "int4"}
        assert content(inlined(model).proto) == before
        assert stored_bytes(replace(model, path=None)) == len(before)
        assert inlined(model).files == {}
        save(model, tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").read_bytes() == before


@pytest.mark.parametrize("in_memory", [True, False])
def test_all_that_is_told_of_a_model_stays(tmp_path, temporary, all_large, in_memory):
    onnx.save(cnn(), tmp_path / "in.onnx")
    source = cnn() if in_memory else tmp_path / "in.onnx"
    plain = load(source)
    with ExitStack() as stack:
        model = load(source, stack)
        assert (model.sha256, model.name, model.path) == (plain.sha256, plain.name, plain.path)
        assert stored_bytes(model) == stored_bytes(plain)
        assert parameters(model) == parameters(plain)
        for ours, theirs in zip(tensors(model.proto), tensors(plain.proto), strict=True):
            np.testing.assert_array_equal(array(model, ours), array(plain, theirs))


def test_external_data_stays_external(tmp_path, temporary, all_large):
    inline = numpy_helper.from_array(np.arange(6, dtype=np.float32), "inline")
    proto = linear()
    onnx.save(proto, tmp_path / "in.onnx", save_as_external_data=True, location="in.data", size_threshold=0)
    proto = onnx.load(tmp_path / "in.onnx", load_external_data=False)
    proto.graph.initializer.append(inline)
    (tmp_path / "in.onnx").write_bytes(content(proto))
    plain = load(tmp_path / "in.onnx")
    with ExitStack() as stack:
        model = load(tmp_path / "in.onnx", stack)
        assert len(model.files) == 2
        assert stored_bytes(model) == stored_bytes(plain)
        assert inlined(model).files == plain.files
        for name, source in (("a", model), ("b", plain)):
            (tmp_path / name).mkdir()
            save(source, tmp_path / name / "out.onnx")
    written = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("a", "b")]
    assert written[0] == written[1]


def test_the_size_of_a_model_is_that_of_the_file_that_was_loaded(tmp_path, temporary, all_large):
    onnx.save(cnn(), tmp_path / "in.onnx")
    with ExitStack() as stack:
        model = load(tmp_path / "in.onnx", stack)
        (tmp_path / "in.onnx").unlink()
        assert stored_bytes(model) == len(content(cnn()))
        save(model, tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").read_bytes() == content(cnn())


def test_a_name_may_be_too_long_for_data_that_is_not_written(tmp_path, temporary, all_large):
    target = tmp_path / ("x" * 250)
    with ExitStack() as stack:
        save(load(cnn(), stack), target)
    assert target.read_bytes() == content(cnn())


def test_small_models_need_no_file(temporary, monkeypatch):
    made = []
    monkeypatch.setattr(spilling, "Spill", lambda: made.append(1))
    with ExitStack() as stack:
        model = load(DIGITS, stack)
    assert not made
    assert not model.files


@pytest.mark.parametrize("failing", ["room", "folder", "third tensor"])
def test_without_room_tensors_stay_inline(temporary, all_large, monkeypatch, failing):
    before, calls = content(cnn()), []

    def fail(self: Spill, tensor: TensorProto) -> None:
        calls.append(tensor.name)
        if len(calls) == 3:
            raise InputError("full")
        original(self, tensor)

    def no_folder() -> Spill:
        raise InputError("no folder")

    original = Spill.take
    if failing == "room":
        usage = shutil.disk_usage(temporary)._replace(free=10)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    elif failing == "folder":
        monkeypatch.setattr(spilling, "Spill", no_folder)
    else:
        monkeypatch.setattr(Spill, "take", fail)
    with ExitStack() as stack:
        model = load(cnn(), stack)
        assert not model.files
        assert content(model.proto) == before
        assert not list(temporary.iterdir())
    assert len(calls) == (3 if failing == "third tensor" else 0)


OPTIONS = {
    "data-free": {},
    "calibrated": {
        "calibration": {"image": np.random.default_rng(0).random((20, 1, 8, 8), np.float32)},
        "recipe": "output",
    },
    "file bytes": {"budget": "bytes"},
    "MACs": {"budget": "macs", "input_shape": {"image": (1, 1, 8, 8)}},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_a_run_gives_the_same_bytes_with_and_without(temporary, monkeypatch, case):
    options = OPTIONS[case]
    expected = compress(DIGITS, 0.5, device="cpu", **options)
    monkeypatch.setattr(spilling, "_LARGE_INLINE", 256)
    monkeypatch.setattr(spilling, "_SPILLED", 1)
    result = compress(DIGITS, 0.5, device="cpu", **options)
    assert not list(temporary.iterdir()), "nobody has to close it"
    assert content(result.proto) == content(expected.proto)
    assert result.plan == expected.plan
    assert result.report.to_json() == expected.report.to_json()


def test_a_dry_run_gives_back_the_input_model(temporary, all_large):
    result = compress(DIGITS, 0.5, device="cpu", dry_run=True)
    assert content(result.proto) == Path(DIGITS).read_bytes()
    assert not list(temporary.iterdir())


PEAK = """
import sys
from onnx_lowrank import compress

def peak():  # what getrusage tells begins with the memory of the process that started this one
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024

compress(sys.argv[2], 0.5, device="cpu")
before = peak()
compress(sys.argv[1], 0.99, include=["w0"], device="cpu")
print(peak() - before)
"""


def test_a_model_that_is_too_large_to_be_inline_gets_a_data_file(tmp_path, temporary, all_large, monkeypatch):
    source, limit = tmp_path / "in.onnx", 100
    proto = linear()
    onnx.save(proto, source)
    weight = numpy_helper.to_array(proto.graph.initializer[0])
    for size, files in ((stored_bytes(load(source)), 1), (limit, 2)):
        monkeypatch.setattr(loading, "_LARGEST_INLINE", size)
        folder = tmp_path / str(files)
        folder.mkdir()
        with ExitStack() as resources:
            save(load(source, resources), folder / "out.onnx")
        assert len(list(folder.iterdir())) == files
        (saved,) = onnx.load(folder / "out.onnx").graph.initializer
        np.testing.assert_array_equal(numpy_helper.to_array(saved), weight)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="nothing tells the peak here")
def test_a_large_model_is_not_in_memory_more_than_twice(tmp_path):
    """Twice when it is parsed; ONNX Runtime maps it, and packs each weight once."""
    layers, width = 24, 1024
    body = " ".join(f"x{i + 1} = MatMul(x{i}, w{i})" for i in range(layers))
    proto = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> '
        f"g (float[1,{width}] x0) => (float[] x{layers}) {{ {body} }}"
    )
    rng = np.random.default_rng(0)
    for i in range(layers):
        weight = rng.standard_normal((width, width)).astype(np.float32) / 32
        proto.graph.initializer.append(numpy_helper.from_array(weight, f"w{i}"))
    onnx.save(proto, tmp_path / "in.onnx")
    size = (tmp_path / "in.onnx").stat().st_size
    command = [sys.executable, "-c", PEAK, str(tmp_path / "in.onnx"), str(DIGITS)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert 0 < int(out) / size < 2.5


@pytest.mark.usefixtures("all_large")
@pytest.mark.parametrize("fault", ["", "an unknown operator"])
def test_the_checker_takes_a_spilled_model_for_the_inline_one(tmp_path, fault):
    """Else no fault of a compressed model would be one: the checker seemed to reject the input model, too."""
    proto = linear()
    if fault:
        proto.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(proto, tmp_path / "in.onnx")
    with ExitStack() as resources:
        model = load(tmp_path / "in.onnx", resources)
        assert model.temporary
        complaints = checker.check(model)
    assert bool(complaints) == bool(fault)
    assert any("NoSuchOperator" in complaint for complaint in complaints) == bool(fault)
