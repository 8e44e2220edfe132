"""Large tensors of a model file go to a temporary file unread, whatever the file holds."""

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from onnx_lowrank import compress, session
from onnx_lowrank.errors import InputError
from onnx_lowrank.files import spilling, wire
from onnx_lowrank.files.load import inlined, load
from onnx_lowrank.files.save import save
from onnx_lowrank.files.tensors import is_external, tensors
from tiny import DIGITS, cnn

LENGTH = 2


@pytest.fixture(autouse=True)
def all_large(monkeypatch):
    """Every inline tensor counts as large, and every model with one."""
    monkeypatch.setattr(spilling, "_LARGE_INLINE", 0)
    monkeypatch.setattr(spilling, "_SPILLED", 1)


def nested() -> onnx.ModelProto:
    """A model with tensors at the top, in a Constant, in a body and in a function."""
    proto = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17, "local" : 1]> g (float[N,2] x, bool c) => (float[N,2] y) '
        "{ z = MatMul(x, w)  a = local.f(z)  y = If(c) <then_branch = t () => (float[N,2] p) "
        "{ k = Constant <value = float[2] {1, 2}> ()  p = Add(a, k) }, "
        "else_branch = e () => (float[N,2] q) { q = Identity(a) }> } "
        '<domain: "local", opset_import: ["" : 17]> f (u) => (v) '
        "{ m = Constant <value = float[2] {3, 4}> ()  v = Mul(u, m) }"
    )
    for name in ("w", "unused"):
        proto.graph.initializer.append(
            numpy_helper.from_array(np.arange(4, dtype=np.float32).reshape(2, 2), name)
        )
    for tensor in tensors(proto):  # the parser writes typed fields
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
    return proto


def field(number: int, content: bytes) -> bytes:
    return wire.encoded(number << 3 | LENGTH) + wire.encoded(len(content)) + content


def outcome(path: Path, spill: bool) -> bytes | str:
    """The serialized model, or the error."""
    with ExitStack() as stack:
        try:
            model = load(path, stack if spill else None)
        except InputError as error:
            return str(error)
        return inlined(model).sha256.encode() + inlined(model).proto.SerializeToString(deterministic=True)


def moved(path: Path) -> int:
    """The number of tensors that go to the temporary file."""
    with ExitStack() as stack:
        model = load(path, stack)
        assert all(t.raw_data == b"" for t in tensors(model.proto) if is_external(t))
        return sum(map(is_external, tensors(model.proto)))


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_tensors_are_found_in_every_scope(tmp_path):
    path = written(tmp_path / "in.onnx", nested().SerializeToString())
    assert moved(path) == 4
    assert outcome(path, True) == outcome(path, False)


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_end_as_without_a_walk(tmp_path, seed):
    rng, data = np.random.default_rng(seed), nested().SerializeToString()
    for case in range(150):
        broken = bytearray(data[: rng.integers(1, len(data))] if case % 5 == 0 else data)
        for _ in range(rng.integers(1, 4)):
            broken[rng.integers(len(broken))] = rng.integers(256)
        path = written(tmp_path / "in.onnx", bytes(broken))
        assert outcome(path, True) == outcome(path, False)


def merged() -> dict[str, bytes]:
    """Files with fields that protobuf merges, or of which it takes the last."""
    proto = nested()
    data = proto.SerializeToString()
    more = helper.make_graph([], "", [], [], [numpy_helper.from_array(np.ones(3, np.float32), "more")])
    tensor = numpy_helper.from_array(np.ones(2, np.float32), "two")
    raw, name = field(9, tensor.raw_data), field(8, b"renamed")
    twice = tensor.SerializeToString() + raw
    constant = numpy_helper.from_array(np.ones((), np.float32), "c").SerializeToString()
    attribute = field(1, b"value") + b"\xa0\x01\x04" + field(5, constant) + field(5, name)
    node = field(2, b"n") + field(4, b"Constant") + field(5, attribute)
    return {
        "two graphs": data + field(7, more.SerializeToString()),
        "two contents": data + field(7, field(5, twice)),
        "one tensor in two parts": data + field(7, field(1, node)),
        "one tensor in two parts, alone": proto_without_graph(proto)
        + field(7, proto.graph.SerializeToString() + field(1, node)),
        "contents first": proto_without_graph(proto)
        + field(7, proto.graph.SerializeToString() + field(5, raw + contents_last(tensor))),
    }


