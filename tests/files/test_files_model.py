import hashlib
import importlib
import os
import pkgutil
import re
import resource
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from onnx_lowrank.errors import InputError
from onnx_lowrank.files import load as loading
from onnx_lowrank.files import save as saving
from onnx_lowrank.files.load import Model, array, load, outline, stored_bytes
from onnx_lowrank.files.save import check_target, save
from onnx_lowrank.files.spilling import Spill
from onnx_lowrank.files.tensors import stored_size, tensors
from onnx_lowrank.graph.parameters import parameters
from onnx_lowrank.graph.scopes import scopes

DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"
PACKAGED = sorted(DATA.rglob("*.onnx"))
STRUCTURED = [
    *("if", "loop", "scan", "optionalgetelement", "optionalhaselement", "sequence_map", "sequenceinsert"),
    *("identity", "constant", "layernormalization", "string_concat", "cast"),
]


def node_models() -> list[tuple[str, onnx.ModelProto]]:
    """Models of onnx's node tests that have subgraphs, functions, optionals, sequences and odd types."""
    cases = importlib.import_module("onnx.backend.test.case.node")
    modules = {m.name.rstrip("_"): m.name for m in pkgutil.iter_modules(cases.__path__)}  # if or if_
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in STRUCTURED:
            importlib.import_module(f"onnx.backend.test.case.node.{modules[name]}")
    return [(case.name, case.model) for case in cases._NodeTestCases]


def linear(weight: TensorProto, *more: TensorProto) -> onnx.ModelProto:
    proto = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N,4] x) => (float[N,3] y) {y = MatMul(x, w)}'
    )
    proto.graph.initializer.extend([weight, *more])
    return proto


def weight(seed: int = 0, shape: tuple[int, ...] = (4, 3), name: str = "w") -> TensorProto:
    return numpy_helper.from_array(
        np.random.default_rng(seed).standard_normal(shape).astype(np.float32), name
    )


def reference(name: str, shape: tuple[int, ...], **entries: object) -> TensorProto:
    tensor = TensorProto(
        name=name, dims=shape, data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL
    )
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def write(folder: Path, proto: onnx.ModelProto, **files: bytes) -> Path:
    for name, content in files.items():
        (folder / f"{name}.bin").write_bytes(content)
    path = folder / "in.onnx"
    path.write_bytes(proto.SerializeToString(deterministic=True))
    return path


W = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)


def in_constant(value: TensorProto) -> onnx.ModelProto:
    proto = linear(weight(name="v"))
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["w"], value=value))
    return proto


def in_branch(value: TensorProto) -> onnx.ModelProto:
    proto = linear(weight())
    output = helper.make_tensor_value_info("w", TensorProto.FLOAT, None)
    branch = helper.make_graph([], "b", [], [output], [value])
    proto.graph.node.append(helper.make_node("If", ["c"], ["z"], then_branch=branch, else_branch=branch))
    return proto


def in_function(value: TensorProto) -> onnx.ModelProto:
    proto = linear(weight())
    node = helper.make_node("Constant", [], ["o"], value=value)
    opset = helper.make_opsetid("", 17)
    proto.functions.append(helper.make_function("d", "f", [], ["o"], [node], [opset]))
    return proto


def in_sparse(value: TensorProto) -> onnx.ModelProto:
    proto = linear(weight())
    indices = numpy_helper.from_array(np.arange(12))
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(value, indices, [100]))
    return proto


def in_training(value: TensorProto) -> onnx.ModelProto:
    proto = linear(weight())
    proto.training_info.add().algorithm.initializer.append(value)
    return proto


PLACES = [linear, in_constant, in_branch, in_function, in_sparse, in_training]


MODELS = node_models() + [(place.__name__, place(weight(0, (12,)))) for place in PLACES]

