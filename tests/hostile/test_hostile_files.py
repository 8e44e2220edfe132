"""Hostile files beside a model: archives, images, texts and data files that grow, lie or lead elsewhere."""
# ruff: noqa: E501 - tables of files, one a line

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
import zlib

import onnx
import pytest
from corpus import KINDS

from tiny import cnn


def header(shape: object, descr: str = "<f4", size: int = 0) -> bytes:
    """The bytes of an .npy file that claims a shape."""
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + 1) + text + b"\n" + bytes(size)


def archive(*members: tuple[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", compression) as file:
        for name, data in members:
            file.writestr(name, data)
    return made.getvalue()


def overlapping() -> bytes:
    """A thousand members that are the same bytes."""
    data = archive(("x.npy", header((2**18,), size=2**20)))
    at = data.rindex(b"PK\x01\x02")
    end = data.rindex(b"PK\x05\x06")
    entry = data[at:end]
    entries = b"".join(entry.replace(b"x.npy", f"{n:05}"[:5].encode()) for n in range(1000))
    tail = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 1000, 1000, len(entries), at, 0)
    return data[:at] + entries + tail


ARCHIVES = {
    "a bomb": archive(("x.npy", header((2**20, 8, 6, 6), size=2**24) + bytes(2**26))),
    "a shape that overflows": archive(("x.npy", header((2**62, 2**62)))),
    "a shape of 2^40": archive(("x.npy", header((2**40, 8, 6, 6)))),
    "a negative shape": archive(("x.npy", header((-1, 8, 6, 6), size=4096))),
    "an empty shape of 2^62": archive(("x.npy", header((0, 2**62, 2**62)))),
    "a shape of text": archive(("x.npy", header("('a',)"))),
    "a shape of code": archive(("x.npy", header("__import__('os').system('touch owned')"))),
    "a long header": archive(("x.npy", header((1,) * 20000))),
    "a deep header": archive(("x.npy", header("(" * 9000 + ")" * 9000))),
    "objects": archive(("x.npy", header((4,), "|O", 64) + b"cos\nsystem\n(S'touch owned'\ntR.")),
    "a type of 2^31 bytes": archive(("x.npy", header((1,), "|V2147483647"))),
    "members that overlap": overlapping(),
    "a member twice": archive(("x.npy", header((1,), size=4)), ("y.npy", header((2,), size=8))).replace(b"y.npy", b"x.npy"),
    "another compression": archive(("x.npy", header((4,), size=16)), compression=zipfile.ZIP_LZMA),
    "no member": archive(),
    "names that escape": archive(("../../x\x1b[31m.npy", header((4,), size=16))),
}  # fmt: skip


@pytest.mark.parametrize("option", ["--calibration", "--inputs"])
@pytest.mark.parametrize("name", ARCHIVES)
def test_archives(name, option, server, tmp_path):
    onnx.save(cnn(), tmp_path / "in.onnx")
    (tmp_path / "samples.npz").write_bytes(ARCHIVES[name])
    run = server.run(tmp_path, "in.onnx", "out.onnx", "--ratio", "0.5", "--no-cache", option, "samples.npz")
    assert not run.fault, run.err
    assert run.code == 2
    assert not (tmp_path / "owned").exists()


def png(width: int, height: int) -> bytes:
    """A small file of a picture with one colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = zlib.compress(bytes(min(height * (width // 8 + 2), 2**24)))
    head = chunk(b"IHDR", struct.pack(">2I5B", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (png(2**15, 2**15), "more pixels than"),
        (png(2**31 - 1, 2**31 - 1), "more pixels than"),
        (png(0, 0), "no image that can be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(owned) (w) file\n", "no image that can be read"),
        (b"P6 99999 99999 255\n", "more pixels than"),
    ],
    ids=("2^30 pixels", "2^62 pixels", "no pixels", "a program", "no contents"),
)
def test_images(data, words, server, tmp_path):
    kind = KINDS["images"]
    kind.make(tmp_path)
    (tmp_path / "photos" / "bad.png").write_bytes(data)
    run = server.run(tmp_path, *kind.arguments)
    assert not run.fault, run.err
    assert run.code == 2
    assert words in run.message


DEEP = 50_000


@pytest.mark.parametrize(
    "text",
    [
        "[" * DEEP,
        '{"a":' * DEEP,
        "[" * DEEP + "]" * DEEP,
        "9" * 10**6,
        f'{{"version": {"9" * 10**6}}}',
        '{"version": 4, "layers": [' + ",".join(["{}"] * 10**5) + "]}",
        json.dumps(
            {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 2**63}, "unk_token": "b"}}
        ),
        json.dumps(
            {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 2**31}, "merges": [["a", "a"]]}}
        ),
        json.dumps({"version": "1.0", "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(" * 5000}}}),
        "\ufeff{}",
        '"\\ud800"',
    ],
    ids=range(11),
)
@pytest.mark.parametrize("name", ["plans", "tokenizers"])
def test_texts_in_JSON(name, text, server, tmp_path):
    KINDS[name].make(tmp_path)
    (tmp_path / KINDS[name].files).write_text(text)
    run = server.run(tmp_path, *KINDS[name].arguments)
    assert not run.fault, run.err
    assert run.code == 2
    assert KINDS[name].files in run.message


@pytest.mark.parametrize(
    "text",
    [
        "power = 1" + "0" * 10**6,
        "power = 0x" + "f" * 10**6,
        "power = 1e999",
        "power = nan",
        "folds = " + "[" * DEEP,
        "a = " + "{a = " * DEEP,
        ".".join("a" * DEEP) + " = 1",
        "[" + ".".join("a" * DEEP) + "]",
        "power = 9999-99-99",
        'summary = "\\UFFFFFFFF"',
        'summary = "\x1b[31m"',
        "groups = [" + "1, " * 10**5 + "]",
        ".".join("a" * 8000) + " = 1",
    ],
    ids=range(13),
)
def test_recipes(text, server, tmp_path):
    kind = KINDS["recipes"]
    kind.make(tmp_path)
    (tmp_path / "recipe.toml").write_text(text)
    run = server.run(tmp_path, *kind.arguments)
    assert not run.fault, run.err
    assert run.code == 2
    assert "recipe.toml" in run.message


ELSEWHERE = {
    "absolute": {"location": "/etc/passwd"},
    "above": {"location": "../secret"},
    "above, in the middle": {"location": "a/../../secret"},
    "of Windows": {"location": "C:\\secret"},
    "of Windows, above": {"location": "..\\secret"},
    "of Windows, on the network": {"location": "\\\\host\\secret"},
    "empty": {"location": ""},
    "a zero byte": {"location": "in.data\0"},
    "a folder": {"location": "."},
    "the home": {"location": "~/secret"},
    "a link out": {"location": "link"},
    "a device": {"location": "null"},
    "a pipe": {"location": "pipe"},
    "escapes": {"location": "\x1b[31m\u202e"},
    "an offset that overflows": {"location": "in.data", "offset": str(2**64)},
    "an offset of many digits": {"location": "in.data", "offset": "9" * 5000},
    "a negative offset": {"location": "in.data", "offset": "-4"},
    "an offset in another script": {"location": "in.data", "offset": "\u0664"},
    "a length that overflows": {"location": "in.data", "length": str(2**64 - 1)},
    "a length of text": {"location": "in.data", "length": "1e3"},
    "both at the limit": {"location": "in.data", "offset": str(2**63 - 1), "length": str(2**63 - 1)},
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_data_elsewhere(name, server, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(bytes(2**20))
    KINDS["a data file"].make(folder)
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "null").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe")
    proto = onnx.load(folder / "in.onnx", load_external_data=False)
    tensor = proto.graph.initializer[0]
    del tensor.external_data[:]
    for key, value in ELSEWHERE[name].items():
        tensor.external_data.add(key=key, value=value)
    (folder / "in.onnx").write_bytes(proto.SerializeToString())
    run = server.run(folder, *KINDS["a data file"].arguments)
    assert not run.fault, run.err
    assert run.code == 2