def proto_without_graph(proto: onnx.ModelProto) -> bytes:
    rest = onnx.ModelProto()
    rest.CopyFrom(proto)
    rest.ClearField("graph")
    return rest.SerializeToString()


def contents_last(tensor: TensorProto) -> bytes:
    rest = TensorProto()
    rest.CopyFrom(tensor)
    rest.ClearField("raw_data")
    return rest.SerializeToString()


@pytest.mark.parametrize("case", merged())
def test_fields_that_stand_twice(tmp_path, case):
    path = written(tmp_path / "in.onnx", merged()[case])
    plain = outcome(path, False)
    assert isinstance(plain, bytes)
    assert outcome(path, True) == plain
    assert moved(path) == (5 if case == "contents first" else 0)


def group(number: int, content: bytes = b"\x08\x05") -> bytes:
    """A field of the old kind: its content stands between two tags."""
    return wire.encoded(number << 3 | 3) + content + wire.encoded(number << 3 | 4)


def groups() -> dict[str, bytes]:
    """Files with groups in the model, in the graph and in a tensor."""
    proto = nested()
    tensor = numpy_helper.from_array(np.ones(3, np.float32), "more").SerializeToString()
    graph, rest = proto.graph.SerializeToString(), proto_without_graph(proto)
    return {
        "model": proto.SerializeToString() + group(1000),
        "graph": rest + field(7, graph + group(1000, group(7) + field(1, b"abc") + group(1000))),
        "tensor": rest + field(7, graph + field(5, tensor + group(1000))),
    }


@pytest.mark.parametrize("spill", [True, False])
@pytest.mark.parametrize("case", groups())
def test_groups_stay_as_they_are(tmp_path, case, spill):
    path = written(tmp_path / "in.onnx", groups()[case])
    assert outcome(path, True) == outcome(path, False)
    with ExitStack() as stack:
        model = load(path, stack if spill else None)
        assert len(model.files) == spill
        save(model, tmp_path / "out.onnx")
    proto = onnx.ModelProto.FromString(groups()[case])
    assert (tmp_path / "out.onnx").read_bytes() == proto.SerializeToString(deterministic=True)


def test_numbers_that_are_fields_of_their_own_are_not_walked(tmp_path, monkeypatch):
    proto = nested()
    numbers = TensorProto(name="numbers", data_type=TensorProto.INT32, dims=[4000]).SerializeToString()
    numbers += b"\x28\x01" * 4000
    graph = field(5, numbers) + proto.graph.SerializeToString()
    path = written(tmp_path / "in.onnx", proto_without_graph(proto) + field(7, graph))
    monkeypatch.setattr(wire.Walker.__init__, "__defaults__", (1000,))
    assert moved(path) == 4
    assert outcome(path, True) == outcome(path, False)


@pytest.mark.parametrize("bound", ["_MOST_FIELDS", "_MOST_DEPTH"])
def test_walks_are_bounded(tmp_path, monkeypatch, bound):
    path = written(tmp_path / "in.onnx", nested().SerializeToString())
    monkeypatch.setattr(wire, bound, 3)
    monkeypatch.setattr(wire.Walker.__init__, "__defaults__", (wire._MOST_FIELDS,))
    assert moved(path) == 0
    assert outcome(path, True) == outcome(path, False)