# --- round trips ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PACKAGED, ids=lambda p: str(p.relative_to(DATA)))
def test_packaged_models_survive_byte_for_byte(path, tmp_path):
    model = load(path)
    save(model, tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").read_bytes() == path.read_bytes()
    assert model.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert stored_bytes(model) == path.stat().st_size


@pytest.mark.parametrize(("name", "proto"), MODELS, ids=[name for name, _ in MODELS])
def test_models_in_memory_survive_byte_for_byte(name, proto, tmp_path):
    before = proto.SerializeToString(deterministic=True)
    model = load(proto)
    save(model, tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").read_bytes() == before == proto.SerializeToString(deterministic=True)
    assert model.sha256 == hashlib.sha256(before).hexdigest()


@pytest.mark.parametrize(("name", "proto"), MODELS, ids=[name for name, _ in MODELS])
def test_an_outline_that_keeps_all_is_equal(name, proto):
    assert outline(proto, keep=1 << 20) == proto


def test_the_samples_hold_every_structure():
    protos = [onnx.load(path) for path in PACKAGED] + [proto for _, proto in MODELS]
    assert len(protos) > 250
    assert any(scope.parent is not None for proto in protos for scope in scopes(proto))
    assert any(proto.functions and proto.functions[0].node for proto in protos)
    assert any(proto.graph.sparse_initializer for proto in protos)
    assert any(proto.training_info for proto in protos)
    kinds = {value.type.WhichOneof("value") for proto in protos for value in proto.graph.input}
    assert {"tensor_type", "sequence_type", "optional_type"} <= kinds


def test_unknown_fields_survive(tmp_path):
    path = write(tmp_path, linear(weight()))
    content = path.read_bytes() + b"\xa0\x3f\x05"  # field 1012, which no ONNX has
    path.write_bytes(content)
    save(load(path), tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").read_bytes() == content


def test_unknown_fields_survive_with_external_data(tmp_path):
    proto = linear(reference("w", (4, 3), location="w.bin"))
    path = write(tmp_path, proto, w=W.tobytes())
    path.write_bytes(path.read_bytes() + b"\xa0\x3f\x05")
    save(load(path), tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").read_bytes().endswith(b"\xa0\x3f\x05")


# --- what cannot be loaded --------------------------------------------------------------------


def refused(source: object, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        load(source)  # type: ignore[arg-type]
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert message.endswith(".")
    assert "\n" not in message


CONTENTS = {
    "empty": (b"", "is empty"),
    "text": (b"Hello, this is a text file.\n", "no binary ONNX model"),
    "json": (b'{"irVersion": "8", "graph": {}}', "no binary ONNX model"),
    "textproto": (b'ir_version: 8\ngraph { node { op_type: "Relu" } }\n', "no binary ONNX model"),
    "ONNX Runtime's format": (b"\x30\0\0\0ORTM" + bytes(64), "in ONNX Runtime's own format"),
    "zeros": (bytes(64), "no binary ONNX model"),
    "only unknown fields": (b"\xa0\x3f\x05", "no ir_version"),
    "only an ir_version": (b"\x08\x08", "lacks its graph"),
}


@pytest.mark.parametrize(("content", "words"), CONTENTS.values(), ids=CONTENTS)
def test_files_that_are_no_models(content, words, tmp_path):
    path = tmp_path / "in.onnx"
    path.write_bytes(content)
    refused(path, str(path), words)


@pytest.mark.parametrize(
    ("suffix", "words"),
    [(".PT", "PyTorch, no ONNX model: convert it with torch.onnx.export"), (".tflite", "with tf2onnx")],
)
def test_a_file_of_another_framework_is_told_with_the_way_to_convert_it(suffix, words, tmp_path):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"PK\x03\x04" + bytes(64))
    refused(path, str(path), words)


def test_a_missing_file(tmp_path):
    refused(tmp_path / "no.onnx", str(tmp_path / "no.onnx"), "does not exist")


def test_a_folder(tmp_path):
    refused(tmp_path, str(tmp_path), "is a folder")


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_a_name_that_no_file_can_have(name):
    refused(name, "cannot be read")


def test_a_pipe_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "in.onnx")
    refused(tmp_path / "in.onnx", "no regular file")


def test_a_file_without_permission(tmp_path, monkeypatch):
    def deny(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path, linear(weight()))
    monkeypatch.setattr(Path, "read_bytes", deny)
    refused(path, str(path), "Permission denied")


def test_a_file_over_the_limit_of_protobuf(tmp_path):
    with (tmp_path / "in.onnx").open("wb") as file:
        file.truncate(2**31)
    refused(tmp_path / "in.onnx", str(2**31), "external data")


def test_every_truncation_is_noticed(tmp_path):
    content = linear(weight()).SerializeToString(deterministic=True)
    path = tmp_path / "in.onnx"
    for end in range(1, len(content)):
        path.write_bytes(content[:end])
        refused(path, str(path))


def test_a_model_without_nodes():
    proto = linear(weight())
    del proto.graph.node[:]
    refused(proto, "without nodes")


def test_a_model_without_an_opset():
    proto = linear(weight())
    del proto.opset_import[:]
    refused(proto, "opset_import")


def test_the_oldest_models_need_no_opset():
    proto = linear(weight())
    proto.ir_version = 2
    del proto.opset_import[:]
    assert load(proto).proto is proto


def tensor(**fields: object) -> TensorProto:
    return TensorProto(name="w", **fields)


DAMAGED = {
    "raw short": (tensor(dims=[4, 3], data_type=1, raw_data=bytes(47)), "47 bytes", "takes 48"),
    "raw long": (tensor(dims=[4, 3], data_type=1, raw_data=bytes(49)), "49 bytes", "takes 48"),
    "typed short": (tensor(dims=[4, 3], data_type=1, float_data=[1.0]), "1 entries of float_", "takes 12"),
    "typed none": (tensor(dims=[4, 3], data_type=7), "0 entries of int64_data", "takes 12"),
    "wrong field": (tensor(dims=[1], data_type=1, int64_data=[1]), "0 entries of float_data"),
    "negative": (tensor(dims=[-4, -3], data_type=1, raw_data=bytes(48)), "negative shape [-4, -3]"),
    "huge": (tensor(dims=[2**62] * 4, data_type=1, raw_data=bytes(48)), "48 bytes", str(2**250)),
    "huge sparse rank": (tensor(dims=[2**62] * 1000, data_type=1), "1000 axes"),
    "int4": (tensor(dims=[3], data_type=22, raw_data=bytes(3)), "3 bytes", "takes 2"),
    "complex": (tensor(dims=[3], data_type=14, float_data=[0.0] * 3), "3 entries", "takes 6"),
    "strings": (tensor(dims=[3], data_type=8, string_data=[b"a"]), "1 entries of string_data", "takes 3"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED.values(), ids=DAMAGED)
def test_tensors_whose_contents_disagree_with_their_shape(case):
    damaged, *words = case
    refused(linear(damaged), "'w'", *words)


@pytest.mark.parametrize("place", PLACES)
def test_damage_is_found_everywhere(place):
    refused(place(tensor(dims=[12], data_type=1, raw_data=bytes(47))), "47 bytes", "takes 48")


# --- arrays -----------------------------------------------------------------------------------

DTYPES = [
    *(np.float16, np.float32, np.float64, np.complex64, np.complex128, np.bool_),
    *(np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64),
    *(ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2),
    *(ml_dtypes.int4, ml_dtypes.uint4, ml_dtypes.float4_e2m1fn),
]


def values(dtype: type) -> np.ndarray:
    return np.array([[0, 1, 2], [3, 4, 6]]).astype(dtype)


def typed(dtype: type) -> TensorProto:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return helper.make_tensor("w", kind, [2, 3], [value.item() for value in values(dtype).flatten()])


def raw(dtype: type) -> TensorProto:
    return numpy_helper.from_array(values(dtype), "w")


@pytest.mark.parametrize("make", [typed, raw])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_arrays_of_every_type(make, dtype):
    tensor = make(dtype)
    found = array(load(linear(tensor)), tensor)
    assert found.dtype == np.dtype(dtype)
    assert found.shape == (2, 3)
    assert found.tobytes() == values(dtype).tobytes()


@pytest.mark.parametrize("offset", [0, 1, 4096, 5000])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_external_arrays_of_every_type(dtype, offset, tmp_path):
    content = raw(dtype).raw_data
    external = reference("w", (2, 3), location="w.bin", offset=offset)
    external.data_type = raw(dtype).data_type
    model = load(write(tmp_path, linear(external), w=b"\xff" * offset + content + b"\xff"))
    found = array(model, model.proto.graph.initializer[0])
    assert found.dtype == np.dtype(dtype)
    assert found.shape == (2, 3)
    assert found.tobytes() == values(dtype).tobytes()


def test_an_external_array_is_mapped_and_read_only(tmp_path):
    model = load(write(tmp_path, linear(reference("w", (4, 3), location="w.bin")), w=W.tobytes()))
    found = array(model, model.proto.graph.initializer[0])
    assert type(found) is np.ndarray
    assert not found.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        found[0, 0] = 1


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4, 2)])
def test_empty_tensors(shape, tmp_path):
    model = load(write(tmp_path, linear(reference("w", shape, location="w.bin"), weight(shape=shape)), w=b""))
    assert [array(model, t).shape for t in model.proto.graph.initializer] == [shape, shape]


UNREADABLE = {
    "undefined": tensor(data_type=0),
    "unknown": tensor(data_type=99, dims=[3], raw_data=bytes(7)),
    "segment": tensor(data_type=1, dims=[3], raw_data=bytes(4), segment=TensorProto.Segment(begin=0, end=1)),
    "no UTF-8": tensor(data_type=8, dims=[1], string_data=[b"\xff"]),
}


@pytest.mark.parametrize("odd", UNREADABLE.values(), ids=UNREADABLE)
def test_tensors_without_an_array_travel_but_cannot_be_read(odd, tmp_path):
    model = load(linear(odd))
    save(model, tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").read_bytes() == model.proto.SerializeToString(deterministic=True)
    assert parameters(model) == (3 if odd.HasField("segment") else 0)
    with pytest.raises(InputError, match="'w' cannot be read"):
        array(model, odd)


# --- external data ----------------------------------------------------------------------------


MORE_KEYS = {"checksum": "12", "note": "kept", "prepacked_0": "x|0|4"}


def external(tmp_path: Path) -> Path:
    """Two tensors share a region, one is in another file, one is inline, one in a Constant."""
    proto = linear(
        reference("w", (4, 3), location="a.bin", offset=0, length=48),
        reference("tied", (3, 4), location="a.bin", offset=0, length=48, **MORE_KEYS),
        reference("b", (600_000,), location="sub/b.bin"),
        weight(3, (2, 2), "inline"),
    )  # fmt: skip
    node = helper.make_node(
        "Constant", [], ["c"], value=reference("c", (2,), location="a.bin", offset=48, length=8)
    )
    proto.graph.node.append(node)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.bin").write_bytes(np.arange(600_000, dtype=np.float32).tobytes())
    return write(tmp_path, proto, a=W.tobytes() + np.float32([7, 8]).tobytes())


def contents(model: Model) -> dict[str, bytes]:
    return {t.name: array(model, t).tobytes() for t in tensors(model.proto)}


def data_of(target: Path) -> Path:
    """The data file that was saved with a model."""
    (path,) = (p for p in target.parent.iterdir() if re.fullmatch(r"out\.onnx\.[0-9a-f]{16}\.data", p.name))
    return path


def test_external_data_round_trip(tmp_path):
    model = load(external(tmp_path))
    before = model.proto.SerializeToString(deterministic=True)
    save(model, tmp_path / "out.onnx")
    again = load(tmp_path / "out.onnx")
    assert contents(again) == contents(model)
    assert {name: len(content) for name, content in contents(again).items()} == {
        "w": 48, "tied": 48, "b": 2_400_000, "inline": 16, "c": 8}  # fmt: skip
    data = data_of(tmp_path / "out.onnx").name
    assert list(again.files) == [data]
    assert model.proto.SerializeToString(deterministic=True) == before
    onnx.checker.check_model(str(tmp_path / "out.onnx"))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "a.bin",
        "in.onnx",
        "out.onnx",
        data,
        "sub",
    ]


def test_only_references_change(tmp_path):
    model = load(external(tmp_path))
    save(model, tmp_path / "out.onnx")
    saved = load(tmp_path / "out.onnx").proto
    for proto in (saved, expected := onnx.ModelProto.FromString(model.proto.SerializeToString())):
        for t in tensors(proto):
            del t.external_data[:]
    assert saved == expected


def test_saved_regions_are_shared_aligned_and_packed_once(tmp_path):
    save(load(external(tmp_path)), tmp_path / "out.onnx")
    proto = onnx.load(tmp_path / "out.onnx", load_external_data=False)
    entries = {t.name: {e.key: e.value for e in t.external_data} for t in tensors(proto)}
    data = data_of(tmp_path / "out.onnx")
    assert entries == {
        "c": {"location": data.name, "offset": "0", "length": "8"},
        "w": {"location": data.name, "offset": "4096", "length": "48"},
        "tied": {"location": data.name, "offset": "4096", "length": "48", "note": "kept"},
        "b": {"location": data.name, "offset": "65536", "length": "2400000"},
        "inline": {},
    }
    assert data.stat().st_size == 65536 + 2_400_000
    assert data.name == f"out.onnx.{hashlib.sha256(data.read_bytes()).hexdigest()[:16]}.data"


def test_saving_external_data_is_deterministic(tmp_path):
    model = load(external(tmp_path))
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        save(model, tmp_path / folder / "out.onnx")
    one, other = ({p.name: p.read_bytes() for p in (tmp_path / folder).iterdir()} for folder in ("a", "b"))
    assert one == other
    assert len(one) == 2


def test_the_digest_covers_external_data_in_the_order_of_locations(tmp_path):
    path = external(tmp_path)
    parts = [path, tmp_path / "a.bin", tmp_path / "sub" / "b.bin"]
    assert load(path).sha256 == hashlib.sha256(b"".join(p.read_bytes() for p in parts)).hexdigest()


def test_stored_bytes_and_parameters_count_shared_regions_once(tmp_path):
    model = load(external(tmp_path))
    assert stored_bytes(model) == (tmp_path / "in.onnx").stat().st_size + 48 + 8 + 2_400_000
    assert parameters(model) == 12 + 2 + 600_000 + 4


@pytest.mark.filterwarnings("ignore:Ignoring unknown external data key:UserWarning")
def test_onnx_reads_what_is_saved(tmp_path):
    model = load(external(tmp_path))
    save(model, tmp_path / "out.onnx")
    loaded = onnx.load(tmp_path / "out.onnx")
    assert {t.name: t.raw_data for t in tensors(loaded)} == contents(model)


def test_saving_beside_the_input_never_overwrites_its_data(tmp_path):
    proto = linear(reference("w", (4, 3), location="out.onnx.data"))
    (tmp_path / "out.onnx.data").write_bytes(W.tobytes())
    model = load(write(tmp_path, proto))
    for act in (check_target, save):
        with pytest.raises(InputError, match="data file of the input model"):
            act(model, tmp_path / "out.onnx.data")
    for _ in range(2):
        save(model, tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx.data").read_bytes() == W.tobytes()
    assert contents(load(tmp_path / "out.onnx")) == contents(model)


BAD_REFERENCES = {
    "missing": ({"location": "no.bin"}, "not there"),
    "folder": ({"location": "sub"}, "no file"),
    "absolute": ({"location": "/etc/passwd"}, "'/etc/passwd'"),
    "drive": ({"location": "C:\\w.bin"}, "inside the model's folder"),
    "parent": ({"location": "../w.bin"}, "'../w.bin'"),
    "inner parent": ({"location": "sub/../w.bin"}, "'sub/../w.bin'"),
    "windows parent": ({"location": "..\\w.bin"}, "inside the model's folder"),
    "relative to a drive": ({"location": "c:w.bin"}, "inside the model's folder"),
    "backslash": ({"location": "sub\\w.bin"}, "with / between"),
    "empty": ({"location": ""}, "''"),
    "none": ({}, "''"),
    "null": ({"location": "w\0.bin"}, "inside the model's folder"),
    "link out": ({"location": "link.bin"}, "links to"),
    "link loop": ({"location": "loop.bin"}, "not there"),
    "negative offset": ({"location": "w.bin", "offset": -1}, "offset '-1'"),
    "negative length": ({"location": "w.bin", "length": -48}, "length '-48'"),
    "words": ({"location": "w.bin", "offset": "four"}, "offset 'four'"),
    "other digits": ({"location": "w.bin", "offset": "٤"}, "offset '٤'"),
    "endless": ({"location": "w.bin", "offset": "9" * 5000}, "no size"),
    "offset beyond": ({"location": "w.bin", "offset": 49}, "ends at byte 97", "which has 48"),
    "far beyond": ({"location": "w.bin", "offset": 2**63}, "truncated"),
    "length beyond": ({"location": "w.bin", "offset": 4, "length": 48}, "ends at byte 52"),
    "length short": ({"location": "w.bin", "length": 44}, "44 external bytes", "takes 48"),
}


@pytest.mark.parametrize("case", BAD_REFERENCES.values(), ids=BAD_REFERENCES)
@pytest.mark.parametrize("place", PLACES)
def test_bad_references_are_refused_wherever_they_are(case, place, tmp_path):
    entries, *words = case
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "w.bin").write_bytes(W.tobytes())
    (folder / "link.bin").symlink_to(tmp_path / "w.bin")
    (folder / "loop.bin").symlink_to("loop.bin")
    path = write(folder, place(reference("w", (12,), **entries)), w=W.tobytes())
    refused(path, str(folder), *words)


def test_huge_external_dims_are_refused_before_anything_is_allocated(tmp_path):
    refused(
        write(tmp_path, linear(reference("w", (2**40, 2**20), location="w.bin")), w=bytes(48)), "truncated"
    )


def test_external_data_of_a_model_in_memory_is_refused():
    refused(linear(reference("w", (4, 3), location="w.bin")), "'w.bin'", "pass the model by its path")


def test_links_of_model_and_data_into_one_store_are_followed(tmp_path):
    store, snapshot = tmp_path / "blobs", tmp_path / "snapshots"
    store.mkdir()
    snapshot.mkdir()
    write(store, linear(reference("w", (4, 3), location="w.bin")), d=W.tobytes())
    (snapshot / "m.onnx").symlink_to("../blobs/in.onnx")
    (snapshot / "w.bin").symlink_to("../blobs/d.bin")
    model = load(snapshot / "m.onnx")
    assert array(model, model.proto.graph.initializer[0]).tobytes() == W.tobytes()


def test_a_data_file_that_shrinks_after_loading(tmp_path):
    path = external(tmp_path)
    model = load(path)
    os.truncate(tmp_path / "a.bin", 8)
    with pytest.raises(InputError, match="truncated"):
        array(model, model.proto.graph.initializer[0])
    with pytest.raises(InputError, match="truncated"):
        save(model, tmp_path / "out.onnx")
    assert not list(tmp_path.glob("*out*"))


def test_the_runtime_computes_the_same_from_what_is_saved(tmp_path):
    path = write(tmp_path, linear(reference("w", (4, 3), location="w.bin", offset=1)), w=b"\0" + W.tobytes())
    save(load(path), tmp_path / "out.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "out.onnx", providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": np.eye(4, dtype=np.float32)})[0].tobytes() == W.tobytes()


# --- models over 2 GB, in small ---------------------------------------------------------------


@pytest.fixture
def small_limit(monkeypatch):
    """Lower the limit of protobuf to 20,000 bytes."""
    original = loading.serialized

    def limited(proto: onnx.ModelProto) -> bytes | None:
        data = original(proto)
        return data if data is not None and len(data) <= 20_000 else None

    for module in (loading, saving):
        monkeypatch.setattr(module, "serialized", limited)


def test_what_exceeds_protobuf_becomes_external(tmp_path, small_limit):
    typed_weight = helper.make_tensor("typed", TensorProto.FLOAT, [5000], np.arange(5000))
    tags = helper.make_tensor("tags", TensorProto.STRING, [2], ["a", "b"])
    typed_weight.doc_string = "kept"
    part = TensorProto(name="part", data_type=1, dims=[5000], raw_data=bytes(8))
    part.segment.end = 2
    proto = linear(weight(0, (4, 5000)), typed_weight, weight(2, (3,), "small"), tags)
    proto.training_info.add().algorithm.initializer.append(part)
    model = load(proto)
    before = proto.SerializeToString(deterministic=True)
    assert stored_bytes(model) == pytest.approx(len(before), rel=0.01)
    save(model, tmp_path / "out.onnx")
    assert proto.SerializeToString(deterministic=True) == before
    again = load(tmp_path / "out.onnx")
    assert again.proto.training_info == proto.training_info
    assert again.proto.graph.initializer[1].doc_string == "kept"
    for old, new in zip(proto.graph.initializer, again.proto.graph.initializer, strict=True):
        assert array(again, new).tolist() == array(model, old).tolist()
    places = {t.name: t.data_location for t in again.proto.graph.initializer}
    assert places == {"w": 1, "typed": 1, "small": 0, "tags": 0}