def test_a_model_that_is_not_walked_is_saved(tmp_path, monkeypatch):
    data = nested().SerializeToString(deterministic=True)
    with ExitStack() as stack:
        model = load(written(tmp_path / "in.onnx", data), stack)
        assert model.files
        monkeypatch.setattr(wire, "_MOST_DEPTH", 1)
        save(model, tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").read_bytes() == data


def test_groups_are_bounded(tmp_path):
    for depth, is_read in ((100, True), (101, False)):
        data = b"\x0b" * depth + b"\x0c" * depth
        with written(tmp_path / "in", data).open("rb") as file:
            fields = wire.Walker(file).fields(0, len(data))
            if is_read:
                assert [f.end for f in fields] == [len(data)]
            else:
                with pytest.raises(wire.WireError):
                    list(fields)


def test_a_length_beyond_the_message_around_it_is_refused(tmp_path):
    inner = field(5, numpy_helper.from_array(np.ones(2, np.float32), "w").SerializeToString())
    with written(tmp_path / "in", field(7, inner)[:-1] + field(1, b"behind")).open("rb") as file:
        walker = wire.Walker(file)
        end = file.seek(0, 2)
        with pytest.raises(wire.WireError):
            walker.pieces(onnx.ModelProto.DESCRIPTOR, 0, end, 0, lambda *args: None)


@pytest.mark.parametrize(
    "data",
    [
        b"\x80" * 11, b"\x3a\x80", b"\x00\x00", b"\x3b", b"\x0d\x00", b"\x3a\xff\xff\x7f",
        b"\x3c", b"\x3b\x34", b"\x3b\x08\x3c", b"\x3b\x3b\x3c", b"\x3b\x3e\x3c",
    ],
)  # fmt: skip
def test_bytes_that_are_no_message_are_refused(tmp_path, data):
    with written(tmp_path / "in", data).open("rb") as file, pytest.raises(wire.WireError):
        list(wire.Walker(file).fields(0, len(data)))


@pytest.mark.parametrize("number", [0, 1, 127, 128, 300, 2**32, 2**63])
def test_numbers_of_any_length(tmp_path, number):
    data = b"\x08" + wire.encoded(number) + field(number % 1000 + 1, b"abc")
    with written(tmp_path / "in", data).open("rb") as file:
        found = [(f.number, f.end - f.content) for f in wire.Walker(file).fields(0, len(data))]
    assert found == [(1, len(wire.encoded(number))), (number % 1000 + 1, 3)]


def test_a_model_that_changes_while_it_is_read(tmp_path, monkeypatch):
    path = written(tmp_path / "in.onnx", nested().SerializeToString())
    original = spilling.Spill.take

    def take(self, tensor, content=None):
        with path.open("ab") as file:
            file.write(field(999, b"more"))
        original(self, tensor, content)

    monkeypatch.setattr(spilling.Spill, "take", take)
    with (
        ExitStack() as stack,
        pytest.raises(InputError, match=r"in\.onnx has changed since it was read"),
    ):
        load(path, stack)


def test_a_model_that_becomes_shorter_while_it_is_read(tmp_path, monkeypatch):
    path = written(tmp_path / "in.onnx", nested().SerializeToString())
    original = spilling.write

    def write(*args):
        written(path, path.read_bytes()[:100])
        original(*args)

    monkeypatch.setattr(spilling, "write", write)
    with ExitStack() as stack, pytest.raises(InputError, match=r"in\.onnx is no binary ONNX model"):
        load(path, stack)


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_large_result_stays_on_disk(tmp_path, monkeypatch, dry_run):
    expected = compress(DIGITS, 0.5, device="cpu", dry_run=dry_run)
    save(expected.model, tmp_path / "expected.onnx")
    monkeypatch.setattr(session, "_IN_MEMORY", 0)
    with compress(DIGITS, 0.5, device="cpu", dry_run=dry_run) as result:
        assert result.model.files
        assert result.proto == expected.proto
        result.save(tmp_path / "out.onnx")
        files = tuple(result.model.files.values())
    assert (tmp_path / "out.onnx").read_bytes() == (tmp_path / "expected.onnx").read_bytes()
    assert not any(file.exists() for file in files)
    for use in (lambda: result.save(tmp_path / "late.onnx"), lambda: result.proto):
        with pytest.raises(InputError, match="was closed, and its tensors with it: save before closing"):
            use()
    assert not (tmp_path / "late.onnx").exists()


PEAK = """
import sys
from contextlib import ExitStack
from onnx_lowrank.files.load import load
from onnx_lowrank.files.save import save

def peak():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024

before = peak()
with ExitStack() as stack:
    save(load(sys.argv[1], stack), sys.argv[2])
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="nothing tells the peak here")
def test_loading_and_saving_take_a_fraction_of_the_model(tmp_path):
    proto = cnn()
    weight = np.random.default_rng(0).standard_normal((1 << 22,)).astype(np.float32)
    proto.graph.initializer.extend(numpy_helper.from_array(weight + n, f"unused{n}") for n in range(5))
    source, target = (
        written(tmp_path / "in.onnx", proto.SerializeToString(deterministic=True)),
        tmp_path / "out",
    )
    command = [sys.executable, "-c", PEAK, str(source), str(target)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert int(out) < source.stat().st_size / 4
    assert target.read_bytes() == source.read_bytes()