def test_what_exceeds_protobuf_beside_its_tensors_is_refused(tmp_path, small_limit):
    proto = linear(weight())
    proto.doc_string = "x" * 20_001
    with pytest.raises(InputError, match="over 2 GB beside"):
        save(load(proto), tmp_path / "out.onnx")
    assert not list(tmp_path.iterdir())


def test_the_digest_of_what_exceeds_protobuf_sees_every_byte(small_limit):
    tags = [helper.make_tensor("tags", TensorProto.STRING, [1], [tag]) for tag in ("a", "b")]
    digests = {
        load(linear(weight(seed, shape), tag)).sha256
        for seed in range(3)
        for shape in ((4, 5000), (5000, 4))
        for tag in tags
    }
    assert len(digests) == 12
    assert load(linear(weight(0, (4, 5000)), tags[0])).sha256 in digests


def test_a_spilled_tensor_is_saved_with_the_model(tmp_path):
    source = load(linear(weight()))
    rng = np.random.default_rng(1)
    dtypes = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]
    arrays = {f"w{i}": rng.standard_normal((i + 1, 5)).astype(dtype) for i, dtype in enumerate(dtypes)}
    with Spill(tmp_path) as spill:
        proto = onnx.ModelProto()
        proto.CopyFrom(source.proto)
        proto.graph.initializer.extend(spill.tensor(name, value) for name, value in arrays.items())
        model = replace(source, proto=proto, files={**source.files, **spill.files})
        assert contents(model) == {
            "w": W.tobytes(),
            **{name: value.tobytes() for name, value in arrays.items()},
        }
        save(model, tmp_path / "out.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.onnx", data_of(tmp_path / "out.onnx").name]
    assert contents(load(tmp_path / "out.onnx")) == {
        "w": W.tobytes(), **{name: value.tobytes() for name, value in arrays.items()}}  # fmt: skip


def test_a_spill_goes_even_after_an_error(tmp_path):
    def fail() -> None:
        with Spill(tmp_path) as spill:
            spill.tensor("w", W)
            assert len(list(tmp_path.iterdir())) == 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not list(tmp_path.iterdir())


def test_a_spill_without_a_folder(tmp_path):
    with pytest.raises(InputError, match="takes no temporary file"):
        Spill(tmp_path / "no")


# --- saving -----------------------------------------------------------------------------------


@contextmanager
def full_disk():
    """Let no file grow over 1000 bytes; not longer than needed, as pytest may itself write to one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def old_target(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    for name in ("out.onnx", "out.onnx.data"):
        (folder / name).write_bytes(name.encode())
    return folder / "out.onnx"


def untouched(target: Path) -> bool:
    return {p.name: p.read_bytes() for p in target.parent.iterdir()} == {
        "out.onnx": b"out.onnx", "out.onnx.data": b"out.onnx.data"}  # fmt: skip


def test_a_full_disk_leaves_the_target(tmp_path):
    target = old_target(tmp_path)
    model = load(linear(weight(0, (4, 100))))
    with full_disk(), pytest.raises(InputError, match=r"out\.onnx cannot be written \(File too large\)"):
        save(model, target)
    assert untouched(target)


def test_a_full_disk_leaves_the_target_and_its_data(tmp_path):
    target = old_target(tmp_path)
    model = load(external(tmp_path))
    with full_disk(), pytest.raises(InputError, match="File too large"):
        save(model, target)
    assert untouched(target)


def test_a_full_disk_under_a_spill(tmp_path):
    with Spill(tmp_path) as spill, full_disk(), pytest.raises(InputError, match="File too large"):
        spill.tensor("w", np.ones((100, 100)))


@pytest.mark.parametrize("error", [KeyboardInterrupt, PermissionError, MemoryError])
@pytest.mark.parametrize("failing", range(2))
@pytest.mark.parametrize("existing", [True, False])
def test_a_failing_rename_leaves_both_targets(existing, failing, error, tmp_path, monkeypatch):
    if existing:
        target = old_target(tmp_path)
    else:
        target = tmp_path / "out" / "out.onnx"
        target.parent.mkdir()
    model = load(external(tmp_path))
    original, calls = Path.replace, []

    def rename(self: Path, other: Path) -> Path:
        calls.append(other)
        if len(calls) == failing + 1:
            raise error
        return original(self, other)

    monkeypatch.setattr(Path, "replace", rename)
    with pytest.raises(InputError if error is PermissionError else error):
        save(model, target)
    assert untouched(target) if existing else not list(target.parent.iterdir())


def test_an_existing_target_is_replaced(tmp_path):
    target = old_target(tmp_path)
    model = load(external(tmp_path))
    save(model, target)
    assert contents(load(target)) == contents(model)
    # The old target is no model, so that nobody knows whose data that is.
    names = ["out.onnx", data_of(target).name, "out.onnx.data"]
    assert sorted(p.name for p in target.parent.iterdir()) == names


def test_a_model_without_external_data_leaves_a_data_file_alone(tmp_path):
    target = old_target(tmp_path)
    save(load(linear(weight())), target)
    assert target.with_name("out.onnx.data").read_bytes() == b"out.onnx.data"


def test_a_new_file_has_the_permissions_of_any_new_file(tmp_path):
    save(load(external(tmp_path)), tmp_path / "out.onnx")
    (tmp_path / "other").touch()
    files = (tmp_path / "other", tmp_path / "out.onnx", data_of(tmp_path / "out.onnx"))
    assert len({file.stat().st_mode for file in files}) == 1


def test_targets_that_cannot_be_written(tmp_path):
    model = load(linear(weight()))
    os.mkfifo(tmp_path / "pipe")
    bad = {tmp_path: "is a folder", Path(): "is a folder", tmp_path / "no" / "out.onnx": "no folder",
           tmp_path / "pipe": "no regular file", Path("/dev/null"): "no regular file"}  # fmt: skip
    for target, words in bad.items():
        for act in (check_target, save):
            with pytest.raises(InputError, match=words):
                act(model, target)
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"]


@pytest.mark.parametrize("name", ["x" * 300, "x" * 253, "a\0b", "pipe/out.onnx"])
def test_targets_that_no_file_can_be(name, tmp_path):
    model = load(external(tmp_path))
    os.mkfifo(tmp_path / "pipe")
    before = sorted(tmp_path.iterdir())
    for act in (check_target, save):
        with pytest.raises(InputError, match="cannot be written"):
            act(model, tmp_path / name)
    assert sorted(tmp_path.iterdir()) == before


def test_a_target_without_permission(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(InputError, match="change its permissions"):
        save(load(linear(weight())), tmp_path / "out.onnx")
    assert not list(tmp_path.iterdir())


def test_the_input_may_be_the_target(tmp_path):
    path = write(tmp_path, linear(weight()))
    content = path.read_bytes()
    save(load(path), path)
    assert path.read_bytes() == content


# --- scopes, parameters, outlines -------------------------------------------------------------


def branch(name: str, *nodes: onnx.NodeProto) -> onnx.GraphProto:
    return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info("o", 1, None)])


def condition(name: str, *inside: onnx.NodeProto) -> onnx.NodeProto:
    return helper.make_node(
        "If", ["c"], ["o"], name, then_branch=branch("t", *inside), else_branch=branch("e")
    )


def test_paths_of_scopes():
    proto = linear(weight())
    inner = condition("B")
    proto.graph.node.extend(
        [condition("A", inner, condition("")), condition("A"), condition(""), condition("A/then")]
    )
    lists = helper.make_node("Switch", [], [], "S", domain="custom")
    lists.attribute.append(helper.make_attribute("cases", [branch("0"), branch("1")]))
    proto.graph.node.append(lists)
    opset = [helper.make_opsetid("", 17)]
    proto.functions.extend([
        helper.make_function("d", "f", [], ["o"], [condition("F")], opset),
        helper.make_function("d", "f", [], ["o"], [], opset, overload="2"),
    ])  # fmt: skip
    found = {scope.path: (scope.parent, scope.node, scope.attribute) for scope in scopes(proto)}
    assert found == {
        "": (None, None, ""),
        "A.else_branch": ("", 1, "else_branch"),
        "A.then_branch": ("", 1, "then_branch"),
        "A.then_branch/B.else_branch": ("A.then_branch", 0, "else_branch"),
        "A.then_branch/B.then_branch": ("A.then_branch", 0, "then_branch"),
        "A.then_branch/#1.else_branch": ("A.then_branch", 1, "else_branch"),
        "A.then_branch/#1.then_branch": ("A.then_branch", 1, "then_branch"),
        "A#2.else_branch": ("", 2, "else_branch"),
        "A#2.then_branch": ("", 2, "then_branch"),
        "#3.else_branch": ("", 3, "else_branch"),
        "#3.then_branch": ("", 3, "then_branch"),
        "A/then.else_branch": ("", 4, "else_branch"),
        "A/then.then_branch": ("", 4, "then_branch"),
        "S.cases[0]": ("", 5, "cases"),
        "S.cases[1]": ("", 5, "cases"),
        "d:f": (None, None, ""),
        "d:f/F.else_branch": ("d:f", 0, "else_branch"),
        "d:f/F.then_branch": ("d:f", 0, "then_branch"),
        "d:f:2": (None, None, ""),
    }


def test_paths_are_unique_whatever_the_names():
    proto = linear(weight())
    proto.graph.node.extend(
        condition(name, condition(name)) for name in ["", "#1", "#1", "", "a", "a.then_branch/a", "a"]
    )
    paths = [scope.path for scope in scopes(proto)]
    assert len(paths) == len(set(paths)) == 1 + 7 * 4


def test_scopes_hand_out_the_protos_themselves():
    proto = linear(weight())
    proto.graph.node.append(condition("A"))
    proto.functions.append(helper.make_function("d", "f", [], ["o"], [], []))
    main, *_, function = scopes(proto)
    assert main.graph is proto.graph
    assert main.function is None
    assert function.function is proto.functions[0]
    assert function.graph is None
    assert list(main.nodes) == list(proto.graph.node)


@pytest.mark.parametrize(
    ("kind", "counted"),
    [(k, k in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE))
     for name, k in TensorProto.DataType.items() if name not in ("UNDEFINED", "STRING")],
)  # fmt: skip
def test_only_floats_are_parameters(kind, counted):
    odd = TensorProto(name="w", data_type=kind, dims=[5, 8])
    odd.raw_data = bytes(stored_size(odd))
    assert parameters(load(linear(odd))) == (40 if counted else 0)


@pytest.mark.parametrize("place", PLACES)
def test_parameters_are_counted_in_every_scope(place):
    # linear holds the value alone; the others hold a 4 × 3 weight beside it, and the branch is there twice.
    expected = {"linear": 12, "in_branch": 36, "in_training": 12}.get(place.__name__, 24)
    assert parameters(load(place(weight(0, (12,))))) == expected


CONSTANTS = {
    "value_float": (1.0, 1),
    "value_floats": ([1.0, 2.0, 3.0], 3),
    "value_int": (1, 0),
    "value_ints": ([1, 2], 0),
    "value_string": ("a", 0),
    "sparse_value": (
        helper.make_sparse_tensor(weight(0, (5,)), numpy_helper.from_array(np.arange(5)), [100]),
        5,
    ),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_parameters_of_constants(name):
    value, expected = CONSTANTS[name]
    proto = linear(weight())
    proto.graph.node.append(helper.make_node("Constant", [], ["c"], **{name: value}))
    assert parameters(load(proto)) == 12 + expected


def test_a_constant_of_another_domain_or_an_attribute_reference_is_no_parameter():
    proto = linear(weight())
    proto.graph.node.append(helper.make_node("Constant", [], ["c"], domain="custom", value_floats=[1.0, 2.0]))
    node = helper.make_node("Constant", [], ["o"])
    node.attribute.append(
        onnx.AttributeProto(name="value_float", ref_attr_name="a", type=onnx.AttributeProto.FLOAT)
    )
    proto.functions.append(
        helper.make_function("d", "f", [], ["o"], [node], [helper.make_opsetid("", 17)], ["a"])
    )
    assert parameters(load(proto)) == 12


def test_an_outline_drops_large_contents_everywhere():
    for place in PLACES:
        proto = place(weight(0, (100, 100)))
        before = proto.SerializeToString(deterministic=True)
        light = outline(proto)
        assert light.ByteSize() < len(before) - 39_000
        assert [(t.name, list(t.dims), t.data_type) for t in tensors(light)] == [
            (t.name, list(t.dims), t.data_type) for t in tensors(proto)
        ]
        assert proto.SerializeToString(deterministic=True) == before


def test_an_outline_keeps_what_shape_inference_reads():
    proto = parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]> g (float[2,400] x) => (y)
        {h = MatMul(x, w) c = Constant<value_floats = [1.0, 2.0]>() z = Reshape(h, s) y = Mul(z, c)}""")
    proto.graph.initializer.extend([weight(0, (400, 6)), numpy_helper.from_array(np.array([3, 2, 2]), "s")])
    inferred = onnx.shape_inference.infer_shapes(outline(proto), strict_mode=True)
    assert list(inferred.graph.value_info) == list(onnx.shape_inference.infer_shapes(proto).graph.value_info)
    assert [d.dim_value for d in inferred.graph.output[0].type.tensor_type.shape.dim] == [3, 2, 2]


def test_an_outline_reads_small_external_tensors_in(tmp_path):
    model = load(external(tmp_path))
    held = {t.name: t.raw_data for t in tensors(outline(model))}
    assert held == {**contents(model), "b": b""}
    assert {t.name: t.raw_data for t in tensors(outline(model.proto))} == {
        "w": b"", "tied": b"", "b": b"", "c": b"", "inline": contents(model)["inline"]}  # fmt: skip
